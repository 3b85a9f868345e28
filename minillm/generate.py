"""Sampling: prompts in, continuations with their log-probabilities out.

Prompts of different lengths share a batch by right padding. One forward pass fills the key/value
cache (model.KVCache); after it every step feeds one token a row. Rows that stop leave the batch once they
are a quarter of it. Computation is in the model's `compute_dtype`; on a CPU float32 is the faster one.

A step turns logits into one token: divide by the temperature, forbid the stop tokens while the
response is too short, keep the top-k, of these keep the nucleus (top-p), renormalise, and invert the
cumulative distribution at a uniform number. Each row draws its uniform numbers from its own seed, so
its sample does not depend on its neighbours (up to rounding: a matrix product over more rows may add
in another order, which moves a probability in its last digits).

Left out: beam search, repetition penalties, speculative decoding, paged caches, CUDA graphs.

Sources: nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751), section 3.1; top-k sampling, Fan
et al. 2018 (arXiv 1805.04833), section 5.4.
"""

import codecs
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minillm.errors import InputError
from minillm.model import KVCache, LanguageModel


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. A greedy choice is a point mass: its log-probability is 0."""

    max_new_tokens: int
    """The longest response, in tokens, stop token included."""
    temperature: float | int = 1.0
    """Divides the logits; 0 takes the most probable token (of equal ones the lowest id)."""
    top_k: int = 0
    """Sample among this many most probable tokens (of equal ones the lowest ids); 0 for all."""
    top_p: float | int = 1.0
    """Sample among the fewest most probable tokens that together reach this probability, counted
    after temperature and top-k; 1 for all."""
    min_new_tokens: int = 0
    """No stop token is chosen before the response has this many others."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a response; the one that did stays as its last token."""
    crop: bool = False
    """Go on past the model's positions, each token being drawn after as many of the last tokens as there are
    positions, as nanoGPT does. Otherwise what may not fit is refused."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 for all tokens, or how many to keep"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_new_tokens": (self.min_new_tokens >= 0, "0 or more"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise InputError(f"sampling: {name} is {getattr(self, name)}; give {wanted}")


@dataclass(frozen=True)
class Samples:
    """Prompts with their responses. Right padding is token 0; `lengths` says where it begins."""

    tokens: Int[Tensor, "B T"]
    """Row b: prompt_lengths[b] tokens of the prompt, then the response up to lengths[b]."""
    prompt_lengths: Int[Tensor, "B"]
    lengths: Int[Tensor, "B"]
    logprobs: Float[Tensor, "B N"]
    """Of response token n, in nats, under the distribution it was sampled from: after temperature,
    stop tokens held back, top-k and top-p. 0 behind the response's end, and for a greedy choice."""
    stopped: Bool[Tensor, "B"]
    """Whether the response ended on a stop token rather than at max_new_tokens."""

    def responses(self) -> list[list[int]]:
        """The token ids behind each prompt, its stop token included."""
        rows = zip(self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[start:end] for row, start, end in rows]


def generate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> Samples:
    """One response to each prompt, row b drawn with seeds[b].

    InputError for a prompt that is empty, too long for the model or of unknown tokens, and for a
    model that cannot generate; ValueError where there is not one seed to a prompt.
    """
    _check(model, prompts, options, seeds)
    steps = list(_steps(model, prompts, options, seeds))
    rows, tokens, step_logprobs = (torch.cat(column) for column in zip(*steps, strict=True))
    step = torch.cat([torch.full_like(row, i) for i, (row, _, _) in enumerate(steps)])
    # Made here and not step by step: tensors of the inference mode cannot take part in training.
    chosen = torch.zeros((len(prompts), len(steps)), dtype=torch.int64, device=rows.device)
    logprobs = torch.zeros(chosen.shape, device=rows.device)
    chosen[rows, step], logprobs[rows, step] = tokens, step_logprobs
    return _assemble(prompts, chosen, logprobs, options.stop_ids)


def stream(model: LanguageModel, prompt: Sequence[int], options: SamplingOptions, seed: int) -> Iterator[int]:
    """The tokens `generate` would give this prompt and seed, each as soon as it is chosen."""
    _check(model, [prompt], options, [seed])
    return (int(token) for _, token, _ in _steps(model, [prompt], options, [seed]))


