"""Which tensor of a file goes into which of the model: by name, as declared, never by guessing.

What is not covered and not declared new stops the run, and so does a file that has more in the modules and lists of
blocks that the model takes from it: it is of a model that computes something else. One thing is seen without being
declared, and said: an output layer of another number of classes begins anew.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from typing import Any

from bigtrain.config import schema
from bigtrain.errors import PatternError, StateError
from bigtrain.finetune.adapters import is_adapter
from bigtrain.named import nearest
from bigtrain.patterns import match_names
from bigtrain.state import BUFFER, WEIGHT, TensorSpec

Key = tuple[str, str]
_KINDS = (WEIGHT, BUFFER)
_MOST_NAMED = 8
# Without these a model computes the same: a BatchNorm's counter, and tables that older versions of transformers saved.
_NO_MATTER = ("num_batches_tracked", "rotary_emb.inv_freq", "position_ids", "attn.masked_bias")
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
_OLD_NORM = re.compile(r"\bLayerNorm\.(weight|bias)$")


@dataclass
class LoadReport:
    """What became of every tensor.

    Attributes:
        source: Where the weights come from.
        loaded: Tensors of the model that took the tensor of their own name.
        remapped: Those that took one of another name, and its name.
        resized: Those that took the part that both have, and the file's shape.
        new: Those that begin with initial values.
        head: The output layer among the new ones whose number of classes has changed, and the file's.
        ignored: Tensors of the file that the model has no use for.
        bytes_covered: Bytes of the model's tensors that came from the file.
        bytes_in_all: Bytes of all of them.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    remapped: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    head: tuple[str, int] | None = None
    ignored: list[str] = field(default_factory=list)
    bytes_covered: int = 0
    bytes_in_all: int = 0

    @property
    def coverage(self) -> float:
        """The share of bytes that came from the file."""
        return self.bytes_covered / max(1, self.bytes_in_all)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "coverage": self.coverage}

    def lines(self) -> list[str]:
        """For the terminal."""
        taken = len(self.loaded) + len(self.remapped) + len(self.resized)
        counts = f"{taken} tensors loaded"
        if self.remapped or self.resized:
            counts += f" ({len(self.remapped)} of another name, {len(self.resized)} resized)"
        rest = f"{len(self.new)} new, {len(self.ignored)} of the file ignored"
        lines = [f"weights from {self.source}: {counts}, {rest}; {self.coverage:.1%} of the bytes"]
        if self.head:
            lines.append(f"the output layer {self.head[0]} begins anew: the file's has {self.head[1]} outputs")
        if self.new:
            lines.append(f"begins with initial values: {shown(self.new)}")
        if self.ignored:
            lines.append(f"ignored: {shown(self.ignored)}")
        return lines


def match(
    ours: Mapping[Key, TensorSpec],
    theirs: Mapping[Key, TensorSpec],
    config: schema.Finetune,
    source: str,
    *,
    prefix: str = "",
    may_have: Sequence[str] = (),
) -> tuple[dict[Key, Key], LoadReport]:
    """Match the model's tensors with a file's.

    Args:
        ours: The model's weights and persistent buffers.
        theirs: What the file has.
        config: What the run file declares.
        source: Where the file comes from, for the report.
        prefix: What the names of all but the head begin with here, where a file of the model alone has none.
        may_have: Regular expressions of names that a file of this model may have, and the model not.

    Returns:
        For each tensor of the model that is to be read, the file's; and the report.

    Raises:
        PatternError: Where a pattern of `remap`, `resize`, `ignore` or `new` matches nothing.
        StateError: Where the model needs what the file has not, or has in another shape; where too little is covered;
            or where the file has more in what is taken from it.
    """
    renamed = _rename(_without(theirs, config.ignore), config.remap)
    report = LoadReport(source)
    sources, problems = _take(ours, theirs, config, renamed, report, prefix)
    used = set(sources.values())
    report.ignored = [key[1] for key in theirs if key[0] in _KINDS and key not in used]
    _count(report, ours, theirs, sources)
    _refuse(report, problems, config, [name for _, name in renamed])
    expected = [*may_have, *(r"\A" + fnmatch.translate(pattern) for pattern in config.new)]
    unused = {key: name for (_, name), key in renamed.items() if key not in used}
    further = list(dict.fromkeys(_further(sources, unused, prefix, expected)))
    _refuse_another(source, _shortened(further, {name for _, name in used}))
    report.new += [problem.partition(" ")[0] for problem in problems]
    return sources, report


