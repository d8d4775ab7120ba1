"""A run that changes what it trains: as plain torch would, to the last bit over every restart, and looked after."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
import torch
from torch import nn

import bigtrain
from bigtrain import phases
from bigtrain.checkpoint import diff, find, open_checkpoint
from bigtrain.errors import FreezeError, ModelError, RunFolderError
from bigtrain.replaying import replay
from bigtrain.state import whole
from bigtrain.tracking.reading import load_run
from tests.helpers.phases import LR, STEPS, config, factor, train_plainly
from tests.helpers.resuming import BrokenOffError, Trace, break_off, losses, one_thread, stop


@pytest.fixture(autouse=True)
def _in_one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    trace = Trace()
    with one_thread():
        run = bigtrain.train(config(folder), hooks=[trace])
    return run, trace


def events(path, name):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("event") == name]


def final(path):
    return find(path / "checkpoints")[0]


def assert_same(run, expected, weights):
    ours = losses(run)
    assert [step for step, *_ in ours] == list(range(1, STEPS + 1))
    for (_, loss, norm), (their_loss, their_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-5)
    for name, p in run.model.named_parameters():
        assert torch.allclose(p, weights[name], rtol=1e-4, atol=1e-6), name


def test_the_same_as_plain_torch(unbroken, tmp_path):
    assert_same(unbroken[0], *train_plainly(config(tmp_path)))


def test_momentum_of_what_begins_later_is_its_own(tmp_path):
    values = config(tmp_path, optim={"name": "sgd", "lr": LR, "weight_decay": 0.1, "clip_grad_norm": 0.5})
    values["optim"]["args"] = {"momentum": 0.9, "nesterov": True}
    assert_same(bigtrain.train(values), *train_plainly(values))


def test_every_phase_is_told_and_proved(unbroken):
    run, _ = unbroken
    begun = events(run.path, "phase")
    assert [(row["step"], row["phase"]) for row in begun] == [(0, 0), (4, 1), (8, 2)]
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    for row in begun:
        trained = sum(size for name, size in sizes.items() if factor(name, row["step"]) is not None)
        assert (row["trained"], row["parameters"]) == (trained, sum(sizes.values()))
    assert [row["begun"] for row in begun] == [[], ["layers.1.*", "norm.*"], ["layers.0.self_attn.*", "layers.1.*"]]
    proofs = events(run.path, "phase proved")
    assert [(row["step"], row["phase"]) for row in proofs] == [(3, 0), (4, 0), (7, 1), (8, 1), (11, 2), (12, 2)]
    assert {row["frozen_digest"] for row in proofs if row["phase"] == 1} == {begun[1]["frozen_digest"]}
    for row in proofs:
        trained = [name for name in sizes if factor(name, row["step"] - 1) is not None]
        assert (row["moved"], row["frozen"]) == (len(trained), len(sizes) - len(trained))


def test_what_never_begins_is_said_at_the_start(unbroken, tmp_path):
    assert events(unbroken[0].path, "warning") == []
    path = bigtrain.train(config(tmp_path), ["train.steps=5"]).path
    said = "begins after step 8, and the run has 5 steps: it never begins"
    assert [row["text"] for row in events(path, "warning")] == [f"finetune.unfreeze.{n} {said}" for n in (1, 2)]


def test_optimizer_state_is_that_of_what_trains(tmp_path):
    run = bigtrain.train(config(tmp_path, checkpoint={"every_steps": 1, "keep": None}))
    for path in find(run.path / "checkpoints"):
        with open_checkpoint(path) as reader:
            step = int(path.name.removeprefix("step-"))
            trained = {n for n, _ in run.model.named_parameters() if factor(n, step - 1) is not None}
            assert {name for kind, name in reader.index if kind == "exp_avg"} == trained
            num_bytes = sum(
                spec.dtype.itemsize * torch.Size(spec.shape).numel()
                for (kind, _), spec in reader.index.items()
                if kind in ("exp_avg", "exp_avg_sq")
            )
            assert num_bytes == sum(p.numel() for n, p in run.model.named_parameters() if n in trained) * 2 * 4
            for name in trained:  # what began later has been counted from then on
                counter = torch.zeros(())
                reader.read_into("step", name, whole(()), counter)
                first = next(at for at in range(STEPS) if factor(name, at) is not None)
                assert counter == step - first


@pytest.mark.parametrize("at", range(1, STEPS))
def test_stopped_anywhere_it_goes_on_to_the_last_bit(tmp_path, unbroken, at):
    """At a change of phase as well as within one."""
    run, expected = unbroken
    trace = Trace()
    assert bigtrain.train(config(tmp_path), hooks=[trace, stop(at)]).outcome.stopped
    again = bigtrain.train(config(tmp_path), hooks=[trace])
    assert trace.steps == expected.steps
    assert losses(again) == losses(run)
    assert diff(final(again.path), final(run.path)).differences == ()


@pytest.mark.parametrize("at", [3, 4, 5, 9])
def test_killed_it_goes_on_from_the_last_checkpoint(tmp_path, unbroken, at):
    """With no checkpoints but those that a change of phase needs."""
    run, expected = unbroken
    trace = Trace()
    values = config(tmp_path, checkpoint={"every_steps": None, "at_end": False})
    with pytest.raises(BrokenOffError):
        bigtrain.train(values, hooks=[trace, break_off(at)])
    saved = [path.name for path in find(tmp_path / "runs" / "run" / "checkpoints")]
    assert saved == [f"step-{step:08d}" for step in (8, 4) if step < at]
    again = bigtrain.train(values, hooks=[trace])
    assert trace.steps == expected.steps
    assert losses(again) == losses(run)


def test_a_damaged_checkpoint_leads_back_into_the_phase_before(tmp_path, unbroken):
    run, expected = unbroken
    trace = Trace()
    values = config(tmp_path, checkpoint={"every_steps": 3, "keep": None})
    bigtrain.train(values, hooks=[trace, stop(9)])
    newest, before, *_ = find(tmp_path / "runs" / "run" / "checkpoints")
    assert (newest.name, before.name) == ("step-00000009", "step-00000008")
    for path in (newest, before):
        (path / "manifest.json").write_text("{}")
    again = bigtrain.train(values, hooks=[trace])
    assert trace.steps == expected.steps
    assert losses(again) == losses(run)


@pytest.mark.filterwarnings("ignore")  # those of torch itself, while it compiles
@pytest.mark.slow
def test_compiled_and_recomputed_it_is_the_same(tmp_path, unbroken):
    run, _ = unbroken
    again = bigtrain.train(config(tmp_path, compile="blocks", activation_checkpointing="full"))
    for (_, loss, norm), (_, their_loss, their_norm) in zip(losses(again), losses(run), strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-5)


def test_the_model_of_a_phase_is_gone_before_the_next_is_built(tmp_path, monkeypatch):
    built, original = [], phases.assemble

    def assemble(*args, **options):
        assert [model() for model in built] == [None] * len(built)
        training = original(*args, **options)
        built.append(weakref.ref(training.model))
        return training

    monkeypatch.setattr(phases, "assemble", assemble)
    bigtrain.train(config(tmp_path))
    assert len(built) == 3


def test_a_model_that_cannot_be_built_anew_is_refused(tmp_path):
    with pytest.raises(ModelError, match="built anew for each phase") as caught:
        bigtrain.train(config(tmp_path), model=nn.Linear(2, 2))
    assert "a function that makes it" in caught.value.remedy
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------- planted faults


@pytest.fixture
def plant(monkeypatch):
    """Makes a hook that does something to the model as it is built then: after a step, or where a phase begins."""
    built, planned = [], {}
    original = phases.assemble

    def assemble(*args, phase, **options):
        built.append(original(*args, phase=phase, **options))
        planned.get(phase, lambda model: None)(built[-1].model)
        return built[-1]

    monkeypatch.setattr(phases, "assemble", assemble)

    def planted(do, *, after=None, phase=None):
        planned[phase] = do
        return lambda info: do(built[-1].model) if info.step == after else None

    return planted


@pytest.mark.parametrize(("at", "found"), [(2, 3), (4, 4), (6, 7), (8, 8)])
def test_a_frozen_tensor_that_is_nudged_stops_the_run(tmp_path, plant, at, found):
    """Early in a phase, and after it was looked at for the first time; no checkpoint has it."""

    def nudge(model):
        with torch.no_grad():
            model.get_parameter("layers.0.mlp.up_proj.weight").view(-1)[:1].view(torch.int32).add_(1)

    values = config(tmp_path, checkpoint={"every_steps": None})
    with pytest.raises(FreezeError, match=r"moved, and they are frozen: layers\.0\.mlp\.up_proj\.weight\n") as caught:
        bigtrain.train(values, hooks=[plant(nudge, after=at)])
    assert caught.value.where == f"step {found}"
    saved = find(tmp_path / "runs" / "run" / "checkpoints")
    assert [path.name for path in saved] == (["step-00000004"] if at > 4 else [])


def test_a_checkpoint_saved_between_fault_and_proof_is_not_gone_on_from(tmp_path, plant, unbroken):
    def nudge(model):
        with torch.no_grad():
            model.get_parameter("layers.0.mlp.up_proj.weight").view(-1)[:1].view(torch.int32).add_(1)

    values = config(tmp_path, checkpoint={"every_steps": 1, "keep": 10})
    with pytest.raises(FreezeError, match="these moved") as caught:
        bigtrain.train(values, hooks=[plant(nudge, after=6)])
    assert caught.value.where == "step 7"
    newest = final(tmp_path / "runs" / "run")
    assert newest.name == "step-00000006"
    with pytest.raises(FreezeError, match="in phase 1 is not what it was when the phase began") as caught:
        bigtrain.train(values)
    assert caught.value.where == str(newest)
    assert final(tmp_path / "runs" / "run") == newest
    shutil.rmtree(newest)
    again = bigtrain.train(values)
    expected = unbroken[0].model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("lost", [True, False])
def test_what_trains_and_gets_no_gradient_stops_the_run(tmp_path, plant, lost):
    """As under a compiler that has forgotten that it trains now; weight decay alone does not count as training."""

    def forget(p):
        p.grad = None

    def zero(p):
        p.grad.zero_()

    def lose(model):
        for p in model.layers[1].parameters():
            p.register_post_accumulate_grad_hook(forget if lost else zero)

    values = config(tmp_path)
    with pytest.raises(FreezeError, match=r"in 4 steps, and they train: layers\.1\..* … \(9 in all\)") as caught:
        bigtrain.train(values, hooks=[plant(lose, phase=1)])
    assert caught.value.where == "step 8"


class Normed(nn.Module):
    """A BatchNorm between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.body(x).relu())


