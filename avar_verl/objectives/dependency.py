# SPDX-License-Identifier: Apache-2.0
"""Visual dependency: how much more likely a response is with its image than with a corrupted one.

    d(t) = clip(log p(y_t | x, image) - log p(y_t | x, corrupted image), -5, 5)
    r_dependency = mean_{t in T} d(t)

T are the response tokens y, x everything before them, p the policy at the temperature of the rollouts. Attention
measures where a model looks, this measures whether it uses what it sees. It needs neither a system turn nor image
tokens, so it is defined for every family.

The same comparison, as the KL divergence of the two predictions, weighs tokens in VPPO (arXiv 2510.09285) and PGPO
(arXiv 2604.01840). Here it is of the tokens that were written, in nats, and clipped: one token whose probability
vanishes without the image must not decide a response.

Shape suffixes: B = samples, T = positions; the mask is 1 on response tokens
"""

import torch

CORRUPTIONS = ("blank", "swap")
CLAMP = 5.0


def token_dependency(log_probs: torch.Tensor, corrupted_log_probs: torch.Tensor) -> torch.Tensor:
    """d(t) of every token, in nats, in [-5, 5]; (...) each, nan where a log-probability is.

    Negative where the image makes the token less likely.

    >>> token_dependency(torch.tensor([-0.5, -1.0, -0.1]), torch.tensor([-2.5, -0.5, -9.0]))
    tensor([ 2.0000, -0.5000,  5.0000])
    """
    return (log_probs - corrupted_log_probs).clamp(-CLAMP, CLAMP)


def mean_dependency(dependency_BT: torch.Tensor, response_mask_BT: torch.Tensor) -> torch.Tensor:
    """r_dependency, (B, T) and (B, T) -> (B,), in [-5, 5]: the mean of d over the response tokens.

    nan for a sample without response tokens. 0 for a sample without an image, since nothing of it is corrupted.

    >>> mean_dependency(torch.tensor([[2.0, -0.5, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([0.7500])
    """
    mask_BT = response_mask_BT.bool()
    return dependency_BT.where(mask_BT, 0.0).sum(-1) / mask_BT.sum(-1)


def dependency_weights(dependency_BT: torch.Tensor, response_mask_BT: torch.Tensor) -> torch.Tensor:
    """Weights of the advantages of tokens, (B, T) and (B, T) -> (B, T), >= 0, with mean 1 over a response.

        w(t) = max(d(t), 0) / mean_{t in T} max(d(t), 0)

    1 everywhere in a response in which no token depends on the image; 0 outside responses.

    Raises:
        ValueError: a dependency of a response token that is nan.

    >>> dependency_weights(torch.tensor([[3.0, -2.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 4.0]]), torch.tensor([[1, 1, 1, 1],
    ...     [1, 1, 1, 0]]))
    tensor([[3., 0., 1., 0.],
            [1., 1., 1., 0.]])
    """
    mask_BT = response_mask_BT.bool()
    undefined_BT = dependency_BT.isnan() & mask_BT
    if bool(undefined_BT.any()):
        raise ValueError(
            "weights need a log-probability of every response token; got nan at (sample, position) "
            f"{undefined_BT.nonzero().tolist()}. Look for nan in the policy's logits."
        )
    floored_BT = dependency_BT.clamp(min=0).where(mask_BT, 0.0)
    mean_B1 = mean_dependency(floored_BT, mask_BT)[:, None]
    return torch.where(mean_B1 > 0, floored_BT / mean_B1, mask_BT.to(dependency_BT.dtype))
