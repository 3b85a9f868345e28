"""Who says which response is better: the rubric, a reward model, a language model, people, files.

    the rubric, a reward model, a language model, a person     compare, of sets of two
    simulated people, a language model, a person, files        rlhf.py --stage rank

A judge is called with sets of responses and ranks each, best first, ties together; None where it does not
know. Which response is whose tells it nothing: a person sees them in a blind order, the language model every
two in both.

The language model is shown the principles, the conversation and two responses, called A and B, and begins its
reply with "The better reply is"; whether " A" or " B" is likelier to come next is its choice. Judges favour a
place, so each pair is shown in both orders, and a choice that goes with the place and not with the response
counts as a tie. More than two responses are ranked by wins less losses (Copeland's method).

Left out: reasoning before the choice, which takes a larger judge than one that can be trained here; choices
with reasons; ratings of one response alone.

Method: Bai et al. 2022, "Constitutional AI" (arXiv 2212.08073), section 4.1, where a judge chooses by
log-probabilities; both orders as in Zheng et al. 2023 (arXiv 2306.05685), section 3.4.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress, permutations
from os.path import realpath
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from minillm import preferences
from minillm.chat import ChatTemplate, chat_format
from minillm.digest import digest
from minillm.errors import InputError
from minillm.io.conversations import read_all
from minillm.io.disk import read_text
from minillm.io.files import parse_specs
from minillm.io.huggingface import load_causal_model
from minillm.io.rankings import RankingFile, open_rankings, read_responses, record_ranking
from minillm.model import LanguageModel, ScalarModel, score_rows
from minillm.preferences import Ranking, ResponseSet, new_ranking, ranking_by
from minillm.reward import encode_response
from minillm.run import Runtime
from minillm.tokenizer import Tokenizer
from minillm.tools.evaluate import values_of
from minillm.tools.ranking import RankingSession, rank_in_terminal
from minillm.world import World, annotators
from minillm.world.annotators import MARGIN

DEFAULT_PRINCIPLES = Path(__file__).with_name("principles.txt")
OPENING = "The better reply is"

Judged = list[list[int]] | None
Judge = Callable[[Sequence[ResponseSet]], list[Judged]]


def outcomes_of(judge: Judge, pairs: Sequence[ResponseSet]) -> list[int | None]:
    """Of sets of two 1 where a judge prefers the first, -1 the second, 0 neither. Equal ones tie unseen."""
    asked = [i for i, pair in enumerate(pairs) if pair.responses[0] != pair.responses[1]]
    found = dict(zip(asked, judge([pairs[i] for i in asked]), strict=True))
    signs = {"[[0], [1]]": 1, "[[1], [0]]": -1, "[[0, 1]]": 0}
    return [signs.get(str(found.get(i, [[0, 1]]))) for i in range(len(pairs))]


def ranked(values: Sequence[float | int | None], margin: float = 0.0) -> Judged:
    """The highest first; None where one is unknown."""
    known = [value for value in values if value is not None]
    return ranking_by(known, margin) if len(known) == len(values) else None


def by_rubric(world: World) -> Judge:
    """By the rubric's scores. None of prompts that are none of this world's."""
    return lambda sets: [
        ranked([world.utility(one.messages, text) for text in one.responses], MARGIN) for one in sets
    ]


def by_reward(model: ScalarModel, template: ChatTemplate) -> Judge:
    """By the reward model's scores. None where a response ends beyond its context."""

    def judge(sets: Sequence[ResponseSet]) -> list[Judged]:
        rows = [
            [tuple(encode_response(template, one.messages, text)) for text in one.responses] for one in sets
        ]
        longest = model.config.max_position_embeddings
        fitting = list(dict.fromkeys(row for own in rows for row in own if len(row) <= longest))
        scores = dict(zip(fitting, score_rows(model, fitting), strict=True))  # each row once
        return [ranked([*map(scores.get, own)]) for own in rows]

    return judge


