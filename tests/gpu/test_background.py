"""A checkpoint written in the background: a GPU copies beside its work, and what is saved is the state at the call."""

from __future__ import annotations

from pathlib import Path

import torch

from bigtrain.checkpoint import Background
from bigtrain.dist import World
from bigtrain.state import WEIGHT
from tests.helpers.checkpoints import assert_holds, cut, some_tensors

DEVICE = torch.device("cuda", 0)
A_WHILE = 2_000_000_000  # cycles: about a second


def test_moments_are_copied_while_the_gpu_computes(tmp_path: Path) -> None:
    expected = some_tensors(1)
    tensors = {key: tensor.to(DEVICE) for key, tensor in expected.items()}
    background = Background(World(device=DEVICE), tmp_path)
    torch.cuda._sleep(1000)  # loads the kernel
    torch.cuda.synchronize()
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    torch.cuda._sleep(A_WHILE)  # the next forward and backward
    path = background.wait()
    assert not torch.cuda.current_stream().query(), "the copies waited for what was computed after them"
    assert path is not None
    assert_holds(path, expected)


def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    """Weights change at once, the rest as an optimizer would change it; the copies have to wait for work before."""
    generator = torch.Generator().manual_seed(0)
    keys = [(kind, "w") for kind in (WEIGHT, "exp_avg", "exp_avg_sq")]
    expected = {key: torch.randn(64 << 10, 256, generator=generator) for key in keys}  # 64 MiB each
    tensors = {key: torch.zeros_like(tensor, device=DEVICE) for key, tensor in expected.items()}
    background = Background(World(device=DEVICE), tmp_path)
    sources = {key: tensor.to(DEVICE) for key, tensor in expected.items()}
    torch.cuda._sleep(A_WHILE // 10)  # what computes the state is not done when it is saved
    for step in (1, 2):
        for key, tensor in tensors.items():
            tensor.copy_(sources[key])
        background.start(step, cut("rows", tensors, 1)[0], extra={})
        tensors[keys[0]].zero_()
        background.wait_for_copy()
        for key in keys[1:]:
            tensors[key].zero_()
        path = background.wait()
        assert path is not None
        assert_holds(path, expected)
