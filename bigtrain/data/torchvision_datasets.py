"""torchvision's datasets by name: downloaded where there is a network; else the missing files are named."""

from __future__ import annotations

import fcntl
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bigtrain.data.images import LibraryImages
from bigtrain.errors import DataError
from bigtrain.named import check_arguments, suggest

_DEFAULT_ROOT = "data"
_OURS = ("transform", "target_transform", "transforms", "loader")  # code, which a run file cannot hold


def create(name: str, split: str, args: Mapping[str, Any], *, where: str) -> LibraryImages:
    """A dataset of torchvision.

    The library's `train` or `split` argument follows from our split (`test` for evaluation) unless it is
    given; `root` is `data` unless it is given.

    Args:
        name: Its name in torchvision.datasets.
        split: `train` or `eval`.
        args: The library's arguments, without transforms.
        where: The key of the run file that holds name and args, for errors.

    Raises:
        DataError: If there is no such dataset, an argument does not fit, or its files are neither here nor to
            be had.
    """
    library = _find(name, f"{where}.name")
    where = f"{where}.args"
    accepted = {p for p in inspect.signature(library).parameters if p not in _OURS}
    is_train = split == "train"
    defaults = {"root": _DEFAULT_ROOT, "train": is_train, "split": "train" if is_train else "test"}
    if "train" in accepted:
        del defaults["split"]
    full = {key: value for key, value in defaults.items() if key in accepted} | dict(args)
    if given := [key for key in _OURS if key in args]:
        raise DataError(f"{given[0]} cannot be given in args", where=where, remedy="use data.transforms")
    check_arguments(library, full, name=f"torchvision/{name}", error=DataError, where=where)
    if "root" in full:
        full["root"] = str(Path(str(full["root"])).expanduser())
    may_download = "download" in accepted and "download" not in args
    try:
        return LibraryImages(_open(library, full, may_download))
    except ValueError as error:
        raise DataError(f"torchvision/{name}: {error}", where=where, remedy="give a value that it names") from error
    except Exception as error:  # a download may fail in many ways
        raise _not_here(name, library, full, where, error) from error


def names() -> list[str]:
    """Every dataset of torchvision whose samples have numbers."""
    from torchvision import datasets

    generic = {"VisionDataset", "DatasetFolder", "ImageFolder"}
    return [name for name in datasets.__all__ if name not in generic and isinstance(getattr(datasets, name), type)]


def _find(name: str, where: str) -> Callable[..., Any]:
    from torchvision import datasets

    known = names()
    if name not in known:
        remedy = "use image_folder" if name == "ImageFolder" else suggest(name, known, "datasets")
        raise DataError(f"torchvision has no dataset {name!r}", where=where, remedy=remedy)
    library: Callable[..., Any] = getattr(datasets, name)
    return library


def _open(library: Callable[..., Any], args: Mapping[str, Any], may_download: bool) -> Any:
    """Open what is here; download it otherwise, one process at a time."""
    if not may_download:
        return library(**args)
    try:
        return library(**args)
    except (RuntimeError, FileNotFoundError):
        with _alone_in(Path(args["root"])):
            try:
                return library(**args)  # another process may have fetched it meanwhile
            except (RuntimeError, FileNotFoundError):
                return library(**args, download=True)


@contextmanager
def _alone_in(root: Path) -> Iterator[None]:
    """One process at a time; what failed leaves no folders that were not there."""
    absent = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    place = root / ".download.lock"
    try:
        with place.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except BaseException:
        place.unlink(missing_ok=True)
        made = sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True) if absent else []
        for folder in (*made, *absent):
            with suppress(OSError):  # not empty
                folder.rmdir()
        raise


def _not_here(
    name: str, library: Callable[..., Any], args: Mapping[str, Any], where: str, error: Exception
) -> DataError:
    root = Path(args.get("root", _DEFAULT_ROOT)).absolute()
    files = _expected_files(name, library, root)
    listed = "\n".join(["it could not be downloaded; put its files there by hand:", *files])
    return DataError(
        f"torchvision/{name} cannot be read or downloaded: {type(error).__name__}: {error}",
        where=where,
        remedy=listed if files else f"put its files under {root}, as torchvision's documentation of {name} says",
    )


def _expected_files(name: str, library: Any, root: Path) -> list[str]:
    """Where the library looks for the archives of a dataset, as far as its class says."""
    if resources := getattr(library, "resources", None):  # as MNIST and its kin
        return [str(root / name / "raw" / Path(str(resource[0])).name) for resource in resources]
    if folder := getattr(library, "base_folder", None):  # as CIFAR
        lists = [*getattr(library, "train_list", ()), *getattr(library, "test_list", ())]
        return [str(root / folder / item[0]) for item in lists]
    return []
