"""Sampling: what is drawn, with which probability, and that neighbours and caches change nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm import generate as generate_module
from minillm.errors import InputError
from minillm.fast.decode import FoldedCache
from minillm.generate import Samples, SamplingOptions, filter_logits, generate, stream
from minillm.model import KVCache, LanguageModel, ModelConfig
from minillm.tools.streams import stream_text

LAW = settings(max_examples=25)
BASE = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
SHAPES = {
    "qwen3": BASE,
    "grouped heads": replace(BASE, num_key_value_heads=2),
    "llama": replace(BASE, qk_norm=False, num_key_value_heads=1, rms_norm_eps=1e-2),
    "tied": replace(BASE, tie_word_embeddings=True, head_dim=6),
    "llama3 angles": replace(BASE, rope=("llama3", 8.0, 1.0, 4.0, 16)),
}
PROMPTS = st.lists(
    st.lists(st.integers(0, BASE.vocab_size - 1), min_size=1, max_size=12), min_size=1, max_size=6
)


def random_model(config: ModelConfig = BASE, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Every weight random, norms too, so that a weight left out or misplaced shows."""
    model, generator = LanguageModel(config), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
    model.model.compute_dtype = dtype
    return model.to(dtype) if dtype == torch.float64 else model


MODEL = random_model()


def last_logits(model: LanguageModel, tokens: list[int]) -> Tensor:
    """The plain forward pass: no cache, no batch, no padding."""
    with torch.no_grad():
        return model.logits(model.model(torch.tensor([tokens])))[0, -1].double()


def sampled_from(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Log-probabilities by the definition, one token after the other."""
    logits = logits / options.temperature
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    order = order[: options.top_k or len(order)]
    probabilities = logits[order].softmax(0)
    kept, mass = [], 0.0
    for token, probability in zip(order, probabilities.tolist(), strict=True):
        kept.append(token)
        mass += probability
        if mass >= options.top_p and options.top_p < 1:
            break
    left = torch.full_like(logits, -math.inf)
    left[kept] = logits[kept]
    return left.log_softmax(0)


def assert_drawn(
    model: LanguageModel,
    samples: Samples,
    seeds: Sequence[int],
    options: SamplingOptions,
    longest: int,
    by: float,
) -> None:
    """Each token is the one that its row's next number falls on, by the definition, up to `by`."""
    for prompt, response, seed in zip(samples.prompts, samples.responses, seeds, strict=True):
        generator, tokens = torch.Generator().manual_seed(seed), list(prompt)
        numbers = torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)
        for token, number in zip(response, numbers.tolist(), strict=False):
            mass = sampled_from(last_logits(model, tokens[-longest:]), options).exp()
            before, own = float(mass[:token].sum()), float(mass[token])
            assert before - by <= number <= before + own + by
            tokens.append(token)


# ---- The cache


@pytest.mark.parametrize("kind", [KVCache, FoldedCache])
@LAW
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    prompts=PROMPTS,
    steps=st.integers(1, 5),
    keep=st.lists(st.sampled_from(["marked", "numbers"]), max_size=3),
)
# Equal lengths need no mask, nor do those that keep() leaves.
@example(shape="grouped heads", prompts=[[1, 2, 3], [4, 5, 6], [7, 8, 9]], steps=3, keep=[])
@example(shape="grouped heads", prompts=[[1, 2], [4, 5, 6], [7], [8, 9, 3]], steps=3, keep=["marked"])
@example(shape="grouped heads", prompts=[[1], [4, 5, 6]], steps=4, keep=["numbers", "marked", "numbers"])
@example(shape="llama3 angles", prompts=[[1, 2], [4, 5, 6]], steps=3, keep=[])
def test_decoding_over_a_cache_gives_the_logits_of_the_plain_forward(kind, shape, prompts, steps, keep):
    # float64, so that only a wrong computation can differ by more than 1e-10.
    model, size = random_model(SHAPES[shape], torch.float64), 20
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    rows = [list(p) for p in prompts]
    with torch.inference_mode():
        most = 2 * len(rows)
        cache = kind(model, most, size)
        logits = cache.prefill(padded, lengths)
        for how in [*keep, *["all"] * steps][:steps]:
            numbers = list(range(len(rows)))
            if how == "marked" and len(rows) > 1:
                numbers = numbers[1::2]
                cache.keep(torch.arange(len(rows)) % 2 == 1)
            elif how == "numbers":  # in another order, some of them twice
                numbers = [*reversed(numbers), *numbers[: most - len(rows)]]
                cache.keep(torch.tensor(numbers))
            rows, logits = [rows[i] for i in numbers], logits[numbers]
            for row, found in zip(rows, logits, strict=True):
                expected = model.logits(model.model(torch.tensor([row])))[0, -1]
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # logits are float32
            new = [(7 * len(row) + row[0]) % 64 for row in rows]
            logits = cache.step(torch.tensor(new))
            rows = [[*row, token] for row, token in zip(rows, new, strict=True)]


