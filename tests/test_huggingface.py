"""Folders of other people's models: computed as transformers computes them, or refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minillm.chat import ChatTemplate, with_chat_template
from minillm.corpus import document_marks
from minillm.errors import InputError
from minillm.generate import SamplingOptions, generate
from minillm.io.config import config_from_json, config_to_json
from minillm.io.huggingface import load_model, save_model, save_scalar_model
from minillm.io.vocabulary import load_tokenizer, save_tokenizer
from minillm.model import LanguageModel, ModelConfig, initialize, scalar_from_language_model
from minillm.tokenizer import Tokenizer
from minillm.tools.device import parameter_count

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.train(["a little world"], 262)
SHAPE = {
    "vocab_size": 262, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIG = ModelConfig(**SHAPE, head_dim=6)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": ("Llama", {"head_dim": 8}), "qwen3": ("Qwen3", {"head_dim": 10}), "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}), "mistral": ("Mistral", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "smollm3 by an interval": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "linear": ("Llama", {"rope": {"rope_type": "linear", "factor": 3.0}}),
    "yarn": ("Qwen2", {"rope": YARN}),
    "yarn without its original length": ("Llama", {"rope": {"rope_type": "yarn", "factor": 2.0}}),
    "yarn in full": ("Qwen3", {"head_dim": 6, "rope": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0,
                                                       "mscale": 0.7, "mscale_all_dim": 0.5}}),
    "yarn with a magnitude": ("Llama", {"rope": {**YARN, "attention_factor": 1.3}}),
}  # fmt: skip


def theirs(name: str, folder: Path):
    """A tiny model of transformers with random weights, saved with our tokenizer."""
    import transformers

    family, changes = FAMILIES[name]
    changes = {**SHAPE, **changes, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    rope = {"rope_theta": 500.0, **changes.pop("rope", {"rope_type": "default"})}
    config = getattr(transformers, f"{family}Config")(**changes, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            flat = 0.5 * noise if key.endswith("bias") else 1 + 0.2 * noise
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else flat)
    model.save_pretrained(folder)
    save_tokenizer(folder, TOKENIZER)
    return model


def opened(folder: Path) -> LanguageModel:
    return load_model(folder, CPU, torch.float32)[0]


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_computed_as_transformers_computes_it_and_written_so_again(tmp_path, name):
    from transformers import AutoModelForCausalLM

    judge = theirs(name, tmp_path)
    model = opened(tmp_path)
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    tokens = torch.randint(0, 262, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = model.logits(model.model(tokens)), judge(tokens).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        greedy = judge.generate(tokens[:, :20], max_new_tokens=20, do_sample=False, pad_token_id=0)[:, 20:]
    rows = generate(model, tokens[:, :20].tolist(), SamplingOptions(20, temperature=0.0), [0, 0])
    assert rows.responses == greedy.tolist()

    save_model(tmp_path / "again", model, TOKENIZER)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, rtol=0, atol=1e-4)
    assert opened(tmp_path / "again").config == model.config


def test_biases_start_at_zero_and_learn():
    model = LanguageModel(replace(CONFIG, qkv_bias=True, qk_norm=False))
    initialize(model, torch.Generator().manual_seed(0))
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert len(biases) == 6 and all(not bias.any() for bias in biases)


@pytest.mark.parametrize("rope", [("llama3", 8.0, 1.0, 4.0, 16), ("default",)])
def test_older_readers_find_the_rotary_setting_where_they_look_for_it(tmp_path, rope):
    save_model(tmp_path, LanguageModel(replace(CONFIG, rope=rope)), TOKENIZER)
    raw = json.loads((tmp_path / "config.json").read_text())
    theta, scaling = raw["rope_theta"], raw["rope_scaling"]
    assert raw["rope_parameters"] == {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    assert (scaling is None) == (rope == ("default",))
    for name in ("max_window_layers", "use_sliding_window", "torch_dtype", "use_cache", "initializer_range"):
        assert name in raw


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
REFUSED = [
    # what this model would compute otherwise
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
    ({"rope_scaling": {"rope_theta": 7.0}}, "rope_theta"),
    ({"rope_parameters": {**YARN, "original_max_position_embeddings": 8}, "rope_scaling": YARN}, "original"),
    ({"rope_parameters": YARN, "original_max_position_embeddings": 8}, "original_max_position"),
    ({"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"logit_scale": 0.5}, "logit_scale"),
    ({"attention_multiplier": 2}, "attention_multiplier"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"model_type": "mistral", "sliding_window": 32}, "sliding_window"),
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": None}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"quantization": {"bits": 4}}, "quantization"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    *(({name: True}, name) for name in ("attention_bias", "mlp_bias", "use_sliding_window")),
    # what is no setting
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {**LLAMA3, "factor": "8"}}, "factor"),
    ({"rope_parameters": {**LLAMA3, "factor": 0}}, "factor"),
    ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    *(({"rope_theta": theta, "rope_parameters": None}, "rope_theta") for theta in (0.0, 1, 1e300)),
    ({"rope_parameters": 5}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": ["default"]}}, "rotary"),
    ({"rope_theta": "big", "rope_parameters": None}, "rope_theta"),
    ({"num_hidden_layers": None}, "num_hidden_layers"),
    *(({"num_attention_heads": heads, "head_dim": None}, "num_attention_heads") for heads in (None, 0)),
    *(({"hidden_size": wide}, "hidden_size is") for wide in ("8", 8.5)),
    ({"hidden_size": "8", "head_dim": None}, "hidden_size"),
    ({"vocab_size": True}, "vocab_size"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ({"minillm_causal": "no"}, "minillm_causal"),
    ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
    *(({"model_type": "smollm3", "no_rope_layers": wrong}, "no_rope_layers") for wrong in ([1], [1, 2], 5)),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED)
def test_a_field_that_this_model_would_compute_otherwise_is_refused_by_name(tmp_path, changes, named):
    save_model(tmp_path, LanguageModel(replace(CONFIG, qk_norm=False)), TOKENIZER)
    with pytest.raises(InputError, match=named) as caught:
        config_from_json(edit(tmp_path, **changes))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([0, -1, 10**15, 1e300]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
WHOLE = config_to_json(replace(CONFIG, rope=("llama3", 8.0, 1.0, 4.0, 16)), TOKENIZER)


@given(
    st.dictionaries(st.sampled_from(sorted(WHOLE)), JSON, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(sorted(WHOLE["rope_parameters"])), JSON, max_size=2),
)
@settings(max_examples=150)
def test_any_value_in_any_field_of_config_json_is_a_shape_or_one_line(tmp_path_factory, fields, rope):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(WHOLE | {"rope_parameters": WHOLE["rope_parameters"] | rope} | fields))
    try:
        assert isinstance(config_from_json(path), ModelConfig)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_what_transformers_leaves_to_its_defaults_is_the_same_here(tmp_path):
    from transformers import AutoConfig

    for family in ("Llama", "Qwen2", "Qwen3", "SmolLM3"):
        save_model(tmp_path, LanguageModel(replace(CONFIG, qk_norm=family == "Qwen3")), TOKENIZER)
        path = edit(
            tmp_path, model_type=family.lower(), hidden_size=128, num_attention_heads=32, hidden_act="swish"
        )
        raw = json.loads(path.read_text())
        for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_theta",
                     "rope_parameters"):  # fmt: skip
            raw.pop(name)
        path.write_text(json.dumps(raw))
        config, expected = config_from_json(path), AutoConfig.from_pretrained(tmp_path)
        assert config.num_key_value_heads == expected.num_key_value_heads
        assert config.head_dim == (getattr(expected, "head_dim", None) or 128 // 32)
        assert config.rms_norm_eps == expected.rms_norm_eps
        assert config.tie_word_embeddings == expected.tie_word_embeddings
        assert config.rope_theta == expected.rope_parameters["rope_theta"]
        assert config.no_rope_layers == tuple(getattr(expected, "no_rope_layers", ()))


def test_bfloat16_stays_so_on_disk(tmp_path):
    theirs("llama", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, CPU, torch.float32)
    save_model(tmp_path / "again", model, tokenizer)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_model_with_another_output_matrix_is_refused_and_with_the_same_it_opens(tmp_path):
    save_model(tmp_path, LanguageModel(replace(CONFIG, tie_word_embeddings=True)), TOKENIZER)
    tensors = load_file(tmp_path / "model.safetensors")
    for change, named in ((0.0, None), (1.0, "lm_head.weight differs")):
        head = tensors["model.embed_tokens.weight"] + change
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        if named is None:
            opened(tmp_path)
        else:
            with pytest.raises(InputError, match=named):
                opened(tmp_path)


def test_a_masked_model_is_no_causal_one_to_anybody(tmp_path):
    save_model(tmp_path, LanguageModel(replace(CONFIG, causal=False)), TOKENIZER)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert not config_from_json(tmp_path / "config.json").causal


def test_a_score_that_is_one_number_is_no_part_of_a_model(tmp_path):
    save_model(tmp_path, LanguageModel(CONFIG), TOKENIZER)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"score.weight": torch.tensor(1.0)}, file)
    with pytest.raises(InputError, match=r"score\.weight is not part"):
        opened(tmp_path)


FOUND = {
    "adapter": ({"adapter_config.json", "adapter_model.safetensors"}, "LoRA"),
    "adapter beside its model": ({"adapter_config.json", "config.json", "model.safetensors"}, "LoRA"),
    "gguf": ({"model.gguf"}, "GGUF"),
    "pickles": ({"config.json", "tokenizer.json", "pytorch_model.bin"}, "safetensors"),
    "older tokenizer": ({"config.json", "model.safetensors", "vocab.json", "merges.txt"}, "tokenizer.json"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_is_found_instead_of_a_model_is_said_with_the_way_out(tmp_path, case):
    names, words = FOUND[case]
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=words):
        opened(tmp_path)


def test_a_name_on_the_hub_is_called_so():
    with pytest.raises(InputError, match="hf download org/model"):
        opened(Path("org/model"))


# ---- The tokenizer beside the model


def test_a_base_folder_puts_bos_in_front_of_a_text_and_a_chat_folder_leaves_it_to_the_template(tmp_path):
    from transformers import AutoTokenizer

    save_model(tmp_path / "base", LanguageModel(CONFIG), TOKENIZER)
    base = AutoTokenizer.from_pretrained(tmp_path / "base")
    bos = TOKENIZER.bos_id
    assert base("a world")["input_ids"] == [bos, *TOKENIZER.encode("a world")]
    assert "token_type_ids" not in base("a world")
    _, tokenizer = load_model(tmp_path / "base", CPU, torch.float32)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint and tokenizer.config == TOKENIZER.config | {
        "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip
    save_model(tmp_path / "chat", LanguageModel(CONFIG), with_chat_template(tokenizer))
    chat = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert chat("a world")["input_ids"] == TOKENIZER.encode("a world")
    asked = [{"role": "user", "content": "a"}]
    ids = chat.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == ChatTemplate(with_chat_template(TOKENIZER)).prompt(asked) and ids.count(bos) == 1
    reply = chat.parse_response("world<|end|>", prefix=chat.decode(ids))
    assert reply == {"role": "assistant", "content": "world"}


@pytest.mark.parametrize(
    "named",
    [
        {"added_tokens_decoder": {"262": {"content": "<tool>", "special": True}}},
        {"added_tokens_decoder": {"262": {"content": "<tool>", "special": False, "lstrip": True}}},
        {"additional_special_tokens": ["<tool>", "<|mask|>"]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"extra_special_tokens": ["<other>", "<tool>"]},
    ],
)
def test_tokens_that_only_the_settings_name_are_tokens_as_in_transformers(tmp_path, named):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path, TOKENIZER)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    text, ours = "a <tool>little <|mask|>world", load_tokenizer(tmp_path)
    assert ours.encode(text, special=True) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    (tmp_path / "again").mkdir()
    save_tokenizer(tmp_path / "again", ours)
    assert load_tokenizer(tmp_path / "again").encode(text, special=True) == ours.encode(text, special=True)


def test_a_template_that_another_tokenizer_left_in_a_folder_does_not_become_that_of_a_model_saved_there(
    tmp_path,
):
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = with_chat_template(TOKENIZER)
    save_model(tmp_path, LanguageModel(CONFIG), tokenizer)
    assert load_tokenizer(tmp_path).config["chat_template"] == tokenizer.config["chat_template"]


@pytest.mark.parametrize("named", ["<|endoftext|>", "<|end_of_text|>"])
def test_documents_are_not_framed_by_the_end_of_a_chats_reply(named):
    """What Qwen calls eos, without a bos, and Llama 3, with one, ends a reply."""
    for special in (["<|begin|>", "<|eot|>", named], ["<|begin|>", "<|eot|>"]):
        vocabulary = Tokenizer.train(["a b"], 256 + len(special), special).vocabulary
        begin, eot, document = (vocabulary.added_tokens.get(name) for name in ("<|begin|>", "<|eot|>", named))
        end = eot if document is None else document
        qwen, llama = {"eos_token": "<|eot|>"}, {"eos_token": "<|eot|>", "bos_token": "<|begin|>"}
        assert document_marks(Tokenizer(vocabulary, qwen)) == (end, end)
        assert document_marks(Tokenizer(vocabulary, llama)) == (begin, end)


def test_a_chat_folder_calls_the_end_of_a_reply_eos_and_opens_with_the_end_of_a_document(tmp_path):
    """Some tools stop at eos alone; that a document ends with another token is ours to know."""
    tokenizer = with_chat_template(TOKENIZER)
    save_model(tmp_path, LanguageModel(CONFIG), tokenizer)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|end|>"
    again = load_model(tmp_path, CPU, torch.float32)[1]
    assert again.eos_id == tokenizer.eos_id == TOKENIZER.special_tokens["<|endoftext|>"]
    assert again.fingerprint == tokenizer.fingerprint
    assert ChatTemplate(again).stop_ids == ChatTemplate(tokenizer).stop_ids


def test_the_stops_of_a_chat_model_are_in_every_file_and_those_it_came_with_are_kept(tmp_path):
    tokenizer = with_chat_template(TOKENIZER)
    save_model(tmp_path, LanguageModel(CONFIG), tokenizer)
    special, template = TOKENIZER.special_tokens, ChatTemplate(tokenizer)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text())["eos_token_id"] == list(template.stop_ids)
    stops = [*template.stop_ids, special["<|mask|>"]]
    (tmp_path / "generation_config.json").unlink()  # as transformers reads models older than that file
    edit(tmp_path, eos_token_id=stops)
    assert list(ChatTemplate(load_model(tmp_path, CPU, torch.float32)[1]).stop_ids) == stops
    edit(tmp_path, eos_token_id=None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    for _ in range(2):
        model, again = load_model(tmp_path, CPU, torch.float32)
        assert list(ChatTemplate(again).stop_ids) == stops
        save_model(tmp_path, model, again)
    for damaged in (5, "<|mask|>", [["<|mask|>"]], {"a": 1}):
        config = {**tokenizer.config, "minillm_stop_tokens": damaged}
        assert ChatTemplate(Tokenizer(TOKENIZER.vocabulary, config)).stop_ids == template.stop_ids


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|end|>", "<|mask|>", None])
def test_the_padding_of_a_reward_model_is_special_ends_nothing_and_is_the_same_in_both_files(tmp_path, pad):
    from transformers import AutoTokenizer

    tokenizer = with_chat_template(TOKENIZER)
    tokenizer = Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "pad_token": pad})
    scalar = scalar_from_language_model(LanguageModel(CONFIG), torch.Generator().manual_seed(0))
    save_scalar_model(tmp_path, scalar, tokenizer)
    named = json.loads((tmp_path / "config.json").read_text())["pad_token_id"]
    assert named == AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    assert named in TOKENIZER.special_tokens.values() and named not in ChatTemplate(tokenizer).stop_ids
    shutil.rmtree(tmp_path)
