"""Which further graphs a profile times, and when more of them stop to help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from hw_profiles import Measurement, ModelShape, PlannedGraph, Store, Target
from hw_profiles.planning import random_shapes, spread_densities
from hw_profiles.profile import repeat_noise
from hw_profiles.shapes import PHASES
from nas.fitted import sample_weights
from nas.latency import TRAINING_ROLES
from nas.space import SearchSpace
from predictors import LatencyPredictor, most_informative

#: Anchors timed before the first fit, and as many more before each look at whether they still help.
ANCHORS_AT_ONCE = 4
#: Sampling stops when as many more anchors lowered the held-out error by less than this share, about what they do by
#: averaging noise; or when the error is as low as ENOUGH.
LEAST_GAIN = 0.1
ENOUGH = 0.03
_CANDIDATES = 200


@dataclass(frozen=True)
class Sampling:
    """A target whose plan has been timed, with one version of its runtime."""

    store: Store
    target: Target
    runtime_version: str
    space: SearchSpace

    def further_anchors(self, timed: Sequence[PlannedGraph], count: int, seed: int) -> list[ModelShape]:
        """In the order to time them: what the predictors of the phases, in turn, are least sure of."""
        rng = np.random.default_rng([seed, 1])
        taken = {graph.shape for graph in timed}
        blocks = self.space.block_choices()
        densities = spread_densities(max(_CANDIDATES, count), rng)
        candidates = random_shapes(self.space.base, blocks, densities, taken, rng)
        fitted_on = [graph.shape for graph in timed if graph.role in TRAINING_ROLES]
        orders = [
            most_informative(predictor, fitted_on, candidates, predictor.provenance.workloads[0], count)
            for predictor in self._predictors(timed)
        ]
        return list(dict.fromkeys(shape for shapes in zip(*orders, strict=True) for shape in shapes))[:count]

    def may_still_help(self, timed: Sequence[PlannedGraph]) -> bool:
        """Whether the error is above what will do and above the noise floor, and fell with the anchors timed last."""
        error = self._held_out_error(timed)
        if error <= max(ENOUGH, self._noise(timed)):
            return False
        anchors = [graph for graph in timed if graph.role == "anchor" and not graph.shape.is_mixed]
        if len(anchors) <= ANCHORS_AT_ONCE:
            return True
        without_last = [graph for graph in timed if graph not in anchors[-ANCHORS_AT_ONCE:]]
        return error <= (1 - LEAST_GAIN) * self._held_out_error(without_last)

    def _measurements(self, timed: Sequence[PlannedGraph]) -> list[Measurement]:
        """Of those graphs alone: what else the database knows of the target must not change an order to time in."""
        graphs = {(graph.shape, graph.role) for graph in timed}
        found = self.store.measurements(
            self.target, reference_id=self.space.base.id, runtime_version=self.runtime_version
        )
        return [m for m in found if (m.shape, m.role) in graphs]

    def _predictors(self, timed: Sequence[PlannedGraph]) -> list[LatencyPredictor]:
        """One a phase."""
        found = [m for m in self._measurements(timed) if m.role in TRAINING_ROLES]
        by_phase = [[m for m in found if m.workload.phase == phase] for phase in PHASES]
        return [
            LatencyPredictor.fit(
                [m.shape for m in of_phase],
                [m.latency_ms for m in of_phase],
                [m.workload for m in of_phase],
                self.target.precision,
                seed=0,
                weights=sample_weights(of_phase),
            )
            for of_phase in by_phase
            if of_phase
        ]

    def _held_out_error(self, timed: Sequence[PlannedGraph]) -> float:
        """Mean over the phases, each graph held out in turn."""
        return fmean(predictor.provenance.held_out_error for predictor in self._predictors(timed))

    def _noise(self, timed: Sequence[PlannedGraph]) -> float:
        """What timing a graph twice differs by, mean over workloads; 0 where none was timed twice."""
        found = self._measurements(timed)
        noises = [repeat_noise([m for m in found if m.workload == work]) for work in {m.workload for m in found}]
        known = [noise for noise in noises if noise is not None]
        return fmean(known) if known else 0.0
