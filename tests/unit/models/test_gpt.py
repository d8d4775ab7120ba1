"""The decoder against an implementation that shares no code with it: loops over tokens, complex rotations."""

import cmath
import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigtrain import models
from bigtrain.errors import ModelError
from bigtrain.models.gpt import GPT, document_layout

ARGS = {"vocab": 13, "layers": 2, "width": 24, "heads": 6, "kv_heads": 2, "context": 9, "mlp_width": 17}
THETA, EPS = 500.0, 1e-3


def make(**changes: object) -> GPT:
    """A model in float64 with weights large enough for every part to matter."""
    torch.manual_seed(3)
    model = models.build("gpt", {**ARGS, **changes}).double()
    assert isinstance(model, GPT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5 + (parameter.ndim == 1))
    return model


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(5))


# --------------------------------------------------------------------------------------------- the reference


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:  # (D,)
    return x / math.sqrt(float((x * x).mean()) + EPS) * weight


def rotate(x: Tensor, position: int) -> Tensor:  # (head_dim,)
    half = len(x) // 2
    pairs = [complex(x[i], x[half + i]) for i in range(half)]
    turned = [pair * cmath.exp(1j * position * THETA ** (-i / half)) for i, pair in enumerate(pairs)]
    return torch.tensor([c.real for c in turned] + [c.imag for c in turned], dtype=torch.float64)


def attend(x: list[Tensor], weights: dict[str, Tensor], heads: int = 6, kv_heads: int = 2) -> list[Tensor]:
    """Causal attention over the vectors of one document."""
    dim = len(weights["q_proj.weight"]) // heads
    projected = {kind: [(weights[f"{kind}_proj.weight"] @ v).split(dim) for v in x] for kind in "qkv"}
    for kind in "qk":
        projected[kind] = [[rotate(head, t) for head in parts] for t, parts in enumerate(projected[kind])]
    result = []
    for t in range(len(x)):
        mixed = []
        for head in range(heads):
            shared = head * kv_heads // heads
            scores = [float(projected["q"][t][head] @ projected["k"][s][shared]) / math.sqrt(dim) for s in range(t + 1)]
            shares = [math.exp(score - max(scores)) for score in scores]
            values = [projected["v"][s][shared] * share / sum(shares) for s, share in enumerate(shares)]
            mixed.append(sum(values[1:], values[0]))
        result.append(weights["o_proj.weight"] @ torch.cat(mixed))
    return result


def feed_forward(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    gate = weights["gate_proj.weight"] @ x
    return weights["down_proj.weight"] @ (gate / (1 + (-gate).exp()) * (weights["up_proj.weight"] @ x))


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def reference(state: dict[str, Tensor], document: Tensor, heads: int = 6, kv_heads: int = 2, layers: int = 2) -> Tensor:
    """Logits (T, vocab) of one document (T,)."""
    x = [state["embed_tokens.weight"][token] for token in document]
    for i in range(layers):
        block = below(state, f"layers.{i}.")
        normed = [rms_norm(v, block["input_layernorm.weight"]) for v in x]
        x = [v + a for v, a in zip(x, attend(normed, below(block, "self_attn."), heads, kv_heads), strict=True)]
        x = [v + feed_forward(rms_norm(v, block["post_attention_layernorm.weight"]), below(block, "mlp.")) for v in x]
    return torch.stack([state["lm_head.weight"] @ rms_norm(v, state["norm.weight"]) for v in x])


# ----------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_reference(tied):
    model = make(tied=tied, rope_theta=THETA, norm_eps=EPS)
    ids = tokens()
    expected = torch.stack([reference(model.state_dict(), row) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-11, atol=1e-11)


def test_packed_documents_are_as_if_alone():
    model = make(rope_theta=THETA, norm_eps=EPS)
    ids = tokens()
    documents = torch.tensor([[4, 4, 4, 7, 7, 7, 7, 7, 2], [0, 1, 1, 1, 1, 0, 0, 0, 0]])
    logits = model(ids, documents)
    for row, cuts in enumerate([(0, 3, 8, 9), (0, 1, 5, 9)]):
        for start, end in itertools.pairwise(cuts):
            expected = reference(model.state_dict(), ids[row, start:end])
            torch.testing.assert_close(logits[row, start:end], expected, rtol=1e-11, atol=1e-11)


def test_layout_of_documents_written_out():
    positions, mask = document_layout(torch.tensor([[5, 5, 3, 5]]))
    assert positions.tolist() == [[0, 1, 0, 0]]
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]


def test_one_document_is_the_whole_sequence():
    model, ids = make(), tokens()
    torch.testing.assert_close(model(ids, torch.zeros_like(ids)), model(ids), rtol=1e-12, atol=1e-12)


def test_a_token_sees_none_after_it():
    model, ids = make(), tokens()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 13
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 4 + [1] * 5] * 2)])
def test_grouped_partsare_repeated_heads(documents):
    grouped, full = make(), make(kv_heads=6)
    state = grouped.state_dict()
    for name in [n for n in state if "k_proj" in n or "v_proj" in n]:
        state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    ids = tokens()
    torch.testing.assert_close(grouped(ids, documents), full(ids, documents), rtol=1e-12, atol=1e-12)