def by_person(file: RankingFile, name: str, seed: int) -> Judge:
    """A person at the terminal: sets in an order that tells nothing, and so the responses of each
    (ranking.py). None where they have not judged.

    Every answer is kept in the file, so that another sitting goes on where this one ended.
    """

    def judge(sets: Sequence[ResponseSet]) -> list[Judged]:
        order = list({one.key: one for one in sets}.values())
        random.Random(f"{seed} order").shuffle(order)
        rank_in_terminal(RankingSession(order, file, name, seed))
        values = {
            (made.key, text): -rank
            for made in file.rankings
            if made.annotator == name
            for text, rank in zip(made.responses, made.ranks(), strict=True)
        }
        return [ranked([values.get((one.key, text)) for text in one.responses]) for one in sets]

    return judge


# ---- A language model


def read_principles(path: Path) -> str:
    """The text of a file. Raises InputError where there is none."""
    text = read_text(path).strip()
    if not text:
        raise InputError(f"{path}: holds no principles; write what makes a response better")
    return text


class ByPrinciples:
    """A model that says which of two responses is better, by principles."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, principles: str) -> None:
        self.model, self.tokenizer, self.principles = model, tokenizer, principles
        self.form = chat_format(tokenizer)
        a, b = tokenizer.encode(" A"), tokenizer.encode(" B")
        same = next(i for i in range(len(a)) if a[i] != b[i])  # one token for the space, in some vocabularies
        self.opening, self.letters = [*tokenizer.encode(OPENING), *a[:same]], (a[same], b[same])

    def questions(self, given: ResponseSet) -> list[list[int]]:
        """For every two responses, in both orders, the tokens behind which the choice is read."""
        said = "\n".join(f"{message['role']}: {message['content']}" for message in given.messages)
        texts = [
            f"{self.principles}\n\n{said}\n\nReply A: {first}\n\nReply B: {second}\n"
            for first, second in permutations(given.responses, 2)
        ]
        return [[*self.form.prompt([{"role": "user", "content": text}]), *self.opening] for text in texts]

    def __call__(self, sets: Sequence[ResponseSet]) -> list[Judged]:
        """By wins less losses; None where a question is longer than the judge's context."""
        asked, longest = [*map(self.questions, sets)], self.model.config.max_position_embeddings
        fits = [max(map(len, own)) <= longest for own in asked]
        margins = iter(self.margins([question for own in compress(asked, fits) for question in own]))
        found = list[Judged]()
        for one, own, fit in zip(sets, asked, fits, strict=True):
            won = np.zeros((len(one.responses),) * 2)  # of row and column the row's, as the first of the two
            won[~np.eye(len(won), dtype=bool)] = np.sign([next(margins) for _ in own]) if fit else 0
            scores = np.where(won == -won.T, won, 0).sum(1)
            found.append(ranking_by(scores.tolist()) if fit else None)
        return found

    def margins(self, questions: Sequence[Sequence[int]]) -> Float64[np.ndarray, " N"]:
        """log P(" A") - log P(" B") behind each question: the difference of two logits."""

        def values(hidden: Tensor, batch: list[int]) -> Tensor:
            a, b = self.model.logits(hidden)[:, list(self.letters)].unbind(1)
            return a - b

        rows = [(question, self.letters[:1]) for question in questions]
        return np.array(values_of(self.model, rows, values)).flatten()


# ---- The stage: whose rankings are made

Plan = tuple[list[tuple[str, Any]], Callable[[str, Any], Ranking | None], dict[str, Any]]
"""Who is to rank which set; what ranks a set for an annotator, or cannot; what a file must not mix."""


