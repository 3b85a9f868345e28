"""The forward pass of sampling: one token a row at a time, over the keys and values seen so far.

It computes what `LanguageModel` computes, up to rounding, with less work: a small model's step is
mostly the overhead of its operations, so there are few of them.

    one product    gives queries, keys and values; one gives both entrances of the SwiGLU block
    norm weights   are part of the matrix behind the norm
    residual sums  ride on the products that write into the stream
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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kernels.attention import attention
from minillm.model import Block, LanguageModel, RMSNorm

Attend = Callable[[int, Tensor, Tensor], Tensor]


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
    slots: Tensor  # [B, keys or values, K], where in a block's cache a row writes next, in heads
    mask: Tensor  # [B·K, 1, size], -inf for what a row does not see

    def __init__(self, model: LanguageModel, rows: int, size: int) -> None:
        config, device = model.config, model.lm_head.weight.device
        self.dtype = model.model.compute_dtype
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        self.embedding = model.model.embed_tokens.weight
        self.blocks = [self._weights(cast(Block, block)) for block in model.model.layers]
        self.output = self._behind(model.model.norm, model.lm_head)
        exact = torch.promote_types(self.dtype, torch.float32)
        widths = torch.tensor((config.hidden_size, config.head_dim), device=device, dtype=exact)
        self.floors = (widths * config.rms_norm_eps).sqrt().unbind()
        # Angles in float32: bfloat16 cannot tell position 256 from 257.
        frequencies = model.model.get_buffer("frequencies")
        angles = torch.arange(size, device=device)[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        rotation = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
        self.rotation = rotation.to(self.dtype)  # [2, size, 1, C]
        shape = (len(self.blocks), 2, rows, self.heads[1], size, config.head_dim)
        self.cache = torch.zeros(shape, device=device, dtype=self.dtype)

    def _behind(self, norm: RMSNorm, *linears: nn.Linear) -> Float[Tensor, "D outputs"]:
        """The matrices that read the output of a norm, as one that reads what `_unit` gives."""
        matrix = torch.cat([linear.weight for linear in linears])
        return self._turned(matrix * (norm.weight * norm.weight.numel() ** 0.5))

    def _turned(self, matrix: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "inputs outputs"]:
        return matrix.to(self.dtype).T.contiguous()  # the faster layout where there is one row

    def _weights(self, block: Block) -> Weights:
        attn, mlp, qk_norm = block.self_attn, block.mlp, None
        if isinstance(attn.q_norm, RMSNorm) and isinstance(attn.k_norm, RMSNorm):
            pair = zip((attn.q_norm, attn.k_norm), self.heads, strict=True)
            rows = torch.cat([norm.weight.expand(heads, -1) for norm, heads in pair])
            qk_norm = (rows * attn.head_dim**0.5).to(self.dtype)
        return Weights(
            self._behind(block.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj),
            qk_norm,
            self._turned(attn.o_proj.weight),
            self._behind(block.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
            self._turned(mlp.down_proj.weight),
        )

    def prefill(self, tokens: Int[Tensor, "B T"], lengths: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Reads the prompts, row b's `lengths[b]` tokens; the state behind each one's last."""
        B, T = tokens.shape

        def attend(block: int, q: Tensor, kv: Tensor) -> Tensor:
            k, v = kv.transpose(1, 2).chunk(2, dim=1)
            self.cache[block, 0, :, :, :T], self.cache[block, 1, :, :, :T] = k, v
            return attention(q.transpose(1, 2), k, v).transpose(1, 2)

        hidden = self._forward(tokens, self.rotation[:, :T], attend)
        self._place(lengths, T)
        return hidden.view(B, T, -1)[torch.arange(B, device=tokens.device), lengths - 1]

    def step(self, tokens: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Appends one token to every row; the state behind it."""
        _, B, K, size, C = self.cache[0].shape
        H, seen = self.heads[0], self.longest + 1
        self.mask.view(-1).index_fill_(0, self.slots[:, 0].flatten(), 0)
        mask, slots = self.mask[:, :, :seen], self.slots.flatten()

        def attend(block: int, q: Tensor, kv: Tensor) -> Tensor:
            self.cache[block].view(-1, C).index_copy_(0, slots, kv.reshape(-1, C))
            keys, values = self.cache[block].view(2, B * K, size, C)[:, :, :seen].unbind()
            # One query a head: two products of batches, which need less set-up than a fused kernel.
            queries = q.reshape(B * K, H // K, C)
            scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=C**-0.5)
            return torch.bmm(scores.softmax(dim=-1), values)

        rotation = self.rotation.index_select(1, self.lengths).unsqueeze(2)
        hidden = self._forward(tokens[:, None], rotation, attend)
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
        _, B, K, size, _ = self.cache[0].shape
        self.lengths, self.longest = lengths, longest
        first = torch.arange(2 * B * K, device=lengths.device).view(2, B, K).transpose(0, 1) * size
        self.slots = first + lengths[:, None, None]
        unseen = torch.arange(size, device=lengths.device) >= lengths[:, None]
        mask = torch.zeros(B, size, device=lengths.device, dtype=self.dtype)
        mask = mask.masked_fill_(unseen, -torch.inf).repeat_interleave(K, dim=0)
        self.mask = mask[:, None]

    def _forward(
        self, tokens: Int[Tensor, "B T"], rotation: Float[Tensor, "2 *positions 1 C"], attend: Attend
    ) -> Float[Tensor, "B*T D"]:
        """The states behind the last norm, without its weight.

        `attend(block, q, kv)` gets [B, T, H, C] and [B, T, 2K, C] and gives back H·C numbers a token.
        """
        (B, T), (H, K), (cos, sin) = tokens.shape, self.heads, rotation.unbind()
        floor, head_floor = self.floors
        x = F.embedding(tokens.flatten(), self.embedding).to(self.dtype)
        for number, block in enumerate(self.blocks):
            qkv = torch.mm(_unit(x, floor), block.qkv).view(B, T, H + 2 * K, -1)
            qk, v = qkv.split_with_sizes((H + K, K), dim=2)
            if block.qk_norm is not None:
                qk = _unit(qk, head_floor) * block.qk_norm
            # (a, b) turns to (a cos - b sin, b cos + a sin); the table of sines has the minus.
            qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
            q, k = qk.split_with_sizes((H, K), dim=2)
            seen = attend(number, q, torch.cat((k, v), dim=2)).reshape(B * T, -1)
            x = torch.addmm(x, seen, block.out)
            gate, up = torch.mm(_unit(x, floor), block.gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate).mul_(up), block.down)
        return _unit(x, floor)


def _unit(x: Float[Tensor, "... width"], floor: Float[Tensor, ""]) -> Float[Tensor, "... width"]:
    """x / sqrt(|x|² + floor²): RMSNorm but for a factor sqrt(width), which is in the weights behind.

    With floor² = width · eps. F.rms_norm is eight operations on a CPU, this is three.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=floor.dtype)
    return (x / length.hypot_(floor)).to(x.dtype)
