"""The model: the laws of its attention, the judgement of transformers, and the rules of its shape."""

import gc
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROOT, document_starts
from torch import Tensor, nn

from minillm.chat import ChatTemplate, with_chat_template
from minillm.errors import InputError
from minillm.io.huggingface import load_model, load_scalar_model, save_model, save_scalar_model
from minillm.io.vocabulary import save_tokenizer
from minillm.model import (
    LanguageModel,
    ModelConfig,
    ScalarModel,
    config_of_depth,
    document_ends,
    initialize,
    scalar_from_language_model,
)
from minillm.tokenizer import Tokenizer
from minillm.tools.device import parameter_count

CPU = torch.device("cpu")
LAW = settings(max_examples=20)
# The laws are held in float64, where only the logits themselves are rounded to float32: of size 1 to
# 10, to about 1e-6.
CLOSE = {"rtol": 1e-6, "atol": 2e-6}
TINY = ModelConfig(
    vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
)  # fmt: skip


@st.composite
def configs(draw, vocab_size: int = 40) -> ModelConfig:
    """Small shapes of every kind: grouped heads, heads that do not make up the width, odd widths."""
    kv_heads, qk_norm = draw(st.integers(1, 3)), draw(st.booleans())
    heads = kv_heads * draw(st.integers(1, 3))
    rope = st.tuples(st.just("llama3"), st.floats(1.5, 8), st.just(1.0), st.floats(2, 4), st.integers(4, 64))
    return ModelConfig(
        vocab_size=vocab_size,
        # transformers refuses a Llama whose width is no multiple of its heads.
        hidden_size=draw(st.integers(5, 20)) if qk_norm else heads * draw(st.integers(3, 5)),
        intermediate_size=draw(st.integers(1, 24)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6, 8])),
        max_position_embeddings=64,
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 500_000.0])),
        rope=draw(st.just(("default",)) | rope),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        qk_norm=qk_norm,
    )


SEEDS = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """Every weight random, those that `initialize` leaves at zero or one too: no term may hide."""
    model = LanguageModel(config, dtype)
    random = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            wide = parameter.ndim == 2
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if wide else 1 + 0.2 * noise)
    return model.eval()


def random_tokens(config: ModelConfig, rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(config.vocab_size, (rows, length), generator=generator(seed))


@torch.no_grad()
def all_logits(model: LanguageModel, tokens: Tensor, **bounds) -> Tensor:
    return model.logits(model.model(tokens, **bounds))


# ---- Attention sees what it should, and nothing else


@given(configs(), SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=4))
@LAW
def test_later_tokens_right_padding_and_neighbours_in_the_batch_change_nothing(config, seed, lengths):
    model = random_model(config, seed)
    batch = random_tokens(config, len(lengths), max(lengths), seed)
    together = all_logits(model, batch)
    for row, length in enumerate(lengths):
        alone = all_logits(model, batch[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, :length], alone, **CLOSE)


def starts_of(lengths: list[int]) -> Tensor:
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    pairs = zip(firsts, lengths, strict=True)
    return torch.tensor([[first for first, length in pairs for _ in range(length)]], dtype=torch.int32)


