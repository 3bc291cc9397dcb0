"""Losses over a large vocabulary, some positions at a time: logits and their gradients are never all there.

Shapes: hidden [M, D] what the head reads, head [V, D]. The head is frozen, so the gradient of hidden can be made in the
forward pass, where the logits are at hand: (softmax(logits) - wanted) head / M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: 64 x a vocabulary of 50,000 x 4 bytes: the few matrices of 13 MB stay in the processor's cache.
_ROWS_AT_ONCE = 64

#: Of logits [m, V] of the rows from `first` on: their losses [m] and the probabilities wanted, [m, V] in place of
#: softmax's labels.
_Wanted = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def kl_to_teacher(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    dtype: torch.dtype,
    cap: float = 0.0,
) -> torch.Tensor:
    """Mean KL(teacher || student) in nats over M positions; products of logits are in `dtype`.

    Logits of both are c tanh(x / c), c being `cap`, where that is not 0.
    """
    return _mean_loss(hidden, head, _as_teacher(teacher, teacher_head, dtype, cap), dtype, cap)


def next_token_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype, cap: float = 0.0
) -> torch.Tensor:
    """Mean negative log-likelihood of `targets` [M]."""
    return _mean_loss(hidden, head, _as_text(targets), dtype, cap)


def half_of_each(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    cap: float = 0.0,
) -> torch.Tensor:
    """The mean of both losses, of one product with the head (Hinton et al., arXiv 1503.02531, at temperature 1)."""
    losses = _as_teacher(teacher, teacher_head, dtype, cap), _as_text(targets)

    def wanted(first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (kl, probabilities), (nll, certain) = (loss(first, logits) for loss in losses)
        return kl.add_(nll).div_(2), probabilities.add_(certain).div_(2)

    return _mean_loss(hidden, head, wanted, dtype, cap)


def _as_teacher(teacher: torch.Tensor, teacher_head: torch.Tensor, dtype: torch.dtype, cap: float) -> _Wanted:
    def wanted(first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = _logits(teacher[first : first + len(logits)], teacher_head, dtype, cap)
        difference = p - logits
        log_p_sum, log_q_sum = p.logsumexp(-1), logits.logsumexp(-1)
        p.sub_(log_p_sum.unsqueeze(-1)).exp_()
        return torch.linalg.vecdot(p, difference) - log_p_sum + log_q_sum, p

    return wanted


def _as_text(targets: torch.Tensor) -> _Wanted:
    def wanted(first: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = targets[first : first + len(logits), None]
        likelihoods = logits.log_softmax(-1).gather(-1, rows).squeeze(-1)
        return -likelihoods, torch.zeros_like(logits).scatter_(-1, rows, 1.0)

    return wanted


def _mean_loss(
    hidden: torch.Tensor, head: torch.Tensor, wanted: _Wanted, dtype: torch.dtype, cap: float
) -> torch.Tensor:
    return _HeadLoss.apply(hidden, head, wanted, dtype, cap)  # type: ignore[no-any-return, no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, wanted: _Wanted, dtype: torch.dtype, cap: float
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        losses = torch.empty(len(hidden), device=hidden.device)
        for first in range(0, len(hidden), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            logits = _logits(hidden[rows], head, dtype, cap)
            losses[rows], probabilities = wanted(first, logits)
            difference = logits.softmax(-1).sub_(probabilities)
            if cap:  # the slope of c tanh(x / c)
                difference -= difference * (logits / cap).square_()
            gradient[rows] = _product(difference, head, dtype)
        ctx.save_for_backward(gradient.div_(len(hidden)))
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None, None, None


def _logits(hidden: torch.Tensor, head: torch.Tensor, dtype: torch.dtype, cap: float) -> torch.Tensor:
    return capped(_product(hidden, head.T, dtype), cap)


def capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """c tanh(x / c) in place of x, c being `cap`, where that is not 0."""
    return logits.div_(cap).tanh_().mul_(cap) if cap else logits


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return (a.to(dtype) @ b.to(dtype)).float()
