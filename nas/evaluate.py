"""How much worse a subnet is: KL divergence from the full model, and perplexity, on fixed token windows.

Shapes: N windows of T tokens, D hidden size, V vocabulary, M = N x T / stride positions. KL is in nats per token,
mean over positions of sum_v p_v (log p_v - log q_v) with p the full fp32 model's distribution and q the subnet's.
"""

from __future__ import annotations

import math
import time

import torch

from hw_profiles.shapes import NARROW_HEAD_BITS, Precision
from nas.arithmetic import computing, fast_dtype
from nas.distillation import capped
from nas.quality import Quality
from nas.subnet import Part, Size, Subnet
from nas.supernet import Supernet

_TOKENS_AT_ONCE = 8192
#: Positions whose logits are in memory together; more of them leave the processor's cache and take twice as long.
_LOGITS_AT_ONCE = 64
#: The teacher's logits are kept where they take no more than this; otherwise they are made anew for each subnet.
_KEPT_LOGITS_BYTES = 2**29


class Evaluator:
    """Evaluates subnets on token windows [N, T]; the same subnet gives the same floats on the same machine.

    Matrix products run in `dtype`, by default bfloat16 where the processor has it; teacher and subnets alike.
    Distributions are compared at every `stride`-th position of a window; neighbours have much in common, and the head
    takes a quarter of the time. Single parts are scored on the first `score_windows` alone, by default on all.
    """

    def __init__(
        self,
        supernet: Supernet,
        windows: torch.Tensor,
        dtype: torch.dtype | None = None,
        score_windows: int | None = None,
        stride: int = 1,
    ) -> None:
        self.supernet = supernet
        self.windows = windows
        self.score_windows = score_windows
        self.stride = stride
        self.dtype = dtype or fast_dtype()
        self._inputs: list[torch.Tensor] = []  # of `score_windows`: the full model's states entering each layer
        with torch.no_grad(), computing(self.dtype):
            supernet.activate_full_model()
            self._teacher = self._read_by_head(self._run(supernet.loaded.embed(windows), 0))
            self._teacher_head = supernet.loaded.head.weight.detach()
            self._teacher_logits = self._keep_logits()
            self._teacher_log_sums = self._log_sums()

    def evaluate(self, subnet: Subnet) -> Quality:
        """KL and perplexity of one subnet, which is left active."""
        start = time.perf_counter()
        self.supernet.activate(subnet)
        return self._evaluate_active(start)

    def evaluate_full_model(self) -> Quality:
        """The same of the model as it was loaded."""
        start = time.perf_counter()
        self.supernet.activate_full_model()
        return self._evaluate_active(start)

    def _evaluate_active(self, start: float) -> Quality:
        with torch.no_grad(), computing(self.dtype):
            kl, nll = self._compare(self._run(self.supernet.loaded.embed(self.windows), 0))
        return Quality(kl, math.exp(nll), self.windows.numel(), time.perf_counter() - start)

    def block_kl(self, layer: int, part: Part, choice: Size, precision: Precision = "fp32") -> float:
        """KL of the full fp32 model with one part of one layer at `choice` and `precision`; runs layers from there."""
        supernet = self.supernet
        supernet.activate_full_model()
        with torch.no_grad(), computing(self.dtype):
            if not self._inputs:
                self._inputs = self._entering(self.windows[: self.score_windows])
            supernet.activate_part(layer, part, choice, precision)
            kl, _ = self._compare(self._run(self._inputs[layer], layer))
        supernet.activate_full_model()
        return kl

    def narrow_head_kl(self) -> float:
        """KL of the full fp32 model with its head alone at NARROW_HEAD_BITS, on all windows."""
        supernet = self.supernet
        supernet.activate_full_model()
        with torch.no_grad(), computing(self.dtype):
            hidden = self._run(supernet.loaded.embed(self.windows), 0)
            supernet.ends.activate("fp32", NARROW_HEAD_BITS)
            kl, _ = self._compare(hidden)
        supernet.activate_full_model()
        return kl

    def entering(self, subnet: Subnet) -> list[torch.Tensor]:
        """The residual stream [N, T, D] before each layer of `subnet`, which is left active."""
        self.supernet.activate(subnet)
        with torch.no_grad(), computing(self.dtype):
            return self._entering(self.windows)

    def kl_from(self, layer: int, hidden: torch.Tensor) -> float:
        """KL of what is active, from the residual stream before a layer on."""
        with torch.no_grad(), computing(self.dtype):
            return self._compare(self._run(hidden, layer))[0]

    def reformation_error(self, layer: int, part: Part, choice: Size) -> float:
        """Share of the part's output energy that `choice`, short of full, loses on the calibration text."""
        return self.supernet.plan(layer, part).errors[choice] if choice else 1.0

    def _entering(self, windows: torch.Tensor) -> list[torch.Tensor]:
        entering, hidden = [], self.supernet.loaded.embed(windows)
        for layer in range(self.supernet.space.depth):
            entering.append(hidden)
            hidden = self._run(hidden, layer, layer + 1)
        return entering

    def _run(self, hidden: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor:
        """Hidden states [N, T, D] through layers start..stop, layer by layer, so that each weight is cast once."""
        rows = max(1, _TOKENS_AT_ONCE // self.windows.shape[1])
        for layer in range(start, self.supernet.space.depth if stop is None else stop):
            batches = [self.supernet.loaded.run_layer(layer, batch) for batch in torch.split(hidden, rows)]
            hidden = batches[0] if len(batches) == 1 else torch.cat(batches)
        return hidden

    def _read_by_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Where it is compared, [M, D], in the precision in which the head reads it."""
        return self.supernet.loaded.final_norm(self._compared(hidden)).flatten(0, 1).to(self.dtype)

    def _compared(self, of_positions: torch.Tensor) -> torch.Tensor:
        """Those of [N, T, ...] at which distributions are compared: the last of each stride, so never the first."""
        return of_positions[:, self.stride - 1 :: self.stride]

    def _keep_logits(self) -> torch.Tensor | None:
        """[M, V] before any cap, or None where they would take too much memory."""
        if len(self._teacher) * len(self._teacher_head) * self.dtype.itemsize > _KEPT_LOGITS_BYTES:
            return None
        return self._teacher @ self._teacher_head.to(self.dtype).T

    def _log_sums(self) -> torch.Tensor:
        """Of the teacher's exponentiated logits, [M]."""
        sums = torch.empty(len(self._teacher))
        for first in range(0, len(sums), _LOGITS_AT_ONCE):
            rows = slice(first, first + _LOGITS_AT_ONCE)
            sums[rows] = self._logits(rows).logsumexp(-1)
        return sums

    def _logits(self, rows: slice) -> torch.Tensor:
        """The teacher's, a copy in fp32, [rows, V]."""
        if self._teacher_logits is not None:
            return self._capped(self._teacher_logits[rows].to(torch.float32, copy=True))
        return self._capped((self._teacher[rows] @ self._teacher_head.to(self.dtype).T).float())

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        return capped(logits, self.supernet.loaded.logit_cap)

    def _compare(self, hidden: torch.Tensor) -> tuple[float, float]:
        """Mean KL to the teacher and mean negative log-likelihood of the next token; hidden is of the first windows."""
        windows = self.windows[: len(hidden)]
        student = self._read_by_head(hidden)
        head = self.supernet.loaded.head.weight.to(self.dtype).T
        targets = self._compared(torch.nn.functional.pad(windows[:, 1:], (0, 1))).flatten()
        followed = torch.ones_like(windows, dtype=torch.bool)
        followed[:, -1] = False  # a window's last position has no next token
        # filled in place: small results kept between large logits would fragment the heap, by gigabytes
        divergences, losses = torch.empty(2, len(student))
        for first in range(0, len(student), _LOGITS_AT_ONCE):
            rows = slice(first, min(first + _LOGITS_AT_ONCE, len(student)))  # the teacher has more
            q = self._capped((student[rows] @ head).float())  # logits, [rows, V]
            p = self._logits(rows)
            log_q_sum, log_p_sum = q.logsumexp(-1), self._teacher_log_sums[rows]
            losses[rows] = log_q_sum - q.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
            difference = torch.sub(p, q, out=q)
            p.sub_(log_p_sum.unsqueeze(-1)).exp_()
            divergences[rows] = torch.linalg.vecdot(p, difference) - log_p_sum + log_q_sum
        nll = losses[self._compared(followed).flatten()]
        return float(divergences.mean(dtype=torch.float64)), float(nll.mean(dtype=torch.float64))
