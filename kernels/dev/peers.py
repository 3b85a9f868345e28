"""The operations of this folder as others compute them: what bench.py measures the kernels against.

Plain PyTorch says what an operation is in a few lines. The libraries are imported where they run: each
function that makes one's version raises ImportError where it is not installed.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Plain PyTorch, with softmaxes in float32 or better --------------------------------------------


def exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def plain_attention(q, k, v, start=None):
    T, S = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    key = torch.arange(S, device=q.device)
    seen = key <= torch.arange(S - T, S, device=q.device)[:, None]
    if start is not None:
        seen = (seen & (key >= start[:, :, None]))[:, None]
    z = exact(q @ k.mT) * q.shape[3] ** -0.5
    return z.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v


def plain_token_logprobs(logits, targets, temperature=1.0):
    log_p = (exact(logits) / temperature).log_softmax(1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def plain_kl(p, q):
    log_p, log_q = exact(p).log_softmax(1), exact(q).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def over_products(operation: Callable, *operands: Tensor, sides: int = 1, **rest):
    """An operation on logits, from hidden states and a weight for each of its sides."""
    pairs = zip(operands[: 2 * sides : 2], operands[1 : 2 * sides : 2], strict=True)
    return operation(*(hidden @ weight.T for hidden, weight in pairs), *operands[2 * sides :], **rest)


PLAIN: dict[str, Callable] = {
    "attention": plain_attention,
    "cross_entropy": lambda logits, targets: F.cross_entropy(exact(logits), targets),
    "token_logprobs": plain_token_logprobs,
    "kl": plain_kl,
}
LOGITS = ("cross_entropy", "token_logprobs", "kl")
LINEAR = tuple(f"linear_{name}" for name in LOGITS)
PLAIN |= {f"linear_{n}": partial(over_products, PLAIN[n], sides=1 + (n == "kl")) for n in LOGITS}

# --- Libraries ------------------------------------------------------------------------------------

Makers = dict[str, Callable[[], Callable]]  # library -> what imports it and gives a function of the operands


def attention_peers(start, window: int | None, grouped: bool) -> Makers:
    """Fused attention on a GPU. `start` [B, T] holds documents or a window; None is causal, or one query."""
    backends = ("flash", "cudnn", "efficient")
    found: Makers = {f"SDPA {name}": partial(sdpa, name, start, grouped) for name in backends}
    found["flex_attention"] = partial(flex, start, grouped)
    documents = start is not None and not window
    for name, package in (("flash-attn 2", "flash_attn"), ("flash-attn 4", "flash_attn.cute")):
        found[name] = partial(flash_attn, package, start if documents else None, window)
    return found


def sdpa(backend: str, start, grouped: bool) -> Callable:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(q, k, v):
        causal = mask is None and q.shape[2] > 1
        with sdpa_kernel(SDPBackend[f"{backend.upper()}_ATTENTION"]):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)

    mask = None
    if start is not None:
        key = torch.arange(start.shape[1], device=start.device)
        mask = ((key >= start[:, :, None]) & (key <= key[:, None]))[:, None]
    return run


def flex(start, grouped: bool) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(b, h, t, s):
        return s <= t if start is None else (s <= t) & (s >= start[b, t])

    def run(q, k, v):
        B, T, S = q.shape[0], q.shape[2], k.shape[2]
        if T > 1 and not masks:  # in the first run, which is not timed
            masks.append(create_block_mask(visible, B, None, T, S, device=q.device))
        return fused(q, k, v, block_mask=masks[0] if masks else None, enable_gqa=grouped)

    fused = torch.compile(flex_attention)
    masks: list = []
    return run


def flash_attn(package: str, documents, window: int | None) -> Callable:
    """Documents of all rows, by their starts [B, T], are one list of sequences of different lengths."""
    module, options = import_module(package), {"window_size": (window - 1, 0)} if window else {}

    def whole(q, k, v):
        out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    if documents is None:
        return whole
    B, T = documents.shape
    first = (documents == torch.arange(T, device=documents.device)).flatten().nonzero()[:, 0]
    edges = F.pad(first, (0, 1), value=B * T).to(torch.int32)
    longest = int(edges.diff().max())
    lengths = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def apart(q, k, v):
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        out = module.flash_attn_varlen_func(*rows, causal=True, **lengths)
        return (out[0] if isinstance(out, tuple) else out).unflatten(0, (B, T)).transpose(1, 2)

    return apart


def row_peers(operation: str, targets) -> Makers:
    """Those who have an operation on rows; without a GPU only torch, which has one since 2.13."""
    found: Makers = {}
    if operation == "linear_cross_entropy":
        found["torch in chunks"] = lambda: partial(
            F.linear_cross_entropy, target=targets, options=torch.nn.LinearCrossEntropyOptions()
        )
    for of, name, module, function, keyword in ROWS:
        if targets.is_cuda and of == operation:
            found[name] = partial(_imported, module, function, **{keyword: targets})
    return found


def _imported(module: str, function: str, **options) -> Callable:
    return partial(getattr(import_module(module), function), **options)


LIGER = "liger_kernel.transformers.functional"
ROWS = (  # operation, library, module, function, and its word for targets
    ("cross_entropy", "liger-kernel", LIGER, "liger_cross_entropy", "target"),
    ("cross_entropy", "quack-kernels", "quack.cross_entropy", "cross_entropy", "target"),
    ("linear_cross_entropy", "liger-kernel", LIGER, "liger_fused_linear_cross_entropy", "target"),
    ("linear_cross_entropy", "quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy",
     "target"),
    ("linear_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", "targets"),
)  # fmt: skip
