"""A run over its phases: wherever what is trainable changes, model and engine are built anew, and the run goes on.

A change of phase is a resume. The state is on the disk, the old engine lets go of everything, the new one is built as
if the run had just been started there, and loads: one mechanism for every engine, as the state knows none.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.checkpoint import Ranks, find
from bigtrain.config import combinations
from bigtrain.config.schema import Config
from bigtrain.dist import World
from bigtrain.errors import CheckpointError
from bigtrain.features import Cached, use_features
from bigtrain.finetune.proof import Phase, PhaseProof
from bigtrain.health.spikes import Spike
from bigtrain.pretrained import LoadReport, start_from
from bigtrain.progress import Outcome
from bigtrain.resuming import OtherPhaseError, Resumed, phase_of, resume
from bigtrain.trainer import Subject, Training, assemble


class Phases:
    """The training of a run as it is built for the phase that the run is in. Every rank must make the same calls.

    Args:
        config: The run file.
        world: This rank's place.
        subject: What the user brings as objects.
        folder: Where the run's checkpoints lie, or will.
        adapt: Called once, with the first plain model that is built.

    Attributes:
        training: As it is built now.
        resumed: Where it goes on from; None at the beginning of a run.
        started: What became of the pretrained weights that it began with; None where there were none.
    """

    started: LoadReport | None = None
    _cached: Cached | None = None
    resumed: Resumed | None = None

    def __init__(
        self, config: Config, world: World, subject: Subject, folder: Path, adapt: Callable[[nn.Module], object]
    ) -> None:
        combinations.refuse(combinations.of_saving(config))
        combinations.refuse(combinations.of_weights(config))
        combinations.refuse(combinations.of_adapter(config))
        combinations.refuse(combinations.of_features(config))
        self._config, self._world, self._subject, self._folder = config, world, subject, folder
        self._adapt: Callable[[nn.Module], object] | None = adapt
        self._is_closed = True
        self._build(resumes=config.checkpoint.resume == "auto")

    def next(self) -> None:
        """Build the next phase, which begins where the newest checkpoint ends."""
        self._forget()
        self._build(resumes=True)

    def roll_back(self, spike: Spike) -> None:
        """Build the training anew as it was before a spike, to go on with the data after it.

        It goes on from the newest checkpoint, or from the beginning where there is none: no checkpoint is ever saved
        of a spike or what follows it.
        """
        self._forget()
        self._build(resumes=True)
        done = self.resumed.outcome if self.resumed else Outcome()
        done.position = spike.end
        was = self.resumed
        self.resumed = Resumed(done, was.path if was else self._folder, [], was.frozen if was else {})
        self.training.go_on_from(done)

    @property
    def words(self) -> list[str]:
        """What there is to say of where the run begins or goes on."""
        begun = self.started.lines() if self.started else []
        cached = self._cached.words if self._cached else []
        return [*(self.resumed.words if self.resumed else begun), *cached]

    def close(self) -> None:
        """Let go of the training."""
        if not self._is_closed:
            self._is_closed = True
            self.training.close()

    def _build(self, *, resumes: bool) -> None:
        self.resumed = None
        phase = self._expected() if resumes else 0
        while True:
            built = assemble(self._config, self._world, self._subject, adapt=self._adapt, phase=phase)
            self.training: Training = built
            self._adapt = None
            self._is_closed = False
            try:
                if resumes:
                    self.resumed = resume(self.training, self._folder)
                break
            except OtherPhaseError as other:  # the newest checkpoint is damaged, and the one before of an earlier phase
                phase = other.phase
                self._forget()
            except BaseException:
                self.close()
                raise
        if self.resumed:
            self.training.go_on_from(self.resumed.outcome)
        elif self._config.begins_with:
            self._start()
        try:
            self._cached = use_features(self.training)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        """Begin from pretrained weights: at the very beginning alone, so that a start again needs no other run file."""
        try:
            self.started = start_from(self.training)
        except BaseException:
            self.close()
            raise

    def _forget(self) -> None:
        self.close()
        del self.training
        gc.collect()
        torch.compiler.reset()  # graphs of a model that is gone, which would count against the limit of the next one

    def _expected(self) -> int:
        """The phase of the newest checkpoint, as far as it can be told without reading all of it."""
        if not self._config.finetune.unfreeze:
            return 0
        phase = 0
        if self._world.is_main:
            with suppress(CheckpointError, OSError, IndexError):
                phase = phase_of(find(self._folder)[0], self._config)
        expected: int = Ranks(self._world).broadcast(phase)
        return expected


def begin_proof(
    training: Training, resumed: Resumed | None, tell: Callable[[Mapping[str, Any]], None]
) -> PhaseProof | None:
    """Tell which phase begins, or goes on, and have it looked after; None where there is no freeze plan.

    Every rank must call it.

    Raises:
        FreezeError: On every rank, where what is frozen is not what it was when the phase began.
    """
    step = resumed.outcome.steps if resumed else 0
    freezing, phase = training.freezing, training.phase
    if not freezing.is_active:
        return None
    trained = {name: group.hyper["lr"] for group in training.plan.groups for name in group.names}
    begun = [name for name, first in freezing.begins().items() if first == phase]
    proof = PhaseProof(
        Phase(phase, trained.keys(), {name for name, lr in trained.items() if lr}, begun, step),
        training.model,
        training.engine.state,
        training.world,
        tell,
    )
    if resumed:
        proof.check_kept(resumed.frozen, resumed.path)
    training.frozen = proof.as_kept()
    num_trained = sum(numel for numel, trains in training.sizes if trains)
    parameters, begun_by = sum(numel for numel, _ in training.sizes), _begun_by(training.config, phase)
    text = f"{phase}: {num_trained:,} of {parameters:,} parameters train"
    tell(
        {
            "step": step,
            "event": "phase",
            "text": f"{text}, from now on {', '.join(begun_by)}" if begun_by else text,
            "phase": phase,
            "trained": num_trained,
            "parameters": parameters,
            "begun": begun_by,
            "frozen_digest": proof.frozen_digest,
        }
    )
    return proof


def _begun_by(config: Config, phase: int) -> Sequence[str]:
    """The patterns that began a phase."""
    moments = [(entry.at_epoch, entry.at_step) for entry in config.finetune.unfreeze]
    of_phase = list(dict.fromkeys(moments))[phase - 1 : phase] if phase else []
    return [
        pattern
        for entry, moment in zip(config.finetune.unfreeze, moments, strict=True)
        if moment in of_phase
        for pattern in entry.match
    ]
