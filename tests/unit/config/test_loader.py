"""Reading run files: layers, overrides, origins, and going there and back."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.loader import Change, diff, dump, from_dict, load, values
from bigtrain.config.schema import HeldOut, Named
from bigtrain.errors import ConfigError

SMALLEST = {"task": "classification", "model": "bigmodel", "data": {"name": "digits"}, "train": {"epochs": 5}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the current directory, which is an empty one."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text(text)
        return name

    return write


RUN = """\
task: classification
model: bigmodel
data:
  name: digits
train: {epochs: 5}
"""


def test_a_small_file_is_enough(write):
    resolved = load(write("small.yaml", RUN))
    config = resolved.config
    assert config.task == Named(name="classification")
    assert config.train.epochs == 5
    assert config.run.name == "small"
    assert resolved.path == Path("small.yaml")
    assert resolved.origin["data.name"] == "small.yaml:4"
    assert resolved.origin["task.name"] == "small.yaml:1"
    assert resolved.origin["task.args"] == "default"
    assert resolved.origin["run.name"] == "default"
    assert resolved.origin["optim.lr"] == "default"
    assert resolved.origin.keys() == values(config).keys()


def test_precedence_is_command_line_then_file_then_base_then_default(write):
    write("base.yaml", "optim: {lr: 1, weight_decay: 1, clip_grad_norm: 1}\nrun: {seed: 1}\n")
    path = write("runs/mine.yaml", RUN + "base: ../base.yaml\noptim: {lr: 2, weight_decay: 2}\n")
    resolved = load(path, ["optim.lr=3"])
    optim = resolved.config.optim
    assert (optim.lr, optim.weight_decay, optim.clip_grad_norm, optim.name) == (3, 2, 1, "adamw")
    assert resolved.origin["optim.lr"] == "command line"
    assert resolved.origin["optim.weight_decay"] == "runs/mine.yaml:7"
    assert resolved.origin["optim.clip_grad_norm"] == "base runs/../base.yaml:1"
    assert resolved.origin["run.seed"] == "base runs/../base.yaml:2"
    assert resolved.origin["optim.name"] == "default"


def test_a_file_may_lack_what_its_base_has(write):
    write("base.yaml", RUN)
    assert load(write("mine.yaml", "base: base.yaml\nrun: {name: x}\n")).config.run.name == "x"


def test_the_name_of_a_run_is_that_of_its_file_unless_given(write):
    path = write("deep/small.v2.yaml", RUN)
    assert load(path).config.run.name == "small.v2"
    assert load(path, ["run.name="]).config.run.name == "small.v2"
    assert load(path, ["run.name=other"]).config.run.name == "other"
    assert from_dict(SMALLEST).config.run.name == "run"
    assert load(write("empty.yaml", RUN + "run:\n")).config.run.name == "empty"


@pytest.mark.parametrize("other", ["train: {steps: 7}", "train: {steps: 7, micro_batch_size: 2}"])
def test_steps_and_epochs_clear_each_other_over_layers(write, other):
    write("base.yaml", RUN)
    train = load(write("mine.yaml", f"base: base.yaml\n{other}\n")).config.train
    assert (train.steps, train.epochs) == (7, None)
    train = load("mine.yaml", ["train.epochs=2"]).config.train
    assert (train.steps, train.epochs) == (None, 2)
    train = load("mine.yaml", ["train={epochs: 2}"]).config.train
    assert (train.steps, train.epochs) == (None, 2)


def test_steps_and_epochs_of_one_layer_are_an_error(write):
    path = write("mine.yaml", RUN)
    with pytest.raises(ConfigError, match=r"cannot stand beside train\.epochs"):
        load(path, ["train.steps=1", "train.epochs=2"])
    assert load(path, ["train.steps=1", "train.epochs=null"]).config.train.steps == 1


def test_evaluation_by_steps_replaces_that_by_epochs():
    by_epochs = {**SMALLEST, "eval": {"every_epochs": 2}}
    assert from_dict(SMALLEST).config.eval.every_epochs == 1
    for run in (SMALLEST, by_epochs):
        config = from_dict(run, ["eval.every_steps=50"]).config
        assert (config.eval.every_steps, config.eval.every_epochs) == (50, None)
    assert from_dict(by_epochs, ["eval.every_epochs=null"]).config.eval.every_epochs is None
    with pytest.raises(ConfigError, match=r"cannot stand beside eval\.every_epochs"):
        from_dict({**SMALLEST, "eval": {"every_epochs": 1, "every_steps": 5}})


def test_evaluation_data_replace_each_other_over_layers():
    held_out = {**SMALLEST, "data": {"name": "digits", "eval": {"split": 0.3}}}
    assert from_dict(held_out, ["data.eval.name=other"]).config.data.eval == Named(name="other")
    named = {**SMALLEST, "data": {"name": "digits", "eval": {"name": "other", "args": {"a": 1}}}}
    assert from_dict(named, ["data.eval.split=0.3"]).config.data.eval == HeldOut(split=0.3)
    assert from_dict(named, ["data.eval=none"]).config.data.eval == "none"
    nothing = {**SMALLEST, "data": {"name": "digits", "eval": "none"}}
    assert from_dict(nothing, ["data.eval.split=0.3"]).config.data.eval == HeldOut(split=0.3)


def test_maps_merge_and_lists_are_replaced():
    run = {
        **SMALLEST,
        "model": {"name": "gpt", "args": {"layers": 2, "rope": {"theta": 1, "scale": 2}, "sizes": [1, 2]}},
        "optim": {"groups": [{"match": "a*", "lr": 1}, {"match": ["b*"], "lr": 2}]},
    }
    assert from_dict(run, ["model.args.rope.theta=7"]).config.model.args == {
        "layers": 2,
        "rope": {"theta": 7, "scale": 2},
        "sizes": [1, 2],
    }
    assert from_dict(run, ["model.args.sizes=[5]"]).config.model.args["sizes"] == [5]
    assert len(from_dict(run, ["optim.groups=[{match: c, lr: 1}]"]).config.optim.groups) == 1
    assert from_dict(run, ["model=simple_cnn"]).config.model == Named(name="simple_cnn")


def test_an_override_reaches_into_a_list():
    run = {**SMALLEST, "optim": {"groups": [{"match": "a*", "lr": 1}, {"match": ["b*"], "lr": 2}]}}
    resolved = from_dict(run, ["optim.groups.1.lr=0.5", "model.args.x=1"])
    assert [group.lr for group in resolved.config.optim.groups] == [1, 0.5]
    assert resolved.origin["optim.groups.1.lr"] == "command line"
    assert resolved.origin["optim.groups.1.match"] == "config"
    with pytest.raises(ConfigError, match=r"optim\.groups\.2: the list has 2 items, counted from 0"):
        from_dict(run, ["optim.groups.2.lr=0.5"])
    with pytest.raises(ConfigError, match=r"optim\.groups: .* does not fit"):
        from_dict(SMALLEST, ["optim.groups={0: {lr: 1}}", "optim.groups.x.lr=1"])


def test_a_name_grows_arguments():
    resolved = from_dict(SMALLEST, ["task.args.label_smoothing=0.1"])
    assert resolved.config.task == Named(name="classification", args={"label_smoothing": 0.1})
    assert resolved.origin["task.name"] == "config"
    schedule = from_dict({**SMALLEST, "optim": {"schedule": "cosine"}}, ["optim.schedule.warmup_steps=9"]).config
    assert (schedule.optim.schedule.name, schedule.optim.schedule.warmup_steps) == ("cosine", 9)


def test_an_engine_or_optimizer_is_a_word_which_leaves_the_rest_of_its_section_alone():
    for overrides in (
        ["engine=deepspeed", "engine.deepspeed.stage=2"],
        ["engine.deepspeed.stage=2", "engine=deepspeed"],
    ):
        engine = from_dict(SMALLEST, overrides).config.engine
        assert (engine.name, engine.deepspeed.stage) == ("deepspeed", 2), overrides
    file = {**SMALLEST, "engine": "ddp", "optim": {"lr": 2, "args": {"momentum": 0.9}}}
    config = from_dict(file, ["optim=sgd", "engine.device=cpu"]).config
    assert (config.optim.name, config.optim.lr, config.optim.args) == ("sgd", 2, {"momentum": 0.9})
    assert (config.engine.name, config.engine.device) == ("ddp", "cpu")
    assert from_dict(file, ["task=regression"]).config.task == Named(name="regression")


def test_values_of_overrides_are_yaml():
    overrides = [
        "run.name='1e-3'",
        "optim.lr=1e-3",
        "optim.clip_grad_norm=null",
        "finetune.freeze=[a.*, b]",
        "run.dir=a=b",
    ]
    config = from_dict(SMALLEST, overrides).config
    assert (config.run.name, config.optim.lr, config.optim.clip_grad_norm) == ("1e-3", 0.001, None)
    assert config.finetune.freeze == ("a.*", "b")
    assert config.run.dir == "a=b"


def test_a_file_that_is_not_there_is_answered_with_the_run_files_that_are(tmp_path):
    (tmp_path / "quick.yaml").touch()
    (tmp_path / ".hidden.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "quikc.yaml")
    assert caught.value.problems[0].suggestions == (str(tmp_path / "quick.yaml"),)
    assert ".hidden" not in caught.value.problems[0].remedy


def test_the_later_of_two_overrides_holds():
    assert from_dict(SMALLEST, ["optim.lr=1", "optim.lr=2"]).config.optim.lr == 2


def test_dump_reads_well_and_loads_back(write):
    run = {
        **SMALLEST,
        "run": {"name": "1e-3"},
        "optim": {"lr": 1e-05, "schedule": {"name": "step", "step_size": 3}, "groups": [{"match": "a*", "lr": 1e300}]},
        "model": {"name": "m", "args": {"words": ["on", "yes", "null", "0o7", "1e-3", "12:30", "", "é✓", "a: b #c"]}},
    }
    config = from_dict(run).config
    text = dump(config)
    assert load(write("dumped.yaml", text)).config == config
    assert "train: {epochs: 5, steps: null, micro_batch_size: null}\n" in text
    assert text.index("run:") < text.index("task:") < text.index("launch:")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(), inside, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_any_arguments_go_through_yaml_and_come_back(tmp_path_factory, args):
    config = from_dict({**SMALLEST, "run": {"name": "x"}, "model": {"name": "m", "args": args}}).config
    path = tmp_path_factory.getbasetemp() / "arguments.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path).config == config


def test_diff_names_what_changed():
    before = from_dict({**SMALLEST, "optim": {"groups": [{"match": "a", "lr": 1}]}}).config
    after = from_dict(SMALLEST, ["optim.lr=2", "optim.schedule=cosine", "model.args.x=1"]).config
    assert diff(before, before) == []
    assert diff(before, after) == [
        Change("model.args", {}, None),
        Change("optim.lr", 0.001, 2.0),
        Change("optim.groups.0.match", ("a",), None),
        Change("optim.groups.0.lr", 1.0, None),
        Change("optim.schedule.name", "constant", "cosine"),
        Change("model.args.x", None, 1),
        Change("optim.groups", None, ()),
        Change("optim.schedule.unit", None, "step"),
        Change("optim.schedule.min_factor", None, 0.0),
    ]


def test_every_run_file_of_the_repository_loads():
    files = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        assert load(file).config.run.name == file.stem
