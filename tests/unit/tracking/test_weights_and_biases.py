"""The real wandb: offline files read with its own protocol and sent with `wandb sync`; online against a stand-in
server that takes, refuses, hangs, drops, and has deleted runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigtrain.config.loader import from_dict
from bigtrain.tracking import wandb_files
from bigtrain.tracking.base import TrackedRun
from bigtrain.tracking.jsonl import MetricsFile
from bigtrain.tracking.making import make_trackers
from bigtrain.tracking.outside import Outside, Spec
from tests.helpers.wandb_server import WandbServer, wait_until

FACTORY = "bigtrain.tracking.weights_and_biases:WeightsAndBiases"
CONFIG = {"optim": {"lr": 1e-3, "groups": []}, "precision": "bf16"}


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        yield server


def value(step: int) -> float:
    """What any start computes in a step."""
    return 1 / (step + 1)


def train(
    folder: Path, steps: range, *, mode: str = "auto", engine: str = "fsdp", kill: bool = False, **args: Any
) -> list[str]:
    """One start: metrics.jsonl and W&B, a row for every step and an evaluation in every fifth; what was said."""
    folder.mkdir(exist_ok=True)
    said: list[str] = []
    run = TrackedRun(str(folder), folder.name, CONFIG, engine, 2, steps[0] - 1, os.getpid(), "bigtrain train x.yaml")
    file = MetricsFile(folder / "metrics.jsonl")
    outside = Outside([Spec("W&B", FACTORY, {"mode": mode, **args})], run, folder / "log", said.append)
    start = {"step": steps[0] - 1, "event": "start", "engine": engine, "world_size": 2, "precision": "bf16"}
    for tracker in (file, outside):
        tracker.log(start)
        for step in steps:
            tracker.log({"step": step, "epoch": 0, "loss": value(step), "lr": [1e-3, 1e-3], "time": time.time()})
            if step % 5 == 0:
                tracker.log({"step": step, "epoch": 0, "eval/accuracy": value(step)})
    if kill:  # as the kernel would: the helper sees its pipe end
        file.close()
        process = outside._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait(20)
        process.stdout.close()
        return said
    outside.close()
    file.close()
    return [line for line in said if not line.startswith("waiting for W&B")]  # on a machine that is slow, or a server


def news(said: list[str]) -> list[str]:
    """What was said, but that the end is waited for, as on a busy machine."""
    return [line for line in said if not line.startswith("waiting for ")]


def whole(last: int) -> list[tuple[int, float]]:
    return [(step, value(step)) for step in range(1, last + 1)]


def evaluations(last: int) -> list[tuple[int, float]]:
    return [pair for pair in whole(last) if pair[0] % 5 == 0]


def offline_rows(folder: Path) -> list[dict[str, Any]]:
    run_id = (folder / "wandb_id").read_text().strip()
    return [row for path in wandb_files.logs(folder, run_id) for row in wandb_files.history(path)]


def artifact_of(folder: Path) -> Any:
    """The one artifact in a run's files."""
    from wandb.proto import wandb_internal_pb2 as protocol

    (path,) = wandb_files.logs(folder, (folder / "wandb_id").read_text().strip())
    records = [protocol.Record.FromString(body) for body in wandb_files.records(path)]
    (artifact,) = [r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")] or [
        r.artifact for r in records if r.HasField("artifact")
    ]
    return artifact


# ------------------------------------------------------------------------------------------------------- offline


