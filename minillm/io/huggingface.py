"""Hugging Face's layout on disk: config.json, weights (weights.py), and the tokenizer beside them.

Models of the Llama, Qwen2, Qwen3, Mistral and SmolLM3 layouts made by others open here, sharded or not; those
written here open in transformers with the same logits. What this model cannot compute is refused by name
(config.py): sliding windows, mixtures of experts, quantised weights.

A scalar model is a sequence classifier with one label there. Its classes have no bias, so that the one
number by which our scores are shifted is a field of config.json that is ours alone: transformers gives
every score larger by exactly `-minillm_score_bias`, which no ranking notices.
"""

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.chat import TEMPLATE, ChatTemplate
from minillm.errors import InputError
from minillm.io.config import config_from_json, config_to_json, number
from minillm.io.disk import read_json, write_json
from minillm.io.vocabulary import load_tokenizer, save_tokenizer
from minillm.io.weights import load_weights, read_weights, write_weights, writes
from minillm.model import LanguageModel, ScalarModel
from minillm.tokenizer import Tokenizer, Vocabulary
from minillm.tools.device import parameter_count


def save_model(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """config.json, tokenizer files and weights, these last: in float32, or in bfloat16 where they came so.
    For a chat model also generation_config.json: transformers looks there where a reply ends.

    All processes of a run must call this; the first writes.
    """
    named = str(model.stored_dtype).removeprefix("torch.")
    raw = config_to_json(model.config, tokenizer) | {"dtype": named, "torch_dtype": named}
    weights = {name: tensor.to(model.stored_dtype) for name, tensor in model_tensors(model).items()}
    if writes() and tokenizer.config.get("chat_template") is not None:
        stops = list(ChatTemplate(tokenizer).stop_ids)
        write_json(folder / "generation_config.json", {"eos_token_id": stops})
    _save(folder, raw, tokenizer, weights)


def _save(folder: Path, raw: dict[str, Any], tokenizer: Tokenizer, weights: dict[str, Tensor]) -> None:
    if writes():
        write_json(folder / "config.json", raw)
        save_tokenizer(folder, _for_others(tokenizer))
    write_weights(folder, weights)


def save_scalar_model(folder: Path, model: ScalarModel, tokenizer: Tokenizer) -> None:
    """As `save_model`, in the layout of a sequence classifier with one label."""
    raw, pad = config_to_json(model.config, tokenizer), padding_token(tokenizer)
    raw |= {
        "architectures": [raw["architectures"][0].replace("CausalLM", "SequenceClassification")],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        # transformers reads the score at a row's last token that is not this one.
        "pad_token_id": tokenizer.special_tokens.get(pad or ""),
        "minillm_score_bias": model.bias.item(),
    }
    padded = Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "pad_token": pad})
    _save(folder, raw, padded, model_tensors(model))


def padding_token(tokenizer: Tokenizer) -> str | None:
    """The name of a special token that ends nothing: the pad, mask or bos if they do not, else any; None
    where every special token ends something, and rows can only be scored one by one."""
    stops, special = ChatTemplate(tokenizer).stop_ids, tokenizer.special_tokens
    names = [tokenizer.config.get(f"{role}_token") for role in ("pad", "mask", "bos")] + list(special)
    return next((n for n in names if isinstance(n, str) and special.get(n, stops[0]) not in stops), None)


def _for_others(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with what other people's tools want to be told. Every document of a base model began with
    bos, so a text that is encoded for one must; a chat template writes its own, and where its replies end
    some look for eos alone (CTranslate2)."""
    config: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"], **tokenizer.config}
    vocabulary, bos = tokenizer.vocabulary, _bos_in_front(tokenizer)
    if config.get("chat_template") == TEMPLATE:
        ends = [name for name, i in tokenizer.special_tokens.items() if i in ChatTemplate(tokenizer).stop_ids]
        config |= {"minillm_eos_token": config.get("eos_token"), "eos_token": "<|end|>"}
        config["response_template"] = {
            "defaults": {"role": "assistant"},
            "start_anchor": "<|assistant|>",
            "fields": {"content": {"close": ends, "content": "text"}},
        }
    if isinstance(vocabulary, Vocabulary) and vocabulary.post_processor in (None, bos):
        vocabulary = replace(vocabulary, post_processor=None if "chat_template" in config else bos)
    return Tokenizer(vocabulary, config)


def _bos_in_front(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """What a tokenizer.json says where bos is put before every text."""
    name = next((name for name, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id), None)
    if name is None:
        return None
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": text, "type_id": i}} for i, text in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [tokenizer.bos_id], "tokens": [name]}},
    }


def _from_others(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, with the end of its documents as eos, and the stops that came in
    generation_config.json, or else config.json."""
    tokenizer = load_tokenizer(folder)
    if "minillm_eos_token" in (config := dict(tokenizer.config)):
        config["eos_token"] = config.pop("minillm_eos_token")
        tokenizer = Tokenizer(tokenizer.vocabulary, config)
    # A template that does not work is told where it is used; that file is no part of the model.
    with suppress(InputError, TypeError):
        path = folder / "generation_config.json"
        stops = read_json(path if path.exists() else folder / "config.json").get("eos_token_id")
        names = {i: name for name, i in tokenizer.special_tokens.items()}
        own = ChatTemplate(tokenizer).stop_ids
        listed = stops if isinstance(stops, list) else [stops]
        if kept := [names[stop] for stop in listed if stop in names and stop not in own]:
            return Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "minillm_stop_tokens": kept})
    return tokenizer