def _take(
    ours: Mapping[Key, TensorSpec],
    theirs: Mapping[Key, TensorSpec],
    config: schema.Finetune,
    renamed: Mapping[Key, Key],
    report: LoadReport,
    prefix: str,
) -> tuple[dict[Key, Key], list[str]]:
    """For each tensor of the model that is to be read, the file's; and what is missing or does not fit."""
    names = [name for _, name in ours]
    new = set(match_names(config.new, names, where="finetune.new"))
    resizable = set(match_names(config.resize, names, where="finetune.resize"))
    sources: dict[Key, Key] = {}
    problems: list[str] = []
    head = _changed_head(ours, renamed, theirs, new | resizable)
    if head:
        report.head = head
        new |= {name for name in names if name.startswith(head[0] + ".")}
    for key, spec in ours.items():
        name = key[1]
        found = renamed.get(key) or _found(name, prefix, renamed)
        if name in new:
            report.new.append(name)
        elif found is None:
            problems.append(_missing(name, renamed))
        elif theirs[found].shape == spec.shape:
            sources[key] = found
            if found[1] == name:
                report.loaded.append(name)
            else:
                report.remapped[name] = found[1]
        elif name in resizable and len(theirs[found].shape) == len(spec.shape):
            sources[key] = found
            report.resized[name] = theirs[found].shape
        else:
            problems.append(f"{name} is {theirs[found].shape} in the file and {spec.shape} in the model")
    return sources, problems


def _without(theirs: Mapping[Key, TensorSpec], patterns: Sequence[str]) -> dict[Key, TensorSpec]:
    """The file's weights and buffers that are not to be left out."""
    kept = {key: spec for key, spec in theirs.items() if key[0] in _KINDS}
    names = [name for _, name in kept]
    unwanted = set(match_names(patterns, names, where="finetune.ignore", what="tensor of the file"))
    return {key: spec for key, spec in kept.items() if key[1] not in unwanted}


def _rename(theirs: Mapping[Key, TensorSpec], remap: Mapping[str, str]) -> dict[Key, Key]:
    """The file's tensors by the name that they are to have here."""
    renamed: dict[Key, Key] = {}
    unused = set(remap)
    for key in theirs:
        name = key[1]
        pattern = next((pattern for pattern in remap if fnmatch.fnmatchcase(name, pattern)), None)
        if pattern is not None:
            unused.discard(pattern)
            name = _replaced(name, pattern, remap[pattern])
        if (key[0], name) in renamed:
            raise PatternError(
                f"two tensors of the file would be {name}: {renamed[key[0], name][1]} and {key[1]}",
                where="finetune.remap",
            )
        renamed[key[0], name] = key
    if unused:
        pattern = min(unused)
        near = nearest(pattern, [name for _, name in theirs]) or [name for _, name in theirs][:3]
        raise PatternError(
            f"the pattern {pattern!r} matches no tensor of the file",
            where="finetune.remap",
            remedy=f"names that look alike: {', '.join(near)}",
        )
    return renamed


def _found(name: str, prefix: str, renamed: Mapping[Key, Key]) -> Key | None:
    """The file's tensor for one of the model's.

    A file may hold the model below a head alone, as transformers' AutoModel saves it, and have the names that
    TensorFlow's layer norms had, as the first BERTs do.
    """
    names = [name]
    if prefix and name.startswith(f"{prefix}."):
        names.append(name.removeprefix(f"{prefix}."))
    names += [_OLD_NORM.sub(lambda part: _OLD_NAMES[part[0]], each) for each in names]
    return next((renamed[WEIGHT, each] for each in names if (WEIGHT, each) in renamed), None)


def _replaced(name: str, pattern: str, wanted: str) -> str:
    """A name under `wanted`, whose star stands for what the pattern's star matched."""
    before, _, after = pattern.partition("*")
    return wanted.replace("*", name[len(before) : len(name) - len(after)], 1) if "*" in pattern else wanted


def _changed_head(
    ours: Mapping[Key, TensorSpec], renamed: Mapping[Key, Key], theirs: Mapping[Key, TensorSpec], declared: set[str]
) -> tuple[str, int] | None:
    """The last layer, where all that does not fit is its number of outputs; and how many the file's has."""
    weights = [name for kind, name in ours if kind == WEIGHT]
    layer = weights[-1].rpartition(".")[0] if weights else ""
    changed: dict[str, int] = {}
    for key, spec in ours.items():
        found = renamed.get(key) or renamed.get((WEIGHT, key[1]))
        if found is None or key[1] in declared or theirs[found].shape == spec.shape:
            continue
        has = theirs[found].shape
        if not (spec.shape and has and has[1:] == spec.shape[1:] and key[1].rpartition(".")[0] == layer):
            return None
        changed[key[1]] = has[0]
    return (layer, next(iter(changed.values()))) if changed and layer else None


def _missing(name: str, renamed: Mapping[Key, Key]) -> str:
    near = nearest(name, [theirs for _, theirs in renamed], limit=1)
    return f"{name} is not in the file" + (f", which has {near[0]}" if near else "")


def _count(
    report: LoadReport,
    ours: Mapping[Key, TensorSpec],
    theirs: Mapping[Key, TensorSpec],
    sources: Mapping[Key, Key],
) -> None:
    for key, spec in ours.items():
        size = spec.dtype.itemsize
        report.bytes_in_all += math.prod(spec.shape) * size
        if key in sources:
            both = zip(spec.shape, theirs[sources[key]].shape, strict=True)
            report.bytes_covered += math.prod(min(pair) for pair in both) * size


