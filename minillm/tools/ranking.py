"""A person ranks in the terminal: responses in a random order, without a word about their origin.

A `RankingSession` knows no terminal. `screen` and `run_command` are text out and in; `rank_in_terminal` holds
them against a terminal. Each ranking is on the disk before the next set shows.
"""

import random
from collections.abc import Sequence
from contextlib import suppress

from minillm.errors import InputError
from minillm.io.rankings import RankingFile
from minillm.preferences import MOST_RESPONSES, ResponseSet, new_ranking

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:MOST_RESPONSES]
"""Names for the responses while they are ranked."""
HELP = "Rank all, best first, ties with =, as in B > A = D > C.   s skip   u undo   q quit"


def parse_ranking(text: str, count: int) -> list[list[int]]:
    """The ranking of `count` responses in letters: "B > A = D > C" → [[1], [0, 3], [2]].

    Capitals or not, with any spaces. Raises InputError that says what is wrong.
    """
    letters = LETTERS[:count]
    example = " > ".join(letters[1::-1]) + "".join(f" = {letter}" for letter in letters[2:])
    groups = [[name.strip().upper() for name in tied.split("=")] for tied in text.split(">")]
    named = [name for tied in groups for name in tied]
    for name in named:
        if len(name) != 1 or name not in letters:
            raise InputError(f"{name!r:.40} is none of {', '.join(letters)}; rank them all, as in {example}")
        if named.count(name) > 1:
            raise InputError(f"{name} is there {named.count(name)} times; give each once")
    if missing := [letter for letter in letters if letter not in named]:
        raise InputError(f"{', '.join(missing)} missing; rank them all, as in {example}")
    return [sorted(letters.index(name) for name in tied) for tied in groups]


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
    def left(self) -> list[ResponseSet]:
        """The sets that this person has not ranked."""
        ranked = {ranking.key for ranking in self.file.rankings if ranking.annotator == self.annotator}
        return [given for given in self.sets if given.key not in ranked]

    @property
    def current(self) -> ResponseSet | None:
        """The first of them that is not skipped."""
        return next((given for given in self.left if given.key not in self.skipped), None)

    @property
    def done(self) -> int:
        """How many of the sets this person has ranked."""
        return len(self.sets) - len(self.left)

    def blind_order(self, given: ResponseSet) -> list[int]:
        """Another for each set and person, and the same for both at each sitting: the first is called A."""
        order = list(range(len(given.responses)))
        random.Random(f"{self.seed} {self.annotator} {given.key}").shuffle(order)
        return order

    def blind(self, given: ResponseSet) -> list[str]:
        """The responses in this order."""
        return [given.responses[i] for i in self.blind_order(given)]


def screen(session: RankingSession) -> str:
    """What a person sees: how far they are, the conversation, the responses."""
    lines = [f"──── {session.done} of {len(session.sets)} ranked, {len(session.skipped)} skipped ────", ""]
    given = session.current
    if given is None:
        return "\n".join([*lines, "Nothing is left to rank.   u undo   q quit"])
    lines += [f"{message['role']}: {message['content']}" for message in given.messages]
    for letter, text in zip(LETTERS, session.blind(given), strict=False):
        lines += ["", f"  {letter}   " + text.replace("\n", "\n      ")]
    return "\n".join([*lines, "", HELP])


def run_command(session: RankingSession, typed: str) -> str | None:
    """Carries out what was typed under the screen; a ranking is then on the disk. Returns what to say about
    it; None to end. InputError for what cannot be done."""
    given = session.current
    match typed.strip().lower():
        case "q":
            return None
        case "s" | "skip":
            session.skipped |= {given.key} if given else set()
            return "skipped: it comes again at the next sitting"
        case "u" | "undo":
            if (undone := session.file.withdraw(session.annotator)) is None:
                raise InputError("nothing to take back")
            session.skipped.discard(undone.key)
            return f"taken back: the ranking of {undone.messages[-1]['content']!r:.60}"
    if given is None:
        raise InputError("not a ranking: there is nothing left to rank")
    places, order = parse_ranking(typed, len(given.responses)), session.blind_order(given)
    ranking = [[order[place] for place in tied] for tied in places]
    made = new_ranking(given, ranking, session.annotator, session.seed)
    session.file.append([made])
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
        except InputError as error:
            answer = str(error)
        except (EOFError, KeyboardInterrupt):
            answer = None
        print(answer or "")
    print(f"{session.done} of {len(session.sets)} ranked; the same command goes on")
