"""Forecasting from a CSV file: windows by time, split by date, nothing of a window's future in its inputs or scales."""

from __future__ import annotations

import csv as csv_format
import datetime
import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.errors import DataError
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.regression import Regression


class Windows:
    """What came before, and what came: float32 (context, columns), float32 (2, horizon).

    The second part holds the values to be foretold, and in a second row last week's, to compare with. All are in units
    of the training part: zero is its mean, and one its standard deviation.
    """

    is_random = False

    def __init__(self, rows: Tensor, target: int, starts: range, context: int, horizon: int, digest: str) -> None:
        self.rows, self.target, self.starts = rows, target, starts
        self.context, self.horizon, self.digest = context, horizon, digest

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        now = self.starts[index]  # the first row that is not known yet
        past = self.rows[now - self.context : now]
        future = self.rows[now : now + self.horizon, self.target]
        return past, torch.stack((future, last_week(past[:, self.target], self.horizon)))

    def fingerprint(self) -> str:
        return f"{self.digest} {self.starts} {self.context} {self.horizon}"


def windows(split: str, *, csv: str, target: str, context: int, horizon: int, until: str) -> Windows:
    """The windows of a CSV file with a column `date`, one row a day.

    Args:
        split: `train`: all that the window foretells lies before the date `until`; `eval`: none of it does.
        csv: The file.
        target: The column to foretell.
        context: How many rows a model sees, seven or more.
        horizon: How many rows it foretells.
        until: The first date that is not trained on.
    """
    dates, columns, table = read(csv)
    if target not in columns:
        raise DataError(f"{csv} has no column {target!r}", where="data.args.target", remedy=f"it has: {columns}")
    cut = sum(date < datetime.date.fromisoformat(until) for date in dates)
    if context < 7 or cut < context + horizon or len(dates) - cut < horizon:
        raise DataError(
            f"{len(dates)} rows, {cut} of them before {until}, hold no windows of {context} + {horizon}",
            where="data.args",
            remedy="give a context of 7 or more, another date, or a longer file",
        )
    seen = table[:cut]  # what scales the values knows nothing of what comes after
    rows = torch.cat(((table - seen.mean(0)) / seen.std(0), calendar(dates)), dim=1).float()
    starts = range(cut, len(dates) - horizon + 1) if split == "eval" else range(context, cut - horizon + 1)
    digest = hashlib.sha256(Path(csv).read_bytes()).hexdigest()
    return Windows(rows, columns.index(target), starts, context, horizon, digest)


def calendar(dates: list[datetime.date]) -> Tensor:
    """What every date tells by itself: the weekday and the day of the year, as points on circles; (rows, 4)."""
    weekday = [2 * math.pi * date.weekday() / 7 for date in dates]
    day = [2 * math.pi * date.timetuple().tm_yday / 365.25 for date in dates]
    circles = [[math.cos(a), math.sin(a), math.cos(b), math.sin(b)] for a, b in zip(weekday, day, strict=True)]
    return torch.tensor(circles, dtype=torch.float64)


def read(path: str) -> tuple[list[datetime.date], list[str], Tensor]:
    """Dates, the names of the other columns, and their values, float64 (rows, columns)."""
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}", where="data.args.csv", remedy="python make_csv.py writes one")
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv_format.DictReader(file)
        columns = [name for name in lines.fieldnames or () if name != "date"]
        dates: list[datetime.date] = []
        values: list[list[float]] = []
        for line in lines:
            try:
                date, numbers = datetime.date.fromisoformat(line["date"]), [float(line[name]) for name in columns]
                if None in line or not all(map(math.isfinite, numbers)):
                    raise ValueError("it has other columns than the first line")
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"a row cannot be read: {error}", where=f"{path}:{lines.line_num}") from error
            if dates and date != dates[-1] + datetime.timedelta(days=1):
                raise DataError(
                    f"{date} follows {dates[-1]}", where=f"{path}:{lines.line_num}", remedy="give one row for each day"
                )
            dates.append(date)
            values.append(numbers)
    return dates, columns, torch.tensor(values, dtype=torch.float64)


class Recurrent(nn.Module):
    """A GRU over the days that are known foretells how the days to come differ from last week's.

    Args:
        columns: Of the table.
        width: Of the GRU.
        horizon: How many days are foretold.
        target: Which column is.
    """

    def __init__(self, *, columns: int, width: int, horizon: int, target: int = 0) -> None:
        super().__init__()
        self.gru = nn.GRU(columns, width, batch_first=True)
        self.head = nn.Linear(width, horizon)
        self.target, self.horizon = target, horizon

    def forward(self, past: Tensor) -> Tensor:  # (samples, context, columns) -> (samples, horizon)
        _, last = self.gru(past)
        return last_week(past[:, :, self.target], self.horizon) + self.head(last[0])


def last_week(values: Tensor, horizon: int) -> Tensor:
    """The last seven values again and again: (…, context) -> (…, horizon)."""
    week = values[..., -7:]
    return torch.cat([week] * -(-horizon // 7), dim=-1)[..., :horizon]


class Forecast(Regression):
    """Least squares; evaluations tell the error of guessing last week's values, too."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        past, future = batch.data
        batch = Batch((past, future[:, 0]), batch.weight, batch.num_valid, batch.indices)
        return super().loss(model, batch)

    def check(self, model: nn.Module, batch: Batch) -> None:
        past, future = batch.data
        super().check(model, Batch((past, future[:, 0]), batch.weight, batch.num_valid, batch.indices))

    def metrics(self) -> Any:
        return BesideLastWeek(super().metrics(), super().metrics())


class BesideLastWeek:
    """The metrics of a forecast, and the mean absolute error of last week's values beside them."""

    def __init__(self, ours: Any, theirs: Any) -> None:
        self.ours, self.theirs = ours, theirs

    def to(self, device: torch.device) -> None:
        self.ours.to(device), self.theirs.to(device)

    def update(self, result: LossSum, batch: Batch) -> None:
        self.ours.update(result, batch)
        self.theirs.update(result._replace(preds=batch.data[1][:, 1]), batch)

    def compute(self) -> dict[str, Any]:
        return {**self.ours.compute(), "mae_of_last_week": self.theirs.compute()["mae"]}
