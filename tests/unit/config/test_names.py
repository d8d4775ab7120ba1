"""`config check` knows names, arguments and combinations without importing what they stand for."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain import catalogue, sources
from bigtrain.config.loader import check, load
from bigtrain.errors import ConfigError
from bigtrain.named import load as load_named

RUN_FILE = """\
task: classification
model:
  name: bigmodel
data:
  name: digits
  args: {size: 28}
train: {steps: 1}
"""
OURS = (
    catalogue.MODELS | catalogue.DATA | {f"synthetic {k}": v for k, v in catalogue.SYNTHETIC_KINDS.items()}
) | catalogue.TASKS


def problems(folder: Path, *changes: str, text: str = RUN_FILE, launched: bool = True) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    try:
        check(path, changes, launched=launched)
    except ConfigError as error:
        return str(error).replace(str(path), "run.yaml")
    return "ok"


@pytest.mark.parametrize("name", OURS)
def test_what_the_source_tells_is_what_python_says(name: str) -> None:
    read = sources.signature(OURS[name])
    parameters = inspect.signature(load_named(OURS[name], error=AssertionError, where=name)).parameters.values()
    named = [p for p in parameters if p.kind != p.VAR_KEYWORD]
    assert read is not None
    assert list(read.defaults) == [p.name for p in named]
    assert read.required == [p.name for p in named if p.default is p.empty]
    assert read.takes_any == any(p.kind == p.VAR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", catalogue.OPTIMIZERS)
def test_arguments_of_optimizers(name: str) -> None:
    import torch

    read = sources.signature(catalogue.OPTIMIZERS[name])
    assert read is not None
    assert list(read.defaults) == named(getattr(torch.optim, catalogue.OPTIMIZERS[name].partition(":")[2]))


def named(call: Any) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def test_names_of_torchvision() -> None:
    import torchvision
    from torchvision.transforms import v2

    from bigtrain.data import torchvision_datasets

    assert sources.torchvision_builders() == sorted(torchvision.models.list_models())
    assert set(torchvision_datasets.names()) <= set(sources.torchvision_datasets())
    transforms = {n for n, v in vars(v2).items() if isinstance(v, type) and issubclass(v, v2.Transform)}
    assert transforms <= set(sources.torchvision_transforms())
    for module, names in ((torchvision.datasets, torchvision_datasets.names()), (v2, transforms)):
        for name in names:
            read = sources.signature(f"{module.__name__}:{name}")
            if read is not None:  # it may say that it does not know, never something wrong
                assert list(read.defaults) == named(getattr(module, name))


def test_blocks_are_known() -> None:
    from bigtrain import models
    from bigtrain.models.blocks import find_blocks

    sizes: dict[str, Any] = {"vocab": 7, "layers": 2, "width": 8, "context": 4}
    args = {"gpt": {**sizes, "heads": 2}, "lstm": sizes}
    for name in catalogue.MODELS:
        has_blocks = bool(list(find_blocks(models.build(name, args.get(name, {})))))
        assert has_blocks == (name not in catalogue.WITHOUT_BLOCKS), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.name=bigmodle"], "model.name: bigmodle is not a model\n  did you mean: bigmodel"),
        (["model.args.classes=3"], "model.args.classes: bigmodel has no argument classes"),
        (["model.name=torchvision/resnet81"], "did you mean: torchvision/resnet18"),
        (["model.name=torchvisoin/resnet18"], "is not a model"),
        (["model.name=gpt"], "model.args: gpt needs vocab, layers, width, heads, context"),
        (["task=clasification"], "task.name: clasification is not a task\n  did you mean: classification"),
        (["task.args.label_smoothin=0.1"], "did you mean: label_smoothing"),
        (["data.name=digit", "data.args={}"], "data.name: digit is not a data source\n  did you mean: digits"),
        (["data.args.siez=3"], "did you mean: size"),
        (["data.name=csv", "data.args={}"], "csv is not a data source"),
        (["data.name=torchvision/CIFAR11", "data.args={}"], "did you mean: torchvision/CIFAR10"),
        (["data.name=torchvision/CIFAR10"], "torchvision/CIFAR10 has no argument size"),
        (["data.eval={name: digist}"], "data.eval.name: digist is not a data source"),
        (["data.eval={name: digits}"], "digits has no samples of its own for evaluation"),
        (["data={name: synthetic, args: {kind: regresion}}"], "did you mean: regression"),
        (["data={name: synthetic, args: {kind: regression, sample: 1}}"], "did you mean: samples"),
        (["data={name: synthetic}"], "synthetic needs kind"),
        (["optim.args={betsa: [0.9, 0.95]}"], "did you mean: betas"),
        (["optim={name: sgd, args: {momentun: 0.9}}"], "did you mean: momentum"),
        (["optim.args={lr: 1.0}"], "optim.args.lr cannot stand there"),
        (["data.transforms.train=[RandomCorp]"], "did you mean: RandomCrop"),
        (["data.transforms.train=[{name: RandomCrop, args: {sise: 3}}]"], "did you mean: size"),
        (["data.transforms.train=[RandomCrop]"], "RandomCrop needs size"),
        (
            ["engine.name=single", "launch.nproc=2"],
            "the engine single runs in one process, and there are 2",
        ),
        (["launch.nodes=2"], "launch.target=local is this machine"),
        (["engine={name: fsdp, device: cpu, fsdp: {cpu_offload: true}}"], "moves shards from a GPU to the host"),
        (["engine={name: fsdp, fsdp: {shard_size: 3}}", "launch.nproc=4"], "does not divide the 4 processes"),
        (["engine={name: deepspeed, deepspeed: {stage: 0}}", "precision=bf16"], "does not add up bf16"),
        (["engine.name=deepspeed", "precision=fp64"], "precision: DeepSpeed reduces no gradients of float64"),
        (["engine={name: deepspeed, deepspeed: {stage: 2, offload_params: cpu}}"], "offload_params needs stage 3"),
        (["engine={name: deepspeed, deepspeed: {stage: 0, offload_optimizer: cpu}}"], "needs a stage from 1 to 3"),
        (
            ["engine={name: deepspeed, deepspeed: {offload_optimizer: cpu}}", "optim.name=sgd"],
            "and the optimizer is sgd",
        ),
        (
            [
                "engine={name: deepspeed, deepspeed: {offload_optimizer: cpu}}",
                "optim={moments: bf16, args: {betas: [0.9, 0.95]}}",
            ],
            "Adam for the host keeps its moments in float32",
        ),
        (
            ["engine={name: deepspeed, deepspeed: {offload_optimizer: cpu}}", "optim.args={amsgrad: true}"],
            "knows no amsgrad",
        ),
        (["engine={name: deepspeed, deepspeed: {extra: {bf16: {}}}}"], "which precision of the run file says already"),
        (["engine={name: deepspeed, deepspeed: {extra: {sparse_gradients: true}}}"], "an operation that takes means"),
        (["compile=blocks"], "bigmodel has no repeated blocks to compile"),
        (["activation_checkpointing=full"], "bigmodel has no repeated blocks whose activations"),
        (["finetune.freeze_depth=1"], "finetune.freeze_depth counts in them"),
        (["finetune.new=[fc.*]"], "finetune.new is about the weights that a run begins with"),
        (["finetune={remap: {a.*: b.*}}"], "finetune.remap is about the weights that a run begins with"),
        (["finetune.min_coverage=0.5"], "finetune.min_coverage is about the weights that a run begins with"),
    ],
)
def test_it_is_refused(tmp_path: Path, changes: list[str], said: str) -> None:
    told = problems(tmp_path, *changes)
    assert said in told
    assert re.match(r"command line: |run.yaml:\d+: ", told)
    assert "  do: " in told


def test_the_line_of_the_file_is_named_and_all_is_told_at_once(tmp_path: Path) -> None:
    text = RUN_FILE.replace("bigmodel", "bigmodle").replace("size", "siez").replace("steps: 1", "stepz: 1")
    told = problems(tmp_path, text=text)
    assert "run.yaml:3: model.name: bigmodle is not a model" in told
    assert "run.yaml:6: data.args.siez: digits has no argument siez" in told
    assert "run.yaml:7: there is no key train.stepz" in told
    clash = problems(tmp_path, text=RUN_FILE + "precision: fp64\nengine: {name: deepspeed}\n")
    assert clash.startswith("run.yaml:8: precision: DeepSpeed reduces no")


def test_how_it_is_launched_is_no_matter_to_a_training_in_this_process(tmp_path: Path) -> None:
    assert problems(tmp_path, "engine.name=single", "launch.nproc=2", launched=False) == "ok"


def test_a_model_of_torchvision_without_its_prefix_is_understood(tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    file.write_text("task: classification\nmodel: resnet18\ndata: {name: digits}\ntrain: {steps: 1}\n")
    with pytest.raises(ConfigError) as caught:
        check(file)
    assert [problem.suggestions for problem in caught.value.problems] == [("torchvision/resnet18",)]


def test_no_evaluation_is_no_data_source(tmp_path: Path) -> None:
    assert problems(tmp_path, "data.eval=none") == problems(tmp_path, "data.eval=null") == "ok"


MODULE = """\
from dataclasses import dataclass
from functools import cache
raise RuntimeError("nobody may run this")

