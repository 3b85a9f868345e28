"""Simulated people who rank: they judge by the little world's rubric, and disagree as people do.

With u(i) the rubric's utility of response i and g(i) a Gumbel variable of location 0 and scale 1, annotator a
sees

    u(i) + noise · temperature_a · (leaning_a(i) + g(i))

and ranks by that, so that P(i is ranked first) is the softmax of u / (noise · temperature_a) + leaning_a:
the model of Luce (1959) and Plackett (1975), and for two responses that of Bradley and Terry (1952).
Without noise all of them are the rubric itself.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

from minillm.errors import InputError
from minillm.preferences import ResponseSet, ranking_by
from minillm.world import World
from minillm.world.rubric import Prompt, Score

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