def stream_text(decode_bytes: Callable[[list[int]], bytes], tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as tokens come, holding back bytes until they make whole characters.

    `decode_bytes` is the tokenizer's. The pieces join to the text of all tokens decoded at once,
    with U+FFFD for bytes that are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(decode_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


def filter_logits(logits: Float[Tensor, "B V"], top_k: int, top_p: float | int) -> Float[Tensor, "B V"]:
    """The logits, with -inf for every token that top-k or, among the rest, top-p leaves out.

    Of tokens with equal logits the lowest ids are kept, so that top-k keeps exactly k.
    """
    size = logits.shape[1]
    if (top_k == 0 or top_k >= size) and top_p == 1:
        return logits
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
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B"], options: SamplingOptions
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """One token a row and its log-probability."""
    if options.temperature == 0:
        best, token = logits.max(dim=1)
        return token, best - best  # 0, or NaN where the logits are not finite
    if options.temperature != 1:
        # The largest moved to 0 first, so that no temperature, however low, makes it infinite; float32
        # knows none below 1e-38.
        logits = (logits - logits.amax(dim=1, keepdim=True)) / max(options.temperature, 1e-30)
    logits = filter_logits(logits, options.top_k, options.top_p)
    probabilities = logits.softmax(dim=1)
    # The token at which the cumulative sum first exceeds the uniform share of the total. In float64,
    # where a large vocabulary's sum keeps its small terms.
    cumulative = probabilities.cumsum(dim=1, dtype=exact_dtype(logits.device))
    target = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    return token[:, 0], probabilities.gather(1, token)[:, 0].log()


# ---- Step by step


def _steps(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> Iterator[tuple[Int[Tensor, "b"], Int[Tensor, "b"], Float[Tensor, "b"]]]:
    """At each step the rows in the batch, the token that each is given and its log-probability.

    A row that stopped may stay for some steps: what follows its stop token is to be ignored.
    """
    device = model.lm_head.weight.device
    tokens, lengths = (tensor.to(device) for tensor in _pad(prompts))
    # The last token chosen is never read, so a row is at most this long.
    cache = _cache(model, len(prompts), tokens.shape[1] + options.max_new_tokens - 1, options.crop)
    uniforms = _uniforms(seeds, options.max_new_tokens, device)
    stop_ids = torch.tensor(options.stop_ids, dtype=torch.int64, device=device)
    rows = torch.arange(len(prompts), device=device)
    running, left, token = torch.ones_like(rows, dtype=torch.bool), float(len(prompts)), rows
    for step in range(options.max_new_tokens):
        with torch.inference_mode():
            # Measured with lengths of 30 on average and 128 at most, 64 rows: 2.5 times as fast as never.
            if left <= 0.75 * len(rows):
                cache.keep(running)
                rows, uniforms, token, running = (x[running] for x in (rows, uniforms, token, running))
            logits = cache.step(token) if step else cache.prefill(tokens, lengths)
            if step < options.min_new_tokens:
                logits[:, stop_ids] = -torch.inf
            token, logprob = _choose(logits, uniforms[:, step], options)
            running = running & (token[:, None] != stop_ids).all(dim=1)
            # The one wait for the device in a step. NaN where a log-probability is not finite.
            left = float(running.sum() + 0 * logprob.sum())
        if math.isnan(left):
            raise InputError("sampling: the model's logits are not finite; its weights are damaged")
        yield rows, token, logprob
        if not left:
            return


def _cache(model: LanguageModel, rows: int, size: int, crop: bool) -> "KVCache | CroppedContext":
    """What reads the tokens, `size` of each row at most."""
    if crop and size > model.config.max_position_embeddings:
        return CroppedContext(model, rows, size)
    unfolded = model.config.qkv_bias or model.config.rope_yarn is not None
    if unfolded or model.lm_head.weight.device.type == "mps":  # which knows no complex numbers
        return KVCache(model, rows, size)
    from minillm.fast.decode import FoldedCache

    return FoldedCache(model, rows, size)


class CroppedContext:
    """Stands for a KVCache where texts outgrow the model's positions: the model sees the last tokens of each.

    A text that has lost its beginning has other positions and other hidden states throughout, so that no key
    can be kept: from there on every step computes the whole context anew.
    """

    def __init__(self, model: LanguageModel, rows: int, size: int) -> None:
        self.model, self.positions = model, model.config.max_position_embeddings
        self.cache = _cache(model, rows, self.positions, crop=False)
        self.size = size

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """As KVCache's."""
        self.lengths, self.longest = lengths, tokens.shape[1]
        self.tokens = nn.functional.pad(tokens, (0, self.size - self.longest))
        return self.cache.prefill(tokens, lengths) if self.longest <= self.positions else self._anew()

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """As KVCache's."""
        self.tokens.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return self.cache.step(tokens) if self.longest <= self.positions else self._anew()

    def keep(self, rows: Bool[Tensor, "B"]) -> None:
        """As KVCache's."""
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]
        if self.longest <= self.positions:
            self.cache.keep(rows)

    def _anew(self) -> Float[Tensor, "B V"]:
        """The logits behind every row, from its last tokens."""
        first = (self.lengths - self.positions).clamp(min=0)
        window = first[:, None] + torch.arange(self.positions, device=first.device)
        hidden = self.model.model(self.tokens.gather(1, window))
        return self.model.logits(
            hidden[torch.arange(len(first), device=first.device), self.lengths - first - 1]
        )


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B"]]:
    """Rows as one tensor with zeros behind their ends, and their lengths."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths


def exact_dtype(device: torch.device) -> torch.dtype:
    """For sums of many small terms: float64, where the device has it (Apple's GPUs do not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Float[Tensor, "B N"]:
    """Row b: `count` uniform numbers of [0, 1) from a generator of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in generators])
    return uniforms.to(exact_dtype(device)).to(device)


def _assemble(prompts, chosen, logprobs, stop_ids) -> Samples:
    """Cuts every row behind its first stop token and puts it behind its prompt."""
    prompt_tokens, prompt_lengths = (tensor.to(chosen.device) for tensor in _pad(prompts))
    stops = torch.isin(chosen, torch.tensor(stop_ids, dtype=torch.int64, device=chosen.device))
    stopped = stops.any(dim=1)
    counts = torch.where(stopped, stops.int().argmax(dim=1) + 1, chosen.shape[1])
    index = torch.arange(chosen.shape[1], device=chosen.device)
    beyond = index >= counts[:, None]
    lengths = prompt_lengths + counts
    tokens = nn.functional.pad(prompt_tokens, (0, chosen.shape[1]))
    tokens.scatter_(1, prompt_lengths[:, None] + index, chosen.masked_fill(beyond, 0))
    tokens = tokens[:, : int(lengths.max())]
    return Samples(tokens, prompt_lengths, lengths, logprobs.masked_fill(beyond, 0), stopped)


def _check(
    model: LanguageModel, prompts: Sequence[Sequence[int]], options: SamplingOptions, seeds: Sequence[int]
) -> None:
    """Refuses what cannot be sampled, in one line."""
    config = model.config
    if not config.causal:
        raise InputError(
            "sampling: this model was trained on masked tokens and cannot generate; "
            "train one with --objective causal"
        )
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one to each")
    if not prompts:
        raise InputError("sampling: there are no prompts; give at least one")
    if not all(0 <= token < config.vocab_size for token in options.stop_ids):
        raise InputError(
            f"sampling: stop_ids {options.stop_ids} are not all below the model's "
            f"vocabulary of {config.vocab_size}; use its own tokenizer"
        )
    if options.min_new_tokens and len(set(options.stop_ids)) == config.vocab_size:
        raise InputError("sampling: every token is a stop token; set min_new_tokens to 0")
    room = math.inf if options.crop else config.max_position_embeddings - options.max_new_tokens
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"sampling: prompt {number} is empty; start it with the document token")
        if len(prompt) > room:
            raise InputError(
                f"sampling: prompt {number} has {len(prompt)} tokens; the model's "
                f"{config.max_position_embeddings} less {options.max_new_tokens} new ones "
                f"leave {max(room, 0)}; shorten it or max_new_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise InputError(
                f"sampling: prompt {number} has a token outside the model's vocabulary "
                f"of {config.vocab_size}; use its own tokenizer"
            )
