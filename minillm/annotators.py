"""Who ranks: a person at a screen, or simulated people who judge by the little world's rubric.

The person's part knows no terminal: a `Desk` has the responses at hand, in a random order and without
a word about their origin, takes a ranking as it is typed, and puts it on the disk before it shows the
next. `screen` and `obey` are text in and out. rlhf.py holds them against a terminal.

The simulated annotators disagree as people do. With u(i) the rubric's utility of response i and
g(i) a Gumbel variable of location 0 and scale 1, annotator a sees

    u(i) + noise · temperature_a · (leaning_a(i) + g(i))

and ranks by that, so that P(i is ranked first) is the softmax of u / (noise · temperature_a) + leaning_a:
the model of Luce (1959) and Plackett (1975), and for two responses that of Bradley and Terry (1952).
Without noise all of them are the rubric itself.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle

from minillm.errors import InputError
from minillm.preferences import (
    LETTERS,
    Ranking,
    RankingFile,
    ResponseSet,
    new_ranking,
    parse_ranking,
    ranking_by,
)
from minillm.world import World
from minillm.world.rubric import Prompt, Score

# ---- A person


class Desk:
    """Where one person ranks set after set. What was ranked in earlier sittings does not come again."""

    def __init__(self, sets: Sequence[ResponseSet], file: RankingFile, annotator: str, seed: int) -> None:
        for number, given in enumerate(sets, start=1):
            if len(given.responses) > len(LETTERS):
                raise InputError(
                    f"prompt {number} has {len(given.responses)} responses; {len(LETTERS)} can be ranked"
                )
        self.sets, self.file, self.annotator, self.seed = sets, file, annotator, seed
        self.skipped: set[str] = set()
        """Keys of the sets put off to another sitting."""

    @property
    def current(self) -> ResponseSet | None:
        """The first set that is neither ranked nor skipped."""
        ranked = self._ranked()
        return next((s for s in self.sets if s.key not in ranked and s.key not in self.skipped), None)

    @property
    def done(self) -> int:
        """How many of the sets this person has ranked."""
        ranked = self._ranked()
        return sum(given.key in ranked for given in self.sets)

    def shown(self) -> list[str]:
        """The responses at hand in their blind order: the first is called A."""
        given = self.current
        return [given.responses[index] for index in self._order(given)] if given else []

    def rank(self, typed: str) -> Ranking:
        """Puts a ranking of the letters on the disk. InputError, and nothing written, if it is none."""
        given = self.current
        if given is None:
            raise InputError("there is nothing left to rank")
        order = self._order(given)
        places = parse_ranking(typed, len(order))
        ranking = [[order[place] for place in tied] for tied in places]
        made = new_ranking(given, ranking, self.annotator, self.seed)
        self.file.append([made])
        return made

    def skip(self) -> None:
        """Puts the set at hand off to another sitting."""
        if given := self.current:
            self.skipped.add(given.key)

    def undo(self) -> Ranking | None:
        """Takes this person's last ranking back; its set is to be ranked again."""
        undone = self.file.withdraw(self.annotator)
        if undone:
            self.skipped.discard(undone.key)
        return undone

    def _ranked(self) -> set[str]:
        return {ranking.key for ranking in self.file.rankings if ranking.annotator == self.annotator}

    def _order(self, given: ResponseSet) -> list[int]:
        """Another for each set and person, and the same for both at each sitting."""
        order = list(range(len(given.responses)))
        random.Random(f"{self.seed} {self.annotator} {given.key}").shuffle(order)
        return order


HELP = "Rank all, best first, ties with =, as in B > A = D > C.   s skip   u undo   q quit"


def screen(desk: Desk) -> str:
    """What a person sees: how far they are, the conversation, the responses."""
    lines = [f"──── {desk.done} of {len(desk.sets)} ranked, {len(desk.skipped)} skipped ────", ""]
    given = desk.current
    if given is None:
        return "\n".join([*lines, "Nothing is left to rank.   u undo   q quit"])
    lines += [f"{message['role']}: {message['content']}" for message in given.messages]
    for letter, text in zip(LETTERS, desk.shown(), strict=False):
        lines += ["", f"  {letter}   " + text.replace("\n", "\n      ")]
    return printable("\n".join([*lines, "", HELP]))


