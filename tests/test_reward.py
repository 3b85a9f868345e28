"""The reward model: the laws of its loss, scores that depend on the response alone, and learning in small."""

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.chat import ChatTemplate, with_chat_template
from minillm.errors import InputError
from minillm.model import ModelConfig, ScalarModel, score_rows
from minillm.preferences import Ranking, ranking_by
from minillm.reward import (
    EncodedSet,
    center,
    collate,
    encode_rankings,
    encode_response,
    held_out_rankings,
    micro_batches,
    ranking_backward,
    ranking_loss,
    ranking_stream,
    scores_of,
    split_by_prompt,
)
from minillm.run import Runtime
from minillm.tokenizer import Tokenizer

SLOWER = settings(max_examples=12)
CPU = torch.device("cpu")
HERE = Runtime(CPU, torch.float32)
V = 20
# float32 sums of a few hundred terms in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def model_of(vocab_size: int = V, seed: int = 0, positions: int = 64) -> ScalarModel:
    torch.manual_seed(seed)  # the weights torch draws by itself; any do
    shape = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": positions}  # fmt: skip
    return ScalarModel(ModelConfig(vocab_size, **shape))


def ranked(places: list[int], prompt: str = "Who?", **fields) -> Ranking:
    """A ranking by places, the smallest best and equal ones tied."""
    responses = [f"Response {i}." for i in range(len(places))]
    messages = [{"role": "user", "content": prompt}]
    given = {"annotator": "a", "seed": 0, "time": "2026-01-31T12:00:00"} | fields
    return Ranking(messages, responses, ranking_by([-place for place in places]), **given)


places = st.lists(st.integers(0, 4), min_size=2, max_size=6)


def drawn_rankings(most: int = 6) -> st.SearchStrategy:
    """What `encoded_of` makes rankings of: places, a seed, and the range of the rows' lengths."""
    lengths = st.sampled_from([(1, 4), (1, 30), (7, 8)])
    return st.tuples(st.lists(places, min_size=1, max_size=most), st.integers(0, 2**32), lengths)


def encoded_of(drawn: tuple) -> list[EncodedSet]:
    """Sets of random rows that begin with one to five tokens of a prompt and have up to three rankings, all
    of a set's responses tied now and then."""
    many, seed, lengths = drawn
    random = np.random.Generator(np.random.PCG64(seed))

    def tokens(*size: int) -> list[int]:
        return random.integers(V, size=random.integers(*size)).tolist()

    def encoded(number: int, own: list[int]) -> EncodedSet:
        prompt, shuffled = tokens(1, 6), [random.permuted(own).tolist() for _ in range(number % 3)]
        rankings = [ranked(places, f"{number}?") for places in (own, *shuffled)]
        return EncodedSet(rankings, [prompt + tokens(*lengths) for _ in own], len(prompt))

    return [encoded(number, own) for number, own in enumerate(many)]


# ---- The loss


def test_a_pair_that_is_far_out_of_order_costs_its_distance_and_no_pairs_cost_nothing():
    scores, none = torch.tensor([-800.0, 800.0]), torch.tensor([], dtype=torch.int64)  # exp would overflow
    first, second = torch.tensor([0]), torch.tensor([1])
    assert ranking_loss(scores, first, second, torch.ones(1)) == 1600
    assert ranking_loss(scores, second, first, torch.ones(1)) == 0
    assert ranking_loss(scores, none, none, torch.ones(0)) == 0


# ---- Scores


@given(
    st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=40), min_size=1, max_size=12),
    st.integers(1, 300),
    st.randoms(use_true_random=False),
)
@SLOWER
def test_a_score_is_the_value_at_the_last_token_whatever_else_is_scored(rows, batch_tokens, random):
    model = model_of()
    with torch.no_grad():
        alone = [model(torch.tensor([row]))[0, -1].item() for row in rows]
    order = random.sample(range(len(rows)), len(rows))
    scores = score_rows(model, [rows[i] for i in order], batch_tokens)
    assert scores == pytest.approx([alone[i] for i in order], abs=1e-5)


