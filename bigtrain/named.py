"""Things a user names, `{name: …, args: {…}}`: finding them, and calling them with arguments from a file.

Models, tasks and data are all named this way. A typing mistake must end in one message that shows what was
written and what would have been right, so arguments are compared with the signature before anything is
called. This module imports nothing heavy.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError, UserError
from bigtrain.sources import CODE_VARIABLE

_INSTALLED = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})


def nearest(name: str, options: Iterable[str], limit: int = 3) -> list[str]:
    """The options that look most like `name`, best first; letter case does not count."""
    by_lower = {option.lower(): option for option in options}
    return [by_lower[low] for low in difflib.get_close_matches(name.lower(), by_lower, n=limit, cutoff=0.5)]


def suggest(name: str, options: Iterable[str], kind: str) -> str:
    """A remedy: the options nearest to `name`, or all of them where none is near."""
    known = list(options)
    near = nearest(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"the {kind} are: {', '.join(known)}"


def load(spec: str, *, error: type[UserError], where: str) -> Any:
    """Import `package.module:attribute`; modules in the current directory are found too.

    Args:
        spec: What to import.
        error: The type of error to raise.
        where: The key of the run file, for the message.

    Raises:
        UserError: Of type `error`, where the module is missing or fails, or has no such attribute.
    """
    module_name, _, attribute = spec.partition(":")
    if not (module_name and attribute):
        raise error(
            f"{spec!r} is not of the form package.module:name",
            where=where,
            remedy="write the module's dotted path, a colon and the name in it",
        )
    if module_name == "given":  # how an object stands in a run file (`bigtrain.train`)
        raise error(
            f"the run was given {attribute} as an object, which no name leads to",
            where=where,
            remedy="name what makes it, package.module:name; or start it in Python as before",
        )
    module = _import(module_name, error, where)
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [n for n, value in vars(module).items() if not (n.startswith("_") or inspect.ismodule(value))]
        remedy = suggest(attribute, public, f"names in {module_name}")
        raise error(f"the module {module_name} has no {attribute!r}", where=where, remedy=remedy) from None


def _import(name: str, error: type[UserError], where: str) -> Any:
    # As `python -m` does. It stays: worker processes and late imports in the user's module need it too.
    here = os.environ.get(CODE_VARIABLE) or str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name and (name == missing.name or name.startswith(missing.name + ".")):
            remedy = f"install it, or run where {name.split('.')[0]} lies: the current directory is {here}"
            raise error(f"there is no module {missing.name!r}", where=where, remedy=remedy) from None
        raise _failed(f"importing {name}", missing, error, where) from missing
    except Exception as cause:
        raise _failed(f"importing {name}", cause, error, where) from cause


def call(
    factory: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    name: str,
    error: type[UserError],
    where: str,
    accepted: Iterable[str] = (),
) -> Any:
    """Call a factory with keyword arguments, after comparing them with its signature.

    Args:
        factory: A function or class.
        args: Its arguments.
        name: What the user calls it.
        error: The type of error to raise.
        where: The key of the run file that holds the arguments, for the message.
        accepted: Names that the factory takes through its `**kwargs`. Where any is given, no others pass.

    Raises:
        UserError: Of type `error`, where an argument is unknown or missing, or the factory fails.
    """
    check_arguments(factory, args, name=name, error=error, where=where, accepted=accepted)
    try:
        return factory(**args)
    except BigtrainError:
        raise
    except Exception as cause:
        raise _failed(name, cause, error, where) from cause


def check_arguments(
    factory: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    name: str,
    error: type[UserError],
    where: str,
    accepted: Iterable[str] = (),
) -> None:
    """Compare arguments with a factory's signature; the parameters are those of `call`.

    Raises:
        UserError: Of type `error`, showing the signature and the argument nearest to a wrong one.
    """
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return  # written in C without a signature: the call itself will tell
    by_name = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters) and not accepted
    known = [*by_name, *(extra for extra in accepted if extra not in by_name)]
    signature = ", ".join(_show(by_name.get(parameter), parameter) for parameter in known) or "no arguments"
    for arg in args:
        if arg not in known and not takes_any:
            near = nearest(str(arg), known, limit=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise error(f"{name} has no argument {arg!r}", where=where, remedy=f"{hint}it takes: {signature}")
    missing = [p.name for p in by_name.values() if p.default is p.empty and p.name not in args]
    if missing:
        raise error(f"{name} needs {', '.join(missing)}", where=where, remedy=f"it takes: {signature}")


def _show(parameter: inspect.Parameter | None, name: str) -> str:
    if parameter is None or parameter.default is parameter.empty:
        return name
    return f"{name}={parameter.default!r}"


def _failed(what: str, cause: Exception, error: type[UserError], where: str) -> UserError:
    return error(
        f"{what} failed: {type(cause).__name__}: {cause}",
        where=f"{where}, in {place_of(cause)}",
        remedy="correct it; --debug shows the whole traceback",
    )


def place_of(error: BaseException) -> str:
    """`file:line` of the innermost frame in code that is not installed, which is most often the user's own."""
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = (*_INSTALLED, str(Path(__file__).parent))
    own = [frame for frame in frames if not frame.filename.startswith((*not_theirs, "<"))]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def is_installed(file: str) -> bool:
    """Whether a module's file belongs to an installed package or to Python itself."""
    return file.startswith(_INSTALLED)
