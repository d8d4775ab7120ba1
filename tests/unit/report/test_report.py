"""The report: what it says of runs in every state, and that nothing in it can run or reach elsewhere."""

from __future__ import annotations

import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bigtrain import lease
from bigtrain.failures import write_error
from bigtrain.report import report, write_report
from bigtrain.report.charts import Chart, Line
from bigtrain.report.comparison import compare
from bigtrain.report.words import num_bytes, number, seconds, short
from bigtrain.tracking.reading import load_run
from tests.helpers.run_folders import make_run

# https://html.spec.whatwg.org/#void-elements
VOID = {"br", "img", "meta", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that every element that is opened is closed, and keeps text and elements."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.text += data + "\n"

    def count(self, tag: str, css: str = "") -> int:
        return sum(name == tag and css in (held.get("class") or "").split(" ") for name, held in self.elements)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


def test_everything_of_a_finished_run_is_there(folder: Path) -> None:
    page = Page(report(load_run(folder)))
    for words in ("digits", "finished", "2 restarts", "Confusion matrix", "Sample predictions", "Run file", "optim.lr"):
        assert words in page.text
    titles = re.findall(r"<figcaption><b>(.*?)</b>", report(load_run(folder)))
    expected = ["loss", "accuracy", "learning rate", "gradient norm", "samples per second", "peak memory"]
    assert titles == [*expected, "time of a step"]
    assert page.count("figure", "chart") == 7
    assert "went on from step 700" in page.text
    assert "start 1, going on from step 700: fsdp, 2 processes" in page.text
    assert "taken for" in str(page.elements)
    assert page.count("td", "strong") == 10
    assert page.count("img") == 1


def test_the_spike_is_drawn(folder: Path) -> None:
    """It is higher than all else, so its point is the highest of the loss."""
    chart = report(load_run(folder)).split("<figure")[1]
    points = re.findall(r"[ML]([\d.]+) (-?[\d.]+)", chart.partition('class="columns"')[0].partition("faint")[2])
    x, y = min(points, key=lambda point: float(point[1]))
    assert float(y) < 60
    assert float(x) == pytest.approx(500, abs=1)  # step 1000 of 2000


def test_communication_and_numbers_of_ones_own_are_drawn(tmp_path: Path) -> None:
    made = make_run(tmp_path / "it", steps=200)
    with (made / "metrics.jsonl").open("a") as file:
        for step in (201, 202):
            numbers = {"loss": 0.1, "compute_s": 0.028, "communication_s": 0.011, "mine/entropy": 0.7 * step}
            file.write(json.dumps({"step": step, **numbers}) + "\n")
    page = Page(report(load_run(made)))
    assert "communication alone, of compute" in page.text
    assert "11 ms" in page.text
    assert "mine/entropy" in page.text


def test_training_time_leaves_out_what_lies_between_starts(folder: Path) -> None:
    assert "1 min 00 s" in Page(report(load_run(folder))).text


def test_nothing_comes_from_elsewhere_and_nothing_runs(folder: Path) -> None:
    text = report(load_run(folder))
    page = Page(text)
    assert page.count("script") == 0
    assert not re.findall(r"(?:src=|href=|url\()\s*[\"']?(?!data:image/png)[a-z]+:", text)
    assert not [name for _, held in page.elements for name in held if name.startswith("on")]
    policy = [held["content"] for tag, held in page.elements if held.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


def test_names_and_texts_of_any_kind_stay_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "hostile", steps=100)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, f"eval/{HOSTILE}": 1.0}) + "\n")
        file.write(json.dumps({"step": 100, "event": "warning", "text": HOSTILE}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({"run": {"name": HOSTILE}, HOSTILE: HOSTILE}))
    held = [{"image": HOSTILE, "prediction": HOSTILE}, {"text": HOSTILE, "target": HOSTILE, "prediction": HOSTILE}]
    (folder / "samples.json").write_text(json.dumps(held))
    (folder / "repro" / "machine.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (folder / "repro" / "diff.patch").write_text(HOSTILE)
    page = Page(report(load_run(folder)))
    assert (page.count("script"), page.count("img")) == (0, 0)
    assert page.text.count(HOSTILE) >= 9
    other = make_run(tmp_path / "other", steps=100)
    assert Page(compare([load_run(folder), load_run(other)]).html()).count("script") == 0


@pytest.mark.parametrize("held", ["config.yaml", "metrics.jsonl", "attempts"])
def test_a_folder_that_is_half_there_has_a_report(tmp_path: Path, held: str) -> None:
    (tmp_path / held).mkdir() if held == "attempts" else (tmp_path / held).touch()
    page = Page(write_report(tmp_path).read_text())
    assert "nothing has been logged yet" in page.text
    assert "there is no " in page.text


_BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(12))
_DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.yaml", "task: &t {name: *t}\n", "config.yaml is damaged"),
        ("config.yaml", _BOMB, "config.yaml is damaged"),
        ("result.json", _DEEP, "result.json cannot be read"),
        ("result.json", '{"steps": 1, "metrics": 3}', "metrics in result.json is damaged and left out"),
        ("result.json", '{"world_size": "two"}', "world_size in result.json is damaged and left out"),
        ("result.json", '{"class_names": 5}', "class_names in result.json is damaged and left out"),
        ("result.json", '{"best": {"value": "x"}}', "best in result.json is damaged and left out"),
        (
            "result.json",
            '{"metrics": {"accuracy": 0.5, "confusion_matrix": [[1, 2], [3]]}}',
            "metrics.confusion_matrix in result.json is damaged and left out",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": 1.0, "time": "x"}\n', "1 line of metrics.jsonl is damaged and left out"),
        ("metrics.jsonl", '{"step": 1, "event": 5}\n', "1 line of metrics.jsonl is damaged and left out"),
        ("metrics.jsonl", f'{{"step": 1, "loss": {_DEEP}}}\n', "1 line of metrics.jsonl is damaged and left out"),
        ("samples.json", '[1, {"text": "a sample"}, null]', "a sample"),
        ("attempts/0/errors/rank-00000.json", '{"rank": "x"}', "broken off"),
    ],
)
def test_what_is_damaged_is_left_out_and_said(tmp_path: Path, name: str, text: str, problem: str) -> None:
    folder = make_run(tmp_path / "it", steps=100, done=name != "attempts/0/errors/rank-00000.json")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    os.utime(folder / "metrics.jsonl", (0, 0))
    with (folder / name).open("a" if name == "metrics.jsonl" else "w") as file:
        file.write(text)
    run = load_run(folder)
    page = Page(write_report(run).read_text())
    assert problem in page.text
    assert "training loss" in page.text
    compare([run, run]).html()


