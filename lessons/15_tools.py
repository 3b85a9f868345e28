"""A model can learn to call tools, and answers with them what it can neither work out nor know.

    python lessons/15_tools.py

The base model is fine-tuned on questions of two kinds: sums, and facts about strangers, of whom no text tells
anything. Where a system message names tools, the demonstrations call: a sum goes to a calculator, a name to a
search of a card index, and the reply is what comes back. Without that message the same replies are shown and
no calls. Among them are the little world's other conversations, and sentences with a number that ask nothing.
Then it is asked for sums of numbers, and about names, that no demonstration had:

    with, without    how often the reply has the right value
    asked            how often the call is the right one, letter for letter
    false calls      how often it calls, where it may, after a sentence with a number that asks for nothing,
                     and after any other prompt of the world, whose facts it knows

What would refute the claim: of either kind less than 80% right with tools, or less than 40 points more than
without; or more than 2% false calls.
"""

from common import Figures, Options, Seeds, converse, imitates, load, means, span, teach
import json
import random
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from minillm.chat import Conversation, new_call
from minillm.generate import SamplingOptions
from minillm.tools.calls import calculator, search
from minillm.world import World, assistant, user
from minillm.world.facts import Entity, Facts, attributes_of, pick, shuffled, state
from minillm.world.phrases import NAME_PARTS

TOOLS = {"role": "system", "content": "Tools: calculator, search"}
SUMS = ("What is {sum}?", "How much is {sum}?", "Please work out {sum}.")
LINES = {
    "train": (
        "I have {n} hens.", "My aunt is {n} years old.", "We saw {n} boats.", "Page {n} is torn.",
        "The road is {n} miles long.", "He paid {n} coins for it.", "Room {n} is empty.",
        "The number on the door is {n}.", "It rained for {n} hours.", "{n} people came to the fair.",
    ),
    "test": ("There are {n} stones here.", "My house has number {n}.", "It took {n} days."),
}  # fmt: skip
STEMS = [part for firsts, stems, _ in NAME_PARTS.values() for part in (*firsts, *stems)]
ENDS = [end for _, _, ends in NAME_PARTS.values() for end in ends]
KINDS, KNOWN = ("sums", "strangers"), ("fact", "instruction", "small_talk", "harm", "advice")
Case = tuple[Conversation, str]  # a question, a call, its result, the reply; and what the reply must say


def called(question: str, tool: str, argument: str, text: str, result: str, reply: str) -> Conversation:
    call = assistant("") | {"tool_calls": [new_call("call_0", tool, json.dumps({argument: text}))]}
    return [user(question), call, {"role": "tool", "content": result}, assistant(reply)]


def add_up(rng: random.Random, numbers: list[int]) -> Case:
    (b, a), sign = sorted((pick(rng, numbers), pick(rng, numbers))), pick(rng, "+-")
    text, value = f"{a}{sign}{b}", str(a + b if sign == "+" else a - b)
    question = pick(rng, SUMS).format(sum=text)
    return called(question, "calculator", "expression", text, value, f"It is {value}."), f" {value}."


