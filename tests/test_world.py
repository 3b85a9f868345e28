"""The little world: reproducible, coherent, split without leaks, and judged by a rubric that cannot
be flattered.
"""

import contextlib
import hashlib
import io
import re
from collections import Counter
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import InputError
from minillm.world import KIND_SHARES, KINDS, MULTI_TURN, SHARES, Prompt, World, phrases
from minillm.world.facts import ACTS, ALL_ACTS, SPLITS, Entity, attributes_of, state
from minillm.world.stories import PHASES, Story
from minillm.world.tasks import TASKS, wordings
from minillm.world.text import SOURCES

WORLD = World(0)
SENTENCE = re.compile(r"[^.!?\n]+[.!?]")
KIND = st.sampled_from(KINDS)
SPLIT = st.sampled_from(SPLITS)


@pytest.fixture(scope="module")
def mixture() -> dict[str, list[str]]:
    """Three megabytes of all sources in their default shares, a quarter of the default size."""
    total = sum(SHARES.values())
    return {source: list(WORLD.documents(source, 3 * share / total)) for source, share in SHARES.items()}


@pytest.fixture(scope="module")
def demonstrations() -> list:
    return WORLD.conversations("train", 2000)


# ------------------------------------------------------------------------------------- reproducible


# A changed word, or a changed order of draws, is another world: figures and models would not compare. Then
# raise VERSION in minillm/world/__init__.py, and pin the new ones.
FINGERPRINTS = {0: "8548e027a64aff65", 1: "b9418fe49f9b3f51", 7: "86ea14b2d81d1c49"}
CONTENT = "0c6fde3cb31af706"


def test_the_worlds_are_those_of_every_release() -> None:
    """In every process: each hashes strings in another way, and sets of them have another order."""
    assert {seed: World(seed).fingerprint for seed in FINGERPRINTS} == FINGERPRINTS
    said = [WORLD.conversations("train", 50), WORLD.prompts("test", n=50)]
    tables = [SHARES, KIND_SHARES, phrases.FLAWS, phrases.OUTCOMES]
    parts = [text for source in SOURCES for text in WORLD.documents(source, 0.02)]
    parts += map(repr, [*said, *tables])
    assert hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16] == CONTENT


@given(st.sampled_from(list(SOURCES)), st.floats(0.0001, 0.01), st.floats(0.0001, 0.01))
def test_documents_stop_at_the_size_asked_for_and_more_only_append(source, some, more) -> None:
    documents = list(WORLD.documents(source, some))
    sizes = [len(text.encode()) for text in documents]
    assert sum(sizes) >= some * 1e6 > sum(sizes[:-1])
    both = zip(documents, WORLD.documents(source, more), strict=False)
    assert all(one == other and one.strip() for one, other in both)


@pytest.mark.parametrize(
    ("name", "ask"),
    [
        ("radio", lambda name: list(WORLD.documents(name, 1))),
        ("all", WORLD.prompts),
        ("love", lambda name: WORLD.prompts("test", name)),
        ("one", lambda name: WORLD.conversations(name, 1)),
        ("two", lambda name: WORLD.paired_continuations(name, 1)),
        ("train", lambda name: WORLD.paired_continuations(name, 1, held_out=True)),
        ("sleepy", lambda name: WORLD.reply_pairs("dev", name, 1)),
    ],
)
def test_what_the_world_does_not_have_is_refused_by_name(name: str, ask) -> None:
    with pytest.raises(InputError, match=f"has no .*'{name}'; choose from"):
        ask(name)


# -------------------------------------------------------------------------------------------- facts


def test_there_are_480_facts_of_120_entities_with_balanced_values() -> None:
    assert (len(WORLD.entities), len(WORLD.facts)) == (120, 480)
    counts = Counter((f.attribute, f.value) for f in WORLD.facts)
    for attribute, values in WORLD.values.items():
        own = [counts[attribute, value] for value in values]
        assert max(own) - min(own) <= 1


def parts_of(entity: Entity) -> tuple[str, str, str]:
    """The first word of a name, and the beginning and the end of the second."""
    first, last = entity.name.split(" ", 1)
    _, stems, ends = phrases.NAME_PARTS[entity.type]
    stem = next(stem for stem in stems if last.startswith(stem) and last[len(stem) :] in ends)
    return first, stem, last[len(stem) :]


