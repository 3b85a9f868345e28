"""One decoder of the Llama family, and the two heads on top of it: a language model's and a scalar.

    tokens [B, T] ─► embedding ─► L × (attention, SwiGLU) ─► norm ─► hidden [B, T, D] ─┬► loss or logprobs
                                                                                       └► scalars [B, T]

Each block adds to the residual stream twice: x + attention(norm(x)), then x + mlp(norm(x)).
With `qk_norm` the layout is Qwen3's, without it Llama's. The module names are the names Hugging Face
gives the weights, so `state_dict()` is the file layout and nothing is ever renamed.

Logits are made for sampling only: the losses in kernels/ take `hidden` and `lm_head.weight` themselves. The
scalar model gives a number for every token: a reward model is read at a response's last token, a critic at
every one. There is no dropout, and no bias but the scalar's and Qwen2's.

Sources: RMSNorm, Zhang & Sennrich 2019 (arXiv 1910.07467), eq. 4; rotary positions, Su et al. 2021
(arXiv 2104.09864), section 3.4; SwiGLU, Shazeer 2020 (arXiv 2002.05202), eq. 6; grouped-query
attention, Ainslie et al. 2023 (arXiv 2305.13245), section 2; QK-norm, Henry et al. 2020
(arXiv 2010.04245), section 3, in the per-head RMSNorm form of Qwen3; masked training, Devlin et al. 2019
(arXiv 1810.04805), section 3.1; the scalar head and its first weights, Stiennon et al. 2020
(arXiv 2009.01325), appendix B.1; blocks that start as the identity, Zhang et al. 2019 (arXiv 1901.09321).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kernels.attention import attention
from kernels.losses import kl as logits_kl
from kernels.losses import linear_cross_entropy, linear_kl, linear_token_logprobs, token_logprobs
from minillm.data import forward_passes
from minillm.errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Field names are those of Hugging Face's config.json."""

    vocab_size: int  # V, the rows of the embedding and of the output matrix
    hidden_size: int  # D, the width of the residual stream
    intermediate_size: int  # inside the SwiGLU block
    num_hidden_layers: int  # blocks
    num_attention_heads: int  # H, the query heads
    num_key_value_heads: int  # K; each serves H / K query heads
    head_dim: int  # C, the width of a head; even, because rotary positions turn pairs
    max_position_embeddings: int  # the longest row the model was trained on, in tokens
    rope_theta: float = 10_000.0  # the base of the rotary wavelengths
    rope: tuple[Any, ...] = ("default",)
    """How they are stretched, and by what numbers (io/config.py): llama3, linear or yarn."""
    rms_norm_eps: float = 1e-6  # added to the mean square before the root
    tie_word_embeddings: bool = False  # whether the output matrix is the embedding
    qk_norm: bool = True  # whether queries and keys are normalised per head (the Qwen3 layout)
    qkv_bias: bool = False  # whether queries, keys and values have biases (the Qwen2 layout)
    no_rope_layers: tuple[int, ...] = ()
    """0 for a block whose queries and keys are not turned, 1 for another (SmolLM3); empty: all are turned."""
    causal: bool = True
    """False for a model trained on masked tokens, which sees both sides and cannot generate."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type is int):
            if getattr(self, name) < 1:
                raise InputError(f"model: {name} is {getattr(self, name)}; give at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"model: {self.num_attention_heads} query heads cannot be shared by "
                f"{self.num_key_value_heads} key/value heads; give a divisor"
            )
        if self.head_dim % 2:
            raise InputError(f"model: head_dim is {self.head_dim}; rotary positions need an even one")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise InputError(f"model: rms_norm_eps is {self.rms_norm_eps}; give 0 or more")


# ---- The parts of a block


class Linear(nn.Linear):
    """A matrix that computes in the precision of its input (weights stay float32)."""

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight over the last axis, in the precision of its input."""

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.q_proj = Linear(width, config.num_attention_heads * head, config.qkv_bias)
        self.k_proj = Linear(width, config.num_key_value_heads * head, config.qkv_bias)
        self.v_proj = Linear(width, config.num_key_value_heads * head, config.qkv_bias)
        self.o_proj = Linear(config.num_attention_heads * head, width, bias=False)
        self.q_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "B T D"], cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]
    ) -> Float[Tensor, "B T D"]:
        """`attend`: what queries [B, H, T, C] gather from keys and values [B, K, T, C]. Rotary positions turn
        channels (i, i + C/2) of queries and keys by angle i of their position: cos, sin [*, T, C/2]."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        halves = (heads.chunk(2, dim=-1) for heads in (q, k))
        q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1) for a, b in halves)
        gathered = attend(q, k, v)
        return self.o_proj(gathered.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Float[Tensor, "B T D"], cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]
    ) -> Float[Tensor, "B T D"]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- Tokens -> hidden states


@runtime_checkable
class Attend(Protocol):
    """Attention to other keys than those of the same row, for block number `block`: `KVCache`,
    fast.SharedPrompts."""

    positions: Any
    """Of each token in its text: [T], or [B, 1, T] where rows differ."""

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Decoder(nn.Module):
    """The trunk that every head shares."""

    frequencies: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Radians per position of each pair of channels: theta^(-2i/C), i = 0 … C/2 - 1.
        half = config.head_dim // 2
        frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        if config.rope != ("default",):
            from minillm.io.config import stretched

            frequencies = stretched(frequencies, config)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        start: Int[Tensor, "B T"] | None = None,
        attend: Attend | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the last norm.

        A position sees its document, which begins at start[b, t] (without `start` each row is one), in a
        causal model up to itself; or what `attend` lets it see.
        """
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        positions = attend.positions if attend else torch.arange(tokens.shape[1], device=tokens.device)
        # Angles in float32: in bfloat16 positions 256 and 257 are equal.
        angles = positions[..., None] * self.frequencies
        kind, *numbers = self.config.rope
        size = numbers[3] if kind == "yarn" else 1.0  # of factor, fast, slow, magnitude and length
        cos, sin = (size * angles.cos()).to(self.compute_dtype), (size * angles.sin()).to(self.compute_dtype)
        end = None if start is None or self.config.causal else document_ends(start)
        within = partial(attention, start=start, end=end, causal=self.config.causal)
        rotates = self.config.no_rope_layers or [1] * len(self.layers)
        for number, block in enumerate(self.layers):
            rotation = (cos, sin) if rotates[number] else (torch.ones_like(cos), torch.zeros_like(sin))
            x = block(x, *rotation, partial(attend, number) if attend else within)
        return self.norm(x)


