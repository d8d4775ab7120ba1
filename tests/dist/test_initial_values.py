"""Initial values are the same under every engine and number of processes, whole or filled piece by piece."""

from __future__ import annotations

import pytest
import torch

from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.trainer import assemble, prepare_whole
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import everything, weights

# A vocabulary that no number of ranks divides, and tied weights; gpt answers init_tensor, resnet does not.
GPT = {"vocab": 61, "layers": 2, "width": 24, "heads": 3, "context": 8, "mlp_width": 40, "tied": True}
RUNS = {
    "gpt": {
        "task": "causal_lm",
        "model": {"name": "gpt", "args": GPT},
        "data": {"name": "synthetic", "args": {"kind": "causal_lm", "samples": 8, "context": 8, "vocab": 61}},
    },
    "resnet": {
        "task": "classification",
        "model": {"name": "torchvision/resnet18", "args": {"num_classes": 3, "norm_layer": "group_norm"}},
        "data": {
            "name": "synthetic",
            "args": {"kind": "classification", "samples": 8, "shape": [3, 16, 16], "classes": 3},
        },
    },
}


def compare_with_whole(engine: str, precision: str) -> None:
    with join("cpu", needs_group=True) as world:
        for name, run in RUNS.items():
            named, _, stage = engine.partition(":")
            section = {"name": named, "deepspeed": {"stage": int(stage or 3)}}
            freeze = {"freeze": "*norm*" if name == "gpt" else "bn1.*"} if precision == "bf16" else {}
            parts = {"train": {"steps": 1}, "engine": section, "precision": precision, "finetune": freeze}
            config = from_dict({**run, **parts}).config
            training = assemble(config, world)
            ours = weights(everything(training.engine, world))
            plain = dict(prepare_whole(config).named_parameters())
            assert ours.keys() == plain.keys()
            for parameter, tensor in plain.items():
                assert torch.equal(ours[parameter], tensor), f"{name}: {parameter}"
            tokens = next(training.train.steps()).microbatches[0].data
            inputs = tokens["tokens"][:, :-1] if isinstance(tokens, dict) else tokens[0]
            close = {"rtol": 0.1, "atol": 0.02} if precision == "bf16" else {}
            with training.engine.evaluating():
                outputs = training.engine.model(inputs)
            torch.testing.assert_close(outputs, prepare_whole(config).eval()(inputs), **close)
            training.close()


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("deepspeed:2", 2), ("deepspeed:3", 1), ("deepspeed:3", 3)],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_under_every_engine(engine: str, world_size: int, precision: str) -> None:
    run_distributed(compare_with_whole, world_size, engine, precision)


def test_a_seed_decides_them() -> None:
    configs = [from_dict({**RUNS["gpt"], "train": {"steps": 1}, "run": {"seed": seed}}).config for seed in (1, 1, 2)]
    first, again, other = (dict(prepare_whole(config).named_parameters()) for config in configs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
