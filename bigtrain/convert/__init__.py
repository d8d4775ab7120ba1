"""Other libraries' configurations as run files, and a list of what in them has no equivalent here.

Knows the files, not the libraries: neither DeepSpeed, Accelerate nor transformers has to be installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bigtrain.convert.accelerate_file import from_accelerate
from bigtrain.convert.deepspeed_file import from_deepspeed
from bigtrain.convert.found import FormError, Found
from bigtrain.convert.training_arguments import from_training_arguments
from bigtrain.errors import UserError

KINDS = {
    "deepspeed": from_deepspeed,
    "accelerate": from_accelerate,
    "training-arguments": from_training_arguments,
}
_SIGNS = {
    "deepspeed": {"zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "bf16", "fp16"},
    "accelerate": {"compute_environment", "distributed_type", "mixed_precision", "num_machines"},
    "training-arguments": {"per_device_train_batch_size", "learning_rate", "output_dir", "num_train_epochs"},
}


def convert(path: str | Path, *, kind: str | None = None, processes: int = 1) -> Found:
    """Read another library's configuration.

    Args:
        path: The file: JSON or YAML.
        kind: deepspeed, accelerate or training-arguments; None finds out.
        processes: How many processes it was written for, where the file does not say: batches are per process there.

    Raises:
        UserError: Where the file cannot be read, or is none of them.
    """
    values = _read(Path(path))
    if kind is None:
        marks = {name: len(signs & values.keys()) for name, signs in _SIGNS.items()}
        kind = max(marks, key=lambda name: marks[name])
        if not marks[kind]:
            remedy = f"say what it is: --kind {' | '.join(KINDS)}"
            raise UserError(f"{path} looks like no configuration that is known", where=str(path), remedy=remedy)
    if kind not in KINDS:
        raise UserError(f"there is no kind {kind!r}", where="--kind", remedy=f"take one of {', '.join(KINDS)}")
    found = Found(kind)
    try:
        KINDS[kind](values, found, processes)
    except FormError as error:
        remedy = f"correct the file; {kind} itself would not take it"
        raise UserError(f"{path} holds a value of another form than {kind} has: {error}", remedy=remedy) from error
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy="give a JSON or YAML file") from None
    except UnicodeDecodeError:
        remedy = "give it as JSON: open('args.json', 'w').write(args.to_json_string())"
        raise UserError(f"{path} is no text: a pickle such as training_args.bin is not read", remedy=remedy) from None
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        line = str(error).partition("\n")[0]
        raise UserError(f"{path} is neither JSON nor YAML: {line}", remedy="correct the file") from None
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} holds no keys", remedy="give a file with keys and values")
    return values