def document_ends(start: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The end (exclusive) of each position's document, from the documents' first positions.

    Starts never fall along a row, so a document ends where the starts exceed its own.
    """
    start = start.contiguous()
    return torch.searchsorted(start, start, right=True).to(start.dtype)


# ---- Hidden states -> loss, log-probabilities, logits


class TokenLogprobs(NamedTuple):
    """Of some tokens, and of the distributions they were chosen from, in nats."""

    logprobs: Float[Tensor, " N"]
    entropy: Float[Tensor, " N"]
    kl: Float[Tensor, " N"] | None
    """KL(model || reference), exact over the vocabulary; None without a reference."""


class LanguageModel(nn.Module):
    """The decoder with an output matrix: `lm_head.weight` [V, D] turns hidden states to logits.

    `model.model(tokens)` are the hidden states. The forward pass gives what training asks of them, a loss or
    log-probabilities, by kernels that never hold the logits of all positions; so whatever wraps the model
    (DistributedDataParallel, torch.compile) wraps all of it.
    """

    stored_dtype = torch.float32  # of the weights on disk: bfloat16 stays so

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, compute_dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        start: Int[Tensor, "B T"] | None = None,
        attend: Attend | None = None,
        *,
        targets: Int[Tensor, "B T"] | None = None,
        index: Int[Tensor, " N"] | None = None,
        **options: Any,
    ) -> Any:
        """The loss of `targets`: Σ -log p(target), a scalar, targets of -100 left out. Or `token_logprobs`
        with these options of the tokens at `index` in tokens.flatten(), each from the hidden state before it.
        Or, asked for neither, all hidden states [B·T, D]."""
        hidden = self.model(tokens, start, attend).flatten(0, 1)
        if index is not None:
            return self.token_logprobs(hidden[index - 1], tokens.flatten()[index], **options)
        if options:
            raise TypeError(f"only log-probabilities, of an index, take {', '.join(options)}")
        if targets is None:
            return hidden
        return linear_cross_entropy(hidden, self.lm_head.weight, targets.flatten(), reduction="sum")

    def token_logprobs(
        self,
        hidden: Float[Tensor, "N D"],
        tokens: Int[Tensor, " N"],
        temperature: float = 1.0,
        allowed: Bool[Tensor, "N V"] | None = None,
        reference: tuple[Float[Tensor, "N E"], Float[Tensor, "V E"]] | None = None,
    ) -> TokenLogprobs:
        """Of the token after each hidden state, under softmax(logits / temperature) over `allowed`.

        `reference`: hidden states of another model, E wide, and its output matrix, for the KL to it at the
        same temperature. `allowed` restricts this model's tokens, not the other's.
        """
        weight, kl = self.lm_head.weight, None
        if allowed is None:
            logprobs, entropy = linear_token_logprobs(hidden, weight, tokens, temperature)
            if reference:
                kl = linear_kl(hidden / temperature, weight, reference[0] / temperature, reference[1])
        else:
            logits = self.logits(hidden).masked_fill(~allowed, -torch.inf)
            logprobs, entropy = token_logprobs(logits, tokens, temperature)
            if reference:
                other = F.linear(reference[0], reference[1].to(reference[0].dtype)).float()
                kl = logits_kl(logits / temperature, other / temperature)
        return TokenLogprobs(logprobs, entropy, kl)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Logits in float32, for sampling: ask for one position, not for a batch."""
        return self.lm_head(hidden).float()


# ---- Hidden states -> scalars


class ScalarModel(nn.Module):
    """The decoder with one number for every token: `score.weight` [1, D] turns hidden states to values.

    `bias` is not trained: a reward model is shifted by it once, so that demonstrations score 0 on average.
    """

    bias: Tensor

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, compute_dtype)
        self.score = Linear(config.hidden_size, 1, bias=False)
        self.register_buffer("bias", torch.zeros(()), persistent=False)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        start: Int[Tensor, "B T"] | None = None,
        attend: Attend | None = None,
    ) -> Float[Tensor, "B T"]:
        """A value for every token, in the weights' precision; for `start` and `attend` see `Decoder`."""
        hidden = self.model(tokens, start, attend)
        # Differences of scores count: bfloat16 would leave them two or three digits.
        return self.score(hidden.to(self.score.weight.dtype)).squeeze(-1) + self.bias


