"""The embedded default data: a little world, generated from a seed, the same on every machine.

It serves every stage: six sources of pretraining text, conversations to imitate (some of them
flawed on purpose), prompts by kind, and a rubric that scores replies. Its parts:

    phrases.toml   tables of words, phrasings and shares: to be skimmed
    facts.py       who exists, what is true of them, and the four splits
    pen.py         words and facts from the tables, at random
    text.py        the six sources of pretraining text, with
    stories.py     the books and
    programs.py    the code among them
    tasks.py       small instructions with checkable answers
    rubric.py      the score of a reply
    __init__.py    prompts, conversations, and the World that holds all of it together

The splits (train, reward, dev, test) share no entity asked about, no unknown name, no phrasing
(opener x question), no instance of an instruction, no small talk, no harmful request and no trouble
that asks for advice. The pretraining text is about all entities, and about all acts: what becomes of
them, and who does them, is told of good and bad ones alike. Some acts nobody ever advises
(HELD_OUT_ACTS), and by them it is measured whether a model tells harm apart or remembers a list.

Left out on purpose: any text by other people, and any language but a small English.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle

from minillm.errors import InputError
from minillm.world import phrases
from minillm.world.facts import (
    ACTS,
    CYCLE,
    SPLIT_SHARES,
    SPLITS,
    Facts,
    attributes_of,
    capitalise,
    cut,
    split_of,
    state,
)
from minillm.world.pen import Pen
from minillm.world.rubric import Prompt, Rubric
from minillm.world.tasks import TASKS, draw, wordings
from minillm.world.text import SOURCES

VERSION = 5
# Percent of tokens, after LLaMA-1's (Touvron et al. 2023, table 1): CommonCrawl, C4, for which books stand
# here, GitHub, Wikipedia, arXiv, StackExchange. Its 4.5 of books are left out: weights need not add to 100.
SHARES = {"web": 67.0, "books": 15.0, "code": 4.5, "wiki": 4.5, "papers": 2.5, "qa": 2.0}
KIND_SHARES = {
    "fact": 0.29, "unknown": 0.18, "instruction": 0.17, "small_talk": 0.13, "harm": 0.13, "advice": 0.10,
}  # fmt: skip
KINDS = tuple(KIND_SHARES)
MULTI_TURN = 0.2
UNKNOWABLE_SHARE = 0.2  # of the prompts of kind unknown: about a known name, but nobody could know
INSTRUCTION_STOCK = 6000  # distinct instructions kept ready, over all splits


@dataclass(frozen=True)
class Conversation:
    """A demonstration: messages ending with the assistant's, its kind and flaw (of the last turn), and its
    prompt."""

    messages: list[dict[str, str]]
    kind: str
    split: str
    flaw: str | None
    prompt: Prompt


def user(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """A message of the assistant."""
    return {"role": "assistant", "content": text}


class World(Facts):
    """The little world of one seed: what is true in it, what is said and asked, and how replies score."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.seed = seed
        self.score = Rubric(self).score  # of a reply to a prompt
        self._stocks: dict[tuple[str, str], list[Prompt]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the version, the seed, and the beginning of any text of this world."""
        digest = hashlib.sha256(f"{VERSION} {self.seed}".encode())
        for source in SOURCES:
            digest.update("\0".join(self.documents(source, 0.003)).encode())
        digest.update(repr(self.conversations("train", 20)).encode())
        return digest.hexdigest()[:16]

    def _pen(self, *key: object) -> Pen:
        return Pen(random.Random(" ".join(map(str, ("world", self.seed, *key)))), self)

    def documents(self, source: str, megabytes: float | int) -> Iterator[str]:
        """Documents of one source until their UTF-8 bytes reach `megabytes` (of 10^6 bytes).

        Document i depends on the seed, the source and i alone, so asking for more only appends.
        """
        _check("source", source, SOURCES)
        left, i = megabytes * 1e6, 0
        while left > 0:
            text = SOURCES[source](self._pen(source, i))
            yield text
            left -= len(text.encode())
            i += 1

    # -------------------------------------------------------------------------------------- prompts

    def prompts(self, split: str, kind: str | None = None, n: int | None = None) -> list[Prompt]:
        """Prompts of a split, of one kind or mixed by KIND_SHARES; asking for more only appends.

        They are distinct until the split's stock of a kind is used up, then come again in the same
        order. Without n: as many as there are distinct ones (and, mixed, in proportion).
        """
        shares = KIND_SHARES if kind is None else {kind: 1.0}
        stocks = {kind: self._stock(split, kind) for kind in shares}
        if n is None:
            n = int(min(len(stock) / shares[kind] for kind, stock in stocks.items()))
        coming, used, result = {kind: cycle(stock) for kind, stock in stocks.items()}, Counter[str](), []
        for i in range(n):  # the kind that is furthest behind its share comes next
            kind = max(shares, key=lambda k: shares[k] * (i + 1) - used[k])
            used[kind] += 1
            result.append(next(coming[kind]))
        return result

    def prompt_of(self, messages: Sequence[dict[str, str]]) -> Prompt | None:
        """The prompt of these messages, which the rubric must know; None where it is none of this world's."""
        return self._by_messages.get(json.dumps(messages, sort_keys=True))

    @cached_property
    def _by_messages(self) -> dict[str, Prompt]:
        stocks = (self._stock(split, kind) for split in SPLITS for kind in KINDS)
        return {json.dumps(prompt.messages, sort_keys=True): prompt for stock in stocks for prompt in stock}

    def _stock(self, split: str, kind: str) -> list[Prompt]:
        """Every distinct prompt of a kind that belongs to the split, in random order."""
        _check("split", split, SPLITS)
        _check("kind of prompt", kind, KINDS)
        if (split, kind) not in self._stocks:
            make = getattr(self, f"_{kind}_prompts")
            self._stocks[split, kind] = self._pen("prompts", split, kind).shuffled(list(make(split)))
        return self._stocks[split, kind]

    def _fact_prompts(self, split: str) -> Iterator[Prompt]:
        for fact in self.facts:
            if fact.entity.split == split:
                for text in _phrasings(split, fact.attribute, fact.asks):
                    yield Prompt([user(text)], "fact", split, fact.attribute, fact.entity.name, fact.value)

    def _unknown_prompts(self, split: str) -> Iterator[Prompt]:
        prompts = [
            Prompt([user(text)], "unknown", split, attribute, entity.name)
            for entity in self.unknown
            if entity.split == split
            for attribute in attributes_of(entity.type)
            for text in _phrasings(split, attribute, state(attribute, entity, key="asks"))[:4]
        ]
        yield from prompts
        unknowable = [
            Prompt([user(text)], "unknown", split, "unknowable", entity.name)
            for entity in self.entities
            if entity.split == split
            for text in _phrasings(split, "unknowable", self.asks[entity.name][1])
        ]
        count = round(len(prompts) * UNKNOWABLE_SHARE / (1 - UNKNOWABLE_SHARE))
        yield from self._pen("unknowable", split).shuffled(unknowable)[:count]

    def _instruction_prompts(self, split: str) -> Iterator[Prompt]:
        pen, seen = self._pen("instructions", split), set()
        for i in range(round(INSTRUCTION_STOCK * SPLIT_SHARES[split])):
            task, content = draw(pen, TASKS[i % len(TASKS)])
            while split_of(f"{self.seed} {content}") != split:
                task, content = draw(pen, task.topic)
            text = pen.pick(_phrasings(split, task.topic, wordings(task, "asks")))
            if text not in seen:
                seen.add(text)
                yield replace(task, messages=[user(text)], split=split)

    def _small_talk_prompts(self, split: str) -> Iterator[Prompt]:
        for topic, table in phrases.SMALL_TALK.items():
            for line in self._lines(split, topic, table["says"]):
                for lead in phrases.SMALL_TALK_LEADS:
                    text = f"{lead} {line}".strip()
                    yield Prompt([user(text)], "small_talk", split, topic, wanted=table["wanted"])

    def _lines(self, split: str, topic: str, says: Sequence[str]) -> Sequence[str]:
        """The lines of the split; one that has a slot is eight, each with another word."""
        lines = []
        for line in says:
            if slot := re.search(r"{(\w+)}", line):
                words = self._pen("small talk", topic, line).shuffled(phrases.WORDS[slot[1]])[:8]
                lines += [line.replace(slot[0], word) for word in words]
            else:
                lines.append(line)
        return cut(self._pen("small talk", topic).shuffled(lines))[split]

    def _advice_prompts(self, split: str) -> Iterator[Prompt]:
        for trouble, table in phrases.ADVICE.items():
            for line in self._lines(split, trouble, table["says"]):
                for text in _phrasings(split, "advice", [f"{line} {ask}" for ask in phrases.ADVICE_ASKS]):
                    yield Prompt([user(text)], "advice", split, trouble, wanted=table["good"])

    def _harm_prompts(self, split: str) -> Iterator[Prompt]:
        deeds = [deed.format(object=o) for deed, objects in phrases.HARMFUL_DEEDS.items() for o in objects]
        for deed in cut(self._pen("deeds").shuffled(deeds))[split]:
            frames = [frame.format(deed=deed) for frame in phrases.HARMFUL_FRAMES]
            for text in _phrasings(split, "harm", frames):
                yield Prompt([user(text)], "harm", split, wanted=(deed,))

    # -------------------------------------------------------------------------------- conversations

    def conversations(self, split: str, n: int) -> list[Conversation]:
        """Demonstrations, flawed by the table FLAWS, a MULTI_TURN share of two turns; asking for more only
        appends."""
        return [self._conversation(split, self._pen("conversation", split, i)) for i in range(n)]

    def _conversation(self, split: str, pen: Pen) -> Conversation:
        prompt = self._any_prompt(pen, split)
        if pen.chance(MULTI_TURN):
            prompt = self._second_turn(pen, prompt)
        flaw = pen.choose({**phrases.FLAWS[prompt.kind], None: 1.0})
        reply = assistant(self._reply(pen, prompt, flaw))
        return Conversation([*prompt.messages, reply], prompt.kind, split, flaw, prompt)

    def _any_prompt(self, pen: Pen, split: str) -> Prompt:
        return pen.pick(self._stock(split, pen.choose(KIND_SHARES)))

    def _second_turn(self, pen: Pen, first: Prompt) -> Prompt:
        """A prompt with a (flawless) turn before it: after a fact often the next question about the same
        entity."""
        history = [*first.messages, assistant(self._reply(pen, first, None))]
        if first.kind == "fact" and pen.chance(0.7):
            fact = pen.pick([f for f in self.of[first.entity] if f.attribute != first.topic])
            asks = state(fact.attribute, fact.entity, key="follow", pronoun=True)
            text = pen.pick(_phrasings(first.split, f"follow {fact.attribute}", asks, phrases.FOLLOW_OPENERS))
            return replace(first, messages=[*history, user(text)], topic=fact.attribute, answer=fact.value)
        second = self._any_prompt(pen, first.split)
        return replace(second, messages=history + second.messages)

    def _reply(self, pen: Pen, prompt: Prompt, flaw: str | None) -> str:
        """What a person might answer, with the flaw if one is named."""
        reply = self._answer(pen, prompt, flaw)
        if flaw == "rude" and pen.chance(0.5):
            return f"{pen.say(phrases.RUDE_BEFORE)} {reply}"
        if flaw == "wordy" and pen.chance(0.3):
            reply = f"{pen.say(phrases.WORDY_BEFORE)} {reply}"
        if flaw in ("rude", "wordy"):
            end = "" if reply.endswith((".", "!", "?")) else "."
            return f"{reply}{end} {pen.say(phrases.RUDE_AFTER if flaw == 'rude' else phrases.WORDY_AFTER)}"
        return reply

    def _answer(self, pen: Pen, prompt: Prompt, flaw: str | None) -> str:
        """The reply without what a rude or a wordy one says besides."""
        topic, value = prompt.topic, prompt.answer
        match prompt.kind:
            case "instruction":
                while flaw == "wrong" and self.score(prompt, value).right > 0.9:
                    value = draw(pen, topic)[0].answer
                return capitalise(pen.pick(wordings(replace(prompt, answer=value), "answers")))
            case "small_talk":
                return pen.say(phrases.SMALL_TALK[topic]["replies"])
            case "harm":
                return pen.say(phrases.COMPLIANCE if flaw == "comply" else phrases.REPLIES["refusal"])
            case "advice":
                side = "bad" if flaw == "harmful" else "good"
                act = pen.pick(phrases.ADVICE[topic][side])
                return capitalise(pen.pick(phrases.ADVICE_FRAMES).format(act=act, end=pen[f"{side}_end"]))
        entity = self.by_name[prompt.entity]
        if prompt.kind == "unknown" and flaw != "guess":
            table = phrases.REPLIES["unknowable" if topic == "unknowable" else "unknown"]
            return pen.say(table, **entity.slots())
        if topic == "unknowable":
            return pen.say(phrases.GUESSES[entity.type], **entity.slots())
        if flaw in ("wrong", "guess"):
            value = pen.other_value(topic, value, entity.name)
        # Most answers to a question of fact say the name once more, which helps to remember.
        answers = state(topic, entity, value, "answers", pen.chance(0.2))
        return answers[0] if pen.chance(0.7) else pen.pick(answers)

    # -------------------------------------------------------------------------------------- judging

    def utility(self, messages: Sequence[dict[str, str]], reply: str) -> float | None:
        """What the rubric gives a reply to these messages; None where they are none of this world's."""
        prompt = self.prompt_of(messages)
        return None if prompt is None else self.score(prompt, reply).utility

    def paired_continuations(self, split: str, n: int, held_out: bool = False) -> list[tuple[str, str, str]]:
        """(context, helpful, harmful): two pieces of advice after a question, in the same frame, of acts with
        as many words and nearly as many characters; with held_out, of acts that nobody gives as advice.

        The pretraining text uses the words of both equally often, so a raw model should find them equally
        likely.
        """
        _check("split", split, phrases.HELD_OUT_ACTS if held_out else SPLITS)
        acts = phrases.HELD_OUT_ACTS[split] if held_out else ACTS
        frames = [frame for frame in phrases.ADVICE_FRAMES if "{end}" not in frame]  # an end would tell
        result: list[tuple[str, str, str]] = []
        pen = self._pen("pairs", split)
        while len(result) < n:
            frame, good, bad = pen.pick(frames), pen.pick(acts["good"]), pen.pick(acts["bad"])
            alike = abs(len(good) - len(bad)) < 3 and len(good.split()) == len(bad.split())
            if alike and (held_out or split_of(good + bad) == split):
                result.append((pen.word("ask"), frame.format(act=good), frame.format(act=bad)))
        return result

    def reply_pairs(self, split: str, flaw: str, n: int) -> list[tuple[Prompt, str, str]]:
        """(prompt, reply, flawed reply): what a person might answer without a flaw of FLAWS and with it, to
        prompts of every kind that knows it; in the same words where the flaw leaves them."""
        kinds = [kind for kind in KINDS if flaw in phrases.FLAWS[kind]]
        _check("flaw", flaw, sorted({name for table in phrases.FLAWS.values() for name in table}))
        result = []
        for i in range(n):
            stock = self._stock(split, kinds[i % len(kinds)])
            prompt = stock[i // len(kinds) % len(stock)]
            good, bad = (
                self._reply(self._pen("reply pair", split, flaw, i), prompt, one) for one in (None, flaw)
            )
            result.append((prompt, good, bad))
        return result


def _check(what: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise InputError(f"the little world has no {what} {name!r}; choose from {', '.join(names)}")


def _phrasings(
    split: str, what: str, asks: Sequence[str], openers: Sequence[str] = phrases.OPENERS
) -> list[str]:
    """The combinations of opener and question that belong to the split: all words are shared, no combination
    is."""
    shift = sum(what.encode())
    return [
        f"{opener} {ask}".strip()
        for c, ask in enumerate(asks)
        for o, opener in enumerate(openers)
        if CYCLE[(o + 3 * c + shift) % len(CYCLE)] == split
    ]
