"""Groups and their hyperparameters by name; schedules against written-out values and torch's own schedulers."""

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from bigtrain.config import schema
from bigtrain.errors import PatternError, UserError
from bigtrain.optim import OptimizerPlan, make_schedule, plan_optimizer


class Net(nn.Module):
    """Matrices, a norm with a matrix of gains, a vector, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.norm = nn.LayerNorm((2, 2))
        self.head = nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.ones(()))
        self.mix = nn.Parameter(torch.ones(4, 4))


ALL = [name for name, _ in Net().named_parameters()]
DECAYED = {"stem.weight", "head.weight", "mix"}


class Sign(torch.optim.Optimizer):
    """An optimizer of a user: it has no weight decay, and keeps one argument to itself."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, *, sharpness: float = 1.0) -> None:
        if sharpness < 0:
            raise ValueError(f"sharpness {sharpness} is negative")
        self.sharpness = sharpness
        super().__init__(params, {"lr": lr, "momentum": momentum})


class AnyAdamW(torch.optim.AdamW):
    """Takes whatever its parent takes."""

    elementwise = True

    def __init__(self, params: Any, **others: Any) -> None:
        super().__init__(params, **others)


@pytest.fixture(autouse=True)
def user_module(monkeypatch):
    module = types.ModuleType("optimizers_of_mine")
    module.Sign, module.AnyAdamW, module.Net = Sign, AnyAdamW, Net
    monkeypatch.setitem(sys.modules, module.__name__, module)


def plan(model: nn.Module | None = None, **optim: Any) -> OptimizerPlan:
    return plan_optimizer(model or Net(), schema.Optim.model_validate(optim))


def hyper_by_name(plan: OptimizerPlan) -> dict[str, dict[str, Any]]:
    return {name: dict(group.hyper) for group in plan.groups for name in group.names}


def build(plan: OptimizerPlan, model: nn.Module) -> torch.optim.Optimizer:
    return plan.build(dict(model.named_parameters()))


# ---------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_norms_biases_and_fewer_than_two_dimensions_are_not_decayed(name):
    hyper = hyper_by_name(plan(name=name, lr=0.1, weight_decay=0.3))
    assert hyper.keys() == set(ALL)
    assert {n for n, h in hyper.items() if h["weight_decay"] == 0.3} == DECAYED
    assert {h["weight_decay"] for n, h in hyper.items() if n not in DECAYED} == {0.0}


def test_all_are_decayed_where_asked():
    hyper = hyper_by_name(plan(weight_decay=0.3, decay_norms_and_biases=True))
    assert {h["weight_decay"] for h in hyper.values()} == {0.3}
    hyper = hyper_by_name(plan(weight_decay=0.3, groups=[{"match": "gain", "weight_decay": 0.2}]))
    assert hyper["gain"]["weight_decay"] == 0.2
    assert hyper["temperature"]["weight_decay"] == 0.0


