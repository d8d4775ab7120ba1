"""Making a model say the same thing twice: dropout off, and a check that nothing else is random."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Attributes by which modules keep a dropout rate that is applied in a function: torch's MultiheadAttention and
# recurrent layers, attention modules of other libraries, stochastic depth.
_RATE_ATTRIBUTES = ("dropout", "attention_dropout", "dropout_p", "drop_prob", "drop_path")


def switch_off_dropout(model: nn.Module) -> list[str]:
    """Set every dropout rate of a model to 0.

    Returns:
        What was switched off, one line a kind.
    """
    found: dict[str, int] = {}
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, _DropoutNd) and module.p > 0:
            module.p = 0.0
            found[kind] = found.get(kind, 0) + 1
        if kind == "StochasticDepth" and getattr(module, "p", 0) > 0:
            module.p = 0.0  # type: ignore[assignment]
            found[kind] = found.get(kind, 0) + 1
        for attribute in _RATE_ATTRIBUTES:
            rate = getattr(module, attribute, None)
            if isinstance(rate, float) and rate > 0:
                setattr(module, attribute, 0.0)
                found[f"{kind}.{attribute}"] = found.get(f"{kind}.{attribute}", 0) + 1
    return [f"{kind} ({count} of them)" for kind, count in found.items()]
