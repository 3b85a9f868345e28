"""Conversations and text in one mixture: packed whole and once, alone in what each sees, resumed exactly."""

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import a_stream

from minillm.chat import Dialogue
from minillm.corpus import Source, encode_source
from minillm.data import (
    IGNORED,
    STRETCH,
    Batch,
    EncodedSource,
    Mixture,
    TokenizedSource,
    best_fit,
    positions,
    validation_batches,
)
from minillm.errors import InputError
from minillm.model import LanguageModel, ModelConfig
from minillm.tools.sources import tell_shares
from minillm.world import assistant, user

ROLES = {"system": 1, "user": 2, "assistant": 3}
END = 4


def packed(source: EncodedSource, block_size: int, rows: int = 64) -> list[Batch]:
    """All conversations to train on, each once."""
    everything = replace(source, val=source.train)
    return validation_batches([everything], block_size, 10**9, rows) if source.train else []


def encode(messages: list[dict[str, str]]) -> Dialogue:
    """A role, the letters from 10 on, an end; the assistant's letters and ends are its to produce."""
    if messages[0]["content"] == "refuse":
        raise InputError("no such talk")
    tokens, owed = [], []
    for message in messages:
        letters = [ord(letter) - ord("a") + 10 for letter in message["content"]]
        tokens += [ROLES[message["role"]], *letters, END]
        owed += [False] + [message["role"] == "assistant"] * (len(letters) + 1)
    return Dialogue(tokens, owed)


def a_source(conversations: list, name: str = "s", weight: float = 1.0) -> Source:
    return Source(name, weight, lambda: iter(conversations))


def encoded(conversations: list, block_size: int, name: str = "s", weight: float = 1.0) -> EncodedSource:
    return encode_source(a_source(conversations, name, weight), encode, block_size, 0.0)


words = st.text("abcd", min_size=1, max_size=4)
turns = st.tuples(st.builds(user, words), st.builds(assistant, words)).map(list)
talks = st.lists(turns, min_size=1, max_size=3).map(lambda pairs: list(chain(*pairs)))
systems = st.just([]) | words.map(lambda text: [{"role": "system", "content": text}])
conversations = st.tuples(systems, talks).map(lambda parts: parts[0] + parts[1])
sources = st.lists(conversations, min_size=1, max_size=25)
LONGEST = 6 + 3 * 12  # tokens of the longest conversation that is drawn
blocks = st.integers(LONGEST - 1, 3 * LONGEST)
SEEDS = st.integers(0, 2**63)


