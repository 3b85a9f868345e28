"""Who says which response is better: the rubric, a reward model, a language model, people, files.

    a judge, asked of pairs    by_rubric, by_reward, Judge, by_person     compare
    an annotator of sets       simulated people, Judge, files, a person   rlhf.py --stage rank

A judge is called with pairs, which are sets of two responses. It says of each 1 where the first is better, -1
where the second, 0 where neither, and None where it does not know. Which side is whose tells it nothing: a
person sees them in a blind order, the language model in both.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
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

Outcome = int | None
PairJudge = Callable[[Sequence[ResponseSet]], list[Outcome]]


def outcomes_of(judge: PairJudge, pairs: Sequence[ResponseSet]) -> list[Outcome]:
    """What a judge says of pairs. Equal responses tie unseen."""
    asked = [i for i, pair in enumerate(pairs) if pair.responses[0] != pair.responses[1]]
    found = dict(zip(asked, judge([pairs[i] for i in asked]), strict=True))
    return [found.get(i, 0) for i in range(len(pairs))]


def prefer(scores: Iterable[float | int | None], margin: float = 0.0) -> Outcome:
    """The higher of two scores wins; those within the margin tie."""
    first, second = scores
    if first is None or second is None:
        return None
    return 0 if abs(first - second) <= margin else 1 if first > second else -1


def by_rubric(world: World) -> PairJudge:
    """By the rubric's scores. None of prompts that are none of this world's."""
    return lambda pairs: [
        prefer((world.utility(pair.messages, text) for text in pair.responses), MARGIN) for pair in pairs
    ]


def by_reward(model: ScalarModel, template: ChatTemplate) -> PairJudge:
    """By the reward model's scores. None where a response ends beyond its context."""

    def judge(pairs: Sequence[ResponseSet]) -> list[Outcome]:
        rows = [
            [tuple(encode_response(template, pair.messages, text)) for text in pair.responses]
            for pair in pairs
        ]
        longest = model.config.max_position_embeddings
        fitting = list(dict.fromkeys(row for two in rows for row in two if len(row) <= longest))
        scores = dict(zip(fitting, score_rows(model, fitting), strict=True))  # each row once
        return [prefer(map(scores.get, two)) for two in rows]

    return judge


def by_person(file: RankingFile, name: str, seed: int) -> PairJudge:
    """A person at the terminal: pairs in an order that tells nothing, and so the sides of each
    (ranking.py). None where they have not judged.

    Every answer is kept in the file, so that another sitting goes on where this one ended.
    """

    def judge(pairs: Sequence[ResponseSet]) -> list[Outcome]:
        order = list({pair.key: pair for pair in pairs}.values())
        random.Random(f"{seed} order").shuffle(order)
        rank_in_terminal(RankingSession(order, file, name, seed))
        ranks = {
            (made.key, text): rank
            for made in file.rankings
            if made.annotator == name
            for text, rank in zip(made.responses, made.ranks(), strict=True)
        }
        # Rank 0 is the best.
        return [prefer(ranks.get((pair.key, text)) for text in pair.responses[::-1]) for pair in pairs]

    return judge


# ---- A language model


def read_principles(path: Path) -> str:
    """The text of a file. Raises InputError where there is none."""
    text = read_text(path).strip()
    if not text:
        raise InputError(f"{path}: holds no principles; write what makes a response better")
    return text


class Judge:
    """A model that says which of two responses is better, by principles."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, principles: str) -> None:
        self.model, self.tokenizer, self.principles = model, tokenizer, principles
        self.form = chat_format(tokenizer)
        a, b = tokenizer.encode(" A"), tokenizer.encode(" B")
        same = next(i for i in range(len(a)) if a[i] != b[i])  # one token for the space, in some vocabularies
        self.opening, self.letters = [*tokenizer.encode(OPENING), *a[:same]], (a[same], b[same])

    def question(self, pair: ResponseSet) -> list[int]:
        """The tokens behind which the judge's choice is read, the first response being A."""
        said = "\n".join(f"{message['role']}: {message['content']}" for message in pair.messages)
        first, second = pair.responses
        text = f"{self.principles}\n\n{said}\n\nReply A: {first}\n\nReply B: {second}\n"
        return [*self.form.prompt([{"role": "user", "content": text}]), *self.opening]

    def __call__(self, pairs: Sequence[ResponseSet]) -> list[Outcome]:
        """For each pair who wins; None where a question is longer than the judge's context."""
        orders = ((pair, replace(pair, responses=pair.responses[::-1])) for pair in pairs)
        both = [(self.question(one), self.question(other)) for one, other in orders]
        longest = self.model.config.max_position_embeddings
        fitting = [i for i, two in enumerate(both) if max(map(len, two)) <= longest]
        signs = np.sign(self.margins([question for i in fitting for question in both[i]])).astype(int)
        # In the second order the first response is B: it wins where the margin is negative.
        found = dict(zip(fitting, np.where(signs[::2] == -signs[1::2], signs[::2], 0).tolist(), strict=True))
        return [found.get(i) for i in range(len(pairs))]

    def rank(self, given: ResponseSet) -> list[list[int]] | None:
        """The ranking of a set; None where a question is longer than the judge's context."""
        scores, pairs = [0] * len(given.responses), list(combinations(range(len(given.responses)), 2))
        found = self([replace(given, responses=[given.responses[i], given.responses[j]]) for i, j in pairs])
        for (i, j), outcome in zip(pairs, found, strict=True):
            if outcome is None:
                return None
            scores[i] += outcome
            scores[j] -= outcome
        return ranking_by(scores)

    def margins(self, questions: Sequence[Sequence[int]]) -> Float64[np.ndarray, " N"]:
        """log P(" A") - log P(" B") behind each question: the difference of two logits."""

        def values(hidden: Tensor, batch: list[int]) -> Tensor:
            a, b = self.model.logits(hidden)[:, list(self.letters)].unbind(1)
            return a - b

        rows = [(question, self.letters[:1]) for question in questions]
        return np.array(values_of(self.model, rows, values)).flatten()


