"""Models by name."""

import pytest
import torch
from torch import nn

from bigtrain import models
from bigtrain.errors import ModelError

GPT_ARGS = {"vocab": 11, "layers": 1, "width": 8, "heads": 2, "context": 4}


def make_linear(*, features: int) -> nn.Module:
    return nn.Linear(features, 1)


def make_nothing() -> str:
    return "a model"


def make_lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


class Fillable(nn.Linear):
    def init_tensor(self, name: str, tensor: torch.Tensor) -> None: ...


def make_fillable() -> Fillable:
    return Fillable(2, 2)


def test_bigmodel_has_the_layers_it_should():
    model = models.build("bigmodel")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "conv.weight": (10, 1, 3, 3),
        "conv.bias": (10,),
        "hidden.weight": (500, 7840),
        "hidden.bias": (500,),
        "head.weight": (10, 500),
        "head.bias": (10,),
    }
    images = torch.randn(2, 1, 28, 28)
    features = torch.conv2d(images, model.conv.weight, model.conv.bias, padding=1).clamp(min=0)
    hidden = (features.reshape(2, 7840) @ model.hidden.weight.T + model.hidden.bias).clamp(min=0)
    expected = hidden @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_simple_cnn_has_the_layers_it_should():
    model = models.build("simple_cnn", {"num_classes": 7})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes == {
        "conv.weight": (32, 3, 3, 3),
        "conv.bias": (32,),
        "head.weight": (7, 32 * 32 * 32),
        "head.bias": (7,),
    }
    images = torch.randn(2, 3, 32, 32)
    features = torch.conv2d(images, model.conv.weight, model.conv.bias, padding=1).clamp(min=0)
    torch.testing.assert_close(model(images), features.reshape(2, -1) @ model.head.weight.T + model.head.bias)


def test_a_factory_of_ones_own():
    model = models.build(f"{__name__}:make_linear", {"features": 3})
    assert isinstance(model, nn.Linear)
    assert isinstance(models.build("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear)


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("bigmodle", "bigmodel"),
        ("gtp", "gpt"),
        ("resnet18", "torchvision/resnet18"),
        ("torchvision/resnet81", "resnet18"),
        ("torchvison/resnet18", "torchvision/resnet18"),
    ],
)
def test_unknown_name_names_the_nearest(name, suggestion):
    with pytest.raises(ModelError) as caught:
        models.build(name)
    assert suggestion in str(caught.value.remedy)
    assert caught.value.where == "model.name"
    assert repr(name.removeprefix("torchvision/")) in caught.value.problem


@pytest.mark.parametrize(
    ("name", "args", "hint"),
    [
        ("bigmodel", {"num_clases": 3}, "did you mean num_classes?"),
        ("gpt", {**GPT_ARGS, "layer": 3}, "did you mean layers?"),
        ("gpt", {"vocab": 3}, "gpt needs layers, width, heads, context"),
        ("torchvision/resnet18", {"num_clases": 3}, "did you mean num_classes?"),
        ("torchvision/mobilenet_v3_small", {"num_clases": 3}, "did you mean num_classes?"),
        ("torchvision/resnet18", {"weights": "DEFAULT"}, "finetune.init_from"),
        ("torchvision/resnet18", {"norm_layer": "group_nrom"}, "group_norm"),
        ("torchvision/resnet18", {"in_channels": 0}, "0 channels"),
        ("torchvision/vit_b_16", {"patch_size": 8}, "patch_size"),
        ("torchvision/convnext_tiny", {"stochastic_depth": 0.1}, "did you mean stochastic_depth_prob?"),
    ],
)
def test_wrong_arguments(name, args, hint):
    with pytest.raises(ModelError) as caught:
        models.build(name, args)
    assert hint in str(caught.value)
    assert "model.args" in str(caught.value.where)


def test_what_is_no_usable_module():
    with pytest.raises(ModelError, match="returned str, not a torch"):
        models.build(f"{__name__}:make_nothing")
    with pytest.raises(ModelError, match=r"parameters without a shape: 0\.weight"):
        models.build(f"{__name__}:make_lazy")


def test_names_can_all_be_looked_up():
    names = models.names()
    assert names[:4] == ["bigmodel", "simple_cnn", "gpt", "lstm"]
    assert "torchvision/resnet18" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt", True),
        ("bigmodel", False),
        ("torchvision/resnet18", False),
        (f"{__name__}:Fillable", True),
        (f"{__name__}:make_fillable", True),
        (f"{__name__}:make_linear", False),
    ],
)
def test_is_fillable(name, expected):
    assert models.is_fillable(name) is expected


# -------------------------------------------------------------------------------------- torchvision's models


def test_torchvision_models_are_untouched():
    import torchvision

    torch.manual_seed(0)
    ours = models.build("torchvision/resnet18", {"num_classes": 5})
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=5)
    assert type(ours) is type(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_group_norm_leaves_no_batch_norm():
    model = models.build("torchvision/resnet18", {"norm_layer": "group_norm", "num_classes": 5})
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 20
    assert all(norm.num_groups == 32 for norm in norms)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_an_argument_of_a_function_behind_the_builder():
    slim = models.build("torchvision/mobilenet_v3_small", {"width_mult": 0.5, "num_classes": 3})
    assert slim.features[1].out_channels == 8


def test_groups_divide_the_channels():
    from bigtrain.models.torchvision_models import group_norm

    assert [group_norm(channels).num_groups for channels in (64, 24, 7)] == [32, 8, 1]


def test_norm_layer_by_path():
    model = models.build("torchvision/resnet18", {"norm_layer": "torch.nn:Identity"})
    assert isinstance(model.bn1, nn.Identity)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("builder", ["resnet18", "squeezenet1_1"])
def test_other_numbers_of_channels(builder, channels):
    args = {"num_classes": 3}
    torch.manual_seed(0)
    model = models.build(f"torchvision/{builder}", {**args, "in_channels": channels})
    torch.manual_seed(0)
    plain = models.build(f"torchvision/{builder}", args)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    stem = "conv1" if builder == "resnet18" else "features.0"
    ours, theirs = model.get_submodule(stem), plain.get_submodule(stem)
    assert ours.in_channels == channels
    for channel in range(channels):
        assert torch.equal(ours.weight[:, channel], theirs.weight[:, channel % 3])
    assert model.eval()(torch.randn(1, channels, 64, 64)).shape == (1, 3)


def test_backbone_weights_are_not_downloaded(monkeypatch):
    def refuse(*args: object, **keywords: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    model = models.build("torchvision/lraspp_mobilenet_v3_large", {"num_classes": 4})
    assert model.eval()(torch.randn(1, 3, 32, 32))["out"].shape == (1, 4, 32, 32)