def test_the_last_group_that_gives_a_value_decides_it():
    hyper = hyper_by_name(
        plan(
            lr=1.0,
            weight_decay=0.3,
            groups=[
                {"match": ["head.*", "mix"], "lr": 2.0, "weight_decay": 0.4},
                {"match": "*.weight", "lr": 3.0},
                {"match": "m*", "weight_decay": 0.5},
            ],
        )
    )
    rates = {name: (h["lr"], h["weight_decay"]) for name, h in hyper.items()}
    assert rates == {
        "stem.weight": (3.0, 0.3),
        "stem.bias": (1.0, 0.0),
        "norm.weight": (3.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "head.weight": (3.0, 0.4),
        "head.bias": (2.0, 0.4),  # its group says so
        "gain": (1.0, 0.0),
        "temperature": (1.0, 0.0),
        "mix": (2.0, 0.5),
    }


def test_parameters_that_agree_share_a_group_and_each_is_in_one():
    groups = plan(groups=[{"match": "head.*", "lr": 0.5}]).groups
    assert len(groups) == 4  # decayed or not, times two rates
    assert sorted(name for group in groups for name in group.names) == sorted(ALL)


def test_frozen_parameters_are_in_no_group_and_no_pattern_may_mean_them():
    model = Net()
    model.stem.requires_grad_(False)
    assert "stem.weight" not in hyper_by_name(plan(model))
    with pytest.raises(PatternError) as caught:
        plan(model, groups=[{"match": "head.*", "lr": 1.0}, {"match": "stem.*", "lr": 1.0}])
    assert "'stem.*' matches no parameter that trains" in caught.value.problem
    assert caught.value.where == "optim.groups.1.match"
    model.requires_grad_(False)
    with pytest.raises(PatternError, match="every parameter is frozen"):
        plan(model)


# ------------------------------------------------------------------------------------------------------ optimizers


def test_what_is_built_is_torchs_own_with_every_value_in_its_place():
    model = Net()
    made = plan(model, name="adamw", lr=0.2, weight_decay=0.3, args={"betas": [0.8, 0.95], "eps": 1e-6})
    optimizer = build(made, model)
    assert type(optimizer) is torch.optim.AdamW
    assert made.elementwise
    for group in optimizer.param_groups:
        assert (group["lr"], group["base_lr"], group["eps"], tuple(group["betas"])) == (0.2, 0.2, 1e-6, (0.8, 0.95))
        assert group["fused"]
        named = dict(model.named_parameters())
        assert all(p is named[name] for p, name in zip(group["params"], group["names"], strict=True))
    sgd = build(plan(model, name="sgd", args={"momentum": 0.9, "nesterov": True}), model)
    assert type(sgd) is torch.optim.SGD
    assert all(group["momentum"] == 0.9 and group["nesterov"] for group in sgd.param_groups)


@pytest.mark.parametrize("args", [{"foreach": True}, {"fused": False}])
def test_an_implementation_that_is_chosen_is_kept(args):
    made = plan(args=args)
    assert not made.fusable
    group = build(made, Net()).param_groups[0]
    assert not group["fused"]
    assert bool(group["foreach"]) == ("foreach" in args)


def test_an_optimizer_of_the_users_own():
    model = Net()
    made = plan(model, name="optimizers_of_mine:Sign", lr=0.2, args={"momentum": 0.5, "sharpness": 4.0})
    optimizer = build(made, model)
    assert type(optimizer) is Sign
    assert optimizer.sharpness == 4.0  # which no group would have told it
    assert all(group["momentum"] == 0.5 for group in optimizer.param_groups)
    assert len(made.groups) == 1  # without weight decay nothing sets parameters apart
    assert not made.fusable
    assert not made.elementwise


def test_a_class_with_open_keywords_gets_rate_and_decay():
    model = Net()
    made = plan(model, name="optimizers_of_mine:AnyAdamW", lr=0.2, weight_decay=0.3, args={"amsgrad": True})
    decays = {n: g["weight_decay"] for g in build(made, model).param_groups for n in g["names"]}
    assert {name for name, decay in decays.items() if decay == 0.3} == DECAYED
    assert made.elementwise


@pytest.mark.parametrize(
    ("optim", "where", "said"),
    [
        ({"args": {"betta": 1}}, "optim.args", "has no argument 'betta'"),
        ({"name": "sgd", "args": {"betas": [0.9, 0.9]}}, "optim.args", "sgd has no argument 'betas'"),
        ({"args": {"lr": 0.1}}, "optim.args", "lr cannot stand in optim.args"),
        ({"args": {"weight_decay": 0.1}}, "optim.args", "weight_decay cannot stand in optim.args"),
        ({"name": "optimizers_of_mine:Sign", "args": {"rho": 1}}, "optim.args", "has no argument 'rho'"),
        ({"name": "optimizers_of_mine:Sgn"}, "optim.name", "has no 'Sgn'"),
        ({"name": "optimizers_of_mine:Net"}, "optim.name", "is not a torch.optim.Optimizer class"),
        ({"name": "torch.optim:LBFGS"}, "optim.name", "wants closure in every step"),
        ({"name": "no_such_module:Sign"}, "optim.name", "there is no module 'no_such_module'"),
        (
            {"name": "optimizers_of_mine:Sign", "groups": [{"match": "*", "weight_decay": 0.1}]},
            "optim.groups",
            "has no weight decay, and a group sets it",
        ),
    ],
)
def test_names_and_arguments_that_do_not_exist_are_refused(optim, where, said):
    with pytest.raises(UserError) as caught:
        plan(**optim)
    assert said in caught.value.problem
    assert caught.value.where == where


def test_a_mistyped_argument_shows_the_nearest():
    with pytest.raises(UserError) as caught:
        plan(args={"betta": 1})
    assert caught.value.remedy.startswith("did you mean betas? it takes: params, lr=0.001, betas=(0.9, 0.999)")


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"args": {"betas": [2.0, 0.9]}}, "Invalid beta parameter at index 0: 2.0"),
        ({"name": "sgd", "args": {"nesterov": True}}, "Nesterov momentum requires"),
        ({"name": "optimizers_of_mine:Sign", "args": {"sharpness": -1.0}}, "sharpness -1.0 is negative"),
        ({"name": "optimizers_of_mine:AnyAdamW", "args": {"rho": 1}}, "unexpected keyword argument 'rho'"),
    ],
)
def test_values_that_a_class_refuses(optim, said):
    model = Net()
    with pytest.raises(UserError) as caught:
        build(plan(model, **optim), model)
    assert said in caught.value.problem


