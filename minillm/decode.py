"""The forward pass of sampling: one token a row at a time, over the keys and values seen so far.

It computes what `LanguageModel` computes, up to rounding, with less work: a small model's step is
mostly the overhead of its operations, so there are few of them.

    one product    gives queries, keys and values; one gives both entrances of the SwiGLU block
    norm weights   are part of the matrix behind the norm, and 1 / sqrt(C) is part of the queries
    residual sums  ride on the products that write into the stream
    a rotation     is one product: the two channels of a pair lie side by side, as a complex number
    angles, slots  and the attention's mask are tables, moved on by one operation a step

Row b of the cache holds lengths[b] positions. What lies behind them (the right padding of a prompt)
is never attended to, and the row's next tokens overwrite it.

Left out: gradients, several tokens a step after the prompt, paged caches, CUDA graphs.

Sources: see model.py; decoding over kept keys and values, Shazeer 2019 (arXiv 1911.02150), section 2.4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from kernels.attention import attention
from minillm.model import Block, LanguageModel, RMSNorm

Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Weights:
    """One block's weights, inputs first; those that meet the same input lie in one matrix."""

    qkv: Float[Tensor, "D qkv_heads_width"]
    qk_norm: Float[Tensor, "qk_heads C"] | None
    out: Float[Tensor, "heads_width D"]
    gate_up: Float[Tensor, "D gate_up_width"]
    down: Float[Tensor, "F D"]