@pytest.mark.slow
def test_offline_a_kill_and_two_restarts_are_one_series_and_wandb_sync_sends_one_run(
    tmp_path: Path, logged_in: WandbServer
) -> None:
    """RELIABILITY H8: killed after steps that were logged and not saved."""
    folder = tmp_path / "of mine"
    train(folder, range(1, 18), mode="offline", kill=True)
    run_id = (folder / "wandb_id").read_text()
    train(folder, range(11, 24), mode="offline", engine="ddp", kill=True)
    said = train(folder, range(21, 31), mode="offline", engine="ddp")
    assert (folder / "wandb_id").read_text() == run_id
    rows = offline_rows(folder)
    assert [(int(row["train/step"]), float(row["train/loss"])) for row in rows if "train/loss" in row] == whole(30)
    assert [int(row["train/step"]) for row in rows if "eval/accuracy" in row] == [step for step, _ in evaluations(30)]
    assert logged_in.requests == 0

    (line,) = said
    *_, pattern = shlex.split(line.partition("to send them: ")[2])
    wandb = [sys.executable, "-m", "wandb", "sync"]
    sent = [str(path.absolute()) for path in Path().glob(pattern)]
    done = subprocess.run([*wandb, *sent], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    run = logged_in.run()
    assert run.name == run_id.strip()
    assert run.series("train/loss") == whole(30)
    assert run.series("eval/accuracy") == evaluations(30)
    assert run.config["optim.lr"]["value"] == 1e-3
    assert set(run.tags) == {"fsdp", "ddp", "world-2", "bf16"}


def test_steps_that_a_spike_undid_are_not_sent_twice_and_marked(tmp_path: Path, logged_in: WandbServer) -> None:
    folder = tmp_path / "it"
    folder.mkdir()
    run = TrackedRun(str(folder), "it", CONFIG, "fsdp", 2, 0, os.getpid(), "bigtrain train x.yaml")
    outside = Outside([Spec("W&B", FACTORY, {"mode": "online"})], run, folder / "log", lambda text: None)
    for step in range(1, 8):
        outside.log({"step": step, "epoch": 0, "loss": value(step), "lr": [1e-3]})
    outside.log({"step": 4, "event": "rollback", "text": "back to step 4", "time": time.time()})
    for step in range(5, 11):
        outside.log({"step": step, "epoch": 0, "loss": value(step), "lr": [1e-3]})
    outside.close()
    kept = logged_in.run()
    assert kept.series("train/loss") == whole(10)
    assert kept.series("train/rollbacks") == [(7, 1)]
    assert "rolled-back" in kept.tags


@pytest.mark.slow
def test_what_wandb_took_before_a_kill_but_metrics_did_not_is_not_sent_again(tmp_path: Path) -> None:
    """A last line of metrics.jsonl is lost with a kill; W&B had it already."""
    folder = tmp_path / "it"
    train(folder, range(1, 8), mode="offline", kill=True)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    train(folder, range(6, 12), mode="offline")
    rows = offline_rows(folder)
    assert [int(row["train/step"]) for row in rows if "train/loss" in row] == list(range(1, 12))


def test_two_starts_in_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    made: list[Path] = []
    while len(made) < 2 or made[-1].name != made[-2].name + "-1":
        assert len(made) < 40
        run = wandb.init(
            id="abcd1234", resume="allow", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off")
        )
        made.append(Path(run.dir).parent)
        run.finish()
    assert [path.parent for path in wandb_files.logs(tmp_path, "abcd1234")] == made


@pytest.mark.slow
def test_a_file_of_wandbs_that_is_torn_is_read_to_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    train(folder, range(1, 400), mode="offline")
    (path,) = wandb_files.logs(folder, (folder / "wandb_id").read_text().strip())
    whole_file = path.read_bytes()
    assert len(whole_file) > 3 * 32768  # several blocks
    path.write_bytes(whole_file[: len(whole_file) // 2])
    (last, _) = wandb_files.last_values([path], "train/step", "eval/step")
    assert 100 < last < 300
    train(folder, range(381, 400), mode="offline")
    rows = offline_rows(folder)
    assert [int(row["train/step"]) for row in rows if "train/loss" in row] == list(range(1, 400))


# -------------------------------------------------------------------------------------------------------- online


@pytest.mark.slow
def test_online_one_run_over_restarts_and_a_change_of_engine(tmp_path: Path, logged_in: WandbServer) -> None:
    folder = tmp_path / "it"
    said = train(folder, range(1, 18), tags=["mine"])
    assert news(said) == [f"W&B: {logged_in.url}/e/bigtrain/runs/{(folder / 'wandb_id').read_text().strip()}"]
    train(folder, range(11, 24), engine="ddp", kill=True)
    train(folder, range(21, 31), engine="ddp", tags=["mine"])
    run = logged_in.run()
    assert run.series("train/loss") == whole(30)
    assert run.series("eval/accuracy") == evaluations(30)
    assert set(run.tags) == {"mine", "fsdp", "ddp", "world-2", "bf16"}
    assert run.config["optim.lr"]["value"] == 1e-3
    assert run.config["engine"]["value"] == "ddp"


@pytest.mark.slow
def test_offline_first_and_online_later_is_one_run_and_nothing_is_left_to_send(
    tmp_path: Path, logged_in: WandbServer
) -> None:
    folder = tmp_path / "it"
    train(folder, range(1, 12), mode="offline")
    train(folder, range(11, 21))
    assert logged_in.run().series("train/loss") == whole(20)
    assert logged_in.run().series("eval/accuracy") == evaluations(20)
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "offline-run" not in done.stdout + done.stderr


def test_a_server_that_refuses_is_said_once_and_files_are_kept(tmp_path: Path, logged_in: WandbServer) -> None:
    logged_in.mood = "refuse"
    said = train(tmp_path / "it", range(1, 12))
    assert [line.partition("(")[0] for line in said] == [
        "warning: W&B cannot be reached ",
        said[1],
    ]
    assert "permission denied" in said[0]
    assert "wandb sync" in said[1]
    rows = offline_rows(tmp_path / "it")
    assert [int(row["train/step"]) for row in rows if "train/loss" in row] == list(range(1, 12))


@pytest.mark.slow
@pytest.mark.parametrize("mood", ["hang", "drop"])
def test_a_server_that_says_nothing_holds_nobody_up(tmp_path: Path, logged_in: WandbServer, mood: str) -> None:
    logged_in.mood = mood
    said = train(tmp_path / "it", range(1, 12), patience_s=3)
    assert said[0].startswith("warning: W&B cannot be reached")
    assert len(news(said)) == 2
    logged_in.mood = "ok"
    train(tmp_path / "it", range(11, 21))
    assert logged_in.run().series("train/loss") == whole(20)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["the trackers' process", "wandb's own"])
def test_where_a_process_was_killed_it_is_said_in_the_end_how_its_files_are_sent(tmp_path: Path, killed: str) -> None:
    values = {"model": "bigmodel", "task": "classification", "data": {"name": "digits", "batch_size": 4}}
    config = from_dict({**values, "train": {"steps": 100}, "track": {"wandb": "offline"}}).config
    said: list[str] = []
    trackers = make_trackers(config, tmp_path, tmp_path / "log", said.append, engine="single", world_size=1)
    outside = trackers._trackers[-1]
    assert isinstance(outside, Outside)
    assert outside._process is not None
    process = psutil.Process(outside._process.pid)
    row = {"epoch": 0, "loss": 0.5, "lr": [1e-3]}
    trackers.log({**row, "step": 1})
    wait_until(lambda: bool(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))), 30)
    (process if killed != "wandb's own" else process.children()[0]).kill()
    for step in range(2, 100):
        trackers.log({**row, "step": step})
        time.sleep(0.01)
    trackers.close()
    assert len(news(said)) == 2
    assert said[0].endswith("metrics.jsonl has every number")
    assert f"/*run-*-{(tmp_path / 'wandb_id').read_text().strip()}*" in said[1]


