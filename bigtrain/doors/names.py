"""What a parameter is called here and in a Hugging Face folder.

Our gpt has Llama's names without their leading `model.`; every other model has its own names, unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigtrain.errors import CheckpointError, CorruptError

OUTPUT = "lm_head.weight"

# The argument of our gpt for each key of a Llama's config.json.
_LLAMA = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "context",
    "tie_word_embeddings": "tied",
    "rms_norm_eps": "norm_eps",
}
# What else a Llama could have that our gpt has not, and the value that means it has not.
_PLAIN = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
    "logits_scaling": 1.0,
}
# What transformers takes where config.json does not say it, in its LlamaConfig: not what our gpt takes by itself.
_UNSAID = {
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_WRITTEN = ("attention_bias", "mlp_bias", "hidden_act", "pretraining_tp")
# What must be said: without it nothing can be built.
_SAID = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model of our gpt's shape."""
    return config.get("model_type") == "llama"


def from_llama(name: str) -> str:
    """Our name of a Llama's parameter."""
    return name.removeprefix("model.")


def to_llama(name: str) -> str:
    """A Llama's name of our parameter."""
    return name if name == OUTPUT else f"model.{name}"


def llama_config(args: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of a gpt that was built with these arguments, all of them given, and is kept in this dtype."""
    config = {theirs: args[ours] for theirs, ours in _LLAMA.items()}
    theta = args["rope_theta"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        **{key: value for key, value in _PLAIN.items() if key in _WRITTEN},
        "head_dim": args["width"] // args["heads"],
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "attention_dropout": args["dropout"],
        "torch_dtype": dtype,
        "use_cache": True,
    }


def gpt_args(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The arguments of our gpt for a Llama's config.json.

    Raises:
        CheckpointError: Where it is a Llama that our gpt cannot be.
        CorruptError: Where its sizes are no numbers.
    """
    config = _UNSAID | {key: value for key, value in config.items() if value is not None}  # null: not said
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0)) if isinstance(rope, Mapping) else rope
    _check_numbers({**{key: config[key] for key in _LLAMA if key in config}, "rope_theta": theta}, where)
    unlike = [f"{key}={config[key]!r}" for key, value in _PLAIN.items() if config.get(key, value) != value]
    kind, part = rope.get("rope_type", rope.get("type", "default")), rope.get("partial_rotary_factor", 1.0)
    if kind != "default":
        unlike.append(f"rope_type={kind!r}")
    if part != 1.0:
        unlike.append(f"partial_rotary_factor={part!r}")
    heads = config.get("num_attention_heads", 1)
    if config.get("head_dim") not in (None, config.get("hidden_size", 0) // heads):
        unlike.append(f"head_dim={config['head_dim']!r}")
    missing = [key for key in _SAID if key not in config]
    if unlike or missing:
        said = f"it does not say {', '.join(missing)}" if missing else f"it has {', '.join(unlike)}"
        raise CheckpointError(f"this Llama is none that gpt can be: {said}", where=where)
    args = {ours: config[theirs] for theirs, ours in _LLAMA.items() if theirs in config}
    args.setdefault("kv_heads", args["heads"])
    return {**args, "rope_theta": float(theta)}


def _check_numbers(given: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json, which anybody may have written, whose sizes are none."""
    wrong = [
        f"{key}={value!r}"
        for key, value in given.items()
        if not isinstance(value, int | float if key in ("rms_norm_eps", "rope_theta") else int)
        or (value <= 0 and key != "tie_word_embeddings")
    ]
    if wrong:
        raise CorruptError(f"config.json says {', '.join(wrong)}", where=where, remedy="put right what it says")
