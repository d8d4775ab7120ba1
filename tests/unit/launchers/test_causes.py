"""Why an attempt failed, of what is left in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.failures import write_error
from launchers.causes import find_cause
from launchers.starting import RankEnd

# What gloo said of two ranks under fsdp, of which one left out a part of the model (torch 2.14.1).
MISMATCH = (
    "[enforce fail at gloo/transport/tcp/pair.cc:464] op.preamble.length <= op.nbytes. 20 vs 12. Received data size "
    "doesn't match expected size. Is there a distributed collective mismatch in your code?"
)


@pytest.mark.parametrize(
    ("log", "brief", "advice"),
    [
        (f"x\nterminate called\n  what():  {MISMATCH}\n", f": {MISMATCH}", "runs on some ranks only"),
        ("terminate called\n  what():  std::bad_alloc\n", ": std::bad_alloc", "crashed in native code"),
        ("", "", "crashed in native code"),
        (None, "", "crashed in native code"),
    ],
)
def test_a_library_that_ends_a_process_is_quoted(tmp_path: Path, log: str | None, brief: str, advice: str) -> None:
    (tmp_path / "logs").mkdir()
    if log is not None:
        (tmp_path / "logs" / "rank-00001.stderr").write_text(log)
    cause = find_cause(tmp_path, [RankEnd(1, -6)], 1, step=3, debug=False)
    assert cause.brief == f"rank 1 was ended by SIGABRT{brief}"
    assert advice in cause.text
    assert cause.exit_code == 134


@pytest.mark.parametrize(("step", "may_pass"), [(None, False), (0, False), (3, True)])
def test_what_is_refused_before_the_first_step_is_not_tried_again(
    tmp_path: Path, step: int | None, may_pass: bool
) -> None:
    cause = find_cause(tmp_path, [RankEnd(1, 2)], 1, step=step, debug=False)
    assert cause.brief == "rank 1 ended with exit code 2 and left no word"
    assert cause.may_pass == may_pass


def test_a_rank_that_is_gone_without_a_word_comes_before_those_that_fail_of_it(tmp_path: Path) -> None:
    write_error(tmp_path, 0, 3, RuntimeError("Connection reset by peer"))
    gone = RankEnd(1, 0, is_told=False)
    assert find_cause(tmp_path, [gone], 1, step=3, debug=False).rank == 1
    assert find_cause(tmp_path, [gone, RankEnd(2, -9)], 1, step=3, debug=False).rank == 2
    write_error(tmp_path, 1, 3, RuntimeError("its own"))
    assert find_cause(tmp_path, [gone], 1, step=3, debug=False).rank == 0
