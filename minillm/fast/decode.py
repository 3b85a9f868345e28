"""Decoding with few operations: model.KVCache's results, up to rounding, from a model folded for it.

A small model's step is mostly the overhead of its operations, so there are few of them: half as many as
the model's own forward pass has. On one core of a CPU, at the default shape, a step takes a third of the time
in a batch of 1 and two thirds in a batch of 64.

    one product    gives queries, keys and values; one gives both entrances of the SwiGLU block
    norm weights   are part of the matrix behind the norm, and 1 / sqrt(C) is part of the queries
    residual sums  ride on the products that write into the stream
    a rotation     is one product: the two channels of a pair lie side by side, as a complex number
    angles, slots  and the attention's mask are tables, moved on by one operation a step

Prompts are read by the model itself. Left out: gradients, several tokens a step, CUDA graphs.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kernels.attention import attention
from minillm.model import Block, KVCache, LanguageModel, RMSNorm

vector_norm = partial(torch.linalg.vector_norm, dim=-1, keepdim=True)
"""`vector_norm(x).hypot_(floor)` is sqrt(|x|² + floor²), with floor² = width · eps: x divided by it is
RMSNorm of x but for a factor sqrt(width), which is in the weights behind. F.rms_norm is eight operations on
a CPU, these are three."""


@dataclass(frozen=True)
class Weights:
    """One block's weights, inputs first, as is faster with one row; those that meet the same input lie in one
    matrix."""

    qk_norm: Float[Tensor, "qk_heads C"] | None
    qkv: Float[Tensor, "D qkv_heads_width"]
    out: Float[Tensor, "heads_width D"]
    gate_up: Float[Tensor, "D gate_up_width"]
    down: Float[Tensor, "F D"]


class FoldedCache(KVCache):
    """A KVCache that steps by the weights that the model had when this was made."""

    placed: Tensor | None = None  # the lengths for which the next two are right
    slots: Tensor  # [blocks, B·(keys or values)·K], where in the cache a row writes next, in heads
    mask: Tensor | None  # [B·K, 1, size], -inf for what a row does not see; None for equal lengths

    def __init__(self, model: LanguageModel, rows: int, size: int) -> None:
        config, trunk, device = model.config, model.model, model.lm_head.weight.device
        self.model, self.dtype, self.longest = model, trunk.compute_dtype, 0
        self.exact = torch.promote_types(self.dtype, torch.float32)
        self.heads, C = (config.num_attention_heads, config.num_key_value_heads), config.head_dim
        self.pairs = torch.arange(C, device=device).view(2, -1).T.flatten()
        """Channels i and i + C/2, which turn together, side by side."""
        self.blocks = [self._weights(cast(Block, block)) for block in trunk.layers]
        output = model.lm_head.weight * (trunk.norm.weight * config.hidden_size**0.5)
        self.output = output.to(self.dtype).T.contiguous()
        widths = torch.tensor((config.hidden_size, C), device=device, dtype=self.exact)
        self.floors = (widths * config.rms_norm_eps).sqrt().unbind()
        # Angles in float32: bfloat16 cannot tell position 256 from 257.
        angles = torch.arange(size, device=device)[:, None, None] * trunk.frequencies
        self.rotation = torch.polar(torch.ones_like(angles), angles).to(self.exact.to_complex())
        shape = (2, config.num_hidden_layers, rows, config.num_key_value_heads, size, C)
        self.kept = torch.zeros(shape, device=device, dtype=self.dtype)

    def _weights(self, block: Block) -> Weights:
        attn, mlp, qk_norm, C = block.self_attn, block.mlp, None, block.self_attn.head_dim
        q, k = (
            x.weight.unflatten(0, (-1, C))[:, self.pairs].flatten(0, 1) for x in (attn.q_proj, attn.k_proj)
        )
        if isinstance(attn.q_norm, RMSNorm) and isinstance(attn.k_norm, RMSNorm):
            # The norms owe sqrt(C) to queries and keys, the scores are divided by it: the keys have it.
            both = attn.q_norm.weight[self.pairs], attn.k_norm.weight[self.pairs] * C**0.5
            qk_norm = torch.cat([norm.expand(n, -1) for norm, n in zip(both, self.heads, strict=True)])
        else:
            q = q * C**-0.5
        # Behind a norm a matrix reads what `vector_norm` divides, and makes up for the rest of the norm.
        norms = block.input_layernorm, block.post_attention_layernorm
        first, second = (norm.weight * norm.weight.numel() ** 0.5 for norm in norms)
        matrices = (
            torch.cat((q, k, attn.v_proj.weight)) * first,
            attn.o_proj.weight,
            torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)) * second,
            mlp.down_proj.weight,
        )
        return Weights(qk_norm, *(matrix.to(self.dtype).T.contiguous() for matrix in matrices))

    def __call__(self, block: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The model's attention while it reads the prompts: keeps their keys and values."""
        self.kept[:, block, : len(k), :, : k.shape[2]] = torch.stack((k[..., self.pairs], v))
        return attention(q, k, v, causal=True)

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        if self.placed is not self.lengths:
            self._place()
        (H, K), (floor, head_floor), exact = self.heads, self.floors, self.exact
        B, (_, blocks, _, _, size, C) = len(tokens), self.kept.shape
        seen, mask, cache, slots = self.longest + 1, self.mask, self.kept.view(-1, C), self.slots.unbind()
        keys, values = self.kept[:, :, :B].view(2, blocks, B * K, size, C).narrow(3, 0, seen)
        keys, values = keys.transpose(2, 3).unbind(), values.unbind()
        if mask is not None:
            mask.view(-1).index_fill_(0, slots[0].view(B, 2, K)[:, 0].flatten(), 0)
            mask = mask[:, :, :seen]
        rotation = self.rotation.index_select(0, self.lengths)
        x = F.embedding(tokens, self.model.model.embed_tokens.weight).to(self.dtype)
        for number, block in enumerate(self.blocks):
            length = vector_norm(x, dtype=exact).hypot_(floor)
            qkv = torch.mm((x / length).to(self.dtype), block.qkv).view(B, H + 2 * K, C).to(exact)
            qk = qkv.narrow(1, 0, H + K)
            if block.qk_norm is not None:
                qk.div_(vector_norm(qk, dtype=exact).hypot_(head_floor)).mul_(block.qk_norm)
            qk.view(rotation.dtype).mul_(rotation)
            q, kv = qkv.to(self.dtype).split_with_sizes((H, 2 * K), dim=1)
            cache.index_copy_(0, slots[number], kv.reshape(-1, C))
            # One query a head: two products of batches, which need less set-up than a fused kernel.
            q, k = q.reshape(B * K, H // K, C), keys[number]
            scores = torch.bmm(q, k) if mask is None else torch.baddbmm(mask, q, k)
            gathered = torch.bmm(scores.softmax(dim=-1), values[number])
            x = torch.addmm(x, gathered.view(B, H * C), block.out)
            length = vector_norm(x, dtype=exact).hypot_(floor)
            gate, up = torch.mm((x / length).to(self.dtype), block.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), block.down)
        self.lengths = self.placed = self.lengths + 1
        self.longest, self.slots = seen, self.slots + 1
        return torch.mm((x / vector_norm(x, dtype=exact).hypot_(floor)).to(self.dtype), self.output).float()

    def _place(self) -> None:
        """Where each row, of so many tokens, writes the next, and what it may not see."""
        self.placed = lengths = self.lengths
        (*shape, size, _), B = self.kept.shape, len(lengths)
        heads = torch.arange(math.prod(shape), device=lengths.device).view(shape)[:, :, :B]
        self.slots = (heads * size + lengths[:, None]).permute(1, 2, 0, 3).flatten(1)
        self.mask = None
        if (lengths < self.longest).any():
            unseen = torch.arange(size, device=lengths.device) >= lengths[:, None]
            mask = torch.zeros(B, size, device=lengths.device, dtype=self.dtype)
            mask = mask.masked_fill_(unseen, -torch.inf).repeat_interleave(shape[-1], dim=0)
            self.mask = mask[:, None]