def test_states(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "it", steps=100, done=False)
    assert Page(report(load_run(folder))).count("span", "running") == 1
    long_ago = time.time() - 1000
    os.utime(folder / "metrics.jsonl", (long_ago, long_ago))
    assert Page(report(load_run(folder))).count("span", "broken") == 1
    lease.take(folder, 0)  # this process stands for it, however seldom it logs
    assert Page(report(load_run(folder))).count("span", "running") == 1
    os.utime(folder / "metrics.jsonl")
    lease.drop(folder, 0)
    assert Page(report(load_run(folder))).count("span", "broken") == 1
    attempt = folder / "attempts" / "0"
    attempt.mkdir(parents=True)
    write_error(attempt, 1, 99, ValueError("the <b>cause</b>"))
    page = Page(report(load_run(folder)))
    assert page.count("span", "failed") == 1
    assert "rank 1, after step 99: ValueError: the <b>cause</b>" in page.text


def test_values_that_are_not_finite_break_the_line_and_are_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "it", steps=100)
    (folder / "repro" / "diff.patch").unlink()  # what this repository's own files say today is in the report, too
    rows = [json.dumps({"step": 101 + i, "loss": "nan" if i < 3 else 0.5, "lr": [1]}) for i in range(6)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(rows) + "\n")
    text = report(load_run(folder))
    assert "3 values of loss not finite" in text
    assert "NaN" not in text
    assert 'd="nan' not in text


def test_many_classes_are_a_list_of_what_is_confused_most(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "it", steps=100)
    matrix = [[100 if row == column else 0 for column in range(200)] for row in range(200)]
    matrix[17][23], matrix[5][6] = 50, 9
    (folder / "result.json").write_text(json.dumps({"metrics": {"confusion_matrix": matrix}}))
    text = report(load_run(folder))
    cells = re.findall(r"<tr><td>(\d+)</td><td>(\d+)</td><td class=\"n\">(\d+)</td>", text)
    assert cells == [("17", "23", "50"), ("5", "6", "9")]


