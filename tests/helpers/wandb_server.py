"""A local stand-in for W&B's server: takes runs, or refuses, hangs, drops connections, says that a run was deleted."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class KeptRun:
    """What the server has of a run."""

    name: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    artifacts: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str, axis: str = "train/step") -> list[tuple[int, Any]]:
        return [(row[axis], row[key]) for row in self.history if key in row]


class WandbServer:
    """Serves on a port of its own.

    Attributes:
        mood: ok, refuse (403), hang, drop (closes the connection), or deleted (runs of known names are gone).
        runs: By id.
        refused: Names of queries that are refused whatever the mood.
        requests: How many came.
    """

    def __init__(self, mood: str = "ok") -> None:
        self.mood = mood
        self.runs: dict[str, KeptRun] = {}
        self.deleted: set[str] = set()
        self.refused: set[str] = set()
        self.requests = 0
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"kept": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign] # clients that were ended
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> WandbServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def run(self) -> KeptRun:
        (run,) = self.runs.values()
        return run

    # ------------------------------------------------------------------------------------------------ GraphQL

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s*(\w+)", query)
        call = getattr(self, f"on_{found[1]}", None) if found else None
        return {"data": call(variables) if call else {}}

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None
        if run is not None:
            last = json.dumps(run.history[-1]) if run.history else None
            bucket = {
                "id": run.name,
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.name,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": 0,
                "historyTail": json.dumps([last] if last else []),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": run.tags,
                "notes": "",
                "wandbConfig": '{"t": 1}',  # what says that a run has begun
            }
        return {
            "model": {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "e"}, "bucket": bucket}
        }

    def on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"] or variables["id"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, KeptRun(name, variables["project"] or ""))
        if variables.get("config"):
            run.config.update(json.loads(variables["config"]))
        if variables.get("tags") is not None:
            run.tags = variables["tags"]
        bucket = {
            "id": name,
            "name": name,
            "displayName": variables.get("displayName") or name,
            "description": "",
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": {"id": "p", "name": run.project, "entity": {"id": "e", "name": "e"}},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/{variables['run']}/{f}"} for f in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "v", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}}

    def on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        for run in self.runs.values():
            run.artifacts.append(variables)
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    # --------------------------------------------------------------------------------------------- file stream

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        run = self.runs[name]
        files = sent.get("files") or {}
        if "wandb-history.jsonl" in files:
            part = files["wandb-history.jsonl"]
            lines = [json.loads(line) for line in part["content"]]
            run.history[part["offset"] :] = lines  # as W&B's server: what stood there is overwritten
        if "wandb-summary.json" in files:
            run.summary = json.loads(files["wandb-summary.json"]["content"][-1])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    kept: WandbServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        server = self.kept
        server.requests += 1
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if server.mood == "hang":
            server.stopping.wait(120)
            self.close_connection = True
            return
        if server.mood == "drop":
            self.close_connection = True
            return
        if server.mood == "refuse":
            self._send(403, {"errors": [{"message": "permission denied"}]})
            return
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self._take(body)

    def _take(self, body: bytes) -> None:
        server = self.kept
        if self.path == "/graphql":
            sent = json.loads(body)
            variables = sent.get("variables") or {}
            if "UpsertBucket" in sent["query"] and variables.get("name") in server.deleted:
                text = f"run {variables['name']} was previously created and deleted; try a new run name"
                self._send(409, {"errors": [{"message": text}]})
                return
            if any(name in sent["query"] for name in server.refused):
                self._send(403, {"errors": [{"message": "permission denied"}]})
                return
            self._send(200, server.answer(sent["query"], variables))
            return
        if found := re.fullmatch(r"/files/[^/]*/[^/]*/([^/]+)/file_stream", self.path):
            server.stream(found[1], json.loads(body))
        elif found := re.fullmatch(r"/upload/([^/]+)/(.+)", self.path):
            server.runs[found[1]].files.add(found[2])
        self._send(200, {})

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for something another process does."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
