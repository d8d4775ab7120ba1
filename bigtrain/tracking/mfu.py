"""Model FLOPs utilisation: the share of what the GPUs could compute that goes into the model.

    mfu = flops_per_sample × samples per second / (peak FLOPs per second of a GPU × processes)

(Chowdhery et al., PaLM, 2022, appendix B.) The model says what a sample costs; gpt counts attention without its masked
half, and nothing counts what activation checkpointing computes again. The peak is the vendor's, for dense matrices in
the dtype that is computed in. A peak that is not known is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from bigtrain.metrics import Row
from bigtrain.tracking.base import Tracker, closing_all


class Peak(NamedTuple):
    """Dense FLOPs per second.

    Attributes:
        half: In bfloat16 and float16 with sums in float32, on tensor cores.
        fp32: In float32, without TF32.
    """

    half: float
    fp32: float


# By the device's name as CUDA gives it, whole: a MIG slice ("… MIG 1g.10gb") or a variant with other clocks is another
# device. Where a data sheet gives tensor cores with sparsity only, half of that stands here, as its footnote says.
_PEAKS = {
    # NVIDIA A100 Tensor Core GPU data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4): the same for SXM and PCIe.
    r"A100-(SXM4?|PCIE)-\d+GB|A100 80GB PCIe": Peak(312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU architecture white paper, SXM5; the data sheet says 1,979 with sparsity.
    r"H100 80GB HBM3": Peak(989.4e12, 66.9e12),
    # NVIDIA H100 Tensor Core GPU data sheet, PCIe: 1,513 with sparsity.
    r"H100 PCIe": Peak(756.5e12, 51e12),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: 1,979 with sparsity, the H100's chip.
    r"H200": Peak(989.4e12, 66.9e12),
    # NVIDIA Blackwell, specifications of HGX B200 and of GB200 NVL72, one GPU: 4.5 and 5 PFLOPS with sparsity.
    r"B200": Peak(2250e12, 75e12),
    r"GB200": Peak(2500e12, 80e12),
    # NVIDIA L40 and L40S data sheets: both numbers, "181.05 | 362.1*" and "362.05 | 733*".
    r"L40": Peak(181.05e12, 90.5e12),
    r"L40S": Peak(362.05e12, 91.6e12),
    # NVIDIA L4 Tensor Core GPU data sheet: 242 with sparsity.
    r"L4": Peak(121e12, 30.3e12),
    # NVIDIA A40 and A10 data sheets: both numbers, "149.7 | 299.4*" and "125 | 250*".
    r"A40": Peak(149.7e12, 37.4e12),
    r"A10": Peak(125e12, 31.2e12),
    # NVIDIA Ada GPU architecture white paper, appendix A: with sums in float32, half of what sums in float16 give.
    r"GeForce RTX 4090": Peak(165.2e12, 82.6e12),
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The vendor's dense peak in FLOPs per second, or None where it is not known.

    Args:
        device_name: As `torch.cuda.get_device_name` says it.
        dtype: Of the matrices; float32 means without TF32.
    """
    for pattern, peak in _PEAKS.items():
        if re.fullmatch(f"(NVIDIA )?({pattern})", device_name):
            return {torch.bfloat16: peak.half, torch.float16: peak.half, torch.float32: peak.fp32}.get(dtype)
    return None


@dataclass(frozen=True)
class Utilisation:
    """What turns a throughput into a share of the peak.

    Attributes:
        flops_per_sample: Of one forward and backward pass.
        peak: FLOPs per second of all processes' GPUs together.
    """

    flops_per_sample: float
    peak: float

    def at(self, samples_per_s: float) -> float:
        """The share, 0 to 1, at so many samples per second on all processes together."""
        return self.flops_per_sample * samples_per_s / self.peak


def utilisation(model: nn.Module, device_name: str, dtype: torch.dtype, processes: int) -> Utilisation | str:
    """How to compute the utilisation of a training, or why it cannot be.

    Args:
        model: The plain module.
        device_name: The GPU's, taken to be the same on every process.
        dtype: What forward and backward compute in.
        processes: How many train together.
    """
    answer = getattr(model, "flops_per_sample", None)
    if not callable(answer):
        return f"{type(model).__name__} has no flops_per_sample()"
    tf32 = torch.get_float32_matmul_precision()
    if dtype == torch.float32 and tf32 != "highest":
        return f"torch.set_float32_matmul_precision({tf32!r}) lets float32 products run in TF32"
    peak = peak_flops(device_name, dtype)
    if peak is None:
        return f"the peak of {device_name} in {str(dtype).removeprefix('torch.')} is not known"
    return Utilisation(float(answer()), peak * processes)


class Derived:
    """Hands rows on, those that have a throughput with what follows from it: `tokens_per_s` and `mfu`.

    Args:
        trackers: Who takes them.
        utilisation: What turns samples a second into a share of the peak; None where that is not known.
        tokens_per_sample: None where samples have none.
    """

    def __init__(
        self, trackers: Sequence[Tracker], utilisation: Utilisation | None = None, tokens_per_sample: int | None = None
    ) -> None:
        self._trackers = trackers
        self._utilisation, self._tokens = utilisation, tokens_per_sample

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one line."""
        if "samples_per_s" in row:
            more = {}
            if self._tokens is not None:
                more["tokens_per_s"] = row["samples_per_s"] * self._tokens
            if self._utilisation is not None:
                more["mfu"] = self._utilisation.at(row["samples_per_s"])
            row = Row(row, **more)
        for tracker in self._trackers:
            tracker.log(row)

    def close(self) -> None:
        """Close them."""
        closing_all(self._trackers).close()
