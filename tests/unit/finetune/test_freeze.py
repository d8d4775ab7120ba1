"""The freeze plan: which parameters train in which phase, at which rates; and BatchNorm, which must be still whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bigtrain import models
from bigtrain.config import schema
from bigtrain.config.loader import from_dict
from bigtrain.errors import CombinationError, ConfigError, PatternError
from bigtrain.finetune.freeze import begins_at, frozen_batchnorms, phase_at, plan_freezing
from bigtrain.optim import plan_optimizer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x))


class Net(nn.Module):
    """A stem, three blocks with a scale between the first two, a norm without parameters, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.first = nn.ModuleList([Block()])
        self.between = nn.Linear(3, 3)
        self.rest = nn.ModuleList([Block(), Block()])
        self.plain_norm = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)

    def blocks(self):
        return [*self.first, *self.rest]

    def forward(self, x):
        x = self.between(self.first[0](self.stem(x)))
        for block in self.rest:
            x = block(x)
        return self.head(self.plain_norm(x))


def settings(**values):
    return schema.Finetune.model_validate(values)


def training(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def frozen(model):
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def applied(phase=0, model=None, **values):
    model = model or Net()
    plan_freezing(model, settings(**values)).apply(model.train(), phase)
    return model


def heads(names):
    return {name.split(".")[0] for name in names}


def test_depth_freezes_blocks_and_what_comes_before_them():
    assert heads(frozen(applied(freeze_depth=1))) == {"stem", "first", "between"}
    assert training(applied(freeze_depth=2)) == {
        *(f"rest.1.{part}" for part in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")),
        *("plain_norm.1.weight", "plain_norm.1.bias", "head.weight", "head.bias"),
    }
    assert heads(training(applied(freeze_depth=3))) == {"plain_norm", "head"}


def test_depth_of_models_as_they_come():
    resnet = models.build("torchvision/resnet18", {"num_classes": 2})
    plan_freezing(resnet, settings(freeze_depth=6)).apply(resnet, 0)
    assert heads(training(resnet)) == {"layer4", "fc"}
    gpt = models.build("gpt", {"vocab": 11, "layers": 3, "width": 8, "heads": 2, "context": 4})
    plan_freezing(gpt, settings(freeze_depth=2)).apply(gpt, 0)
    assert {name for name in training(gpt) if name.startswith("layers.")} == {
        name for name, _ in gpt.named_parameters() if name.startswith("layers.2.")
    }
    assert heads(frozen(gpt)) == {"embed_tokens", "layers"}


@pytest.mark.parametrize(("key", "value"), [("freeze_depth", 4), ("freeze_depth", 1), ("layer_decay", 0.5)])
def test_depth_needs_blocks(key, value):
    model = Net() if value == 4 else nn.Linear(2, 2)
    with pytest.raises(CombinationError, match="repeated blocks") as caught:
        plan_freezing(model, settings(**{key: value}))
    assert caught.value.where == f"finetune.{key}"


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"freeze": "steem.*"}, "finetune.freeze"),
        ({"freeze": "*", "unfreeze": [{"at_epoch": 1, "match": "heat.*"}]}, "finetune.unfreeze.0.match"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_names(values, where):
    with pytest.raises(PatternError, match="matches no parameter") as caught:
        plan_freezing(Net(), settings(**values))
    assert caught.value.where == where
    assert ("stem.weight" if where.endswith("freeze") else "head.weight") in caught.value.remedy


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"freeze": "stem.*", "unfreeze": [{"at_step": 1, "match": "head.*"}]}, "trains before, at that rate"),
        (
            {"freeze": "stem.*", "unfreeze": [{"at_step": n, "match": "stem.*", "lr_scale": 0.1} for n in (1, 2)]},
            "trains before, at that rate",
        ),
        ({"freeze_batchnorm": True, "unfreeze": [{"at_step": 1, "match": "*.norm.*"}]}, "stays frozen"),
    ],
)
def test_an_entry_that_would_change_nothing_is_refused(values, why):
    with pytest.raises(PatternError, match=why) as caught:
        plan_freezing(Net(), settings(**values))
    assert caught.value.where == f"finetune.unfreeze.{len(values['unfreeze']) - 1}.match"


def test_an_entry_may_change_a_rate_alone():
    values = {"freeze": "stem.*", "unfreeze": [{"at_step": 1, "match": "head.*", "lr_scale": 0.1}]}
    assert plan_freezing(Net(), settings(**values)).lr_scales(1)["head.weight"] == 0.1


GRADUAL = {
    "freeze": ["stem.*", "first.*", "between.*", "rest.*", "plain_norm.*"],
    "unfreeze": [
        {"at_epoch": 1, "match": ["rest.1.*", "plain_norm.*"], "lr_scale": 0.5},
        {"at_epoch": 1, "match": "head.*", "lr_scale": 0.1},
        {"at_epoch": 3, "match": "rest.*", "lr_scale": 0.25},
    ],
}


def test_phases_from_the_top():
    plan = plan_freezing(Net(), settings(**GRADUAL))
    assert plan.num_phases == 3
    assert [heads(training(applied(phase, **GRADUAL))) for phase in range(3)] == [
        {"head"},
        {"head", "rest", "plain_norm"},
        {"head", "rest", "plain_norm"},
    ]
    assert len(plan.frozen_in(1) - plan.frozen_in(2)) == 4  # rest.0
    assert {plan.begins()[name] for name in plan.frozen_in(1) - plan.frozen_in(2)} == {2}
    assert plan.begins()["rest.1.linear.weight"] == 1
    assert "head.weight" not in plan.begins()
    assert [plan.lr_scales(phase).get("rest.1.linear.weight", 1.0) for phase in range(3)] == [1.0, 0.5, 0.25]
    assert [plan.lr_scales(phase).get("head.weight", 1.0) for phase in range(3)] == [1.0, 0.1, 0.1]