def simulated(options: Any, runtime: Runtime) -> Plan:
    """Each set to some of the simulated annotators."""
    sets = read_responses(options.folder / "responses.jsonl")
    people = {person.name: person for person in annotators.simulated_annotators(options.annotators)}
    names, world, asked = [*people], World(sets[0].world or 0), list[tuple[str, Any]]()
    for number, given in enumerate(sets, start=1):
        if world.prompt_of(given.messages) is None or given.world != world.seed:
            raise InputError(
                f"prompt {number} is none of the little world's, whose rubric alone simulated annotators "
                "know; give --annotator person or model"
            )
        who = annotators.assign_annotators(given.key, len(people), options.opinions, options.seed)
        asked += [(names[i], given) for i in who]

    def rank(name: str, given: ResponseSet) -> Ranking:
        prompt: Any = world.prompt_of(given.messages)
        ranking = people[name].rank(partial(world.score, prompt), given, options.noise, options.seed)
        return new_ranking(given, ranking, name, options.seed)

    origin = {f"--{name}": getattr(options, name) for name in ("seed", "annotators", "opinions", "noise")}
    return asked, rank, origin


def judged(options: Any, runtime: Runtime) -> Plan:
    """Each set to the judge, which must stay the same, and its principles."""
    sets = read_responses(options.folder / "responses.jsonl")
    if options.judge is None:
        raise InputError("--annotator model: name a --judge, as in out/sft")
    principles = read_principles(Path(options.principles or DEFAULT_PRINCIPLES))
    loaded = load_causal_model(Path(options.judge), runtime.device, runtime.dtype)
    model, judge = preferences.ChatModel(f"model-{options.judge}", *loaded), ByPrinciples(*loaded, principles)

    def rank(name: str, given: ResponseSet) -> Ranking | None:
        (ranking,) = judge([given])
        return None if ranking is None else new_ranking(given, ranking, name, options.seed)

    origin = {"--judge": options.judge, "weights of --judge": model.fingerprint}
    return [(model.name, given) for given in sets], rank, origin | {"--principles": digest(principles)}


def published(options: Any, runtime: Runtime) -> Plan:
    """The rankings of other people's files, under the names of the files."""
    if not options.data:
        raise InputError("--annotator file: name the files with --data, as in --data hh.jsonl.gz")
    for _, path, _ in parse_specs(options.data):
        if realpath(path) == realpath(options.folder / "rankings.jsonl"):
            raise InputError(f"--data {path}: is where the rankings go; give another file, or another --out")
    rankings = read_all(options.data, "ranking", options.errors)
    return [(one.annotator, one) for one in rankings], lambda name, one: one, {}


def add_rankings(options: Any, runtime: Runtime) -> None:
    """A person ranks at the terminal, others all that they have not ranked yet."""
    if options.annotator == "person":
        sets = read_responses(options.folder / "responses.jsonl")
        with open_rankings(options, {}) as file:
            record_ranking(options, {})
            rank_in_terminal(RankingSession(sets, file, options.name, options.seed))
        return
    plans = {"simulated": simulated, "model": judged, "file": published}
    asked, rank, origin = plans[options.annotator](options, runtime)
    with open_rankings(options, origin) as file:
        existing = Counter((ranking.annotator, ranking.key) for ranking in file.rankings)
        missing = []  # who has not ranked which
        for name, given in asked:
            if existing[name, given.key]:  # a count, for some files rank a set twice
                existing[name, given.key] -= 1
            else:
                missing.append((name, given))
        before, keys = len(file.rankings), {given.key for _, given in asked}
        others = sum(ranking.key not in keys for ranking in file.rankings)
        if others and options.annotator != "file":
            print(f"{others:,} of the rankings there are of other responses than responses.jsonl holds")
        for first in tqdm(range(0, len(missing), 64), unit="×64 rankings", dynamic_ncols=True):
            rankings = [made for one in missing[first : first + 64] if (made := rank(*one))]
            if rankings and len(file.rankings) == before:
                record_ranking(options, origin)
            file.append(rankings)
        made = file.rankings[before:]
    print(f"{file.path}: {len(made):,} rankings added to {before:,}")
    if tied := sum(not ranking.pairs() for ranking in made):
        print(f"{tied:,} of them prefer nothing")
    if missing and not made:
        raise InputError(
            f"--judge {options.judge}: no set fits its context; name a judge that reads more tokens at once "
            "(--block-size of train.py)"
        )
    if len(made) < len(missing):
        print(f"{len(missing) - len(made):,} sets left out: too long for the judge")
