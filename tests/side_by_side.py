"""All tests, in three parts side by side: two launch runs and wait most of the time, the third computes.

    python tests/side_by_side.py [arguments for pytest]

What is timed has the highest priority. The part that computes is shown as it goes; what the others printed follows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from typing import IO

TIMED = ["tests/launchers", "tests/faults"]
WAITING = [
    *("tests/unit/cli", "tests/unit/tracking", "tests/unit/doors"),
    *("tests/unit/test_docs.py", "tests/unit/test_walk.py", "tests/unit/test_examples.py"),
]
COMPUTING = ["tests", *(f"--ignore={path}" for path in [*TIMED, *WAITING])]


def start(paths: list[str], niceness: int, output: IO[str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths, *sys.argv[1:]]
    together = None if output is None else subprocess.STDOUT
    return subprocess.Popen(command, stdout=output, stderr=together, text=True, preexec_fn=lambda: os.nice(niceness))


def main() -> int:
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
        parts = [start(TIMED, 0, outputs[0]), start(WAITING, 5, outputs[1]), start(COMPUTING, 10)]
        try:
            codes = [part.wait() for part in reversed(parts)]
        except BaseException:
            for part in parts:
                part.terminate()
            raise
        for output in outputs:
            output.seek(0)
            print(output.read(), end="", flush=True)
    return max(codes, key=abs)


if __name__ == "__main__":
    raise SystemExit(main())