def scalar_from_language_model(
    model: LanguageModel, generator: torch.Generator, blocks: int = 0
) -> ScalarModel:
    """A scalar model on the trunk of a language model, which it takes over as it is, and `blocks` new blocks
    on top, which start as the identity.

    The head starts as N(0, 1/(D + 1)): of normalised hidden states, the first values are of size 1.
    """
    trunk = model.model
    trunk.config = replace(model.config, num_hidden_layers=model.config.num_hidden_layers + blocks)
    for _ in range(blocks):
        block = Block(trunk.config)
        initialize(block, generator)
        trunk.layers.append(block)
    scalar = ScalarModel(trunk.config)
    scalar.model = trunk
    nn.init.normal_(scalar.score.weight, std=(trunk.config.hidden_size + 1) ** -0.5, generator=generator)
    return scalar.to(model.lm_head.weight.device)


@torch.no_grad()
def score_rows(model: ScalarModel, rows: Sequence[Sequence[int]], batch_tokens: int = 16_384) -> list[float]:
    """A reward model's score of every row, the value of its last token, in forward passes of at most
    `batch_tokens` positions. InputError where a score is not finite."""
    device, scores = model.bias.device, torch.zeros(len(rows), dtype=model.bias.dtype)
    sizes = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    for numbers, begins, tokens, start in forward_passes(
        sizes.argsort(stable=True).tolist(), rows, batch_tokens
    ):
        last = begins + sizes[numbers] - 1
        scores[numbers] = model(tokens.to(device), start.to(device)).flatten()[last.to(device)].cpu()
    if not scores.isfinite().all():
        raise InputError(
            "the reward model gives scores that are not finite; restore its folder or train it anew"
        )
    return scores.tolist()


