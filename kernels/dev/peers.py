"""The operations of the folder above, and as others compute them: what bench.py measures the kernels against.

Plain PyTorch says what an operation is in a few lines. The libraries are imported where they run: what makes
one's version of an operation raises ImportError, in its first run at the latest, where it is not installed.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import losses
from kernels.attention import attention
from minillm.tools.streams import tables

TABLE: dict[str, Any] = tables(__file__)
Peers = dict[str, Callable]  # who computes it -> a function of the operands

# --- Plain PyTorch, with softmaxes in float32 or better --------------------------------------------


def exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def plain_attention(q, k, v, start=None):
    T, S = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    z = exact(q @ k.mT) * q.shape[3] ** -0.5
    return z.masked_fill(~visible(start, T, S, q.device), float("-inf")).softmax(-1).to(v.dtype) @ v


def visible(start, T: int, S: int, device) -> Tensor:
    """The keys that each of the last T of S tokens sees: those behind it, from `start` [B, T] on."""
    key = torch.arange(S, device=device)
    seen = key <= torch.arange(S - T, S, device=device)[:, None]
    return seen if start is None else (seen & (key >= start[:, :, None]))[:, None]


def plain_cross_entropy(logits, targets):
    return F.cross_entropy(exact(logits), targets)


def plain_token_logprobs(logits, targets, temperature=1.0):
    log_p = (exact(logits) / temperature).log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def plain_kl(p, q):
    log_p, log_q = exact(p).log_softmax(1), exact(q).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def over_products(operation: Callable, *operands: Tensor, **rest):
    """An operation on logits, from the hidden states and the weight of each."""
    pairs = zip(operands[::2], operands[1::2], strict=True)
    return operation(*(hidden @ weight.T for hidden, weight in pairs), **rest)


# Ours, and plain PyTorch.
OPERATIONS: dict[str, tuple[Callable, Callable]] = {
    "attention": (attention, plain_attention),
    "cross_entropy": (losses.cross_entropy, plain_cross_entropy),
    "token_logprobs": (losses.token_logprobs, plain_token_logprobs),
    "kl": (losses.kl, plain_kl),
    "linear_cross_entropy": (losses.linear_cross_entropy, partial(over_products, plain_cross_entropy)),
    "linear_token_logprobs": (losses.linear_token_logprobs, partial(over_products, plain_token_logprobs)),
    "linear_kl": (losses.linear_kl, partial(over_products, plain_kl)),
}

# --- Everybody ------------------------------------------------------------------------------------


def contestants(operation: str, operands: tuple[Tensor, ...], **rest: Any) -> Peers:
    """All who have an operation, ours first; without a GPU only torch's own, of which one came in 2.13."""
    ours, plain = (partial(function, **rest) for function in OPERATIONS[operation])
    found: Peers = {"minillm": ours, "plain PyTorch": plain}
    on_gpu = operands[0].is_cuda
    if on_gpu and operation == "attention":
        return found | attention_peers(*operands[:2], **rest)
    if on_gpu:
        found["torch.compile"] = torch.compile(plain)
    if operation == "linear_cross_entropy":
        found["torch in chunks"] = lambda hidden, weight: F.linear_cross_entropy(
            hidden, weight, rest["targets"], options=torch.nn.LinearCrossEntropyOptions()
        )
    for of, library, module, function, keyword in TABLE["libraries"]:
        if on_gpu and of == operation:
            found[library] = partial(imported, module, function, {keyword: rest["targets"]})
    return found


def attention_peers(q: Tensor, k: Tensor, start: Tensor | None) -> Peers:
    """Fused attention on a GPU, causal or of a single query. `start` [B, T] holds the documents in a row."""
    (B, H, T, _), (K, S) = q.shape, k.shape[1:3]
    mask = None if start is None else visible(start, T, S, q.device)

    def seen(b, h, t, s):
        return s <= t if start is None else (s <= t) & (s >= start[b, t])

    blocks = create_block_mask(seen, B, None, T, S, device=q.device) if T > 1 else None
    options = {"attn_mask": mask, "is_causal": mask is None and T > 1, "enable_gqa": H != K}
    found: Peers = {
        f"SDPA {name}": partial(sdpa, getattr(SDPBackend, f"{name.upper()}_ATTENTION"), options)
        for name in ("flash", "cudnn", "efficient")
    }
    found["flex_attention"] = partial(torch.compile(flex_attention), block_mask=blocks, enable_gqa=H != K)
    return found


def sdpa(backend: SDPBackend, options: dict, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **options)


def imported(module: str, function: str, options: dict, *operands: Tensor):
    return getattr(import_module(module), function)(*operands, **options)