@pytest.mark.slow
def test_a_server_that_goes_away_in_the_middle_is_said_at_the_end(tmp_path: Path, logged_in: WandbServer) -> None:
    folder, said = tmp_path / "it", []
    folder.mkdir()
    run = TrackedRun(str(folder), "it", CONFIG, "fsdp", 2, 0, os.getpid(), "")
    file = MetricsFile(folder / "metrics.jsonl")
    outside = Outside([Spec("W&B", FACTORY, {"patience_s": 6})], run, folder / "log", said.append)
    longest = 0.0
    for step in range(1, 301):
        began = time.perf_counter()
        for tracker in (file, outside):
            tracker.log({"step": step, "epoch": 0, "loss": value(step), "lr": [1e-3]})
        longest = max(longest, time.perf_counter() - began)
        if said:
            logged_in.mood = "hang"
        time.sleep(0.01)
    outside.close()
    file.close()
    assert longest < 0.5
    assert len([line for line in said if line.startswith("warning: W&B did not take everything")]) == 1
    assert "wandb sync" in said[-1]
    logged_in.mood = "ok"
    train(folder, range(301, 311))
    assert logged_in.run().series("train/loss") == whole(310)


@pytest.mark.slow
def test_a_run_that_was_deleted_there_is_made_anew(tmp_path: Path, logged_in: WandbServer) -> None:
    folder = tmp_path / "it"
    train(folder, range(1, 12))
    old = (folder / "wandb_id").read_text().strip()
    del logged_in.runs[old]
    logged_in.deleted.add(old)
    said = train(folder, range(11, 21), patience_s=5)
    fresh = (folder / "wandb_id").read_text().strip()
    assert fresh != old
    assert f"W&B: the run {old} was deleted there; it is made anew as {fresh}" in said
    assert logged_in.run().series("train/loss") == whole(20)