class Net:
    def __init__(self, width, *, depth: int = 2): ...

def data(split, folder="here"): ...

@cache
def hidden(anything): ...

@dataclass
class Made:
    size: int

if 1 < 2:
    def twice(a): ...
else:
    def twice(b): ...
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model={name: 'own_thing:Net', args: {width: 3}}", "ok"),
        ("model={name: 'own_thing:Nett', args: {width: 3}}", "did you mean: own_thing:Net\n"),
        ("model={name: 'own_thnig:Net'}", "there is no module own_thnig"),
        ("model={name: 'own_thing.net:Net'}", "there is no module own_thing.net"),
        ("model={name: 'own_thing:Net'}", "needs width"),
        ("model={name: 'own_thing:Net', args: {width: 3, dept: 1}}", "did you mean: depth"),
        ("data={name: 'own_thing:data', args: {folder: x, size: 3}}", "has no argument size"),
        ("data={name: 'own_thing:data', args: {folder: x}}", "ok"),
        ("data={name: 'own_thing:data', args: {split: x}}", "has no argument split"),
        ("model={name: 'own_thing:hidden', args: {x: 1}}", "ok"),  # only running it would tell
        ("model={name: 'own_thing:Made', args: {x: 1}}", "ok"),
        ("model={name: 'own_thing:twice', args: {x: 1}}", "ok"),
        ("model={name: 'own_thing:cache', args: {x: 1}}", "ok"),
        ("optim.name=torch.optim:Adafactor", "ok"),
        ("optim.name=torch.optim:Adafactro", "did you mean: torch.optim:Adafactor"),
        ("model={name: 'math:sin'}", "ok"),
        ("model={name: 'broken:Net'}", "ok"),
        ("track.trackers=['own_thing:Nett']", "track.trackers.0.name: the module own_thing has no Nett"),
    ],
)
def test_what_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, said: str) -> None:
    (tmp_path / "own_thing.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def Net(:\n")
    monkeypatch.chdir(tmp_path)
    told = problems(tmp_path, change, text=RUN_FILE.replace("  args: {size: 28}\n", ""))
    assert (told == "ok") if said == "ok" else (said in told + "\n"), told