@given(configs(), SEEDS, st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans())
@LAW
def test_documents_packed_into_a_row_equal_separate_runs(config, seed, lengths, causal):
    model = random_model(replace(config, causal=causal), seed)
    tokens, start = random_tokens(config, 1, sum(lengths), seed), starts_of(lengths)
    packed = all_logits(model, tokens, start=start)
    documents = tokens.split(lengths, dim=1)
    alone = torch.cat([all_logits(model, document) for document in documents], dim=1)
    # Angles are float32: at position 30 they are off by 1e-6, which layers of unit gain multiply.
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    scalar = scalar_from_language_model(model, generator(seed))
    values = torch.cat([scalar(document) for document in documents], dim=1)
    torch.testing.assert_close(scalar(tokens, start), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_bidirectional_model_sees_both_sides_and_a_causal_one_what_came_before(causal):
    model, tokens = random_model(replace(TINY, causal=causal)), random_tokens(TINY, 1, 6, seed=0)
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % TINY.vocab_size
    moved = (all_logits(model, other) - all_logits(model, tokens)).abs().amax(dim=2)[0] > 1e-6
    assert moved.tolist() == [not causal] * 3 + [True] * 3


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
@LAW
def test_a_document_ends_where_the_next_begins_or_the_row_does(opens):
    start = document_starts(torch.tensor(opens).logical_not().long(), bos_id=0)
    ends = document_ends(start)
    assert ends.dtype == torch.int32
    for row, end in zip(start.tolist(), ends.tolist(), strict=True):
        naive = [next((s for s in range(t, 6) if row[s] > row[t]), 6) for t in range(6)]
        assert end == naive


# ---- What the forward pass gives


@given(configs(), SEEDS, st.integers(2, 9), st.booleans())
@LAW
def test_the_loss_is_the_sum_over_targets_that_count(config, seed, length, causal):
    model, tokens = random_model(replace(config, causal=causal), seed), random_tokens(config, 3, length, seed)
    targets = random_tokens(config, 3, length, seed + 1)
    targets[:, ::2] = -100
    start = starts_of([1, length - 1]).expand(3, -1)
    logprobs = all_logits(model, tokens, start=start).double().log_softmax(-1)
    expected = -logprobs.gather(2, targets.clamp(min=0)[..., None])[..., 0][targets >= 0].sum()
    torch.testing.assert_close(model(tokens, start, targets=targets).double(), expected, rtol=1e-5, atol=1e-5)


@given(configs(), SEEDS, st.floats(0.3, 3), st.booleans())
@LAW
def test_log_probabilities_entropy_and_kl_are_those_of_the_state_before_each_token(
    config, seed, temperature, restricted
):
    model, other = random_model(config, seed), random_model(replace(config, hidden_size=24, qk_norm=True), 1)
    tokens, index = random_tokens(config, 2, 7, seed), torch.tensor([1, 3, 6, 8, 13])
    taken = tokens.flatten()[index]
    logits = all_logits(model, tokens).flatten(0, 1)[index - 1].double() / temperature
    reference = all_logits(other, tokens).flatten(0, 1)[index - 1].double() / temperature
    p, q, allowed = logits.log_softmax(1), reference.log_softmax(1), None
    if restricted:  # this model's tokens, not the other's
        allowed = (torch.rand(logits.shape, generator=generator(seed)) < 0.5).scatter(1, taken[:, None], True)
        p = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
    kl = (p.exp() * (p.clamp(min=-1e9) - q)).sum(1)
    hidden = other.model(tokens).flatten(0, 1)[index - 1], other.lm_head.weight
    options = {"temperature": temperature, "allowed": allowed}
    found = model(tokens, index=index, reference=hidden, **options)
    expected = p.gather(1, taken[:, None])[:, 0], -(p.exp() * p.clamp(min=-1e9)).sum(1), kl
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)
    assert model(tokens, index=index, **options).kl is None
    with pytest.raises(TypeError, match="of an index, take temperature, allowed"):
        model(tokens, **options)


