"""What a run file may name: every model, data source, task and optimizer of our own, and where its factory lies.

A name stands here once. `bigtrain.models`, `data`, `tasks` and `optim` import what is asked for; a run file is checked
against these tables before anything is imported. This module imports nothing of bigtrain.
"""

from __future__ import annotations

from collections.abc import Mapping

MODELS = {
    "bigmodel": "bigtrain.models.convnets:BigModel",
    "simple_cnn": "bigtrain.models.convnets:SimpleCNN",
    "gpt": "bigtrain.models.gpt:GPT",
    "lstm": "bigtrain.models.lstm:LSTM",
}

WITHOUT_BLOCKS = ("bigmodel", "simple_cnn")
"""Models that have no repeated parts."""

DATA = {
    "digits": "bigtrain.data.images:digits",
    "image_folder": "bigtrain.data.images:image_folder",
    "text": "bigtrain.data.text:text",
    "tokens": "bigtrain.data.text:tokens",
    "synthetic": "bigtrain.data.synthetic:synthetic",
    "text_classification": "bigtrain.data.text_classification:text_classification",
    "conversations": "bigtrain.data.conversations:conversations",
}

SYNTHETIC_KINDS = {
    "classification": "bigtrain.data.synthetic:_classification",
    "regression": "bigtrain.data.synthetic:_regression",
    "causal_lm": "bigtrain.data.synthetic:_causal_lm",
}

DATA_WITHOUT_SPLITS = ("conversations", "image_folder", "text", "text_classification", "tokens")
"""Sources whose samples do not depend on the split."""

DATA_OF_TEXT = ("conversations", "text", "text_classification")
"""Sources that take a tokenizer: the folder's of a model hf/<folder>, where none is named."""

DATA_FOR_TRAINING_ONLY = ("digits",)
"""Sources that have no part for evaluation."""

TASKS = {
    "classification": "bigtrain.tasks.classification:Classification",
    "causal_lm": "bigtrain.tasks.causal_lm:CausalLM",
    "regression": "bigtrain.tasks.regression:Regression",
    "text_classification": "bigtrain.tasks.text_classification:TextClassification",
}

TASKS_OF_MIXTURES = ("classification",)
"""Tasks that learn from samples that are mixed with one another."""

OPTIMIZERS = {
    "sgd": "torch.optim:SGD",
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
}

TORCHVISION = "torchvision/"
TIMM = "timm/"
HUGGING_FACE = "hf/"


def hugging_face_folder(model: str) -> str | None:
    """The folder of a model `hf/<folder>`; None for any other."""
    return model.removeprefix(HUGGING_FACE) if model.startswith(HUGGING_FACE) else None


def weights_folder(model: str, args: Mapping[str, object]) -> str | None:
    """The Hugging Face folder that a model's weights come from unless the run file says otherwise."""
    return hugging_face_folder(model) if args.get("pretrained", True) else None


HUGGING_FACE_MODEL = "bigtrain.models.hugging_face:build"
"""What builds the model of a folder, which is its first argument."""