def test_bfloat16_weights_sample_close_to_the_bfloat16_forward():
    model, options = random_model(dtype=torch.bfloat16), SamplingOptions(8)
    # bfloat16 has 8 bits: logits up to 8 through two layers are off by some hundredths.
    samples = generate(model, [[1, 2, 3], [4]], options, [0, 1])
    assert_drawn(model, samples, [0, 1], options, 64, by=0.05)


# ---- What is drawn


@LAW
@given(PROMPTS, st.randoms(use_true_random=False), st.sampled_from([(), (3, 9), tuple(range(20))]))
@example([[1, 2], [5], [1, 2], [1, 2], [5]], Random(0), (3, 9))  # each is read once
def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(prompts, random, stop_ids):
    options = SamplingOptions(8, top_p=0.9, stop_ids=stop_ids)
    seeds = [random.randrange(2**40) for _ in prompts]
    together = generate(MODEL, prompts, options, seeds).responses
    order = random.sample(range(len(prompts)), len(prompts))
    shuffled = generate(MODEL, [prompts[i] for i in order], options, [seeds[i] for i in order]).responses
    for position, i in enumerate(order):
        assert (
            [together[i]]
            == [shuffled[position]]
            == generate(MODEL, [prompts[i]], options, [seeds[i]]).responses
        )


@LAW
@given(
    PROMPTS,
    st.floats(0.3, 3),
    st.sampled_from([0, 1, 5, 63, 64, 1000]),
    st.sampled_from([1.0, 0.9, 0.4, 1e-6]),
)
def test_tokens_are_drawn_from_the_distribution_that_temperature_top_k_and_top_p_define(
    prompts, temperature, top_k, top_p
):
    options = SamplingOptions(5, temperature, top_k, top_p, stop_ids=tuple(range(0, 64, 4)))
    seeds = range(len(prompts))
    # A token at the very edge of the nucleus may round in or out: what it moves is no more than this.
    assert_drawn(MODEL, generate(MODEL, prompts, options, seeds), seeds, options, 64, by=1e-3)


