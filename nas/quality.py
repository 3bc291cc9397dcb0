"""What a trial found out about a subnet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quality:
    """`kl` in nats per token; `perplexity` of the next token within each window; `tokens` positions; `seconds` taken.

    KL is the mean over positions of KL(full fp32 model || subnet).
    """

    kl: float
    perplexity: float
    tokens: int
    seconds: float
