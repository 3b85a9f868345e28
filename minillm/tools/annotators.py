"""Who ranks in `rlhf.py --stage rank`: simulated people, a model, the files of other people, or you.

responses.jsonl ──jobs_of──► whose ranking of which set is to be made, and how ──rlhf.py──► rankings.jsonl
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minillm.errors import InputError
from minillm.files import digest
from minillm.io.conversations import open_comparisons, print_counts
from minillm.io.huggingface import load_causal_model
from minillm.io.rankings import open_rankings, read_responses, record_ranking
from minillm.preferences import (
    ChatModel,
    Ranking,
    ResponseSet,
    Simulated,
    assign_annotators,
    new_ranking,
    simulated_annotators,
)
from minillm.run import Runtime
from minillm.tools.judge import DEFAULT_PRINCIPLES, Judge, read_principles
from minillm.tools.ranking import RankingSession, rank_in_terminal
from minillm.world import World

Job = tuple[str, str, Callable[[], Ranking | None]]
"""Whose ranking of which set is to be made (annotator and key), and how; None comes of a set that cannot be
ranked."""


def jobs_of(options: Any, runtime: Runtime) -> tuple[list[Job], dict[str, str]]:
    """What there is to rank for anybody but a person, and fingerprints of what the rankings hang on."""
    if options.annotator == "file":
        return published(options), {}
    sets = read_responses(options.folder / "responses.jsonl")
    return judged(options, runtime, sets) if options.annotator == "model" else (simulated(options, sets), {})


def simulated(options: Any, sets: Sequence[ResponseSet]) -> list[Job]:
    """Each set to some of the simulated annotators."""
    people, world = simulated_annotators(options.annotators), World(sets[0].world or 0)

    def make(person: Simulated, given: ResponseSet, prompt: Any) -> Ranking:
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
        who = assign_annotators(given.key, len(people), options.opinions, options.seed)
        jobs += [(people[i].name, given.key, partial(make, people[i], given, prompt)) for i in who]
    return jobs


def judged(options: Any, runtime: Runtime, sets: Sequence[ResponseSet]) -> tuple[list[Job], dict[str, str]]:
    """Each set to the judge; the fingerprints of it and of its principles."""
    if options.judge is None:
        raise InputError("--annotator model: name a --judge, as in out/sft")
    principles = read_principles(Path(options.principles or DEFAULT_PRINCIPLES))
    loaded = load_causal_model(Path(options.judge), runtime.device, runtime.dtype)
    model, judge = ChatModel(f"model-{options.judge}", *loaded), Judge(*loaded, principles)

    def make(given: ResponseSet) -> Ranking | None:
        ranking = judge.rank(given)
        return None if ranking is None else new_ranking(given, ranking, model.name, options.seed)

    origin = {"weights of --judge": model.fingerprint, "--principles": digest(principles)}
    return [(model.name, given.key, partial(make, given)) for given in sets], origin


def published(options: Any) -> list[Job]:
    """The rankings of other people's files, under the names of the files."""
    if not options.data:
        raise InputError("--annotator file: name the files with --data, as in --data hh.jsonl.gz")
    jobs: list[Job] = []
    for source in open_comparisons(options.data, options.errors):
        print_counts(source.name, len(source.rankings), "rankings", source.skipped, source.first_skipped)
        jobs += [(source.name, one.key, partial(replace, one)) for one in source.rankings]
    return jobs


def rank_as_person(options: Any) -> None:
    """At the terminal."""
    sets = read_responses(options.folder / "responses.jsonl")
    with open_rankings(options, {}) as file:
        record_ranking(options, {})
        rank_in_terminal(RankingSession(sets, file, options.name, options.seed))
