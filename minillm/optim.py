"""Which optimizer moves which weights, and how far at each step.

The matrices inside the blocks go to Muon (torch.optim.Muon: momentum, then the nearest orthogonal
matrix by five Newton-Schulz steps); the embedding, the output matrix and the norms go to AdamW.
`optimizer="adamw"` gives everything to AdamW.

    learning rate(step) = base · warm-up(step) · decay(step)

Left out: per-layer rates, schedules other than linear. Sources: Muon, Jordan et al. 2024
(kellerjordan.github.io/posts/muon); AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LearningRates:
    """Base learning rates, and what else the two optimizers ask for."""

    matrix: float
    """Of the matrices inside the blocks: Muon's, or AdamW's where that is the only optimizer."""
    embedding: float
    """Of the embedding and the output matrix or scalar head, by AdamW."""
    norm: float
    """Of the RMSNorm weights, by AdamW."""
    weight_decay: float
    """Decoupled, on the matrices inside the blocks only."""


STATE_NAMES = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}
"""What each optimizer remembers of a weight: the step's number, or a tensor of the weight's shape."""


class Optimizers:
    """Several torch optimizers driven as one."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        for group in self.groups():
            group["base_rate"] = group["lr"]

    def groups(self) -> Iterable[dict]:
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups() for parameter in group["params"]]

    def step(self, multiplier: float) -> None:
        """One update at `multiplier` times the base rates; the gradients are cleared after it."""
        for group in self.groups():
            group["lr"] = multiplier * group["base_rate"]
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state, flat: "<optimizer>.<parameter>.<name>" → tensor. The rates are not state."""
        return {
            f"{i}.{j}.{name}": value
            for i, optimizer in enumerate(self.optimizers)
            for j, entries in optimizer.state_dict()["state"].items()
            for name, value in entries.items()
        }

    def moved(self) -> list[int]:
        """Which optimizers have moved weights: the others have no state yet."""
        return [i for i, optimizer in enumerate(self.optimizers) if optimizer.state]

    def load_state_tensors(self, tensors: dict[str, Tensor], moved: Sequence[int]) -> None:
        """Takes over what `state_tensors` gave; ValueError unless it is the state of all that had `moved`."""
        shapes = self._state_shapes().items()
        expected = {key: shape for key, shape in shapes if int(key.split(".")[0]) in moved}
        if {key: value.shape for key, value in tensors.items()} != expected:
            raise ValueError("not the state of these optimizers")
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for key, value in tensors.items():
            i, j, name = key.split(".", 2)
            states[int(i)].setdefault(int(j), {})[name] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _state_shapes(self) -> dict[str, torch.Size]:
        """The names and shapes of all state, once the first step has made it."""
        shapes = {}
        for i, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for j, parameter in enumerate(parameters):
                for name in STATE_NAMES[type(optimizer)]:
                    shapes[f"{i}.{j}.{name}"] = torch.Size() if name == "step" else parameter.shape
        return shapes


def build_optimizers(
    model: nn.Module, rates: LearningRates, optimizer: str = "muon", eps: float = 1e-10
) -> Optimizers:
    """Every parameter of the model in exactly one group. `optimizer` is "muon" or "adamw", `eps` Adam's."""
    matrices, embeddings, norms = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            norms.append(parameter)
        elif ".layers." in name:
            matrices.append(parameter)
        else:
            embeddings.append(parameter)
    groups = [
        {"params": embeddings, "lr": rates.embedding, "weight_decay": 0.0},
        {"params": norms, "lr": rates.norm, "weight_decay": 0.0},
    ]
    blocks = {"params": matrices, "lr": rates.matrix, "weight_decay": rates.weight_decay}
    adamw: dict[str, Any] = {"betas": (0.9, 0.95), "eps": eps, "fused": True}
    if optimizer == "adamw":
        return Optimizers([torch.optim.AdamW([*groups, blocks], **adamw)])
    return Optimizers([torch.optim.Muon([blocks], momentum=0.95), torch.optim.AdamW(groups, **adamw)])


def lr_schedule(step: int, steps: int, warmup: int, decay: float) -> float:
    """The share of the base rates at `step` of 0 … steps-1.

    Rises linearly over the first `warmup` steps, stays at 1, and falls linearly towards 0 over the
    last share `decay` of the run; the last step still moves.
    """
    rise = min(1.0, (step + 1) / (warmup + 1))
    fall = min(1.0, (steps - step) / max(1.0, decay * steps))
    return rise * fall


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scales all gradients down to a common norm of at most `largest`; returns the norm before."""
    return nn.utils.clip_grad_norm_(parameters, largest, foreach=True).item()