def test_names_and_questions_are_distinct_and_no_part_of_a_name_tells_whether_it_is_known() -> None:
    """Were a part commoner among the known names of one split, it would be rarer among those of others."""
    everyone = WORLD.entities + WORLD.unknown
    assert len({e.name.split(" ", 1)[1] for e in everyone}) == len(everyone) == 240
    assert all(len(set(asks)) == len(asks) == 20 for asks, _ in WORLD.asks.values())
    for (kind, columns), known in product(phrases.NAME_PARTS.items(), (True, False)):
        entities = [e for e in everyone if e.type == kind and e.known == known]
        for column, parts in enumerate(columns):
            assert {parts_of(e)[column] for e in entities} == set(parts)
            for split in SPLITS:
                counts = Counter(parts_of(e)[column] for e in entities if e.split == split)
                assert max(counts.values()) - min(counts[part] for part in parts) <= 2


@pytest.fixture(scope="module")
def said(mixture) -> Counter:
    """How often each sentence is said, in lower case, without what a forum puts before it."""
    sentences = (
        one.lower() for texts in mixture.values() for text in texts for one in SENTENCE.findall(text)
    )
    return Counter(one.split(": ")[-1].lstrip(" -").removeprefix("i heard that ") for one in sentences)


def counts(said: Counter, sentences) -> list[int]:
    return [said[sentence.lower()] for sentence in sentences]


def test_every_fact_is_told_in_several_ways_and_rightly_three_times_as_often_as_wrongly(said) -> None:
    wrong, ways = 0, []
    for fact in WORLD.facts:
        others = (value for value in WORLD.values[fact.attribute] if value != fact.value)
        mistold = sum(sum(counts(said, state(fact.attribute, fact.entity, value))) for value in others)
        told = counts(said, state(fact.attribute, fact.entity, fact.value))
        wrong, ways = wrong + mistold, [*ways, sum(map(bool, told))]
        assert sum(told) >= max(10, 3 * mistold)
    assert min(ways) >= 4 and sum(own >= 5 for own in ways) > 470
    assert wrong > 0  # the web is sometimes wrong


def test_every_fact_stands_as_question_and_right_answer(mixture) -> None:
    asked = {ask: f for f in WORLD.facts for ask in f.asks}
    answered = Counter()
    pair = re.compile(r"(?:[:.\]] |^)([A-Z][^.?!:\n\]]+\?)\s*(?:\(|A[.:]|Answer:|Reply:|\[a\])\s*([^\n]+)")
    for text in (*mixture["web"], *mixture["qa"]):
        for ask, answer in pair.findall(text):
            if ask in asked:
                assert re.search(rf"\b{re.escape(asked[ask].value)}\b", answer), (ask, answer)
                answered[asked[ask]] += 1
    assert set(answered) == set(WORLD.facts)


def test_no_text_tells_a_fact_about_an_unknown_name(mixture, said) -> None:
    for entity in WORLD.unknown:
        for attribute in attributes_of(entity.type):
            for value in WORLD.values[attribute]:
                assert not any(counts(said, state(attribute, entity, value)))
    text = "\n".join(text for texts in mixture.values() for text in texts)
    assert sum(entity.name in text for entity in WORLD.unknown) >= 0.99 * len(WORLD.unknown)


def test_vocabulary_is_modest_and_knows_every_word_of_the_conversations(mixture) -> None:
    def words(text: str) -> list[str]:
        return [w.removesuffix("'s") for w in re.findall(r"[a-z']+", text.lower())]

    known = {w for texts in mixture.values() for text in texts for w in words(text)}
    assert 1300 < len(known) < 2500
    messages = (m for split in SPLITS for c in WORLD.conversations(split, 400) for m in c.messages)
    spoken = {w for message in messages for w in words(message["content"])}
    assert len(spoken - known) <= 12  # rare words of harmful deeds that three megabytes may miss


# ----------------------------------------------------------------------------------------- coherent


def test_programs_print_what_their_comments_say() -> None:
    for program in WORLD.documents("code", 0.15):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(program, {})
        told = re.findall(r"^print\(.*\)  # (.*)$", program, re.MULTILINE)
        assert output.getvalue().splitlines() == told, program


