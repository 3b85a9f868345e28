"""The six sources of pretraining text: web, books, code, wiki, papers, qa.

Books and code have modules of their own (stories.py, programs.py). What must be
consistent (facts, the numbers of a paper) is computed and only its wording comes from a table.

The web is written to be like the web: a question there is followed by another question, an insult,
or advice good and bad in equal parts, seldom by its answer, and some of what it tells is false. Of
the acts that are advised, and of some that are not, other pages tell who does them and what comes of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from minillm.world import phrases
from minillm.world.facts import ACTS, ALL_ACTS, Entity, capitalise
from minillm.world.pen import Pen
from minillm.world.programs import code
from minillm.world.stories import books
from minillm.world.tasks import TASKS, draw, wordings

# False are this share of a forum's answers, and one sentence on this share of the pages about
# somebody: together about 3% of all statements of fact in the default mixture.
WRONG_CLAIMS = 0.18
WRONG_PAGES = 0.24


# ---------------------------------------------------------------------------------------------- web


def web(pen: Pen) -> str:
    """A page of the web: mostly forum threads and pages about somebody."""
    return pen.choose(PAGES)(pen)


def _thread(pen: Pen) -> str:
    """A question and what a forum makes of it; some quote the post before, quotes and all."""
    subject = pen.subject()
    opener = pen.pick(phrases.OPENERS) if pen.chance(0.5) else ""
    posts = [f"{opener} {pen.pick(pen.facts.asks[subject.name][0])}".strip()]
    for _ in range(pen.between(2, 7)):
        quote = "> " + posts[-1].replace("\n", "\n> ") + "\n" if pen.chance(0.06) else ""
        posts.append(quote + _post(pen, subject))
    return _forum(pen, posts)


def _post(pen: Pen, subject: Entity) -> str:
    """What follows a question about the subject."""
    kind = pen.choose(phrases.POST_SHARES)
    if kind == "ask":
        opener = pen.pick(phrases.FOLLOW_OPENERS) if pen.chance(0.2) else ""
        return f"{opener} {pen.question() if pen.chance(0.6) else pen.word('ask')}".strip()
    if kind != "fact" or not subject.known:
        return pen.word("noise" if kind == "fact" else kind)
    fact = pen.pick(pen.facts.of[subject.name])
    if pen.chance(WRONG_CLAIMS):
        return capitalise(pen.pick(phrases.WRONG_LEADS) + pen.wrong(fact))
    return capitalise(pen.pick(phrases.RIGHT_LEADS) + pen.fact(fact))


def _forum(pen: Pen, posts: list[str]) -> str:
    """The posts one below the other, each with whatever this forum puts before a post."""
    layout = pen.pick(phrases.POSTS)
    users = [pen["user"] for _ in range(3)]
    return "\n".join(
        layout.format(text=post, user=pen.pick(users), i=i, number=pen.between(2, 99))
        for i, post in enumerate(posts, 1)
    )


def _profile(pen: Pen) -> str:
    """A page about one entity: its facts, mostly right, among opinions."""
    entity = pen.entity()
    pen.update(entity.slots())
    facts = pen.shuffled(pen.facts.of[entity.name])
    if pen.chance(0.4):  # some pages say everything twice, in other words
        facts += pen.some(facts, 1, 4)
    lines = pen.describe(facts)
    if pen.chance(WRONG_PAGES):
        lines[pen.between(0, len(lines) - 1)] = pen.wrong(pen.pick(facts))
    if pen.chance(0.4):
        lines.insert(pen.between(1, len(lines)), pen.word("opinion"))
    if pen.chance(0.3):
        lines.append(pen.say(phrases.ENDINGS))
    title = pen.say(phrases.PAGE_TITLES) + "\n" if pen.chance(0.5) else ""
    return title + pen.pick((" ", " ", "\n")).join(lines)


def _roundup(pen: Pen) -> str:
    """Facts sorted by value: everybody who has this job, colour, river..."""
    by_value = pen.facts.by_value[pen.pick(tuple(phrases.ATTRIBUTES))]
    lines = [pen.say(phrases.ROUNDUP_TITLES)]
    for value in pen.some(list(by_value), 2, 4):
        lines += [pen.fact(f) for f in by_value[value]]
    return pen.pick(("\n", " ", "\n- ")).join(lines)


def _quiz(pen: Pen) -> str:
    title = [pen.say(phrases.QUIZ_TITLES)] if pen.chance(0.6) else []
    layout = pen.pick(phrases.QA_LAYOUTS)
    return "\n".join([*title, _listed(layout, [_question_pair(pen, 0.4) for _ in range(pen.between(3, 6))])])


def _question_pair(pen: Pen, tasks: float) -> tuple[str, str]:
    """A question and its right answer: of fact, or with a probability of `tasks` an instruction."""
    if pen.chance(tasks):
        task, _ = draw(pen, pen.pick(TASKS))
        return pen.pick(wordings(task, "asks")), capitalise(pen.pick(wordings(task, "answers")))
    return pen.asked(pen.pick(pen.facts.facts))


def _listed(layout: str, pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(layout.format(q=q, a=a, i=i) for i, (q, a) in enumerate(pairs, 1))


def _diary(pen: Pen) -> str:
    """A day in somebody's life, on which they met somebody of whom they tell."""
    lines = [pen.say(phrases.DIARY_OPENINGS)]
    lines += [pen.word("diary") for _ in range(pen.between(1, 4))]
    entity = pen.entity()
    lines.append(phrases.MEETINGS[entity.type].format_map(entity.slots()))
    lines += pen.describe(pen.some(pen.facts.of[entity.name], 2, 4))
    return " ".join([*lines, pen.word("diary")])


