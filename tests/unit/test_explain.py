"""What `bigtrain explain` finds out, against written-out arithmetic; `tests/dist` holds bytes against engines."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from bigtrain.config.loader import from_dict
from bigtrain.errors import DataError, ModelError, PatternError, UserError
from bigtrain.explain import explain
from bigtrain.explain.words import sections, size_of, title, warnings

DIGITS = 1797  # samples in scikit-learn's digits


class Layer(nn.Module):
    """A block of 4 × width + 4 parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4)


class Tower(nn.Module):
    """Blocks of 24, 44 and 84 parameters; 7 × 2 + 1 outside of them, and a buffer of 3."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for width in (5, 10, 20))
        if shared:
            self.layers[1].inner.bias = self.layers[0].inner.bias
        self.table = nn.Parameter(torch.zeros(7, 2))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mask", torch.zeros(3), persistent=False)


class Reads(nn.Module):
    """Reads a value while it is built, which a tensor without memory does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(int(torch.tensor(3).item()), 2)


class NeedsGPU(torch.optim.SGD):
    """Runs on a GPU alone."""

    def step(self, closure: object = None) -> None:
        raise RuntimeError("no kernel for this device\nand more")


def configured(**changes):
    values = {
        "task": "classification",
        "model": f"{__name__}:Tower",
        "data": {"name": "digits", "eval": "none"},
        "train": {"steps": 10},
        "optim": {"name": "sgd"},
    }
    return from_dict({**values, **changes}).config


def line(explained, label):
    return next(each for each in explained.footprints if each.label == label)


# ---- batches ----------


