"""Hugging Face's layout on disk: config.json, model.safetensors, and the tokenizer beside them.

Models of the Llama and Qwen3 layouts made by others open here, sharded or not; those written here open in
transformers with the same logits. What this model cannot compute is refused by name: biases, sliding
windows, mixtures of experts, quantised weights, rotary positions other than plain and Llama 3's.

A scalar model is a sequence classifier with one label there. Its classes have no bias, so that the one
number by which our scores are shifted is a field of config.json that is ours alone: transformers gives
every score larger by exactly `-minillm_score_bias`, which no ranking notices.
"""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.errors import InputError
from minillm.files import read_json, write_atomically, write_json
from minillm.io.template import ChatTemplate
from minillm.model import LanguageModel, ModelConfig, ScalarModel, parameter_count
from minillm.tokenizer import Tokenizer


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """config.json, tokenizer files and model.safetensors (float32), the weights last.

    For a chat model also generation_config.json: there transformers looks up where a reply ends.
    """
    write_json(folder / "config.json", config_to_json(model.config, tokenizer))
    tokenizer.save(folder)
    if tokenizer.config.get("chat_template") is not None:
        stops = list(ChatTemplate(tokenizer).stop_ids)
        write_json(folder / "generation_config.json", {"eos_token_id": stops})
    weights = model_tensors(model)
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})


def save_scalar_model(folder: Path, model: ScalarModel, tokenizer: Tokenizer) -> None:
    """As `save_model`, in the layout of a sequence classifier with one label."""
    raw = config_to_json(model.config, tokenizer)
    raw |= {
        "architectures": [CLASSIFIERS[raw["model_type"]]],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        # transformers reads the score at a row's last token that is not this one.
        "pad_token_id": padding_id(tokenizer),
        "minillm_score_bias": model.bias.item(),
    }
    write_json(folder / "config.json", raw)
    tokenizer.save(folder)
    write_tensors(folder / "model.safetensors", model_tensors(model), {"format": "pt"})


def padding_id(tokenizer: Tokenizer) -> int:
    """A token that never ends a response: the pad or end of document if they do not, else any."""
    end = ChatTemplate(tokenizer).end_id
    named = [tokenizer.special_tokens.get(str(tokenizer.config.get("pad_token"))), tokenizer.eos_id]
    return next(token for token in (*named, 0, 1) if token not in (None, end))


def model_tensors(model: LanguageModel | ScalarModel) -> dict[str, Tensor]:
    """The weights by their Hugging Face names; a tied output matrix is stored once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_model(
    folder: Path, device: torch.device, compute_dtype: torch.dtype
) -> tuple[LanguageModel, Tokenizer]:
    """Opens a run folder or a Hugging Face folder of the Llama or Qwen3 layout."""
    config, tokenizer, tensors = _open_folder(folder)
    if "score.weight" in tensors:
        raise InputError(f"{folder}: is a reward model and says nothing; give a language model")
    model = LanguageModel(config, compute_dtype)
    load_weights(model, tensors, folder)
    return model.to(device), tokenizer


def load_causal_model(
    folder: Path, device: torch.device, compute_dtype: torch.dtype
) -> tuple[LanguageModel, Tokenizer]:
    """Opens a model that goes on with a text. InputError for one that sees both sides of a token."""
    model, tokenizer = load_model(folder, device, compute_dtype)
    if not model.config.causal:
        raise InputError(
            f"{folder}: was trained on masked tokens and cannot go on with a text; give a causal model"
        )
    return model, tokenizer


def load_scalar_model(
    folder: Path, device: torch.device, compute_dtype: torch.dtype
) -> tuple[ScalarModel, Tokenizer]:
    """Opens a reward model: a run folder or a Hugging Face sequence classifier with one label."""
    config, tokenizer, tensors = _open_folder(folder)
    if "score.weight" not in tensors:
        raise InputError(f"{folder}: has no weight score.weight; give a reward model's folder")
    model = ScalarModel(config, compute_dtype)
    load_weights(model, tensors, folder)
    path = folder / "config.json"
    bias = _field(read_json(path), "minillm_score_bias", float, path, 0.0)
    if not math.isfinite(bias):
        raise InputError(f"{path}: minillm_score_bias is {bias}; restore the file")
    model.bias.fill_(bias)
    return model.to(device), tokenizer


def _open_folder(folder: Path) -> tuple[ModelConfig, Tokenizer, dict[str, Tensor]]:
    """What a model's folder holds, checked to be of one model."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a run folder or a Hugging Face model folder")
    config = config_from_json(folder / "config.json")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens but config.json says "
            f"{config.vocab_size}; the two belong to different models"
        )
    tensors = read_weights(folder)
    held = sum(tensor.numel() for tensor in tensors.values())
    # Told before a model is made: a wrong number must not ask for more memory than there is.
    if parameter_count(config) > 2 * held:
        raise InputError(
            f"{folder}: config.json describes {parameter_count(config):,} weights but the weight files "
            f"hold {held:,}; the two belong to different models"
        )
    # Others fill the vocabulary up with rows that no token has; a sample must not fall on one.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors and len(tensors[name]) == config.vocab_size:
            tensors[name] = tensors[name][: tokenizer.vocab_size]
    return replace(config, vocab_size=tokenizer.vocab_size), tokenizer, tensors


