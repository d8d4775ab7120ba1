"""Progress that a launcher watches: what takes long without a batch to count is no hang."""

import time

from bigtrain.health import pulse as pulses
from bigtrain.health.pulse import Pulse


def test_metrics_that_import_for_long_are_progress(monkeypatch):
    monkeypatch.setattr(pulses, "INTERVAL_S", 0.01)
    pulse = Pulse()

    class Slow:
        def metrics(self) -> str:
            until = time.monotonic() + 10
            while pulse.count < 3 and time.monotonic() < until:
                time.sleep(0.01)
            return "made"

    assert pulse.watched(Slow(), is_own=True).metrics() == "made"
    assert pulse.count >= 3
    assert pulse.batches == 0
    time.sleep(0.05)  # the beat that was under way
    count = pulse.count
    time.sleep(0.1)
    assert pulse.count == count


def test_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(pulses, "INTERVAL_S", 0.01)
    pulse = Pulse()
    with pulse.beating(0.05):
        time.sleep(0.3)
        count = pulse.count
        time.sleep(0.1)
        assert pulse.count == count <= 6