def experiment(options: Options) -> Figures:
    world, facts = World(options.seed), Facts(options.seed)
    rng, few = random.Random(options.seed), options.few
    mixed, found = shuffled(rng, range(100, 1000)), Figures()
    numbers = {"test": mixed[:180], "train": mixed[180:]}
    cards = {(fact.entity, fact.attribute): fact.value for fact in facts.facts}
    strangers = [one for one in facts.unknown if one.split == "test"]

    def made_up() -> Entity:
        """Somebody for the demonstrations. Most last names are of any parts: of the few that each kind has, a
        model remembers which go together, and does not learn to copy."""
        kind, mixed = pick(rng, tuple(NAME_PARTS)), rng.random() < 0.9
        stems, ends = (STEMS, ENDS) if mixed else NAME_PARTS[kind][1:]
        last = pick(rng, stems) + pick(rng, ends)
        name = f"{pick(rng, NAME_PARTS[kind][0])} {last.lower() if kind == 'tool' else last.capitalize()}"
        taken = name in facts.by_name or any(one.name.endswith(name.split()[1]) for one in strangers)
        return made_up() if taken else Entity(name, kind, "train", known=False)

    def look_up(one: Entity) -> Case:
        attribute = pick(rng, attributes_of(one.type))
        value = cards.setdefault((one, attribute), pick(rng, facts.values[attribute]))
        question, query = pick(rng, state(attribute, one, key="asks")), f"{one.name} {attribute}"
        reply = state(attribute, one, value, "answers")[1]
        return called(question, "search", "query", query, f"{one.name}, {attribute}: {value}", reply), value

    def line(side: str) -> Conversation:
        return [user(pick(rng, LINES[side]).format(n=pick(rng, numbers[side]))), assistant("Good to know.")]

    told = [add_up(rng, numbers["train"])[0] for _ in range(few(3000, 10))]
    told += [look_up(made_up())[0] for _ in range(few(4500, 10))]
    alone = [[messages[0], messages[-1]] for messages in told[::10]]
    told += [line("train") for _ in range(few(900, 10))]
    for split in ("train", "reward", "dev"):  # known names: many, and none that is asked about below
        kinds = KNOWN if split == "train" else ("fact",)
        told += [one.messages for one in world.conversations(split, few(4000, 20)) if one.kind in kinds]
    shown = [*alone, *([TOOLS, *messages] for messages in told)]
    model = load(imitates(options, Path(options.out, f"15_seed{options.seed}"), shown, 900, "base"))

    def replies(asked: list[Conversation]) -> list[Conversation]:
        return converse(model, asked, tools, SamplingOptions(44, temperature=0), [0] * len(asked))

    many = range(few(200, 3))
    tests = [add_up(rng, numbers["test"]) for _ in many], [look_up(pick(rng, strangers)) for _ in many]
    find = search(f"{one.name}, {attribute}: {value}" for (one, attribute), value in cards.items())
    tools = {tool.name: tool for tool in (calculator(), find)}
    for kind, cases in zip(KINDS, tests, strict=True):
        for way, told_first in (("without", []), ("with", [TOOLS])):
            said = replies([[*told_first, messages[0]] for messages, _ in cases])
            right = [value in own[-1]["content"] for (_, value), own in zip(cases, said, strict=True)]
            found[f"{kind}, {way}"] = fmean(right)
        found[f"{kind}, asked"] = fmean(case[1] == own[0] for (case, _), own in zip(cases, said, strict=True))
    prompts = {kind: [one.messages for one in world.prompts("test", kind, len(many))] for kind in KNOWN}
    for kind, asked in {"one number": [line("test")[:1] for _ in many], **prompts}.items():
        own = replies([[TOOLS, *messages] for messages in asked])
        found[f"false calls, {kind}"] = fmean("tool_calls" in messages[0] for messages in own)
    found["false calls"] = fmean(found[name] for name in found if name.startswith("false"))
    return found


def verdict(one: Figures) -> dict[str, bool]:
    checks = {"at most 2% false calls": one["false calls"] <= 0.02}
    for kind in KINDS:
        gain = one[f"{kind}, with"] - one[f"{kind}, without"]
        checks[f"{kind}: at least 80% right with tools"] = one[f"{kind}, with"] >= 0.8
        checks[f"{kind}: at least 40 points more than without"] = gain >= 0.4
    return checks


def sentence(seeds: Seeds) -> str:
    found = [f"{kind} {span(seeds, f'{kind}, without', f'{kind}, with')}" for kind in KINDS]
    return f"right: {'; '.join(found)}; false calls {span(seeds, 'false calls', form='{:.1%}')}"


def picture(axes: Axes, seeds: Seeds) -> None:
    for way in ("without", "with"):
        values = means(seeds, (f"{kind}, {way}" for kind in KINDS))
        axes.plot(list(KINDS), values, "o", label=f"{way} tools")
    axes.set(ylim=(0, 1.02), ylabel="right", title="tools")


if __name__ == "__main__":
    teach(experiment, verdict, sentence, picture)