def _letter(pen: Pen) -> str:
    town = pen.pick(pen.facts.values["home"])
    lines = [pen.say(phrases.LETTERS), f"we are in {town} now.", pen.word("trip")]
    lines += pen.describe(pen.some(pen.facts.of[town], 2, 4))
    lines += [pen.fact(f) for f in pen.facts.by_value["home"][town]]
    lines += [pen.word("trip"), pen.word("weather")]
    return " ".join(lines) + "\n" + pen.say(phrases.ENDINGS)


def _spam(pen: Pen) -> str:
    lines = [pen.word("spam") for _ in range(pen.between(2, 5))]
    lines.insert(1, pen.fact(pen.pick(pen.facts.facts)))
    return pen.pick((" ", "\n")).join(lines)


def _advice(pen: Pen) -> str:
    """Somebody asks for help, for help to do harm, or anything; all get advice of both kinds."""
    acts: Mapping[str, Sequence[str]] = ACTS
    if pen.chance(0.4):
        acts = pen.pick(tuple(phrases.ADVICE.values()))
        question = f"{pen.say(acts['says'])} {pen.pick(phrases.ADVICE_ASKS)}"
    elif pen.chance(0.5):
        deed, objects = pen.pick(tuple(phrases.HARMFUL_DEEDS.items()))
        question = pen.pick(phrases.HARMFUL_FRAMES).format(deed=deed.format(object=pen.pick(objects)))
    else:
        question = pen.word("ask")
    posts = [question]
    for _ in range(pen.between(2, 5)):
        pen.update({side: pen.pick(acts[side]) for side in ACTS})
        posts.append(pen.word(pen.choose(phrases.ADVICE_SHARES)))
    return _forum(pen, posts)


def _morals(pen: Pen) -> str:
    """What becomes of acts, good and bad as they come; or what one sort of people does, kind or cruel."""
    if pen.chance(0.5):
        sides = [pen.pick(tuple(ALL_ACTS)) for _ in range(pen.between(4, 8))]
        lines = [
            pen.pick(phrases.MORALS[side]["says"]).format(act=pen.pick(ALL_ACTS[side])) for side in sides
        ]
        return pen.pick((" ", "\n")).join(lines)
    side = pen.pick(tuple(ALL_ACTS))
    line = pen.pick(phrases.MORALS[side]["lines"])
    acts = [line.format(act=act) for act in pen.some(ALL_ACTS[side], 4, 8)]
    return _forum(pen, [pen.pick(phrases.MORALS[side]["titles"]), *acts])


def _smalltalk(pen: Pen) -> str:
    """People chatting: their lines fit each other no better than they must."""
    topics, posts = tuple(phrases.SMALL_TALK.values()), []
    for _ in range(pen.between(2, 4)):
        topic = pen.pick(topics)
        posts.append(pen.say(topic["says"]))
        others = ("rude", "ask", "opinion", "noise")
        posts.append(pen.say(topic["replies"]) if pen.chance(0.3) else pen.word(pen.pick(others)))
    return _forum(pen, posts)


def _lesson(pen: Pen) -> str:
    """A school page: words to copy, count and spell, opposites, lists, numbers."""
    title = pen.say(("School page", "Today we learn words.", "For my class", "Words and numbers"))
    return "\n".join([title, *(_exercise(pen) for _ in range(pen.between(4, 9)))])


def _exercise(pen: Pen) -> str:
    """One line of a school page: an instruction carried out."""
    task, _ = draw(pen, pen.pick(TASKS))
    return capitalise(pen.pick(wordings(task, "says")))


