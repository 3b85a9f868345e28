"""A person ranks at a screen.

A `RankingSession` knows no terminal: it has the responses at hand, in a random order and without a word
about their origin, takes a ranking as it is typed, and puts it on the disk before it shows the next. `screen`
and `run_command` are text in and out; `rank_in_terminal` holds them against a terminal.
"""

import random
from collections.abc import Sequence
from contextlib import suppress

from minillm.errors import InputError, printable
from minillm.preferences import LETTERS, Ranking, RankingFile, ResponseSet, new_ranking, parse_ranking


class RankingSession:
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


def screen(session: RankingSession) -> str:
    """What a person sees: how far they are, the conversation, the responses."""
    lines = [f"──── {session.done} of {len(session.sets)} ranked, {len(session.skipped)} skipped ────", ""]
    given = session.current
    if given is None:
        return "\n".join([*lines, "Nothing is left to rank.   u undo   q quit"])
    lines += [f"{message['role']}: {message['content']}" for message in given.messages]
    for letter, text in zip(LETTERS, session.shown(), strict=False):
        lines += ["", f"  {letter}   " + text.replace("\n", "\n      ")]
    return printable("\n".join([*lines, "", HELP]))


def run_command(session: RankingSession, typed: str) -> str | None:
    """Carries out what was typed under the screen. Returns what to say about it; None to end."""
    match typed.strip().lower():
        case "q":
            return None
        case "s":
            session.skip()
            return "skipped: it comes again at the next sitting"
        case "u":
            undone = session.undo()
            if undone is None:
                return "nothing to take back"
            return f"taken back: the ranking of {undone.messages[-1]['content']!r:.60}"
    try:
        made = session.rank(typed)
    except InputError as error:
        return f"not a ranking: {error}"
    return f"kept: {len(made.pairs())} comparisons"


def rank_in_terminal(session: RankingSession) -> None:
    """Shows set after set and runs what is typed, until none is left or the person has had enough."""
    with suppress(ImportError):  # not everywhere; with it, input() can edit its line
        import readline  # noqa: F401
    answer: str | None = ""
    shown = ""
    while answer is not None and session.current:
        if (text := screen(session)) != shown:
            print(text)
            shown = text
        try:
            answer = run_command(session, input("> "))
        except (EOFError, KeyboardInterrupt):
            answer = None
        print(answer or "")
    print(f"{session.done} of {len(session.sets)} ranked; the same command goes on")
