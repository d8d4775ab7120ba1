"""Writes load.csv: eight years of a made-up daily load, with a trend, seasons, weekends and noise that lasts for days.

It is no recording. The noise follows yesterday's, so that there is something to be learnt beyond the calendar.
"""

from __future__ import annotations

import csv
import datetime
import math
import random
import sys

DAYS = 2922


def main(path: str = "load.csv") -> None:
    """Write the file; the same every time."""
    draw = random.Random(0)
    noise = 0.0
    first = datetime.date(2016, 1, 1)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["date", "load", "temperature"])
        for day in range(DAYS):
            date = first + datetime.timedelta(days=day)
            season = math.cos(2 * math.pi * (day - 20) / 365.25)
            temperature = 11 - 9 * season + draw.gauss(0, 2.5)
            noise = 0.8 * noise + draw.gauss(0, 1.5)
            weekend = -9 if date.weekday() >= 5 else 0
            load = 100 + 0.004 * day + 12 * season - 0.6 * (temperature - 11) + weekend + noise
            writer.writerow([date.isoformat(), f"{load:.2f}", f"{temperature:.1f}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
