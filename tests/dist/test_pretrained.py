"""Every rank reads the part of pretrained weights that it holds, under every engine, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bigtrain import models
from bigtrain.config.loader import from_dict
from bigtrain.dist import join
from bigtrain.errors import BigtrainError
from bigtrain.loop import train_step
from bigtrain.pretrained import start_from
from bigtrain.trainer import assemble
from tests.dist.test_resuming import engine_of
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import everything
from tests.helpers.resuming import config

LAYOUTS = [("fsdp", 2), ("zero3", 2), ("ddp", 2), ("zero1", 3)]


def values(folder: str, layout: str, **changes: Any) -> dict[str, Any]:
    finetune = {"init_from": f"{folder}/weights.safetensors", "freeze": "layers.0.*", "resize": "embed_tokens.weight"}
    made = config(Path(folder), engine=engine_of(layout), finetune=finetune, **changes)
    made["model"]["args"] |= {"tied": False, "dropout": 0.0}
    return made


def load(folder: str, layout: str) -> None:
    from safetensors.torch import load_file

    theirs = load_file(f"{folder}/weights.safetensors")
    with join("cpu", needs_group=True) as world:
        losses = {}
        for precision in ("fp32", "bf16"):
            training = assemble(from_dict(values(folder, layout, precision=precision)).config, world)
            fresh = everything(training.engine, world)
            report = start_from(training)
            ours = everything(training.engine, world)
            for (kind, name), tensor in ours.tensors.items():
                if name == "embed_tokens.weight":  # the file's has 200 tokens
                    assert torch.equal(tensor[:200], theirs[name])
                    assert torch.equal(tensor[200:], fresh.tensors[kind, name][200:])
                elif kind == "weight":
                    assert torch.equal(tensor, theirs[name]), (precision, name)
            assert report is not None
            assert list(report.resized) == ["embed_tokens.weight"]
            batch = next(training.train.steps()).microbatches
            losses[precision] = float(train_step(training.engine, training.task, batch, 1.0).loss)
            training.close()
        assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)  # what is computed with followed
        assert losses["fp32"] == pytest.approx(float(Path(folder, "loss").read_text()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_the_same_weights_under_every_engine(tmp_path: Path, layout: str, size: int) -> None:
    write(tmp_path)
    run_distributed(load, size, str(tmp_path), layout)


def write(folder: Path) -> None:
    """Weights with a smaller vocabulary, and the loss of the first step with them in one process."""
    made = values(str(folder), "single")
    torch.manual_seed(11)
    model = models.build("gpt", made["model"]["args"] | {"vocab": 257})
    state = {name: torch.randn_like(tensor) / 4 for name, tensor in model.state_dict().items()}
    state["embed_tokens.weight"] = state["embed_tokens.weight"][:200].clone()
    save_file(state, folder / "weights.safetensors")
    with join("cpu") as world:
        training = assemble(from_dict(made).config, world)
        start_from(training)
        batch = next(training.train.steps()).microbatches
        loss = float(train_step(training.engine, training.task, batch, 1.0).loss)
        training.close()
    (folder / "loss").write_text(repr(loss))


def fail_on_one(folder: str) -> str:
    import os

    made = values(folder, "fsdp")
    if os.environ["RANK"] == "1":
        made["finetune"]["init_from"] = f"{folder}/absent.safetensors"
    with join("cpu", needs_group=True) as world:
        training = assemble(from_dict(made).config, world)
        try:
            start_from(training)
        except BigtrainError as error:
            return str(error)
        finally:
            training.close()
    return "nothing"


@pytest.mark.slow
def test_what_one_rank_cannot_find_stops_all(tmp_path: Path) -> None:
    write(tmp_path)
    for said in run_distributed(fail_on_one, 2, str(tmp_path)):
        assert "absent.safetensors" in said