def _refuse(report: LoadReport, problems: Sequence[str], config: schema.Finetune, theirs: Sequence[str]) -> None:
    """Stop where too little is covered of what the file has under these names."""
    enough = config.min_coverage is not None and report.coverage >= config.min_coverage
    if not problems or enough:
        return
    least = "all that is not declared new" if config.min_coverage is None else f"{config.min_coverage:.1%}"
    rest = f"\n  … {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
    raise StateError(
        f"{report.source} covers {report.coverage:.1%} of the model, and {least} is asked for:\n  "
        + "\n  ".join(problems[:_MOST_NAMED])
        + rest,
        where="finetune.init_from",
        remedy="say what begins anew (finetune.new), what has another name in the file (finetune.remap: {theirs.*: "
        "ours.*}),\nof what a part is taken (finetune.resize), or how much is enough (finetune.min_coverage)."
        + (f"\nOf the file's own nothing was used: {shown(report.ignored)}" if report.ignored else "")
        + _same_below([problem.partition(" ")[0] for problem in problems], () if config.remap else theirs),
    )


def _same_below(missing: Sequence[str], theirs: Sequence[str]) -> str:
    """The line to declare where most of what is missing is in the file below another name, as DDP's `module.`."""
    held = set(theirs)
    begins = {name.removesuffix(each) for each in missing[:_MOST_NAMED] for name in theirs if name.endswith(f".{each}")}
    for begin in sorted(begins):
        if 2 * sum(begin + each in held for each in missing) > len(missing):
            return f'\nMost of it is there below {begin[:-1]}: finetune.remap: {{"{begin}*": "*"}}'
    ends = {each.removesuffix(name) for each in missing[:_MOST_NAMED] for name in theirs if each.endswith(f".{name}")}
    for begin in sorted(ends):
        if 2 * sum(each.startswith(begin) and each.removeprefix(begin) in held for each in missing) > len(missing):
            return f'\nMost of it is there without {begin[:-1]}: finetune.remap: {{"*": "{begin}*"}}'
    return ""


def _further(
    sources: Mapping[Key, Key], unused: Mapping[Key, str], prefix: str, expected: Sequence[str]
) -> Iterator[str]:
    """Patterns of what a file has beside what was taken from it: more blocks, more in those and in modules, adapters.

    Args:
        sources: What was taken: for each tensor of the model, the file's.
        unused: What was not, and its name here.
        prefix: As for `match`.
        expected: Regular expressions of names here that nobody wonders at.
    """
    taken = [name for _, name in sources]
    modules = {name.rpartition(".")[0] for name in taken} - {""}
    lists = {before for name in taken for before, _ in _numbered(name)}
    blocks = {block for name in taken for _, block in _numbered(name)}
    for (_, own), name in unused.items():
        if own.endswith(_NO_MATTER) or any(re.search(known, name) for known in expected):
            continue
        for here in (name, f"{prefix}.{name}") if prefix else (name,):
            numbered = list(_numbered(here))
            further = next((block for before, block in numbered if before in lists and block not in blocks), None)
            if further is not None:
                rest = here.removeprefix(further)
                yield own.removesuffix(rest) + ".*" if own.endswith(rest) else own
            elif here.rpartition(".")[0] in modules or any(block in blocks for _, block in numbered):
                yield own
        if is_adapter(name):
            yield own


def _numbered(name: str) -> Iterator[tuple[str, str]]:
    """Every list that a tensor lies in, and the block of it: `layers.3` of `layers.`, `layers_3` of `layers_`."""
    parts = name.split(".")[:-1]
    for place, part in enumerate(parts):
        if place and part[-1:].isdigit():
            block = ".".join(parts[: place + 1])
            yield block.rstrip("0123456789"), block


def _shortened(patterns: Sequence[str], taken: Set[str]) -> list[str]:
    """One pattern for the same thing in many blocks, where it matches nothing that was taken."""
    wide = {pattern: re.sub(r"(?<=\.)\d+(?=\.)", "*", pattern, count=1) for pattern in patterns}
    wrong = {each for each in set(wide.values()) if any(fnmatch.fnmatchcase(name, each) for name in taken)}
    return list(dict.fromkeys(pattern if wide[pattern] in wrong else wide[pattern] for pattern in patterns))


def _refuse_another(source: str, patterns: Sequence[str]) -> None:
    """Stop where the file is of a model that has more."""
    if patterns:
        raise StateError(
            f"{source} is of a model that has more in what this one takes from it: {shown(patterns)}",
            where="finetune.init_from",
            # All of them: whoever takes the list over is not asked again.
            remedy="build the model that the file is of; or, to leave them out: finetune.ignore: ["
            + ", ".join(f'"{pattern}"' for pattern in patterns)
            + "]",
        )


def shown(names: Sequence[str]) -> str:
    """Some of many names."""
    more = f" … ({len(names)} in all)" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