# ---- One token after the other


class KVCache:
    """A model that decodes: it keeps the keys and values of all tokens so far and computes only the newest.

    Two rows, whose prompts are "a b c" and "x", after two steps. Both are prefilled as three tokens; what the
    padding (-) left in the shorter one is overwritten by its next tokens before any query may see it:

        slot         0  1  2  3  4
        row 0        a  b  c  d  e      lengths[0] = 5 = longest
        row 1        x  y  z  .  .      lengths[1] = 3: queries of row b see the slots below lengths[b]

    It calls the trunk, so that a compiled model is not compiled anew for every length. Source: Shazeer 2019
    (arXiv 1911.02150), section 2.4.
    """

    positions: Int[Tensor, "B 1 T"]  # of the tokens being read
    lengths: Int[Tensor, " B"]
    longest: int  # the largest of them, known without asking the device

    def __init__(self, model: LanguageModel, rows: int, size: int) -> None:
        """Room for `rows` rows of at most `size` tokens. To be used under torch.inference_mode()."""
        config, device = model.config, model.lm_head.weight.device
        shape = (2, config.num_hidden_layers, rows, config.num_key_value_heads, size, config.head_dim)
        self.model, self.longest = model, 0
        self.kept = torch.zeros(shape, device=device, dtype=model.model.compute_dtype)

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Reads the prompts, row b's first `lengths[b]` tokens; the logits after the last of each."""
        self.lengths = torch.zeros_like(lengths)
        hidden = self._read(tokens)
        self.lengths, self.longest = lengths, tokens.shape[1]
        return self.model.logits(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Appends one token to every row; the logits after it."""
        hidden = self._read(tokens[:, None])
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return self.model.logits(hidden[:, 0])

    def keep(self, rows: Bool[Tensor, " B"] | Int[Tensor, " b"]) -> None:
        """Goes on with the rows that are marked, or with these in this order, some of them several times."""
        lengths, filled = self.lengths[rows], self.kept[..., : self.longest, :]
        filled[:, :, : len(lengths)] = filled[:, :, : len(self.lengths)][:, :, rows]
        self.lengths, self.longest = lengths, int(lengths.max())

    def _read(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The hidden states of the next tokens of each row."""
        self.positions = self.lengths[:, None, None] + torch.arange(tokens.shape[1], device=tokens.device)
        return self.model.model(tokens, attend=self)

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of one block: keeps the new keys and values and looks at all that are kept."""
        slots = self.positions[..., None].expand_as(k)
        kept = self.kept[:, block, : len(k)].scatter_(3, slots.expand(2, *k.shape), torch.stack((k, v)))
        keys, values = kept[:, :, :, : self.longest + q.shape[2]]
        end = self.positions[:, 0].int() + 1 if self.longest else None  # of prompts, all from slot 0 on
        return attention(q, keys, values, end=end, causal=end is None)


# ---- Shape and first weights


def config_of_depth(depth: int, vocab_size: int, max_position_embeddings: int, **overrides) -> ModelConfig:
    """The shape that follows from the depth.

    width = 32 · depth; heads are 32 wide up to a width of 256, 64 up to 1,024 and 128 beyond, one
    key/value head to each; the SwiGLU block is 8/3 as wide as the residual stream (three matrices with as
    many weights as two, 4 times as wide), rounded up to a multiple of 64. `overrides`: what is to be other.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    width = given.get("hidden_size", 32 * depth)
    head = given.get("head_dim", 32 if width <= 256 else 64 if width <= 1024 else 128)
    heads = given.get("num_attention_heads", max(1, width // head))
    shape: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 64 * -(-8 * width // (3 * 64)),
        "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": head, "max_position_embeddings": max_position_embeddings,
    }  # fmt: skip
    return ModelConfig(**shape | given)


def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights of a language model or a part of one, drawn in the order of `named_parameters`.

    Every matrix keeps the size of what passes through it (variance 1 / fan-in), except the two that
    write into the residual stream: they start at zero, so that each block starts as the identity.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            std = 1.0 if name.endswith("embed_tokens.weight") else parameter.shape[1] ** -0.5
            nn.init.normal_(parameter, std=std, generator=generator)