def test_one_module_wrapped_whole_gives_every_answer_and_gradient_of_the_model_itself(tmp_path):
    """DistributedDataParallel of one process: with a loss or log-probabilities every gradient is its own."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    plain, wrapped = random_model(TINY, dtype=torch.float32), random_model(TINY, dtype=torch.float32)
    tokens = random_tokens(TINY, 2, 6, seed=0)

    def add_gradients(model: nn.Module) -> None:
        model(tokens, targets=tokens.roll(-1, 1)).backward()
        model(tokens, index=torch.tensor([2, 9])).logprobs.sum().backward()

    distributed.init_process_group("gloo", f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        add_gradients(plain)
        add_gradients(DistributedDataParallel(wrapped))
        gc.collect()  # as in start_runtime: the wrapper must not outlive the group
    finally:
        distributed.destroy_process_group()
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


COMPILED = """
import torch
from minillm.fast.shared_prompts import pack_sets
from minillm.model import LanguageModel, ModelConfig
torch.manual_seed(0)
model = LanguageModel(ModelConfig(40, 12, 20, 1, 4, 2, 6, 64))
compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
for asked in ("targets", "index", "shared"):
    tokens = torch.randint(40, (1, 6))
    options = {"targets": tokens} if asked == "targets" else {"index": torch.tensor([2, 4])}
    if asked == "shared":
        prompt, *rest = tokens[0].tolist()
        tokens, options["attend"], _ = pack_sets([[[prompt, a] for a in rest]], [1])
    gradients = []
    for forward in (model, compiled):
        model.zero_grad()
        found = forward(tokens, **options)
        (found if asked == "targets" else found.logprobs.sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
"""


def test_torch_compile_takes_the_whole_forward_in_one_graph():
    """Traced without generating code, gradients too; in a process without shape checks, which cannot be."""
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- transformers as judge


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the little world of little words"], 270)


VOCABULARY = 273  # a few rows more than tokens, as padded checkpoints have; opening drops them
DTYPES = [torch.float32, torch.bfloat16]


def hugging_face_config(config: ModelConfig):
    from transformers import LlamaConfig, Qwen3Config

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope[0] == "llama3":
        _, factor, low, high, length = config.rope
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                 "high_freq_factor": high, "original_max_position_embeddings": length}  # fmt: skip
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
             "tie_word_embeddings")  # fmt: skip
    shape = {name: getattr(config, name) for name in names}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return (Qwen3Config if config.qk_norm else LlamaConfig)(**shape, **special, rope_parameters=rope)


def hugging_face_model(config: ModelConfig, seed: int):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(hugging_face_config(config)).eval()
    random = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            wide = parameter.ndim == 2
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if wide else 1 + 0.2 * noise)
    return model


@torch.no_grad()
def judged(model, tokens: Tensor) -> Tensor:
    return model(tokens).logits.float()


@given(configs(vocab_size=VOCABULARY), SEEDS, st.sampled_from(["5GB", "1KB"]), st.sampled_from(DTYPES))
@LAW
def test_a_folder_of_transformers_whole_or_sharded_opens_here_with_the_same_logits(
    tmp_path_factory, tokenizer, config, seed, shard, dtype
):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("theirs")
    theirs = hugging_face_model(config, seed).to(dtype)
    theirs.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder, tokenizer)
    assert (shard == "1KB") == (folder / "model.safetensors.index.json").exists()
    model, loaded = load_model(folder, CPU, torch.float32)
    assert model.config == replace(config, vocab_size=tokenizer.vocab_size)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens = random_tokens(model.config, 2, 13, seed)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    judge = judged(theirs, tokens)[..., : tokenizer.vocab_size]
    torch.testing.assert_close(all_logits(model, tokens), judge, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stretched", [False, True])
def test_config_json_of_older_transformers_means_the_same(tmp_path, tokenizer, stretched):
    """Before version 5: rope_theta and rope_scaling at the top; Llama 1 had no head_dim either."""

    from transformers import AutoModelForCausalLM

    config = replace(TINY, vocab_size=VOCABULARY, qk_norm=False, head_dim=3 * 2, hidden_size=4 * 6,
                     num_key_value_heads=4, rope_theta=500.0)  # fmt: skip
    save_model(tmp_path, random_model(config), tokenizer)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads", "dtype"):
        del raw[name]
    if stretched:
        raw["rope_scaling"] = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    path.write_text(json.dumps(raw))
    model, _ = load_model(tmp_path, CPU, torch.float32)
    rope = ("llama3", 4.0, 1.0, 4.0, 32) if stretched else ("default",)
    assert model.config == replace(config, rope=rope, vocab_size=tokenizer.vocab_size)
    tokens = random_tokens(model.config, 2, 33, seed=0)
    judge = judged(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens)
    judge = judge[..., : tokenizer.vocab_size]
    torch.testing.assert_close(all_logits(model, tokens), judge, rtol=0, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_bfloat16_errs_at_most_twice_as_far_as_transformers_in_bfloat16(tmp_path, tokenizer, qk_norm):
    """Root mean square over all logits; the floor of 1e-3 is a quarter of a bfloat16 step at 1."""
    from transformers import AutoModelForCausalLM

    config = replace(TINY, vocab_size=VOCABULARY, qk_norm=qk_norm, num_hidden_layers=3)
    save_model(tmp_path, random_model(config), tokenizer)
    model, _ = load_model(tmp_path, CPU, torch.float32)
    tokens = random_tokens(model.config, 4, 31, seed=0)
    exact = all_logits(model, tokens)
    ours = all_logits(load_model(tmp_path, CPU, torch.bfloat16)[0], tokens)
    theirs = judged(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tokens)
    theirs = theirs[..., : tokenizer.vocab_size]
    error, allowed = ((x - exact).square().mean().sqrt() for x in (ours, theirs))
    assert 0 < error <= 2 * allowed + 1e-3


# ---- Shape and start


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"num_key_value_heads": 3}, "key/value heads"),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, "key/value heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    ],
)
def test_a_shape_that_cannot_be_computed_is_refused_by_name(wrong, named):
    with pytest.raises(InputError) as caught:
        replace(TINY, **wrong)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("depth", "given", "width", "inside", "heads", "kv_heads", "head"),
    [
        (1, {}, 32, 128, 1, 1, 32),
        (8, {}, 256, 704, 8, 8, 32),
        (9, {}, 288, 768, 4, 4, 64),
        (32, {"qk_norm": None}, 1024, 2752, 16, 16, 64),
        (33, {}, 1056, 2816, 8, 8, 128),
        (4, {"hidden_size": 20, "qk_norm": False}, 20, 64, 1, 1, 32),
        (4, {"num_attention_heads": 8, "head_dim": 6}, 128, 384, 8, 8, 6),
        (4, {"num_key_value_heads": 2, "intermediate_size": 9, "rope_theta": 1e6}, 128, 9, 4, 2, 32),
    ],
)
def test_the_shape_follows_from_depth_but_for_what_is_given(
    depth, given, width, inside, heads, kv_heads, head
):
    others = {name: given[name] for name in ("qk_norm", "rope_theta") if given.get(name) is not None}
    expected = ModelConfig(300, width, inside, depth, heads, kv_heads, head, 128, **others)
    assert config_of_depth(depth, 300, 128, **given) == expected


@given(configs(), SEEDS)
@LAW
def test_first_weights_depend_on_the_seed_alone_and_are_as_many_as_counted(config, seed):
    models = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        models.append(LanguageModel(config))
        initialize(models[-1], generator(seed))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    initialize(models[1], generator(seed + 1))
    assert not torch.equal(models[0].lm_head.weight, models[1].lm_head.weight)
    assert parameter_count(config) == sum(p.numel() for p in models[0].parameters())


@given(configs(), SEEDS)
@LAW
def test_each_block_starts_as_the_identity(config, seed):
    model, tokens = LanguageModel(config), random_tokens(config, 2, 5, seed)
    initialize(model, generator(seed))
    with torch.no_grad():
        assert torch.equal(model.model(tokens), model.model.norm(model.model.embed_tokens(tokens)))


def test_first_weights_keep_the_size_of_what_passes_through():
    config = config_of_depth(4, 300, 64)
    model = LanguageModel(config)
    initialize(model, generator(0))
    block = model.model.layers[0]
    matrices = block.self_attn.q_proj, block.mlp.up_proj, block.mlp.gate_proj, model.lm_head
    wide = scalar_from_language_model(LanguageModel(replace(TINY, hidden_size=4000)), generator(0)).score
    for matrix, variance in (*((m, 1 / m.weight.shape[1]) for m in matrices), (wide, 1 / 4001)):
        # The deviation of n normal numbers errs by about 1 / sqrt(2n): below 0.6%, 1.1% in the scalar head.
        assert matrix.weight.std().item() == pytest.approx(variance**0.5, rel=0.05)
        assert abs(matrix.weight.mean().item()) < 0.07 * variance**0.5


@given(configs(), SEEDS)
@LAW
def test_after_one_step_a_gradient_reaches_every_parameter(config, seed):
    from minillm.optim import LearningRates, build_optimizers

    model, tokens = LanguageModel(config), random_tokens(config, 4, 9, seed)
    initialize(model, generator(seed))
    optimizers = build_optimizers(model, LearningRates(0.02, 0.01, 0.0, 0.01), "adamw")
    for _ in range(2):
        optimizers.step(1.0, 1.0)
        logits = model.logits(model.model(tokens[:, :-1]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# ---- The scalar head


def random_scalar(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> ScalarModel:
    """A scalar model whose every weight is random, its bias too."""
    model = scalar_from_language_model(random_model(config, seed, dtype), generator(seed))
    model.bias.fill_(float(torch.randn((), generator=generator(seed))))
    return model


@given(configs(), SEEDS)
@LAW
def test_a_scalar_model_keeps_the_trunk_of_its_language_model_bit_for_bit(config, seed):
    language_model = random_model(config, seed)
    before = {name: value.clone() for name, value in language_model.model.state_dict().items()}
    scalar = scalar_from_language_model(language_model, generator(seed))
    after = scalar.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tokens = random_tokens(config, 2, 5, seed)
    expected = language_model.model(tokens).to(scalar.score.weight.dtype) @ scalar.score.weight[0]
    torch.testing.assert_close(scalar(tokens), expected)
    assert scalar.bias == 0


@given(configs(), SEEDS, st.integers(1, 3))
@LAW
def test_new_blocks_of_a_scalar_model_begin_as_the_identity_and_can_learn(config, seed, blocks):
    tokens = random_tokens(config, 2, 5, seed)
    plain = scalar_from_language_model(random_model(config, seed), generator(seed))
    deeper = scalar_from_language_model(random_model(config, seed), generator(seed), blocks)
    assert deeper.config.num_hidden_layers == len(deeper.model.layers) == len(plain.model.layers) + blocks
    assert deeper.model.config == deeper.config and plain.config == config
    torch.testing.assert_close(deeper.model(tokens), plain.model(tokens), rtol=0, atol=0)
    deeper(tokens).sum().backward()
    for block in deeper.model.layers[-blocks:]:
        # What writes into the residual stream moves first; all else follows once it has.
        assert block.self_attn.o_proj.weight.grad.any() and block.mlp.down_proj.weight.grad.any()


def test_in_bfloat16_scores_keep_the_digits_of_float32(tmp_path):
    """The trunk rounds, the head does not: scores apart by less than bfloat16 resolves stay apart."""
    model = random_scalar(TINY, 0, torch.bfloat16)
    values = model.float()(random_tokens(TINY, 8, 20, 0))
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())


@given(configs(vocab_size=VOCABULARY), SEEDS, st.lists(st.integers(1, 12), min_size=1, max_size=4))
@settings(LAW, max_examples=8)
def test_a_saved_scalar_model_gives_transformers_the_same_scores_but_for_the_bias(
    tmp_path_factory, tokenizer, config, seed, lengths
):
    from transformers import AutoModelForSequenceClassification

    folder, tokenizer = tmp_path_factory.mktemp("scalar"), with_chat_template(tokenizer)
    end = ChatTemplate(tokenizer).end_id
    model = random_scalar(config, seed, torch.float32)
    save_scalar_model(folder, model, tokenizer)
    opened, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    family = "Qwen3" if config.qk_norm else "Llama"
    assert type(opened).__name__ == f"{family}ForSequenceClassification"
    rows = random_tokens(config, len(lengths), max(lengths), seed)
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1], row[length:] = end, opened.config.pad_token_id
    with torch.no_grad():
        ours = model(rows)[range(len(lengths)), torch.tensor(lengths) - 1]
        theirs = opened(rows).logits
    assert theirs.shape == (len(lengths), 1), "one label"
    torch.testing.assert_close(ours, theirs[:, 0] + model.bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_sequence_classifier_of_transformers_opens_here(tmp_path, tokenizer, qk_norm):
    from transformers import AutoModelForSequenceClassification

    config = hugging_face_config(replace(TINY, vocab_size=VOCABULARY, qk_norm=qk_norm))
    config.num_labels, config.pad_token_id = 1, 0
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, tokenizer)
    model, _ = load_scalar_model(tmp_path, CPU, torch.float32)
    row = torch.arange(1, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(row)[:, -1], theirs(row).logits[:, 0], rtol=0, atol=1e-5)