def test_checkpoints_are_references(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard").write_bytes(b"0" * 1000)
    run = TrackedRun(str(folder), "it", CONFIG, "fsdp", 2, 0, os.getpid(), "")
    said: list[str] = []
    outside = Outside([Spec("W&B", FACTORY, {"mode": "offline"})], run, folder / "log", said.append)
    outside.log({"step": 5, "event": "checkpoint", "path": str(checkpoint), "bytes": 1000, "seconds": 0.1})
    outside.close()
    assert "warning" not in " ".join(said)
    (entry,) = artifact_of(folder).manifest.contents
    assert entry.ref == (checkpoint / "shard").as_uri()
    assert not [p for p in (folder / "wandb").rglob("*") if p.is_file() and p.stat().st_size == 1000]


def test_checkpoints_are_uploaded_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, what `wandb sync` uploads later: copies, since the checkpoint may have been removed by then."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "of wandb"))
    folder = tmp_path / "it"
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard").write_bytes(b"0" * 1000)
    run = TrackedRun(str(folder), "it", CONFIG, "fsdp", 2, 0, os.getpid(), "")
    args = {"mode": "offline", "upload_checkpoints": True}
    outside = Outside([Spec("W&B", FACTORY, args)], run, folder / "log", lambda text: None)
    outside.log({"step": 5, "event": "checkpoint", "path": str(checkpoint), "bytes": 1000, "seconds": 0.1})
    outside.close()
    shutil.rmtree(checkpoint)
    artifact = artifact_of(folder)
    (entry,) = artifact.manifest.contents
    assert (list(artifact.aliases).count("step-5"), entry.path, entry.ref) == (1, "shard", "")
    assert Path(entry.local_path).is_relative_to(tmp_path)
    assert Path(entry.local_path).read_bytes() == b"0" * 1000


@pytest.mark.parametrize("is_refused", [False, True])
def test_online_a_checkpoint_is_told_and_where_it_is_refused_the_curves_go_on(
    tmp_path: Path, logged_in: WandbServer, is_refused: bool
) -> None:
    logged_in.refused = {"Viewer"} if is_refused else set()
    folder = tmp_path / "it"
    run = TrackedRun(str(folder), "it", CONFIG, "fsdp", 2, 0, os.getpid(), "")
    paths = [folder / "checkpoints" / f"step-0000000{step}" for step in (3, 6)]
    said: list[str] = []
    for path in paths:
        path.mkdir(parents=True)
        (path / "shard").write_text(path.name)
    outside = Outside([Spec("W&B", FACTORY, {"mode": "online"})], run, folder / "log", said.append)
    for step in range(1, 10):
        outside.log({"step": step, "epoch": 0, "loss": value(step)})
        if step in (3, 6):
            outside.log({"step": step, "event": "checkpoint", "path": str(paths[step // 3 - 1])})
    outside.close()
    assert logged_in.run().series("train/loss") == whole(9)
    assert len(logged_in.run().artifacts) == (0 if is_refused else 2)
    assert len([line for line in said if line.startswith("warning: W&B did not take a checkpoint")]) == is_refused
    assert len(news(said)) == 1 + is_refused  # and where the run is to be seen


def test_a_checkpoint_that_is_gone_again_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    gone, there = (folder / "checkpoints" / f"step-0000000{step}" for step in (5, 6))
    there.mkdir(parents=True)
    (there / "shard").write_bytes(b"0" * 1000)
    run = TrackedRun(str(folder), "it", CONFIG, "fsdp", 2, 0, os.getpid(), "")
    said: list[str] = []
    outside = Outside([Spec("W&B", FACTORY, {"mode": "offline"})], run, folder / "log", said.append)
    for path in (gone, there):
        outside.log({"step": 5, "event": "checkpoint", "path": str(path), "bytes": 1000, "seconds": 0.1})
    outside.close()
    assert "warning" not in " ".join(said)
    (path,) = wandb_files.logs(folder, (folder / "wandb_id").read_text().strip())
    assert there.as_uri().encode() in path.read_bytes()
    assert gone.as_uri().encode() not in path.read_bytes()


# -------------------------------------------------------------------------------------------------------- login


def test_auto_is_online_where_a_login_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_files.is_online("auto")
    (tmp_path / "netrc").write_text("machine other.example.org login user password x\n")
    assert not wandb_files.is_online("auto")
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password x\n")
    assert wandb_files.is_online("auto")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not wandb_files.is_online("auto")
    assert wandb_files.is_online("online")
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_files.is_online("auto")