def test_no_rows_have_no_scores_and_scores_that_are_not_finite_are_refused():
    model = model_of()
    assert score_rows(model, []) == []
    torch.nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        score_rows(model, [[1, 2]])


def tokenizer_of(template: str | None = None) -> Tokenizer:
    tokenizer = with_chat_template(Tokenizer.train(["a little world of words"], 270))
    if template is None:
        return tokenizer
    return Tokenizer(tokenizer.vocabulary, {**tokenizer.config, "chat_template": template})


LINES = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, LINES])
@pytest.mark.parametrize("response", ["A word.", "", "two  lines\n", "<|end|>"])
def test_a_row_is_the_prompt_the_response_and_its_end_and_no_more(template, response):
    tokenizer = tokenizer_of(template)
    chat = ChatTemplate(tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "A word!"}]  # fmt: skip
    expected = [*chat.prompt(messages), *tokenizer.encode(response), chat.end_id]
    assert encode_response(chat, messages, response) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_everybodys_rankings_of_the_same_responses_are_one_set(drawn):
    rankings = [
        ranked([0, 1][:: 1 - 2 * other], f"{p}?", annotator=str(i)) for i, (p, other) in enumerate(drawn)
    ]
    encoded, _ = encode_rankings(rankings, ChatTemplate(tokenizer_of()), 60)
    assert sorted((r.annotator for one in encoded for r in one.rankings), key=int) == [
        r.annotator for r in rankings
    ]
    assert len(encoded) == len({p for p, _ in drawn})
    assert all(r.messages == one.rankings[0].messages for one in encoded for r in one.rankings)
    turned = [replace(ranked([0, 1]), responses=texts) for texts in (["a", "b"], ["b", "a"])]
    assert len(encode_rankings(turned, ChatTemplate(tokenizer_of()), 60)[0]) == 2, "listed otherwise"


def test_a_set_stays_if_its_longest_row_ends_at_the_limit_and_goes_if_one_of_its_rows_ends_behind_it():
    chat = ChatTemplate(tokenizer_of())
    mixed = replace(ranked([0, 1]), responses=["no", "no " * 9])
    longest = max(len(encode_response(chat, mixed.messages, text)) for text in mixed.responses)
    (kept,), none = encode_rankings([mixed], chat, longest)
    assert len(kept.rows) == 2 and not none
    gone, skipped = encode_rankings([mixed], chat, longest - 1)
    assert gone == [] and skipped == {
        f"rankings with a response behind the model's {longest - 1} positions": 1
    }


def test_responses_start_behind_the_prompt_though_they_begin_alike():
    chat = ChatTemplate(tokenizer_of())
    alike = replace(ranked([0, 1]), responses=["No cats", "No dogs"])
    (encoded,), _ = encode_rankings([alike], chat, 60)
    assert encoded.start == len(chat.prompt(alike.messages))
    batch = collate([encoded], CPU)
    texts = batch.tokens[0][batch.index].split(batch.mask.sum(1).tolist())
    assert [text.tolist() for text in texts] == [row[encoded.start :] for row in encoded.rows]


def test_a_response_that_was_cut_has_no_end_in_its_row():
    chat = ChatTemplate(tokenizer_of())
    cut = replace(ranked([0, 1]), responses=["No cats", "No dogs"], cut=[1])
    (encoded,), _ = encode_rankings([cut], chat, 60)
    whole = [encode_response(chat, cut.messages, text) for text in cut.responses]
    assert encoded.rows == [whole[0], whole[1][:-1]] and whole[1][-1] == chat.end_id
    nothing = replace(ranked([0, 1]), responses=["No cats", ""], cut=[1])
    (encoded,), _ = encode_rankings([nothing], chat, 60)
    assert all(len(row) > encoded.start for row in encoded.rows), "every row has a token to be judged by"


