"""What is found by looking at a module."""

import pytest
import torch
import torchvision
from torch import nn

from bigtrain import models
from bigtrain.errors import ModelError
from bigtrain.models.blocks import batchnorm_over_batch, find_blocks, norm_and_bias


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)


class RMSNormOfMine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, 2))


class LlamaRMSNorm(RMSNormOfMine):
    pass


class Answers(nn.Module):
    def __init__(self, answer: str) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()
        self.answer = answer

    def blocks(self) -> list[nn.Module]:
        return {"own": [self.second, self.first], "foreign": [self.first, Part()]}[self.answer]


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in find_blocks(model)]


def test_a_model_that_answers_is_asked():
    model = Answers("own")
    assert find_blocks(model) == [("second", model.second), ("first", model.first)]
    with pytest.raises(ModelError, match="returned what is no part of it: Part"):
        find_blocks(Answers("foreign"))


def test_a_part_called_blocks_is_no_answer():
    model = nn.Module()
    model.blocks = nn.ModuleList([Part(), Part()])
    assert names(model) == ["blocks.0", "blocks.1"]


def test_torchvision_blocks():
    assert names(torchvision.models.resnet18()) == [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    with torch.device("meta"):
        vit = torchvision.models.vit_b_32()
        swin = torchvision.models.swin_t()
    assert names(vit) == [f"encoder.layers.encoder_layer_{i}" for i in range(12)]
    kinds = [type(block).__name__ for _, block in find_blocks(swin)]
    assert kinds.count("SwinTransformerBlock") == 12


def test_blocks_of_torchs_transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    assert names(nn.TransformerEncoder(layer, 3)) == ["layers.0", "layers.1", "layers.2"]


def test_nothing_repeats():
    assert find_blocks(models.build("bigmodel")) == []
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []  # leaves
    assert find_blocks(nn.Sequential(Part())) == []


def test_blocks_do_not_nest_and_a_shared_one_comes_once():
    inner = nn.ModuleList([Part(), Part()])
    outer = [nn.Module(), nn.Module()]
    for module in outer:
        module.parts = nn.ModuleList([Part(), Part()])
    model = nn.Module()
    model.outer, model.inner = nn.ModuleList([*outer, outer[0]]), inner
    assert names(model) == ["outer.0", "outer.1", "inner.0", "inner.1"]


def test_what_is_not_decayed():
    model = nn.Module()
    model.linear = nn.Linear(2, 2)
    model.norm = nn.LayerNorm([2, 2])  # two dimensions, and yet a norm
    model.llama = LlamaRMSNorm()
    model.mine = RMSNormOfMine()  # its name does not say so, and it has two dimensions
    model.attention = nn.MultiheadAttention(2, 1)
    model.scale = nn.Parameter(torch.ones(()))
    model.embed = nn.Embedding(3, 2)
    expected = {"linear.bias", "norm.weight", "norm.bias", "llama.gain", "scale"}
    expected |= {"attention.in_proj_bias", "attention.out_proj.bias"}
    assert norm_and_bias(model) == expected


def test_what_is_not_decayed_in_a_resnet_and_a_gpt():
    resnet = torchvision.models.resnet18()
    decayed = {name for name, _ in resnet.named_parameters()} - norm_and_bias(resnet)
    kinds = (nn.Conv2d, nn.Linear)
    assert decayed == {f"{name}.weight" for name, m in resnet.named_modules() if isinstance(m, kinds)}
    gpt = models.build("gpt", {"vocab": 11, "layers": 2, "width": 8, "heads": 2, "context": 4})
    assert norm_and_bias(gpt) == {name for name, p in gpt.named_parameters() if "norm" in name}


def test_batchnorm_over_the_batch():
    model = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.SyncBatchNorm(2),
        nn.BatchNorm2d(2),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.InstanceNorm2d(2),
        torchvision.ops.FrozenBatchNorm2d(2),
        nn.GroupNorm(1, 2),
    )
    assert batchnorm_over_batch(model) == ["0", "2", "3"]
    model[2].eval()
    model[3].eval()  # without running statistics it knows none but the batch's
    assert batchnorm_over_batch(model) == ["0", "3"]
