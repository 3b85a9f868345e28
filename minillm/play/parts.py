"""Two parts of the page: guessing the next word, and picking the better response."""

import itertools
import random
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from minillm.chat import ChatTemplate, Completion
from minillm.corpus import split_documents
from minillm.errors import InputError
from minillm.io.rankings import RankingFile, read_responses
from minillm.model import LanguageModel, score_rows
from minillm.play.shelf import Shelf
from minillm.play.words import LONGEST, likeliest_words
from minillm.preferences import ResponseSet
from minillm.reward import encode_response
from minillm.tokenizer import Tokenizer
from minillm.tools.calls import sources_of
from minillm.tools.folder import read_run
from minillm.tools.ranking import RankingSession, run_command
from minillm.tools.streams import stream_text

PASSAGES = 12
"""Of each source of text."""
FEWEST_TOKENS, MOST_TOKENS = 12, 96
"""Before the word to be guessed."""
PROSE = 0.85  # letters and spaces of a text: a program has fewer, and is no game
LIKELY = 0.01  # a word less probable than that is no choice: it may be none at all
MOST_SETS = 500
"""Of responses to be ranked."""


# ---- Guess the next word


class Guessing:
    """Held-out text that stops before a word. Question n of a run is always the same."""

    def __init__(self, shelf: Shelf, text: tuple[str, ...]) -> None:
        self.shelf, self.text, self.kept = shelf, text, dict[str, list[tuple[str, str]]]()

    def ask(self, run: str, number: int, temperature: float) -> dict[str, Any]:
        """The text as the model's tokens, the word that came, what the model had expected, and four words to
        choose from: what it thinks likely, and other words of the texts."""
        if not 0.1 <= temperature <= 5:
            raise InputError(f"temperature {temperature}: give 0.1 to 5")
        model, tokenizer = self.shelf.model(run)
        source, context, truth = self._place(run, number, model, tokenizer)
        begun = Completion(tokenizer).prompt([{"content": context}])
        words, p = likeliest_words(model, tokenizer, begun, truth, 10, temperature)
        likely = [word for word, share in words if share > LIKELY]
        others = sorted({word for _, text in self.kept[run] for word in re.findall(r" ([^\W\d_]+)", text)})
        likely += random.Random(number).sample(others, min(4, len(others)))
        choices = list(dict.fromkeys([truth, *likely]))[:4]
        random.Random(number).shuffle(choices)
        pieces = list(stream_text(tokenizer.decode_bytes, tokenizer.encode(context)))
        told = {"source": source, "pieces": pieces, "choices": choices}
        return told | {"truth": truth, "words": words, "p": p}

    def _place(
        self, run: str, number: int, model: LanguageModel, tokenizer: Tokenizer
    ) -> tuple[str, str, str]:
        """Source, text and next word of a question."""
        if run not in self.kept:
            self.kept[run] = list(self._passages(run))
        most = min(MOST_TOKENS, model.config.max_position_embeddings - LONGEST - 1)
        rng = random.Random(number)
        for source, text in rng.sample(self.kept[run], len(self.kept[run])):
            tokens = tokenizer.encode(text[:2000])
            least, head = len(tokenizer.decode(tokens[:FEWEST_TOKENS])), tokenizer.decode(tokens[:most])
            # Words between others, followed by something: a word may be cut by the end of the head.
            words = re.finditer(r"(?<=[\w,;]) ([^\W\d_]+)(?=\W)", head)
            if found := [word for word in words if word.start() >= least]:
                word = rng.choice(found)
                return source, head[: word.start()], word[1]
        raise InputError("the held-out text has no words to guess; give other text with --text")

    def _passages(self, run: str) -> Iterator[tuple[str, str]]:
        """Documents: those given, or what this run or the base model held out; else the little world's."""
        stages = {one["name"]: one["stage"] for one in self.shelf.look()[0]}
        bases = [name for name in (run, *stages) if stages.get(name) == "train"]
        options = read_run(self.shelf.folder / bases[0])[1] if bases else {}
        given = self.text or options.get("val_data") or ()
        held_out = 1.0 if given else options.get("val_fraction", 0.05)
        for source in sources_of(options, given):
            sides = split_documents(source.documents(), held_out, source.size)
            for text in itertools.islice((text for side, text in sides if side == "val"), PASSAGES):
                if sum(c.isalpha() or c == " " for c in text) > PROSE * len(text):
                    yield source.name, text


