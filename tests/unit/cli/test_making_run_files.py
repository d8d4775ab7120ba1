"""Run files that are made: `bigtrain init` and `bigtrain convert`, each checked by the loader, and trained with."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.config.combinations import clashes
from bigtrain.config.keys import all_keys
from bigtrain.config.loader import from_dict, load
from bigtrain.config.starting_files import KINDS, starting_file
from bigtrain.config.training import HeldOut
from bigtrain.convert import KINDS as CONVERTED
from bigtrain.convert import convert
from bigtrain.errors import UserError
from tests.helpers import hugging_face as made

ROOT = Path(__file__).parents[3]


def bigtrain(folder: Path, *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "bigtrain", *arguments]
    path = {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("kind", KINDS)
def test_every_run_file_to_start_from_loads_and_every_key_has_its_help(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(starting_file(kind))
    assert load(path).config.model_dump()["model"]["name"] == KINDS[kind].values["model"]["name"]
    lines = path.read_text().splitlines()
    for above, line in pairwise(lines):
        if re.match(r" *\w+:", line):
            assert above.lstrip().startswith("#"), line
    helps = " ".join(key.help for key in all_keys())
    assert "The learning rate, before the schedule's factor." in helps


@pytest.mark.parametrize("kind", KINDS)
def test_the_warmup_of_a_run_file_to_start_from_is_less_than_half_of_a_small_run(kind: str) -> None:
    config = from_dict(KINDS[kind].values).config
    samples = 1797 if config.data.name == "digits" else 500
    held_out = config.data.eval.split if isinstance(config.data.eval, HeldOut) else 0.0
    an_epoch = math.ceil(samples * (1 - held_out) / config.data.batch_size)
    steps = config.train.steps or (config.train.epochs or 0) * an_epoch
    assert 2 * config.optim.schedule.warmup_steps < steps


def test_init_writes_lists_and_replaces_nothing(tmp_path: Path) -> None:
    assert "language-model" in bigtrain(tmp_path, "init")
    out = bigtrain(tmp_path, "init", "digits")
    assert "bigtrain config check run.yaml" in out
    assert "run.yaml is there already" in bigtrain(tmp_path, "init", "digits", code=2)
    bigtrain(tmp_path, "init", "language-model", "--force")
    assert "causal_lm" in (tmp_path / "run.yaml").read_text()
    assert "did you mean language-model?" in bigtrain(tmp_path, "init", "languge-model", "-o", "x.yaml", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_run_file_to_start_from_trains(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    (tmp_path / "run.yaml").write_text(starting_file(kind))
    (tmp_path / "my_code.py").write_text("from torch import nn\ndef make_model(): return nn.Linear(16, 1)\n")
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        for sample in range(3):
            Image.new("RGB", (50, 40), (20 * number, 90 * sample, 7)).save(tmp_path / f"images/{number}/{sample}.png")
    made.bert(tmp_path / "encoder", kind="BertModel")
    rows = [{"text": f"so {word}", "label": word} for word in ("good", "bad")] * 10
    made.write_rows(tmp_path / "texts.csv", rows)
    made.llama(tmp_path / "decoder", max_position_embeddings=1024)
    made.chats(tmp_path / "conversations.jsonl", 60)
    changes = ["train.epochs=null", "train.steps=2", "data.batch_size=8", "eval.max_batches=1", "data.workers=0"]
    schedule = [] if kind == "regression" else ["optim.schedule.warmup_steps=1"]
    bigtrain(tmp_path, "train", "run.yaml", *changes, *schedule, "engine.device=cpu")
    assert (tmp_path / "runs/run/report.html").exists()


# ------------------------------------------------------------------------------------------------------- convert


def converted(folder: Path, name: str, values: dict[str, Any], **options: Any) -> Any:
    path = folder / name
    path.write_text(json.dumps(values) if name.endswith("json") else yaml.safe_dump(values))
    found = convert(path, **options)
    text = folder / "out.yaml"
    text.write_text(found.text())
    return found, load(text).config


DEEPSPEED = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 8,
    "bf16": {"enabled": True},
    "gradient_clipping": 0.5,
    "steps_per_print": 10,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "nvme"},
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100, "total_num_steps": 2000}},
    "comms_logger": {"enabled": False},
}


def test_deepspeed(tmp_path: Path) -> None:
    found, config = converted(tmp_path, "ds.json", DEEPSPEED)
    assert found.kind == "deepspeed"
    deepspeed = config.engine.deepspeed
    assert (config.engine.name, deepspeed.stage, deepspeed.offload_optimizer) == ("deepspeed", 3, "cpu")
    assert deepspeed.extra == {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": False}}
    assert (config.data.batch_size, config.train.micro_batch_size, config.train.steps) == (64, 4, 2000)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_grad_norm) == (3e-4, 0.1, 0.5)
    assert config.optim.args == {"betas": [0.9, 0.95], "eps": 1e-8}
    assert (config.optim.schedule.name, config.optim.schedule.warmup_steps) == ("linear", 100)
    assert config.precision == "bf16"
    assert set(found.left) == {
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_param.device",
        "zero_optimization.reduce_bucket_size",
        "scheduler.params.warmup_type",
        "steps_per_print",
    }


def test_what_cannot_be_handed_on_to_deepspeed_is_not(tmp_path: Path) -> None:
    """The run file is taken as it comes out, and says of every key that it leaves out why."""
    values = {
        **{key: value for key, value in DEEPSPEED.items() if key != "zero_optimization"},
        "zero_optimization": {"stage": 2, "round_robin_gradients": True, "overlap_comm": True},
        "prescale_gradients": False,
        "communication_data_type": "fp16",
        "tensorboard": {"enabled": True, "output_path": "logs"},
        "wandb": {"enabled": True, "project": "mine", "team": "ours"},
        "zero_allow_untested_optimizer": True,
    }
    found, config = converted(tmp_path, "ds.json", values)
    assert [clash.text for clash in clashes(config, launched=False)] == []
    assert config.track.tensorboard
    assert (config.track.wandb.project, config.track.wandb.entity) == ("mine", "ours")
    assert set(found.left) >= {
        *("zero_optimization.round_robin_gradients", "prescale_gradients", "communication_data_type"),
        *("tensorboard.output_path", "zero_allow_untested_optimizer"),
    }
    assert config.engine.deepspeed.extra["zero_optimization"] == {"overlap_comm": True}


def test_what_is_left_out_of_a_configuration_is_its_librarys_default(tmp_path: Path) -> None:
    """transformers 5.24: 5e-5, 0.0, 1.0; DeepSpeed 0.19.8: no decay, no clipping."""
    _, config = converted(tmp_path, "args.json", {"output_dir": "out", "per_device_train_batch_size": 4})
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_grad_norm) == (5e-5, 0.0, 1.0)
    bare = {"train_batch_size": 8, "zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {}}}
    _, config = converted(tmp_path, "ds.json", bare)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_grad_norm) == (1e-3, 0.0, None)


def test_deepspeed_of_transformers_is_mostly_auto(tmp_path: Path) -> None:
    values = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Lamb", "params": {"lr": "auto"}},
        "scheduler": {"type": "OneCycle", "params": {}},
    }
    found, config = converted(tmp_path, "ds.json", values)
    assert config.engine.deepspeed.stage == 2
    assert {"train_batch_size", "optimizer.type", "optimizer.params.lr", "scheduler.type", "fp16"} <= found.left.keys()


@pytest.mark.parametrize(
    ("kind", "params", "name"),
    [
        ("Adam", {}, "adamw"),
        ("Adam", {"adam_w_mode": True, "torch_adam": True}, "adamw"),
        ("Adam", {"adam_w_mode": False}, "adam"),
        ("AdamW", {"adam_w_mode": False}, "adamw"),
    ],
)
def test_an_adam_of_deepspeed_decays_as_adamw_unless_it_says_otherwise(
    tmp_path: Path, kind: str, params: dict[str, Any], name: str
) -> None:
    """ADAM_W_MODE_DEFAULT in runtime/config.py, and _configure_basic_optimizer in runtime/engine.py, of 0.19.8."""
    optimizer = {"type": kind, "params": {"weight_decay": 0.1, **params}}
    found, config = converted(tmp_path, "ds.json", {"train_batch_size": 8, "bf16": {}, "optimizer": optimizer})
    assert (config.optim.name, config.optim.weight_decay, found.left) == (name, 0.1, {})


ACCELERATE = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_machines": 2,
    "num_processes": 16,
    "use_cpu": False,
    "machine_rank": 0,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": False,
        "fsdp_offload_params": True,
        "fsdp_activation_checkpointing": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    },
}


def test_accelerate(tmp_path: Path) -> None:
    values = from_dict(converted(tmp_path, "acc.yaml", {**ACCELERATE, "num_machines": 1})[0].whole()).config
    assert (values.engine.name, values.launch.nproc) == ("fsdp", 16)
    assert (values.engine.fsdp.reshard_after_forward, values.engine.fsdp.cpu_offload) == (False, True)
    assert (values.precision, values.activation_checkpointing) == ("bf16", "full")
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(ACCELERATE))
    found = convert(path)
    launch = from_dict(found.whole()).config.launch
    assert (launch.target, launch.nodes, launch.nproc) == ("slurm", 2, 8)
    assert found.left["fsdp_config.fsdp_auto_wrap_policy"].startswith("the model's blocks are found")
    assert "machine_rank" in found.left


@pytest.mark.parametrize(
    ("values", "engine"),
    [
        ({"distributed_type": "NO"}, "single"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 4}, "ddp"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}}, "ddp"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1, "gradient_clipping": 1.0}},
            "deepspeed",
        ),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"x": 1}}, "auto"),
    ],
)
def test_engines_of_accelerate(tmp_path: Path, values: dict[str, Any], engine: str) -> None:
    found, config = converted(tmp_path, "acc.yaml", values)
    assert config.engine.name == engine
    assert ("distributed_type" in found.left) == (engine == "auto")


def test_training_arguments_as_transformers_writes_them() -> None:
    """training_arguments.json is what transformers 5.24 wrote with `to_json_string`."""
    path = Path(__file__).parent / "training_arguments.json"
    found = convert(path, processes=8)
    whole = found.whole()
    assert whole.pop("checkpoint") == {"keep": 2, "every_steps": 400}
    values = from_dict(whole).config
    assert (values.data.batch_size, values.train.micro_batch_size, values.train.epochs) == (64, 4, 2)
    assert (values.optim.name, values.optim.lr, values.optim.weight_decay) == ("adamw", 5e-5, 0.1)
    assert (values.optim.schedule.name, values.optim.schedule.warmup_steps) == ("cosine", 50)
    assert (values.optim.clip_grad_norm, values.run.seed, values.data.workers) == (0.7, 7, 3)
    assert values.optim.args == {"eps": 1e-8, "betas": [0.9, 0.999]}
    assert (values.eval.every_steps, values.track.log_every) == (100, 25)
    assert (values.track.tensorboard, values.track.wandb.mode) == (True, "disabled")
    assert values.activation_checkpointing == "full"
    assert "neftune_noise_alpha" in found.left
    # What was left at its default is not listed as lost.
    assert len(found.left) <= 6, found.left


def test_nothing_of_training_arguments_is_lost_without_a_word(tmp_path: Path) -> None:
    values = {
        "per_device_train_batch_size": 4,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "fsdp": "shard_grad_op auto_wrap offload",
        "fsdp_config": {"activation_checkpointing": True},
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.3},
        "optim_args": "eps=1",
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "save_steps": 0.25,
        "metric_for_best_model": "f1",
    }
    found, config = converted(tmp_path, "args.json", {**values, "max_steps": 1001})
    assert config.optim.args == {"eps": 1e-6, "betas": [0.9, 0.95]}
    fsdp = config.engine.fsdp
    assert (config.engine.name, fsdp.cpu_offload, fsdp.reshard_after_forward) == ("fsdp", True, False)
    assert (config.eval.every_steps, config.checkpoint.every_steps) == (101, 251)
    others = {"fsdp_config", "lr_scheduler_kwargs", "optim_args", "metric_for_best_model"}
    assert found.left.keys() == others
    found, config = converted(tmp_path, "args.json", values)
    assert found.left.keys() == others | {"eval_steps", "save_steps"}
    assert config.eval.every_steps is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", b"{", "is neither JSON nor YAML"),
        ("x.yaml", b"- 1\n", "holds no keys"),
        ("x.json", b'{"a": 1}', "looks like no configuration that is known"),
        ("x.json", b'{"zero_optimization": 3}', "holds a value of another form than deepspeed has"),
        ("x.json", b'{"zero_optimization": {}, "gradient_clipping": "some"}', "gradient_clipping is 'some'"),
        ("x.json", b'{"zero_optimization": {"offload_param": [1]}}', "offload_param is [1], which is no section"),
        ("x.json", b'{"learning_rate": 1, "warmup_ratio": Infinity}', "warmup_ratio is inf"),
        ("x.json", b'{"learning_rate": 1, "report_to": 3}', "report_to is 3, which is no list of names"),
        ("x.json", b"[" * 100_000, "is neither JSON nor YAML"),
        ("x.yaml", b"zero_optimization: {}\n1: 2\n", "holds no keys"),
        ("training_args.bin", b"\x80\x02\xff\xfe", "a pickle such as training_args.bin is not read"),
    ],
)
def test_what_is_no_configuration_is_said(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)):
        convert(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read"):
        convert(tmp_path / "nothing.json")


OTHER_FORMS: list[Any] = ["x", "auto", 0, -3, 1.5, math.inf, math.nan, True, None, [], [1], ["x"], {}, {"x": 1}]


@pytest.mark.parametrize("kind", CONVERTED)
def test_a_value_of_any_form_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    arguments = json.loads((Path(__file__).parent / "training_arguments.json").read_text())
    values = {"deepspeed": DEEPSPEED, "accelerate": ACCELERATE, "training-arguments": arguments}[kind]
    path = tmp_path / "x.json"
    places = [(values, key) for key in values]
    places += [(part, key) for part in values.values() if isinstance(part, dict) for key in part]
    for place, key in places:
        was = place[key]
        for place[key] in OTHER_FORMS:
            path.write_text(json.dumps(values))
            with suppress(UserError):
                from_dict(convert(path, kind=kind).whole())
        place[key] = was


def test_a_mistake_of_our_own_is_not_taken_for_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(values: Any, found: Any, processes: int) -> None:
        raise TypeError("a mistake of our own")

    monkeypatch.setitem(CONVERTED, "deepspeed", broken)
    (tmp_path / "x.json").write_text(json.dumps(DEEPSPEED))
    with pytest.raises(TypeError, match="of our own"):
        convert(tmp_path / "x.json")


def test_the_command_prints_or_writes_a_run_file(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    text = bigtrain(tmp_path, "convert", "ds.json")
    assert yaml.safe_load(text)["engine"]["name"] == "deepspeed"
    out = bigtrain(tmp_path, "convert", "ds.json", "-o", "run.yaml")
    assert "no equivalent: steps_per_print: track.log_every decides what is logged" in out
    assert (tmp_path / "run.yaml").read_text() == text
    assert "is there already" in bigtrain(tmp_path, "convert", "ds.json", "-o", "run.yaml", code=2)
