"""Weights, gradients and optimizer state cut among the processes of a run: torch's FSDP2, block by block.

    fully_shard      of every n-th weight matrix a process holds some rows, in float32 (a DTensor)
    forward          a block's weights are gathered before it computes, in the precision that it computes in,
                     and let go after it; the backward pass gathers them once more
    gradients        are summed over the processes in float32, and each keeps those of its rows
    an optimizer     updates its rows; Muon gathers a matrix to orthogonalise it

The embedding, the output matrix and the last norm are gathered in float32: a gradient of theirs is a sum over
many tokens. All processes gather together, so all must make the same number of forward passes (Runtime.even).

Left out: cutting along other axes than the first (tensor parallelism), weights moved to the CPU between uses.
Sources: Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), stage 3; recomputed activations, Chen et al. 2016
(arXiv 1604.06174).
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from minillm.io.weights import whole_tensor
from minillm.run import Runtime


class ShardedRuntime(Runtime):
    """Each process keeps a part of the weights, gradients and optimizer state, and no more."""

    opens_on = torch.device("cpu")

    def shard(self, model: nn.Module, compiled: bool = False) -> bool:
        trunk = cast(Any, model.model)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
        for block in trunk.layers:
            if compiled:
                block.compile()
            policy = MixedPrecisionPolicy(param_dtype=trunk.compute_dtype, reduce_dtype=torch.float32)
            fully_shard(block, mp_policy=policy, **how)
        fully_shard(model, **how)
        if hasattr(model, "logits"):
            register_fsdp_forward_method(model, "logits")
        return True

    def even(self, parts: list[Any], idle: Any) -> list[Any]:
        most = self.largest(torch.tensor(float(len(parts)), device=self.device))
        return parts + [idle] * (int(most.item()) - len(parts))

    def whole(self, part: Any) -> Any:
        """A tensor gathered from all processes; or a copy of a model with all weights, in the precision that
        it computes in."""
        if isinstance(part, Tensor):
            return whole_tensor(part)
        config, dtype, device = part.config, part.model.compute_dtype, self.device
        with torch.device("meta"):
            copy = type(part)(config, dtype)
        # The scalar head computes in the precision of its weights, whatever the trunk's is.
        weights = {
            name: whole_tensor(weight.detach()).to(device, weight.dtype if name == "score.weight" else dtype)
            for name, weight in part.named_parameters()
        }
        copy.load_state_dict(weights, strict=False, assign=True)
        for name, buffer in part.named_buffers():
            owner, _, last = name.rpartition(".")
            setattr(copy.get_submodule(owner), last, buffer)
        if config.tie_word_embeddings and hasattr(copy, "lm_head"):
            copy.lm_head.weight = copy.model.embed_tokens.weight
        return copy.requires_grad_(False)


def recompute_blocks(model: nn.Module) -> None:
    """Lets the backward pass compute each block's activations anew: only the blocks' inputs are kept."""
    for block in cast(Any, model.model).layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
