"""Writes wavs/train.wav and wavs/eval.wav: plucked strings at 8,000 samples a second, made by arithmetic.

They are no recordings: each note is a Karplus-Strong string, noise that goes round in a loop and is smoothed by it
(Karplus and Strong, 1983). Two files of 80 and 32 kB, the same every time, by the standard library alone.
"""

from __future__ import annotations

import array
import random
import sys
import wave
from pathlib import Path

RATE = 8000
NOTES = (196.0, 220.0, 246.9, 293.7, 329.6, 392.0)  # a pentatonic scale from G3


def pluck(frequency: float, samples: int, draw: random.Random) -> list[float]:
    """A string that is plucked once."""
    loop = [draw.uniform(-1, 1) for _ in range(round(RATE / frequency))]
    sound = []
    for step in range(samples):
        place = step % len(loop)
        sound.append(loop[place])
        loop[place] = 0.498 * (loop[place] + loop[(place + 1) % len(loop)])
    return sound


def write(path: Path, seconds: float, seed: int) -> None:
    """A melody, a note every quarter of a second."""
    draw = random.Random(seed)
    samples: list[float] = []
    while len(samples) < seconds * RATE:
        samples += pluck(draw.choice(NOTES), RATE // 4, draw)
    values = array.array("h", (round(20000 * value) for value in samples[: round(seconds * RATE)]))
    if sys.byteorder == "big":
        values.byteswap()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(values.tobytes())


if __name__ == "__main__":
    folder = Path(*sys.argv[1:] or ["wavs"])
    folder.mkdir(exist_ok=True)
    write(folder / "train.wav", 5.0, seed=0)
    write(folder / "eval.wav", 2.0, seed=1)
