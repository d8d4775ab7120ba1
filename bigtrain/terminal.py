"""Standard output that has gone, or cannot show everything: none of that may end a command, least of all a training.

This module does not import torch.
"""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import TextIO

_OUTPUTS = (1, 2)


def settle_outputs() -> None:
    """Let a process print whatever it likes: where an output is closed nowhere, and ? for what an encoding lacks."""
    if sys.stdout is None or sys.stderr is None:  # files that are opened later must not get their numbers
        while (number := os.open(os.devnull, os.O_RDWR)) <= max(_OUTPUTS):
            pass
        os.close(number)
        sys.stdout, sys.stderr = sys.stdout or _text_on(1), sys.stderr or _text_on(2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _text_on(number: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8", line_buffering=True)


def leave_terminal() -> None:
    """Print nowhere from now on, where the outputs are a terminal, which has been hung up."""
    for number in _OUTPUTS:
        try:
            is_terminal = stat.S_ISCHR(os.fstat(number).st_mode)  # isatty says no of one that is gone
        except OSError:
            continue
        if is_terminal:
            print_nowhere(number)


def print_line(text: str, number: int = 1) -> None:
    """Print a line now, on standard output or on 2, standard error.

    Where that has gone, a pipe that nobody reads or a full disk, nothing is printed there from now on.
    """
    try:
        print(text, file=sys.stderr if number == 2 else sys.stdout, flush=True)
    except OSError:
        print_nowhere(number)  # what is left in the buffer would fail again at the end


def has_gone(stream: TextIO) -> bool:
    """Whether an output takes nothing any more: an empty line is tried, as nothing may be left in its buffer."""
    try:
        print(file=stream, flush=True)
    except OSError:
        return True
    return False


def print_nowhere(number: int) -> None:
    """Let what is written to an open file go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