def test_parameters_have_llamas_names_and_shapes():
    hidden, width, kv = 17, 24, 8
    expected = {"embed_tokens.weight": (13, width), "norm.weight": (width,), "lm_head.weight": (13, width)}
    for i in range(2):
        expected |= {
            f"layers.{i}.input_layernorm.weight": (width,),
            f"layers.{i}.self_attn.q_proj.weight": (width, width),
            f"layers.{i}.self_attn.k_proj.weight": (kv, width),
            f"layers.{i}.self_attn.v_proj.weight": (kv, width),
            f"layers.{i}.self_attn.o_proj.weight": (width, width),
            f"layers.{i}.post_attention_layernorm.weight": (width,),
            f"layers.{i}.mlp.gate_proj.weight": (hidden, width),
            f"layers.{i}.mlp.up_proj.weight": (hidden, width),
            f"layers.{i}.mlp.down_proj.weight": (width, hidden),
        }
    assert {name: tuple(value.shape) for name, value in make().state_dict().items()} == expected


def test_tied_weights_are_one_parameter():
    model = make(tied=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize(("width", "expected"), [(24, 64), (48, 128), (384, 1024)])
def test_default_width_of_the_feed_forward_layer(width, expected):
    with torch.device("meta"):
        model = models.build("gpt", {**ARGS, "width": width, "mlp_width": None})
    assert model.layers[0].mlp.up_proj.weight.shape == (expected, width)


def test_flops_are_those_that_torch_counts():
    model = models.build("gpt", ARGS)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(batch=1)).sum().backward()
    assert counter.get_total_flops() == model.flops_per_sample(full_square=True)


def test_flops_leave_out_what_is_masked():
    model = models.build("gpt", ARGS)
    context, layers, width = ARGS["context"], ARGS["layers"], ARGS["width"]
    masked = context * (context - 1) // 2  # pairs of a token and one after it
    # Two products of 2 operations a pair and element, and each again by both of its factors in backward.
    assert model.flops_per_sample(full_square=True) - model.flops_per_sample() == masked * layers * width * 2 * 2 * 3


# -------------------------------------------------------------------------------------------- initial values


def test_initial_values():
    torch.manual_seed(0)
    model = models.build("gpt", {**ARGS, "vocab": 500, "width": 120, "mlp_width": 300, "layers": 3})
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        deviation = 0.02 / math.sqrt(6) if adds else 0.02
        error = 5 / math.sqrt(2 * parameter.numel())  # five standard errors of a deviation
        assert parameter.std().item() == pytest.approx(deviation, rel=error), name
        assert abs(parameter.mean().item()) < 5 * deviation / math.sqrt(parameter.numel()), name


def test_a_piece_of_any_shape_is_filled_in_any_dtype():
    model = make()
    for shape in [(), (5,), (2, 3)]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            piece = torch.full(shape, 7.0, dtype=dtype)
            model.init_tensor("layers.1.input_layernorm.weight", piece)
            assert torch.equal(piece, torch.ones(shape, dtype=dtype))
            model.init_tensor("layers.1.mlp.up_proj.weight", piece)
            assert piece.abs().max() < 0.2


# ------------------------------------------------------------------------------------------------ the tables


