"""Processes that are forked for ranks: real ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time

import pytest

from launchers.forked import RankProcess, be_rank

LOOK = """
import json, multiprocessing, os, sys
from pathlib import Path
Path(os.environ["LOOK"]).write_text(json.dumps({
    "main": __name__,
    "argv": sys.argv[1:],
    "method": multiprocessing.get_start_method(),
    "called": Path("/proc/self/comm").read_text().strip(),
}))
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("code", [0, 7])
def test_it_is_the_program_as_if_that_had_been_started_by_itself(tmp_path, monkeypatch, code):
    (tmp_path / "looking.py").write_text(LOOK)
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = {"LOOK": str(tmp_path / "seen.json"), "RANK": "5"}
    process = RankProcess(target=be_rank, args=({"program": ["looking", str(code)], "environment": environment},))
    process.start()
    process.join()
    assert process.exitcode == code
    seen = json.loads((tmp_path / "seen.json").read_text())
    usual = "fork" if sys.version_info < (3, 14) else "forkserver"
    assert seen == {"main": "__main__", "argv": [str(code)], "method": usual, "called": "bigtrain-5"}
    assert multiprocessing.get_start_method() == usual


def test_who_had_ended_before_the_others_were_asked_to_end_is_known():
    RankProcess.begin()
    ranks = [RankProcess(target=target, args=args) for target, args in ((time.sleep, (60,)), (os._exit, (3,)))]
    ranks.append(RankProcess(target=os.kill, args=(os.getpid(), 0)))  # ends well
    for rank in ranks:
        rank.start()
    for rank in ranks[1:]:
        rank.join()
    ranks[0].terminate()
    ranks[0].join()
    assert ranks[0].exitcode == -signal.SIGTERM
    assert RankProcess.ended() == [(1, 3), (2, 0)]


def test_a_rank_that_was_killed_is_known_when_nobody_was_left_to_be_asked():
    RankProcess.begin()
    rank = RankProcess(target=time.sleep, args=(60,))
    rank.start()
    rank.kill()
    rank.join()
    assert RankProcess.ended() == [(0, -signal.SIGKILL)]
