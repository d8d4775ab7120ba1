"""The file or folder that `finetune.init_from` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

from bigtrain.config.schema import Config
from bigtrain.errors import SetupError, UserError

_TORCHVISION = "torchvision/"
_WEIGHTS = ("*.safetensors", "*.bin")  # what a Hugging Face folder holds them in


def find_weights(config: Config, *, may_download: bool) -> Path:
    """The path of the weights: as it stands, or torchvision's by name, from its cache or downloaded into it.

    Args:
        config: The run file.
        may_download: Whether this process is the one that downloads.

    Raises:
        UserError: Where there are no such weights.
        SetupError: Where they are not in the cache and cannot be downloaded: it says which file to put where.
    """
    name = config.begins_with
    assert name is not None
    if not name.startswith(_TORCHVISION) or Path(name).exists():
        return Path(name).expanduser()
    import torch

    weights = _weights(name.removeprefix(_TORCHVISION), config.model.name)
    url: str = weights.url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.exists() or not may_download:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = path.stem.rpartition("-")[2]  # torchvision's names end in the first digits of the file's SHA-256
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise SetupError(
            f"the weights {name} are not on this machine and cannot be downloaded: {error}",
            where="finetune.init_from",
            remedy=f"put the file of {url}\nat {path}",
        ) from error
    return path


def check_folder(config: Config) -> None:
    """Refuse the folder of a model hf/<folder> without weights, where the run is to begin with those.

    Raises:
        UserError: Naming the ways out.
    """
    folder = Path(config.begins_with or "").expanduser()
    is_models_own = config.finetune.init_from is None
    if is_models_own and folder.is_dir() and not any(next(folder.glob(form), None) for form in _WEIGHTS):
        raise UserError(
            f"the folder {str(folder)!r} holds no weights",
            where="model.name",
            remedy="copy *.safetensors into it; or say what to begin with (finetune.init_from), or that initial\n"
            "values are meant (model.args.pretrained=false)",
        )


def _weights(name: str, model: str) -> Any:
    import torchvision

    builder = model.removeprefix(_TORCHVISION)
    try:
        if "." in name:
            return torchvision.models.get_weight(name)
        return torchvision.models.get_model_weights(builder)[name]
    except (KeyError, ValueError, AttributeError):
        known: list[str] = []
        if builder in torchvision.models.list_models():
            known = [str(weights) for weights in torchvision.models.get_model_weights(builder)]
        raise UserError(
            f"torchvision has no weights {name!r} for {model}",
            where="finetune.init_from",
            remedy=f"it has: {', '.join(known)}" if known else "give torchvision/<Model>_Weights.<name>",
        ) from None