def test_a_cut_response_of_which_a_template_leaves_nothing_is_scored_at_its_end():
    chat = ChatTemplate(tokenizer_of(LINES.replace("['content']", "['content'] | trim")))
    blank = replace(ranked([0, 1]), responses=[" \n", "No cats"], cut=[0])
    encoded, _ = encode_rankings([blank], chat, 60)
    model = model_of(chat.tokenizer.vocab_size)
    last, means = scores_of(model, means=True)(collate(encoded, CPU)).detach()
    assert last.tolist() == pytest.approx(score_rows(model, encoded[0].rows), abs=1e-5)
    assert means.isfinite().all()


def test_equal_texts_make_no_pair_and_the_others_keep_their_weight():
    twins = replace(ranked([0, 1, 2]), responses=["yes", "no", "yes"])
    batch = collate([EncodedSet([twins], [[1], [2], [1]])], CPU)
    assert list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True)) == [(0, 1), (1, 2)]
    assert batch.weight.tolist() == pytest.approx([1 / 3, 1 / 3])


def test_equal_scores_are_right_half_the_time():
    alike = EncodedSet([ranked([0, 1, 2])], [[3, 1], [3, 1], [3, 1]])
    model = model_of()
    assert held_out_rankings(scores_of(model), [alike], 100, HERE)["accuracy"] == 0.5


def test_a_template_that_knows_no_system_message_costs_the_rankings_with_one():
    chat = ChatTemplate(tokenizer_of("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}"
                                     "{% endif %}" + LINES))  # fmt: skip
    system = replace(ranked([0, 1]), messages=[{"role": "system", "content": "Be good."},
                                               {"role": "user", "content": "Who?"}])  # fmt: skip
    encoded, skipped = encode_rankings([system, ranked([1, 0])], chat, 60)
    assert len(encoded) == 1 and skipped == Counter({"rankings that the chat template refuses": 1})


def test_after_centering_the_demonstrations_score_zero_on_average():
    model, rows = model_of(), [[1, 2, 3], [4], [5, 6]]
    before = score_rows(model, rows)
    center(model, rows)
    after = score_rows(model, rows)
    assert sum(after) == pytest.approx(0, abs=1e-5)
    assert np.diff(after) == pytest.approx(np.diff(before), abs=1e-5), "only a shift"
    center(model, rows)
    assert score_rows(model, rows) == after, "a second time changes nothing"


# ---- Steps


@given(drawn_rankings(most=12), st.integers(1, 400))
def test_micro_batches_keep_responses_together_within_the_limit(drawn, micro_tokens):
    encoded = encoded_of(drawn)
    groups = micro_batches(encoded, micro_tokens, HERE)
    assert [id(one) for group in groups for one in group] == [id(one) for one in encoded]
    sizes = [sum(one.size for one in group) for group in groups]
    assert all(len(group) == 1 or size <= micro_tokens for group, size in zip(groups, sizes, strict=True))
    assert all(size + group[0].size > micro_tokens for size, group in zip(sizes, groups[1:], strict=False))


def last(values: Tensor, one: EncodedSet) -> Tensor:
    return values[-1]


def mean_of_response(values: Tensor, one: EncodedSet) -> Tensor:
    return values[one.start :].mean()


def mean_loss(model: ScalarModel, encoded: list[EncodedSet], score=last) -> Tensor:
    """Set by set, row by row, ranking by ranking, pair by pair."""
    total = torch.zeros(())
    for one in encoded:
        scores = [score(model(torch.tensor([row]))[0], one) for row in one.rows]
        weight = 1 / math.comb(len(scores), 2) / len(one.rankings)
        for ranking in one.rankings:
            for better, worse in ranking.pairs():
                total = total - weight * torch.sigmoid(scores[better] - scores[worse]).log()
    return total / len(encoded)


