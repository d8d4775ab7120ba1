"""A small WaveNet (van den Oord et al., arXiv:1609.03499): dilated causal convolutions over samples of wav files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigtrain.errors import DataError

STEPS = 256  # µ-law steps, ITU-T G.711's µ of 255
MU = STEPS - 1


def to_steps(samples: Tensor) -> Tensor:
    """Samples in [-1, 1] as int64 steps: fine where the ear hears finely."""
    squeezed = samples.sign() * torch.log1p(MU * samples.abs()) / np.log1p(MU)
    return ((squeezed + 1) / 2 * MU + 0.5).long().clamp(0, MU)


def from_steps(steps: Tensor) -> Tensor:
    """The samples in [-1, 1] in the middle of steps."""
    squeezed = 2 * steps.float() / MU - 1
    return squeezed.sign() * torch.expm1(squeezed.abs() * np.log1p(MU)) / MU


def read_wav(path: Path) -> tuple[Tensor, int]:
    """The samples of a 16-bit file in [-1, 1], its channels averaged, and its rate."""
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() != 2:
                raise DataError(f"{path} has samples of {8 * file.getsampwidth()} bits", remedy="convert it to 16 bits")
            values = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            return torch.from_numpy(values.mean(1) / 32768.0).float(), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise DataError(f"{path} is no wav file that can be read: {error}", where=str(path)) from error


def write_wav(path: Path, samples: Tensor, rate: int) -> None:
    """Samples in [-1, 1] as a 16-bit file."""
    values = (samples.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())


class Sounds:
    """Windows of a sound: {"tokens": int64 (context + 1,)}. They overlap by one: every sample is foretold once."""

    is_random = False

    def __init__(self, steps: Tensor, context: int) -> None:
        self.steps, self.context, self.vocab_size = steps, context, STEPS

    def __len__(self) -> int:
        return (len(self.steps) - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        return {"tokens": self.steps[start : start + self.context + 1]}


def sounds(split: str, *, folder: str, context: int) -> Sounds:
    """The file <folder>/train.wav or <folder>/eval.wav."""
    path = Path(folder) / f"{split}.wav"
    if not path.is_file():
        raise DataError(f"there is no file {path}", where="data.args.folder", remedy="python make_wavs.py writes it")
    return Sounds(to_steps(read_wav(path)[0]), context)


class Layer(nn.Module):
    """A gated convolution that sees a sample and the one `dilation` before it, and no later one."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.gated = nn.Conv1d(channels, 2 * channels, kernel_size=2, dilation=dilation)
        self.mixed = nn.Conv1d(channels, channels, kernel_size=1)
        self.skipped = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, channels, T), twice
        signal, gate = self.gated(F.pad(x, (self.dilation, 0))).chunk(2, dim=1)
        hidden = signal.tanh() * gate.sigmoid()
        return x + self.mixed(hidden), self.skipped(hidden)


class WaveNet(nn.Module):
    """Logits of the next step after each, from the last 2^layers steps."""

    def __init__(self, *, channels: int, layers: int) -> None:
        super().__init__()
        self.context = 2**layers  # how far it sees back
        self.embed = nn.Embedding(STEPS, channels)
        self.layers = nn.ModuleList(Layer(channels, 2**level) for level in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, STEPS, 1))

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, steps: Tensor) -> Tensor:  # (B, T) -> (B, T, 256)
        x = self.embed(steps).transpose(1, 2)
        skips = torch.zeros_like(x)
        for layer in self.layers:
            x, skip = layer(x)
            skips = skips + skip
        return self.head(skips).transpose(1, 2)