def exact_cos(model: GPT) -> Tensor:
    half = model.rotary.head_dim // 2
    rows = [[math.cos(t * model.rotary.theta ** (-i / half)) for i in range(half)] for t in range(model.context)]
    return torch.tensor(rows, dtype=torch.float64)


def test_tables_come_back_after_the_meta_device():
    with torch.device("meta"):
        model = models.build("gpt", {**ARGS, "context": 3000})
    assert model.rotary.cos.is_meta
    model.to_empty(device="cpu")
    torch.testing.assert_close(model.rotary.cos.double(), exact_cos(model), rtol=0, atol=1e-7)


def test_tables_are_never_coarser_than_float32():
    model = models.build("gpt", {**ARGS, "context": 3000})
    exact = exact_cos(model)
    model.to(torch.bfloat16)
    assert model.rotary.cos.dtype == torch.float32
    assert torch.equal(model.rotary.cos, exact.float())
    model.double()
    torch.testing.assert_close(model.rotary.cos, exact, rtol=0, atol=1e-12)
    model.float()
    assert torch.equal(model.rotary.cos, exact.float())


def test_tables_can_be_computed_anew():
    model = models.build("gpt", ARGS)
    expected = model.rotary.sin.clone()
    model.rotary.sin.fill_(float("nan"))
    model.reset_buffers()
    assert torch.equal(model.rotary.sin, expected)


def test_tables_are_one_pair_and_in_no_checkpoint():
    model = models.build("gpt", ARGS)
    assert [name for name, _ in model.named_buffers()] == ["rotary.cos", "rotary.sin"]
    assert not [name for name in model.state_dict() if "rotary" in name]


def test_a_copy_has_tables_of_its_own():
    model = models.build("gpt", ARGS)
    twin = copy.deepcopy(model)
    assert twin.layers[1].self_attn.rotary is twin.rotary
    assert twin.rotary is not model.rotary
    assert torch.equal(twin(tokens()), model(tokens()))


def test_bfloat16_stays_bfloat16_and_close():
    model, ids = models.build("gpt", ARGS), tokens()
    exact = model.double()(ids)
    logits = model.to(torch.bfloat16)(ids)
    assert logits.dtype == torch.bfloat16
    assert (logits.double() - exact).norm() < 0.03 * exact.norm()


# --------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_random_in_training_only():
    model, ids = make(dropout=0.5), tokens()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_dropout_reaches_attention_and_can_be_switched_off():
    model, ids = make(dropout=0.5), tokens()
    expected = copy.deepcopy(model).eval()(ids)
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for drop in drops:
        drop.p = 0.0
    torch.testing.assert_close(model(ids), expected, rtol=1e-12, atol=1e-12)
    model.layers[0].self_attn.dropout.p = 0.5
    handle = model.layers[0].self_attn.dropout.register_forward_hook(lambda module, args, out: args[0])
    assert not torch.allclose(model(ids), expected)  # the hook undoes the dropout of the output; attention's is left
    handle.remove()


# -------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"width": 25}, "width"),
        ({"width": 18}, "width"),  # 3 a head: not even
        ({"kv_heads": 4}, "kv_heads"),
        ({"layers": 0}, "layers"),
        ({"vocab": "13"}, "vocab"),
        ({"context": 2.0}, "context"),
        ({"heads": True}, "heads"),
        ({"mlp_width": 0}, "mlp_width"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": "no"}, "dropout"),
    ],
)
def test_sizes_that_do_not_fit(changes, where):
    with pytest.raises(ModelError) as caught:
        models.build("gpt", {**ARGS, **changes})
    assert caught.value.where == f"model.args.{where}"
    assert str(next(iter(changes.values()))) in caught.value.problem


def test_a_sequence_longer_than_the_context():
    with pytest.raises(ModelError, match="10 tokens reach a model with a context of 9"):
        make()(tokens(length=10))


def test_it_learns_to_copy():
    """The whole path backward: two layers learn that a token comes again after a fixed distance."""
    torch.manual_seed(0)
    model = models.build("gpt", {**ARGS, "width": 24, "heads": 2, "kv_heads": 1})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        half = torch.randint(13, (32, 3))
        ids = torch.cat([half, half, half], dim=1)
        logits = model(ids[:, :-1])[:, 3:]  # from the second time on
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.0
    assert losses[-1] < 0.3
