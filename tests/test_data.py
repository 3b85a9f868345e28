"""From documents to batches: the split, tokens on disk, the mixture, validation and masking."""

import json
import os
import threading
import time
import tracemalloc
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runs import a_stream as stream_of

from minillm.corpus import FEW_DOCUMENTS, Source, split_documents, text_sample, tokenize
from minillm.data import (
    BEGINNING_SHARE,
    Batch,
    Mixture,
    Shuffled,
    TokenizedSource,
    mask_tokens,
    validation_batches,
)
from minillm.digest import digest
from minillm.errors import InputError
from minillm.io.text import open_sources
from minillm.tokenizer import Tokenizer

BYTES = Tokenizer.train([], 262)  # bytes and special tokens, no merges: ids 0..255 are the text
DOCUMENTS = [f"document {i}: " + "words and more " * (i % 7) + "\u20ac" for i in range(60)]

documents = st.lists(st.text(min_size=1, max_size=6), max_size=60)
fractions = st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9])


def a_source(texts: list[str], fingerprint: str = "f", name: str = "s") -> Source:
    return Source(name, 1.0, lambda: iter(texts), fingerprint)


def a_stream(length: int, name: str = "s", weight: float = 1.0, val: int = 0) -> TokenizedSource:
    """A source whose tokens are their own positions, so that a row shows where it was cut."""
    train, held_out = np.arange(length, dtype=np.uint32), np.arange(val, dtype=np.uint32)
    return stream_of(train, held_out, name, weight)


def fields(batch: Batch) -> list[list]:
    return [batch.tokens.tolist(), batch.targets.tolist(), batch.start.tolist()]


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ---- Train and validation


