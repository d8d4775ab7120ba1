"""Moments in bfloat16 on a GPU: torch's own numbers rounded after each step, nobody waits, half the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.moments import _CHUNK, MOMENTS, Bf16Adam, Bf16AdamW
from tests.helpers import zoo
from tests.helpers.gpu import gpt_run, no_waiting, steps, training

DEVICE = torch.device("cuda", 0)
BETAS = {"args": {"betas": [0.9, 0.95]}}
OPTIM = {"moments": "bf16", **BETAS}
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
SHAPES = [(37, 53), (5,), (), (0, 4), (_CHUNK + 3,)]  # the last in two pieces, the second not aligned


@pytest.mark.parametrize("pair", [(torch.optim.Adam, Bf16Adam), (torch.optim.AdamW, Bf16AdamW)])
def test_it_is_torchs_with_moments_rounded_after_each_step(pair: tuple[Any, Any]) -> None:
    """Gradients are divided, and a step in the middle is left out, on the device."""
    torch.manual_seed(0)
    theirs = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in SHAPES]
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    torchs, mine = pair[0](theirs, **HYPER), pair[1](ours, **HYPER)
    for step in range(5):
        for optimizer in (torchs, mine):
            optimizer.grad_scale = torch.tensor(3.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step == 2), device=DEVICE)
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn_like(p) if step != 2 else torch.full_like(p, torch.nan)
            q.grad = p.grad.clone()
        torchs.step()
        mine.step()
        with torch.no_grad():
            zoo.round_moments(torchs)
        for p, q in zip(theirs, ours, strict=True):
            assert torch.equal(p, q), f"step {step}, {tuple(p.shape)}"
            assert torch.equal(torchs.state[p]["step"], mine.state[q]["step"])
            for kind in MOMENTS[:2]:
                kept = mine.state[q][kind]
                assert kept.dtype == torch.bfloat16
                assert torch.equal(torchs.state[p][kind], kept.float()), f"step {step}, {tuple(p.shape)}, {kind}"


@pytest.mark.parametrize("my_class", [Bf16Adam, Bf16AdamW])
def test_compiled_it_differs_in_the_last_bits_alone(my_class: Any) -> None:
    """A parameter and its gradient may begin anywhere in a buffer; gradients are divided and a step left out."""
    torch.manual_seed(0)
    theirs = [torch.randn(shape, device=DEVICE).requires_grad_() for shape in [*SHAPES, (4097,), (1,)]]
    buffers = [torch.randn(p.numel() + 1, device=DEVICE) for p in theirs]
    ours = [buffer[1:].view(p.shape).requires_grad_() for p, buffer in zip(theirs, buffers, strict=True)]
    plain, compiled = my_class(theirs, **HYPER), my_class(ours, **HYPER)
    compiled.compile_step()
    for p, q in zip(theirs, ours, strict=True):
        q.detach().copy_(p.detach())
    for step in range(5):
        for optimizer in (plain, compiled):
            optimizer.grad_scale = torch.tensor(3.0, device=DEVICE)
            optimizer.found_inf = torch.tensor(float(step == 2), device=DEVICE)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn_like(p) if step != 2 else torch.full_like(p, torch.nan)
            q.grad = torch.cat((torch.zeros(1, device=DEVICE), p.grad.flatten()))[1:].view(p.shape)
        plain.step()
        compiled.step()
        for p, q in zip(theirs, ours, strict=True):
            # Where a moment is rounded the other way its weight goes as much another way; that happens to few.
            off = (q - p).detach().abs()
            assert (off > 1e-2 * 0.05).sum() == 0
            assert (off > 1e-6).sum() <= 1e-2 * off.numel()
            assert torch.equal(plain.state[p]["step"], compiled.state[q]["step"])
            for kind in MOMENTS[:2]:
                kept, wanted = compiled.state[q][kind], plain.state[p][kind]
                assert kept.dtype == torch.bfloat16
                assert (kept != wanted).sum() <= 1e-2 * kept.numel()
                assert (kept - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_compiled_nobody_waits_and_each_optimizer_is_one_kernel(engine: str) -> None:
    optim = {**OPTIM, "schedule": {"name": "cosine", "warmup_steps": 2}}  # another rate in every step
    with training(gpt_run(engine, optim=optim, compile="blocks")) as built:
        loop = built.loop()
        for _ in range(4):
            loop._one_step()
        with no_waiting(), torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(4):
                loop._one_step()
        assert loop._watch.last() is None
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            loop._one_step()
            torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert not [name for name in names if "FusedOptimizer" in name]


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_nobody_waits_and_nothing_is_compiled(engine: str) -> None:
    optim = {**OPTIM, "schedule": {"name": "cosine", "warmup_steps": 2}}  # another rate in every step
    torch._dynamo.utils.counters.clear()
    with training(gpt_run(engine, optim=optim)) as built:
        loop = built.loop()
        for _ in range(4):
            loop._one_step()
        with no_waiting():
            for _ in range(4):
                loop._one_step()
        assert loop._watch.last() is None
        for state in built.engine._optimizer.state.values():
            assert state["step"].is_cuda
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    assert not torch._dynamo.utils.counters["stats"]


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_it_trains_as_with_moments_in_float32(engine: str) -> None:
    losses = {}
    for moments in ("fp32", "bf16"):
        with training(gpt_run(engine, optim={**BETAS, "moments": moments})) as built:
            losses[moments] = steps(built, 20)
    for ours, theirs in zip(losses["bf16"], losses["fp32"], strict=True):
        assert zoo.relative(ours[0], theirs[0]) < 1e-2
    assert losses["bf16"][-1] != losses["fp32"][-1]


def test_it_keeps_4_bytes_a_parameter() -> None:
    weights = torch.randn(16 * _CHUNK, device=DEVICE).requires_grad_()
    weights.grad = torch.randn_like(weights)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = Bf16AdamW([weights], **HYPER)
    optimizer.step()
    kept = torch.cuda.memory_allocated() - before
    assert 4 <= kept / weights.numel() < 4.01
    # Beside them, what is wide at once: two moments of one piece in float32.
    assert torch.cuda.max_memory_allocated() - before < kept + 2.2 * 8 * _CHUNK