@pytest.mark.slow
def test_a_hundred_thousand_steps_take_seconds_and_little_room(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", steps=100_000)
    began = time.process_time()  # others may be at work on this machine
    path = write_report(folder)
    assert time.process_time() - began < 5
    assert path.stat().st_size < 3_000_000


def test_comparing_shows_differences_first_and_marks_the_best(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "it", steps=100)
    second = make_run(tmp_path / "b" / "it", "optim.lr=0.5", "engine.name=ddp", steps=200, seed=1)
    compared = compare([load_run(first), load_run(second)])
    rows = {row.name: row.cells for row in compared.differences()}
    assert rows == {"optim.lr": ("0.002", "0.5"), "engine.name": ("fsdp", "ddp")}
    measures = {row.name: row for row in compared.measures()}
    assert measures["steps"].cells == ("100", "200")
    assert measures["training time"].best == 0
    assert compared.names == (str(first), str(second))  # both are called it
    page = Page(compared.html())
    assert page.text.index("Where the run files differ") < page.text.index("Metrics") < page.text.index("Curves")
    assert page.count("figure", "chart") >= 4


def test_what_later_starts_ran_with_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "it", steps=100)
    first = json.loads((folder / "repro/machine.json").read_text())
    packages = (folder / "repro/packages.txt").read_text()
    for attempt, commit in ((1, "0ddc0de"), (10, "c0ffee")):
        later = folder / f"repro/attempt-{attempt}"
        later.mkdir()
        (later / "machine.json").write_text(json.dumps({**first, "commit": commit}))
    (later / "packages.txt").write_text(packages + "another==1.2.3\n")
    (later / "diff.patch").write_text("+ what was added")
    text = Page(report(load_run(folder))).text
    assert re.search(r"start 1: commit\s+0ddc0de\s+start 10: commit\s+c0ffee", text)
    assert re.search(r"start 10: changes that were not committed\s+\+ what was added", text)
    assert re.search(r"start 10: packages that were others\s+another==1.2.3\s", text)


def test_how_much_was_measured_is_no_score(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "it", steps=100)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step":100,"eval/loss":0.5,"eval/perplexity":1.6,"eval/tokens":3072}\n')
    run = load_run(folder)
    assert run.metrics.last()["eval/tokens"] == 3072
    assert number(3072) not in Page(report(run)).text  # the page has the changes of the code: not spelt out here
    assert not any("eval/tokens" in row.name for row in compare([run, run]).measures())


def test_numbers_as_people_read_them() -> None:
    assert [number(v) for v in (0.0, 12, 0.98765, 1234.5, 1e-7, float("nan"))] == [
        *("0", "12", "0.9877", "1,234", "1.00e-07", "nan"),
    ]
    assert [short(v) for v in (0, 1500, 2e6, 0.001, 2e-5)] == ["0", "1.5k", "2M", "0.001", "2.0e-5"]
    assert [num_bytes(v) for v in (999, 41.2e6, 1.2e9)] == ["999 B", "41.2 MB", "1.2 GB"]
    assert [seconds(v) for v in (0.0031, 2.5, 75, 3700, 100_000)] == [
        *("3.1 ms", "2.5 s", "1 min 15 s", "1 h 01 min", "1 d 3 h"),
    ]


def test_what_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "it", steps=100)
    (folder / "metrics.jsonl").write_text(
        '{"step":10,"eval/loss":"nan","eval/accuracy":"nan","eval/r2":"nan"}\n'
        '{"step":20,"eval/loss":0.5,"eval/accuracy":0.75,"eval/r2":"-inf","loss":1.0,"samples_per_s":"inf"}\n'
        '{"step":30,"eval/loss":"inf","eval/accuracy":0.25,"eval/r2":"nan","loss":1.0,"samples_per_s":"inf"}\n'
    )
    text = Page(report(load_run(folder))).text
    assert "best 0.5 at step 20" in text
    assert "best 0.75 at step 20" in text
    assert not any(f"best {word}" in text for word in ("nan", "inf", "-inf"))
    assert "2 values of eval/loss not finite" in text


def test_a_line_of_one_point_is_a_dot() -> None:
    one, two = (Line("loss", np.arange(count) + 1.0, np.ones(count)) for count in (1, 2))
    assert 'class="dots' in Chart("loss", [one]).html()
    assert 'class="dots' not in Chart("loss", [two]).html()
