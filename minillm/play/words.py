"""The likeliest next words of a model: of whole words, though it knows only tokens.

A word is a space and letters. Its probability is that of its tokens, one after the other, times that of no
letter coming next; tokens of letters alone go on with a word, all others end it. The question is which word
comes if one does, so all is divided by the probability of that.

The search keeps the most probable beginnings of words and reads all of them one token further at once. No
word is more probable than any of its beginnings: it ends once the best beginning left is less probable
than the least of the words wanted. A word that tokens spell in several ways has the sum of those it met.
"""

import re
from functools import lru_cache

import torch
from torch import Tensor

from minillm.model import LanguageModel
from minillm.tokenizer import Tokenizer

WIDTH = 32
"""Beginnings read together."""
LONGEST = 8
"""Tokens of a word."""


@lru_cache(maxsize=16)
def kinds_of_tokens(tokenizer: Tokenizer) -> tuple[Tensor, Tensor, list[int]]:
    """Which tokens begin a word, and which go on with one: masks [V]; of the first, the space alone."""
    texts = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    begins = [bool(re.fullmatch(r" [^\W\d_]*", text)) for text in texts]
    goes_on = [bool(re.fullmatch(r"[^\W\d_]+", text)) for text in texts]
    return torch.tensor(begins), torch.tensor(goes_on), [i for i, text in enumerate(texts) if text == " "]


@torch.inference_mode()
def likeliest_words(
    model: LanguageModel,
    tokenizer: Tokenizer,
    context: list[int],
    truth: str,
    count: int = 10,
    temperature: float = 1.0,
) -> tuple[list[tuple[str, float]], float]:
    """The `count` likeliest words behind the context, and the probability of the true one."""
    begins, goes_on, spaces = kinds_of_tokens(tokenizer)
    device, true_tokens = model.lm_head.weight.device, tuple(tokenizer.encode(f" {truth}"))
    words: dict[str, float] = {}
    any_word = 0.0  # the probability of one: of what begins it but the space, and of what follows that
    reached: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(LONGEST):
        rows = torch.tensor([[*context, *prefix] for prefix in reached], device=device)
        ahead = (model.logits(model.model(rows)[:, -1]).cpu() / temperature).softmax(1)
        coming: dict[tuple[int, ...], float] = {}
        for (prefix, reach), p in zip(reached.items(), ahead, strict=True):
            p = p * (goes_on if prefix else begins)
            going_on, word = float(p.sum()), tokenizer.decode(list(prefix)).strip()
            if word:
                words[word] = words.get(word, 0.0) + reach * (1 - going_on)
            else:
                space = 0.0 if prefix else sum(float(p[i]) for i in spaces)
                any_word += reach * (going_on - space)
            best, true = p.topk(min(WIDTH, len(p))).indices.tolist(), true_tokens[length : length + 1]
            for token in {
                *best,
                *(true if prefix == true_tokens[:length] else ()),
                *(() if prefix else spaces),
            }:
                coming[*prefix, token] = reach * float(p[token])
        least = sorted(words.values(), reverse=True)[count - 1 : count] or [0.0]
        if length > len(true_tokens) and max(coming.values()) <= least[0]:
            break
        # The way to the true word and the space are kept whatever they have.
        always = {true_tokens[: length + 1], *((space,) for space in spaces)}
        kept = sorted(coming, key=lambda prefix: (prefix not in always, -coming[prefix]))[:WIDTH]
        reached = {prefix: coming[prefix] for prefix in kept}
    found = sorted(((word, p / any_word) for word, p in words.items()), key=lambda item: -item[1])
    return found[:count], dict(found).get(truth, 0.0)