# ---- Whose rankings are made

Job = tuple[str, str, Callable[[], Ranking | None]]
"""Whose ranking of which set is to be made (annotator and key), and how; None comes of a set that cannot be
ranked."""


def jobs_of(options: Any, runtime: Runtime) -> tuple[list[Job], dict[str, Any]]:
    """What there is to rank for anybody but a person, and what a file of rankings must not mix."""
    if options.annotator == "file":
        return published(options), {}
    sets = read_responses(options.folder / "responses.jsonl")
    if options.annotator == "model":
        return judged(options, runtime, sets)
    origin = {f"--{name}": getattr(options, name) for name in ("seed", "annotators", "opinions", "noise")}
    return simulated(options, sets), origin


def simulated(options: Any, sets: Sequence[ResponseSet]) -> list[Job]:
    """Each set to some of the simulated annotators."""
    people, world = annotators.simulated_annotators(options.annotators), World(sets[0].world or 0)

    def make(person: annotators.Simulated, given: ResponseSet, prompt: Any) -> Ranking:
        ranking = person.rank(partial(world.score, prompt), given, options.noise, options.seed)
        return new_ranking(given, ranking, person.name, options.seed)

    jobs: list[Job] = []
    for number, given in enumerate(sets, start=1):
        prompt = world.prompt_of(given.messages)
        if prompt is None or given.world != world.seed:
            raise InputError(
                f"prompt {number} is none of the little world's, whose rubric alone simulated annotators "
                "know; give --annotator person or model"
            )
        who = annotators.assign_annotators(given.key, len(people), options.opinions, options.seed)
        jobs += [(people[i].name, given.key, partial(make, people[i], given, prompt)) for i in who]
    return jobs


def judged(options: Any, runtime: Runtime, sets: Sequence[ResponseSet]) -> tuple[list[Job], dict[str, Any]]:
    """Each set to the judge; the fingerprints of it and of its principles."""
    if options.judge is None:
        raise InputError("--annotator model: name a --judge, as in out/sft")
    principles = read_principles(Path(options.principles or DEFAULT_PRINCIPLES))
    loaded = load_causal_model(Path(options.judge), runtime.device, runtime.dtype)
    model, judge = preferences.ChatModel(f"model-{options.judge}", *loaded), Judge(*loaded, principles)

    def make(given: ResponseSet) -> Ranking | None:
        ranking = judge.rank(given)
        return None if ranking is None else new_ranking(given, ranking, model.name, options.seed)

    origin = {"--judge": options.judge, "weights of --judge": model.fingerprint}
    origin["--principles"] = digest(principles)
    return [(model.name, given.key, partial(make, given)) for given in sets], origin


def published(options: Any) -> list[Job]:
    """The rankings of other people's files, under the names of the files."""
    if not options.data:
        raise InputError("--annotator file: name the files with --data, as in --data hh.jsonl.gz")
    for _, path, _ in parse_specs(options.data):
        if realpath(path) == realpath(options.folder / "rankings.jsonl"):
            raise InputError(f"--data {path}: is where the rankings go; give another file, or another --out")
    rankings = read_all(options.data, "ranking", options.errors)
    return [(one.annotator, one.key, partial(replace, one)) for one in rankings]


def add_rankings(options: Any, runtime: Runtime) -> None:
    """The stage: a person ranks at the terminal, others all that they have not ranked yet."""
    if options.annotator == "person":
        sets = read_responses(options.folder / "responses.jsonl")
        with open_rankings(options, {}) as file:
            record_ranking(options, {})
            rank_in_terminal(RankingSession(sets, file, options.name, options.seed))
        return
    jobs, origin = jobs_of(options, runtime)
    with open_rankings(options, origin) as file:
        existing, missing = file.made(), []  # counts by annotator and set; what makes the other rankings
        for annotator, key, make in jobs:
            if existing[annotator, key]:  # a count, for some files rank a set twice
                existing[annotator, key] -= 1
            else:
                missing.append(make)
        before, keys = len(file.rankings), {key for _, key, _ in jobs}
        others = sum(ranking.key not in keys for ranking in file.rankings)
        if others and options.annotator != "file":
            print(f"{others:,} of the rankings there are of other responses than responses.jsonl holds")
        for first in tqdm(range(0, len(missing), 64), unit="×64 rankings", dynamic_ncols=True):
            rankings = [ranking for make in missing[first : first + 64] if (ranking := make())]
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
