"""Models hf/<folder>: built without memory or with it, documents kept apart, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain import models
from bigtrain.errors import ModelError, SetupError
from bigtrain.models import hugging_face_classes as classes
from bigtrain.prepare import _whole_pieces, fill_pieces
from tests.helpers import hugging_face as made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    made.bert(folder / "bert", tokenizer=False)
    made.llama(folder / "llama")
    made.llama(folder / "mistral", kind="Mistral", sliding_window=3)
    return folder


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 260, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
def test_what_no_file_has_is_computed_anew(place: Path, name: str) -> None:
    """Positions and rotary frequencies of a model built without memory are those that transformers computes."""
    with torch.device("meta"):
        model = models.build(f"hf/{place / name}")
    assert models.is_fillable(f"hf/{place / name}")
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(3)
    model.reset_buffers()  # type: ignore[operator]
    whole = dict(models.build(f"hf/{place / name}", {"pretrained": False}).named_buffers())
    assert whole
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, whole[key]), key


def test_a_table_that_nothing_computes_is_not_left_empty(place: Path) -> None:
    model: Any = models.build(f"hf/{place / 'llama'}")
    model.model.register_buffer("unheard_of", torch.ones(3), persistent=False)
    with pytest.raises(ModelError, match=r"does not say how model\.unheard_of is computed"):
        model.reset_buffers()


def test_initial_values_are_those_that_transformers_draws(place: Path) -> None:
    model = models.build(f"hf/{place / 'bert'}", {"num_classes": 5, "config": {"initializer_range": 0.3}})
    fill_pieces(model, _whole_pieces(model), seed=1)
    values = dict(model.named_parameters())
    assert values["classifier.weight"].std().item() == pytest.approx(0.3, rel=0.3)
    assert values["classifier.weight"].shape == (5, 16)
    assert not values["classifier.bias"].any()
    assert bool((values["bert.embeddings.LayerNorm.weight"] == 1).all())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_documents_in_one_row_are_as_if_alone(place: Path, name: str) -> None:
    """Logits, loss and gradients, with sliding windows and learnt positions too."""
    if name == "gpt2":
        gpt2(place / "gpt2")
    model = models.build(f"hf/{place / name}", {"pretrained": False}).double().eval()
    torch.manual_seed(1)
    lengths = [(5, 7, 6), (1, 1, 16)]
    documents = torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in lengths])
    tokens = torch.randint(260, documents.shape)
    together = model(tokens, documents)
    pieces = [(row, documents[row] == number) for row in range(2) for number in range(3)]
    alone = [model(tokens[row : row + 1, part])[0] for row, part in pieces]
    for (row, part), logits in zip(pieces, alone, strict=True):
        assert torch.allclose(together[row, part], logits, atol=1e-12)
    weights = list(model.parameters())
    ours = torch.autograd.grad(together.logsumexp(-1).sum(), weights)
    theirs = torch.autograd.grad(torch.stack([logits.logsumexp(-1).sum() for logits in alone]).sum(), weights)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(ours, theirs, strict=True))
    assert not torch.allclose(model(tokens)[0, 5:], together[0, 5:], atol=1e-3)  # what the numbers of documents change


def test_a_model_that_keeps_a_state_does_not_claim_to_keep_documents_apart() -> None:
    from transformers import MambaForCausalLM

    assert classes.of_language_model(MambaForCausalLM) is classes.LanguageModel


def test_models_that_scale_their_logits_do_not_claim_to_sum() -> None:
    from transformers import CohereForCausalLM, Gemma2ForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM

    for cls in (LlamaForCausalLM, Qwen3ForCausalLM, GPT2LMHeadModel):
        assert classes.of_language_model(cls) is classes.SummingLanguageModel
    for cls in (CohereForCausalLM, Gemma2ForCausalLM):
        assert classes.of_language_model(cls) is classes.PackingLanguageModel


def test_an_output_layer_with_a_bias_leaves_its_logits_whole(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=60, **sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "phi")
    model = models.build(f"hf/{tmp_path / 'phi'}", {"pretrained": False})
    assert model.lm_head.bias is not None  # type: ignore[union-attr]
    assert type(model).__mro__[1] is classes.PackingLanguageModel
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 60)


@pytest.mark.parametrize("most", [1 << 27, 1000])
def test_the_sum_is_that_of_the_logits(place: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """At once, and in chunks of a few tokens; loss and gradients, with documents kept apart and tokens ignored."""
    monkeypatch.setattr("bigtrain.models.head.MOST_LOGITS", most)
    model = models.build(f"hf/{place / 'llama'}", {"pretrained": False}).double()
    torch.manual_seed(3)
    tokens, targets = torch.randint(260, (2, 11)), torch.randint(260, (2, 11))
    targets[0, :4] = -100
    documents = torch.tensor([[0] * 5 + [1] * 6, [0] * 11])
    total = model(tokens, documents, sum_cross_entropy_of=targets)
    logits = model(tokens, documents)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert total.shape == ()
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    weights = list(model.parameters())
    slopes = zip(torch.autograd.grad(total, weights), torch.autograd.grad(expected, weights), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-10) for ours, theirs in slopes)


def changed(place: Path, name: str, to: Path, **changes: Any) -> str:
    to.mkdir()
    config = json.loads((place / name / "config.json").read_text())
    config |= changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return f"hf/{to}"


@pytest.mark.parametrize(
    ("changes", "args", "words"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "quantised"),
        ({"auto_map": {"AutoConfig": "mine.Config"}}, {}, "needs code of its own, which is never run"),
        ({"model_type": "unheard_of"}, {}, "knows no model"),
        ({"hidden_size": 17}, {}, "cannot build BertForSequenceClassification"),
        ({}, {"head": "causal_lm"}, "whose tokens see those that follow"),
        ({}, {"head": "regression"}, "head is 'regression'"),
        ({"architectures": ...}, {}, "its head is to be said"),
        ({"architectures": ["BertForMaskedLM"]}, {"head": "classification"}, "does not know how many classes"),
        ({}, {"num_classes": 0}, "num_classes is 0"),
        ({}, {"config": {"hidden_dropuot_prob": 0.1}}, "has no 'hidden_dropuot_prob' to change"),
        ({}, {"config": {"hidden_dropout_prob": "much"}}, "hidden_dropout_prob|transformers"),
        ({}, {"nun_classes": 2}, "has no argument 'nun_classes'"),
        ({"model_type": "t5", "is_encoder_decoder": True}, {}, "an encoder and a decoder"),
    ],
)
def test_what_is_refused(
    place: Path, tmp_path: Path, changes: dict[str, Any], args: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        models.build(changed(place, "bert", tmp_path / "it", **changes), args)


def test_folders_that_are_none(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder") as caught:
        models.build(f"hf/{place / 'brt'}")
    assert "did you mean hf/" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        models.build(f"hf/{tmp_path / 'empty'}")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is no JSON"):
        models.build(f"hf/{tmp_path / 'empty'}")
    (tmp_path / "empty" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds no object"):
        models.build(f"hf/{tmp_path / 'empty'}")


def test_sequences_longer_than_the_context(place: Path) -> None:
    bert = models.build(f"hf/{place / 'bert'}", {"pretrained": False})
    with pytest.raises(ModelError, match="25 tokens reach a model with a context of 24"):
        bert({"input_ids": torch.zeros(1, 25, dtype=torch.long)})
    llama = models.build(f"hf/{place / 'llama'}", {"pretrained": False, "config": {"max_position_embeddings": 200}})
    assert llama(torch.zeros(1, 150, dtype=torch.long)).shape == (1, 150, 260)


def test_a_decoder_classifies_by_its_last_token(place: Path) -> None:
    """What fills a row up makes no difference, though the folder names no padding token."""
    model = models.build(f"hf/{place / 'llama'}", {"pretrained": False, "num_classes": 3}).eval()
    short = torch.tensor([[9, 8, 7]])
    filled = torch.tensor([[9, 8, 7, 1, 1], [5, 5, 5, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    together = model({"input_ids": filled, "attention_mask": mask})
    assert torch.allclose(together[0], model({"input_ids": short})[0], atol=1e-6)


@pytest.mark.slow
def test_without_transformers_the_extra_is_named(place: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from bigtrain import models\n"
        f"try: models.build('hf/{place / 'bert'}')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(SetupError.__name__)
    assert "bigtrain[transformers]" in done.stdout
