"""Cross-entropy in chunks against torch's own over all logits: numbers, gradients, and what is held in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain import models
from bigtrain.dist import join
from bigtrain.models import head
from bigtrain.models.gpt import GPT
from bigtrain.models.head import Head
from tests.helpers.distributed import run_distributed

WIDTH, VOCAB = 16, 53
GPT_ARGS = {"vocab": VOCAB, "layers": 2, "width": WIDTH, "heads": 2, "context": 11, "mlp_width": 24}


def make_case(dtype: torch.dtype = torch.float64) -> tuple[Head, Tensor, Tensor]:
    """A head, hidden states (3, 7, width), and targets of which some do not count."""
    torch.manual_seed(4)
    layer = Head(WIDTH, VOCAB).to(dtype)
    hidden = torch.randn(3, 7, WIDTH).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (3, 7))
    targets[0, :4] = -100
    targets[2] = -100
    return layer, hidden, targets


def reference(layer: Head, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    """The sum by torch over all logits, and the gradients of the hidden states and the weight."""
    logits = F.linear(hidden, layer.weight).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    return [total.detach(), *torch.autograd.grad(scale * total, [hidden, layer.weight])]


def ours(layer: Head, hidden: Tensor, targets: Tensor, scale: float = 1.0) -> list[Tensor]:
    total = layer(hidden, targets)
    return [total.detach(), *torch.autograd.grad(scale * total, [hidden, layer.weight])]


def in_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int, vocab: int = VOCAB) -> None:
    monkeypatch.setattr(head, "MOST_LOGITS", tokens * vocab + vocab - 1)


# ----------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("tokens", [1, 4, 7, 20, 21])  # of 21: rows alone, a short last chunk, whole
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_sum_and_gradients_are_those_of_all_logits(monkeypatch, tokens, dtype, tolerance):
    in_chunks(monkeypatch, tokens)
    case = make_case(dtype)
    for mine, theirs in zip(ours(*case, scale=0.25), reference(*case, scale=0.25), strict=True):
        assert mine.dtype == dtype
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loss_gives_the_same(monkeypatch, dtype):
    """Also with a short last chunk, and targets that do not count."""
    in_chunks(monkeypatch, 8)
    layer, hidden, targets = make_case(dtype)
    expected = ours(layer, hidden, targets)
    layer.compile_loss()
    for mine, theirs in zip(ours(layer, hidden, targets), expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).float().norm() <= (1e-6 if dtype == torch.float32 else 2**-8) * theirs.float().norm()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("number", "most", "expected"),
    [(32768, 2293, 2048), (10_000, 4592, 3456), (5000, 1000, 896), (300, 128, 128), (143, 20, 20), (7, 1, 1)],
)
def test_chunks_are_as_few_as_may_be_and_aligned(number, most, expected):
    assert head._tokens_at_once(number, most) == expected


@pytest.mark.parametrize("tokens", [4, 21])
def test_a_bfloat16_layer_sums_in_float32(monkeypatch, tokens):
    in_chunks(monkeypatch, tokens)
    layer, hidden, targets = make_case(torch.bfloat16)
    total, to_hidden, to_weight = ours(layer, hidden, targets)
    logits = F.linear(hidden, layer.weight).flatten(0, 1)  # rounded, as they are whole
    expected = F.cross_entropy(logits.double(), targets.flatten(), reduction="sum")
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = reference(layer.double(), hidden.detach().double().requires_grad_(), targets)
    for mine, theirs in zip((to_hidden, to_weight), exact[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - theirs).norm() < 2**-8 * theirs.norm()


def test_gradients_are_scaled_in_float32(monkeypatch):
    """By a factor that bfloat16 rounds by 0.24 %, a part of the weight at a time."""
    in_chunks(monkeypatch, 4)
    monkeypatch.setattr(head, "_WIDE", 100)
    layer, hidden, targets = make_case(torch.bfloat16)
    plain = ours(layer, hidden, targets)[1:]
    scaled = torch.autograd.grad(1.3 * layer(hidden, targets), [hidden, layer.weight])
    for mine, theirs in zip(scaled, plain, strict=True):
        assert torch.equal(mine, (theirs.float() * 1.3).bfloat16())


def test_many_chunks_lose_nothing_of_a_bfloat16_gradient(monkeypatch):
    """400 chunks whose gradients are equal: added up in bfloat16, the sum would stop growing."""
    layer = Head(2, 3).bfloat16()
    nn.init.zeros_(layer.weight)
    hidden, targets = torch.ones(400, 2, dtype=torch.bfloat16), torch.zeros(400, dtype=torch.int64)
    in_chunks(monkeypatch, 1, vocab=3)
    layer(hidden, targets).backward()
    # Each token gives softmax - one at the target: -2/3 for the target and 1/3 for the others.
    expected = torch.tensor([-800 / 3, 400 / 3, 400 / 3])[:, None].expand(3, 2)
    torch.testing.assert_close(layer.weight.grad.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("tokens", [4, 21])
def test_no_target_counts(monkeypatch, tokens):
    in_chunks(monkeypatch, tokens)
    layer, hidden, targets = make_case()
    assert not any(value.any() for value in ours(layer, hidden, torch.full_like(targets, -100)))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_gradients_are_computed_for_what_trains(monkeypatch, frozen):
    in_chunks(monkeypatch, 4)
    layer, hidden, targets = make_case()
    expected = reference(layer, hidden, targets)
    layer.weight.requires_grad_(frozen not in ("weight", "both"))
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        total = layer(hidden, targets)
    torch.testing.assert_close(total.detach(), expected[0])
    assert total.requires_grad is (frozen in ("hidden", "weight"))
    if total.requires_grad:
        total.backward()
        for tensor, gradient, name in ((hidden, expected[1], "hidden"), (layer.weight, expected[2], "weight")):
            assert tensor.grad is None if name == frozen else torch.allclose(tensor.grad, gradient)


@pytest.mark.parametrize("tokens", [4, 21])
def test_a_target_outside_the_vocabulary_is_an_index_error(monkeypatch, tokens):
    in_chunks(monkeypatch, tokens)
    layer, hidden, targets = make_case()
    targets[1, 5] = VOCAB
    with pytest.raises(IndexError, match=str(VOCAB)):
        layer(hidden, targets)


def test_backward_twice_gives_twice_the_gradient(monkeypatch):
    in_chunks(monkeypatch, 4)
    layer, hidden, targets = make_case()
    total = layer(hidden, targets)
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * reference(layer, hidden, targets)[2])


# ------------------------------------------------------------------------------------------------ the memory


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation gave, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, (tuple, list)) else [result]
        self.elements = max([self.elements, *(part.numel() for part in parts if isinstance(part, Tensor))])
        return result


def largest(model: nn.Module, tokens: Tensor) -> int:
    with LargestTensor() as seen:
        model(tokens, sum_cross_entropy_of=tokens).backward()
    return seen.elements


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(monkeypatch, dtype, tied):
    vocab = 1009
    model = models.build("gpt", {**GPT_ARGS, "vocab": vocab, "tied": tied}).to(dtype)
    ids = torch.randint(vocab, (13, 11))
    assert largest(model, ids) == 13 * 11 * vocab  # below the bound: all at once
    in_chunks(monkeypatch, 20, vocab)
    assert largest(model, ids) == 20 * vocab  # more than the weight, 16 · vocab


# ----------------------------------------------------------------------------- in models, and under wrappers


def losses_and_gradients(model: nn.Module, ids: Tensor, targets: Tensor) -> list[Tensor]:
    model.zero_grad()
    total = model(ids, sum_cross_entropy_of=targets)
    total.backward()
    return [total.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def by_logits(model: nn.Module, ids: Tensor, targets: Tensor) -> list[Tensor]:
    model.zero_grad()
    total = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    total.backward()
    return [total.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def batch(seed: int = 5, samples: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (samples, 12), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[1, 3:] = -100
    return ids[:, :-1], targets


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_a_whole_model(monkeypatch, name, tied):
    in_chunks(monkeypatch, 7)
    args = GPT_ARGS if name == "gpt" else {"vocab": VOCAB, "layers": 2, "width": WIDTH, "context": 11}
    model = models.build(name, {**args, "tied": tied})
    pairs = zip(losses_and_gradients(model, *batch()), by_logits(model, *batch()), strict=True)
    for mine, theirs in pairs:
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.slow
def test_compiled_in_one_graph(monkeypatch):
    in_chunks(monkeypatch, 7)
    model = models.build("gpt", GPT_ARGS)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, ids_and_targets = losses_and_gradients(model, *batch()), batch()
    for mine, theirs in zip(losses_and_gradients(compiled, *ids_and_targets), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()


def compare_on_ranks(tied: bool) -> None:
    head.MOST_LOGITS = 7 * VOCAB
    torch.manual_seed(1)
    expected_of = GPT(**GPT_ARGS, tied=tied)
    with join("cpu", needs_group=True) as world:
        parts = [batch(seed, samples=2 + seed) for seed in range(world.size)]
        sums = [by_logits(expected_of, *part) for part in parts]
        expected = [sum(values) for values in zip(*sums, strict=True)]
        for wrap in (_ddp, _fsdp):
            model = GPT(**GPT_ARGS, tied=tied)
            model.load_state_dict(expected_of.state_dict())
            wrapped, gradients = wrap(model)
            total = wrapped(parts[world.rank][0], sum_cross_entropy_of=parts[world.rank][1])
            total.backward()
            assert abs(total - sums[world.rank][0]) <= 1e-6 * total
            for mine, theirs in zip(gradients(), expected[1:], strict=True):
                assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def _ddp(model: nn.Module) -> tuple[nn.Module, Any]:
    wrapped = DistributedDataParallel(model)
    size = torch.distributed.get_world_size()
    return wrapped, lambda: [parameter.grad * size for parameter in model.parameters()]  # DDP gives means


def _fsdp(model: nn.Module) -> tuple[nn.Module, Any]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in (*model.blocks(), model):
        fully_shard(module)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model, lambda: [parameter.grad.full_tensor() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_on_two_ranks_gradients_are_those_of_all_samples(tied):
    run_distributed(compare_on_ranks, 2, tied)
