"""Nothing in the packages runs what it reads, by their source. One module may, where users allow it."""

import ast

import pytest

from tests.unit.test_floors import FILES, ROOT

# The door that is entered only with --allow-pickle.
ALLOWED = {"bigtrain/doors/pickled.py"}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "jsonpickle.decode"}
# What is read through them must say that it is safe.
SAFE_ONLY = {"torch.load": ("weights_only", True), "yaml.load": ("Loader", None), "extractall": ("filter", "data")}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "_YAML"}


def findings(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (f"line {node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"line {node.lineno}: from {node.module}"
        elif isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {problem}" for problem in wrong_call(node))


def wrong_call(node):
    name, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    if name in CALLS:
        yield name
    if isinstance(given.get("shell"), ast.Constant) and given["shell"].value:
        yield f"{name} with shell=True"
    if given.get("allow_pickle") and name.endswith("load") and "np" in name:
        yield f"{name} with allow_pickle"
    for call, (argument, safe) in SAFE_ONLY.items():
        if name != call and not (call == "extractall" and name.endswith(".extractall")):
            continue
        value = given.get(argument)
        if call == "yaml.load":
            if value is None or ast.unparse(value) not in SAFE_LOADERS:
                yield f"{name} without a safe loader"
        elif not (isinstance(value, ast.Constant) and value.value == safe):
            yield f"{name} without {argument}={safe!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path):
    found = list(findings(path))
    assert bool(found) == (str(path.relative_to(ROOT)) in ALLOWED), found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(f)",
        "yaml.load(f, Loader=yaml.Loader)",
        "eval('1')",
        "subprocess.run(x, shell=True)",
        "tar.extractall('x')",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_the_gate_finds(tmp_path, code):
    (tmp_path / "x.py").write_text(code)
    assert list(findings(tmp_path / "x.py"))
