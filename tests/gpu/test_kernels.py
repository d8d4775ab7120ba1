"""What a gpt runs on a GPU: flash attention, compiled blocks, a loss without whole logits; and its utilisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bigtrain
from bigtrain.models import head
from bigtrain.models.head import Head
from bigtrain.tracking.mfu import peak_flops
from tests.helpers import zoo
from tests.helpers.gpu import GPT, gpt_run, steps, training

FAST = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention")


class Attention(TorchDispatchMode):
    """Collects the names of attention's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name:
            self.names.add(name.removesuffix("_backward"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_attention_is_flash_attention(engine: str) -> None:
    with training(gpt_run(engine)) as built, Attention() as seen:
        built.loop()._one_step()
    assert seen.names, "no fused attention at all"
    assert seen.names <= set(FAST)


def test_logits_are_never_whole() -> None:
    vocab, context, samples = 50_000, 2048, 48
    data = {"name": "synthetic", "args": {"kind": "causal_lm", "samples": 64, "context": context, "vocab": vocab}}
    run = gpt_run(
        "single",
        model={"name": "gpt", "args": {**GPT, "layers": 1, "width": 128, "vocab": vocab, "context": context}},
        data={**data, "eval": "none", "batch_size": samples},
        train={"steps": 100},
    )
    with training(run) as built:
        loop = built.loop()
        loop._one_step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loop._one_step()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
    whole = samples * context * vocab * torch.bfloat16.itemsize
    assert used < whole


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_in_chunks_has_the_gradients_of_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, precision: str, compiled: bool
) -> None:
    """Seven chunks, the last of them short; some targets do not count."""
    device, width, vocab, number = torch.device("cuda", 0), 64, 3000, 900
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    monkeypatch.setattr(head, "_most_logits", lambda device: 140 * vocab)
    torch.manual_seed(0)
    layer = Head(width, vocab).to(device, dtype)
    hidden = torch.randn(number, width, device=device).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (number,), device=device)
    targets[::7] = -100
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, layer.weight)]
    whole = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    expected = [whole, *torch.autograd.grad(whole, exact)]
    if compiled:
        layer.compile_loss()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
        total = layer(hidden, targets)
    factor = 1.3  # in bfloat16 0.24 % less
    found = [total * factor, *torch.autograd.grad(total * factor, [hidden, layer.weight])]
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs * factor
        assert (ours.double() - theirs).norm() < (1e-5 if precision == "fp32" else 1e-2) * theirs.norm()
        share = (ours.double() * theirs).sum() / theirs.square().sum()
        assert abs(share - 1) < (1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize(
    ("engine", "precision", "tolerance"),
    [("single", "fp32", 1e-4), ("single", "bf16", 1e-2), ("ddp", "bf16", 1e-2), ("fsdp", "bf16", 1e-2)],
)
def test_compiled_blocks_train_alike(engine: str, precision: str, tolerance: float) -> None:
    seen = []
    for compiled in ("none", "blocks"):
        with training(gpt_run(engine, compile=compiled, precision=precision)) as built:
            seen.append(steps(built, 5))
    for ours, theirs in zip(*seen, strict=True):
        assert zoo.relative(ours[0], theirs[0]) < tolerance
        assert zoo.relative(ours[1], theirs[1]) < 10 * tolerance


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_blocks_are_compiled_once(engine: str) -> None:
    """Not again for the last batch of an epoch, which has 1 sample instead of 13, nor after an evaluation."""
    torch._dynamo.reset()
    data = {"name": "synthetic", "args": {"kind": "causal_lm", "samples": 44, "context": 128, "vocab": 256}}
    run = gpt_run(
        engine,
        compile="blocks",
        data={**data, "eval": {"split": 0.1}, "batch_size": 13},
        eval={"every_epochs": 1},
        train={"epochs": 100, "micro_batch_size": 5},
    )
    with training(run) as built:
        loop = built.loop()
        for _ in range(5):  # an epoch and a step: training, evaluation, training again
            loop._one_step()
        assert loop.outcome.evaluation
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(6):
                loop._one_step()


def test_a_run_says_how_busy_the_gpu_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = gpt_run("auto", run={"name": "busy", "dir": str(tmp_path)}, train={"steps": 6})
    run["track"] = {"log_every": 2, "progress": "plain"}
    done = bigtrain.train(run)
    rows = [json.loads(line) for line in (done.path / "metrics.jsonl").read_text().splitlines()]
    said = capfd.readouterr().out
    if peak_flops(torch.cuda.get_device_name(0), torch.bfloat16) is None:
        assert "no mfu: the peak of" in said
        assert not any("mfu" in row for row in rows)
    else:
        lines = [row for row in rows if "event" not in row]
        assert len(lines) == 3
        assert all(0 < row["mfu"] < 1 for row in lines)
        assert "mfu" in said