def obey(desk: Desk, typed: str) -> str | None:
    """Carries out what was typed under the screen. Returns what to say about it; None to end."""
    match typed.strip().lower():
        case "q":
            return None
        case "s":
            desk.skip()
            return "skipped: it comes again at the next sitting"
        case "u":
            undone = desk.undo()
            if undone is None:
                return "nothing to take back"
            return printable(f"taken back: the ranking of {undone.messages[-1]['content']!r:.60}")
    try:
        made = desk.rank(typed)
    except InputError as error:
        return f"not a ranking: {error}"
    return f"kept: {len(made.pairs())} comparisons"


def printable(text: str) -> str:
    """Without control characters: what a model says must command neither a terminal nor a page."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def hold_screen(desk: Desk) -> None:
    """Shows set after set and obeys, until none is left or the person has had enough."""
    with suppress(ImportError):  # not everywhere; with it, input() can edit its line
        import readline  # noqa: F401
    answer: str | None = ""
    shown = ""
    while answer is not None and desk.current:
        if (text := screen(desk)) != shown:
            print(text)
            shown = text
        try:
            answer = obey(desk, input("> "))
        except (EOFError, KeyboardInterrupt):
            answer = None
        print(answer or "")
    print(f"{desk.done} of {len(desk.sets)} ranked; the same command goes on")


# ---- Simulated people

TEMPERATURE = 0.26
"""Of an average annotator, in units of utility. Measured: see `simulated_annotators`."""
MARGIN = 0.01
"""Of two responses that seem closer than this neither is preferred."""


@dataclass(frozen=True)
class Simulated:
    """Somebody with a temperature and leanings of their own."""

    name: str
    temperature: float
    leaning: Callable[[Score, str], float]
    """What a response gains or loses with them beyond the rubric."""

    def rank(
        self, world: World, prompt: Prompt, given: ResponseSet, noise: float | int, seed: int
    ) -> list[list[int]]:
        """Their ranking. The draws follow from the seed, the name and the texts alone."""
        seen = [self._seen(world.score(prompt, text), given, text, noise, seed) for text in given.responses]
        return ranking_by(seen, MARGIN)

    def _seen(self, score: Score, given: ResponseSet, text: str, noise: float | int, seed: int) -> float:
        # The same words seem as good each time they are read: the draw is the text's.
        rng = random.Random(f"{seed} {self.name} {json.dumps([given.messages, text])}")
        gumbel = -math.log(max(rng.expovariate(1), 1e-300))  # -log E has that law if E is exponential
        return score.utility + noise * self.temperature * (self.leaning(score, text) + gumbel)


CHARACTERS: dict[str, tuple[float, Callable[[Score, str], float]]] = {
    "plain": (1.0, lambda score, text: 0.0),
    "thorough": (0.9, lambda score, text: min(1.0, len(text) / 100)),
    "polite": (0.8, lambda score, text: 2 * score.polite),
    "brisk": (1.25, lambda score, text: -min(1.0, len(text) / 100)),
    "careful": (1.05, lambda score, text: 1.5 * score.safe + score.honest),
}
"""The temperature of each, over TEMPERATURE, and what it leans to, where 1 multiplies the odds by e."""


def simulated_annotators(count: int) -> list[Simulated]:
    """`count` annotators; beyond five, characters come again in other people.

    Measured on 4 responses to each of 7,000 prompts, ranked by all five: two of them agree on 72.4 to 73.2 %
    of untied pairs (five worlds), alpha is 0.46; labelers of InstructGPT (Ouyang et al. 2022, arXiv
    2203.02155, section 3.4) agreed on 72.6 ± 1.5 %.
    """
    return [
        Simulated(f"simulated-{number}-{name}", TEMPERATURE * temperature, leaning)
        for number, (name, (temperature, leaning)) in zip(
            range(1, count + 1), cycle(CHARACTERS.items()), strict=False
        )
    ]


def share_out(keys: Sequence[str], annotators: int, opinions: int, seed: int) -> Iterator[list[int]]:
    """Who ranks each set: `opinions` of the annotators, or all if there are fewer."""
    for key in keys:
        yield random.Random(f"{seed} who {key}").sample(range(annotators), min(opinions, annotators))


def find_prompts(sets: Sequence[ResponseSet], world: World) -> list[Prompt]:
    """The little world's prompt behind each set, which its rubric must know.

    Raises InputError for a set that has none.
    """
    found = []
    for number, given in enumerate(sets, start=1):
        prompt = world.prompt_of(given.messages)
        if prompt is None or given.world != world.seed:
            raise InputError(
                f"prompt {number} is none of the little world's, whose rubric alone simulated annotators "
                "know; give --annotator person or model"
            )
        found.append(prompt)
    return found
