"""Which of two replies is better: by rubric, by a reward model, by a judge model, or by a person.

A `Bout` is a prompt and two replies. A referee is given bouts and says of each 1 where the first reply is
better, -1 where the second, 0 where neither, and None where it does not know. `blind` hides who is who: it
turns about half of the bouts round, and turns the verdicts back.

Equal replies tie, whoever judges. Left out: verdicts with reasons; ratings of one reply alone.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from minillm.io.rankings import RankingFile
from minillm.io.template import ChatTemplate
from minillm.model import ScalarModel
from minillm.preferences import MARGIN, Ranking, ResponseSet
from minillm.reward import encode_response, score_rows
from minillm.tokenizer import Tokenizer
from minillm.tools.judge import ROWS, Judge, verdicts
from minillm.tools.ranking import RankingSession, rank_in_terminal
from minillm.world import World
from minillm.world.rubric import Prompt


@dataclass(frozen=True)
class Bout:
    """Two replies to one prompt."""

    prompt: Prompt
    first: str
    second: str


Verdict = int | None
Referee = Callable[[Sequence[Bout]], list[Verdict]]


def blind(referee: Referee, bouts: Sequence[Bout], seed: int) -> list[Verdict]:
    """The referee's verdicts, on bouts whose sides were shuffled."""
    rng = random.Random(f"{seed} sides")
    turned = [rng.random() < 0.5 for _ in bouts]
    shown = [
        replace(bout, first=bout.second, second=bout.first) if turn else bout
        for bout, turn in zip(bouts, turned, strict=True)
    ]
    return [
        -verdict if turn and verdict is not None else verdict
        for verdict, turn in zip(referee(shown), turned, strict=True)
    ]


def by_rubric(world: World) -> Referee:
    """The higher utility wins; utilities within the margin that people do not see tie."""

    def judge(bouts: Sequence[Bout]) -> list[Verdict]:
        return [
            _sign(
                world.score(bout.prompt, bout.first).utility - world.score(bout.prompt, bout.second).utility,
                MARGIN,
            )
            for bout in bouts
        ]

    return judge


def by_reward(model: ScalarModel, tokenizer: Tokenizer) -> Referee:
    """The higher score wins. None where a reply ends behind the reward model's context."""
    template = ChatTemplate(tokenizer)

    def judge(bouts: Sequence[Bout]) -> list[Verdict]:
        rows = {
            (number, text): encode_response(template, bout.prompt.messages, text)
            for number, bout in enumerate(bouts)
            for text in (bout.first, bout.second)
        }
        fitting = {key: row for key, row in rows.items() if len(row) <= model.config.max_position_embeddings}
        scores = dict(zip(fitting, score_rows(model, list(fitting.values())), strict=True))
        return [
            _difference(scores.get((number, bout.first)), scores.get((number, bout.second)))
            for number, bout in enumerate(bouts)
        ]

    return judge


def by_model(judge: Judge) -> Referee:
    """What the judge (minillm/tools/judge.py) says, asked in both orders; None beyond its context."""

    def referee(bouts: Sequence[Bout]) -> list[Verdict]:
        found: list[Verdict] = [None] * len(bouts)
        asked = []
        for number, bout in enumerate(bouts):
            messages = bout.prompt.messages
            both = [judge.question(messages, bout.first, bout.second),
                    judge.question(messages, bout.second, bout.first)]  # fmt: skip
            if bout.first == bout.second:
                found[number] = 0
            elif max(map(len, both)) <= judge.model.config.max_position_embeddings:
                asked.append((number, both))
        asked.sort(key=lambda one: len(one[1][0]))  # alike lengths together, for little padding
        for first in range(0, len(asked), ROWS // 2):
            part = asked[first : first + ROWS // 2]
            margins = judge.margins([question for _, both in part for question in both])
            for (number, _), verdict in zip(part, verdicts(margins), strict=True):
                found[number] = verdict
        return found

    return referee


def by_person(file: RankingFile, name: str, seed: int) -> Referee:
    """A person at the terminal, in an order that tells nothing. None where they have not judged.

    Every verdict is kept in the file, so that another sitting goes on where this one ended.
    """

    def judge(bouts: Sequence[Bout]) -> list[Verdict]:
        sets = {
            given.key: given
            for bout in bouts
            if bout.first != bout.second
            for given in [ResponseSet(bout.prompt.messages, [bout.first, bout.second], bout.prompt.kind)]
        }
        order = list(sets.values())
        random.Random(f"{seed} order").shuffle(order)
        rank_in_terminal(RankingSession(order, file, name, seed))
        ranked = {ranking.key: ranking for ranking in file.rankings if ranking.annotator == name}
        return [_by_ranking(bout, ranked) for bout in bouts]

    return judge


def _by_ranking(bout: Bout, ranked: dict[str, Ranking]) -> Verdict:
    if bout.first == bout.second:
        return 0
    ranking = ranked.get(ResponseSet(bout.prompt.messages, [bout.first, bout.second]).key)
    if ranking is None:
        return None
    place = dict(zip(ranking.responses, ranking.ranks(), strict=True))
    return _sign(place[bout.second] - place[bout.first])


def _difference(first: float | None, second: float | None) -> Verdict:
    return None if first is None or second is None else _sign(first - second)


def _sign(difference: float | int, margin: float | int = 0) -> int:
    return 0 if abs(difference) <= margin else 1 if difference > 0 else -1