def test_the_phase_follows_from_the_position():
    by_epoch, by_step = settings(**GRADUAL), settings(freeze="*", unfreeze=[{"at_step": 5, "match": "*"}])
    assert [phase_at(by_epoch, 99, epoch) for epoch in range(5)] == [0, 1, 1, 2, 2]
    assert [phase_at(by_step, step, 99) for step in (0, 4, 5, 6)] == [0, 0, 1, 1]
    assert phase_at(settings(), 5, 5) == 0
    assert begins_at(by_epoch, 10) == [10, 10, 30]
    assert begins_at(by_step, 10) == [5]


@pytest.mark.parametrize(
    "unfreeze",
    [
        [{"at_epoch": 2, "match": "a"}, {"at_epoch": 1, "match": "b"}],
        [{"at_epoch": 2, "match": "a"}, {"at_step": 9, "match": "b"}],
        [{"match": "a"}],
        [{"at_epoch": 2, "at_step": 9, "match": "a"}],
    ],
)
def test_entries_say_when_and_stand_in_order(unfreeze):
    file = {"task": "classification", "model": "bigmodel", "data": "digits", "train": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"order of time|does not say when"):
        from_dict({**file, "finetune": {"freeze": "*", "unfreeze": unfreeze}})


def test_layer_decay_by_depth():
    plan = plan_freezing(Net(), settings(layer_decay=0.5))
    expected = {"stem": 0.5**4, "first": 0.5**3, "between": 0.5**3, "head": 1.0, "plain_norm": 1.0}
    scales = plan.lr_scales(0)
    for name, _ in Net().named_parameters():
        top = name.split(".")[0]
        wanted = expected.get(top) or 0.5 ** (2 - int(name.split(".")[1]))
        assert scales.get(name, 1.0) == wanted, name


def test_rates_and_groups_of_a_phase():
    model = applied(1, **GRADUAL)
    plan = plan_freezing(Net(), settings(**GRADUAL))
    optim = schema.Optim.model_validate({"lr": 1.0, "groups": [{"match": "rest.0.*", "lr": 2.0}]})
    made = plan_optimizer(model, optim, lr_scales=plan.lr_scales(1), begins=plan.begins())
    rates = {name: group.hyper["lr"] for group in made.groups for name in group.names}
    assert rates["rest.1.linear.weight"] == 0.5
    assert rates["head.weight"] == 0.1
    assert "rest.0.linear.weight" not in rates
    later = applied(2, **GRADUAL)
    made = plan_optimizer(later, optim, lr_scales=plan.lr_scales(2), begins=plan.begins())
    groups = [(set(group.names), group.hyper) for group in made.groups]
    rates = {name: hyper["lr"] for names, hyper in groups for name in names}
    assert (rates["rest.0.linear.weight"], rates["rest.1.linear.weight"]) == (0.5, 0.25)
    for names, _ in groups:  # one step counter a group under DeepSpeed
        assert len({plan.begins().get(name, 0) for name in names}) == 1


def test_a_group_for_what_never_trains_is_refused():
    model = applied(freeze="stem.*")
    optim = schema.Optim.model_validate({"groups": [{"match": "stem.*", "lr": 2.0}]})
    with pytest.raises(PatternError):
        plan_optimizer(model, optim)


# ------------------------------------------------------------------------------------------------- BatchNorm


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def moved(model, before):
    return {name.rpartition(".")[0] for name, value in model.named_buffers() if not torch.equal(value, before[name])}


def run(model):
    before = statistics(model)
    model.eval()
    model.train()  # as after an evaluation
    model(torch.randn(8, 3))
    return moved(model, before)


def test_frozen_batchnorm_keeps_weights_statistics_and_mode():
    model = applied(freeze_depth=1)
    assert run(model) == {"rest.0.norm", "rest.1.norm", "plain_norm.0"}
    assert set(frozen_batchnorms(model)) == {"first.0.norm"}


def test_batchnorm_without_parameters_goes_with_what_is_around_it():
    assert "plain_norm.0" not in run(applied(freeze="plain_norm.*"))
    assert run(applied(freeze="*", unfreeze=[{"at_step": 1, "match": "*"}], phase=0)) == set()


def test_batchnorm_can_stay_frozen_whatever_begins_to_train():
    model = applied(1, freeze_batchnorm=True, freeze="*", unfreeze=[{"at_step": 1, "match": "*"}])
    assert run(model) == set()
    assert frozen(model) == {
        f"{block}.norm.{part}" for block in ("first.0", "rest.0", "rest.1") for part in ("weight", "bias")
    }


def test_a_plan_is_applied_over_another_phase():
    model = Net().train()
    plan = plan_freezing(model, settings(**GRADUAL))
    for phase in (2, 0, 1):
        plan.apply(model, phase)
        expected = applied(phase, **GRADUAL)
        assert frozen(model) == frozen(expected)
        assert frozen_batchnorms(model).keys() == frozen_batchnorms(expected).keys()
        assert run(model) == run(expected)


def test_what_the_factory_froze_stays_so_until_it_is_named():
    model = Net()
    model.stem.requires_grad_(False)
    plan = plan_freezing(model, settings(unfreeze=[{"at_step": 3, "match": "stem.*"}]))
    plan.apply(model, 0)
    assert heads(frozen(model)) == {"stem"}
    plan.apply(model, 1)
    assert not frozen(model)
    assert plan.begins() == {"stem.weight": 1, "stem.bias": 1}