@pytest.mark.parametrize("workers", [1, 2])
def test_of_the_text_a_few_documents_at_a_time_are_in_memory_while_it_is_tokenized(
    tmp_path, monkeypatch, workers
):
    """Beside the first twenty, which decide the split, until they have been read."""

    def encode(texts: Iterator[str], of: int) -> Iterator[np.ndarray]:
        ahead = deque[str]()
        for text in texts:  # as worker processes do: so many texts are read ahead
            ahead.append(text)
            while len(ahead) > of:
                yield np.zeros(len(ahead.popleft()) // 10**5, np.uint32)
        yield from (np.zeros(len(text) // 10**5, np.uint32) for text in ahead)

    size, count = 10**6, 200
    source = Source("s", 1.0, lambda: (chr(65 + i % 50) * size for i in range(count)), "f", size * count)
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda _, texts, workers: encode(texts, 2 * workers))
    tracemalloc.start()
    stream = tokenize(source, BYTES, tmp_path, 0.1, workers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(side["tokens"] for side in stream.counts.values()) == count * 11 + 2
    assert peak < (FEW_DOCUMENTS + 12) * size


@given(texts=documents, fraction=fractions)
@example(texts=[f"document {i}" for i in range(14)], fraction=0.01)  # and seven copies; no hash is so small
def test_the_split_keeps_every_document_and_shares_none(texts, fraction):
    texts = texts + texts[: len(texts) // 2]  # copies
    parts = list(split_documents(texts, fraction))
    if len(texts) >= FEW_DOCUMENTS:
        assert [text for _, text in parts] == texts
        train, val = ({text for side, text in parts if side == want} for want in ("train", "val"))
        assert not train & val
        assert bool(val) == bool(fraction)
    else:
        assert "".join(text for _, text in parts) == "".join(texts)


@given(text=st.text(min_size=1, max_size=300), fraction=fractions)
@example(text="\U00010000" * 10, fraction=0.9)  # 40 · (1 - 0.9) is a little less than 4
def test_of_few_documents_validation_is_the_tail_from_the_beginning_of_a_character(text, fraction):
    parts = dict(split_documents([text], fraction))
    assert parts.get("train", "") + parts.get("val", "") == text
    held_out, wanted = len(parts.get("val", "").encode()), len(text.encode()) * fraction
    assert wanted - 1e-6 <= held_out <= wanted + 4  # a byte for rounding, three of a character


@given(
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=60),
    big=st.integers(0, 100_000),
    fraction=st.sampled_from([0.05, 0.1, 0.3]),
)
@example(sizes=[6] * 20, big=200_000, fraction=0.05)  # one big file among notes
def test_whatever_the_sizes_of_documents_validation_is_about_its_share_of_the_bytes(sizes, big, fraction):
    texts = [f"{i}:" + "x" * size for i, size in enumerate([*sizes, big])]
    total = sum(map(len, texts))
    parts = list(split_documents(texts, fraction, total))
    assert sum(len(text) for _, text in parts) == total
    held_out = sum(len(text) for side, text in parts if side == "val")
    # A document that is not cut is at most a sixteenth of what is to be held out, so that 16 / fraction or
    # more of them share it: four standard deviations and a byte of rounding for each document that is cut.
    assert abs(held_out - fraction * total) <= fraction * total + len(texts)
    assert held_out > 0 or total * fraction < len(texts)


def test_a_tokenizer_learns_from_all_of_a_source_and_not_from_its_beginning():
    texts = ["english words " * 400, "日本語の文章です" * 700]
    for order in (texts, texts[::-1]):
        source = replace(a_source(order), size=sum(len(text.encode()) for text in order))
        sample = "".join(text_sample([source], 0.0, 6000))
        assert len(sample) <= 6000 * 1.01 + 2 * 16_384
    many = [f"{i} " * 50 for i in range(2000)]
    source = replace(a_source(many), size=sum(map(len, many)))
    numbers = {int(part.split()[0]) for part in text_sample([source], 0.0, 50_000)}
    assert min(numbers) < 100 and max(numbers) > 1900  # from beginning to end
    whole = "".join(text_sample([source], 0.0, 10**7))
    assert whole == "".join(many)


def test_about_the_fraction_asked_for_goes_to_validation():
    # The hash is fixed, so this either always holds or never; 4 standard deviations are 0.008.
    sides = Counter(side for side, _ in split_documents(map(str, range(20_000)), 0.1))
    assert abs(sides["val"] / 20_000 - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


# ---- Tokens on disk


@pytest.mark.parametrize("bos_token", ["<|endoftext|>", "<|user|>"])
def test_a_stream_holds_every_document_between_its_marks(tmp_path, bos_token):
    tokenizer = Tokenizer.train(DOCUMENTS, 280)
    tokenizer.config["bos_token"] = bos_token
    bos, end = tokenizer.bos_id, [] if bos_token == "<|endoftext|>" else [tokenizer.eos_id]
    found = tokenize(a_source([*DOCUMENTS, "<|endoftext|>"]), tokenizer, tmp_path, 0.1)
    for side in ("train", "val"):
        texts = [t for where, t in split_documents([*DOCUMENTS, "<|endoftext|>"], 0.1) if where == side]
        expected = [i for text in texts for i in (bos, *tokenizer.encode(text), *end)]
        expected += [] if end else [bos]  # closes the last document
        assert getattr(found, side).tolist() == expected
        counts, size = found.counts[side], sum(len(text.encode()) for text in texts)
        assert (counts["documents"], counts["tokens"], counts["bytes"]) == (len(texts), len(expected), size)
    assert (found.name, found.weight, found.bos_id) == ("s", 1.0, bos)
    nothing = tokenize(a_source(DOCUMENTS), tokenizer, tmp_path, 0.0)
    assert nothing.val.tolist() == [] and nothing.counts["val"]["documents"] == 0


def test_a_tokenizer_without_any_mark_is_refused(tmp_path):
    with pytest.raises(InputError) as caught:
        tokenize(a_source(["a"]), Tokenizer.train([], 256, special_tokens=()), tmp_path)
    assert "bos" in one_line(caught)


def test_the_cache_is_keyed_by_content_tokenizer_and_fraction_and_then_not_written_again(tmp_path):
    one, other = Tokenizer.train(["aaab"], 263), Tokenizer.train(["bbba"], 263)
    keys = {
        tokenize(a_source(DOCUMENTS, content), tokenizer, tmp_path, fraction).fingerprint
        for content in ("f", "g")
        for tokenizer in (one, other)
        for fraction in (0.1, 0.2)
    }
    assert len(keys) == 8 == len(list(tmp_path.iterdir()))

    def unread() -> Iterator[str]:
        raise AssertionError("a warm cache needs no documents")

    again = tokenize(Source("other name", 2.0, unread, "f"), one, tmp_path, 0.1)
    assert (again.name, again.weight) == ("other name", 2.0) and again.fingerprint in keys


def test_what_reading_skipped_is_told_again_from_a_warm_cache_and_what_is_there_now_is_counted_now(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\nbad\n{"text": ""}\n')
    (folder / "b.png").write_text("x")
    read = {"lines that do not parse": 1, "empty documents": 1}
    for kinds in ({"files of another kind (1 .png)": 1}, {}):
        (source,) = open_sources([str(folder)], errors="replace")
        assert tokenize(source, BYTES, tmp_path / "cache").skipped == read | kinds
        (folder / "b.png").unlink(missing_ok=True)


def failing_source(failure: BaseException | None) -> Source:
    """Stops in the middle of its documents; with None the whole process is killed there."""

    def some() -> Iterator[str]:
        yield from DOCUMENTS[:40]
        if failure is None:
            os._exit(9)
        raise failure

    return Source("s", 1.0, some, "f")


@pytest.mark.parametrize("failure", [InputError("bad line"), KeyboardInterrupt()])
def test_an_exception_while_writing_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)):
        tokenize(failing_source(failure), BYTES, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves_is_never_used(tmp_path):
    if (child := os.fork()) == 0:
        tokenize(failing_source(None), BYTES, tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list(tmp_path.iterdir())  # it did leave something
    assert tokenize(a_source(DOCUMENTS), BYTES, tmp_path).counts["train"]["documents"] > 40


def damages(file: Path) -> Iterator[bytes | None]:
    raw = file.read_bytes()
    yield None  # deleted
    yield b""
    yield raw[:-1]
    yield raw[: len(raw) // 2]
    yield raw + b"\0\0"
    yield raw.replace(b'"bytes": ', b'"bytes": 1')  # still JSON, another count
    for at in (0, len(raw) // 3, len(raw) - 2):
        yield raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "counts.json"])
def test_a_damaged_cache_is_written_anew(tmp_path, name):
    good = tokenize(a_source(DOCUMENTS), BYTES, tmp_path)
    expected, file = good.train.tolist(), tmp_path / good.fingerprint / name
    for content in [*damages(file), ...]:  # ...: a folder stands in its place
        file.unlink()
        if content is ...:
            (file / "inside").mkdir(parents=True)
        elif content is not None:
            file.write_bytes(content)
        again = tokenize(a_source(DOCUMENTS), BYTES, tmp_path)
        assert again.train.tolist() == expected
        assert (again.counts, again.fingerprint) == (good.counts, good.fingerprint)
    assert good.train.tolist() == expected  # what is mapped outlives its file


def test_processes_that_want_the_same_tokens_wait_for_the_one_that_writes(tmp_path):
    """As under torchrun, where rank 0 may take hours: no barrier that times out, and nothing is left."""
    opened, passes = threading.Event(), []

    def slow() -> Iterator[str]:
        passes.append(1)
        opened.set()
        time.sleep(0.3)
        yield from DOCUMENTS

    found = []
    first = threading.Thread(
        target=lambda: found.append(tokenize(Source("s", 1.0, slow, "f"), BYTES, tmp_path))
    )
    first.start()
    assert opened.wait(60)
    second = tokenize(Source("s", 1.0, slow, "f"), BYTES, tmp_path)
    first.join()
    assert len(passes) == 1 and second.train.tolist() == found[0].train.tolist()
    assert [sorted(p.name for p in cache.iterdir()) for cache in tmp_path.iterdir()] == [
        ["counts.json", "train.bin", "val.bin"]
    ]


def test_a_cache_with_other_types_or_ids_than_the_vocabulary_has_is_written_anew(tmp_path):
    good = tokenize(a_source(DOCUMENTS), BYTES, tmp_path)
    expected, folder = good.train.tolist(), tmp_path / good.fingerprint
    sealed = json.loads((folder / "counts.json").read_text())
    del sealed["checksum"]
    big = np.array(expected, np.uint16)
    big[3] = 60_000  # no token has this id
    sides = sealed["sides"]
    for raw, counts in (
        (big.tobytes(), {**sides["train"], "checksum": zlib.crc32(big.tobytes())}),
        (None, {**sides["train"], "tokens": "9"}),
        (None, {**sides["train"], "tokens": float(len(expected))}),
    ):
        forged = {**sealed, "sides": {**sides, "train": counts}}
        if raw:
            (folder / "train.bin").unlink()
            (folder / "train.bin").write_bytes(raw)
        (folder / "counts.json").write_text(json.dumps({**forged, "checksum": digest(forged)}))
        assert tokenize(a_source(DOCUMENTS), BYTES, tmp_path).train.tolist() == expected


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError) as caught:
        tokenize(a_source(DOCUMENTS), BYTES, tmp_path / "cache")
    assert "No space left" in one_line(caught) and str(tmp_path) in one_line(caught)
    assert not list((tmp_path / "cache").iterdir())


# ---- Rows


@given(block_size=st.integers(1, 20), extra=st.integers(1, 200), seed=st.integers(0, 2**40))
def test_the_rows_of_an_epoch_are_the_stream_once_without_its_ends(block_size, extra, seed):
    length = block_size + extra
    mixture = Mixture([a_stream(length)], block_size, seed)
    (epoch,) = mixture.streams
    for _ in range(3):
        batch = mixture.next_rows(len(epoch.order))
        tokens = sorted(batch.tokens.flatten().tolist())
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        assert length - len(tokens) < 2 * block_size
        # A token is its own position: the one that comes next is the one above.
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert torch.equal(batch.tokens, batch.tokens[:, :1] + torch.arange(block_size))
        epoch.seek(epoch.epoch + 1, 0)


def test_each_epoch_has_a_phase_and_an_order_of_its_own_so_that_every_token_is_seen():
    (stream,) = Mixture([a_stream(10_000)], 16, 0).streams
    epochs = []
    for epoch in range(4):
        stream.seek(epoch, 0)
        begins = stream.order[:, 0]
        epochs.append((begins.min(), begins[:20].tolist()))
    assert len({phase for phase, _ in epochs}) > 1 and len({tuple(order) for _, order in epochs}) == 4
    assert all(order != sorted(order) for _, order in epochs)
    rows = Mixture([a_stream(100)], 16, 0).streams[0].next(400)
    assert {int(token) for row in rows for token in (*row.tokens, row.targets[-1])} == set(range(100))


def test_a_row_keeps_the_bounds_of_its_documents(tmp_path):
    mixture = Mixture([tokenize(a_source(DOCUMENTS), BYTES, tmp_path)], 32, 0)
    batch = mixture.next_rows(50)
    assert not mixture.streams[0].order[:, 1].any(), "of many documents no row is made to begin as one"
    for tokens, targets, starts in zip(*fields(batch), strict=True):
        assert tokens[1:] == targets[:-1]
        for t, start in enumerate(starts):
            assert start == 0 or tokens[start] == BYTES.bos_id
            assert BYTES.bos_id not in tokens[start + 1 : t + 1]


# ---- Rows that begin as documents do


def a_book(tmp_path: Path, text: str) -> tuple[TokenizedSource, Shuffled[Batch]]:
    """Its source and rows of 64 tokens."""
    source = tokenize(a_source([text]), BYTES, tmp_path, 0.1)
    return source, Mixture([source], 64, 0).streams[0]


BOOK = "".join(f"Chapter {i} begins\nand goes on over lines\n    with some indented,\n\n" for i in range(400))


def test_of_one_long_text_a_share_of_rows_begins_with_bos_and_a_paragraph(tmp_path):
    source, stream = a_book(tmp_path, BOOK)
    rows = stream.next(len(stream.order))
    begins = [row for row in rows if row.tokens[0] == BYTES.bos_id]
    assert abs(len(begins) / len(rows) - BEGINNING_SHARE) < 0.06
    train = source.train.tolist()
    for row in begins:
        assert bytes(row.tokens[1:9].numpy().astype(np.uint8)) == b"Chapter "
        # Nothing teaches that a document ends there, and the text goes on as it is in the book.
        assert BYTES.bos_id not in row.targets.tolist()
        assert row.tokens[1:].tolist() == row.targets[:-1].tolist()
        assert bytes(row.targets.numpy().astype(np.uint8)) in bytes(np.array(train[1:-1], np.uint8))
        assert row.start.tolist() == [0] * 64


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one line and\n    an indented one\n" * 500, b"one "),  # no blank line anywhere
        ("a text without an end of a line " * 600, None),
        ("para one.\r\n\r\n" * 900, b"para"),
    ],
)
def test_where_no_blank_line_is_near_a_row_begins_with_a_line_or_anywhere(tmp_path, text, first):
    _, stream = a_book(tmp_path, text)
    begins = [row for row in stream.next(len(stream.order)) if row.tokens[0] == BYTES.bos_id]
    assert begins
    for row in begins:
        # The first row of the stream begins a document of its own accord.
        assert first is None or bytes(row.targets.numpy().astype(np.uint8)).startswith(first)


def test_a_stream_shorter_than_a_row_is_refused_by_name_and_one_row_is_enough():
    with pytest.raises(InputError) as caught:
        Mixture([a_stream(100), a_stream(16, "tiny")], 16, 0)
    assert "'tiny'" in one_line(caught) and "16" in one_line(caught)
    row = Mixture([a_stream(17)], 16, 0).next_rows(2)
    assert row.tokens.tolist() == [list(range(16))] * 2


# ---- Validation


@given(length=st.integers(2, 200), block_size=st.integers(1, 40), rows=st.integers(1, 9))
def test_every_validation_token_but_the_first_is_a_target_once(length, block_size, rows):
    source = a_stream(block_size + 1, val=length)
    batches = validation_batches([source], block_size, 10**6, rows)
    assert all(len(batch.tokens) <= rows for batch in batches)
    targets = torch.cat([batch.targets for batch in batches]).flatten()
    inputs = torch.cat([batch.tokens for batch in batches]).flatten()
    real = targets != -100
    assert targets[real].tolist() == list(range(1, length))
    assert torch.equal(inputs[real], targets[real] - 1)
    assert (~real).sum() < block_size


def test_a_padded_position_is_a_document_of_its_own():
    (batch,) = validation_batches([a_stream(9, val=11)], 8, 100)
    assert batch.targets[1].tolist() == [9, 10] + [-100] * 6
    assert batch.tokens[1].tolist()[:2] == [8, 9]
    # Position 2 holds the stream's last token, which has no target; behind it is padding.
    assert batch.tokens[1].tolist()[3:] == [10**9] * 5
    assert batch.start[1].tolist() == [0, 0, 0, 3, 4, 5, 6, 7]


def test_validation_keeps_to_its_budget_by_weight_and_spreads_over_the_stream():
    sources = [a_stream(9, "a", 3.0, val=8001), a_stream(9, "b", 1.0, val=80_001)]
    a, b = validation_batches(sources, 8, 1600, batch_rows=1000)
    assert (len(a.tokens), len(b.tokens)) == (150, 50)
    for batch, length in ((a, 8000), (b, 80_000)):
        begins = batch.tokens[:, 0]
        assert torch.equal(begins % 8, torch.zeros_like(begins))
        gaps = begins.diff()
        assert gaps.max() - gaps.min() <= 8 and length - begins[-1] <= gaps.max()
    again = validation_batches(sources, 8, 1600, batch_rows=1000)
    assert [fields(batch) for batch in again] == [fields(a), fields(b)]


def test_every_source_gives_a_validation_row_and_one_without_any_is_refused():
    sources = [a_stream(9, "a", 1e-6, val=100), a_stream(9, "b", 1.0, val=100)]
    assert len(validation_batches(sources, 8, 16)) == 2
    with pytest.raises(InputError) as caught:
        validation_batches([sources[0], a_stream(9, "none", val=1)], 8, 16)
    assert "'none'" in one_line(caught)


# ---- The masked objective

SPECIAL, V = list(BYTES.special_tokens.values()), BYTES.vocab_size


def masked(tokens: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    batch = mask_tokens(Batch(tokens, tokens, torch.zeros_like(tokens, dtype=torch.int32)), BYTES, seed)
    return batch.tokens, batch.targets


@given(
    rows=st.lists(st.lists(st.integers(0, V - 1), min_size=5, max_size=5), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_only_chosen_ordinary_tokens_change_and_they_alone_are_targets(rows, seed):
    tokens = torch.tensor(rows)
    inputs, targets = masked(tokens, seed)
    chosen = targets != -100
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert torch.equal(targets[chosen], tokens[chosen])
    special = torch.isin(tokens, torch.tensor(SPECIAL))
    assert not (chosen & special).any()
    assert set(inputs[chosen].tolist()) & set(SPECIAL) <= {BYTES.mask_id}
    assert bool(chosen.any()) == bool((~special).any())
    again = masked(tokens, seed)
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


def test_of_the_tokens_15_percent_are_chosen_and_shown_as_80_10_10():
    # 5 standard deviations for each of four shares: a false alarm for 1 seed in 400,000.
    tokens = torch.randint(256, (500, 1000), generator=torch.Generator().manual_seed(1))
    inputs, targets = masked(tokens)
    chosen = targets != -100
    n = int(chosen.sum())
    shown, was = inputs[chosen], tokens[chosen]
    # A random token is the old one once in 256.
    for count, total, share in (
        (n, tokens.numel(), 0.15),
        ((shown == BYTES.mask_id).sum(), n, 0.8),
        ((shown == was).sum(), n, 0.1 + 0.1 / 256),
        (((shown != was) & (shown != BYTES.mask_id)).sum(), n, 0.1 * 255 / 256),
    ):
        assert abs(float(count) / total - share) < 5 * (share * (1 - share) / total) ** 0.5
    assert set(shown.unique().tolist()) == {*range(256), BYTES.mask_id}