def test_names_that_are_made_while_importing_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(
        ["from math import *\n", "def __getattr__(name): ...\n", "globals()['Net'] = int\n", "import own_none\n"]
    ):
        (tmp_path / f"dynamic{number}.py").write_text(text)
        told = problems(tmp_path, f"model={{name: 'dynamic{number}:Net'}}")
        assert (told == "ok") == (number < 3), text


@pytest.mark.parametrize("evaluation", ["none", "null", "{split: 0.2}", "{name: synthetic, args: {kind: regression}}"])
def test_what_is_evaluated_on_may_be_a_word_or_nothing(tmp_path: Path, evaluation: str) -> None:
    assert problems(tmp_path, f"data.eval={evaluation}") == "ok"


def test_every_run_file_of_the_project_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    for path in Path("configs").glob("*.yaml"):
        assert check(path, launched=True).config == load(path).config


def test_it_takes_an_instant(tmp_path: Path) -> None:
    """Reading a library's source is allowed, importing it is not; the bound is loose, as machines are busy."""
    (tmp_path / "run.yaml").write_text(
        RUN_FILE.replace("bigmodel", "torchvision/resnet18") + "optim: {name: adamw, args: {betas: [0.9, 0.95]}}\n"
    )
    script = (
        "import sys, time\nbegin = time.perf_counter()\n"
        "from bigtrain.config.loader import check\n"
        "check('run.yaml', ['data.transforms.train=[RandomHorizontalFlip]'])\n"
        "print(time.perf_counter() - begin, sorted({'torch', 'torchvision', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    seconds, imported = done.stdout.split(maxsplit=1)
    assert imported.strip() == "[]"
    assert float(seconds) < 4
