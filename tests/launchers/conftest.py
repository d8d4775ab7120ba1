"""A real SLURM for the tests that need one: started once, ended at the end, all of it in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.helpers.leaks import nothing_left
from tests.helpers.slurm import Cluster, missing_daemons


@pytest.fixture(autouse=True)
def _nothing_left_by_a_test() -> Iterator[None]:
    """Where runs are killed, every test is looked at alone."""
    with nothing_left():
        yield


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = missing_daemons()
    if missing:
        pytest.skip(f"no SLURM can be started here: it needs {', '.join(missing)} (apt-get install slurm-wlm munge)")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    before = dict(os.environ)
    try:
        made.start()
        os.environ.update(made.environment)
        yield made
    finally:
        os.environ.clear()
        os.environ.update(before)
        made.stop()
