"""Whether a phase of fine-tuning does what its plan says: what is frozen stays, what trains moves, ranks agree.

Freezing fails in silence: parameters that get no gradient after they were unfrozen, statistics that go on moving,
ranks that drift apart. So every phase is looked at after its first steps and at its end, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.dist import World
from bigtrain.errors import FreezeError
from bigtrain.finetune.digest import digest
from bigtrain.finetune.freeze import frozen_batchnorms
from bigtrain.state import BUFFER, EMA, WEIGHT, EngineState, whole

# A tensor whose gradient is zero in one step may have one in the next (an adapter's first matrix), so not after one.
_FIRST_LOOK, _SECOND_LOOK = 3, 30
_MOST_NAMED = 5
_NOT_SLOTS = (WEIGHT, BUFFER, EMA)


class _Told(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def is_last(self) -> bool: ...


@dataclass(frozen=True)
class Phase:
    """What a phase is, for the proof.

    Attributes:
        number: Counted from 0.
        trained: The parameters that train.
        moving: Those among them whose rate is not zero.
        begun: Those among them that began with this phase.
        first_step: The number of steps taken before it began, or before the run went on in it.
    """

    number: int
    trained: Collection[str]
    moving: Collection[str]
    begun: Collection[str]
    first_step: int


class PhaseProof:
    """Looks after a phase; a hook of the loop. Every rank must make it and make the same calls.

    Args:
        phase: What is to be proved.
        model: The plain module that the engine computes with.
        state: This rank's part of the training state.
        world: The ranks.
        tell: Told of each look, as a line of numbers and words.
    """

    def __init__(
        self,
        phase: Phase,
        model: nn.Module,
        state: Callable[[], EngineState],
        world: World,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._phase, self._model, self._state, self._world, self._tell = phase, model, state, world, tell
        self._norms = frozen_batchnorms(model)
        pieces = state().pieces
        persistent = {piece.name for piece in pieces if piece.kind == BUFFER}
        empty = {piece.name for piece in pieces if 0 in piece.shape}
        buffers = {f"{name}.{own}" for name, norm in self._norms.items() for own, _ in norm.named_buffers()}
        self._frozen = [(WEIGHT, name) for name, _ in model.named_parameters() if name not in phase.trained]
        self._frozen += [(BUFFER, name) for name in sorted(buffers & persistent)]
        self._before = self._digests()
        self._held_before = self._held()
        self._unmoved = set(phase.moving) - empty
        self._next_look: int | None = phase.first_step + _FIRST_LOOK

    @property
    def frozen_digest(self) -> str:
        """Of everything that is frozen, the same under every engine and number of ranks."""
        words = "".join(f"{kind} {name} {self._before[kind, name]}\n" for kind, name in self._frozen)
        return f"{xxhash.xxh3_64_intdigest(words.encode()):016x}"

    def as_kept(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, for whoever goes on in this phase."""
        names = "".join(f"{kind} {name}\n" for kind, name in self._frozen)
        of = f"{xxhash.xxh3_64_intdigest(names.encode()):016x}"
        return {"phase": self._phase.number, "of": of, "digest": self.frozen_digest}

    def check_kept(self, kept: Mapping[str, Any], path: Path) -> None:
        """Compare with what a checkpoint kept, which a fault between two looks may have got into.

        Args:
            kept: As `as_kept` gave it, when the phase began.
            path: The checkpoint.

        Raises:
            FreezeError: On every rank, where the same parameters are frozen and have other values.
        """
        ours = self.as_kept()
        if all(kept.get(key) == ours[key] for key in ("phase", "of")) and kept["digest"] != ours["digest"]:
            raise FreezeError(
                f"what is frozen in phase {self._phase.number} is not what it was when the phase began "
                f"({kept['digest']}): it had moved before this checkpoint was saved",
                where=str(path),
                remedy="take it out of the folder, so that the run goes on from one before it, or begin the run anew.\n"
                "What moves is changed by the model's own code or a hook",
            )

    def __call__(self, info: _Told) -> None:
        """Look, where it is time to. Every rank must call it after every step.

        Raises:
            FreezeError: On every rank, what was breached.
        """
        if info.step == self._next_look or info.is_last:
            steps = info.step - self._phase.first_step
            self._look(info.step, is_last=steps >= _SECOND_LOOK or (info.is_last and steps >= _FIRST_LOOK))

    def _look(self, step: int, *, is_last: bool) -> None:
        now = self._digests()
        moved = [name for key in self._frozen if now[key] != self._before[key] for name in key[1:]]
        self._raise_if("moved, and they are frozen", step, moved or self._moved_on_any_rank())
        without = self._without_gradient()
        still = {name for name in self._unmoved if now[WEIGHT, name] == self._before[WEIGHT, name]}
        self._unmoved = still | (self._unmoved & without)
        begun = set(self._phase.begun) & set(self._phase.moving)
        if self._unmoved and (is_last or (begun and begun <= self._unmoved)):
            steps = step - self._phase.first_step
            self._raise_if(
                f"got no gradient that moved them in {steps} steps, and they train", step, sorted(self._unmoved)
            )
        self._next_look = self._phase.first_step + _SECOND_LOOK if self._unmoved else None
        moved_now = len(self._phase.trained) - len(self._unmoved)
        ranks = f", {self._world.size} ranks agree" if self._world.size > 1 else ""
        unchanged = f"{len(self._frozen)} frozen ones are as they were ({self.frozen_digest})"
        self._tell(
            {
                "step": step,
                "event": "phase proved",
                "text": f"{self._phase.number}: {moved_now} tensors moved, {unchanged}{ranks}",
                "phase": self._phase.number,
                "moved": moved_now,
                "frozen": len(self._frozen),
                "frozen_digest": self.frozen_digest,
                "ranks": self._world.size,
            }
        )

    def _raise_if(self, what: str, step: int, names: Sequence[str]) -> None:
        if names:
            raise FreezeError(
                f"in phase {self._phase.number} these {what}: {_shown(names)}",
                where=f"step {step}",
                remedy="go on from a checkpoint before this step. What moves is changed by the model's own code or a\n"
                "hook; what does not move takes no part in the loss, or its rate is too small: then freeze it",
            )

    def _moved_on_any_rank(self) -> list[str]:
        """What a rank computes with and does not keep as state (DeepSpeed's copies), and BatchNorms that train."""
        held = self._held()
        names = [*held, *self._norms]
        wrong = [held[name] != self._held_before[name] for name in held]
        wrong += [norm.training for norm in self._norms.values()]
        return self._on_any_rank(torch.tensor(wrong), names)

    def _held(self) -> dict[str, int]:
        """The digest of this rank's part of each frozen parameter, as the module has it."""
        held = {}
        for name, p in self._model.named_parameters():
            if name not in self._phase.trained:
                part = getattr(p, "ds_tensor", p._local_tensor if isinstance(p, DTensor) else p)
                flat = part.detach().reshape(-1)
                held[name] = digest(flat, tuple(flat.shape), whole(flat.shape))
        return held

    def _digests(self) -> dict[tuple[str, str], int]:
        """The digest of each weight and buffer, put together from all ranks' parts.

        Raises:
            FreezeError: On every rank, where two of them hold different copies, or compute with what they do not hold.
        """
        pieces = [piece for piece in self._state().pieces if piece.kind in (WEIGHT, BUFFER)]
        keys = sorted({(WEIGHT, name) for name, _ in self._model.named_parameters()} | {p.key for p in pieces})
        place = {key: position for position, key in enumerate(keys)}
        owned, copies, holders = (torch.zeros(len(keys), dtype=torch.int64) for _ in range(3))
        for piece in pieces:
            value = digest(piece.data, piece.shape, piece.box)
            if piece.is_owner:
                owned[place[piece.key]] += value
            if piece.box == whole(piece.shape):
                copies[place[piece.key]], holders[place[piece.key]] = value, 1
        mine, has = copies.clone(), holders.clone()
        self._world.all_reduce(sums := torch.stack((owned, copies, holders)))
        differ = self._on_any_rank(has.bool() & (mine * sums[2] != sums[1]), [name for _, name in keys])
        if differ:
            raise FreezeError(
                f"ranks hold different copies of {_shown(differ)}",
                where=f"phase {self._phase.number}",
                remedy="go on from the last checkpoint; if it comes again, look at what the model or a hook changes",
            )
        return {key: int(value) for key, value in zip(keys, sums[0], strict=True)}

    def _without_gradient(self) -> set[str]:
        """Trained parameters whose moments are all zero, which weight decay alone may have moved."""
        slots = [
            p for p in self._state().pieces if p.kind not in _NOT_SLOTS and p.shape and p.name in self._phase.trained
        ]
        names = sorted(self._phase.trained)
        place = {name: position for position, name in enumerate(names)}
        kept, nonzero = torch.zeros(2, len(names), dtype=torch.int64)
        for piece in slots:
            kept[place[piece.name]] = 1
            nonzero[place[piece.name]] += int(piece.data.count_nonzero())
        self._world.all_reduce(sums := torch.stack((kept, nonzero)))
        return {name for name, (has, value) in zip(names, sums.T.tolist(), strict=True) if has and not value}

    def _on_any_rank(self, wrong: Tensor, names: Sequence[str]) -> list[str]:
        counts = self._world.all_reduce(wrong.to(torch.int64))
        return [name for name, count in zip(names, counts.tolist(), strict=True) if count]


def _shown(names: Sequence[str]) -> str:
    more = f" … ({len(names)} in all)" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
