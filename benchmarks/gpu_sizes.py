"""What benchmarks/gpu.py measures, and on what."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

LLAMA_1B = {
    "vocab": 128256, "layers": 16, "width": 2048, "heads": 32, "kv_heads": 8, "mlp_width": 8192, "context": 4096,
    "tied": True,
}  # fmt: skip
LLAMA_8B = {
    "vocab": 128256, "layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336, "context": 8192,
}  # fmt: skip
GPT_2_SMALL = {"vocab": 50304, "layers": 12, "width": 768, "heads": 12, "context": 1024, "tied": True}
TOY = {"vocab": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32}


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        product: The side of the square matrices.
        gpt_1b: Arguments of the model whose shape is Llama 3.2 1B's.
        gpt_8b: Those of the model whose shape is Llama 3.1 8B's.
        gpt_1b_batch: Sequences a step of the first; the microbatch is halved where memory runs out.
        gpt_8b_batch: Those of the second; gradients kept from one microbatch to the next would not fit.
        vit: A model of images, and its arguments.
        side: Pixels of an image's side.
        images: Images a step.
        small: Arguments of the gpt that the peers train.
        small_batch: Its sequences a step.
        steps: Steps that are measured, at most.
        measured_s: Seconds that are left for them, where settling takes long: two steps settle at least.
        compiled: What torch.compile compiles.
    """

    product: int = 16384
    gpt_1b: Mapping[str, Any] = field(default_factory=lambda: LLAMA_1B)
    gpt_8b: Mapping[str, Any] = field(default_factory=lambda: LLAMA_8B)
    gpt_1b_batch: int = 8
    gpt_8b_batch: int = 1
    vit: str = "torchvision/vit_l_16"
    side: int = 224
    images: int = 256
    small: Mapping[str, Any] = field(default_factory=lambda: GPT_2_SMALL)
    small_batch: int = 16
    steps: int = 30
    measured_s: float = 30.0
    compiled: str = "blocks"


TINY = Sizes(64, TOY, TOY, 2, 2, "torchvision/resnet18", 32, 4, TOY, 2, 4, 0.0, "none")


@dataclass
class Bench:
    """What the parts share.

    Attributes:
        device: Where everything runs.
        sizes: How large it is.
        product: FLOPs per second of the product of matrices, once measured.
    """

    device: torch.device
    sizes: Sizes
    product: float | None = None

    @property
    def name(self) -> str:
        """The device's, as CUDA gives it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def memory(self) -> int:
        """Bytes of the device; on a host without limit."""
        is_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_properties(self.device).total_memory if is_gpu else sys.maxsize

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give memory back, and begin to look for its peak anew."""
        if self.sizes.compiled != "none":
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """The most memory that tensors took since `forget`."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
