"""Writes sample.wav: half a second that the trained model makes up, sample by sample, after a little of eval.wav."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from wavenet import from_steps, read_wav, to_steps, write_wav

import bigtrain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", default="runs/run")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("sample.wav"))
    asked = parser.parse_args()
    heard, rate = read_wav(Path("wavs/eval.wav"))
    generator = torch.Generator().manual_seed(0)
    with bigtrain.load_trained(asked.run) as trained, trained.evaluating():
        steps = to_steps(heard[: trained.model.context])
        for _ in range(round(asked.seconds * rate)):
            logits = trained.model(steps[None, -trained.model.context :])[0, -1]
            drawn = torch.multinomial((logits / asked.temperature).softmax(0), 1, generator=generator)
            steps = torch.cat((steps, drawn))
    write_wav(asked.out, from_steps(steps), rate)
    print(f"{asked.out}: {len(steps) / rate:.2f} s, the first {trained.model.context / rate:.3f} of them heard")


if __name__ == "__main__":
    main()
