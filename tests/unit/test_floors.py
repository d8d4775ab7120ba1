"""The floors of the two packages, read from their imports, and the bounds on files and functions.

A module imports only from floors below its own; within a floor, only the modules of one package import one another.
Imports inside functions and under TYPE_CHECKING count, too.
"""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    "bigtrain.catalogue": 0,
    "bigtrain.errors": 0,
    "bigtrain.sources": 0,
    "bigtrain.metrics": 0,
    "bigtrain.terminal": 0,
    "bigtrain.beats": 1,
    "bigtrain.config": 1,
    "bigtrain.convert": 2,
    "bigtrain.early": 1,
    "bigtrain.lease": 1,
    "bigtrain.named": 1,
    "bigtrain.patterns": 1,
    "bigtrain.runs": 2,
    "bigtrain.starting": 3,
    "bigtrain.failures": 3,
    "bigtrain.dist": 2,
    "bigtrain.models": 2,
    "bigtrain.moments": 2,
    "bigtrain.processes": 2,
    "bigtrain.protocols": 2,
    "bigtrain.state": 2,
    "bigtrain.data": 3,
    "bigtrain.finetune": 3,
    "bigtrain.optim": 3,
    "bigtrain.prepare": 3,
    "bigtrain.tasks": 3,
    "bigtrain.engines": 4,
    "bigtrain.goals": 4,
    "bigtrain.fitting": 4,
    "bigtrain.checkpoint": 5,
    "bigtrain.health": 5,
    "bigtrain.tracking": 5,
    "bigtrain.progress": 5,
    "bigtrain.compiling": 6,
    "bigtrain.loop": 6,
    "bigtrain.moving": 3,
    "bigtrain.report": 6,
    "bigtrain.saving": 6,
    "bigtrain.doors": 6,
    "bigtrain.trainer": 7,
    "launchers": 7,
    "launchers.agent": 8,
    "bigtrain.features": 8,
    "bigtrain.doctor": 8,
    "bigtrain.explain": 8,
    "bigtrain.parity": 8,
    "bigtrain.pretrained": 8,
    "bigtrain.resuming": 9,
    "bigtrain.telling": 8,
    "bigtrain.watching": 8,
    "bigtrain.phases": 10,
    "bigtrain.running": 11,
    "bigtrain.evaluating": 12,
    "bigtrain.rehearsal": 12,
    "bigtrain.replaying": 12,
    "bigtrain.cli": 13,
    "bigtrain": 14,  # its own names, which others may not import
    "bigtrain.__main__": 14,
}

OPEN_TO_LAUNCHERS = (
    *("bigtrain.beats", "bigtrain.config", "bigtrain.early", "bigtrain.errors", "bigtrain.lease", "bigtrain.named"),
    *("bigtrain.failures", "bigtrain.metrics", "bigtrain.runs", "bigtrain.sources", "bigtrain.starting"),
    "bigtrain.terminal",
)

# What a module may not import although it stands above it.
FORBIDDEN = {
    "bigtrain.models": ("bigtrain.config",),
    "bigtrain.checkpoint": ("bigtrain.engines",),
    "bigtrain.health": ("bigtrain.engines",),
    "bigtrain.tracking": ("bigtrain.engines",),
    "bigtrain.loop": ("bigtrain.models", "bigtrain.engines.single", "bigtrain.engines.ddp", "bigtrain.engines.fsdp"),
    "bigtrain.engines": ("bigtrain.data",),
    "launchers.agent": ("bigtrain",),
    "launchers": ("torch", *(FLOORS.keys() - {"launchers", "bigtrain", *OPEN_TO_LAUNCHERS})),
}

TORCH_FREE = (
    *(
        "bigtrain.beats",
        "bigtrain.catalogue",
        "bigtrain.early",
        "bigtrain.errors",
        "bigtrain.config",
        "bigtrain.convert",
        "bigtrain.failures",
        "bigtrain.lease",
        "bigtrain.sources",
        "bigtrain.terminal",
    ),
    *("bigtrain.metrics", "bigtrain.named", "bigtrain.patterns", "bigtrain.runs", "bigtrain.starting", "launchers"),
)
# A process of its own around torchrun's agent, which is torch's. Nothing imports it.
AROUND_TORCHRUN = "launchers.agent"
HEAVY = ("torch", "torchvision", "torchmetrics", "numpy", "sklearn", "tokenizers")

LONGEST_FUNCTION, LONGEST_FILE = 60, 400
SCHEDULER_WORDS = re.compile(r"SLURM_|sbatch|scontrol|submitit")

FILES = sorted(path for package in ("bigtrain", "launchers") for path in (ROOT / package).rglob("*.py"))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def is_within(module, package):
    return module == package or module.startswith(package + ".")


def part_of(module):
    """The entry of FLOORS that a module belongs to."""
    parts = [name for name in FLOORS if name == module or (name != "bigtrain" and is_within(module, name))]
    return max(parts, key=len, default=None)


def imports_of(path):
    """What a file imports, as modules where they are ours, with the line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else node.module), node.lineno


def test_every_module_has_a_floor():
    assert not [name for name in MODULES if part_of(name) is None]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own = part_of(module)
    wrong = []
    for target, line in imports_of(MODULES[module]):
        part = part_of(target) if target in MODULES else None
        is_version = own == "bigtrain.cli" and target == "bigtrain"
        if part not in (None, own) and FLOORS[part] >= FLOORS[own] and not is_version:
            wrong.append(f"line {line}: {own} (floor {FLOORS[own]}) imports {target} (floor {FLOORS[part]})")
        if any(is_within(target, forbidden) for forbidden in FORBIDDEN.get(own, ())):
            wrong.append(f"line {line}: {own} may not import {target}")
    assert not wrong


@pytest.mark.parametrize(
    "module",
    [n for n in MODULES if n != AROUND_TORCHRUN and any(is_within(n, free) for free in TORCH_FREE)],
)
def test_the_ground_floor_and_launchers_do_without_torch(module):
    assert not [(line, target) for target, line in imports_of(MODULES[module]) if target.split(".")[0] in HEAVY]


def test_concrete_engines_do_not_know_one_another():
    concrete = {f"bigtrain.engines.{name}" for name in ("single", "ddp", "fsdp", "deepspeed")}
    for module in concrete & MODULES.keys():
        assert not [target for target, _ in imports_of(MODULES[module]) if target in concrete - {module}]


def test_only_commands_import_launchers():
    users = {name for name, path in MODULES.items() for target, _ in imports_of(path) if is_within(target, "launchers")}
    assert all(is_within(name, "launchers") or is_within(name, "bigtrain.cli") for name in users)


def test_there_is_no_circle():
    graph = {name: {t for t, _ in imports_of(path) if t in MODULES} - {name} for name, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_words_of_a_scheduler_stand_in_launchers_only():
    assert not [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "bigtrain").rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".json")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SCHEDULER_WORDS.search(line)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {f"{node.name} (line {node.lineno})": node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
