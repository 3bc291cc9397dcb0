"""What a trial found out about a subnet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quality:
    """`kl` in nats per token; `perplexity` of the next token within each window; `tokens` read; `seconds` taken.

    KL is the mean over positions of KL(full fp32 model || subnet). `task_loss` is that of the tasks that a search goes
    by in place of KL, see `nas.tasks.ChoiceLoss`; None where it goes by KL.
    """

    kl: float
    perplexity: float
    tokens: int
    seconds: float
    task_loss: float | None = None

    @property
    def loss(self) -> float:
        """What a search minimises."""
        return self.kl if self.task_loss is None else self.task_loss
