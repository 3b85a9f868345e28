"""A model reads only so many tokens at a time, its window, and forgets what was said before them.

    python lessons/05_context_window.py

The base model knows facts by heart and has never had to look one up on the page it reads. So it first reads
on, for some minutes and once: in rows of 256 tokens, from then on its window, it reads pages that tell facts
about made-up people and ask for them. Then it is asked about others of whom it has never heard. The
assistant, whose window is 128, is asked about somebody it knows and, behind small talk, about "her" or "him".

    d ago             a fact was told d tokens before its value is due in the answer, among others and plain
                      sentences: how often the likeliest answer is right
    60 ago, before    the same of the base model that has not read on
    chat, n later     the right answer about "her", with n exchanges between the first turn and the question
    dropped, n later  how often minillm.chat had no room any more for the first turn

What would refute the claim: facts told before the window, or behind turns that were dropped, of which 15% and
more are answered right (guessing: 5%). Nothing is shown if those inside are not: less than 80%, at 60 tokens
or of the turn before.
"""

from common import Figures, Options, Seeds, load, means, reads_on, span, teach
import random
from itertools import product
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from minillm.tools.chat import Chat
from minillm.tools.chat import Options as ChatOptions
from minillm.world import phrases, user
from minillm.world.facts import Entity, Facts, shuffled, state
from minillm.world.pen import Pen

WINDOW, AGO, LATER = 256, (30, 60, 90, 120, 180, 230, 270, 330), (0, 1, 2, 3, 6)


class Writer(Pen):
    """Writes about people of whom no text of the world tells; half of them are for training."""

    def __init__(self, seed: int, training: bool) -> None:
        super().__init__(random.Random(f"{seed} {training}"), Facts(seed))
        names = [f"{first} {stem}{end}" for first, stem, end in product(*phrases.NAME_PARTS["person"])]
        new = shuffled(random.Random(seed), [name for name in names if name not in self.facts.by_name])
        self.people = [Entity(name, "person", "", False) for name in new[training::2]]

    def tell(self, count: int) -> list[tuple[str, str, str]]:
        """Facts about so many people with different first names, their questions, their values."""
        found = dict[str, tuple[str, str, str]]()
        while len(found) < count:
            who, attribute = self.pick(self.people), self.pick(("home", "job", "food", "colour"))
            value = self.pick(self.facts.values[attribute])
            fact, question = state(attribute, who, value, "answers")[0], state(attribute, who, key="asks")[0]
            found.setdefault(who.name.split()[0], (fact, question, value))
        return list(found.values())

    def page(self) -> str:
        """Facts among plain sentences, up to twice again, and a question about each, in ever new order."""
        told, plain = self.tell(self.between(2, 7)), [self.word("diary") for _ in range(self.between(0, 4))]
        facts = [fact for fact, _, _ in told]
        lines = [[*facts, *plain], *[facts] * self.between(0, 2)]
        asked = [f"Q: {question}\nA: {fact}" for fact, question, _ in shuffled(self.rng, told)]
        return "\n".join([*(" ".join(shuffled(self.rng, line)) for line in lines), *asked])

    def recalled(self, base: Chat, ago: int) -> bool:
        """Whether the text goes on with the value told so many tokens ago; minillm.chat crops longer text."""
        (fact, question, value), *others = self.tell(7)
        between, end = "", f"\nQ: {question}\nA: {fact[: fact.rindex(value)].rstrip()}"
        while len(base.tokenizer.encode(between + end)) < ago:
            between += f" {others.pop()[0] if others and self.chance(0.5) else self.word('diary')}"
        said = base.reply(fact + between + end, note=lambda line: None)
        return "".join(said).strip().startswith(value)

    def in_chat(self, talk: Chat, later: int) -> tuple[bool, bool]:
        """Whether a chat still knows whom its first turn was about, and whether it has dropped that turn."""
        who = self.pick([one.name for one in self.facts.entities if one.type == "person"])
        first, fact = shuffled(self.rng, self.facts.of[who])[:2]
        topics = [self.pick(tuple(phrases.SMALL_TALK.values())) for _ in range(later)]
        again = state(fact.attribute, fact.entity, key="follow", pronoun=True)[0]
        talk.messages = ()
        for said in (first.asks[0], *(self.say(topic["says"]) for topic in topics), again):
            answer = "".join(talk.reply(said, note=lambda line: None))
        return fact.value in answer, user(first.asks[0]) not in talk.messages


def terminal(run: Path, longest: int | None = None) -> Chat:
    """What `python -m minillm.chat RUN --temperature 0` talks with."""
    one = load(run)
    return Chat(one.model, one.tokenizer, ChatOptions(temperature=0, max_new_tokens=longest))


def experiment(options: Options) -> Figures:
    writer, asking, found = Writer(options.seed, True), Writer(options.seed, False), Figures()
    pages = [writer.page() for _ in range(options.few(3500, 60))]
    run = reads_on(options, "05", pages, (0.03, 0.01), "--block-size", WINDOW)
    count, base = options.few(80, 4), terminal(options.run("base"), 6)
    found["60 ago, before"] = fmean(asking.recalled(base, 60) for _ in range(count))
    base = terminal(run, 6)
    found |= {f"{ago} ago": fmean(asking.recalled(base, ago) for _ in range(count)) for ago in AGO}
    talk = terminal(options.run("sft"))
    for later in LATER:
        tried = [asking.in_chat(talk, later) for _ in range(count)]
        found[f"chat, {later} later"], found[f"dropped, {later} later"] = map(fmean, zip(*tried, strict=True))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    return {
        "60 tokens ago: at least 80% right": one["60 ago"] >= 0.8,
        "before the window: less than 15%": one["270 ago"] < 0.15,
        "in a chat, from the turn before: at least 80%": one["chat, 0 later"] >= 0.8,
        "and from one that it dropped: less than 15%": one["chat, 6 later"] < 0.15,
    }


def sentence(seeds: Seeds) -> str:
    said = ", ".join(f"{ago}: {span(seeds, f'{ago} ago')}" for ago in AGO)
    talk = ", ".join(f"{later}: {span(seeds, f'chat, {later} later')}" for later in LATER)
    return f"right so many tokens ago (window: {WINDOW}): {said}; so many exchanges ago: {talk}"


def picture(axes: Axes, seeds: Seeds) -> None:
    axes.plot(AGO, means(seeds, (f"{ago} ago" for ago in AGO)), "o-", label="answered right")
    axes.axvline(WINDOW, linestyle=":", color="black", label="edge of the window")
    axes.set(xlabel="tokens since the fact was told", ylim=(0, 1.02), title="context window")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