# ------------------------------------------------------------------------------------------------------- schedules


def factors(total_steps: int = 12, steps_per_epoch: int = 3, **schedule: Any) -> list[float]:
    config = schema.Schedule.model_validate(schedule)
    factor = make_schedule(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    return [factor(step) for step in range(total_steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, [1] * 12),
        ({"name": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, *[1] * 8]),
        ({"name": "step", "step_size": 5, "gamma": 0.5}, [1] * 5 + [0.5] * 5 + [0.25] * 2),
        ({"name": "step", "step_size": 4, "gamma": 0.5, "warmup_steps": 2}, [0.5, *[1] * 5, *[0.5] * 4, 0.25, 0.25]),
        ({"name": "step", "step_size": 2, "gamma": 0.1, "unit": "epoch"}, [1] * 6 + [0.1] * 6),
        ({"name": "linear"}, [1 - k / 12 for k in range(12)]),
        ({"name": "linear", "min_factor": 0.4}, [1 - 0.6 * k / 12 for k in range(12)]),
        ({"name": "linear", "warmup_steps": 2}, [0.5, 1, *[1 - k / 10 for k in range(10)]]),
        ({"name": "linear", "unit": "epoch"}, [1] * 3 + [0.75] * 3 + [0.5] * 3 + [0.25] * 3),
        ({"name": "cosine"}, [(1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)]),
        (
            {"name": "cosine", "warmup_steps": 3, "min_factor": 0.2},
            [1 / 3, 2 / 3, 1, *[0.2 + 0.4 * (1 + math.cos(math.pi * k / 9)) for k in range(9)]],
        ),
        # In the epoch of the warm-up the factor stays at 1: the curve of whole epochs begins with the next.
        (
            {"name": "cosine", "unit": "epoch", "warmup_steps": 1},
            [1] * 3 + [(1 + math.cos(math.pi * k / 11)) / 2 for k in (2, 5, 8) for _ in range(3)],
        ),
        ({"name": "wsd", "decay": 0.25}, [1] * 10 + [2 / 3, 1 / 3]),
        (
            {"name": "wsd", "decay": 0.5, "min_factor": 0.1, "warmup_steps": 2},
            [0.5, *[1] * 6, *[0.1 + 0.9 * k / 6 for k in (5, 4, 3, 2, 1)]],
        ),
        ({"name": "wsd", "decay": 0.5, "unit": "epoch"}, [1] * 9 + [0.5] * 3),
        ({"name": "wsd", "decay": 0.0}, [1] * 12),
    ],
)
def test_factors_written_out(schedule, expected):
    assert factors(**schedule) == pytest.approx(expected, rel=1e-14)


def torchs(scheduler: Any, steps: int, steps_per_unit: int = 1) -> list[float]:
    """The rates that a scheduler of torch's gives a rate of 1, when called after each unit."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    moved = scheduler(optimizer)
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % steps_per_unit == 0:
            moved.step()
    return rates


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [
        (
            {"name": "linear", "min_factor": 0.1},
            lambda o, n: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=n),
        ),
        (
            {"name": "cosine", "min_factor": 0.05},
            lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=n, eta_min=0.05),
        ),
        ({"name": "step", "step_size": 7, "gamma": 0.3}, lambda o, n: lr_scheduler.StepLR(o, step_size=7, gamma=0.3)),
    ],
)
def test_factors_are_those_of_torchs_schedulers(schedule, scheduler, unit):
    per_unit = 1 if unit == "step" else 5
    expected = torchs(lambda o: scheduler(o, 20), 20 * per_unit, per_unit)
    assert factors(20 * per_unit, 5, unit=unit, **schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("after", ["linear", "cosine"])
def test_warmup_and_what_follows_as_torch_chains_them(after):
    def chained(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
        rise = lr_scheduler.LinearLR(optimizer, start_factor=1 / 4, end_factor=1.0, total_iters=3)
        fall = {
            "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=16),
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.1),
        }[after]()
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[4])

    assert factors(20, name=after, warmup_steps=4, min_factor=0.1) == pytest.approx(torchs(chained, 20), rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_the_last_three_end_at_their_least_factor_and_stay_there(name):
    config = schema.Schedule.model_validate({"name": name, "min_factor": 0.2})
    factor = make_schedule(config, total_steps=10, steps_per_epoch=10)
    assert factor(10) == pytest.approx(0.2)
    for total in (1, 2):  # runs as short as their warm-up
        config = schema.Schedule.model_validate({"name": name, "warmup_steps": total})
        factor = make_schedule(config, total_steps=total, steps_per_epoch=1)
        assert [factor(step) for step in range(total)] == [(step + 1) / total for step in range(total)]