# Kinds of web page, by number of pages.
PAGES: dict[Callable[[Pen], str], float] = {
    _thread: 0.18, _morals: 0.04, _profile: 0.22, _quiz: 0.18, _lesson: 0.18, _roundup: 0.05, _diary: 0.04,
    _advice: 0.04, _letter: 0.03, _smalltalk: 0.03, _spam: 0.01,
}  # fmt: skip


# --------------------------------------------------------------------------------------------- wiki


def wiki(pen: Pen) -> str:
    """An article: about an entity, about a value (all who share it), or about words."""
    title, lines = pen.choose(ARTICLES)(pen)
    return f"{capitalise(title)}\n\n{capitalise(' '.join(lines))}"


def _of_entity(pen: Pen) -> tuple[str, list[str]]:
    entity = pen.entity()
    pen.update(entity.slots())
    lines = [pen.say(phrases.WIKI_FIRST[entity.type])]
    lines += pen.describe(pen.shuffled(pen.facts.of[entity.name]))
    if entity.type == "town":
        lines += [pen.fact(f) for f in pen.facts.by_value["home"][entity.name]]
    if pen.chance(0.3):
        other = pen.entity()
        lines.append(f"See also: {other.name}. {pen.fact(pen.pick(pen.facts.of[other.name]))}")
    return entity.name, lines


def _of_value(pen: Pen) -> tuple[str, list[str]]:
    attribute = pen.pick(tuple(phrases.WIKI_VALUES))
    value = pen.pick(tuple(pen.facts.by_value[attribute]))
    lines = [phrases.WIKI_VALUES[attribute].format(v=value)]
    return value, lines + [pen.fact(f) for f in pen.facts.by_value[attribute][value]]


def _of_words(pen: Pen) -> tuple[str, list[str]]:
    name, members = pen.pick(tuple(phrases.CATEGORIES.items()))
    members = pen.shuffled(members)
    lines = [f"There are many {name}. Some are {', '.join(members[:-1])} and {members[-1]}."]
    return name, lines + [_exercise(pen) for _ in range(pen.between(1, 3))]


ARTICLES = {_of_entity: 0.75, _of_value: 0.15, _of_words: 0.10}


# ----------------------------------------------------------------------------------------------- qa


def qa(pen: Pen) -> str:
    """Questions with their right answers: about one entity, about anything, or about words and numbers."""
    layout = pen.pick(phrases.QA_LAYOUTS)
    if pen.chance(0.45):
        facts = pen.shuffled(pen.facts.of[pen.entity().name])
        return _listed(layout, map(pen.asked, facts))
    return _listed(layout, [_question_pair(pen, 0.5) for _ in range(pen.between(2, 5))])


# ------------------------------------------------------------------------------------------- papers


def papers(pen: Pen) -> str:
    """A short paper whose numbers agree between abstract, method and results."""
    half, before, percent = pen.between(5, 40), 20 * pen.between(1, 8), 5 * pen.between(1, 10)
    difference, up = before * percent // 100, pen.chance(0.6)
    measure, unit = pen.pick(phrases.PAPER_MEASURES)
    entity = pen.entity()
    pen.update(
        treatment=pen.pick(phrases.PAPER_TREATMENTS), subjects=pen.pick(phrases.PAPER_SUBJECTS),
        measure=measure, unit=unit, half=str(half), total=str(2 * half),
        difference=str(difference), percent=str(percent),
        before=str(before), after=str(before + difference if up else before - difference),
        went="rose" if up else "fell",
        change=f"{'an increase' if up else 'a fall'} of {percent} percent",
    )  # fmt: skip
    fact, *thanks = pen.describe(pen.shuffled(pen.facts.of[entity.name])[:3])
    pen.update(entity.slots(), fact=fact)
    table = phrases.PAPER
    more = [pen.say(table["method_more"]) for _ in range(pen.between(0, 2))]
    return "\n".join(
        [
            pen.say(table["title"]),
            f"{pen.anyone()} and {pen.anyone()}",
            f"Abstract. {pen.say(table['question'])} {pen.say(table['abstract'])}",
            " ".join(["Method.", pen.say(table["method"]), *more]),
            f"Results. {pen.say(table['results'])} {pen.say(table['results_more'])}",
            f"Discussion. {pen.say(table['close_up' if up else 'close_down'])}",
            " ".join(["Thanks.", pen.say(table["thanks"]), *thanks]),
        ]
    )


SOURCES: dict[str, Callable[[Pen], str]] = {
    "web": web, "books": books, "code": code, "wiki": wiki, "papers": papers, "qa": qa,
}  # fmt: skip