def test_each_token_is_drawn_by_the_next_number_of_its_rows_seed_whatever_the_budget():
    """Of equal probabilities 1 / V the number u draws token floor(u V)."""
    model = random_model()
    model.lm_head.weight.data.zero_()
    drawn = [torch.rand(12, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (7, 8)]
    for count in (12, 5):
        samples = generate(model, [[1, 2], [3]], SamplingOptions(count), [7, 8])
        assert samples.responses == [(u[:count] * BASE.vocab_size).long().tolist() for u in drawn]


def test_sampled_frequencies_follow_the_softmax():
    """Chi-square at a false alarm probability of 1e-6 per test; the seeds are fixed."""
    draws, options = 20_000, SamplingOptions(1, temperature=1.5)
    samples = generate(MODEL, [[3, 1, 4]] * draws, options, range(draws))
    expected = (last_logits(MODEL, [3, 1, 4]) / 1.5).softmax(0) * draws
    counts = torch.bincount(torch.tensor(samples.responses)[:, 0], minlength=64).double()
    rare = expected < 5  # pooled: the chi-square approximation wants 5 in a cell
    cells = list(zip(counts[~rare].tolist(), expected[~rare].tolist(), strict=True))
    cells.append((float(counts[rare].sum()), max(float(expected[rare].sum()), 1e-9)))
    chi2 = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    half = torch.tensor([(len(cells) - 1) / 2, chi2 / 2], dtype=torch.float64)
    assert 1 - torch.special.gammainc(*half) > 1e-6


@LAW
@given(PROMPTS, st.sampled_from([1e-5, 1e-40, 1e-300]))
def test_a_temperature_near_zero_approaches_greedy(prompts, temperature):
    # Two logits closer than 1e-3 may still be a toss-up at 1e-5.
    greedy = generate(MODEL, prompts, SamplingOptions(4, temperature=0), range(len(prompts)))
    cold = generate(MODEL, prompts, SamplingOptions(4, temperature), range(len(prompts)))
    for prompt, a, b in zip(prompts, greedy.responses, cold.responses, strict=True):
        same = 0
        while same < 4 and a[same] == b[same]:
            same += 1
        top = last_logits(MODEL, [*prompt, *a[:same]]).topk(2).values
        assert same == 4 or top[0] - top[1] < 1e-3


# ---- Filters

LOGITS = st.lists(st.sampled_from([-30.0, -1.0, 0.0, 0.5, 0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=12)


@LAW
@given(LOGITS, st.integers(0, 14))
@example([1.0, 1.0, 1.0], 2)
def test_top_k_keeps_exactly_the_k_largest_and_of_ties_the_lowest_ids(logits, k):
    found = filter_logits(torch.tensor([logits]), k, 1.0)[0]
    kept = found.isfinite().nonzero().flatten().tolist()
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert kept == sorted(order[: k or len(order)])
    assert found[kept].tolist() == [logits[i] for i in kept]


@LAW
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=10), st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p):
    probabilities = torch.tensor(logits).double().softmax(0)
    kept = filter_logits(torch.tensor([logits]), 0, top_p)[0].isfinite()
    # Sums in float32 are off by at most 1e-6 here.
    assert probabilities[kept].sum() >= top_p - 1e-6
    count = int(kept.sum())
    smaller = probabilities.sort(descending=True).values[: count - 1].sum()
    assert smaller < top_p + 1e-6
    assert probabilities[kept].min() >= probabilities[~kept].max() if count < len(logits) else True


def test_top_p_counts_what_top_k_left():
    # 0.4, 0.3, 0.2, 0.1: of the two largest the first has 4/7 and alone reaches 0.5.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert filter_logits(logits, 2, 0.5).isfinite().tolist() == [[True, False, False, False]]
    assert filter_logits(logits, 0, 0.5).isfinite().tolist() == [[True, True, False, False]]


# ---- Ends


@LAW
@given(PROMPTS, st.sets(st.integers(0, 63), max_size=40), st.sampled_from([0, 1.0]))
def test_a_response_and_its_stream_end_on_the_first_stop_token(prompts, stop_ids, temperature):
    options = SamplingOptions(8, temperature, stop_ids=tuple(sorted(stop_ids)))
    samples = generate(MODEL, prompts, options, range(len(prompts)))
    assert list(stream(MODEL, prompts[0], options, 0)) == samples.responses[0]
    for response, stopped in zip(samples.responses, samples.ended, strict=True):
        stops = [n for n, token in enumerate(response) if token in stop_ids]
        assert stopped == bool(stops)
        assert stops == ([len(response) - 1] if stops else [])
        assert stops or len(response) == 8


# ---- Streams


@LAW
@given(st.text(), st.binary(max_size=8), st.integers(1, 3))
@example("a😀ß", b"\xf0\x9f", 1)
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(text, tail, width):
    whole = text.encode("utf-8", "surrogatepass") + tail
    tokens = [whole[i : i + width] for i in range(0, len(whole), width)]
    pieces = list(stream_text(lambda ids: b"".join(tokens[i] for i in ids), range(len(tokens))))
    assert "".join(pieces) == whole.decode("utf-8", "replace")
    assert all(pieces)
    if not tail and text.isprintable():
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)
        assert width > 1 or pieces == list(text)  # each as soon as its character is whole


