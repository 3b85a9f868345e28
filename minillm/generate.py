"""Sampling: prompts in, continuations out.

Prompts of different lengths share a batch by right padding. One forward pass fills the key/value
cache (model.KVCache, mostly in the faster form of fast/decode.py), where a prompt that is to have several
responses is read once and copied; after it every step feeds one token a row.
Rows that have stopped are dropped once they are a quarter of the batch. Computation is in the model's
`compute_dtype`; on a CPU float32 is the faster one.

A step turns logits into one token: divide by the temperature, keep the top-k, of these keep the nucleus
(top-p), renormalise, and invert the cumulative distribution at a uniform number. Each row draws its uniform
numbers from its own seed, so its sample does not depend on its neighbours (up to rounding: a matrix product
over more rows may add in another order, which moves a probability in its last digits).

Left out: beam search, repetition penalties, speculative decoding, paged caches, CUDA graphs.

Sources: nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751), section 3.1; top-k sampling, Fan
et al. 2018 (arXiv 1805.04833), section 5.4.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minillm.errors import InputError
from minillm.model import LanguageModel
from minillm.options import Count, Mass, NotNegative, Whole, check_limits


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    max_new_tokens: Count
    """The longest response, in tokens, stop token included."""
    temperature: NotNegative | int = 1.0
    """Divides the logits; 0 takes the most probable token (of equal ones the lowest id)."""
    top_k: Whole = 0
    """Sample among this many most probable tokens (of equal ones the lowest ids); 0 for all."""
    top_p: Mass | int = 1.0
    """Sample among the fewest most probable tokens that together reach this probability, counted
    after temperature and top-k; 1 for all."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response; the one that did stays as its last token."""
    crop: bool = False
    """Continue past the model's longest context, as nanoGPT does: each token is drawn given only the last
    tokens that fit into it. Otherwise prompts that may outgrow it are refused."""

    def __post_init__(self) -> None:
        check_limits(self)


ROWS = 256
"""Responses sampled together."""


@dataclass(frozen=True)
class Samples:
    """A response to each prompt, in one order throughout."""

    prompts: Sequence[Sequence[int]]
    responses: list[list[int]]
    """Token ids, the stop token included."""
    ended: list[bool]
    """Whether the response ended on a stop token rather than at max_new_tokens."""

    def texts(self, decode: Callable[[list[int]], str]) -> list[str]:
        """The responses without their stop tokens, as text."""
        own = zip(self.responses, self.ended, strict=True)
        return [decode(response[: len(response) - ended]) for response, ended in own]


def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> Samples:
    """One response to each prompt, row b drawn with seeds[b], ROWS of them at a time.

    InputError for a prompt that is empty, too long for the model or of unknown tokens, and for a
    model that cannot generate; ValueError where there is not one seed to a prompt.
    """
    _check(model, prompts, options, seeds)
    responses: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(prompts), ROWS):
        part = slice(first, first + ROWS)
        for chosen in _steps(model, prompts[part], options, seeds[part]):
            for row, token in chosen:
                responses[first + row].append(token)
    return Samples(prompts, responses, [response[-1] in options.stop_ids for response in responses])


def stream(model: LanguageModel, prompt: Sequence[int], options: SamplingOptions, seed: int) -> Iterator[int]:
    """The tokens `generate` would give this prompt and seed, each as soon as it is chosen."""
    _check(model, [prompt], options, [seed])
    return (token for [(_, token)] in _steps(model, [prompt], options, [seed]))


def filter_logits(logits: Float[Tensor, "B V"], top_k: int, top_p: float | int) -> Float[Tensor, "B V"]:
    """The logits, with -inf for every token that top-k or, among the rest, top-p leaves out.

    Of tokens with equal logits the lowest ids are kept, so that top-k keeps exactly k.
    """
    size = logits.shape[1]
    values = logits.topk(min(top_k or size, size), dim=1).values
    count = torch.full_like(values[:, :1], values.shape[1], dtype=torch.int64)
    if top_p < 1:
        # A token stays if those before it fall short of top_p; the first always does.
        reached = values.softmax(dim=1).cumsum(dim=1)
        count = (reached[:, :-1] < top_p).sum(dim=1, keepdim=True) + 1
    least = values.gather(1, count - 1)
    above, equal = logits > least, logits == least
    room = count - above.sum(dim=1, keepdim=True)
    return logits.masked_fill(~(above | (equal & (equal.cumsum(dim=1) <= room))), -torch.inf)


