"""What looks closer at a training where its run file asks for it: profiles, histograms of weights, the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bigtrain.config.schema import Config, TensorBoard
from bigtrain.progress import Hook, StepInfo
from bigtrain.tracking.communication import Communication
from bigtrain.tracking.graph import GraphRecorder, write_graph
from bigtrain.tracking.histograms import histograms
from bigtrain.tracking.profiling import Profiler, name_parts
from bigtrain.trainer import Training

Tell = Callable[[Mapping[str, Any]], None]


class Watching:
    """Hooks into the loop of one training. Every rank makes it, and calls the same.

    Args:
        training: What trains; where a profile is asked for, the parts of its steps get names.
        folder: The run folder.
        tell: Told of rows, on rank 0.
        done: The step that this start goes on from.
    """

    def __init__(self, training: Training, folder: Path, tell: Tell, done: int) -> None:
        self._training, self._tell = training, tell
        self._profiler: Profiler | None = None
        self.hooks: list[Hook] = []
        asked = training.config.profile
        if asked is not None:
            name_parts(training.engine, training.task)
            self._profiler = profiler = Profiler(folder, training.world, asked.steps[0], asked.steps[1], tell)
            profiler.at(done)
            self.hooks.append(Hook(lambda info: profiler.at(info.step)))
        self._communication: Communication | None = None
        between = training.config.track.communication_every
        if between is not None and training.world.size > 1 and training.world.is_main:
            self._communication = Communication(training.world, between, asked.steps if asked else ())
            self.hooks.append(Hook(self._measure))
        every = histograms_every(training.config)
        if every is not None:
            self.hooks.append(Hook(lambda info: self._count(info.step), every=every))

    def _count(self, step: int) -> None:
        found = histograms(self._training.engine.state().pieces, self._training.world)
        self._tell({"step": step, "histograms": found})

    def _measure(self, info: StepInfo) -> None:
        seconds = self._communication.at(info.step) if self._communication else None
        if seconds is not None:
            info.numbers["communication_s"] = seconds

    def close(self) -> None:
        """Write what there is of a profile."""
        if self._communication is not None:
            self._communication.close()
        if self._profiler is not None:
            self._profiler.close()


def histograms_every(config: Config) -> int | None:
    """The steps between two histograms of the weights; None where there are none."""
    board = config.track.tensorboard
    return board.histograms_every if isinstance(board, TensorBoard) else None


class Graph:
    """The graph of the model, where it is asked for: seen while the model is tried out, before anything is wrapped.

    Args:
        config: The run file.
    """

    def __init__(self, config: Config) -> None:
        board = config.track.tensorboard
        self._is_wanted = isinstance(board, TensorBoard) and board.graph
        self._recorder: GraphRecorder | None = None

    def see(self, model: nn.Module) -> None:
        """Watch the plain model's next forward pass."""
        if self._is_wanted:
            self._recorder = GraphRecorder(model)

    def keep(self, folder: Path, say: Callable[[str], None], *, is_main: bool) -> None:
        """Watch no more, and on rank 0 write what was seen."""
        if self._recorder is None:
            return
        self._recorder.close()
        if is_main and not write_graph(self._recorder, folder):
            say("no graph of the model: its task does not try it out before the first step (it has no check())")
