"""Whether what a run file names is there, and takes the arguments it is given: known without importing any of it.

The places are those of the file, as for every other error. What cannot be told from here (timm's names, the arguments
of torchvision's models) is refused when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from bigtrain import catalogue, sources
from bigtrain.config.keys import show
from bigtrain.config.nearest import nearest_words
from bigtrain.config.nodes import Node
from bigtrain.config.optimizing import Optim
from bigtrain.errors import Problem

_OUR_TRANSFORM_ARGS = ("transform", "target_transform", "transforms", "loader")  # code, which no run file holds


_GIVEN = "given"  # the module of an object, in the run file of a run that was started in Python


@dataclass(frozen=True)
class _Thing:
    """A place of the run file where something is named.

    Attributes:
        key: The dotted key of the section.
        name: Its name, a text.
        args: Its arguments, where they are a mapping.
        node: Where the section stands.
    """

    key: str
    name: Node
    args: Node
    node: Node

    @property
    def said(self) -> str:
        return str(self.name.value)

    def given(self) -> Mapping[str, Node]:
        return self.args.value if isinstance(self.args.value, dict) else {}

    def unknown(self, what: str, known: Iterable[str], others: str) -> Problem:
        known = list(known)
        near = tuple(nearest_words(self.said, known)) or tuple(nearest_words(self.said.rpartition("/")[2], known))
        listed = f"take {', '.join([*known, others])}" if len(known) <= 12 else f"take {others}"
        return self.problem(f"{show(self.said)} is not {what}", near, listed)

    def problem(self, said: str, near: tuple[str, ...], remedy: str) -> Problem:
        return Problem(f"{self.key}.name: {said}", self.name.origin, f"{self.key}.name", near, remedy)


def check_names(tree: Node) -> Iterator[Problem]:
    """Everything that a run file names and that is certainly not there, and arguments that certainly do not fit."""
    for key, check in _CHECKS.items():
        thing = _thing(tree, key)
        if thing is not None:
            yield from check(thing)
    yield from _check_items(tree, "data.transforms.train", _check_transform)
    yield from _check_items(tree, "data.transforms.eval", _check_transform)
    yield from _check_items(tree, "track.trackers", _check_tracker)


def _thing(tree: Node, key: str) -> _Thing | None:
    """What is named at a key, in either of its shapes; None where the shape is wrong, which is told elsewhere."""
    node: Node | None = tree
    for part in key.split("."):
        node = node.child(part) if node else None
    if key == "optim" and node and isinstance(node.value, dict) and "name" not in node.value:
        node = Node({**node.value, "name": Node(Optim.model_fields["name"].default, node.origin)}, node.origin)
    return _named(key, node)


def _named(key: str, node: Node | None) -> _Thing | None:
    if node is None:
        return None
    name = node if isinstance(node.value, str) else node.child("name")
    if name is None or not isinstance(name.value, str) or not name.value.strip():
        return None
    return _Thing(key, name, node.child("args") or Node({}, node.origin), node)


def _check_model(thing: _Thing) -> Iterator[Problem]:
    name = thing.said
    if ":" in name:
        yield from _check_own(thing)
    elif name.startswith(catalogue.TORCHVISION):
        builders = [catalogue.TORCHVISION + builder for builder in sources.torchvision_builders()]
        if builders and name not in builders:
            yield thing.unknown("a model of torchvision", builders, "a name in torchvision.models.list_models()")
    elif name.startswith(catalogue.HUGGING_FACE):
        yield from _check_arguments(thing, catalogue.HUGGING_FACE_MODEL, 1)
    elif not name.startswith(catalogue.TIMM):
        others = "torchvision/<builder>, timm/<model>, hf/<folder>, or pkg.mod:factory for your own"
        if name in sources.torchvision_builders():
            listed = ", ".join([*catalogue.MODELS, others])
            yield thing.problem(f"{name} is not a model", (catalogue.TORCHVISION + name,), f"take {listed}")
            return
        yield from _check_ours(thing, catalogue.MODELS, "a model", others)


def _check_eval(thing: _Thing) -> Iterator[Problem]:
    if thing.said != "none" or isinstance(thing.node.value, dict):
        yield from _check_data(thing)


def _check_data(thing: _Thing) -> Iterator[Problem]:
    name = thing.said
    if ":" in name:
        yield from _check_own(thing, by_position=1)  # the split
    elif name.startswith(catalogue.TORCHVISION):
        known = [catalogue.TORCHVISION + dataset for dataset in sources.torchvision_datasets()]
        if known and name not in known:
            yield thing.unknown("a dataset of torchvision", known, "a name in torchvision.datasets")
        elif known:
            yield from _check_arguments(thing, f"torchvision.datasets:{name.removeprefix(catalogue.TORCHVISION)}", None)
    else:
        yield from _check_ours(
            thing, catalogue.DATA, "a data source", "torchvision/<Dataset>, or pkg.mod:factory for your own", 1
        )
        if name == "synthetic":
            yield from _check_synthetic(thing)


def _check_task(thing: _Thing) -> Iterator[Problem]:
    if ":" in thing.said:
        yield from _check_own(thing)
    else:
        yield from _check_ours(thing, catalogue.TASKS, "a task", "or pkg.mod:Class for your own")


def _check_optimizer(thing: _Thing) -> Iterator[Problem]:
    """Names are the schema's to check; arguments are those of torch's classes, but for what has keys of its own."""
    own = {"params": "", "lr": "optim.lr", "weight_decay": "optim.weight_decay"}
    for arg, node in thing.given().items():
        if arg in own:
            key, where = f"{thing.key}.args.{arg}", own[arg] or "the model's own parameters"
            yield Problem(f"{key} cannot stand there", node.origin, key, (), f"take it out; it is {where}")
    spec = thing.said if ":" in thing.said else catalogue.OPTIMIZERS.get(thing.said)
    if spec:
        yield from _check_arguments(thing, spec, None, hidden=tuple(own), is_own=":" in thing.said)


def _check_items(tree: Node, key: str, check: Callable[[_Thing], Iterator[Problem]]) -> Iterator[Problem]:
    section: Node | None = tree
    for name in key.split("."):
        section = section.child(name) if section else None
    for position, node in enumerate(section.value if section and isinstance(section.value, list) else ()):
        thing = _named(f"{key}.{position}", node)
        if thing is not None:
            yield from check(thing)


def _check_transform(thing: _Thing) -> Iterator[Problem]:
    known = sources.torchvision_transforms()
    if known and thing.said not in known:
        yield thing.unknown("a transform", known, "a name in torchvision.transforms.v2")
    elif known:
        yield from _check_arguments(thing, f"torchvision.transforms.v2:{thing.said}", 0)


def _check_tracker(thing: _Thing) -> Iterator[Problem]:
    if ":" in thing.said:
        yield from _check_arguments(thing, thing.said, None, hidden=("run", "say"), is_own=True)


def _check_ours(
    thing: _Thing, table: Mapping[str, str], what: str, others: str, by_position: int = 0
) -> Iterator[Problem]:
    if thing.said not in table:
        yield thing.unknown(what, table, others)
    else:
        yield from _check_arguments(thing, table[thing.said], by_position)


def _check_own(thing: _Thing, by_position: int = 0) -> Iterator[Problem]:
    yield from _check_arguments(thing, thing.said, by_position, is_own=True)


def _check_synthetic(thing: _Thing) -> Iterator[Problem]:
    kind = thing.given().get("kind")
    if kind is None:
        return
    key = f"{thing.key}.args.kind"
    if kind.value not in catalogue.SYNTHETIC_KINDS:
        near = tuple(nearest_words(str(kind.value), catalogue.SYNTHETIC_KINDS))
        remedy = f"take {' or '.join(catalogue.SYNTHETIC_KINDS)}"
        yield Problem(f"{key}: {show(kind.plain())} is not a kind of synthetic data", kind.origin, key, near, remedy)
        return
    others = Node({name: node for name, node in thing.given().items() if name != "kind"}, thing.args.origin)
    inner = _Thing(thing.key, Node(f"synthetic {kind.value}", thing.name.origin), others, thing.node)
    yield from _check_arguments(inner, catalogue.SYNTHETIC_KINDS[str(kind.value)], 0)


def _check_arguments(
    thing: _Thing, spec: str, by_position: int | None, *, hidden: tuple[str, ...] = (), is_own: bool = False
) -> Iterator[Problem]:
    """Compare arguments with what a factory takes.

    Args:
        thing: What is named.
        spec: Where its factory lies.
        by_position: How many arguments it is given by us; None: we give others by name, so that none may be missing.
        hidden: Arguments that are not to be given here.
        is_own: Whether the name is the user's to write, and may be wrong.
    """
    try:
        takes = sources.signature(spec)
    except sources.MissingError as error:
        if is_own:
            yield _missing(thing, error)
        return
    if takes is None:
        return
    names = [*takes.defaults][by_position or 0 :]
    known = [name for name in names if name not in (*hidden, *_OUR_TRANSFORM_ARGS)]
    shown = str(sources.Signature({name: takes.defaults[name] for name in known}))
    for arg, node in thing.given().items():
        if arg not in names and not takes.takes_any and arg not in hidden:
            key = f"{thing.key}.args.{arg}"
            near = tuple(nearest_words(arg, known, 1))
            yield Problem(f"{key}: {thing.said} has no argument {arg}", node.origin, key, near, f"it takes: {shown}")
    lacking = [name for name in names if takes.defaults[name] is None and name not in thing.given()]
    if by_position is not None and lacking:
        key = f"{thing.key}.args"
        said = f"{key}: {thing.said} needs {', '.join(lacking)}"
        yield Problem(said, thing.node.origin, key, (), f"it takes: {shown}")


def _missing(thing: _Thing, error: sources.MissingError) -> Problem:
    if error.missing == _GIVEN:
        said = f"the run was given it as an object ({thing.said.partition(':')[2]}), which no name leads to"
        return thing.problem(said, (), "name what makes it, package.module:name; or start it in Python as before")
    if error.names is None:
        remedy = "correct it, install it, or run where it lies: the current directory is looked in"
        return thing.problem(f"there is no module {error.missing}", (), remedy)
    module, _, attribute = error.missing.partition(":")
    near = tuple(f"{module}:{name}" for name in nearest_words(attribute, error.names))
    return thing.problem(f"the module {module} has no {attribute}", near, f"name what {module} defines")


_CHECKS = {
    "task": _check_task,
    "model": _check_model,
    "data": _check_data,
    "data.eval": _check_eval,
    "optim": _check_optimizer,
}
