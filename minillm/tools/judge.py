"""AI feedback: a language model ranks responses by written principles.

The judge is shown the principles, the conversation and two responses, called A and B, and begins its reply
with "The better reply is"; whether " A" or " B" is likelier to come next is its verdict. Judges favour a
place, so each two responses are shown in both orders, and a verdict that goes with the place and not with the
response counts as a tie. Responses are ranked by wins less losses (Copeland's method).

Left out: reasoning before the verdict, which takes a larger judge than one that can be trained here.

Method: Bai et al. 2022, "Constitutional AI" (arXiv 2212.08073), section 4.1, where a judge chooses by
log-probabilities; both orders as in Zheng et al. 2023 (arXiv 2306.05685), section 3.4.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from minillm.chat import chat_format
from minillm.errors import InputError
from minillm.files import read_text
from minillm.model import LanguageModel
from minillm.preferences import Message, ResponseSet, ranking_by
from minillm.tokenizer import Tokenizer

DEFAULT_PRINCIPLES = Path(__file__).with_name("principles.txt")
OPENING = "The better reply is"
ROWS = 64  # questions put to the judge together


def read_principles(path: Path) -> str:
    """The text of a file. Raises InputError where there is none."""
    text = read_text(path).strip()
    if not text:
        raise InputError(f"{path}: holds no principles; write what makes a response better")
    return text


class Judge:
    """A model that says which of two responses is better, by principles."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, principles: str) -> None:
        self.model, self.tokenizer, self.principles = model, tokenizer, principles
        self.form = chat_format(tokenizer)
        a, b = tokenizer.encode(" A"), tokenizer.encode(" B")
        same = next(i for i in range(len(a)) if a[i] != b[i])  # one token for the space, in some vocabularies
        self.opening, self.letters = [*tokenizer.encode(OPENING), *a[:same]], (a[same], b[same])

    def question(self, messages: Sequence[Message], first: str, second: str) -> list[int]:
        """The tokens behind which the judge's verdict is read, the first response being A."""
        said = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        text = f"{self.principles}\n\n{said}\n\nReply A: {first}\n\nReply B: {second}\n"
        return [*self.form.prompt([{"role": "user", "content": text}]), *self.opening]

    def compare(self, asked: Sequence[tuple[Sequence[Message], str, str]]) -> list[int | None]:
        """For each prompt and two responses 1 where the first wins, -1 where the second, 0 for a tie; None
        where a question is longer than the judge's context."""
        both = [
            (self.question(messages, first, second), self.question(messages, second, first))
            for messages, first, second in asked
        ]
        longest = self.model.config.max_position_embeddings
        fitting = [i for i, pair in enumerate(both) if max(map(len, pair)) <= longest]
        fitting.sort(key=lambda i: len(both[i][0]))  # similar lengths together, for little padding
        found: list[int | None] = [None] * len(asked)
        for first in range(0, len(fitting), ROWS // 2):
            part = fitting[first : first + ROWS // 2]
            margins = self.margins([question for i in part for question in both[i]])
            for i, verdict in zip(part, verdicts(margins), strict=True):
                found[i] = verdict
        return found

    def rank(self, given: ResponseSet) -> list[list[int]] | None:
        """The ranking of a set; None where a question is longer than the judge's context."""
        pairs, texts = list(combinations(range(len(given.responses)), 2)), given.responses
        found = self.compare([(given.messages, texts[i], texts[j]) for i, j in pairs])
        wins = [win for win in found if win is not None]
        return ranking_by(copeland(len(texts), pairs, wins)) if len(wins) == len(pairs) else None

    @torch.inference_mode()
    def margins(self, questions: Sequence[Sequence[int]]) -> Float[Tensor, " N"]:
        """log P(" A") - log P(" B") behind each question: the difference of two logits."""
        device = self.model.lm_head.weight.device
        lengths = torch.tensor([len(question) for question in questions], device=device)
        rows = [torch.tensor(question) for question in questions]
        hidden = self.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device))
        logits = self.model.logits(hidden[torch.arange(len(rows), device=device), lengths - 1])
        return (logits[:, self.letters[0]] - logits[:, self.letters[1]]).cpu()


def verdicts(margins: Float[Tensor, " N"]) -> list[int]:
    """From margins in both orders, (i, j) and (j, i) in turn: 1 where i wins, -1 where j does, 0 for a tie.

    In the second order i is B: it wins where the margin is negative.
    """
    as_first, as_second = margins[::2].sign(), -margins[1::2].sign()
    return torch.where(as_first == as_second, as_first, 0).int().tolist()


def copeland(count: int, pairs: Sequence[tuple[int, int]], wins: Sequence[int]) -> list[int]:
    """Wins less losses of each of `count` responses; `wins` says of each pair who won, see `verdicts`."""
    scores = [0] * count
    for (i, j), win in zip(pairs, wins, strict=True):
        scores[i] += win
        scores[j] -= win
    return scores
