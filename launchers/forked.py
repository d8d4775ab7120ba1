"""A process that is forked for a rank: what it does, and how it ended."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import sys
import threading
import traceback
from multiprocessing.context import ForkServerProcess
from typing import Any, ClassVar

from launchers import guarded


class RankProcess(ForkServerProcess):
    """A process of multiprocessing's, of whose kind it is known how they ended before any was asked to.

    torchrun's agent names one rank that failed. It asks the others to end then, and some must be killed: that these
    died is no news, but one that had died at the same moment may be the cause of it all.
    """

    _ranks: ClassVar[list[RankProcess]] = []
    _known: ClassVar[list[tuple[int, int]] | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._ranks.append(self)

    @classmethod
    def begin(cls) -> None:
        """Forget the ranks of the attempt before."""
        cls._ranks, cls._known = [], None

    @classmethod
    def ended(cls) -> list[tuple[int, int]]:
        """(rank, exit code) of those that had ended by themselves, also with 0: that may have been too early."""
        if cls._known is None:
            ends = [(rank, process.exitcode) for rank, process in enumerate(cls._ranks)]
            cls._known = [(rank, code) for rank, code in ends if code is not None]
        return cls._known

    def terminate(self) -> None:
        """Ask it to end."""
        self.ended()
        super().terminate()


def be_rank(job: dict[str, Any]) -> None:
    """What a forked process does: it is the program, as if that had been started by itself."""
    parent = os.environ.get(guarded.PARENT_VARIABLE)
    guarded.end_with_parent(int(parent) if parent else None)
    gc.freeze()  # what the server imported stays: looking through it at every collection would copy it, too
    multiprocessing.set_start_method(None, force=True)  # what data workers are started by is the user's
    os.environ.update(job["environment"])
    guarded.name_process(guarded.RANK_NAME + os.environ["RANK"])  # its command line is that of the server
    sys.argv = ["", *job["program"]]
    try:
        guarded.main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        # As any program ends, which one that multiprocessing has forked does not: after its threads, its handlers run.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