# ---- Pick the better response


class Picking:
    """The visitors' rankings of what stage sample left, each on the disk before the next set shows."""

    def __init__(self, shelf: Shelf) -> None:
        """InputError where another server, or anybody else, writes the rankings of these runs."""
        self.shelf, self.responses = shelf, shelf.folder / "rlhf" / "responses.jsonl"
        self.file = RankingFile(shelf.folder / "play" / "rankings.jsonl")
        self.skipped, self.lock = defaultdict[str, set[str]](set), threading.Lock()

    @cached_property
    def sets(self) -> list[ResponseSet]:
        """InputError where there are none yet."""
        return read_responses(self.responses)[:MOST_SETS]

    def _session(self, name: str) -> RankingSession:
        if not name.strip() or len(name) > 60:
            raise InputError(f"name {name!r:.80}: give 1 to 60 characters")
        session = RankingSession(self.sets, self.file, name, 0)
        session.skipped = self.skipped[name]
        return session

    def current(self, name: str) -> dict[str, Any]:
        """The set to be ranked, its responses in blind order; without a key once all are."""
        with self.lock:
            session = self._session(name)
            shown = {"done": session.done, "of": len(session.sets), "skipped": len(session.skipped)}
            shown |= {"ranked": len(self.file.rankings)}
            given = session.current
            if given is None:
                return shown
            return shown | {"key": given.key, "messages": given.messages, "responses": session.blind(given)}

    def act(self, name: str, key: str, action: str) -> tuple[Any, list[str]] | None:
        """What can be typed at the terminal, as "B > A = C", "skip" or "undo", or "" for nothing; messages
        and responses that were ranked. InputError where another set than that of `key` is to be ranked: the
        page is out of date."""
        with self.lock:
            session, before = self._session(name), len(self.file.rankings)
            given = session.current
            if action not in ("", "undo") and (given is None or given.key != key):
                raise InputError("this set has been ranked in another window; load the page again")
            if action:
                run_command(session, action)
            if given is None or len(self.file.rankings) <= before:
                return None
            return given.messages, session.blind(given)

    def scores(self, messages: Any, responses: list[str]) -> dict[str, Any]:
        """What the reward model says of the responses; nothing where there is none."""
        opened = self.shelf.reward_model("rlhf/reward")
        if opened is None:
            return {}
        model, tokenizer = opened
        rows = [encode_response(ChatTemplate(tokenizer), messages, text) for text in responses]
        return {"scores": score_rows(model, rows)}

    def count(self) -> int:
        """Rankings that stand, of all visitors; -1 where there is nothing to rank."""
        return len(self.file.rankings) if self.responses.exists() else -1

    def doubt(self, runs: list[dict[str, Any]]) -> str:
        """Says so where runs and responses are not of one little world: what is true in one is not in
        another. Also where the responses cannot be read."""
        worlds = {run["name"]: run["world"] for run in runs if run["world"] is not None}
        try:
            if self.responses.exists() and self.sets[0].world is not None:
                worlds["rlhf/responses.jsonl"] = self.sets[0].world
        except InputError as error:
            return str(error)
        if len(set(worlds.values())) < 2:
            return ""
        told = ", ".join(f"{name} of {world}" for name, world in worlds.items())
        return f"not of one little world, by its seed: {told}. What is true in one is not in another"

    @cached_property
    def watched(self) -> list[Any]:
        """The prompts whose answers are watched during a training: of the little world one of each of five
        kinds, which nobody ranks and no training asks; else the first that are ranked."""
        if (seed := self.sets[0].world) is None:
            return [given.messages for given in self.sets[:5]]
        from minillm.world import KINDS, World

        world = World(seed)
        return [world.prompts("dev", kind, 1)[0].messages for kind in KINDS[:5]]