def _choose(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"], options: SamplingOptions
) -> Int[Tensor, " B"]:
    """One token a row."""
    if options.temperature == 0:
        return logits.max(dim=1).indices
    if options.temperature != 1:
        # The largest is moved to 0 first, so that no temperature, however low, makes it infinite; 1e-30 is
        # well above the smallest float32.
        logits = (logits - logits.amax(dim=1, keepdim=True)) / max(options.temperature, 1e-30)
    if options.top_k or options.top_p < 1:
        logits = filter_logits(logits, options.top_k, options.top_p)
    # The token at which the cumulative sum first exceeds the uniform share of the total.
    cumulative = logits.softmax(dim=1).cumsum(dim=1, dtype=uniform.dtype)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)[:, 0]


# ---- Step by step


def _steps(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> Iterator[list[tuple[int, int]]]:
    """At each step the rows that have not stopped and the token that each is given."""
    from minillm.fast.decode import cache_of

    device = model.lm_head.weight.device
    different = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    lengths = torch.tensor([len(prompt) for prompt in different], device=device)
    padded = [torch.tensor(prompt, dtype=torch.int64) for prompt in different]
    tokens = nn.utils.rnn.pad_sequence(padded, batch_first=True).to(device)
    # The last token chosen is never read, so a row is at most this long.
    cache = cache_of(model, len(prompts), tokens.shape[1] + options.max_new_tokens - 1, options.crop)
    uniforms = _uniforms(seeds, options.max_new_tokens, device)
    rows, running = list(range(len(prompts))), [True] * len(prompts)
    with torch.inference_mode():
        logits = cache.prefill(tokens, lengths)
        if len(different) < len(prompts):
            places = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=device)
            cache.keep(places)
            logits = logits[places]
    for step in range(options.max_new_tokens):
        with torch.inference_mode():
            if step:
                logits = cache.step(token)
            token: Tensor = _choose(logits, uniforms[:, step], options)
            # The only wait for the device in a step.
            chosen = torch.where(logits.sum(dim=1).isfinite(), token, -1).tolist()
        if -1 in chosen:
            raise InputError("sampling: the model's logits are not finite; its weights are damaged")
        yield list(compress(zip(rows, chosen, strict=True), running))
        running = [runs and new not in options.stop_ids for runs, new in zip(running, chosen, strict=True)]
        if not any(running):
            return
        # Measured on 64 rows of 30 tokens on average, 128 at most: 2.5 times as fast as keeping all.
        if sum(running) <= 0.75 * len(rows):
            with torch.inference_mode():
                kept = torch.tensor(running, device=device)
                cache.keep(kept)
                uniforms, token = uniforms[kept], token[kept]
            rows, running = list(compress(rows, running)), [True] * sum(running)


def _uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Float[Tensor, "B R"]:
    """Row b: `count` uniform numbers of [0, 1) from a generator of its own. In float64, in which the sum of a
    large vocabulary's probabilities keeps its small terms, where the device has it: Apple's GPUs do not."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in generators])
    return uniforms.to(torch.float32 if device.type == "mps" else torch.float64).to(device)


def _check(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> None:
    """Refuses what cannot be sampled, in one line."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one to each")
    V, longest, new = model.config.vocab_size, model.config.max_position_embeddings, options.max_new_tokens
    room = math.inf if options.crop else longest - new
    objections = {
        "this model was trained on masked tokens and cannot generate; train one with --objective causal":
            not model.config.causal,
        f"stop_ids {options.stop_ids} are not all below the model's {V} tokens; use its tokenizer":
            not all(0 <= token < V for token in options.stop_ids),
    }  # fmt: skip
    for number, prompt in enumerate(prompts):
        objections |= {
            f"prompt {number} is empty; start it with the document token": not prompt,
            f"prompt {number} has {len(prompt)} tokens; the model's {longest} less {new} new ones leave "
            f"{max(room, 0)}; shorten it or max_new_tokens": len(prompt) > room,
            f"prompt {number} has a token outside the model's vocabulary of {V}; use its own tokenizer":
                not all(0 <= token < V for token in prompt),
        }  # fmt: skip
    if objection := next((text for text, holds in objections.items() if holds), None):
        raise InputError(f"sampling: {objection}")
