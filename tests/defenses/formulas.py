"""The terms that losses and attacks are made of, after section 2 of the methods specification."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """CE, mean over the batch."""
    return -torch.log_softmax(logits, 1)[torch.arange(len(y)), y].sum() / len(y)


def soft_cross_entropy(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """CEsoft(p, q) of section 2: minus sum of p log q over the classes, mean over the batch."""
    p = torch.softmax(p_logits / temperature, 1)
    return -(p * torch.log_softmax(q_logits / temperature, 1)).sum() / len(p)


def kl_rows(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q)_i of section 2: sum over the classes, one number per image; nothing detached."""
    log_p = torch.log_softmax(p_logits / temperature, 1)
    log_q = torch.log_softmax(q_logits / temperature, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kl_batchmean(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KLb(p || q) of section 2: mean of kl_rows over the batch."""
    return kl_rows(p_logits, q_logits, temperature).sum() / len(p_logits)


def kl_mean(p_logits: Tensor, q_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KLm = KLb / C of sections 1.2 and 2: mean over batch and classes."""
    return kl_batchmean(p_logits, q_logits, temperature) / p_logits.shape[1]


def of_label(logits: Tensor, y: Tensor) -> Tensor:
    """The probability of the label, (N,)."""
    return torch.softmax(logits, 1)[torch.arange(len(y)), y]
