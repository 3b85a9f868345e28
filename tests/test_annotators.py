"""Annotators: the person's screen apart from the terminal, simulated people, a judge, published files."""

import functools
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from minillm.chat import with_chat_template
from minillm.errors import InputError
from minillm.io.rankings import RankingFile, read_rankings
from minillm.model import LanguageModel, config_of_depth, initialize
from minillm.preferences import ResponseSet, new_ranking, ranking_by
from minillm.tokenizer import Tokenizer
from minillm.tools.annotators import DEFAULT_PRINCIPLES, ByPrinciples, outcomes_of, read_principles
from minillm.tools.ranking import RankingSession, rank_in_terminal, run_command, screen
from minillm.tools.report import agreements
from minillm.world import World
from minillm.world.annotators import MARGIN, assign_annotators, simulated_annotators

# ---- A person

SETS = [
    ResponseSet([{"role": "user", "content": f"Question {i}?"}], [f"r{i}{k}" for k in range(4)])
    for i in range(5)
]


@pytest.fixture
def session(tmp_path):
    with RankingFile(tmp_path / "rankings.jsonl") as file:
        yield RankingSession(SETS, file, "Ada", 0)


@given(st.integers(0, 10_000), st.permutations(range(4)), st.lists(st.booleans(), min_size=3, max_size=3))
def test_the_blind_order_never_changes_what_is_stored(tmp_path_factory, seed, best_first, tied):
    """Whatever letters the responses got, the person who likes them in one order stores that order."""
    ranking = [[best_first[0]]]
    for index, ties in zip(best_first[1:], tied, strict=True):
        ranking = [*ranking[:-1], [*ranking[-1], index]] if ties else [*ranking, [index]]
    with RankingFile(tmp_path_factory.mktemp("session") / "rankings.jsonl") as file:
        session = RankingSession(SETS, file, "Ada", seed)
        letters = {text: letter for letter, text in re.findall(r"^  ([A-D])   (\w+)$", screen(session), re.M)}
        typed = " > ".join(" = ".join(letters[f"r0{i}"] for i in group) for group in ranking)
        assert run_command(session, typed).startswith("kept")
        assert session.file.rankings[-1].ranking == [sorted(group) for group in ranking]


def blind_orders(session: RankingSession) -> list[tuple[int, ...]]:
    """The order in which each set's responses are shown, as numbers."""
    return [tuple(session.blind_order(given_set)) for given_set in SETS]


def test_the_blind_order_is_another_for_every_set_seed_and_person_and_the_same_at_the_next_sitting(session):
    seen = [blind_orders(RankingSession(SETS, session.file, who, seed))
            for seed in range(20) for who in ("Ada", "Bob")]  # fmt: skip
    assert blind_orders(session) == seen[0], "the same seed and person, at another sitting"
    assert len(set(seen[0])) > 2, "of five sets"
    assert len({orders[0] for orders in seen[::2]}) > 8, "of twenty seeds"
    assert sum(ada != bob for ada, bob in zip(seen[::2], seen[1::2], strict=True)) > 15, "of twenty"


def test_each_ranking_is_on_the_disk_before_the_next_set_shows(session):
    for number, given_set in enumerate(SETS, start=1):
        assert given_set.messages[0]["content"] in screen(session)
        assert run_command(session, "A > B = C > D") == "kept: 5 comparisons"
        assert len(read_rankings(session.file.path)) == number
    assert "Nothing is left" in screen(session)
    with pytest.raises(InputError, match="there is nothing left"):
        run_command(session, "A > B > C > D")


@pytest.mark.parametrize(
    "typed", ["", "A > B > C", "A > A > B > C > D", "A < B < C < D", "A > B > C > E", "best", "A>B>C>D>"]
)
def test_a_wrong_ranking_is_answered_in_one_line_and_nothing_is_written(session, typed):
    before = session.file.path.read_bytes()
    with pytest.raises(InputError) as refused:
        run_command(session, typed)
    assert len(str(refused.value).splitlines()) == 1
    assert session.file.path.read_bytes() == before and session.current == SETS[0]


def test_what_is_refused_at_the_terminal_is_said_there_and_can_be_typed_again(session, monkeypatch, capsys):
    """A wrong ranking, and one that cannot be kept."""
    typed, append = iter(["A > A", "A > B > C > D", "A > B > C > D", "q"]), session.file.append

    def full(_):
        session.file.append = append
        raise InputError("no space left")

    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    session.file.append = full
    rank_in_terminal(session)
    printed = capsys.readouterr().out
    assert [
        line in printed for line in ("A is there 2 times", "no space left", "kept: 6", "1 of 5 ranked")
    ] == [True] * 4


def test_undo_brings_the_last_set_back_and_skip_puts_one_off(session):
    with pytest.raises(InputError, match="nothing to take back"):
        run_command(session, "u")
    run_command(session, "A > B > C > D")
    run_command(session, "s")
    assert session.current == SETS[2] and session.skipped == {SETS[1].key}
    run_command(session, "A = B = C = D")
    assert "Question 2?" in run_command(session, " U ")
    assert session.current == SETS[2] and session.done == 1
    run_command(session, "u")
    assert session.current == SETS[0] and session.done == 0
    assert RankingSession(SETS, session.file, "Ada", 0).skipped == set(), "at the next sitting it comes again"
    assert run_command(session, "q") is None