def load_weights(model: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Copies tensors into a model with a `config`; every name and shape must match."""
    expected, config = model.state_dict(), cast(ModelConfig, model.config)
    # A constant, which old checkpoints hold too.
    tensors = {n: tensor for n, tensor in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        tensors.pop("lm_head.weight", None)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise InputError(f"{origin}: weight {missing[0]} is missing ({len(missing)} in all)")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{origin}: weight {unknown[0]} is not part of this model ({len(unknown)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{origin}: weight {name} is {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name].shape)}"
            )
        if not tensor.is_floating_point():
            raise InputError(f"{origin}: weight {name} is of {tensor.dtype}, which is no weight's")
        if not tensor.isfinite().all():
            raise InputError(f"{origin}: weight {name} holds values that are not finite; restore the file")
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_tensors(single)[0]
    shards = read_json(index).get("weight_map")
    files = list(shards.values()) if isinstance(shards, dict) else []
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise InputError(f"{index}: has no weight_map from weights to files; download the model again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(files)):
        tensors |= read_tensors(folder / shard)[0]
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, whole or not at all."""

    def write(file: Path) -> None:
        try:
            save_file(tensors, file, metadata=metadata)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error).splitlines()[0]) from error

    write_atomically(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata."""
    try:
        open(path, "rb").close()  # of whatever forbids it the library says that the file is missing
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; the folder is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); restore it") from error


# config.json

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CLASSIFIERS = {"llama": "LlamaForSequenceClassification", "qwen3": "Qwen3ForSequenceClassification"}
SAME_NAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
UNSUPPORTED = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "quantization_config": (None,),
}


def config_to_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says of a model, as transformers reads it."""
    family = "qwen3" if config.qk_norm else "llama"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_llama3:
        factor, low, high, length = config.rope_llama3
        rope |= {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": length,
        }  # fmt: skip
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{name: getattr(config, name) for name in SAME_NAME},
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "dtype": "float32",
        # transformers knows no bidirectional model of this layout: the field is ours.
        **({} if config.causal else {"minillm_causal": False}),
    }


def config_from_json(path: Path) -> ModelConfig:
    """The shape of a model from config.json; what this model cannot compute is refused by name."""
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in list(ARCHITECTURES):
        raise InputError(f"{path}: model_type is {family!r}; this opens {' and '.join(ARCHITECTURES)}")
    for name, supported in UNSUPPORTED.items():
        if raw.get(name) not in supported:
            raise InputError(f"{path}: {name} is {raw[name]!r}, which this model does not compute")
    heads = _field(raw, "num_attention_heads", int, path)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": _field(raw, "hidden_size", int, path) // max(1, heads),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    kinds: dict[str, Any] = {field.name: field.type for field in fields(ModelConfig)}
    shape = {name: _field(raw, name, kinds[name], path, defaults.get(name)) for name in SAME_NAME}
    shape |= _rope_from_json(raw, path)
    causal = _field(raw, "minillm_causal", bool, path, True)
    try:
        return ModelConfig(**shape, qk_norm=family == "qwen3", causal=causal)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _rope_from_json(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Rotary settings, from today's `rope_parameters` or the older `rope_theta` + `rope_scaling`."""
    older, newer = (_field(raw, name, dict, path, {}) for name in ("rope_scaling", "rope_parameters"))
    rope = {"rope_theta": raw.get("rope_theta"), **older, **newer}
    theta = _field(rope, "rope_theta", float, path, 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise InputError(f"{path}: rotary positions of type {kind!r}; this computes default and llama3")
    kinds = {"factor": float, "low_freq_factor": float, "high_freq_factor": float,
             "original_max_position_embeddings": int}  # fmt: skip
    stretch = tuple(_field(rope, name, kind, path) for name, kind in kinds.items())
    return {"rope_theta": theta, "rope_llama3": stretch}


def _field(raw: dict[str, Any], name: str, kind: type, path: Path, default: Any = None) -> Any:
    """raw[name], or the default where it is absent or null; InputError where it is not of its kind."""
    value = default if raw.get(name) is None else raw[name]
    if kind is float and type(value) is int and abs(value) < 2**63:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{path}: {name} is {value!r}, which is no {kind.__name__}; restore the file")
    return value