def test_a_batch_that_divides_evenly():
    data = {"name": "digits", "batch_size": 64, "eval": {"split": 0.2}}
    batches = explain(configured(data=data, train={"epochs": 3, "micro_batch_size": 8}), world_size=4).batches
    samples = DIGITS - round(DIGITS * 0.2)
    steps = -(-samples // 64)
    assert (batches.most, batches.fewest) == ((8, 8), (8, 8))
    assert (batches.num_samples, batches.steps_per_epoch) == (samples, steps)
    assert (batches.last_step, batches.total_steps) == (samples % 64, 3 * steps)


def test_a_batch_that_does_not():
    data = {"name": "digits", "batch_size": 10, "eval": "none"}
    explained = explain(configured(data=data, train={"steps": 1797 // 5, "micro_batch_size": 3}), world_size=3)
    assert (explained.batches.most, explained.batches.fewest) == ((3, 1), (3, 0))  # 10 = 4 + 3 + 3
    said = " ".join(sections(explained)["batches"])
    assert "10 samples a step, over 3 processes: from 4 on the first, in 2 microbatches (1 of 3, 1 of 1), to 3" in said
    assert "repeats a sample with weight 0" in said
    assert "1,797 samples to train on: 180 steps an epoch, the last one of 7; 359 steps in all, 1.99 epochs" in said


def test_data_that_are_not_here_are_neither_fetched_nor_an_error(tmp_path):
    root = tmp_path / "nothing"
    data = {"name": "torchvision/MNIST", "args": {"root": str(root), "download": True}, "batch_size": 32}
    explained = explain(configured(data=data, train={"epochs": 2}))
    assert (explained.batches.num_samples, explained.batches.total_steps) == (None, None)
    assert explained.batches.most == (32,)
    assert "2 epochs; steps an epoch are not known" in sections(explained)["batches"]
    assert "number of samples is not known" in warnings(explained)[0]
    assert not root.exists()


# ---- the model ----------


def test_parts_of_a_model():
    explained = explain(configured(finetune={"freeze": "layers.2.*"}))
    parts = explained.parts
    assert [(b.name, b.kind, b.num_parameters) for b in parts.blocks] == [
        ("layers.0", "Layer", 24),
        ("layers.1", "Layer", 44),
        ("layers.2", "Layer", 84),
    ]
    assert (explained.left_to_root(), explained.stays_whole()) == ({"table": 14}, {"scale": 1})
    assert (parts.num_parameters, parts.num_trained) == (24 + 44 + 84 + 15, 24 + 44 + 15)


def test_blocks_that_share_parameters_are_left_to_the_root():
    model = {"name": f"{__name__}:Tower", "args": {"shared": True}}
    explained = explain(configured(model=model, engine={"name": "fsdp"}), world_size=2)
    assert [block.name for block in explained.parts.blocks] == ["layers.2"]
    assert explained.parts.shared_blocks == ("layers.0", "layers.1")
    assert any("share parameters" in text and "layers.1" in text for text in sections(explained)["sharding"])


def test_a_model_larger_than_any_memory():
    args = {"vocab": 10**6, "layers": 100, "width": 65536, "heads": 512, "mlp_width": 262144, "context": 8}
    explained = explain(configured(model={"name": "gpt", "args": args}), world_size=1024)
    block = 4 * 65536**2 + 3 * 65536 * 262144 + 2 * 65536  # attention, gated MLP, two norms
    assert {b.num_parameters for b in explained.parts.blocks} == {block}
    assert line(explained, "single").weights > 4 * 100 * block


def test_a_factory_that_reads_values_is_built_on_the_host_and_that_is_said():
    explained = explain(configured(model=f"{__name__}:Reads"))
    assert explained.parts.num_parameters == 3 * 2 + 2
    assert any("had to be built in memory" in note for note in explained.notes)


# ---- bytes ----------


def test_fsdp_by_hand():
    explained = explain(configured(optim={"name": "adam"}, engine={"fsdp": {"shard_size": 2}}), world_size=4)
    four, two = line(explained, "fsdp"), line(explained, "fsdp shard_size=2")
    # By rows: layers of 4 rows, a bias of 4, a table of 7 rows; the scalar stays whole.
    shard = {4: (24 + 44 + 84) // 4 + 2 * 2 + 1, 2: (24 + 44 + 84) // 2 + 4 * 2 + 1}
    assert (four.weights, two.weights) == (4 * shard[4], 4 * shard[2])
    assert (four.gradients, two.gradients) == (4 * shard[4], 4 * shard[2])
    counters = 4 * 8  # Adam counts the steps of each of eight parameters
    assert (four.optimizer, two.optimizer) == (8 * shard[4] + counters, 8 * shard[2] + counters)
    # The root, a block and the next one.
    assert four.working == two.working == 4 * (14 + 44 + 84)
    assert four.on_device == four.weights + four.working + four.gradients + four.optimizer + 3 * 4


def test_fsdp_that_keeps_blocks_or_moves_shards_to_the_host():
    fsdp = {"reshard_after_forward": False, "cpu_offload": True}
    footprint = line(explain(configured(engine={"fsdp": fsdp}), world_size=2), "fsdp")
    assert footprint.working == 4 * (14 + 24 + 44 + 84)
    assert footprint.on_device == footprint.working + 3 * 4
    assert footprint.weights > 0


def test_deepspeed_by_hand():
    optim = {"name": "sgd", "args": {"momentum": 0.9}, "weight_decay": 0.0}
    config = configured(optim=optim).model_copy(update={"precision": "bf16"})
    explained = explain(config, world_size=8)
    count = 24 + 44 + 84 + 15
    one, two = line(explained, "deepspeed stage=1"), line(explained, "deepspeed stage=2")
    three = line(explained, "deepspeed stage=3")
    flat = 176 // 8  # the 167 in one group, padded to a multiple of 2 × 8
    cut = 3 + 1 + 5 + 1 + 10 + 1 + 2 + 1  # an eighth of each parameter, rounded up
    assert [f.weights for f in (one, two, three)] == [2 * count, 2 * count, 2 * cut]
    assert [f.masters for f in (one, two, three)] == [4 * flat, 4 * flat, 4 * cut]
    assert [f.gradients for f in (one, two, three)] == [2 * count + 4 * 176, 4 * flat, 4 * cut]
    assert [f.optimizer for f in (one, two, three)] == [4 * flat, 4 * flat, 4 * cut]


def test_an_optimizer_that_does_not_run_here_is_not_counted_and_that_is_said():
    explained = explain(configured(optim={"name": f"{__name__}:NeedsGPU"}))
    assert {f.optimizer for f in explained.footprints if not f.refusal} == {None}
    assert "NeedsGPU is not counted" in explained.notes[0]
    assert "no kernel for this device" in explained.notes[0]
    assert "and more" not in explained.notes[0]


# ---- advice ----------


def advice(memory, world_size=4, **changes):
    return explain(configured(**changes), world_size=world_size, gpu_memory=memory).advice


def test_where_nothing_fits_moments_in_bf16_are_named_once_they_would_help():
    def said(**optim):
        explained = explain(configured(optim={"args": {"betas": [0.9, 0.95]}, **optim}), world_size=4, gpu_memory=100)
        return " ".join(sections(explained)["advice"])

    assert "optim.moments=bf16" in said()
    assert "optim.moments=bf16" not in said(moments="bf16")
    sgd = sections(explain(configured(optim="sgd"), world_size=4, gpu_memory=100))["advice"]
    assert "nothing fits" in sgd[0]
    assert "optim.moments=bf16" not in " ".join(sgd)


def test_moments_in_bf16_halve_what_the_optimizer_keeps():
    wide, narrow = (
        explain(configured(optim={"moments": moments, "args": {"betas": [0.9, 0.95]}}), world_size=2).footprints
        for moments in ("fp32", "bf16")
    )
    for before, after in zip(wide, narrow, strict=True):
        counters = 2 * after.optimizer - before.optimizer  # which stay as they are
        assert 0 < counters < 100
        assert after.on_device == before.on_device - (before.optimizer - after.optimizer)


def test_the_fastest_that_fits_is_advised():
    explained = explain(configured(), world_size=4)
    ddp, fsdp = line(explained, "ddp"), line(explained, "fsdp")
    assert advice(ddp.on_device).fastest.engine == "ddp"
    assert advice(ddp.on_device - 1).fastest.engine == "fsdp"
    assert advice(10**9, world_size=1).fastest.engine == "single"
    least = min(f.on_device for f in explained.footprints if not f.refusal and f.engine != "single")
    assert advice(10**9).smallest.on_device == least <= fsdp.on_device


def test_where_nothing_fits_it_says_how_many_processes_would_do():
    args = {"vocab": 32000, "layers": 32, "width": 4096, "heads": 32, "mlp_width": 14336, "context": 8}
    changes = {"model": {"name": "gpt", "args": args}, "optim": {"name": "adamw"}}
    explained = explain(configured(**changes), world_size=2, gpu_memory=24 << 30)
    assert explained.advice.fastest is None
    enough = explained.advice.fits_from
    assert line(explain(configured(**changes), world_size=enough), "fsdp").on_device <= 24 << 30
    assert line(explain(configured(**changes), world_size=enough // 2), "fsdp").on_device > 24 << 30
    assert f"fsdp fits on {enough} processes" in sections(explained)["advice"][0]
    assert advice(1, world_size=2).fits_from is None


def test_whether_it_fits_is_not_said_where_nobody_knows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    explained = explain(configured(), world_size=2)
    assert explained.gpu_memory is None
    assert explained.advice.fastest is None
    assert "not known" in " ".join(sections(explained)["advice"])


# ---- what is wrong ----------


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"model": "gtp"}, ModelError, "gtp"),
        ({"model": {"name": f"{__name__}:Tower", "args": {"depth": 3}}}, ModelError, "depth"),
        ({"data": {"name": "digist"}}, DataError, "digist"),
        ({"finetune": {"freeze": "head.*"}}, PatternError, "head"),
        ({"optim": {"name": "sgd", "args": {"betas": [0.9, 0.9]}}}, UserError, "betas"),
        ({"optim": {"name": "sgd", "args": {"nesterov": True}}}, UserError, "Nesterov"),
    ],
)
def test_a_wrong_run_file_is_one_typed_error(changes, error, text):
    with pytest.raises(error, match=text) as caught:
        explain(configured(**changes))
    assert caught.value.exit_code == 2


def test_what_training_would_refuse_is_said_and_the_rest_explained():
    model = {"name": "torchvision/resnet18", "args": {"num_classes": 10}}
    explained = explain(configured(model=model, engine={"name": "fsdp", "fsdp": {"shard_size": 2}}), world_size=3)
    refused = " ".join(warnings(explained))
    assert "BatchNorm over 3 processes" in refused
    assert "shard_size is 2, which does not divide the 3 processes" in refused
    assert line(explained, "ddp").weights > 40 << 20
    assert not explain(configured(model=model)).refusals


def test_blocks_that_are_to_be_recomputed_and_are_not_there():
    explained = explain(configured(model="bigmodel", activation_checkpointing="full"))
    assert "no repeated blocks whose activations" in warnings(explained)[0]


def test_an_optimizer_of_whole_parameters_is_refused_by_zero_alone():
    explained = explain(configured(optim={"name": "torch.optim:Adafactor"}), world_size=2)
    assert [f.label for f in explained.footprints if f.refusal] == [f"deepspeed stage={n}" for n in (1, 2, 3)]
    assert any("flat slices" in text for text in sections(explained)["memory"])


# ---- words ----------


def test_nothing_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    explained = explain(configured(engine={"name": "auto"}), world_size=8)
    assert not dist.is_initialized()
    assert "deepspeed" not in set(sys.modules) - before
    assert list(tmp_path.iterdir()) == []
    assert (explained.chosen.engine, explained.chosen.world_size) == ("fsdp", 8)
    assert any("auto took fsdp" in text for text in sections(explained)["sharding"])
    assert title(explained).endswith("8 processes, engine fsdp, fp32")


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_every_engine_is_put_into_words(engine):
    words = sections(explain(configured(engine={"name": engine}), world_size=1 if engine == "single" else 2))
    assert list(words) == ["batches", "model", "sharding", "memory", "advice"]
    assert all(lines and all(lines) for lines in words.values())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (15 << 20, "15.0 MiB"), (150 << 30, "150 GiB")],
)
def test_sizes(count, text):
    assert size_of(count) == text


def test_averages_of_weights_are_counted():
    plain, averaged = (explain(configured(optim={"name": "adamw", **more})) for more in ({}, {"ema": {"decay": 0.9}}))
    numbers = {each.label: each.optimizer for each in plain.footprints}
    trained = plain.parts.num_trained
    assert next(e for e in averaged.footprints if e.label == "single").optimizer == numbers["single"] + 4 * trained
    assert any("optim.ema" in line for line in sections(averaged)["memory"])
    assert not any("optim.ema" in line for line in sections(plain)["memory"])
