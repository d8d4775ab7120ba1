"""Where runs are killed, every test is looked at alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.leaks import nothing_left


@pytest.fixture(autouse=True)
def _nothing_left_by_a_test() -> Iterator[None]:
    with nothing_left():
        yield