def test_people_do_not_see_or_undo_each_others_rankings(session):
    run_command(session, "A > B > C > D")
    bob = RankingSession(SETS, session.file, "Bob", 0)
    assert bob.current == SETS[0] and bob.done == 0
    with pytest.raises(InputError, match="nothing to take back"):
        run_command(bob, "u")
    assert session.done == 1


def test_a_response_of_several_lines_stays_behind_its_letter(tmp_path):
    said = ResponseSet([{"role": "user", "content": "Two?"}], ["one", "two\nlines"])
    with RankingFile(tmp_path / "rankings.jsonl") as file:
        assert "two\n      lines" in screen(RankingSession([said], file, "Ada", 0))


def test_more_responses_than_letters_are_refused(tmp_path):
    many = ResponseSet(SETS[0].messages, [str(i) for i in range(10)])
    with RankingFile(tmp_path / "r.jsonl") as file, pytest.raises(InputError, match="10 responses; 9"):
        RankingSession([many], file, "Ada", 0)


# ---- Simulated people

WORLD = World(0)


@pytest.fixture(scope="module")
def world_sets():
    """Sets as a model makes them: good and flawed replies of the world's people to like prompts."""
    said: dict[str, list[str]] = {}
    for conversation in WORLD.conversations("reward", 300):
        said.setdefault(conversation.kind, []).append(conversation.messages[-1]["content"])
    rng = random.Random(0)
    return [
        ResponseSet(p.messages, rng.sample(sorted(set(said[p.kind])), 4), p.kind, 0)
        for p in WORLD.prompts("reward", n=60)
    ]


def rubric_of(given_set):
    return functools.partial(WORLD.score, WORLD.prompt_of(given_set.messages))


def simulate(sets, noise, seed=0, count=3):
    return [
        new_ranking(given_set, person.rank(rubric_of(given_set), given_set, noise, seed), person.name, seed)
        for given_set in sets
        for person in simulated_annotators(count)
    ]


def orders_of(rankings):
    return [(ranking.annotator, ranking.ranking) for ranking in rankings]


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_without_noise_everybody_ranks_as_the_rubric_does(world_sets, noise):
    for ranking in simulate(world_sets, noise):
        utilities = [rubric_of(ranking)(text).utility for text in ranking.responses]
        assert ranking.ranking == ranking_by(utilities, MARGIN)


# What each character's odds are multiplied by, as exponents: their temperature, over the average one, and
# their leaning.
CHARACTERS = [
    ("plain", 1.0, lambda score, text: 0),
    ("thorough", 0.9, lambda score, text: min(1, len(text) / 100)),
    ("polite", 0.8, lambda score, text: 2 * score.polite),
    ("brisk", 1.25, lambda score, text: -min(1, len(text) / 100)),
    ("careful", 1.05, lambda score, text: 1.5 * score.safe + score.honest),
]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("noise", [1, 4])
def test_who_is_ranked_first_follows_luces_law_with_each_characters_temperature_and_leaning(number, noise):
    """P(first) = softmax of u / (noise · temperature) + leaning, over 2,000 seeds and three responses."""
    name, temperature, leaning = CHARACTERS[number]
    person = simulated_annotators(6)[number]
    assert person.name == f"simulated-{number + 1}-{name}"
    assert person.temperature == pytest.approx(0.26 * temperature)
    prompt = WORLD.prompts("reward", "harm", 1)[0]
    texts = ["I don't know, you lazy fool.", "No.", f"I can't help with that.{' It is a bad thing.' * 3}"]
    given_set = ResponseSet(prompt.messages, texts, "harm", 0)
    scores = [WORLD.score(prompt, text) for text in texts]
    for score, text in zip(scores, texts, strict=True):
        assert person.leaning(score, text) == pytest.approx(leaning(score, text))
    rubric, firsts = dict(zip(texts, scores, strict=True)), Counter[int]()
    for seed in range(2000):
        best = person.rank(rubric.__getitem__, given_set, noise, seed)[0]
        firsts.update(best if len(best) == 1 else [])
    weights = torch.tensor([
        score.utility / (noise * 0.26 * temperature) + leaning(score, text)
        for score, text in zip(scores, texts, strict=True)
    ])  # fmt: skip
    expected = weights.softmax(0).tolist()
    # Four standard deviations of 2,000 draws, and the ties within .01 that count for nobody.
    assert [firsts[i] / firsts.total() for i in range(3)] == pytest.approx(expected, abs=0.045)


