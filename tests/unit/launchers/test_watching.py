"""The launcher's ear, with real connections: who is late, who is slow, and who is not listened to."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.beats import STARTING, TRAINING, Beat, read_beat
from launchers import watching
from launchers.watching import Watch


class Speaker:
    """A rank, as far as the launcher hears of it."""

    def __init__(self, watch: Watch, rank: int, token: str | None = None) -> None:
        self.beat = Beat(token or watch.address.token, rank, 1, "here", phase=TRAINING, step=1)
        self.connection = socket.create_connection((watch.address.host, watch.address.port))

    def say(self, **changes: object) -> None:
        self.beat = replace(self.beat, **changes)  # type: ignore[arg-type]
        self.connection.sendall(self.beat.line())


@pytest.fixture
def watch() -> Iterator[Watch]:
    with Watch("127.0.0.1", 2, hang_timeout_s=0.4, startup_timeout_s=1.0) as made:
        yield made


@pytest.fixture
def speakers(watch: Watch) -> Iterator[list[Speaker]]:
    made = [Speaker(watch, rank) for rank in range(2)]
    yield made
    for speaker in made:
        speaker.connection.close()


def test_a_rank_without_progress_hangs_although_it_speaks(watch: Watch, speakers: list[Speaker]) -> None:
    began = time.monotonic()
    hang = None
    while hang is None and time.monotonic() - began < 3:
        speakers[0].say(count=speakers[0].beat.count + 1)
        speakers[1].say()
        watch.listen(0.05)
        hang = watch.look()
    assert hang is not None
    assert 0.4 <= time.monotonic() - began < 0.8
    assert not hang.is_start
    assert hang.silent() == []


def test_starting_has_a_limit_of_its_own(watch: Watch, speakers: list[Speaker]) -> None:
    speakers[0].say(phase=STARTING)  # the other never speaks
    watch.listen(0.6)
    assert watch.look() is None
    watch.listen(0.5)
    hang = watch.look()
    assert hang is not None
    assert hang.is_start


def test_a_launcher_that_was_stopped_itself_takes_nobody_for_hung(
    watch: Watch, speakers: list[Speaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-Z, say, for longer than a rank may make no progress."""
    monkeypatch.setattr(watching, "_LONGEST_DEAF_S", 0.3)
    for speaker in speakers:
        speaker.say()
    watch.listen(0.05)
    assert watch.look() is None
    time.sleep(1.0)
    assert watch.look() is None
    began, hang = time.monotonic(), None
    while hang is None and time.monotonic() - began < 3:  # from then on as ever
        watch.listen(0.05)
        hang = watch.look()
    assert hang is not None
    assert time.monotonic() - began < 0.8


def test_a_rank_that_has_ended_does_not_hang(watch: Watch, speakers: list[Speaker]) -> None:
    for speaker in speakers:
        speaker.say()
        speaker.connection.close()
    watch.listen(0.6)
    assert watch.look() is None


def test_nobody_else_is_listened_to(watch: Watch, speakers: list[Speaker]) -> None:
    stranger = Speaker(watch, 0, token="guessed")
    stranger.say(step=10_000)
    other = Speaker(watch, 7)  # no such rank
    other.say()
    noise = socket.create_connection((watch.address.host, watch.address.port))
    noise.sendall(b"x" * 200_000)
    speakers[1].say(step=3)
    watch.listen(0.2)
    assert watch.step == 3
    for held in (stranger.connection, other.connection, noise):
        held.settimeout(2)
        with pytest.raises((ConnectionError, EOFError)):  # noqa: PT012
            if not held.recv(1):
                raise EOFError
        held.close()


def test_a_slow_rank_is_told_once_and_noise_never(watch: Watch, speakers: list[Speaker]) -> None:
    """10,000 healthy steps of noisy ranks, of which each beat shows the middle and the least of twelve."""
    noise = random.Random(0)
    taken: list[list[float]] = [[], []]
    for step in range(10_000):
        for own in taken:
            own.append(10 + noise.expovariate(1 / 8) + (200 if noise.random() < 0.02 else 0))
        if step % 20 == 19:
            for speaker, own in zip(speakers, taken, strict=True):
                last = sorted(own[-12:])
                speaker.say(step=step, count=step, own_ms=last[6], least_own_ms=last[0])
            watch.listen(0.001)
            assert watch.slow() == []
    for step in range(3):
        speakers[0].say(step=10_000 + step, own_ms=15.0, least_own_ms=11.0)
        speakers[1].say(step=10_000 + step, own_ms=60.0, least_own_ms=52.0)
        watch.listen(0.05)
        found = watch.slow()
        assert [(seen.rank, usual) for seen, usual in found] == ([(1, 15.0)] if step == 0 else [])


@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_what_is_no_beat_is_none(line: bytes) -> None:
    assert read_beat(line) is None


def test_a_beat_with_something_wrong_is_none() -> None:
    good = Beat("t", 1, 2, "h").line()
    assert read_beat(good) == Beat("t", 1, 2, "h")
    another = (good.replace(b'"rank":1', b'"rank":"1"'), good[:-2], b"[" * 4000, b"[1]", good.replace(b"host", b"hos"))
    for wrong in another:
        assert read_beat(wrong) is None
