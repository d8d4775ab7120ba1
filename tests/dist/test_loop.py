"""What ranks must do together: stop at the same step, whatever one of them alone has seen."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigtrain import engines
from bigtrain.config import schema
from bigtrain.dist import World, join
from bigtrain.engines import Choices, Engine
from bigtrain.errors import NonFiniteError
from bigtrain.loop import Loop
from bigtrain.progress import Cadence, Hook, StepInfo
from bigtrain.optim import plan_optimizer
from bigtrain.protocols import Batch, LossSum
from bigtrain.tasks.regression import Regression
from tests.helpers.distributed import run_distributed

SAMPLES_A_RANK = 3


class StepData(NamedTuple):
    microbatches: list[Batch]
    epoch: int = 0
    num_samples: int = 2 * SAMPLES_A_RANK
    end: tuple[int, int] = (0, 0)


def my_steps(rank: int, spoiled: int | None) -> Iterator[StepData]:
    """Samples of this rank, numbered 100 a step; in one step the last of rank 1 is not finite."""
    step = 0
    while True:
        generator = torch.Generator().manual_seed(10 * step + rank)
        inputs = torch.randn(SAMPLES_A_RANK, 4, generator=generator)
        targets = torch.randn(SAMPLES_A_RANK, 1, generator=generator)
        if step == spoiled and rank == 1:
            targets[-1] = math.nan
        first = 100 * step + SAMPLES_A_RANK * rank
        indices = range(first, first + SAMPLES_A_RANK)
        yield StepData([Batch((inputs, targets), torch.ones(SAMPLES_A_RANK), SAMPLES_A_RANK, indices)])
        step += 1


def make_engine(name: str, world: World) -> Engine:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
    return engines.build(name, model, [], plan_optimizer(model, schema.Optim()), world, Choices())


def my_weights(engine: Engine) -> list[Tensor]:
    return [piece.data.clone() for piece in engine.state().pieces if piece.kind == "weight"]


class Root(Regression):
    """A finite loss whose gradient is not."""

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        return LossSum((model(batch.data[0]) * 0).sum().sqrt(), 1.0)


def run(
    name: str, stopping_rank: int | None = None, spoiled: int | None = None, task: Regression | None = None
) -> tuple[Any, ...]:
    """How a run of 8 steps ends on this rank: steps, whether stopped, the error, and if weights are the last hook's."""
    seen: list[Tensor] = []

    def look(info: StepInfo) -> None:
        seen[:] = my_weights(engine)
        if info.step == 3 and world.rank == stopping_rank:
            info.stop()

    with join("cpu") as world:
        engine = make_engine(name, world)
        loop = Loop(
            engine=engine,
            task=task or Regression(),
            world=world,
            steps=my_steps(world.rank, spoiled),
            eval_batches=None,
            schedule=lambda step: 1.0,
            base_lrs=[1e-3],
            cadence=Cadence(8, log_every=2),
            trackers=[],
            hooks=[Hook(look)],
            on_nonfinite="stop",
            move=lambda batch: batch,
        )
        error: NonFiniteError | None = None
        try:
            loop.run()
        except NonFiniteError as raised:
            error = raised
        is_unmoved = not seen or all(torch.equal(a, b) for a, b in zip(my_weights(engine), seen, strict=True))
        engine.close()
        return loop.outcome.steps, loop.outcome.stopped, error, is_unmoved


def every_case() -> list[tuple[Any, ...]]:
    """Everything in one spawn."""
    cases = []
    for engine in ("ddp", "fsdp"):
        cases += [run(engine), run(engine, stopping_rank=1), run(engine, spoiled=4)]
        cases.append(run(engine, task=Root()))
    return cases


def test_ranks_stop_together():
    for cases in run_distributed(every_case, 2):
        for finished, stopped, (steps, _, error, is_unmoved), rooted in (cases[:4], cases[4:]):
            assert "the gradient is not finite, though the loss is in step 1" in rooted[2].problem
            assert re.match(r"rank 0: (0\.weight|1\.weight)", rooted[2].where), rooted[2].where
            assert finished == (8, False, None, True)
            assert stopped == (4, True, None, True)  # asked for after step 3, agreed on during step 4
            assert (steps, is_unmoved) == (4, True)
            assert "the loss is not finite in step 5" in error.problem
            assert error.where == "rank 1: samples 403, 404, 405"
