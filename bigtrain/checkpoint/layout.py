"""Which shard file holds which part of a tensor, as a rule that does not grow with the number of files.

Every engine cuts a tensor the same way in the end: its elements in row-major order, one run for each rank, all runs
but the first and the last of the same length. Rows over w ranks are that (a run is some whole rows), a flat slice of
ZeRO is, the copy that one rank holds of a replicated tensor is: a single run. So three integers say where everything
lies (`Cut`), and a reader computes from them which files to open. What a file holds exactly stands in its own header.

A tensor that is cut in any other way (by columns, say) has a list of the files that hold a part of it instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bigtrain.state import Box

Key = tuple[str, str]  # kind, name


class Cut(NamedTuple):
    """Runs of a flattened tensor, each with the writer after the one before.

    Attributes:
        writer: Who holds the first run.
        first: The length of the first run, in elements.
        every: The length of every other, but for the last one, which may be shorter.
    """

    writer: int
    first: int
    every: int

    def run_of(self, writer: int, numel: int) -> tuple[int, int]:
        """The first element that a writer holds, and the one after the last; (0, 0) where it holds none."""
        number = writer - self.writer
        if number < 0:
            return 0, 0
        start = 0 if number == 0 else min(numel, self.first + (number - 1) * self.every)
        stop = min(numel, self.first + number * self.every)
        return (start, stop) if start < stop else (0, 0)

    def writers_of(self, start: int, stop: int) -> range:
        """Who holds the elements from `start` to before `stop`."""
        if start >= stop:
            return range(0)
        return range(self._writer_of(start), self._writer_of(stop - 1) + 1)

    def _writer_of(self, element: int) -> int:
        return self.writer + (0 if element < self.first else 1 + (element - self.first) // self.every)


class Part(NamedTuple):
    """What one writer holds of one tensor.

    Attributes:
        shape: The full tensor's shape.
        dtype: Its dtype, in the words of safetensors.
        boxes: The boxes, in order.
    """

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[Box, ...]

    @property
    def run(self) -> tuple[int, int] | None:
        """The boxes as one run of the flattened tensor; None where they are not one."""
        runs = [run_of_box(self.shape, box) for box in self.boxes]
        for before, after in itertools.pairwise(runs):
            if before is None or after is None or before[1] != after[0]:
                return None
        if runs[0] is None or runs[-1] is None:
            return None
        return runs[0][0], runs[-1][1]


def run_of_box(shape: Sequence[int], box: Box) -> tuple[int, int] | None:
    """Where a box lies in the flattened tensor; None where it is not in one piece."""
    numel = math.prod(box.size)
    if numel == 0:
        return 0, 0
    cut = next((dim for dim, size in enumerate(box.size) if size != 1), len(shape))
    if any(size != full for size, full in zip(box.size[cut + 1 :], shape[cut + 1 :], strict=True)):
        return None
    start = position(shape, box.offset)
    return start, start + numel


def position(shape: Sequence[int], offset: Sequence[int]) -> int:
    """The place of an element in the flattened tensor."""
    place = 0
    for size, index in zip(shape, offset, strict=True):
        place = place * size + index
    return place


def span(shape: Sequence[int], box: Box) -> tuple[int, int]:
    """The first element of a box in the flattened tensor, and the one after its last."""
    if 0 in box.size:
        return 0, 0
    last = [o + n - 1 for o, n in zip(box.offset, box.size, strict=True)]
    return position(shape, box.offset), position(shape, last) + 1


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share; None where that is nothing."""
    offset = tuple(map(max, a.offset, b.offset))
    stop = [min(ao + an, bo + bn) for ao, an, bo, bn in zip(*a, *b, strict=True)]
    size = tuple(end - start for start, end in zip(offset, stop, strict=True))
    return Box(offset, size) if all(n > 0 for n in size) else None


def is_corner(parts: Iterable[Part]) -> bool:
    """Whether a writer holds the beginning or the end of any tensor, and so is needed to find the cuts."""
    for part in parts:
        run = part.run
        if run is None or run[0] == 0 or run[1] == math.prod(part.shape):
            return True
    return False


def find_cuts(corners: Mapping[int, Mapping[Key, Part]]) -> dict[Key, tuple[Part, Cut]]:
    """The rule of every tensor whose beginning and end are seen, from what the writers that hold them hold.

    A guess: whether the writers between follow it, each must check (`strays`).
    """
    first: dict[Key, tuple[int, Part]] = {}
    last: dict[Key, tuple[int, int]] = {}
    for writer in sorted(corners):
        for key, part in corners[writer].items():
            run = part.run
            if run is None:
                continue
            if run[0] == 0 and key not in first:
                first[key] = writer, part
            if run[1] == math.prod(part.shape):
                last[key] = writer, run[0]
    found = {}
    for key, (writer, part) in first.items():
        cut = _cut(writer, part, *last[key]) if key in last else None
        if cut:
            found[key] = part, cut
    return found


def _cut(writer: int, part: Part, last_writer: int, last_start: int) -> Cut | None:
    numel = math.prod(part.shape)
    stop = part.run[1] if part.run else 0
    between = last_writer - writer - 1
    if stop == numel:
        return Cut(writer, numel, max(numel, 1))
    if between == 0:
        return Cut(writer, stop, max(stop, numel - stop))
    every, rest = divmod(last_start - stop, between) if between > 0 else (0, 1)
    return Cut(writer, stop, every) if every > 0 and not rest else None


def strays(writer: int, mine: Mapping[Key, Part], cuts: Mapping[Key, tuple[Part, Cut]]) -> set[Key]:
    """The tensors of which this writer does not hold what the rule says."""
    wrong = {key for key in mine if key not in cuts}
    for key, (seen, cut) in cuts.items():
        held = mine.get(key)
        numel = math.prod(seen.shape)
        is_alike = held is None or (held.shape, held.dtype) == (seen.shape, seen.dtype)
        follows = not numel or (held.run if held else (0, 0)) == cut.run_of(writer, numel)
        if not (is_alike and follows):
            wrong.add(key)
    return wrong


def check_cover(key: Key, parts: Sequence[Part]) -> None:
    """See that the parts of all writers are the whole tensor, each element once.

    Raises:
        ValueError: Saying what is wrong.
    """
    if len({(part.shape, part.dtype) for part in parts}) != 1:
        raise ValueError(f"ranks disagree on the shape or dtype of {' '.join(key)}")
    boxes = [box for part in parts for box in part.boxes]
    held, numel = sum(math.prod(box.size) for box in boxes), math.prod(parts[0].shape)
    overlap = any(intersection(a, b) for index, a in enumerate(boxes) for b in boxes[:index])
    if held != numel or overlap:
        raise ValueError(f"the ranks own {held} elements of {' '.join(key)}, which has {numel}, or some of them twice")
