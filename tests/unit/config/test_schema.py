"""What the schema promises about itself: help, defaults that fit, immutability, checks across keys."""

import re

import pytest
from pydantic import ValidationError

from bigtrain.config.fields import Named, Section
from bigtrain.config.json_schema import json_schema
from bigtrain.config.keys import all_keys, field_at, keys_at, kind_of, sections_in
from bigtrain.config.nearest import keys_below
from bigtrain.config.schema import Config, Data, HeldOut, Optim, Schedule, Train
from bigtrain.errors import ConfigError

SMALLEST = {"task": "classification", "model": "bigmodel", "data": {"name": "digits"}, "train": {"epochs": 1}}

VOCABULARY = re.findall(
    r"\S+",
    """
base run.name run.dir run.seed run.deterministic run.threads task.name task.args model.name model.args
data.name data.args data.eval.split data.eval.name data.eval.args data.split_seed data.batch_size data.workers
data.transforms.train[].name data.transforms.eval[].args
train.epochs train.steps train.micro_batch_size
optim.name optim.lr optim.weight_decay optim.clip_grad_norm optim.args optim.decay_norms_and_biases
optim.groups[].match optim.groups[].lr optim.groups[].weight_decay
optim.schedule.name optim.schedule.warmup_steps optim.schedule.unit optim.schedule.step_size
optim.schedule.gamma optim.schedule.decay optim.schedule.min_factor
engine.name engine.device engine.fsdp.shard_size engine.fsdp.reshard_after_forward engine.fsdp.cpu_offload
engine.deepspeed.stage engine.deepspeed.offload_optimizer engine.deepspeed.offload_params engine.deepspeed.extra
precision compile activation_checkpointing.every
finetune.init_from finetune.freeze finetune.freeze_depth finetune.freeze_batchnorm finetune.unfreeze[].at_epoch
finetune.unfreeze[].at_step finetune.unfreeze[].match finetune.unfreeze[].lr_scale finetune.layer_decay
checkpoint.every_steps checkpoint.every_minutes checkpoint.at_end checkpoint.keep checkpoint.keep_every
checkpoint.background checkpoint.resume checkpoint.weights checkpoint.on_full
eval.every_epochs eval.every_steps eval.max_batches
track.log_every track.progress track.wandb.mode track.wandb.project track.wandb.entity track.wandb.group
track.wandb.tags track.wandb.upload_checkpoints track.tensorboard track.trackers track.report
health.hang_timeout_s health.startup_timeout_s health.on_nonfinite profile.steps
launch.target launch.nproc launch.nodes launch.profile launch.max_restarts
""",
)


def sections(section: type[Section] = Config) -> set[type[Section]]:
    inside = {s for field in section.model_fields.values() for s in sections_in(field.annotation)}
    return {section}.union(*map(sections, inside))


def test_every_key_of_the_vocabulary_exists():
    assert set(VOCABULARY) <= {key.path for key in all_keys()}


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.path)
def test_every_key_has_a_sentence_of_help(key):
    assert len(key.help.split()) >= 3
    assert key.help.endswith(".")
    assert "\n" not in key.help
    assert len(key.help) < 120


def test_every_section_has_a_docstring():
    assert not [section.__name__ for section in sections() if not section.__doc__]


def test_defaults_fit():
    config = Config.model_validate(SMALLEST)
    assert Config.model_validate(config.model_dump()) == config


def test_a_config_is_immutable_and_refuses_what_it_does_not_know():
    config = Config.model_validate(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        config.precision = "fp64"
    with pytest.raises(ValidationError, match="lrr"):
        Optim(lrr=1.0)


def test_names_are_the_same_with_and_without_arguments():
    config = Config.model_validate({**SMALLEST, "task": {"name": "classification"}})
    assert config.task == Named(name="classification") == Config.model_validate(SMALLEST).task


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ("none", "none"),
        (None, "none"),
        ({"split": 0.2}, HeldOut(split=0.2)),
        ("digits", Named(name="digits")),
        ({"name": "pkg.mod:factory", "args": {"size": 3}}, Named(name="pkg.mod:factory", args={"size": 3})),
    ],
)
def test_the_shapes_of_evaluation_data(given, means):
    assert Data.model_validate({"name": "digits", "eval": given}).eval == means