def samples():
    torch.manual_seed(0)
    return [(torch.randn(4), index % 2) for index in range(40)]


def normed(folder, **finetune):
    return {
        "run": {"name": "run", "dir": str(folder / "runs")},
        "task": "classification",
        "model": "given:Normed",
        "data": {"name": "given:samples", "batch_size": 8, "eval": {"split": 0.2}},
        "train": {"epochs": 3},
        "finetune": finetune,
        "engine": {"device": "cpu"},
        "track": {"log_every": 1, "progress": "none"},
    }


def test_frozen_statistics_survive_evaluations_and_phases(tmp_path):
    """Evaluated after every epoch; in the second, what is around the norm begins to train."""
    values = normed(tmp_path, freeze="body.*", freeze_batchnorm=True, unfreeze=[{"at_epoch": 1, "match": "body.*"}])
    run = bigtrain.train(values, model=Normed, data=samples())
    norm = run.model.body[1]
    assert torch.equal(norm.running_mean, torch.zeros(6))
    assert norm.num_batches_tracked == 0
    assert [row["frozen"] for row in events(run.path, "phase proved")] == [7, 7, 5, 5]


def test_a_frozen_batchnorm_left_in_train_mode_stops_the_run(tmp_path, plant):
    def leave(model):
        norm = model.body[1]
        del norm.train
        norm.train()

    values = normed(tmp_path, freeze="body.*")
    with pytest.raises(
        FreezeError, match=r"moved, and they are frozen: body\.1\.num_batches_tracked, body\.1\.running_mean"
    ):
        bigtrain.train(values, model=Normed, data=samples(), hooks=[plant(leave, after=1)])


@pytest.mark.parametrize(("step", "first"), [(6, 5), (3, 1), (12, 9)])
def test_steps_of_any_phase_are_replayed(unbroken, tmp_path, step, first):
    run = bigtrain.train(config(tmp_path, checkpoint={"every_steps": None, "keep": None}))
    rows = replay(load_run(run.path), step, lambda text: None)
    expected = {row["step"]: row["loss"] for row in unbroken[0].history() if "loss" in row}
    assert {row["step"]: row["loss"] for row in rows} == {at: expected[at] for at in range(first, step + 1)}


def test_what_cannot_be_replayed_over_a_change_of_phase_is_said(tmp_path):
    run = bigtrain.train(config(tmp_path, checkpoint={"every_steps": None, "keep": None}))
    shutil.rmtree(run.path / "checkpoints" / "step-00000004")
    with pytest.raises(RunFolderError, match="what trains changes after step 4"):
        replay(load_run(run.path), 6, lambda text: None)
