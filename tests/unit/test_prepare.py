"""Models made ready: initial values that no cut changes, frozen parts that stay, norms that depend on the processes."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain import models
from bigtrain.config import schema
from bigtrain.errors import CombinationError, PatternError
from bigtrain.finetune.freeze import plan_freezing
from bigtrain.models.blocks import find_blocks
from bigtrain.prepare import checkpoint_activations, fill_pieces, prepare
from bigtrain.state import BUFFER, WEIGHT, Box, EngineState, Piece, assemble, whole

CPU = torch.device("cpu")
GPT = {"vocab": 61, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24, "context": 8}
# Rows of 701 elements: none of the runs of 2^20 elements that share a seed ends at the end of a row.
LARGE = (3001, 701)


class Large(nn.Module):
    """Two parameters of three runs each, a scalar, and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(LARGE))
        self.other = nn.Parameter(torch.empty(LARGE))
        self.scale = nn.Parameter(torch.empty(()))
        self.register_buffer("shift", torch.empty(7))
        self.register_buffer("angles", torch.empty(5), persistent=False)

    def init_tensor(self, name: str, tensor: Tensor) -> None:
        if name == "scale":
            tensor.fill_(3.0)
        else:
            tensor.normal_(0.0, 0.02)

    def reset_buffers(self) -> None:
        self.angles.copy_(torch.arange(5.0))


def make_ready(make, *, fillable=False, freeze=(), seed=0, dtype=torch.float32, num_processes=1, shards=False):
    return prepare(
        make,
        fillable=fillable,
        freeze=lambda model: plan_freezing(model, schema.Finetune(freeze=freeze)).apply(model, 0),
        seed=seed,
        device=CPU,
        dtype=dtype,
        num_processes=num_processes,
        shards=shards,
    )


def make_gpt() -> nn.Module:
    return models.build("gpt", GPT)


def row_boxes(shape: tuple[int, ...], parts: int) -> list[Box]:
    """Rows over ranks as FSDP2 cuts them: chunks of ceil(rows / parts), the last ones smaller or empty."""
    if not shape:
        return [whole(shape)]
    step = -(-shape[0] // parts)
    starts = [min(rank * step, shape[0]) for rank in range(parts + 1)]
    return [Box((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:])) for a, b in pairwise(starts)]


def cut_up(model: nn.Module, parts: int) -> list[Piece]:
    """Pieces of every parameter and persistent buffer, in memory of their own."""
    kinds = {WEIGHT: dict(model.named_parameters()), BUFFER: dict(model.named_buffers())}
    return [
        Piece(name, kind, tuple(t.shape), t.dtype, box, torch.full(box.size, torch.nan, dtype=t.dtype), True)
        for kind, tensors in kinds.items()
        for name, t in tensors.items()
        if name in model.state_dict()
        for box in row_boxes(tuple(t.shape), parts)
    ]


def put_together(pieces: list[Piece]) -> dict[str, Tensor]:
    return {name: tensor for (_, name), tensor in assemble([EngineState(pieces, {})]).tensors.items()}


# ------------------------------------------------------------------------------------------------ initial values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_cut_of_gpt_has_the_values_of_the_whole(dtype):
    ready = make_ready(make_gpt, fillable=True, seed=3, dtype=dtype).model
    expected = dict(ready.named_parameters())
    assert {p.dtype for p in expected.values()} == {dtype}
    cold = make_ready(make_gpt, fillable=True, seed=3, dtype=dtype, shards=True)
    assert all(p.is_meta for p in cold.model.parameters())
    for parts in (1, 2, 3, 7, 19):
        pieces = cut_up(cold.model, parts)
        cold.fill(pieces[::-1] if parts == 3 else pieces)
        got = put_together(pieces)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected), parts


def test_gpt_initial_values_are_those_its_definition_asks_for():
    model = make_ready(make_gpt, fillable=True).model
    assert torch.equal(model.norm.weight, torch.ones(16))
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.15)
    assert not torch.equal(model.layers[0].mlp.up_proj.weight, model.layers[1].mlp.up_proj.weight)
    assert torch.equal(model.rotary.cos, make_gpt().rotary.cos)  # computed anew, after memory came


def test_values_beyond_one_run_of_a_seed_do_not_depend_on_the_cut():
    with torch.device("meta"):
        model = Large()
    pieces = cut_up(model, 1)
    model.to_empty(device="cpu")
    fill_pieces(model, pieces, seed=5)
    expected = put_together(pieces)
    table = expected["table"]
    assert table.std().item() == pytest.approx(0.02, rel=0.01)
    runs = table.flatten()[: 2 << 20].reshape(2, -1)
    assert not torch.equal(runs[0], runs[1])
    assert not torch.equal(table, expected["other"])
    assert expected["scale"] == 3
    for parts in (2, 5):
        pieces = cut_up(model, parts)
        fill_pieces(model, pieces, seed=5)
        got = put_together(pieces)
        assert all(torch.equal(got[name], expected[name]) for name in expected), parts


def test_a_box_within_rows_has_the_values_of_the_whole():
    model = Large()
    full = Piece("table", WEIGHT, LARGE, torch.float32, whole(LARGE), torch.empty(LARGE), True)
    # Around element 2^20, and an empty one.
    for box in (Box((1490, 350), (12, 300)), Box((0, 700), (3001, 1)), Box((3001, 0), (0, 701))):
        part = Piece("table", WEIGHT, LARGE, torch.float32, box, torch.empty(box.size), True)
        fill_pieces(model, [full, part], seed=1)
        assert torch.equal(part.data, full.data[box.slices])


