"""Which of two replies is better: by rubric, by a reward model, by a judge model, or by a person.

A `Pair` is a prompt and two replies. A judge is given pairs and says of each 1 where the first reply is
better, -1 where the second, 0 where neither, and None where it does not know. `blind` hides which model said
what: it exchanges the replies of about half of the pairs, and the verdicts back. Equal replies tie unseen.

Left out: verdicts with reasons; ratings of one reply alone.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minillm.annotators import MARGIN
from minillm.chat import ChatTemplate
from minillm.model import ScalarModel
from minillm.preferences import RankingFile, ResponseSet
from minillm.reward import encode_response, score_rows
from minillm.tokenizer import Tokenizer
from minillm.tools.judge import Judge
from minillm.tools.ranking import RankingSession, rank_in_terminal
from minillm.world import World
from minillm.world.rubric import Prompt


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt."""

    prompt: Prompt
    first: str
    second: str

    def exchanged(self) -> "Pair":
        return Pair(self.prompt, self.second, self.first)


Verdict = int | None
PairJudge = Callable[[Sequence[Pair]], list[Verdict]]
Scores = Callable[[Sequence[tuple[Prompt, str]]], Sequence[float | None]]
"""Scores of replies; None for one that cannot be scored."""


def blind(judge: PairJudge, pairs: Sequence[Pair], seed: int) -> list[Verdict]:
    """The judge's verdicts, on pairs whose sides were shuffled."""
    rng = random.Random(f"{seed} sides")
    exchanged = [rng.random() < 0.5 for _ in pairs]
    asked = [i for i, pair in enumerate(pairs) if pair.first != pair.second]
    found: list[Verdict] = [0] * len(pairs)
    verdicts = judge([pairs[i].exchanged() if exchanged[i] else pairs[i] for i in asked])
    for i, verdict in zip(asked, verdicts, strict=True):
        found[i] = -verdict if exchanged[i] and verdict is not None else verdict
    return found


def by_scores(scores: Scores, margin: float = 0.0) -> PairJudge:
    """The reply of the higher score wins; scores within the margin tie."""

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        found = scores([(pair.prompt, text) for pair in pairs for text in (pair.first, pair.second)])
        return [
            None if first is None or second is None else _sign(first - second, margin)
            for first, second in zip(found[::2], found[1::2], strict=True)
        ]

    return judge


def by_rubric(world: World) -> PairJudge:
    """By the rubric's scores; what people would see no difference in ties."""
    return by_scores(lambda asked: [world.score(prompt, text).utility for prompt, text in asked], MARGIN)


def by_reward(model: ScalarModel, tokenizer: Tokenizer) -> PairJudge:
    """By the reward model's scores. None where a reply ends beyond its context."""
    template = ChatTemplate(tokenizer)

    def scores(asked: Sequence[tuple[Prompt, str]]) -> list[float | None]:
        rows = [encode_response(template, prompt.messages, text) for prompt, text in asked]
        fits = [len(row) <= model.config.max_position_embeddings for row in rows]
        found = iter(score_rows(model, [row for row, fit in zip(rows, fits, strict=True) if fit]))
        return [next(found) if fit else None for fit in fits]

    return by_scores(scores)


def by_model(judge: Judge) -> PairJudge:
    """What a judge model says, asked in both orders; None beyond its context."""
    return lambda pairs: judge.compare([(pair.prompt.messages, pair.first, pair.second) for pair in pairs])


def by_person(file: RankingFile, name: str, seed: int) -> PairJudge:
    """A person at the terminal, in an order that tells nothing. None where they have not judged.

    Every verdict is kept in the file, so that another sitting goes on where this one ended.
    """

    def set_of(pair: Pair) -> ResponseSet:
        return ResponseSet(pair.prompt.messages, [pair.first, pair.second], pair.prompt.kind)

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        order = list({given.key: given for given in map(set_of, pairs)}.values())
        random.Random(f"{seed} order").shuffle(order)
        rank_in_terminal(RankingSession(order, file, name, seed))
        ranks = {
            ranking.key: dict(zip(ranking.responses, ranking.ranks(), strict=True))
            for ranking in file.rankings
            if ranking.annotator == name
        }
        places = [ranks.get(set_of(pair).key) for pair in pairs]
        return [
            None if place is None else _sign(place[pair.second] - place[pair.first])
            for pair, place in zip(pairs, places, strict=True)
        ]

    return judge


def _sign(difference: float | int, margin: float = 0.0) -> int:
    return 0 if abs(difference) <= margin else 1 if difference > 0 else -1
