"""What tests of losses share: walks over logits in other sizes, small blocks, rows under other strides."""

from dataclasses import replace

import pytest
import torch

from kernels import losses

IMPLS = ("torch", "triton")
# Losses, values and gradients of size ten or so, from float32 sums of a few hundred terms; and in float64.
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-11}


def planned(patch, **changes):
    """The walk over logits with other sizes."""
    patch.setattr(losses, "PLANS", {name: replace(plan, **changes) for name, plan in losses.PLANS.items()})


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Blocks of 128 bytes, so that a hundred tokens are several blocks and most rows begin inside one.

    And no logits are so few that they are kept.
    """
    rows_triton = pytest.importorskip("kernels.rows_triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_triton, "LANES", 4)
        planned(patch, kept=0)
        yield


def lay_out(x, layout):
    """x under other strides; "columns": rows apart by more than their length; "stride 0": all the first."""
    if layout == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "columns":
        return torch.cat([x[:, :1], x, x[:, :2]], 1)[:, 1 : 1 + x.shape[1]]
    return x[:1].expand_as(x) if layout == "stride 0" else x


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
