"""Sequences side by side: every one is there once, sees none but itself, and its response is found again."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import forward_passes, pad
from minillm.fast.shared_prompts import pack_sets


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
def test_places_are_those_behind_each_prompt_and_no_prompt_sees_another(sizes):
    """Response b's tokens are 100 b, 100 b + 1, ..., its prompt's among them."""
    rows = [[100 * b + t for t in range(prompt + length)] for b, (prompt, length) in enumerate(sizes)]
    prompts, lengths = torch.tensor([prompt for prompt, _ in sizes]), torch.tensor([len(row) for row in rows])
    for numbers, begins, tokens, start in forward_passes(range(len(rows)), rows, 24):
        mask = torch.arange(6) < (lengths - prompts)[numbers][:, None]
        which, r = mask.nonzero(as_tuple=True)
        places = (begins + prompts[numbers])[which] + r
        expected = [token for i in numbers.tolist() for token in rows[i][prompts[i] :]]
        assert tokens.flatten()[places].tolist() == expected
        first_seen = tokens.gather(1, start.long()).flatten()[places]
        assert first_seen.tolist() == [token // 100 * 100 for token in expected]
        grid = pad(tokens.flatten()[places].float(), mask)
        assert grid[mask].tolist() == expected and grid[~mask].eq(0).all()


trees = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1
)


@given(trees)
def test_a_common_beginning_is_there_once_and_every_sequence_whole_in_the_rows(drawn):
    """Tokens of set i are 1000 i and upward, those of its sequence k 100 (k + 1) above that."""
    common = [shared for shared, _ in drawn]
    sets = [
        [
            [1000 * i + t for t in range(shared)]
            + [1000 * i + 100 * (k + 1) + t for t in range(shared, shared + own)]
            for k, own in enumerate(sizes)
        ]
        for i, (shared, sizes) in enumerate(drawn)
    ]
    tokens, shared_prompts, begins = pack_sets(sets, common)
    assert tokens.shape[1] == sum(shared + sum(sizes) for shared, sizes in drawn)
    (flat,), in_rows = tokens.tolist(), tokens[0][shared_prompts.rows]
    sequences = [(sequence, shared) for own, shared in zip(sets, common, strict=True) for sequence in own]
    for begin, (sequence, shared) in zip(begins.tolist(), sequences, strict=True):
        assert flat[begin + shared : begin + len(sequence)] == sequence[shared:]
    wholes = [row[first : t + 1].tolist() for row, firsts in zip(in_rows, shared_prompts.start, strict=True)
              for t, first in enumerate(firsts.tolist())]  # fmt: skip
    assert all(sequence in wholes for sequence, _ in sequences), "what a last token sees is its sequence"
    for place, at in enumerate(shared_prompts.back.tolist()):
        seen = wholes[at]
        assert seen[-1] == flat[place] and len(seen) == shared_prompts.positions[place] + 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(30, 120))
def test_every_sequence_is_in_one_forward_pass_of_the_size_allowed(lengths, micro_tokens):
    passes = forward_passes(range(len(lengths)), [[0] * length for length in lengths], micro_tokens)
    assert sorted(number for one in passes for number in one.numbers.tolist()) == list(range(len(lengths)))
    for one in passes:
        assert one.tokens.shape[1] <= max(lengths) and one.tokens.numel() <= micro_tokens
        assert one.tokens.shape[1] <= sum(lengths[number] for number in one.numbers)


def test_nothing_needs_no_forward_pass():
    assert forward_passes([], [], 100) == []