def test_the_draws_of_one_person_differ_between_prompts_and_are_shared_with_nobody():
    """With noise alone the same two texts win half the time, whoever else or whatever else they won for."""
    people = simulated_annotators(6)
    asked = WORLD.prompts("reward", "small_talk", 2)
    won = {}
    for person in (people[0], people[5]):  # both of one character
        for prompt in asked:
            given_set = ResponseSet(prompt.messages, ["Fine.", "Well."], "small_talk", 0)
            won[person.name, prompt.text] = [
                person.rank(rubric_of(given_set), given_set, 1e6, seed) == [[0], [1]] for seed in range(300)
            ]
    for one, other in combinations(won.values(), 2):
        assert 0.38 < sum(a == b for a, b in zip(one, other, strict=True)) / 300 < 0.62  # four deviations


def test_five_people_agree_about_as_often_as_the_labelers_of_instructgpt():
    """On sets as a model makes them, 300 prompts: a good reply, a rude one, a distractor, "I don't know"."""
    triples = WORLD.reply_pairs("dev", "rude", 300)
    rng = random.Random(0)
    sets = [
        ResponseSet(prompt.messages, [good, rude, rng.choice(triples)[1], "I don't know."], prompt.kind, 0)
        for prompt, good, rude in triples
    ]
    rate = agreements(simulate(sets, 1, count=5))["all"]["agreement"]["value"]
    assert 0.70 < rate < 0.77


def test_a_ranking_does_not_depend_on_the_order_of_the_responses_and_equal_ones_tie(world_sets):
    person, given_set = simulated_annotators(1)[0], world_sets[0]
    rubric = rubric_of(given_set)
    there = person.rank(rubric, given_set, 1, 0)
    back = person.rank(rubric, ResponseSet(given_set.messages, given_set.responses[::-1]), 1, 0)
    assert [sorted(3 - i for i in tied) for tied in back] == there
    twins = ResponseSet(given_set.messages, [given_set.responses[0]] * 2)
    assert person.rank(rubric, twins, 1, 0) == [[0, 1]]


def test_each_set_has_as_many_opinions_as_asked_for_and_all_annotators_have_their_share():
    shares = [assign_annotators(str(i), 5, 3, 0) for i in range(5000)]
    assert all(len(set(share)) == len(share) == 3 for share in shares)
    counts = Counter(person for share in shares for person in share)
    assert len(counts) == 5 and min(counts.values()) > 2880  # 3.5 standard deviations below 3,000
    assert assign_annotators("a", 1, 3, 0) == [0], "alone nobody is a second"


# ---- A judge


def tiny_judge(seed: int, chat: bool) -> ByPrinciples:
    tokenizer = Tokenizer.train(["Which reply is better? The better reply is A"], 262)
    model = LanguageModel(config_of_depth(1, tokenizer.vocab_size, 512))
    initialize(model, torch.Generator().manual_seed(seed))
    return ByPrinciples(model, with_chat_template(tokenizer) if chat else tokenizer, "Better is shorter.")


@pytest.mark.parametrize("chat", [True, False])
def test_the_choice_is_the_difference_of_the_letters_log_probabilities(chat):
    judge = tiny_judge(0, chat)
    pairs = [replace(SETS[0], responses=[first, "b"]) for first in ("a", "a much longer one")]
    questions = [judge.questions(pair)[0] for pair in pairs]
    for question, margin in zip(questions, judge.margins(questions), strict=True):
        logits = judge.model.logits(judge.model.model(torch.tensor([question]))[0, -1])
        a, b = logits.log_softmax(0)[list(judge.letters)].tolist()
        assert float(margin) == pytest.approx(a - b, abs=1e-5)  # float32, another batch
    assert judge.tokenizer.decode(questions[0]).endswith("The better reply is ")
    assert judge.tokenizer.decode(list(judge.letters)) == "AB"


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=9))
@example([(2.0, 2.0)] * 4)  # a judge that always says A
def test_a_choice_that_goes_with_the_place_is_a_tie(margins):
    judge = tiny_judge(0, True)
    judge.margins = lambda questions: np.array(margins).flatten()
    outcomes = outcomes_of(judge, [replace(SETS[0], responses=["a", "b"])] * len(margins))
    for (as_a, as_b), outcome in zip(margins, outcomes, strict=True):
        wins = np.sign(as_a), -np.sign(as_b)
        assert outcome == (wins[0] if wins[0] == wins[1] else 0)


@given(st.permutations(range(5)))
def test_a_judge_of_one_mind_ranks_as_it_judges(best_first):
    judge = tiny_judge(0, True)
    pairs = permutations(map(best_first.index, range(5)), 2)
    judge.margins = lambda questions: np.array([second - first for first, second in pairs])
    assert judge([replace(SETS[0], responses=list("01234"))]) == [[[i] for i in best_first]]


def test_a_set_beyond_the_judges_context_is_not_ranked():
    assert tiny_judge(0, True)([ResponseSet(SETS[0].messages, ["a" * 600, "b"])]) == [None]


def test_the_principles_are_a_text_of_ones_own(tmp_path):
    assert "harm" in read_principles(DEFAULT_PRINCIPLES)
    (tmp_path / "mine.txt").write_text(" \n")
    with pytest.raises(InputError, match="holds no principles"):
        read_principles(tmp_path / "mine.txt")
    (tmp_path / "mine.txt").write_text("Shorter is better.\n")
    assert read_principles(tmp_path / "mine.txt") == "Shorter is better."
