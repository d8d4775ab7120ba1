"""What a user is told: every problem at once, where it is, what was meant."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config.keys import all_keys
from bigtrain.config.loader import from_dict, load
from bigtrain.config.nearest import OURS, distance, nearest_keys, nearest_words
from bigtrain.errors import ConfigError

SMALLEST = {"task": "classification", "model": "bigmodel", "data": {"name": "digits"}, "train": {"epochs": 5}}


def problems_of(values, overrides=()):
    with pytest.raises(ConfigError) as caught:
        from_dict(values, overrides)
    return caught.value.problems


def problem_of(values, overrides=()):
    problems = problems_of(values, overrides)
    assert len(problems) == 1, problems
    return problems[0]


# ---------------------------------------------------------------------------------------------- misspelt keys


def typos(word):
    """Every word that one deletion, substitution, insertion or swap of neighbours makes of a word."""
    letters = string.ascii_lowercase + "_"
    places = range(len(word))
    made = {word[:i] + word[i + 1 :] for i in places}
    made |= {word[:i] + letter + word[i + 1 :] for i in places for letter in letters}
    made |= {word[:i] + letter + word[i:] for i in range(len(word) + 1) for letter in letters}
    made |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    return made - {word}


def section_with(parent, keys):
    """A run file that holds these keys in the section at a path."""
    place = dict.fromkeys(keys, 1)
    for part in reversed(parent.split(".") if parent else []):
        place = {part.removesuffix("[]"): [place] if part.endswith("[]") else place}
    return place


def test_every_typo_of_every_key_is_refused_and_understood():
    tried = understood = 0
    for key in all_keys():
        parent = key.path.rpartition(".")[0]
        given = typos(key.name)
        prefix = parent.replace("[]", ".0") + "." if parent else ""
        told = {problem.key: problem for problem in problems_of(section_with(parent, given))}
        assert {prefix + word for word in given} <= told.keys()
        for word in given:
            problem = told[prefix + word]
            assert problem.text == f"there is no key {prefix}{word}"
            assert problem.key not in problem.suggestions
            tried += 1
            understood += problem.suggestions[:1] == (prefix + key.name,)
    assert tried > 40_000
    assert understood / tried >= 0.95, f"{understood} of {tried}"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "optim.lr"),
        ("batch_size", "data.batch_size"),
        ("epochs", "train.epochs"),
        ("optimizer", "optim"),
        ("dataset", "data"),
        ("learning_rate", "optim.lr"),
        ("Seed", "run.seed"),
        ("weight-decay", "optim.weight_decay"),
        ("gradient_accumulation_steps", "train.micro_batch_size"),
        ("accumulate_grad_batches", "train.micro_batch_size"),
        ("gradient_clip_val", "optim.clip_grad_norm"),
        ("max_epochs", "train.epochs"),
        ("gradient_checkpointing", "activation_checkpointing"),
    ],
)
def test_a_key_in_the_wrong_place_or_by_another_name_is_found(given, meant):
    problem = problem_of({**SMALLEST, given: 1})
    assert meant in problem.suggestions
    assert any(line.strip().startswith(meant) for line in problem.remedy.splitlines())


def test_what_others_call_a_key_is_no_key_of_ours_and_leads_to_one():
    paths = {key.path for key in all_keys()}
    assert set(OURS.values()) <= paths
    assert not OURS.keys() & {key.name for key in all_keys()}


def test_an_unknown_key_comes_with_default_and_help():
    problem = problem_of(SMALLEST, ["optim.schedule.warmup_stps=3"])
    assert problem.where == "command line"
    assert problem.suggestions == ("optim.schedule.warmup_steps",)
    assert problem.remedy.startswith("optim.schedule.warmup_steps (default 0): Optimizer steps over which ")


def test_a_key_that_resembles_nothing_is_answered_with_what_there_is():
    problem = problem_of({**SMALLEST, "eval": {"zzzz": 1}})
    assert problem.suggestions == ()
    assert problem.remedy == "eval takes every_epochs, every_steps, max_batches, early_stop"


@pytest.mark.parametrize(
    ("change", "meant"),
    [
        ("engine.device=gpu", "cuda"),
        ("precision=bfloat16", "bf16"),
        ("precision=float32", "fp32"),
        ("engine=zero", "deepspeed"),
        ("precision=fp16", "bf16"),
        ("precision=float16", "bf16"),
        ("optim=adam_w", "adamw"),
        ("optim=adamW", "adamw"),
        ("optim.name=torch.optim.AdamW", "adamw"),
    ],
)
def test_the_words_of_other_tools_are_understood(change, meant):
    assert problem_of(SMALLEST, [change]).suggestions[0] == meant


def test_it_is_said_why_there_is_no_fp16():
    assert problem_of(SMALLEST, ["precision=fp16"]).remedy == (
        "float16 needs its loss scaled, and bf16 does not; it takes: fp32 | bf16 | fp64"
    )


@pytest.mark.parametrize(
    ("section", "wrong", "meant"),
    [
        ({"unfreeze": [{"epoch": 1, "match": "a"}]}, "finetune.unfreeze.0.epoch", "finetune.unfreeze.0.at_epoch"),
        ({"adapter": {"r": 4, "targets": "a"}}, "finetune.adapter.r", "finetune.adapter.rank"),
    ],
)
def test_a_part_of_a_keys_name_is_understood_in_its_own_section(section, wrong, meant):
    problem = problem_of({**SMALLEST, "finetune": section})
    assert problem.text == f"there is no key {wrong}"
    assert problem.suggestions[0] == meant


def test_a_dotted_key_in_a_file_is_to_be_nested():
    problem = problem_of({**SMALLEST, "optim.schedule.name": "cosine"})
    assert problem.remedy == "nest it: optim: {schedule: {name: …}}"


def test_a_misspelt_required_key_is_one_problem():
    assert problem_of({**SMALLEST, "data": {"nme": "digits"}}).suggestions[0] == "data.name"
    problem = problem_of({**SMALLEST, "data": {"name": "digits", "eval": {"splt": 0.1}}})
    assert problem.suggestions == ("data.eval.split",)


def test_distance():
    assert distance("lr", "rl", 1) == 1
    assert distance("step", "steps", 2) == 1
    assert distance("kitten", "sitting", 3) == 3
    assert distance("kitten", "sitting", 2) is None
    assert distance("abc", "xyz", 2) is None
    assert distance("", "ab", 2) == 2


def test_the_nearest_word_is_never_the_same_word():
    assert nearest_words("fsdp", ["ddp", "fsdp", "fdsp"])[0] == "fdsp"
    assert "fsdp" not in nearest_words("fsdp", ["fsdp"])
    assert nearest_keys("", [], all_keys(), ()) == []


# --------------------------------------------------------------------------------------------- missing and wrong


def test_everything_is_reported_at_once_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: classification\n"
        "data: {name: digits, batch_size: 0, workers: -1}\n"
        "optim:\n"
        "  lr: fast\n"
        "  lr: 0.1\n"
        "  schedule: {name: constant, gamma: 0.5}\n"
        "train: {epochs: 2, steps: 3}\n"
        "engine: {name: fspd}\n"
        "checkpoint: {weights: some}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(path, ["run.seed=-1", "run.name=../x", "nonsense"])
    told = [(problem.where.removeprefix(str(path)), problem.text) for problem in caught.value.problems]
    assert told == [
        (":1", "model is missing"),
        (":2", "data.batch_size: 0 does not fit"),
        (":2", "data.workers: -1 does not fit"),
        (":5", "optim.lr is given twice, here and in line 4"),
        (":6", "optim.schedule.gamma: 0.5 means nothing to the schedule constant"),
        (":7", "train.steps: 3 cannot stand beside train.epochs"),
        (":8", "engine.name: fspd does not fit"),
        (":9", "checkpoint.weights: some does not fit"),
        ("command line", "'nonsense' is not an override"),
        ("command line", 'run.name: "../x" cannot name a folder'),
        ("command line", "run.seed: -1 does not fit"),
    ]
    assert caught.value.problems[6].suggestions == ("fsdp",)
    assert all(problem.remedy for problem in caught.value.problems)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("null", "activation_checkpointing: null does not fit"),
        ("{evry: 3}", "there is no key activation_checkpointing.evry"),
        ("{every: 0}", "activation_checkpointing.every: 0 does not fit"),
    ],
)
def test_a_key_of_several_shapes_is_one_problem(value, said):
    assert problem_of(SMALLEST, [f"activation_checkpointing={value}"]).text == said


def test_nothing_at_all_is_given():
    assert [problem.text for problem in problems_of({})] == [
        "task is missing",
        "model is missing",
        "data is missing",
        "train is missing",
    ]


@pytest.mark.parametrize(
    ("override", "said", "remedy"),
    [
        ("run.seed=1.5", "run.seed: 1.5 does not fit", "it takes: int >= 0, < 9223372036854775808"),
        ("run.seed='1'", 'run.seed: "1" does not fit', "it takes: int >= 0"),
        ("run.deterministic=1", "run.deterministic: 1 does not fit", "it takes: true | false"),
        ("run.deterministic=yes", "run.deterministic: yes does not fit", "it takes: true | false"),
        ("run.threads=0", "run.threads: 0 does not fit", "it takes: auto | int > 0"),
        ("run.threads=many", "run.threads: many does not fit", "it takes: auto | int > 0"),
        ("run.name=12", "run.name: 12 does not fit", "it takes: text; put it in quotes"),
        ("run.name=.hidden", 'run.name: ".hidden" cannot name a folder', "begin with a letter or a digit"),
        ("run.name=' '", 'run.name: " " cannot name a folder', "use up to 200 letters"),
        ("run.name='a '", 'run.name: "a " cannot name a folder', "without spaces at its ends"),
        ("run.name=''", 'run.name: "" cannot name a folder', "use up to 200 letters"),
        ("run.dir=' '", 'run.dir: " " is empty', "give a path"),
        ("task=[a]", 'task: ["a"] does not fit', "it takes: name | {name, args}"),
        ("task.name='a:'", 'task.name: "a:" is not of the form pkg.mod:attribute', "dotted path"),
        ("task=''", 'task: "" is not a name', "without spaces"),
        ("model.args=3", "model.args: 3 does not fit", "it takes: mapping"),
        ("data.eval=3", "data.eval: 3 does not fit", "it takes: none | {split} | name | {name, args}"),
        ("data.eval.split=1", "data.eval.split: 1 does not fit", "it takes: number > 0, < 1"),
        ("data.eval={split: 0.1, name: x}", "data.eval.split cannot stand beside name", "keep split or name"),
        ("data.transforms.train=Flip", "data.transforms.train: Flip does not fit", "it takes: list of name"),
        ("data.transforms.train=[3]", "data.transforms.train.0: 3 does not fit", "it takes: list of name"),
        ("train.epochs=0", "train.epochs: 0 does not fit", "it takes: int > 0 | null"),
        ("train.epochs=null", "train does not say how long to train", "give train.epochs or train.steps"),
        ("train=3", "train: 3 does not fit", "it takes: {epochs, steps, micro_batch_size}"),
        ("optim.name=adamv", "optim.name: adamv is not an optimizer", "pkg.mod:Class"),
        ("optim.lr=.nan", "optim.lr: NaN does not fit", "it takes: number >= 0"),
        ("optim.lr=.inf", "optim.lr: Infinity does not fit", "it takes: number >= 0"),
        ("optim.lr=-1", "optim.lr: -1 does not fit", "it takes: number >= 0"),
        ("optim.clip_grad_norm=0", "optim.clip_grad_norm: 0 does not fit", "it takes: number > 0 | null"),
        ("optim.groups=[{match: a}]", "optim.groups.0 changes nothing", "give the group lr"),
        ("optim.groups=[{match: [], lr: 1}]", "optim.groups.0.match: [] does not fit", "at least 1 text"),
        ("optim.schedule=cosin", "optim.schedule: cosin does not fit", "constant | step | linear | cosine | wsd"),
        ("optim.schedule=step", "optim.schedule: step does not say when to step", "give optim.schedule.step_size"),
        ("engine.name=fdsp", "engine.name: fdsp does not fit", "auto | single | ddp | fsdp | deepspeed"),
        ("health.on_nonfinite=ignore", "health.on_nonfinite: ignore does not fit", "it takes: stop | skip"),
        ("profile={steps: [5, 5]}", "profile.steps: [5, 5] holds no step", "give the first step and the one after"),
        ("profile={steps: [1]}", "profile.steps: [1] does not fit", "it takes: list of 2 int >= 0"),
    ],
)
def test_a_wrong_value_is_shown_with_what_fits(override, said, remedy):
    problem = problem_of(SMALLEST, [override])
    assert problem.text == said
    assert remedy in problem.remedy


def test_a_position_that_no_list_has_is_refused():
    run = {**SMALLEST, "optim": {"groups": [{"match": "a", "lr": 1}]}}
    assert problem_of(run, ["optim.groups.7.lr=1"]).text == "optim.groups.7: the list has 1 items, counted from 0"
    assert "does not fit" in problem_of(run, [f"optim.groups.{'9' * 5000}.lr=1"]).text


@pytest.mark.parametrize("values", [[1, 2], "text", 3, None])
def test_what_is_no_mapping_at_all_is_refused(values):
    assert "a run file is a mapping of keys" in problem_of(values).text


@pytest.mark.parametrize(
    "override", [{"optim.lr": 3}, "x", "=3", "a..b=3", ".a=3", "optim.lr", ".".join("a" * 100) + "=1"]
)
def test_what_is_no_override_is_said_to_be_none(override):
    assert problem_of(SMALLEST, [override]).text == f"{override!r} is not an override"


def test_an_override_that_is_not_yaml_is_shown_whole():
    problem = problem_of(SMALLEST, ["optim.groups=[{match: a"])
    assert problem.text.startswith("'optim.groups=[{match: a': this is not YAML")
    assert problem.where == "command line"


# ------------------------------------------------------------------------------------------------------- files


def refused(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all(problem.remedy for problem in caught.value.problems)
    return caught.value.problems


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    (problem,) = refused(tmp_path / "quickstrat.yaml")
    assert problem.text == f"there is no file {tmp_path / 'quickstrat.yaml'}"
    assert problem.suggestions == (str(tmp_path / "quickstart.yaml"),)
    (problem,) = refused(tmp_path / "no" / "such.yaml")
    assert problem.remedy == f"there is no folder {tmp_path / 'no'} either"
    assert refused("zero\0byte")


@pytest.mark.parametrize(
    ("data", "said", "line"),
    [
        (b"", "the file is empty", 1),
        (b"# only a comment\n", "the file is empty", 1),
        (b"- a\n- b\n", "the file is not a mapping of keys", 1),
        (b"just text", "the file is not a mapping of keys", 1),
        (b"task: a\nmodel: caf\xe9\n", "the byte 0xe9 is not UTF-8", 2),
        (b"task: a\n\x00", "cannot stand in YAML", 2),
        (b"a: [" * 10_000, "nested deeper", 1),
    ],
)
def test_a_file_that_is_no_run_file(tmp_path, data, said, line):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    problem = refused(path)[0]
    assert said in problem.text
    assert problem.where == f"{path}:{line}"


PIECES = [
    *("&a ", "*a", "<<: ", "!!str ", "{", "}", "[", "]", ": ", "- ", "? ", "|", "'", '"', "\t", "#", "\n", "\n  ", ","),
    *("null", "~", ".nan", "---\n", "%", "@", "\x85", "\u2028", "é", "9" * 30, "name", "args", "steps: 3", "data"),
]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(PIECES)), max_size=4))
def test_a_file_with_accidents_loads_or_is_refused(tmp_path_factory, accidents):
    text = "task: x\nmodel: {name: y}\ndata:\n  name: z\n  eval: {split: 0.2}\ntrain: {epochs: 5}\n"
    for place, piece in accidents:
        text = text[:place] + piece + text[place:]
    path = tmp_path_factory.getbasetemp() / "accidents.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        told = [] if load(path).config.task.name else ["nothing was read"]
    except ConfigError as error:
        told = [problem.text for problem in error.problems if not problem.remedy]
    assert not told


def test_a_folder_or_a_huge_file_is_not_read(tmp_path):
    assert "cannot read" in refused(tmp_path)[0].text
    huge = tmp_path / "weights.yaml"
    huge.write_bytes(b"x" * (1 << 20) + b"y")
    assert "larger than" in refused(huge)[0].text


def test_problems_of_a_base_name_the_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("optim: {lrr: 1}\nbase: other.yaml\n")
    run = tmp_path / "run.yaml"
    text = "task: a\nmodel: b\ndata: {name: c}\ntrain: {steps: 1}\n"
    run.write_text("base: base.yaml\n" + text)
    assert [(p.where, p.text) for p in refused("run.yaml")] == [
        ("base base.yaml:1", "there is no key optim.lrr"),
        ("base base.yaml:2", "a base cannot have a base itself"),
    ]
    run.write_text("base: bas.yaml\n" + text)
    (problem,) = refused("run.yaml")
    assert (problem.where, problem.suggestions) == ("run.yaml:1", ("base.yaml",))
    run.write_text("base: bas.yaml\n")  # what the base may hold is not called missing
    assert len(refused("run.yaml")) == 1
    run.write_text("base: [base.yaml]\n" + text)
    assert refused("run.yaml")[0].text == 'base: ["base.yaml"] does not fit'
    run.write_text("base:\n" + text)
    assert load("run.yaml").config.train.steps == 1
    assert refused("run.yaml", "base=base.yaml")[0].text == "base cannot be given on the command line"