def test_an_empty_section_is_that_section_with_its_defaults():
    assert Config.model_validate({**SMALLEST, "optim": None}).optim == Optim()


@pytest.mark.parametrize("given", [{"epochs": 3}, {"steps": 3}])
def test_one_of_epochs_and_steps(given):
    assert Train.model_validate(given)


@pytest.mark.parametrize("given", [{}, {"epochs": 3, "steps": 3}, {"epochs": None}])
def test_not_none_and_not_both_of_epochs_and_steps(given):
    with pytest.raises(ValidationError, match=r"epochs|how long"):
        Train.model_validate(given)


KEYS_OF_SHAPES = {
    "constant": {},
    "step": {"step_size": 3, "gamma": 0.5, "unit": "epoch"},
    "linear": {"min_factor": 0.1, "unit": "epoch"},
    "cosine": {"min_factor": 0.1, "unit": "step"},
    "wsd": {"min_factor": 0.1, "unit": "step", "decay": 0.3},
}
ALL_SHAPE_KEYS = {key: value for keys in KEYS_OF_SHAPES.values() for key, value in keys.items()}


@pytest.mark.parametrize("name", KEYS_OF_SHAPES)
def test_a_schedule_takes_its_own_keys_and_refuses_the_others(name):
    own = KEYS_OF_SHAPES[name]
    made = Schedule.model_validate({"name": name, "warmup_steps": 5, **own})
    assert {key: getattr(made, key) for key in own} == own
    assert made.model_dump().keys() == {"name", "warmup_steps", *own}
    for key in ALL_SHAPE_KEYS.keys() - own.keys():
        with pytest.raises(ValidationError, match=f"means nothing to the schedule {name}"):
            Schedule.model_validate({"name": name, **own, key: ALL_SHAPE_KEYS[key]})


def test_the_step_schedule_has_to_say_when():
    with pytest.raises(ValidationError, match="when to step"):
        Schedule(name="step", gamma=0.5)


def test_what_a_key_takes_reads_well():
    takes = {key.path: key.kind for key in all_keys()}
    assert takes["run.threads"] == "auto | int > 0"
    assert takes["data.eval.split"] == "number > 0, < 1"
    assert takes["optim.groups[].match"] == "text | list of at least 1 text"
    assert takes["profile.steps"] == "list of 2 int >= 0"
    assert takes["compile"] == "none | blocks | model | {scope, fullgraph}"
    assert takes["checkpoint.weights"] == "auto | all | trainable"
    assert takes["data.eval"] == "none | {split} | name | {name, args}"
    assert takes["finetune.layer_decay"] == "number > 0, < 1 | null"
    assert kind_of(bool) == "true | false"


def test_keys_below():
    assert [key.path for key in keys_below("train")] == [
        "train",
        "train.epochs",
        "train.steps",
        "train.micro_batch_size",
    ]
    assert [key.path for key in keys_below("optim.groups")][1] == "optim.groups[].match"
    assert len(keys_below("")) == len(all_keys())
    with pytest.raises(ConfigError, match="there is no key optm") as caught:
        keys_below("optm")
    assert caught.value.problems[0].suggestions[0] == "optim"


def test_keys_of_a_place_with_several_shapes():
    assert {key.name for key in keys_at(("data", "eval"))} == {"split", "name", "args"}
    assert field_at(("optim", "groups", 0, "lr")) is not None
    assert field_at(("optim", "nothing")) is None


def test_the_json_schema_tells_as_much_as_the_keys_do():
    schema = json_schema()
    described = {
        (definition["title"], name): value["description"]
        for definition in (schema, *(d.get("anyOf", [d])[-1] for d in schema["$defs"].values()))
        for name, value in definition["properties"].items()
    }
    assert not [key for key, text in described.items() if not text]
    assert described["Optim", "lr"] == "The learning rate, before the schedule's factor."
    assert {"type": "string"} in schema["$defs"]["Named"]["anyOf"]
    assert {"base", "run", "launch"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
