"""The software: versions that clash, GPUs as torch sees them, and two processes that add numbers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import time
from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement

from bigtrain.doctor.findings import ERROR, OK, WARNING, Finding

_GPU_DEVICE = re.compile(r"nvidia\d+")


def versions() -> list[Finding]:
    """Whether what bigtrain is built on has the versions that it, and they of one another, ask for."""
    clashes = []
    for asker, requirement, found in _clashes():
        said = f"{asker} asks for {requirement}, and {found} is installed"
        clashes.append(Finding(ERROR, "packages", said, f'pip install "{requirement}"'))
    import torch

    text = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    return clashes or [Finding(OK, "packages", f"{text}: versions fit one another")]


def _clashes() -> Iterator[tuple[str, Requirement, str]]:
    """Of bigtrain's requirements and their own: who asks, for what, and what is there instead."""
    names = ["bigtrain", *(requirement.name for requirement in _requirements("bigtrain"))]
    for asker in dict.fromkeys(names):
        for requirement in _requirements(asker):
            try:
                found = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                if asker == "bigtrain":
                    yield asker, requirement, "nothing"
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                yield asker, requirement, found


def _requirements(name: str) -> list[Requirement]:
    """What a package needs here, its extras left out."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


def gpus() -> list[Finding]:
    """Whether torch can use the GPUs that the machine has."""
    import torch

    devices = [name for name in os.listdir("/dev") if _GPU_DEVICE.fullmatch(name)] if os.path.isdir("/dev") else []
    if torch.cuda.is_available():
        version = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()  # type: ignore[no-untyped-call]
        nccl = ".".join(map(str, version)) or "none"
        names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}))
        text = f"{torch.cuda.device_count()} × {names}, CUDA {torch.version.cuda}, NCCL {nccl}"
        if len(devices) > torch.cuda.device_count():
            remedy = "CUDA_VISIBLE_DEVICES hides the others: unset it to use them"
            return [Finding(WARNING, "GPUs", f"{text}; the machine has {len(devices)}", remedy)]
        return [Finding(OK, "GPUs", text)]
    if not devices:
        return [Finding(OK, "GPUs", "none: training runs on the CPU, over gloo")]
    if torch.version.cuda is None:
        return [
            Finding(ERROR, "GPUs", f"{len(devices)}, and this torch is built without CUDA", "install torch with CUDA")
        ]
    text = f"{len(devices)}, and torch cannot use them: it is built for CUDA {torch.version.cuda}"
    return [
        Finding(ERROR, "GPUs", text, "see what nvidia-smi says: most often the driver is older than this CUDA needs")
    ]


def all_reduce() -> list[Finding]:
    """Let two processes add numbers, on GPUs where there are two."""
    import torch

    from bigtrain.processes import run_ranks

    began = time.perf_counter()
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    sums = run_ranks(add, 2, (device,), timeout_s=12.0)
    seconds = time.perf_counter() - began
    if sums != [3.0, 3.0]:
        text = f"1 and 2 came to {sums}"
        return [Finding(ERROR, "all-reduce", text, "a fault of the network or of a library: do not train here")]
    return [Finding(OK, "all-reduce", f"two processes on {device}: right, in {seconds:.1f} s with their start")]


def add(device: str) -> float:
    """The sum of every rank's number, its rank and one."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    tensor = torch.full((1 << 16,), rank + 1.0, device=f"cuda:{rank}" if device == "cuda" else "cpu")
    dist.all_reduce(tensor)
    return float(tensor.mean())