class CachedDecoder:
    """A model with a cache for `rows` rows of at most `size` tokens.

    Its weights are those the model had when this was made. First `prefill`, then `step` by `step`,
    all of it under torch.inference_mode().
    """

    lengths: Tensor  # [B], the positions each row holds
    longest: int  # the largest of them, known without asking the device
    slots: Tensor  # [blocks, B·(keys or values)·K], where in the cache a row writes next, in heads
    mask: Tensor | None  # [B·K, 1, size], -inf for what a row does not see; None for equal lengths

    def __init__(self, model: LanguageModel, rows: int, size: int) -> None:
        config, device = model.config, model.lm_head.weight.device
        self.dtype = model.model.compute_dtype
        self.exact = torch.promote_types(self.dtype, torch.float32)
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.embedding = model.model.embed_tokens.weight
        self.blocks = [self._weights(cast(Block, block)) for block in model.model.layers]
        self.output = self._behind(model.model.norm, model.lm_head.weight)
        widths = torch.tensor((config.hidden_size, config.head_dim), device=device, dtype=self.exact)
        self.floors = (widths * config.rms_norm_eps).sqrt().unbind()
        # Angles in float32: bfloat16 cannot tell position 256 from 257.
        frequencies = model.model.get_buffer("frequencies")
        angles = torch.arange(size, device=device)[:, None, None] * frequencies
        self.rotation = torch.polar(torch.ones_like(angles), angles).to(self.exact.to_complex())
        shape = (2, len(self.blocks), rows, self.heads[1], size, config.head_dim)
        self.cache = torch.zeros(shape, device=device, dtype=self.dtype)

    def _behind(self, norm: RMSNorm, *matrices: Float[Tensor, "_ D"]) -> Float[Tensor, "D outputs"]:
        """The matrices that read the output of a norm, as one that reads what `_unit` gives."""
        return self._turned(torch.cat(matrices) * (norm.weight * norm.weight.numel() ** 0.5))

    def _turned(self, matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "inputs outputs"]:
        return matrix.to(self.dtype).T.contiguous()  # the faster layout where there is one row

    def _weights(self, block: Block) -> Weights:
        attn, mlp, qk_norm, C = block.self_attn, block.mlp, None, block.self_attn.head_dim
        q, k = _paired(attn.q_proj.weight, C), _paired(attn.k_proj.weight, C)
        if isinstance(attn.q_norm, RMSNorm) and isinstance(attn.k_norm, RMSNorm):
            # The norms owe sqrt(C) to queries and keys, the scores are divided by it: the keys have it.
            norms = _paired(attn.q_norm.weight, C), _paired(attn.k_norm.weight, C) * C**0.5
            pairs = zip(norms, self.heads, strict=True)
            qk_norm = torch.cat([norm.expand(heads, -1) for norm, heads in pairs])
        else:
            q = q * C**-0.5
        return Weights(
            self._behind(block.input_layernorm, q, k, attn.v_proj.weight),
            qk_norm,
            self._turned(attn.o_proj.weight),
            self._behind(block.post_attention_layernorm, mlp.gate_proj.weight, mlp.up_proj.weight),
            self._turned(mlp.down_proj.weight),
        )

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Reads the prompts, row b's `lengths[b]` tokens; the state behind each one's last."""
        (B, T), (H, K) = tokens.shape, self.heads

        def attend(block: int, qkv: Tensor) -> Tensor:
            q, k, v = qkv.transpose(1, 2).split_with_sizes((H, K, K), dim=1)
            self.cache[0, block, :, :, :T], self.cache[1, block, :, :, :T] = k, v
            return attention(q, k, v, scale=1.0).transpose(1, 2)

        hidden = self._forward(tokens, self.rotation[:T], attend)
        self._place(lengths, T)
        return hidden.view(B, T, -1)[torch.arange(B, device=tokens.device), lengths - 1]

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Appends one token to every row; the state behind it."""
        _, blocks, B, K, size, C = self.cache.shape
        H, seen = self.heads[0], self.longest + 1
        cache, slots, mask = self.cache.view(-1, C), self.slots.unbind(), self.mask
        keys, values = self.cache.view(2, blocks, B * K, size, C).narrow(3, 0, seen)
        keys, values = keys.transpose(2, 3).unbind(), values.unbind()
        if mask is not None:
            mask.view(-1).index_fill_(0, slots[0].view(B, 2, K)[:, 0].flatten(), 0)
            mask = mask[:, :, :seen]

        def attend(block: int, qkv: Tensor) -> Tensor:
            q, kv = qkv.split_with_sizes((H, 2 * K), dim=1)
            cache.index_copy_(0, slots[block], kv.reshape(-1, C))
            # One query a head: two products of batches, which need less set-up than a fused kernel.
            q, k = q.reshape(B * K, H // K, C), keys[block]
            scores = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)
            return torch.bmm(scores.softmax(dim=-1), values[block])

        hidden = self._forward(tokens, self.rotation.index_select(0, self.lengths), attend)
        self.lengths, self.longest, self.slots = self.lengths + 1, seen, self.slots + 1
        return hidden

    def keep(self, rows: Bool[Tensor, "B"]) -> None:
        """Drops every row that is not marked in `rows`."""
        self.cache, lengths = self.cache[:, :, rows], self.lengths[rows]
        self._place(lengths, int(lengths.max()))

    def logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """Logits in float32."""
        return torch.mm(hidden, self.output).float()

    def _place(self, lengths: Int[Tensor, "B"], longest: int) -> None:
        """Sets the lengths, and from them where each row writes next and what it may not see."""
        _, blocks, B, K, size, _ = self.cache.shape
        self.lengths, self.longest, self.mask = lengths, longest, None
        heads = torch.arange(2 * blocks * B * K, device=lengths.device).view(2, blocks, B, K)
        self.slots = (heads * size + lengths[:, None]).permute(1, 2, 0, 3).flatten(1)
        if (lengths < longest).any():
            unseen = torch.arange(size, device=lengths.device) >= lengths[:, None]
            mask = torch.zeros(B, size, device=lengths.device, dtype=self.dtype)
            mask = mask.masked_fill_(unseen, -torch.inf).repeat_interleave(K, dim=0)
            self.mask = mask[:, None]

    def _forward(
        self, tokens: Int[Tensor, "*tokens"], rotation: Complex[Tensor, "*_ 1 pairs"], attend: Attend
    ) -> Float[Tensor, "_ D"]:
        """The states behind the last norm, without its weight, one row a token.

        `attend(block, qkv)` gets [*tokens, H + 2K, C] and gives back H·C numbers a token.
        """
        (H, K), (floor, head_floor) = self.heads, self.floors
        x = F.embedding(tokens.flatten(), self.embedding).to(self.dtype)
        for number, block in enumerate(self.blocks):
            qkv = torch.mm(_unit(x, floor), block.qkv).view(*tokens.shape, H + 2 * K, -1).to(self.exact)
            qk = qkv.narrow(-2, 0, H + K)
            if block.qk_norm is not None:
                qk.div_(_length(qk, head_floor)).mul_(block.qk_norm)
            qk.view(rotation.dtype).mul_(rotation)
            seen = attend(number, qkv.to(self.dtype))
            x = torch.addmm(x, seen.reshape(x.shape[0], -1), block.out)
            gate, up = torch.mm(_unit(x, floor), block.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), block.down)
        return _unit(x, floor)


def _paired(x: Float[Tensor, "heads_width *inputs"], C: int) -> Float[Tensor, "heads_width *inputs"]:
    """Channels i and i + C/2 of each head, which turn together, side by side."""
    return x.unflatten(0, (-1, 2, C // 2)).transpose(1, 2).flatten(0, 2)


def _length(x: Float[Tensor, "... width"], floor: Float[Tensor, ""]) -> Float[Tensor, "... 1"]:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=floor.dtype).hypot_(floor)


def _unit(x: Float[Tensor, "... width"], floor: Float[Tensor, ""]) -> Float[Tensor, "... width"]:
    """x / sqrt(|x|² + floor²): RMSNorm but for a factor sqrt(width), which is in the weights behind.

    With floor² = width · eps. F.rms_norm is eight operations on a CPU, this is three.
    """
    return (x / _length(x, floor)).to(x.dtype)
