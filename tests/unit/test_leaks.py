"""The watch over what tests leave behind sees each kind of it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.leaks import nothing_left


def test_a_process() -> None:
    with pytest.raises(AssertionError, match="sleep 60"), nothing_left(0):
        process = subprocess.Popen(["sleep", "60"])
    process.kill()
    process.wait()


def test_a_process_that_belongs_to_nobody() -> None:
    script = "import subprocess; print(subprocess.Popen(['sleep', '61'], stdout=-3, stderr=-3).pid)"
    with pytest.raises(AssertionError, match="sleep 61"), nothing_left(0):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    subprocess.run(["kill", done.stdout.strip()], check=True)


def test_ports() -> None:
    with pytest.raises(AssertionError, match="listening ports"), nothing_left(0):
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    for server in servers:
        server.close()


def test_a_file_in_shared_memory() -> None:
    path = Path("/dev/shm/bigtrain-test-of-leaks")
    try:
        with pytest.raises(AssertionError, match="bigtrain-test-of-leaks"), nothing_left(0):
            path.touch()
        with path.open() as held, nothing_left(0):  # what a living process holds may still be gone in time
            assert held.readable()
    finally:
        path.unlink()


def test_nothing() -> None:
    with nothing_left(0):
        subprocess.run(["true"], check=True)