def segments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every document of a batch, padding included."""
    found = []
    for tokens, targets, starts in zip(
        batch.tokens.tolist(), batch.targets.tolist(), batch.start.tolist(), strict=True
    ):
        bounds = [t for t, start in enumerate(starts) if start == t] + [len(starts)]
        for begin, end in pairwise(bounds):
            assert starts[begin:end] == [begin] * (end - begin)
            found.append((tokens[begin:end], targets[begin:end]))
    return found


PADDING = ([0], [IGNORED])


def alone(conversation: list) -> tuple[list[int], list[int]]:
    """A conversation as it is trained on by itself: inputs and targets."""
    dialogue = encode(conversation)
    tokens, owed = dialogue.tokens, dialogue.loss_mask
    targets = [token if mine else IGNORED for token, mine in zip(tokens[1:], owed[1:], strict=True)]
    return tokens[:-1], targets


def same(found: list, expected: list) -> bool:
    return Counter(map(repr, found)) == Counter(map(repr, expected))


def fields(batch: Batch) -> list[list]:
    return [batch.tokens.tolist(), batch.targets.tolist(), batch.start.tolist()]


# ---- Rows


@given(sources, blocks, SEEDS)
def test_an_epoch_holds_every_conversation_once_whole_with_the_assistants_tokens_as_targets(
    talks, block_size, seed
):
    mixture = Mixture([encoded(talks, block_size)], block_size, seed)
    (stream,) = mixture.streams
    for _ in range(2):
        batch = mixture.next_rows(len(stream.order))
        assert batch.tokens.shape[1] == block_size
        assert bool((batch.targets != IGNORED).any(dim=1).all())
        documents = [document for document in segments(batch) if document != PADDING]
        assert same(documents, [alone(talk) for talk in talks])
        stream.seek(stream.epoch + 1, 0)


CONFIG = ModelConfig(
    vocab_size=20, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, max_position_embeddings=256,
)  # fmt: skip


def tiny_model(causal: bool) -> LanguageModel:
    random = torch.Generator().manual_seed(0)
    model = LanguageModel(replace(CONFIG, causal=causal))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1 + 0.2 * noise)
    return model


def loss_and_gradient(model: LanguageModel, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = sum(model(batch.tokens, batch.start, targets=batch.targets) for batch in batches)
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=15)
@given(st.lists(conversations, min_size=1, max_size=8), blocks)
def test_packing_equals_running_every_conversation_alone(causal, talks, block_size):
    model, source = tiny_model(causal), encoded(talks, block_size)
    single = []
    for talk in talks:
        tokens, targets = (torch.tensor([numbers]) for numbers in alone(talk))
        single.append(Batch(tokens, targets, torch.zeros_like(tokens, dtype=torch.int32)))
    loss, gradient = loss_and_gradient(model, packed(source, block_size, 3))
    expected, expected_gradient = loss_and_gradient(model, single)
    # float32: the same numbers, summed in another order and with rotary angles of other positions.
    assert loss == pytest.approx(expected, rel=1e-5)
    size = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5 * max(1.0, size))


# ---- Which conversations share a row


@given(st.lists(st.integers(1, 30), max_size=400), st.integers(30, 90), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_rows_hold_each_conversation_once_within_bounds_and_no_two_rows_would_fit_into_one(
    sizes, block_size, random
):
    order = random.sample(range(len(sizes)), len(sizes))
    rows = best_fit(np.array(sizes, np.int64), np.array(order, np.int64), block_size)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    used = [sum(sizes[i] for i in row) for row in rows]
    assert all(0 < size <= block_size for size in used)
    stretches = 1 + sum(sizes) // (STRETCH * block_size)
    if stretches == 1 and len(used) > 1:
        assert sum(sorted(used)[:2]) > block_size
    # A row is opened where no other has room, so of each stretch all but one lack less than the longest.
    longest = max(sizes, default=0)
    assert sum(size <= block_size - longest for size in used) <= stretches


def test_a_conversation_goes_where_it_leaves_least():
    assert best_fit(np.array([2, 6, 8]), np.arange(3), 10) == [[2, 0], [1]]


@given(SEEDS, st.integers(64, 1024))
@settings(max_examples=15)
def test_nine_tenths_of_the_positions_are_filled_where_conversations_are_short(seed, block_size):
    lengths = np.random.default_rng(seed).integers(1, block_size // 4, 1500, endpoint=True)
    rows = best_fit(lengths, np.arange(1500), block_size)
    assert lengths.sum() / (len(rows) * block_size) >= 0.9


def test_every_epoch_has_neighbours_and_an_order_of_its_own():
    talks = [[user(a), assistant(b + a)] for a in "abcd" for b in ("a", "bb", "ccc", "dddd")] * 5
    source = encoded(talks, 40)
    (stream,) = Mixture([source], 40, 0).streams
    neighbours = set()
    for epoch in range(4):
        stream.seek(epoch, 0)
        neighbours.add(frozenset(frozenset(row) for row in stream.order))
        # Packing begins with the longest, and a row tells its own: left so, an epoch would grow shorter.
        longest = [max(positions(source.train)[row]) for row in stream.order]
        assert longest != sorted(longest, reverse=True)
    assert len(neighbours) == 4


def test_behind_the_last_row_of_an_epoch_comes_the_first_of_the_next():
    source = encoded(some_talks(), 40)
    (stream,), (other,) = (Mixture([source], 40, 0).streams for _ in range(2))
    for _ in range(len(stream.order)):
        stream.next()
    assert (stream.epoch, stream.position) == (0, len(stream.order))
    other.seek(1, 0)
    row, first = ([field.tolist() for field in rows.next()[0]] for rows in (stream, other))
    assert row == first and (stream.epoch, stream.position) == (1, 1)


# ---- In a mixture


def some_talks(n: int = 30) -> list:
    random = np.random.default_rng(0)

    def text() -> str:
        return "".join(random.choice(list("abcd"), random.integers(1, 5)))

    return [[user(text()), assistant(text())] for _ in range(n)]


def a_text(weight: float = 1.0, name: str = "text", documents: int | None = None) -> TokenizedSource:
    tokens = np.arange(5000, dtype=np.uint32) + 1000
    return a_stream(tokens, tokens[:0], name, weight, documents)


@cache
def four_sources(block_size: int = 40) -> list:
    """Conversations, text of many documents, and a book, of which some rows are made to begin as one."""
    talks = some_talks()
    a, b = encoded(talks[:20], block_size, "a", 3.0), encoded(talks[20:], block_size, "b", 1.0)
    return [a, a_text(2.0), b, a_text(2.0, "book", documents=1)]


def mixed(seed: int = 0) -> Mixture:
    return Mixture(four_sources(), 40, seed)


@settings(max_examples=25)
@given(counts=st.lists(st.integers(1, 20), max_size=6), seed=SEEDS)
def test_resuming_anywhere_any_number_of_times_changes_nothing(counts, seed):
    whole = fields(mixed(seed).next_rows(sum(counts) + 5))
    mixture, done = mixed(seed), 0
    for count in counts:
        assert fields(mixture.next_rows(count)) == [rows[done : done + count] for rows in whole]
        done += count
        state = json.loads(json.dumps(mixture.state_dict()))
        mixture = mixed(seed)
        mixture.load_state_dict(state)
        assert mixture.state_dict() == state
    assert fields(mixture.next_rows(5)) == [rows[done:] for rows in whole]


def test_a_mixture_can_go_back_and_its_state_is_a_few_numbers():
    mixture = mixed()
    mixture.next_rows(7)
    state, rows, report = mixture.state_dict(), mixture.next_rows(500), tell_shares(str, mixture)
    assert len(json.dumps(state)) < 1000
    mixture.load_state_dict(state)
    assert fields(mixture.next_rows(500)) == fields(rows) and tell_shares(str, mixture) == report


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: Mixture(four_sources(), 41, 0), "block_size"),
        (lambda: Mixture(four_sources(), 40, 1), "seed"),
        (lambda: Mixture(four_sources()[:2], 40, 0), "data sources"),
        (lambda: Mixture([replace(s, fingerprint="new") for s in four_sources()], 40, 0), "'a'"),
    ],
)
def test_another_mixture_is_not_resumed_and_the_difference_is_named(other, named):
    with pytest.raises(InputError, match=named) as caught:
        other().load_state_dict(mixed().state_dict())
    assert "\n" not in str(caught.value)


def test_each_source_gets_its_share_and_the_report_says_it():
    # For each source 5 standard deviations: a false alarm for fewer than 1 seed in 100,000.
    mixture, rows = mixed(), 6000
    assert [line["epochs"] for line in tell_shares(str, mixture)] == [0] * 4
    batch = mixture.next_rows(rows)
    for line, share in zip(tell_shares(str, mixture), (3 / 8, 1 / 4, 1 / 8, 1 / 4), strict=True):
        assert line["share"] == pytest.approx(share)
        assert abs(line["realised"] - share) < 5 * (share * (1 - share) / rows) ** 0.5
        assert line["tokens"] == round(line["realised"] * rows) * 40
    text = tell_shares(str, mixture)[1]  # an epoch of 5,000 tokens has 123 or 124 rows
    assert text["epochs"] == pytest.approx(text["tokens"] / 40 / 123.5, rel=0.01)
    is_text = batch.tokens[:, 1] >= 1000
    assert int(is_text.sum()) == mixture.drawn[1] + mixture.drawn[3]
    assert not torch.equal(batch.tokens, mixed(seed=1).next_rows(rows).tokens)


def test_the_rows_of_a_source_depend_on_no_other_source_and_not_on_the_order_of_sources():
    a, text, b, book = four_sources()

    def rows_of(name: str, sources: list) -> list:
        mixture = Mixture(sources, 40, 7)
        stream = mixture.streams[[source.name for source in sources].index(name)]
        mixture.next_rows(50)
        stream.seek(1, 0)
        return [[field.tolist() for field in row] for row in stream.next(30)]

    for source in (a, b, book):
        expected = rows_of(source.name, [source])
        for others in ([a, text, b, book], [b, book, a, a_text(9.0)], [replace(a, weight=1e-3), book, b]):
            assert rows_of(source.name, others) == expected
    assert rows_of("text", [text]) != rows_of("book", [book])  # not shuffled alike


def test_a_source_encoded_otherwise_is_not_resumed():
    talks = some_talks()
    state = Mixture([encoded(talks, 40)], 40, 0).state_dict()

    def other_ids(messages: list) -> Dialogue:
        return replace(encode(messages), tokens=[token + 1 for token in encode(messages).tokens])

    def all_owed(messages: list) -> Dialogue:
        return replace(encode(messages), loss_mask=[True] * len(encode(messages).tokens))

    for other in (other_ids, all_owed):
        source = encode_source(a_source(talks), other, 40, 0.0)
        with pytest.raises(InputError, match="content of 's'"):
            Mixture([source], 40, 0).load_state_dict(state)
    Mixture([encoded(talks, 40)], 40, 0).load_state_dict(state)


def test_the_same_tokens_as_other_conversations_are_another_source():
    def digits(messages: list) -> Dialogue:
        tokens = [int(digit) for digit in messages[0]["content"]]
        return Dialogue(tokens, [True] * len(tokens))

    one, other = (
        encode_source(a_source([[user(text), assistant("b")] for text in texts]), digits, 40, 0.0).fingerprint
        for texts in (("12", "345"), ("123", "45"))
    )
    assert one != other


# ---- Encoding


@given(conversations, st.integers(1, LONGEST))
@example([user("a"), assistant("b"), user("c"), assistant("d")], 5)  # L - 1 positions: just the first turn
def test_a_conversation_too_long_is_cut_behind_the_last_reply_that_fits_or_left_out(talk, block_size):
    fitting = [
        talk[:end]
        for end in range(1, len(talk) + 1)
        if talk[end - 1]["role"] == "assistant" and len(encode(talk[:end]).tokens) - 1 <= block_size
    ]
    short = [user("a"), assistant("b")]
    both = [talk, short] if block_size >= 5 else [talk]
    if not fitting and len(both) == 1:
        with pytest.raises(InputError, match="longer than a row"):
            encoded(both, block_size)
        return
    source = encoded(both, block_size)
    kept = [fitting[-1]] if fitting else []
    (batch,) = packed(source, block_size)
    found = [document for document in segments(batch) if document != PADDING]
    assert same(found, [alone(one) for one in kept + both[1:]])
    cut, out = bool(fitting) and fitting[-1] != talk, not fitting
    expected = {"ends of conversations longer than a row": cut, "conversations longer than a row": out}
    assert source.skipped == {reason: 1 for reason, holds in expected.items() if holds}
    assert (source.skipped.first is not None) == (cut or out)


def test_what_the_encoder_refuses_or_gives_no_target_is_counted_and_the_first_shown():
    good, refused = [user("a"), assistant("b")], [user("refuse"), assistant("b")]
    source = encoded([good, refused, good, refused], 40)
    assert source.skipped == {"conversations that the chat template refuses": 2}
    assert source.skipped.first == "conversation 2 of 's': no such talk"
    assert len(source.train) == 2

    def silent(messages: list) -> Dialogue:
        dialogue, speaks = encode(messages), messages is not good
        # The first token has none before it to predict it from.
        return replace(dialogue, loss_mask=[True] + [speaks and mine for mine in dialogue.loss_mask[1:]])

    talks = [good, [user("c"), assistant("d")]]
    source = encode_source(a_source(talks), silent, 40, 0.0)
    assert source.skipped == {"conversations without a token of the assistant's": 1}


def test_what_reading_left_out_is_passed_on():
    talks = [*some_talks(), [user("refuse"), assistant("b")]]
    source = a_source(talks)
    source.skipped["records in no known format"] = 2
    source.skipped.add("records in no known format", "line 1 of 'x'")
    found = encode_source(source, encode, 40, 0.0)
    refused = "conversations that the chat template refuses"
    assert found.skipped == {"records in no known format": 3, refused: 1}
    assert found.skipped.first == "line 1 of 'x'" and source.skipped.total() == 3


def test_a_source_of_which_nothing_is_left_ends_in_one_line():
    for talks in ([[user("refuse"), assistant("b")]], []):
        with pytest.raises(InputError) as caught:
            encode_source(a_source(talks), encode, 40, 0.0)
        assert "'s'" in str(caught.value) and "train" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 3])
def test_of_one_conversation_or_the_same_again_all_is_trained_on_and_nothing_held_out(count):
    found = encode_source(a_source([[user("a"), assistant("b")]] * count), encode, 40, 0.5)
    assert len(found.train) == count and not found.val
    assert validation_batches([found], 40, 1000) == []


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_take_two_bytes_while_they_fit_and_come_back_as_they_were(largest, dtype):
    ids = [7, largest, 3, largest]
    source = encode_source(
        a_source(some_talks(3)), lambda m: Dialogue(ids, [False, True, True, True]), 3, 0.0
    )
    assert {ids.dtype for ids, _ in source.train} == {np.dtype(dtype)}
    batch = Mixture([source], 3, 0).next_rows(2)
    assert batch.tokens.tolist() == [ids[:-1]] * 2 and batch.targets.tolist() == [ids[1:]] * 2


# ---- Validation


@given(st.lists(conversations, min_size=2, max_size=40), blocks, st.integers(1, 5))
def test_validation_holds_every_held_out_conversation_once_and_always_the_same(talks, block_size, rows):
    if len({repr(talk) for talk in talks}) == 1:
        return
    source = encode_source(a_source(talks), encode, block_size, 0.5)
    batches = validation_batches([source], block_size, 10**6, rows)
    assert all(len(batch.tokens) <= rows for batch in batches)
    held_out = [document for batch in batches for document in segments(batch) if document != PADDING]
    (stream,) = (mixture := Mixture([source], block_size, 0)).streams
    trained = [d for d in segments(mixture.next_rows(len(stream.order))) if d != PADDING]
    assert held_out and trained
    assert same(held_out + trained, [alone(talk) for talk in talks])
    again = validation_batches([source], block_size, 10**6, rows)
    assert [fields(batch) for batch in again] == [fields(batch) for batch in batches]


def test_validation_of_conversations_keeps_to_its_budget_by_weight():
    a, b = (encoded(some_talks(200), 40, name, weight) for name, weight in (("a", 3.0), ("b", 1.0)))
    sources = [replace(source, val=source.train) for source in (a, b)]
    assert [len(batch.tokens) for batch in validation_batches(sources, 40, 480)] == [9, 3]