# ---- Which cache, and past the model's positions


def cache_of(model: LanguageModel, rows: int, size: int, crop: bool = False) -> "KVCache | CroppedContext":
    """What reads the tokens, at most `size` of each row, in the fastest way that there is for the model."""
    if crop and size > model.config.max_position_embeddings:
        return CroppedContext(model, rows, size)
    unfolded = model.config.qkv_bias or model.config.rope[0] == "yarn" or model.config.no_rope_layers
    on_mps = model.lm_head.weight.device.type == "mps"  # which knows no complex numbers
    return (KVCache if unfolded or on_mps else FoldedCache)(model, rows, size)


class CroppedContext:
    """In the place of a KVCache where texts outgrow the model's positions: it sees the last tokens of each.

    A text that has lost its beginning has other positions and other hidden states throughout, so that no key
    can be kept: from there on every step computes the whole context anew.
    """

    def __init__(self, model: LanguageModel, rows: int, size: int) -> None:
        self.model, self.size, self.most = model, size, model.config.max_position_embeddings
        self.cache = cache_of(model, rows, self.most)

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        self.lengths, self.longest = lengths, tokens.shape[1]
        self.tokens = F.pad(tokens, (0, self.size - self.longest))
        return self._read()

    def step(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        self.tokens.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths, self.longest = self.lengths + 1, self.longest + 1
        return self.cache.step(tokens) if self.longest <= self.most else self._read()

    def keep(self, rows: Bool[Tensor, " B"] | Int[Tensor, " b"]) -> None:
        self.tokens, self.lengths = self.tokens[rows], self.lengths[rows]
        if self.longest <= self.most:
            self.cache.keep(rows)

    def _read(self) -> Float[Tensor, "B V"]:
        """The logits behind every row, from its last tokens."""
        first = (self.lengths - self.most).clamp(min=0)
        index = torch.arange(min(self.longest, self.most), device=first.device)
        self.cache.longest = 0  # it forgets what it has read
        return self.cache.prefill(self.tokens.gather(1, first[:, None] + index), self.lengths - first)
