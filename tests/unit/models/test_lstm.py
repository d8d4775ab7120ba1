"""The recurrent model against the equations of an LSTM, written out step by step."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from bigtrain import models
from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.errors import ModelError
from bigtrain.models.blocks import find_blocks
from bigtrain.models.lstm import LSTM
from bigtrain.prepare import checkpoint_activations
from bigtrain.trainer import assemble, prepare_whole
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import everything, weights

ARGS = {"vocab": 13, "layers": 2, "width": 6, "context": 9}


def make(**changes: object) -> LSTM:
    torch.manual_seed(3)
    model = models.build("lstm", {**ARGS, **changes}).double()
    assert isinstance(model, LSTM)
    return model


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(5))


def reference(state: dict[str, Tensor], sequence: Tensor) -> Tensor:
    """Logits (T, vocab) of one sequence: a cell with forget gates (Gers et al., 2000), gates in torch's order."""
    x = [state["embed_tokens.weight"][token] for token in sequence]
    for layer in range(2):
        w = {name: state[f"layers.{layer}.lstm.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        h = c = torch.zeros(6, dtype=torch.float64)
        for t, value in enumerate(x):
            gates = w["weight_ih"] @ value + w["bias_ih"] + w["weight_hh"] @ h + w["bias_hh"]
            let_in, keep, new, let_out = gates.split(6)
            c = c / (1 + (-keep).exp()) + new.tanh() / (1 + (-let_in).exp())
            h = c.tanh() / (1 + (-let_out).exp())
            x[t] = h
    return torch.stack([state["lm_head.weight"] @ value for value in x])


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_reference(tied):
    model, ids = make(tied=tied), tokens()
    expected = torch.stack([reference(model.state_dict(), row) for row in ids])
    torch.testing.assert_close(model(ids), expected, rtol=1e-11, atol=1e-13)


def test_a_longer_sequence_than_the_context_is_fine():
    assert make()(tokens(length=20)).shape == (2, 20, 13)


def test_tied_weights_are_one_parameter():
    model = make(tied=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_flops_are_those_that_torch_counts():
    model = make()
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens(batch=1)).sum().backward()
    # The first state is zeros, so in each layer there is no gradient of it: one product less by (24, 6).
    assert counter.get_total_flops() == model.flops_per_sample() - 2 * (2 * 24 * 6)


def test_blocks_are_the_layers():
    assert [name for name, _ in find_blocks(make())] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("tied", [False, True])
def test_initial_values_are_those_of_torch(tied):
    torch.manual_seed(0)
    model = models.build("lstm", {**ARGS, "width": 100, "vocab": 300, "tied": tied})
    for name, parameter in model.named_parameters():
        is_normal = name == "embed_tokens.weight" and not tied
        deviation, n = 1.0 if is_normal else 0.1 / math.sqrt(3), parameter.numel()
        assert is_normal or parameter.abs().max() <= 0.1, name
        assert abs(parameter.mean().item()) < 5 * deviation / math.sqrt(n), name
        assert parameter.square().mean().item() == pytest.approx(deviation**2, rel=7 / math.sqrt(n)), name


def test_a_piece_of_any_shape_is_filled_in_any_dtype():
    model = make()
    assert models.is_fillable("lstm")
    for shape in [(), (5,), (2, 3)]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for name in ("layers.0.lstm.bias_hh_l0", "embed_tokens.weight"):
                piece = torch.full(shape, 70.0, dtype=dtype)
                model.init_tensor(name, piece)
                assert piece.abs().max() < 7


def test_dropout_is_between_layers_and_in_training_only():
    model, ids = make(dropout=0.5), tokens()
    assert not torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model.eval()(ids), make()(ids))
    model.train()
    dropped = []
    for layer in model.layers:
        layer.lstm.register_forward_hook(
            lambda module, args, out: dropped.append((args[0] == 0).double().mean().item())
        )
    model(ids.repeat(20, 3))
    assert dropped == [pytest.approx(0.5, abs=0.05)] * 2


@pytest.mark.parametrize(
    ("changes", "where"), [({"layers": 0}, "layers"), ({"width": 2.5}, "width"), ({"dropout": 1}, "dropout")]
)
def test_sizes_that_do_not_fit(changes, where):
    with pytest.raises(ModelError) as caught:
        make(**changes)
    assert caught.value.where == f"model.args.{where}"


def test_activations_can_be_computed_again():
    plain, ids = make(dropout=0.3), tokens()
    again = copy.deepcopy(plain)
    checkpoint_activations(again.blocks(), "full")
    gradients = []
    for model in (plain, again):
        torch.manual_seed(1)
        model(ids).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ------------------------------------------------------------------------------------------ under the engines

RUN = {
    "task": "causal_lm",
    "model": {"name": "lstm", "args": {"vocab": 61, "layers": 2, "width": 10, "context": 8, "tied": True}},
    "data": {
        "name": "synthetic",
        "args": {"kind": "causal_lm", "samples": 12, "context": 8, "vocab": 61},
        "batch_size": 6,
    },
    "train": {"steps": 2},
    "optim": {"name": "sgd", "lr": 0.5, "weight_decay": 0, "clip_grad_norm": None},
}


def plain_steps(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Two steps of SGD with torch alone, on the mean loss of the global batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for ids in batches:
        logits = model(ids[:, :-1])
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return dict(model.named_parameters())


def train_and_compare(engine: str) -> None:
    config = from_dict({**RUN, "engine": {"name": engine}}).config
    with join("cpu", needs_group=True) as world:
        training = assemble(config, world)
        batches = []
        for step, _ in zip(training.train.steps(), range(2), strict=False):
            mine = torch.cat([batch.data["tokens"][: batch.num_valid] for batch in step.microbatches])
            batches.append(torch.cat(world.all_gather_object(mine)))
            for batch in step.microbatches:
                with training.engine.microbatch(last=True):
                    training.engine.backward(training.task.loss(training.engine.model, batch))
            training.engine.step(1.0)
        ours = weights(everything(training.engine, world))
        sharded = [isinstance(p, DTensor) for p in training.engine.model.parameters()]
        assert all(sharded) if engine == "fsdp" else not any(sharded)
        training.close()
        expected = plain_steps(prepare_whole(config), batches)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_trains_on_two_ranks_as_on_one(engine):
    run_distributed(train_and_compare, 2, engine)
