"""timm's models by name: the same modules that timm makes, and every misuse named."""

import sys

import pytest
import timm
import torch
from torch import nn

from bigtrain import models
from bigtrain.errors import ModelError, SetupError
from bigtrain.models.blocks import find_blocks


def test_models_are_untouched():
    torch.manual_seed(0)
    ours = models.build("timm/resnet18", {"num_classes": 5, "in_chans": 1})
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=5, in_chans=1)
    assert type(ours) is type(theirs)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_small_transformer_computes_and_its_blocks_are_found():
    args = {"img_size": 32, "patch_size": 8, "num_classes": 3, "depth": 2, "embed_dim": 24, "num_heads": 3}
    model = models.build("timm/vit_tiny_patch16_224", args)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert [name for name, _ in find_blocks(model)] == ["blocks.0", "blocks.1"]


def test_norm_layers_by_timms_own_names():
    model = models.build("timm/resnet18", {"norm_layer": "groupnorm", "num_classes": 3})
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_they_are_built_whole():
    assert models.is_fillable("timm/resnet18") is False


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("resnet81", "timm has no model 'resnet81'", "did you mean resnet18 or "),
        ("", "timm has no model ''", "timm.list_models()"),
        ("hf-hub:timm/resnet18", "timm has no model 'hf-hub:timm/resnet18'", ""),
        ("resnet18.a1_in1k", "'a1_in1k' names pretrained weights", "use timm/resnet18"),
    ],
)
def test_names_that_timm_does_not_have(name, problem, remedy):
    with pytest.raises(ModelError) as caught:
        models.build(f"timm/{name}")
    assert problem in caught.value.problem
    assert remedy in str(caught.value.remedy)
    assert caught.value.where == "model.name"


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("resnet18", {"num_clases": 3}, "did you mean num_classes"),
        ("resnet18", {"stem_widht": 3}, "did you mean stem_width"),
        ("hrnet_w18", {"in_chan": 3}, "did you mean in_chans?"),  # timm's own wording differs for this class
        ("resnet18", {"pretrained": True}, "pretrained: a model is built without weights"),
        ("resnet18", {"pretrained_cfg": {"url": "x"}}, "give the file of the weights as finetune.init_from"),
        ("resnet18", {"checkpoint_path": "x.pt"}, "checkpoint_path: a model is built without weights"),
        ("resnet18", {"layers": 3}, "timm/resnet18 failed: TypeError"),
    ],
)
def test_wrong_arguments(name, args, said):
    with pytest.raises(ModelError) as caught:
        models.build(f"timm/{name}", args)
    assert said in str(caught.value)
    assert str(caught.value.where).startswith("model.args")


@pytest.mark.parametrize("arg", ["pretrained", "features_only"])
def test_what_is_false_may_be_said(arg):
    assert isinstance(models.build("timm/resnet18", {arg: False}), nn.Module)


def test_no_class_of_timms_swallows_an_argument_that_it_does_not_know():
    """What the messages above rest on; a model for each way that timm's builders hand arguments on."""
    for name in ("regnetx_002", "nf_regnet_b0", "ese_vovnet19b_dw", "poolformer_s12", "hrnet_w18", "darknet17"):
        with torch.device("meta"), pytest.raises(ModelError, match="has no argument 'num_clases'"):
            models.build(f"timm/{name}", {"num_clases": 3})


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what python does for a module that is not there
    with pytest.raises(SetupError) as caught:
        models.build("timm/resnet18")
    assert caught.value.where == "model.name"
    assert 'pip install "bigtrain[timm]"' in str(caught.value.remedy)
