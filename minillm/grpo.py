"""GRPO: PPO without a critic, a response's advantage being how much better it scored than its siblings.

Several responses to one prompt make a group. All tokens of a response share its advantage, and the KL to
the reference is a term of the loss instead of the reward. Ratio, clip and rollout are PPO's (ppo.py).

Left out: the mean over each response first, which favours tokens of short ones (Liu et al. 2025,
arXiv 2503.20783): here all tokens of a minibatch weigh the same.
Method: Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300), section 4.1 and equations 3 and 4.
"""

from jaxtyping import Float
from torch import Tensor

from minillm.ppo import policy_losses


def group_advantages(scores: Float[Tensor, " B"], group: int, eps: float = 1e-4) -> Float[Tensor, " B"]:
    """(score - mean of its group) / (deviation of its group + ε); a group's responses lie side by side.

    They sum to 0 in every group, and are 0 where all of it scored alike.
    """
    groups = scores.view(-1, group)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + eps)).flatten()


def grpo_losses(
    logprobs: Float[Tensor, " N"],
    old_logprobs: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    kl: Float[Tensor, " N"],
    clip: float,
    beta: float,
) -> Float[Tensor, " N"]:
    """PPO's clipped loss of every token and β times its KL, equation 3 with its sign turned.

    `kl` carries a gradient: `ppo.k2` or `ppo.k3` of the log-probabilities, or the exact one.
    """
    return policy_losses(logprobs, old_logprobs, advantages, clip) + beta * kl
