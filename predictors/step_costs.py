"""What a step costs in milliseconds, linear in its parts: so much a layer, a KV group, a channel.

What a part costs grows with the tokens fed at once, in proportion only where kernels are equally efficient for any
number of them, and they are not. So each of `step_columns` has a cost at a few counts of tokens, the knots, and between
knots it is linear in tokens. `SEQUENCE_COLUMNS` cost the same everywhere.

A step of decode reads every weight once, and one step after the other the same weights: what the cache holds of a small
model comes faster. So a decoder's weights beyond some thresholds cost extra by the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from predictors.features import SEQUENCE_COLUMNS, STEP_COLUMNS, mixed_columns, select_columns
from predictors.linear import LEAST_RIDGE, fit_relative
from predictors.metrics import FloatArray

#: Knots are at least this many times apart: costs are to be told apart by tens of samples.
_KNOT_RATIO = 4
#: Penalty on how costs at knots differ from costs that grow in proportion. It decides where few samples speak.
_BEND_RIDGE = 1e-2
_LEAST_MS = 1e-9  # nothing is free
#: The thresholds, as shares of the largest sample's weights, and the penalty on what lies beyond them costing extra.
_OVERFLOW_SHARES = (0.55, 0.75)
_OVERFLOW_RIDGE = 1e-2
_OVERFLOW = "read_weight_bytes beyond"


@dataclass(frozen=True, eq=False)
class StepCosts:
    """`per_unit` in ms holds one cost each of `columns`: all >= 0, those of the first knot first."""

    knots: tuple[int, ...]
    thresholds_bytes: tuple[float, ...]
    has_sequence_columns: bool
    #: Those of `features.MIXED_COLUMNS` that samples had.
    mixed_columns: tuple[str, ...]
    per_unit: FloatArray
    #: No decoder reads its weights twice as fast as the fastest sample; 0 for prompts, which need not wait for them.
    least_ms_per_byte: float = 0.0

    @classmethod
    def between(cls, names: Sequence[str], X: FloatArray) -> StepCosts:
        """The columns that samples X [n, f] call for, all at 0 ms: `fitted` gives them costs."""
        workloads = np.unique(select_columns(names, X, ("batch_size", "tokens")), axis=0)
        fed, sequences, weight_bytes = select_columns(names, X, ("tokens_fed", "batch_size", "read_weight_bytes")).T
        decode = bool((fed == sequences).all())
        thresholds = tuple(share * float(weight_bytes.max()) for share in _OVERFLOW_SHARES if decode)
        costs = cls(find_knots(fed), thresholds, len(workloads) > 1, mixed_columns(names, X), np.zeros(0))
        return costs._with(np.zeros(len(costs.columns)))

    def fitted(self, names: Sequence[str], X: FloatArray, y: FloatArray, weights: FloatArray) -> StepCosts:
        """To latencies y [n] in ms, for relative errors."""
        columns = self._of(names, X)
        if len(self.knots) == 1:
            costs = self._with(fit_relative(columns, y, weights, ridge=self._ridges(LEAST_RIDGE)))
            return costs._bounded(names, X, y)
        of_knots = len(self.knots) * len(self.step_columns)
        parts, others = select_columns(names, X, self.step_columns), columns[:, of_knots:]
        fed = X[:, names.index("tokens_fed")]
        ridges = [np.full(2 * len(self.step_columns), LEAST_RIDGE), self._ridges(LEAST_RIDGE)[of_knots:]]
        straight = fit_relative(
            np.hstack([parts, parts * fed[:, None], others]), y, weights, ridge=np.concatenate(ridges)
        )
        at_once, a_token, of_others = np.split(straight, [len(self.step_columns), 2 * len(self.step_columns)])
        towards = np.concatenate([*(at_once + a_token * knot for knot in self.knots), of_others])
        costs = self._with(fit_relative(columns, y, weights, towards, self._ridges(_BEND_RIDGE)))
        return costs._bounded(names, X, y)

    def refitted(
        self, names: Sequence[str], X: FloatArray, y: FloatArray, weights: FloatArray, ridge: float
    ) -> StepCosts:
        """Of other samples, drawn towards these costs times one factor."""
        factor = np.exp(np.average(np.log(y) - self.log_ms(names, X), weights=weights))
        costs = self._with(fit_relative(self._of(names, X), y, weights, factor * self.per_unit, ridge))
        return costs._bounded(names, X, y)

    def log_ms(self, names: Sequence[str], X: FloatArray) -> FloatArray:
        """[n]"""
        least_ms = np.maximum(self.least_ms_per_byte * X[:, names.index("read_weight_bytes")], _LEAST_MS)
        return np.asarray(np.log(np.maximum(self._of(names, X) @ self.per_unit, least_ms)), dtype=np.float64)

    @property
    def step_columns(self) -> tuple[str, ...]:
        """Those that have a cost at each knot."""
        return STEP_COLUMNS + self.mixed_columns

    @property
    def columns(self) -> tuple[str, ...]:
        at_knots = chain.from_iterable([f"{name} at {knot}" for name in self.step_columns] for knot in self.knots)
        steps = self.step_columns if len(self.knots) == 1 else tuple(at_knots)
        overflow = tuple(f"{_OVERFLOW} {threshold:.0f}" for threshold in self.thresholds_bytes)
        return steps + overflow + (SEQUENCE_COLUMNS if self.has_sequence_columns else ())

    def _of(self, names: Sequence[str], X: FloatArray) -> FloatArray:
        """[n, columns]: what the costs are multiplied with."""
        # what each knot has in a sample's tokens: all of it where they are as many, nothing at the knots beside
        fed = X[:, names.index("tokens_fed")]
        shares = [np.interp(fed, self.knots, unit) for unit in np.eye(len(self.knots))]
        parts = select_columns(names, X, self.step_columns)
        weight_bytes = select_columns(names, X, ("read_weight_bytes",))
        columns = [share[:, None] * parts for share in shares]
        columns += [np.maximum(weight_bytes - threshold, 0) for threshold in self.thresholds_bytes]
        if self.has_sequence_columns:
            columns.append(select_columns(names, X, SEQUENCE_COLUMNS))
        return np.hstack(columns)

    def _ridges(self, ridge: float) -> FloatArray:
        """One for each of the columns, `ridge` for those that are no overflow."""
        return np.array([_OVERFLOW_RIDGE if name.startswith(_OVERFLOW) else ridge for name in self.columns])

    def _with(self, per_unit: FloatArray) -> StepCosts:
        return replace(self, per_unit=per_unit)

    def _bounded(self, names: Sequence[str], X: FloatArray, y: FloatArray) -> StepCosts:
        """By the samples that these costs were fitted to: costs of 0 would let the smallest model take no time."""
        if not self.thresholds_bytes:
            return self
        return replace(self, least_ms_per_byte=float((y / X[:, names.index("read_weight_bytes")]).min()) / 2)


def find_knots(tokens_fed: FloatArray) -> tuple[int, ...]:
    """The least and the most tokens measured, and between them some of the others."""
    measured = np.unique(tokens_fed).astype(int).tolist()
    knots = measured[:1]
    for count in measured:
        if count >= _KNOT_RATIO * knots[-1]:
            knots.append(count)
    if knots[-1] != measured[-1]:
        knots = [*knots[: max(1, len(knots) - 1)], measured[-1]]
    return tuple(knots)
