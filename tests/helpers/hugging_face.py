"""Hugging Face folders made with transformers from a configuration, saved in shards, with real small tokenizers."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch

WORDS = ("the", "film", "plot", "was", "is", "it", "so")
OF_LABEL = {"mid": ("plain", "usual"), "neg": ("bad", "awful"), "pos": ("good", "great")}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def bert(folder: Path, *, kind: str = "BertForSequenceClassification", tokenizer: bool = True, **changes: Any) -> Path:
    """A BERT of two layers for three classes, or another head of it."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=64, max_position_embeddings=24, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **(sizes | changes),
    )  # fmt: skip
    torch.manual_seed(7)
    _save(getattr(transformers, kind)(config), folder)
    if tokenizer:
        _bert_tokenizer(folder)
    return folder


def llama(folder: Path, *, kind: str = "Llama", head: str = "ForCausalLM", **changes: Any) -> Path:
    """A decoder of two layers; `kind` is transformers' word for a family of them."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    others = {"vocab_size": 260, "num_hidden_layers": 2, "max_position_embeddings": 96, "tie_word_embeddings": True}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(**(sizes | others | ends | changes))
    torch.manual_seed(8)
    _save(getattr(transformers, kind + head)(config), folder)
    _llama_tokenizer(folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    # Values of the size that training leaves behind: at transformers' 0.02 logits would hardly differ.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def _bert_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *(word for some in OF_LABEL.values() for word in some)]
    made = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names).save_pretrained(folder)


def _llama_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    made.add_special_tokens(words[:4])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def reviews(path: Path, count: int = 48) -> Path:
    """Texts whose last word tells their label, as CSV or JSONL."""
    chosen = random.Random(3)
    rows = []
    for number in range(count):
        label = sorted(OF_LABEL)[number % 3]
        words = [*chosen.choices(WORDS, k=chosen.randint(1, 6)), chosen.choice(OF_LABEL[label])]
        rows.append({"text": " ".join(words), "label": label})
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as CSV or JSONL, by the ending of the name."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def chats(path: Path, count: int = 12) -> Path:
    """Conversations of one or two questions, each answered by its own last word."""
    chosen = random.Random(4)
    rows = []
    for number in range(count):
        said = [{"role": "system", "content": "be brief"}] if number % 3 == 0 else []
        for _ in range(1 + number % 2):
            words = chosen.choices(("a", "fox", "dog"), k=2)
            said += [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": words[-1]}]
        rows.append({"messages": said})
    return write_rows(path, rows)


def run_file(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run over the reviews or the conversations of a folder, by the model's kind."""
    is_bert = json.loads((model / "config.json").read_text())["model_type"] == "bert"
    args = {"max_tokens": 24} if is_bert else {"context": 95}
    name, path = ("text_classification", "reviews.csv") if is_bert else ("conversations", "chats.jsonl")
    return {
        "run": {"name": model.name, "dir": str(folder / "runs"), "seed": 1},
        "task": "text_classification" if is_bert else "causal_lm",
        "model": {"name": f"hf/{model}"},
        "data": {
            "name": name,
            "args": {"path": str(folder / path), **args},
            "batch_size": 10 if is_bert else 3,
            "eval": {"split": 0.25},
        },
        "train": {"steps": 4},
        "optim": {"lr": 0.003},
        "engine": {"device": "cpu"},
        "checkpoint": {"every_steps": 2},
        "track": {"log_every": 1, "progress": "none", "report": False},
        **changes,
    }