# ---- Past the context


@LAW
@given(PROMPTS, st.integers(1, 16), st.sampled_from([(), (3, 9, 20, 31)]))
@example([[1, 2, 3] * 5, [4]], 12, ())
@example([[1, 2, 3] * 5, [4], [4], [1, 2, 3] * 5, [5, 6]], 12, (3,))
def test_past_its_positions_a_model_sees_the_last_tokens_alone(prompts, count, stop_ids):
    model = random_model(replace(BASE, max_position_embeddings=8))
    options = SamplingOptions(count, stop_ids=stop_ids, crop=True)
    seeds = range(len(prompts))
    assert_drawn(model, generate(model, prompts, options, seeds), seeds, options, 8, by=1e-3)


# ---- Devices without float64


def test_where_a_device_lacks_float64_none_is_made_on_it(monkeypatch):
    """As on Apple's GPUs; random numbers are drawn on the CPU before they go there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Single(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            assert not (isinstance(found, Tensor) and found.dtype == torch.float64), function
            return found

    given: list = []
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", lambda x, where: given.append(where) or x)
        uniforms = generate_module._uniforms([0, 1], 4, torch.device("mps"))
    assert given == [torch.float32, torch.device("mps")]
    uniforms = uniforms.float()
    monkeypatch.setattr(generate_module, "_uniforms", lambda *_: uniforms)
    options = SamplingOptions(4, 0.7, top_k=9, top_p=0.9, stop_ids=(1,))
    with Single():
        generate(MODEL, [[1, 2], [3]], options, [0, 1])


# ---- What is refused


def test_no_prompts_have_no_responses():
    samples = generate(MODEL, [], SamplingOptions(max_new_tokens=4), [])
    assert (samples.responses, samples.ended) == ([], [])


@pytest.mark.parametrize(
    "change",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf},
     {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(change):
    with pytest.raises(InputError, match=f"--{next(iter(change)).replace('_', '-')}"):
        SamplingOptions(**({"max_new_tokens": 4} | change))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 60, [1] * 61], {}, "prompt 1 has 61 tokens"),
        ([[1]], {"max_new_tokens": 64}, "prompt 0 has 1 tokens"),
        ([[64]], {}, "outside the model's vocabulary"),
        ([[-1]], {}, "outside the model's vocabulary"),
        ([[1]], {"stop_ids": (64,)}, "stop_ids"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line_before_anything_is(prompts, options, message):
    options = SamplingOptions(**({"max_new_tokens": 4} | options))
    with pytest.raises(InputError, match=message) as error:
        generate(MODEL, prompts, options, [0] * len(prompts))
    assert "\n" not in str(error.value)
    if prompts:
        with pytest.raises(InputError, match=message.replace("prompt 1", "prompt 0")):
            stream(MODEL, prompts[-1], options, 0)


def test_a_masked_model_and_too_few_seeds_are_refused():
    with pytest.raises(InputError, match="masked"):
        generate(random_model(replace(BASE, causal=False)), [[1]], SamplingOptions(2), [0])
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        generate(MODEL, [[1], [2]], SamplingOptions(2), [0])


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(temperature, bad):
    model = random_model()
    model.lm_head.weight.data[3] = bad
    with pytest.raises(InputError, match="not finite"):
        generate(model, [[1], [2]], SamplingOptions(3, temperature), [0, 1])
