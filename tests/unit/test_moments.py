"""Adam and AdamW with moments in bfloat16: torch's own numbers, rounded after each step, and everything else alike."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigtrain
from bigtrain import moments
from bigtrain.checkpoint import diff, find, open_checkpoint, verify
from bigtrain.config.loader import from_dict
from bigtrain.errors import ConfigError, UserError
from bigtrain.moments import MOMENTS, Bf16Adam, Bf16AdamW
from bigtrain.optim import plan_optimizer
from tests.helpers import zoo
from tests.helpers.resuming import BrokenOffError, break_off, losses, one_thread, stop
from tests.helpers.resuming import config as resumed_config

PAIRS = [(torch.optim.Adam, Bf16Adam), (torch.optim.AdamW, Bf16AdamW)]
SHAPES = [(37, 53), (5,), (), (0, 4), (3000,)]
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


@pytest.fixture(autouse=True)
def _in_small_chunks(monkeypatch):
    monkeypatch.setattr(moments, "_CHUNK_ON_HOST", 1000)  # so that parameters are cut, and others go together


def pairs(dtype=torch.float32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    made = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    made.append(torch.randn(6, 4, 3, 3, dtype=dtype).to(memory_format=torch.channels_last))
    return [(values.clone().requires_grad_(), values.clone().requires_grad_()) for values in made]


def give_gradients(tensors: list[tuple[Tensor, Tensor]]) -> None:
    for ours, theirs in tensors:
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()


def assert_equal(tensors: list[tuple[Tensor, Tensor]], mine: Any, torchs: Any) -> None:
    for ours, theirs in tensors:
        assert torch.equal(ours, theirs)
        state, wanted = mine.state[ours], torchs.state[theirs]
        assert state.keys() == wanted.keys()
        assert torch.equal(state["step"], wanted["step"])
        for kind in state.keys() & set(MOMENTS):
            assert state[kind].shape == ours.shape
            assert torch.equal(state[kind].to(wanted[kind].dtype), wanted[kind])


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}])
@pytest.mark.parametrize(("torchs_class", "my_class"), PAIRS)
def test_kept_in_float32_it_is_torchs_own_to_the_last_bit(monkeypatch, torchs_class, my_class, options):
    monkeypatch.setattr(my_class, "moments_dtype", torch.float32)
    tensors = pairs()
    mine = my_class([ours for ours, _ in tensors], **HYPER | options)
    torchs = torchs_class([theirs for _, theirs in tensors], **HYPER | options)
    for _ in range(6):
        give_gradients(tensors)
        mine.step()
        torchs.step()
        assert_equal(tensors, mine, torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("torchs_class", "my_class"), PAIRS)
def test_in_bfloat16_it_is_torchs_with_moments_rounded_after_each_step(torchs_class, my_class, amsgrad, dtype):
    tensors = pairs(dtype)
    mine = my_class([ours for ours, _ in tensors], **HYPER, amsgrad=amsgrad)
    torchs = torchs_class([theirs for _, theirs in tensors], **HYPER, amsgrad=amsgrad)
    for _ in range(6):
        give_gradients(tensors)
        mine.step()
        torchs.step()
        with torch.no_grad():
            zoo.round_moments(torchs)
        assert_equal(tensors, mine, torchs)
        assert {t.dtype for s in mine.state.values() for kind, t in s.items() if kind != "step"} == {torch.bfloat16}


def test_a_gradient_that_is_not_there_leaves_its_parameter_alone():
    tensors = pairs()
    mine = Bf16AdamW([ours for ours, _ in tensors], **HYPER)
    mine.step()
    assert not mine.state
    give_gradients(tensors[:1])
    mine.step()
    assert list(mine.state) == [tensors[0][0]]
    assert all(torch.equal(ours, theirs) for ours, theirs in tensors[1:])


@pytest.mark.parametrize("my_class", [Bf16Adam, Bf16AdamW])
def test_gradients_are_divided_and_steps_left_out(my_class):
    tensors = pairs()
    divided, given = (my_class([pair[i] for pair in tensors], **HYPER) for i in (0, 1))
    divided.grad_scale = torch.tensor(4.0)  # a power of two divides without rounding
    for poisoned in (True, False, True, False):  # the first step of all, and one between
        give_gradients(tensors)
        before = pickle.dumps([[ours for ours, _ in tensors], divided.state_dict()]) if divided.state else None
        for ours, theirs in tensors:
            if poisoned:
                ours.grad.fill_(torch.nan)
            else:
                theirs.grad /= 4.0
        divided.found_inf = torch.tensor(float(poisoned))
        divided.step()
        if poisoned and before:
            assert pickle.dumps([[ours for ours, _ in tensors], divided.state_dict()]) == before
        if not poisoned:
            given.step()
            assert_equal(tensors, divided, given)
    assert all(state["step"] == 2 for state in divided.state.values())


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True}])
@pytest.mark.parametrize("my_class", [Bf16Adam, Bf16AdamW])
def test_compiled_it_differs_in_the_last_bits_alone(monkeypatch, my_class, options):
    """One kernel for parameters of every shape and for every rate; those that lie in no row go the other way."""
    monkeypatch.setattr(moments, "_CHUNK_COMPILED", 900)  # some are cut
    tensors = pairs()
    compiled, plain = (my_class([pair[i] for pair in tensors], **HYPER | options) for i in (0, 1))
    compiled.compile_step()
    torch._dynamo.reset()
    for step in range(6):
        give_gradients(tensors)
        for optimizer in (compiled, plain):
            optimizer.grad_scale = torch.tensor(3.0)
            optimizer.found_inf = torch.tensor(float(step == 3))
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled.step()
        plain.step()
        for ours, theirs in tensors:
            off = (ours - theirs).detach().abs()
            assert (off > 1e-2 * 0.05).sum() == 0
            assert (off > 1e-5).sum() <= 1e-2 * off.numel()
            assert torch.equal(compiled.state[ours]["step"], plain.state[theirs]["step"])
            for kind in plain.state[theirs].keys() & set(MOMENTS):
                kept, wanted = compiled.state[ours][kind], plain.state[theirs][kind]
                assert kept.dtype == torch.bfloat16
                assert kept.shape == ours.shape
                assert (kept != wanted).sum() <= 1e-2 * kept.numel()
                assert (kept - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.slow
def test_compiled_a_step_left_out_leaves_all_as_it_was():
    tensors = pairs()
    optimizer = Bf16AdamW([ours for ours, _ in tensors], **HYPER)
    optimizer.compile_step()
    for poisoned in (False, True):
        give_gradients(tensors)
        before = pickle.dumps([[ours for ours, _ in tensors], optimizer.state_dict()])
        if poisoned:
            tensors[0][0].grad.fill_(torch.inf)
        optimizer.found_inf = torch.tensor(float(poisoned))
        optimizer.step()
    assert pickle.dumps([[ours for ours, _ in tensors], optimizer.state_dict()]) == before


def test_parameters_of_several_dtypes_in_one_group():
    several = [torch.randn(7, dtype=dtype).requires_grad_() for dtype in (torch.float32, torch.float64, torch.float32)]
    alone = [p.detach().clone().requires_grad_() for p in several]
    together = Bf16AdamW(several, **HYPER)
    apart = [Bf16AdamW([p], **HYPER) for p in alone]
    give_gradients(list(zip(several, alone, strict=True)))
    together.step()
    for optimizer in apart:
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(several, alone, strict=True))


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_what_it_cannot_update_is_refused(kind):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    number = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    number.grad = number.detach().clone()
    optimizer = Bf16AdamW([embedding.weight if kind == "sparse" else number], lr=1e-3)
    with pytest.raises(UserError, match="need dense gradients of real numbers"):
        optimizer.step()


# ------------------------------------------------------------------------------------------------- in a run file

RUN = {
    "model": "bigmodel",
    "task": "classification",
    "data": {"name": "digits", "batch_size": 8},
    "train": {"steps": 2},
}
BETAS = {"args": {"betas": [0.9, 0.95]}}


def optim(**values: Any) -> Any:
    return from_dict({**RUN, "optim": values}).config.optim


def test_a_plan_has_4_bytes_a_parameter_and_divides_in_the_kernel():
    model = zoo.make_odd()
    for name in ("adam", "adamw"):
        wide, narrow = (
            plan_optimizer(model, optim(name=name, moments=moments, **BETAS)) for moments in ("fp32", "bf16")
        )
        assert (wide.bytes_per_element(), narrow.bytes_per_element()) == (8, 4)
        assert narrow.fusable
        assert narrow.elementwise
        assert narrow.slots(2) == wide.slots(2)
    assert plan_optimizer(model, optim(moments="bf16", args={"betas": [0.9, 0.95], "amsgrad": True})).slots(2) == {
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    }


def test_a_plan_compiles_the_step_where_the_run_compiles():
    for kept, compiles in (("bf16", True), ("bf16", False), ("fp32", True)):
        plan = plan_optimizer(zoo.make_odd(), optim(moments=kept, **BETAS), compiles=compiles)
        optimizer = plan.build(dict(zoo.make_odd().named_parameters()))
        assert (getattr(optimizer, "_compiled", None) is not None) == (kept == "bf16" and compiles)


@pytest.mark.parametrize("betas", [[0.9, 0.99], [0.99, 0.9], [0.0, 0.5]])
def test_betas_that_bfloat16_can_follow(betas):
    assert optim(moments="bf16", args={"betas": betas}).moments == "bf16"


@pytest.mark.parametrize(
    ("values", "said", "remedy"),
    [
        ({}, "cannot follow betas of [0.9, 0.999]", "optim.args.betas=[0.9, 0.95]"),
        ({"args": {"betas": [0.9, 0.991]}}, "cannot follow betas of [0.9, 0.991]", "optim.args.betas=[0.9, 0.95]"),
        ({"args": {"betas": [0.995, 0.9]}}, "cannot follow betas of [0.995, 0.9]", "optim.args.betas=[0.9, 0.95]"),
        ({"name": "sgd"}, "is for adam and adamw, and the optimizer is sgd", "optim.name=adamw"),
        ({"name": "torch.optim:NAdam", **BETAS}, "the optimizer is torch.optim:NAdam", "optim.name=adamw"),
        (
            {"args": {"betas": [0.9, 0.95], "foreach": True}},
            "leaves no choice of foreach",
            "take optim.args.foreach out",
        ),
    ],
)
def test_what_cannot_be_kept_in_bfloat16_is_refused(values, said, remedy):
    with pytest.raises(ConfigError) as caught:
        optim(moments="bf16", **values)
    (problem,) = caught.value.problems
    assert problem.key == "optim.moments"
    assert said in problem.text
    assert remedy in problem.remedy


@pytest.mark.parametrize("moments", ["fp16", "bfloat16", True])
def test_a_wrong_word_is_refused(moments):
    with pytest.raises(ConfigError) as caught:
        optim(moments=moments)
    (problem,) = caught.value.problems
    assert "it takes: fp32 | bf16" in problem.remedy


def test_values_of_betas_that_are_none_are_left_to_the_check_of_arguments():
    assert optim(moments="bf16", args={"betas": 0.9}).moments == "bf16"


def test_the_bound_is_where_bfloat16_stops_following():
    """A second moment of gradients that become ten times smaller, in bfloat16 against float32."""
    off = {}
    for beta in (0.95, 0.99, 0.998):
        generator = torch.Generator().manual_seed(0)
        exact, kept = torch.zeros(1000), torch.zeros(1000, dtype=torch.bfloat16)
        for step in range(2000):
            squared = torch.randn(1000, generator=generator).mul(1.0 if step < 1000 else 0.1).square()
            exact = exact * beta + squared * (1 - beta)
            kept = (kept.float() * beta + squared * (1 - beta)).bfloat16()
        off[beta] = float((kept.float() / exact).sqrt().mean()) - 1
    assert abs(off[0.95]) < 0.01
    assert abs(off[0.99]) < 0.03
    assert off[0.998] > 1


# ------------------------------------------------------------------------------------------------------- whole runs


def moments_in(path: Path) -> dict[tuple[str, str], torch.dtype]:
    with open_checkpoint(find(path / "checkpoints")[0]) as reader:
        return {key: spec.dtype for key, spec in reader.index.items() if key[0] in MOMENTS}


def run_file(folder: Path, moments: str = "bf16", **changes: Any) -> dict[str, Any]:
    values = resumed_config(folder, **changes)
    values["optim"] |= {"moments": moments, **BETAS}
    return values


def test_a_run_that_dies_goes_on_to_the_last_bit(tmp_path):
    with one_thread():
        unbroken = bigtrain.train(run_file(tmp_path), ["run.name=unbroken"])
        with pytest.raises(BrokenOffError):
            bigtrain.train(run_file(tmp_path), hooks=[break_off(7)])
        run = bigtrain.train(run_file(tmp_path))
    ours, theirs = (find(path / "checkpoints")[0] for path in (run.path, unbroken.path))
    assert losses(run) == losses(unbroken)
    assert diff(ours, theirs).differences == ()
    assert set(moments_in(run.path).values()) == {torch.bfloat16}
    verify(ours)


@pytest.mark.parametrize(("before", "after"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_goes_on_with_the_moments_that_its_run_file_says_now(tmp_path, before, after, capsys):
    bigtrain.train(run_file(tmp_path, before), hooks=[stop(5)])
    kept = moments_in(tmp_path / "runs" / "run")
    run = bigtrain.train(run_file(tmp_path, after), ["track.progress=plain"])
    assert f"changed: optim.moments was {before!r} and is {after!r}" in capsys.readouterr().out
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    assert set(kept.values()) == {dtypes[before]}
    assert moments_in(run.path) == dict.fromkeys(kept, dtypes[after])
