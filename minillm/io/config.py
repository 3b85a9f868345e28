"""config.json of Hugging Face's layout, to the shape of a model here and back.

A field that would change what a model computes, and that this one does not compute, is refused by name: so
is every field that is not known to be harmless. Where a field is absent, its default is the one that
transformers gives the family.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.chat import chat_format
from minillm.errors import InputError, reading
from minillm.io.disk import read_json, typed
from minillm.model import ModelConfig
from minillm.tokenizer import Tokenizer
from minillm.tools.streams import tables

TABLE: dict[str, Any] = tables(__file__)
SAME_NAME: list[str] = TABLE["same_name"]
ROPES: dict[str, list[str]] = TABLE["ropes"]
"""The ways to turn queries and keys that are computed here, and the numbers of each."""


def config_to_json(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says of a model, in the words of old and new readers alike."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    family = "smollm3" if config.no_rope_layers else family
    kind, *values = config.rope
    rope = {"rope_type": kind, **dict(zip(ROPES[kind], values, strict=True))}
    stops = list(chat_format(tokenizer).stop_ids)
    return {
        "architectures": [TABLE["families"][family]["architecture"]],
        "model_type": family,
        **{name: getattr(config, name) for name in SAME_NAME},
        "rope_theta": config.rope_theta,
        # transformers before version 5 and mlx-lm read the first, later versions the second.
        "rope_scaling": rope if kind != "default" else None,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        **TABLE["families"][family]["written"],
        **TABLE["written"],
        # Where nothing is said of padding, transformers' SmolLM3 has that of its own vocabulary.
        **({"no_rope_layers": turns, "pad_token_id": None} if (turns := list(config.no_rope_layers)) else {}),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        **({} if config.causal else {"is_causal": False}),
    }


def config_from_json(path: Path) -> ModelConfig:
    """The shape of a model from config.json; what this model cannot compute is refused by name."""
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in list(TABLE["families"]):
        raise InputError(f"{path}: model_type is {family!r:.40}; this opens {', '.join(TABLE['families'])}")
    raw = TABLE["families"][family].get("defaults", {}) | raw
    _refuse_unknown(raw, path)
    heads = number(raw, "num_attention_heads", int, path)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": number(raw, "hidden_size", int, path) // max(1, heads),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    kinds: dict[str, Any] = {field.name: field.type for field in fields(ModelConfig)}
    shape = {name: number(raw, name, kinds[name], path, defaults.get(name)) for name in SAME_NAME}
    shape |= _rope_from_json(raw, path, TABLE["families"][family].get("rope_theta", 10_000.0))
    if family == "smollm3":
        shape["no_rope_layers"] = _no_rope_from_json(raw, shape["num_hidden_layers"], path)
    causal = all(number(raw, name, bool, path, True) for name in ("is_causal", "minillm_causal"))
    try:
        return ModelConfig(**shape, qk_norm=family == "qwen3", qkv_bias=family == "qwen2", causal=causal)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _refuse_unknown(raw: dict[str, Any], path: Path) -> None:
    family, only = raw["model_type"], TABLE["only"]
    known = {*SAME_NAME}.union(
        TABLE["read"], *TABLE["harmless"].values(), TABLE["families"][family].get("own", ())
    )
    wrong = {name: value for name, value in raw.items()
             if value is not None and name not in known and value not in only.get(name, ())}  # fmt: skip
    layers, window = raw.get("layer_types"), raw.get("sliding_window")
    if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}):
        wrong["layer_types"] = layers
    longest = number(raw, "max_position_embeddings", int, path)
    if family == "mistral" and window is not None and not (type(window) is int and window >= longest):
        wrong["sliding_window"] = window
    for name, value in wrong.items():
        raise InputError(f"{path}: {name} is {value!r:.60}, which this model does not compute")


def _no_rope_from_json(raw: dict[str, Any], count: int, path: Path) -> tuple[int, ...]:
    """Whether each layer turns queries and keys, 1 or 0."""
    interval = number(raw, "no_rope_layer_interval", int, path, 4)
    usual = [int((i + 1) % max(1, interval) > 0) for i in range(min(count, 1000))]
    turns = number(raw, "no_rope_layers", list, path, usual)[: max(0, count)]
    if len(turns) != count or not all(type(turn) is int and turn in (0, 1) for turn in turns):
        raise InputError(f"{path}: no_rope_layers is {turns!r:.60}; give 0 or 1 for each of {count} layers")
    return tuple(turns)


def _rope_from_json(raw: dict[str, Any], path: Path, theta: float) -> dict[str, Any]:
    """Rotary settings, from the fields of old and new versions of transformers, which must not disagree."""
    rope: dict[str, Any] = {}
    spellings = [number(raw, name, dict, path, {}) for name in ("rope_parameters", "rope_scaling")]
    top = {name: raw.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    for spelling in (*spellings, top):
        kind = spelling.get("rope_type", spelling.get("type"))
        for name, value in {**spelling, "rope_type": kind}.items():
            if value is None or name == "type":
                continue
            known = {*TABLE["rope"]}.union(*ROPES.values())
            if name not in known and value not in TABLE["only"].get(name, ()):
                wrong = f"{path}: rotary positions with {name!r:.60}: {value!r:.60}"
                raise InputError(f"{wrong}, which this does not compute")
            if rope.setdefault(name, value) != value:
                raise InputError(f"{path}: {name} is {rope[name]!r:.60} and {value!r:.60}; remove one")
    kind, longest = rope.get("rope_type", "default"), number(raw, "max_position_embeddings", int, path)
    if kind not in list(ROPES):
        raise InputError(f"{path}: rotary positions of type {kind!r:.40}; this computes {', '.join(ROPES)}")
    defaults: dict[str, Any] = {"original_max_position_embeddings": longest}
    if kind == "yarn":
        original = number(rope, "original_max_position_embeddings", int, path, longest)
        factor = number(rope, "factor", float, path, longest / max(1, original))
        scale, every = (number(rope, name, float, path, 0.0) for name in ("mscale", "mscale_all_dim"))
        both = scale and every
        usual = _magnitude(factor, scale) / _magnitude(factor, every) if both else _magnitude(factor)
        defaults |= {"factor": factor, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": usual}
    whole = {"original_max_position_embeddings"}
    values = tuple(number(rope, name, int if name in whole else float, path, defaults.get(name))
                   for name in ROPES[kind])  # fmt: skip
    found = {"rope_theta": number(rope, "rope_theta", float, path, theta)}
    in_range = found["rope_theta"] > 1 and all(0 < value < 2**53 for value in (*found.values(), *values))
    if not in_range or (kind == "llama3" and values[1] >= values[2]):
        wrong = f"{path}: a number of its rotary positions is out of range: {rope | found}"
        raise InputError(f"{wrong}; the base must be above 1, the low frequency factor below the high one")
    return {**found, "rope": (kind, *values)}


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """How much larger queries and keys are made (Peng et al. 2023, arXiv 2309.00071, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def number(raw: dict[str, Any], name: str, kind: type, path: Path, default: Any = None) -> Any:
    """raw[name], or the default where it is absent or null; InputError where it is not of its kind."""
    with reading(path, "restore the file", "used", (TypeError, OverflowError)):
        return typed(name, default if raw.get(name) is None else raw[name], kind)


def stretched(frequencies: Float[Tensor, " half"], config: ModelConfig) -> Float[Tensor, " half"]:
    """The frequencies, in radians per position, as `config` stretches them to longer rows than a model was
    first trained on.

    The pairs of channels that turn often within the original length keep theirs; the others are slowed down
    by a factor, so that positions beyond that length stay within known angles. The ramp between the two is
    linear in the turns (Llama 3.1), or in the number of the pair (YaRN: Peng et al. 2023, arXiv 2309.00071,
    section 3.2). The older linear stretching slows down all pairs alike.
    """
    kind, factor, *more = config.rope
    if kind == "llama3":
        low, high, length = more
        turns = length * frequencies / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        fast, slow, _, length = more
        C, theta = config.head_dim, config.rope_theta
        first, last = (
            C * math.log(length / (2 * math.pi) / turns) / (2 * math.log(theta)) for turns in (fast, slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), C - 1)
        pair = torch.arange(len(frequencies))
        kept = 1 - ((pair - first) / ((last - first) or 0.001)).clamp(0, 1)
    else:
        return frequencies / factor
    return frequencies * (kept + (1 - kept) / factor)
