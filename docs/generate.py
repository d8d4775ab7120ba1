"""Writes docs/keys.md from the schema of the run file, and docs/errors.md from the code that raises.

    python docs/generate.py

A test fails where either is not what this writes.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bigtrain import errors
from bigtrain.config.keys import all_keys

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("bigtrain", "launchers") for path in (ROOT / package).rglob("*.py"))
CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, Exception)}
# Functions and parameters that stand for one of the classes where it is called.
STAND_INS = {
    "error": "UserError",
    "refuse": "ConfigError",
    "Problem": "ConfigError",
    "problem": "ConfigError",
    "Clash": "CombinationError",
    "cls": "BigtrainError",
}
# Where the remedy stands among their arguments, if it is not named.
REMEDY_AT = {"refuse": 1, "Problem": 4, "problem": 2, "Clash": 2}
LONGEST = 400


@dataclass(frozen=True)
class Message:
    """One place in the code that makes an error.

    Attributes:
        kind: The class.
        text: What is wrong, with the names of what is filled in.
        remedy: What to do about it.
        module: Where it is made.
        line: In which line; the order of the list, and not shown.
    """

    kind: str
    text: str
    remedy: str
    module: str
    line: int


def messages() -> list[Message]:
    """Every message, in the order of the code."""
    return [message for path in SOURCES for message in _messages_in(path)]


def _messages_in(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    named = _assignments(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = _callee(node)
        kind = name if name in CLASSES else STAND_INS.get(name or "")
        if kind is None or module == "bigtrain.errors":
            continue
        text = _words(node.args[0], named, node.lineno)
        if not text.strip("‹›").strip() or (text.startswith("‹") and text.endswith("›") and text.count("‹") == 1):
            continue  # handed on: it is listed where it was made
        remedy = next((keyword.value for keyword in node.keywords if keyword.arg == "remedy"), None)
        at = REMEDY_AT.get(name or "", 0)
        if remedy is None and 0 < at < len(node.args):
            remedy = node.args[at]
        yield Message(kind, text, _words(remedy, named, node.lineno) if remedy else "", module, node.lineno)


def _callee(node: ast.Call) -> str | None:
    if isinstance(node.func, ast.Name):
        return node.func.id
    known = isinstance(node.func, ast.Attribute) and node.func.attr in (*CLASSES, "problem")
    return node.func.attr if known else None


def _assignments(tree: ast.AST) -> dict[str, list[tuple[int, ast.expr]]]:
    """What names are set to, with the lines: a remedy is often made above its error."""
    found: dict[str, list[tuple[int, ast.expr]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    found.setdefault(name.id, []).append((node.lineno, value))
    return found


def _words(node: ast.expr, named: dict[str, list[tuple[int, ast.expr]]], line: int, depth: int = 0) -> str:
    """An expression as a message's text; what is filled in stands in ‹›."""
    if isinstance(node, ast.Constant):
        return "" if node.value is None else str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part, named, line, depth) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"‹{_name(node.value)}›"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _words(node.left, named, line, depth) + _words(node.right, named, line, depth)
    if isinstance(node, ast.IfExp):
        first, second = (_words(part, named, line, depth) for part in (node.body, node.orelse))
        return f"{first} | {second}" if first and second else first or second
    if isinstance(node, ast.Call) and _callee(node) == "suggest":
        return f"did you mean ‹the nearest of the {_words(node.args[2], named, line, depth)}›?"
    if isinstance(node, ast.Name) and depth < 3:
        above = [value for at, value in named.get(node.id, []) if at <= line]
        if above:
            return _words(above[-1], named, line, depth + 1)
    return f"‹{_name(node)}›"


def _name(node: ast.expr) -> str:
    """What an expression is about: the last name in it."""
    if isinstance(node, ast.Call):
        inner = node.args[0] if node.args else node.func
        return _name(inner)
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_").replace("_", " ")
    if isinstance(node, ast.Name):
        return node.id.strip("_").replace("_", " ")
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return "…"


def unlisted() -> list[str]:
    """Places that raise something which is neither one of the classes, nor made by a function, nor Python's own."""
    functions = {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    # Errors of a module's own, which are turned into one of the classes before anybody sees them, and ways to end.
    own = ("OSError", "Exception", "SystemExit", "KeyboardInterrupt")
    inner = {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id in own for base in node.bases)
    }
    known = {*CLASSES, *STAND_INS, *functions, *inner, "Exit", "ValidationError", "PydanticCustomError"}
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                function = node.exc.func
                name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
                is_made = isinstance(function, (ast.Call, ast.IfExp))
                if name not in known and not hasattr(builtins, name) and not is_made:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return wrong


def errors_page() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "Every message that bigtrain itself can end with, made from the code by `python docs/generate.py`. What stands",
        "in ‹…› is filled in. Exit code 2: nothing was begun; 1: something went wrong on the way. `--debug` shows a",
        "traceback.",
        "",
    ]
    found = messages()
    for name, cls in CLASSES.items():
        mine = sorted(
            {(m.text, m.remedy): m for m in found if m.kind == name}.values(), key=lambda m: (m.module, m.line)
        )
        if not mine:
            continue
        summary = (inspect.getdoc(cls) or "").splitlines()[0]
        lines += [f"## {name}", "", f"{summary} Exit code {getattr(cls, 'exit_code', 1)}.", ""]
        for message in mine:
            lines.append(f"- **{_cell(message.text)}** (`{message.module}`)")
            if message.remedy:
                lines.append(f"  <br>→ {_cell(message.remedy)}")
        lines.append("")
    return "\n".join(lines)


def keys_page() -> str:
    """docs/keys.md."""
    lines = [
        "# Every key of the run file",
        "",
        "Made from the schema by `python docs/generate.py`; `bigtrain config keys` prints the same, and",
        "[run_file.md](run_file.md) explains.",
        "",
    ]
    section = None
    for key in all_keys():
        top = key.path.split(".")[0].split("[")[0]
        if top != section:
            section = top
            lines += [f"\n## {top}", "", "| key | takes | default | |", "|---|---|---|---|"]
        default = "" if key.default is None else f"`{_cell(key.default)}`"
        lines.append(f"| `{key.path}` | {_cell(key.kind)} | {default} | {_cell(key.help)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 1] + "…"


def main() -> None:
    """Write both."""
    for name, text in (("keys.md", keys_page()), ("errors.md", errors_page())):
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
        print(f"docs/{name}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