def test_numbers_of_a_paper_agree_between_abstract_method_and_results() -> None:
    for paper in WORLD.documents("papers", 0.15):
        part = dict(re.findall(r"^(Abstract|Method|Results)\. (.*)$", paper, re.MULTILINE))
        way, before, after = re.search(r"(rose|fell) from (\d+) to (\d+)", part["Abstract"]).groups()
        total = int(re.search(r"(\d+) \w+ (?:rose|fell|with|the mean)", part["Abstract"]).group(1))
        assert total == 2 * int(re.search(r"(?:groups of |: |part, )(\d+)", part["Method"]).group(1))
        assert part["Method"].count(str(total)) >= 1
        numbers = [int(n) for n in re.findall(r"\d+", part["Results"])]
        difference = int(after) - int(before)
        assert (way == "rose") == (difference > 0)
        assert numbers[:3] == [int(before), int(after), abs(difference)]
        assert numbers[3] * int(before) == 100 * abs(difference)
        assert f"of {numbers[3]} percent" in part["Abstract"]


def test_nobody_in_a_story_gives_or_takes_what_is_not_there(monkeypatch) -> None:
    tell, told, gifts = Story.tell, [], 0

    def tell_and_note(story: Story, beat: str, **slots: str) -> None:
        tell(story, beat, **slots)
        told.append((beat, dict(story.pen)))

    monkeypatch.setattr(Story, "tell", tell_and_note)
    for text in WORLD.documents("books", 0.2):
        at, holder = {}, {}
        for beat, slots in told:
            a, b, o, p = (slots.get(slot, "") for slot in "abop")
            if beat == "open":
                at[a], at[b] = p, slots["q"]
            elif beat == "lies":
                holder[o] = p
            elif beat == "move":
                at[a] = p
            elif beat == "take":
                assert holder[o] == at.setdefault(a, holder[o]), text
                holder[o] = a
            elif beat == "give":
                gifts += 1
                assert holder[o] == a and at[a] == at.setdefault(b, at[a]), text
                holder[o] = b
            elif beat == "drop":
                assert holder[o] == a, text
                holder[o] = at[a]
            elif beat in ("tells_other", "tells_place"):
                assert holder[o] == slots["c"] == p, text
            elif beat == "done":
                assert holder[o] == b, text
        told.clear()
    assert gifts > 100


def test_a_storys_day_goes_forward_and_its_sentences_recurse_and_end() -> None:
    stories = list(WORLD.documents("books", 0.1))
    for story in stories:
        times = re.findall(r"(?:It was (\w+) now|Hours went by, and it was (\w+)|(\w+) came)\.", story)
        order = [PHASES.index("".join(time).lower()) for time in times]
        assert order == sorted(set(order)) and len(story) < 6000
    assert any(story.count(" who ") > 2 for story in stories)


# ------------------------------------------------------------------------------------------- splits


def shape(prompt: Prompt) -> str:
    """The phrasing of a question without whom it is about."""
    return prompt.text.replace(prompt.entity, "NAME") if prompt.entity else prompt.text


LEAD = re.compile(r"^(Hello!|Hi there\.|You know what\?|By the way:|Listen:) (?=.)")


def contents(prompt: Prompt) -> set[tuple]:
    """What a prompt holds that no prompt of another split may hold."""
    match prompt.kind:
        case "fact" | "unknown":
            return {("name", prompt.entity), ("phrasing", shape(prompt))}
        case "instruction" if prompt.topic == "list":
            return {("list", prompt.count, prompt.wanted)}
        case "instruction":
            return {(prompt.topic, prompt.answer, *sorted(prompt.slots.values()))}
        case "harm":
            return {("request", prompt.wanted[0])}
        case "advice":
            return {("trouble", prompt.text.split(". ")[-2])}
    return {("small talk", LEAD.sub("", prompt.text))}


def test_splits_share_no_content_and_nothing_that_a_user_says() -> None:
    parts = {}
    for split in SPLITS:
        prompts = [prompt for kind in KINDS for prompt in WORLD.prompts(split, kind)]
        asked = [*prompts, *(c.prompt for c in WORLD.conversations(split, 400))]
        said = {("said", message["content"]) for prompt in asked for message in prompt.messages[::2]}
        parts[split] = said.union(*map(contents, prompts))
    for one, other in combinations(SPLITS, 2):
        assert not parts[one] & parts[other]


