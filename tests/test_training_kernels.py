"""A whole model trained through the Triton kernels follows the one trained through PyTorch."""

import math

import pytest
import torch
from runs import document_starts

import kernels.attention
import kernels.losses
from minillm.data import Batch
from minillm.model import LanguageModel, ModelConfig, initialize
from minillm.optim import LearningRates, backward, build_optimizers
from minillm.run import Runtime

SHAPE = ModelConfig(
    vocab_size=45, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, max_position_embeddings=40,
)  # fmt: skip


def packed_batches(count: int) -> list[Batch]:
    """Rows of documents of several lengths, some targets ignored."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, 45, (2, 19), generator=generator)
        targets = tokens.roll(-1, dims=1).masked_fill(torch.rand(2, 19, generator=generator) < 0.2, -100)
        batches.append(Batch(tokens, targets, document_starts(tokens, 0)))
    return batches


def trained(impl: str, device: str, steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of some steps through one version of the kernels, and the weights behind them."""
    model = LanguageModel(SHAPE)
    initialize(model, torch.Generator().manual_seed(1))
    model.to(device)
    rates = LearningRates(matrix=3e-3, embedding=1e-2, norm=1e-3, weight_decay=0.0)
    optimizers, here = build_optimizers(model, rates, "adamw"), Runtime(torch.device(device), torch.float32)
    losses, used = [], []

    def chosen(*_) -> str:
        used.append(impl)
        return impl

    with pytest.MonkeyPatch.context() as patch:
        for module in (kernels.attention, kernels.losses):
            patch.setattr(module, "check", chosen)
        for batch in packed_batches(steps):
            losses.append(backward(model, batch, 19, here).item())
            optimizers.step(1.0, math.inf)
    # Attention and the loss, in both micro-batches of every step.
    assert len(used) == steps * 2 * 2
    return losses, {name: weight.detach().cpu() for name, weight in model.state_dict().items()}


def test_steps_through_triton_follow_the_losses_and_weights_of_pytorch(device):
    losses, weights = trained("triton", device)
    expected_losses, expected_weights = trained("torch", device)
    assert losses[-1] < losses[0] and losses == pytest.approx(expected_losses, rel=1e-5)
    for name, weight in weights.items():
        # AdamW divides by the root of what was seen: where gradients are of the size of float32's rounding,
        # a step of 1e-2 can turn, and it does in few weights.
        far = (weight - expected_weights[name]).abs() > 1e-4
        assert far.float().mean() < 0.01, name