def gradients(model: ScalarModel) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@given(drawn_rankings(), st.integers(1, 200), st.booleans())
@SLOWER
def test_any_micro_batch_gives_the_mean_loss_and_its_gradient_also_of_mean_values(drawn, micro_tokens, means):
    encoded, model = encoded_of(drawn), model_of()
    mean = mean_loss(model, encoded)
    if means:
        mean = (mean + mean_loss(model, encoded, mean_of_response)) / 2
    if mean.requires_grad:
        mean.backward()
    expected = gradients(model)
    model.zero_grad()
    found = ranking_backward(model, scores_of(model, means), encoded, micro_tokens, HERE)
    assert found.item() == pytest.approx(mean.item(), abs=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


class OneOf(Runtime):
    """A process among several, for once alone."""

    def total(self, value: Tensor) -> Tensor:
        return value


@given(drawn_rankings(most=3), st.integers(2, 3))
@SLOWER
def test_the_shares_of_the_processes_average_to_the_gradient_of_the_whole(drawn, world):
    """What DistributedDataParallel averages, computed one rank after the other."""
    encoded = encoded_of(drawn)
    model, step = model_of(), encoded * world
    model.no_sync = nullcontext  # as DistributedDataParallel has it
    whole = ranking_backward(model, scores_of(model), step, 100, HERE).item()
    expected = gradients(model)
    model.zero_grad()
    shares = [
        ranking_backward(model, scores_of(model), step, 100, OneOf(CPU, torch.float32, r, world))
        for r in range(world)
    ]
    assert sum(shares).item() == pytest.approx(whole, abs=1e-5)
    held_out = [
        held_out_rankings(scores_of(model), step, 100, OneOf(CPU, torch.float32, r, world))
        for r in range(world)
    ]
    assert sum(one["loss"] for one in held_out) == pytest.approx(whole, abs=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours / world, theirs, **CLOSE)


@given(drawn=drawn_rankings(), micro_tokens=st.integers(1, 200))
@example(drawn=([[0, 1]], 1744984, (1, 4)), micro_tokens=1)  # two equal rows, but for the rounding
@SLOWER
def test_validation_is_the_mean_loss_and_the_share_of_pairs_in_order(drawn, micro_tokens):
    encoded = encoded_of(drawn)
    model = model_of()
    found = held_out_rankings(scores_of(model), encoded, micro_tokens, HERE)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(mean_loss(model, encoded).item(), abs=1e-5)
    margins = []
    for one in encoded:
        scores = score_rows(model, one.rows)
        pairs = chain(*(ranking.pairs() for ranking in one.rankings))
        margins += [scores[better] - scores[worse] for better, worse in pairs]
    # Scores of size one, summed in another order in another batch: closer ones may fall either way.
    sure, possible = (np.mean(np.array(margins or [-1.0]) > bound) for bound in (1e-5, -1e-5))
    assert sure - 1e-6 <= found["accuracy"] <= possible + 1e-6


# ---- Which rankings, and when


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.floats(0.01, 0.9))
def test_all_rankings_of_a_prompt_are_on_one_side_and_neither_side_is_empty(prompts, fraction):
    encoded = [
        EncodedSet([ranked([0, 1], f"{p}?", annotator=str(i))], [[1], [2]]) for i, p in enumerate(prompts)
    ]
    if len(set(prompts)) == 1:
        with pytest.raises(InputError, match="one prompt"):
            split_by_prompt(encoded, fraction)
        return
    sides = split_by_prompt(encoded, fraction)
    assert sorted(map(id, sides[0] + sides[1])) == sorted(map(id, encoded))
    asked = [{one.rankings[0].messages[0]["content"] for one in side} for side in sides]
    assert asked[0] and asked[1] and not asked[0] & asked[1]


def test_a_stream_of_other_rankings_does_not_resume():
    one = EncodedSet([ranked([0, 1])], [[1], [2]])
    state = ranking_stream([one], 0).state_dict()
    other = replace(one, rankings=[ranked([1, 0])])
    with pytest.raises(InputError, match="content of 'rankings'"):
        ranking_stream([other], 0).load_state_dict(state)