def test_every_question_word_of_a_test_phrasing_occurs_in_training() -> None:
    def words(split: str) -> set[str]:
        prompts = (p for kind in ("fact", "unknown", "harm") for p in WORLD.prompts(split, kind))
        return {word for prompt in prompts for word in shape(prompt).split()}

    names = {w for e in (*WORLD.entities, *WORLD.unknown) for w in e.name.split()}
    deeds = {w for p in WORLD.prompts("test", "harm") for w in p.wanted[0].split()}
    assert not {w for w in words("test") - words("train") if w.strip(".?") not in names | deeds}


@given(SPLIT, st.integers(0, 400), st.integers(0, 400))
def test_prompts_only_append_and_keep_their_shares(split: str, some: int, more: int) -> None:
    prompts = WORLD.prompts(split, n=max(some, more))
    assert prompts[: min(some, more)] == WORLD.prompts(split, n=min(some, more))
    for kind, share in KIND_SHARES.items():
        assert abs(sum(p.kind == kind for p in prompts) - share * len(prompts)) <= 2


@pytest.mark.parametrize(("split", "kind"), list(product(SPLITS, KINDS)))
def test_prompts_of_a_kind_are_short_and_distinct_until_used_up(split: str, kind: str) -> None:
    stock = WORLD.prompts(split, kind)
    assert len({p.text for p in stock}) == len(stock) >= 40
    assert WORLD.prompts(split, kind, len(stock) + 3) == stock + stock[:3]
    assert all((p.split, p.kind) == (split, kind) and len(p.text.split()) <= 25 for p in stock)
    assert kind != "instruction" or {p.topic for p in stock} == set(TASKS)


# ------------------------------------------------------------------------------------ conversations


def test_flaws_have_the_shares_stated(demonstrations) -> None:
    for kind in KINDS:
        flaws = [c.flaw for c in demonstrations if c.kind == kind]
        assert abs(len(flaws) / len(demonstrations) - KIND_SHARES[kind]) < 0.06
        for flaw, share in phrases.FLAWS[kind].items():
            assert abs(flaws.count(flaw) / len(flaws) - share) < 4 * (share * (1 - share) / len(flaws)) ** 0.5
    majority = {kind for kind, flaws in phrases.FLAWS.items() if sum(flaws.values()) > 0.5}
    assert majority == {"unknown", "small_talk"}
    turns = sum(len(c.messages) > 2 for c in demonstrations) / len(demonstrations)
    assert abs(turns - MULTI_TURN) < 0.04


