"""What torch.compile is given of a model, and whether it can be traced: known before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from bigtrain.config.schema import Config
from bigtrain.engines.base import Evaluator
from bigtrain.errors import CombinationError
from bigtrain.models.blocks import without_shared_parameters
from bigtrain.prepare import compile_forward
from bigtrain.protocols import Batch, Task


def compile_parts(config: Config, engine: str, model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Give forwards to torch.compile; returns the blocks whose forward it has."""
    scope = config.compile.scope
    if scope == "none":
        return []
    is_stage_3 = engine == "deepspeed" and config.engine.deepspeed.stage == 3
    if scope == "model":
        # These put hooks inside the model, which no graph can hold: fsdp around blocks, stage 3 around every module.
        has_hooks = engine == "fsdp" or is_stage_3
        compile_forward([model], fullgraph=config.compile.fullgraph and not has_hooks)
        return []
    if is_stage_3:  # which gathers a compiled block as one, and a parameter in one of them alone
        blocks = without_shared_parameters(model, blocks)
    compile_forward(blocks, fullgraph=config.compile.fullgraph)
    from bigtrain.models.head import Head  # which imports torch._dynamo

    for module in model.modules():
        if isinstance(module, Head):
            module.compile_loss()
    return list(blocks)


def try_compiled(engine: Evaluator, task: Task, batch: Batch, blocks: Sequence[nn.Module], *, is_stage_3: bool) -> None:
    """Trace the model by an evaluation of one batch. Every rank must call it.

    Args:
        engine: Computes.
        task: Runs the model.
        batch: On the device.
        blocks: Those that torch.compile has.
        is_stage_3: Whether DeepSpeed gathers each of them as one.

    Raises:
        CombinationError: Where it cannot be traced, or a block cannot be gathered as one.
    """
    import torch._dynamo  # half a second, for those who compile

    calls = Counter[nn.Module]()
    handles = [block.register_forward_pre_hook(lambda block, args: calls.update([block])) for block in blocks]
    try:
        with engine.evaluating():
            task.loss(engine.model, batch)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0]
        raise CombinationError(
            f"the model cannot be compiled as one graph: {reason}",
            where="compile",
            remedy="set compile={scope: blocks, fullgraph: false}, which runs such parts as they are; or compile=none",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    twice = [type(block).__name__ for block, count in calls.items() if count > 1]
    if twice and is_stage_3:
        raise CombinationError(
            f"a {twice[0]} runs {max(calls.values())} times in one forward, and DeepSpeed's stage 3 sums the gradients "
            "of a compiled block after the first",
            where="compile",
            remedy="set compile=none, engine.deepspeed.stage=2, or engine.name=fsdp",
        )