def model_tensors(model: LanguageModel | ScalarModel) -> dict[str, Tensor]:
    """The weights by their Hugging Face names; a tied output matrix is stored once."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_model(
    folder: Path, device: torch.device, compute_dtype: torch.dtype, causal: bool = False
) -> tuple[LanguageModel, Tokenizer]:
    """Opens a run folder or a Hugging Face folder of a layout that config.toml has; or a causal one only."""
    model, tokenizer, tensors = _open_folder(folder, LanguageModel, compute_dtype)
    if causal and not model.config.causal:
        what = f"{folder}: was trained on masked tokens and cannot go on with a text"
        raise InputError(f"{what}; give a causal model")
    if all(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
        model.stored_dtype = torch.bfloat16
    return model.to(device), tokenizer


load_causal_model = partial(load_model, causal=True)
"""Opens a model that goes on with a text. InputError for one that sees both sides of a token."""


def load_scalar_model(
    folder: Path, device: torch.device, compute_dtype: torch.dtype
) -> tuple[ScalarModel, Tokenizer]:
    """Opens a reward model: a run folder or a Hugging Face sequence classifier with one label."""
    model, tokenizer, _ = _open_folder(folder, ScalarModel, compute_dtype)
    path = folder / "config.json"
    bias = number(read_json(path), "minillm_score_bias", float, path, 0.0)
    if not math.isfinite(bias):
        raise InputError(f"{path}: minillm_score_bias is {bias}; restore the file")
    model.bias.fill_(bias)
    return model.to(device), tokenizer


def _open_folder(
    folder: Path, kind: type[Any], compute_dtype: torch.dtype
) -> tuple[Any, Tokenizer, dict[str, Tensor]]:
    """What the folder of a model of this kind holds, checked to be of one model, and its tensors."""
    if advice := _instead_of_a_model(folder):
        raise InputError(f"{folder}: {advice}")
    config = config_from_json(folder / "config.json")
    tokenizer = _from_others(folder)
    if tokenizer.vocab_size > config.vocab_size:
        what = f"tokenizer.json has {tokenizer.vocab_size} tokens but config.json says {config.vocab_size}"
        raise InputError(f"{folder}: {what}; the two belong to different models")
    tensors = read_weights(folder)
    found = sum(tensors.get("score.weight", torch.empty(0)).shape[:1])
    kinds, labels = ("a language model", "a reward model"), int(kind is ScalarModel)
    if found != labels:
        what = kinds[found] if found < 2 else f"a classifier of {found} labels"
        raise InputError(f"{folder}: is {what}, by score.weight; give {kinds[labels]}'s folder")
    held = sum(tensor.numel() for tensor in tensors.values())
    # Told before a model is made: a wrong number must not ask for more memory than there is.
    if parameter_count(config) > 2 * held:
        what = f"config.json describes {parameter_count(config):,} weights but the weight files hold {held:,}"
        raise InputError(f"{folder}: {what}; the two belong to different models")
    # Others fill the vocabulary up with rows that no token has; a sample must not fall on one.
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors and len(tensors[name]) == config.vocab_size:
            tensors[name] = tensors[name][: tokenizer.vocab_size]
    model = kind(replace(config, vocab_size=tokenizer.vocab_size), compute_dtype)
    load_weights(model, tensors, folder)
    return model, tokenizer, tensors


def _instead_of_a_model(folder: Path) -> str | None:
    """What a folder holds that is no model this opens, and the way out; None where it may be one."""
    gguf = "a GGUF file, for llama.cpp; give the Hugging Face folder that it was made from"
    if not folder.is_dir():
        if folder.suffix == ".gguf":
            return f"is {gguf}"
        way = f"; if it is a model on the Hugging Face hub: hf download {folder} --local-dir DIR"
        is_hub = not folder.is_absolute() and len(folder.parts) == 2
        return f"no such folder; give a run folder or a Hugging Face model folder{way * is_hub}"
    names = {path.name for path in folder.iterdir()}
    endings = {Path(name.removesuffix(".index.json")).suffix for name in names}
    if "adapter_config.json" in names:  # transformers puts it onto a model beside it
        return "holds a LoRA adapter; merge it into its model with PEFT (merge_and_unload, save_pretrained)"
    if ".safetensors" not in endings and ".gguf" in endings:
        return f"holds {gguf}"
    if ".safetensors" not in endings and endings & {".bin", ".pth", ".pt"}:
        return "holds its weights as pickles; open it with transformers and save_pretrained it as safetensors"
    if "tokenizer.json" not in names and names & {"merges.txt", "vocab.json", "tokenizer.model"}:
        return "has no tokenizer.json; AutoTokenizer.from_pretrained(…).save_pretrained(…) writes one"
    return None
