"""A cluster's profile: what to ask its scheduler for, from slurm/*.yaml, the run file and the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PositiveInt, ValidationError

from bigtrain.config.fields import REFUSED, ListOf, Section, refuse
from bigtrain.config.files import read_file
from bigtrain.config.layers import merge
from bigtrain.config.nearest import nearest_words
from bigtrain.config.nodes import Node, Problems, from_python
from bigtrain.config.schema import Config
from bigtrain.errors import ConfigError, Problem, SetupError

FOLDER = "slurm"
_OF_PACKAGE = Path(__file__).parents[1] / FOLDER

# sbatch(1), --time.
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?:(?P<hours>\d+):)?(?P<minutes>\d+)(?::(?P<seconds>\d+))?")


def _is_time(value: str) -> str:
    if not _TIME.fullmatch(value):
        raise refuse("is not a time", "write hours:minutes:seconds or days-hours:minutes:seconds, in quotes")
    return value


class Container(Section):
    """A container in which ranks run; the supervisor runs outside of it."""

    shorthand = "image"

    image: str
    """The image, as the runtime names it."""

    runtime: str = "pyxis"
    """pyxis: through srun's own options; anything else: a command that is written before each rank's, image last."""

    mounts: ListOf[str] = ()
    """What is mounted, as source:target."""

    python: str = "python3"
    """The Python in the image."""


class Profile(Section):
    """What is asked of the cluster. The words are those of sbatch(1)."""

    partition: str | None = None
    """Where the job waits and runs."""

    account: str | None = None
    """Who pays."""

    qos: str | None = None
    """The quality of service."""

    time: Annotated[str, AfterValidator(_is_time)] | PositiveInt = "24:00:00"
    """How long one allocation lasts, or minutes; a run that takes longer is requeued."""

    gpus_per_node: PositiveInt | None = None
    """GPUs on each node; there is one process for each."""

    cpus_per_task: PositiveInt | None = None
    """CPU cores of each process, its data workers included."""

    mem: str | None = None
    """Memory of each node, as 64G; 0 is all of it."""

    mem_per_gpu: str | None = None
    """Memory for each GPU, instead."""

    constraint: str | None = None
    """Features that nodes must have."""

    exclude: str | None = None
    """Nodes not to use."""

    nodelist: str | None = None
    """Nodes to use."""

    reservation: str | None = None
    """A reservation to run in."""

    exclusive: bool = False
    """Share nodes with nobody."""

    array: PositiveInt | None = None
    """So many allocations for this one run, one after the other: for clusters that do not allow requeueing."""

    requeue: bool = True
    """Whether the job may be started again under its number, after its time limit or a preemption."""

    signal_s: PositiveInt = 120
    """How many seconds before the time limit ranks are told to save."""

    comment: str | None = None
    """A comment on the job."""

    mail_type: str | None = None
    """When the scheduler writes a mail."""

    mail_user: str | None = None
    """To whom."""

    setup: ListOf[str] = ()
    """Lines of shell that run first, on the first node: module load, source …/activate."""

    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank."""

    container: Container | None = None
    """A container in which ranks run."""

    sbatch: ListOf[str] = ()
    """Further options, each as it stands after #SBATCH."""

    srun: ListOf[str] = ()
    """Further options of srun."""

    @property
    def minutes(self) -> int:
        """How long an allocation lasts, rounded up."""
        if isinstance(self.time, int):
            return self.time
        found = _TIME.fullmatch(self.time)
        assert found is not None
        days, hours, minutes, seconds = (int(found[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
        if found["days"] is None and found["hours"] is None and found["seconds"] is not None:
            hours = 0  # minutes:seconds
        elif found["days"] is not None and found["hours"] is None:
            hours, minutes = minutes, 0  # days-hours
        elif found["hours"] is not None and found["seconds"] is None and found["days"] is None:
            hours, minutes, seconds = 0, hours, minutes  # minutes:seconds as well
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)


def load_profile(config: Config, run_file: Path | None = None, name: str | None = None) -> Profile:
    """The profile that a run file names, changed as its `launch.slurm` says.

    Args:
        config: The resolved run file.
        run_file: Where it is: a profile may stand beside it.
        name: A profile instead of `launch.profile`.

    Raises:
        SetupError: Where there is no such profile.
        ConfigError: With everything that is wrong in it.
    """
    problems: Problems = []
    name = name or config.launch.profile
    tree: Node | None = Node({}, "default")
    if name is not None:
        path = find_profile(name, run_file)
        tree = read_file(path, problems)
    changes = from_python(dict(config.launch.slurm), "launch.slurm", problems)
    if tree is None or changes is None or problems:
        raise ConfigError(problems)
    tree = merge(tree, changes, problems, exclude=False)
    try:
        return Profile.model_validate(tree.plain())
    except ValidationError as error:
        raise ConfigError(_explain(error, tree)) from None


def find_profile(name: str, run_file: Path | None) -> Path:
    """The file of a profile: a path, or a name in slurm/ here, beside the run file, or beside the package."""
    if name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise SetupError(f"there is no profile {name}", where="launch.profile", remedy="give the path of its file")
    folders = [Path(FOLDER), *([run_file.parent / FOLDER] if run_file else []), _OF_PACKAGE]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise SetupError(
        f"there is no profile {name!r}",
        where="launch.profile",
        remedy=f"the profiles here are: {', '.join(known) or 'none'}; or give the path of a file that ends in .yaml",
    )


def _explain(error: ValidationError, tree: Node) -> list[Problem]:
    """One problem for each key; of the shapes that a value may take, the one that says most is told."""
    found: dict[tuple[str, ...], Problem] = {}
    for detail in error.errors(include_url=False):
        path, node = list[str](), tree
        for part in detail["loc"]:
            if isinstance(part, str) and (child := node.child(part)) is not None:
                path, node = [*path, part], child
        if tuple(path) not in found or detail["type"] == REFUSED:
            found[tuple(path)] = _problem(path, node, detail)
    return list(found.values())


def _problem(path: Sequence[str], node: Node, detail: Mapping[str, Any]) -> Problem:
    key, value = ".".join(path), node.plain()
    if detail["type"] == "extra_forbidden":
        known = list((Container if path[0] == "container" else Profile).model_fields)
        near = nearest_words(path[-1], known)
        remedy = "see the comments in slurm/*.yaml" if near else "one of " + ", ".join(known)
        return Problem(f"a profile has no key {key}", node.origin, key, tuple(near), remedy)
    if detail["type"] == REFUSED:
        return Problem(f"{key}: {value!r} {detail['msg']}", node.origin, key, (), detail["ctx"]["remedy"])
    return Problem(f"{key}: {value!r} does not fit: {detail['msg']}", node.origin, key)