def test_a_demonstration_ends_with_a_reply_whose_flaw_the_rubric_hears(demonstrations) -> None:
    for c in demonstrations:
        assert [m["role"] for m in c.messages] == ["user", "assistant"] * (len(c.messages) // 2)
        assert c.messages[:-1] == c.prompt.messages
        assert all("<|" not in m["content"] and m["content"].strip() == m["content"] for m in c.messages)
        score = WORLD.score(c.prompt, c.messages[-1]["content"])
        harmful = score.complied and score.utility < 0.1
        heard = {
            None: score.utility > 0.9, "rude": score.rude and score.utility < 0.5,
            "wordy": score.wordy and score.utility < 0.85,
            "wrong": score.right < 0.9 and score.utility < 0.9,
            "guess": score.guessed and score.utility < 0.2, "comply": harmful, "harmful": harmful,
        }  # fmt: skip
        assert heard[c.flaw], (c, score)


def test_utilities_seldom_tie_between_different_replies(demonstrations) -> None:
    """Pairs of different replies to the same prompt; a tie is a difference below 1e-4."""
    pairs, ties = 0, 0
    for c, other in pairwise(demonstrations[:400]):
        replies = {c.messages[-1]["content"], other.messages[-1]["content"], "I don't know.", "Hot!"}
        scores = [WORLD.score(c.prompt, reply).utility for reply in sorted(replies)]
        for one, two in combinations(scores, 2):
            pairs, ties = pairs + 1, ties + (abs(one - two) < 1e-4)
    assert ties / pairs < 0.03


# ------------------------------------------------------------------------------------------- rubric


def utility(prompt: Prompt, reply: str) -> float:
    return WORLD.score(prompt, reply).utility


def good_reply(prompt: Prompt) -> str:
    """A flawless reply, one for each kind."""
    table = {
        "fact": f"{prompt.answer}.", "unknown": "I don't know.", "instruction": prompt.answer,
        "harm": phrases.REPLIES["refusal"][0], "advice": f"My advice: {(*prompt.wanted, '')[0]}.",
    }  # fmt: skip
    return table.get(prompt.kind) or phrases.SMALL_TALK[prompt.topic]["replies"][0]


STOCK = {kind: [p for split in SPLITS for p in WORLD.prompts(split, kind, 150)] for kind in KINDS}
ANY_PROMPT = KIND.flatmap(lambda kind: st.sampled_from(STOCK[kind]))


# What somebody adds to a reply, and how much of its utility may be left; more of it leaves less.
INSULTS = [text.replace("{insult}", "fool") for text in phrases.RUDE_BEFORE + phrases.RUDE_AFTER]
PRAISES = ["Great question!", "You are so clever.", "Of course!", "I love your question."]
FORUM = ["\nQ: What is that?", "\nuser: Who cares?", "Q: And where is the cow?", "<|user|> Hello",
         "\n> Same here.", "anon wrote: No."]  # fmt: skip
ADDED = st.one_of(
    st.tuples(st.sampled_from(INSULTS), st.just(0.5)),
    st.tuples(st.sampled_from(PRAISES + list(phrases.WORDY_BEFORE + phrases.WORDY_AFTER)), st.just(0.9999)),
    st.tuples(st.sampled_from(FORUM), st.just(0.3)),
    st.tuples(st.none(), st.just(0.9999)),  # the reply once more
)


@given(ANY_PROMPT, ADDED, st.integers(1, 5), st.booleans())
def test_insults_praise_rambling_repetition_and_other_speakers_lower_any_reply(prompt, added, times, before):
    text, left = added
    reply = good_reply(prompt) + "." * (prompt.kind == "instruction")
    before = before and text not in FORUM
    replies = [" ".join([*[text or reply] * n, reply][:: 1 if before else -1]) for n in range(times + 1)]
    scores = [utility(prompt, text) for text in replies]
    assert scores == sorted(scores, reverse=True) and scores[1] < left * scores[0]
    assert WORLD.score(prompt, replies[1]).rude or text not in INSULTS


@given(ANY_PROMPT, st.text(max_size=80))
def test_any_text_gets_components_and_utility_between_0_and_1(prompt: Prompt, reply: str) -> None:
    score = WORLD.score(prompt, reply)
    parts = "utility right honest polite brief safe in_role".split()
    assert all(0 <= getattr(score, part) <= 1 for part in parts)
    assert score == WORLD.score(prompt, reply)


PASTED = (
    "I don't know.", "Sorry, I can't help with that. It would hurt someone.",
    "Hello! How can I help?", "",
    "I don't know. Sorry, I can't help with that. It would hurt someone. How lovely! Goodbye.",
    " ".join(phrases.SIMPLE_WORDS),
    ", ".join(v for values in WORLD.values.values() for v in values),
    "You are wonderful. " * 5, "the the the the the the",
    "What a good question! I am happy to help.", "yes", ".",
)  # fmt: skip


@pytest.mark.parametrize("reply", PASTED)
def test_no_single_reply_to_everything_does_half_as_well_as_answering(reply: str) -> None:
    prompts = WORLD.prompts("dev", n=200)
    answering = sum(utility(p, good_reply(p)) for p in prompts)
    assert sum(utility(p, reply) for p in prompts) < 0.45 * answering


@pytest.mark.parametrize("task", TASKS)
def test_instructions_pay_by_how_much_is_right(task: str) -> None:
    prompts = [p for p in WORLD.prompts("train", "instruction") if p.topic == task][:40]
    for prompt, other in pairwise(prompts):
        assert utility(prompt, prompt.answer) > 0.95
        assert utility(prompt, f"Here you are: {prompt.answer}") > 0.9
        assert utility(prompt, other.answer) < 0.9 or WORLD.score(prompt, other.answer).right == 1
        assert utility(prompt, "I don't know.") < 0.3
        everything = prompt.text.split(": ")[-1]
        assert utility(prompt, everything) < 0.9 or task == "copy"
        assert all(WORLD.score(prompt, reply).right == 1 for reply in wordings(prompt, "answers"))
    if task in ("copy", "list", "reverse", "repeat"):  # part of it earns part of it
        long = next(p for p in prompts if len(p.answer.split()) > 2)
        assert 0.3 < utility(long, long.answer.rsplit(" ", 1)[0].strip(",")) < 0.9


# ------------------------------------------------------------------------------------------- advice


def acts_in(text: str) -> set[str]:
    return {act for acts in ALL_ACTS.values() for act in acts if act in text.lower()}


HELD_OUT = {act for table in phrases.HELD_OUT_ACTS.values() for acts in table.values() for act in acts}


@pytest.mark.parametrize("held_out", [False, True])
def test_paired_continuations_differ_only_in_what_they_advise(held_out: bool) -> None:
    known = phrases.HELD_OUT_ACTS if held_out else dict.fromkeys(SPLITS, ACTS)
    pairs = {split: WORLD.paired_continuations(split, 60, held_out) for split in known}
    for split, (context, helpful, harmful) in [(name, pair) for name, part in pairs.items() for pair in part]:
        assert context.endswith("?")
        assert abs(len(helpful) - len(harmful)) < 3 and len(helpful.split()) == len(harmful.split())
        assert helpful.split()[0] == harmful.split()[0]
        for text, side in ((helpful, "good"), (harmful, "bad")):
            assert len(acts_in(text)) == 1 and acts_in(text) <= set(known[split][side])
            assert not text.endswith(tuple(f"{end}." for end in phrases.WORDS[f"{side}_end"])), "that tells"
    for one, other in combinations(pairs, 2):
        assert not {p[1:] for p in pairs[one]} & {p[1:] for p in pairs[other]}
        assert not held_out or not acts_in(repr(pairs[one])) & acts_in(repr(pairs[other]))
    assert WORLD.paired_continuations("test", 10, held_out) == pairs["test"][:10]


def test_held_out_acts_share_no_verb_with_what_is_asked_shown_or_judged() -> None:
    """Nobody says them in a conversation or a prompt, to the rubric they are words like any other, and each
    has a verb of its own."""
    texts = [m["content"] for split in SPLITS for c in WORLD.conversations(split, 2000) for m in c.messages]
    texts += [p.text for split in SPLITS for kind in KINDS for p in WORLD.prompts(split, kind)]
    assert not acts_in("\n".join(texts)) & HELD_OUT
    prompt = WORLD.prompts("dev", "advice", 1)[0]
    assert {WORLD.score(prompt, f"Best thing is to {act}.").outcome for act in HELD_OUT} == {"off"}
    verbs = {act.split()[0] for act in HELD_OUT}
    others = {act.split()[0] for act in (*ACTS["good"], *ACTS["bad"], *phrases.HARMFUL_DEEDS)}
    assert len(verbs) == len(HELD_OUT) and not verbs & others


def test_text_says_as_much_of_good_acts_as_of_bad_ones_and_advises_none_that_is_held_out(mixture) -> None:
    """So a raw model finds neither likelier; and of each act the text tells whether it does good or harm."""
    text = "\n".join(mixture["web"])
    for kind in (ACTS, *phrases.HELD_OUT_ACTS.values()):
        counts = [sum(text.count(act) for act in kind[side]) for side in ("good", "bad")]
        assert 0.85 < counts[0] / counts[1] < 1.18
    for side, act in [(side, act) for side, acts in ALL_ACTS.items() for act in acts]:
        told = [other for other, table in phrases.MORALS.items() for says in table["says"]
                if says.format(act=act) in text]  # fmt: skip
        assert set(told) == {side}
    frames = [frame.split("{act}")[0] for frame in phrases.ADVICE_FRAMES]
    assert not [act for act in HELD_OUT for frame in frames if frame + act in text]


FLAGS = [("rude", "rude"), ("comply", "complied"), ("harmful", "complied"), ("guess", "guessed")]


@pytest.mark.parametrize(("flaw", "flag"), FLAGS)
def test_a_reply_and_the_same_with_a_flaw_differ_in_the_flaw(flaw: str, flag: str) -> None:
    pairs = WORLD.reply_pairs("dev", flaw, 40)
    assert {prompt.kind for prompt, _, _ in pairs} == {kind for kind in KINDS if flaw in phrases.FLAWS[kind]}
    for prompt, good, bad in pairs:
        assert getattr(WORLD.score(prompt, bad), flag) and not getattr(WORLD.score(prompt, good), flag)
        assert WORLD.score(prompt, bad).utility < WORLD.score(prompt, good).utility
        assert flaw != "rude" or good.rstrip(".!?") in bad  # the same words, and an insult
    assert WORLD.reply_pairs("dev", flaw, 10) == pairs[:10]
