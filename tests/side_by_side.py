"""All tests, in two halves side by side: those that launch runs wait most of the time, the others compute.

    python tests/side_by_side.py [arguments for pytest]

The half that computes has the lower priority and is shown as it goes; what the other one printed follows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

WAITING = [
    *("tests/unit/cli", "tests/unit/tracking", "tests/faults", "tests/launchers"),
    *("tests/unit/doors", "tests/unit/test_docs.py", "tests/unit/test_walk.py"),
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, *sys.argv[1:]]


def main() -> int:
    with tempfile.TemporaryFile("w+") as output:
        waiting = subprocess.Popen(command(*WAITING), stdout=output, stderr=subprocess.STDOUT)
        try:
            rest = command("tests", *(f"--ignore={path}" for path in WAITING))
            computing = subprocess.run(rest, check=False, preexec_fn=lambda: os.nice(10))  # no threads
            code = waiting.wait()
        except BaseException:
            waiting.terminate()
            raise
        output.seek(0)
        print(output.read(), end="", flush=True)
    return computing.returncode or code


if __name__ == "__main__":
    raise SystemExit(main())