def test_seeds_and_names_decide_and_the_global_generator_does_not():
    def draw(seed: int) -> Tensor:
        return make_ready(make_gpt, fillable=True, seed=seed).model.lm_head.weight

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    model = make_ready(make_gpt, fillable=True, seed=7, shards=True)
    pieces = cut_up(model.model, 1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model.fill(pieces)
    assert torch.equal(torch.get_rng_state(), before)
    first = put_together(pieces)
    torch.manual_seed(321)
    model.fill(pieces)
    assert all(torch.equal(value, first[name]) for name, value in put_together(pieces).items())


def test_the_global_generator_comes_back_after_an_error():
    class Fails(Large):
        def init_tensor(self, name: str, tensor: Tensor) -> None:
            raise ValueError("no")

    model, before = Fails(), torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        fill_pieces(model, cut_up(model, 1), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_that_are_no_part_of_the_state_are_computed_anew():
    model = make_ready(Large, fillable=True).model
    assert torch.equal(model.angles, torch.arange(5.0))
    assert model.shift.isfinite().all()


def test_a_model_without_init_tensor_is_built_under_the_seed():
    make = partial(nn.Linear, 3, 5)
    torch.manual_seed(11)
    expected = make()
    for shards in (False, True):
        ready = make_ready(make, seed=11, shards=shards)
        assert ready.fill is None
        assert torch.equal(ready.model.weight, expected.weight)
        assert torch.equal(ready.model.bias, expected.bias)


# -------------------------------------------------------------------------------------------------- frozen parts


def make_normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5))


def test_a_frozen_batchnorm_keeps_its_mode_and_statistics():
    model = make_ready(make_normed, freeze=["0.*", "1.*"]).model
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "3.weight",
        "3.bias",
        "4.weight",
        "4.bias",
    ]
    frozen, trained = model[1], model[4]
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    model.eval()
    model.train()  # as after every evaluation
    assert not frozen.training
    assert trained.training
    model(torch.randn(9, 3) + 5)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert trained.num_batches_tracked == 1


def test_a_batchnorm_that_is_frozen_in_part_goes_on():
    model = make_ready(make_normed, freeze=["1.bias"]).model
    assert model[1].training
    assert not model[1].bias.requires_grad


def test_a_pattern_that_freezes_nothing_is_refused():
    with pytest.raises(PatternError) as caught:
        make_ready(make_normed, freeze=["backbone.*"])
    assert caught.value.where == "finetune.freeze"


# --------------------------------------------------------------------------------------------- several processes


def test_batchnorm_over_processes_is_refused_with_the_ways_out():
    with pytest.raises(CombinationError) as caught:
        make_ready(make_normed, num_processes=2)
    assert "over 2 processes" in caught.value.problem
    assert caught.value.problem.endswith(": 1, 4")
    for way in ("norm_layer=group_norm", "finetune.freeze", "convert_sync_batchnorm", "one process"):
        assert way in caught.value.remedy
    with pytest.raises(CombinationError) as caught:
        make_ready(make_normed, freeze=["1.*"], num_processes=2)
    assert caught.value.problem.endswith(": 4")


@pytest.mark.parametrize(
    ("make", "freeze", "num_processes"),
    [
        (make_normed, [], 1),
        (make_normed, ["1.*", "4.*"], 2),
        (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(make_normed()), [], 2),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4)), [], 2),
    ],
)
def test_norms_that_compute_the_same_on_several_processes_pass(make, freeze, num_processes):
    assert make_ready(make, freeze=freeze, num_processes=num_processes).model.training


class Forgetful(nn.Module):
    """Blocks with dropout, which count how often they run."""

    def __init__(self) -> None:
        super().__init__()
        parts = [(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 6)) for _ in range(4)]
        self.layers = nn.ModuleList(nn.Sequential(*part) for part in parts)
        self.runs = [0] * 4
        for number, layer in enumerate(self.layers):
            layer[1].register_forward_hook(lambda *_, number=number: self._count(number))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def _count(self, number: int) -> None:
        self.runs[number] += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def gradients_with(recompute: str | int) -> tuple[Forgetful, int]:
    """A model after one backward pass, and how many matrix products that took."""
    torch.manual_seed(3)
    model = Forgetful()
    names = [name for name, _ in model.named_parameters()]
    checkpoint_activations([block for _, block in find_blocks(model)], recompute)
    assert [name for name, _ in model.named_parameters()] == names
    total = model(torch.linspace(-1, 1, 30).reshape(5, 6)).square().sum()
    with Products() as products:
        total.backward()
    return model, products.count


@pytest.mark.parametrize(
    ("recompute", "runs", "again"), [("full", [2, 2, 2, 2], 8), ("ops", [2, 2, 2, 2], 0), (2, [2, 1, 2, 1], 4)]
)
def test_activations_are_computed_again_to_the_last_bit(recompute: str | int, runs: list[int], again: int) -> None:
    plain, products = gradients_with("none")
    assert plain.runs == [1, 1, 1, 1]
    model, more_products = gradients_with(recompute)
    assert model.runs == runs
    assert more_products - products <= again
    if recompute == "ops":
        assert more_products == products
    else:
        assert more_products > products
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_without_blocks_there_is_nothing_to_compute_again() -> None:
    with pytest.raises(CombinationError, match="no repeated blocks"):
        checkpoint_activations([], "full")
