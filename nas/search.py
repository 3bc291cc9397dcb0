"""Search: single-part scores, additive seeds, then rounds of predictors, evolution and true evaluations.

Everything is in the database before the next step starts, and the whole run is a function of the seed and of the
evaluations' results. Resuming is therefore replaying: what is stored is looked up instead of evaluated again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hw_profiles.profile import Progress
from hw_profiles.shapes import BLOCK_BITS, NARROW_HEAD_BITS, Precision
from nas.additive import AdditiveScores, Latency, fill_in, ladder, optimum, scored_choices
from nas.evolution import choose_batch, evolve, keeps_attention
from nas.published_searches import PUBLISHED
from nas.quality import Quality
from nas.space import SearchSpace
from nas.study import ALGORITHMS, Algorithm, Study, Trial, TrialRole
from nas.subnet import NARROW, NARROW_BITS, PARTS, Part, Size, Subnet
from predictors import QualityPredictor, QualityReport, cross_validated
from predictors.accuracy import MINIMUM_JUDGED_TRIALS

Floats = NDArray[np.float64]

#: A candidate worse than this is of no use to anybody: it bounds the seeds and the hypervolume.
_WORST_KL = 2.5
#: A part that is rounded for less than nothing, by chance, is taken for next to nothing.
_LEAST_KL = 1e-6
#: A published search that proposes so many batches of known subnets has used up the space.
_STALE_BATCHES = 10
#: Of the KL of the head alone at fewer bits than the embedding.
_HEAD_SCORE = f"head at {NARROW_HEAD_BITS} bits"
#: Random subnets drawn for one wanted where evolution finds nothing new.
_DRAWS_PER_SUBNET = 50


class Evaluates(Protocol):
    """What the search asks of `nas.evaluate.Evaluator`."""

    def evaluate(self, subnet: Subnet) -> Quality: ...

    def block_kl(self, layer: int, part: Part, choice: Size, precision: Precision) -> float: ...

    def narrow_head_kl(self) -> float: ...

    def reformation_error(self, layer: int, part: Part, choice: Size) -> float: ...


@dataclass(frozen=True)
class SearchSettings:
    """`evaluations` counts trials beside the full models'; `budget_ms` asks for a good answer near that latency too."""

    evaluations: int = 64
    seed: int = 0
    batch: int = 8
    seeds_per_bits: int = 10
    population: int = 96
    generations: int = 40
    budget_ms: float | None = None
    algorithm: Algorithm = "seeded"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"wanted an algorithm out of {', '.join(ALGORITHMS)}, got {self.algorithm}")
        if self.evaluations < 1 or self.batch < 1 or self.population < 4:
            raise ValueError(
                "a search needs evaluations and a batch of at least 1 and a population of 4, got "
                f"{self.evaluations}, {self.batch} and {self.population}"
            )


def search(
    space: SearchSpace,
    evaluator: Evaluates,
    latency: Latency,
    study: Study,
    settings: SearchSettings,
    progress: Progress = lambda done, total, what: None,
) -> list[Trial]:
    """Evaluate `settings.evaluations` subnets, chosen for KL, or the loss of tasks where the evaluator finds it, and
    `latency` [ms], and return the trials in order.

    Fewer where the space, or the additive solver, has no more.
    """
    run = _Run(evaluator, study, {trial.subnet: trial for trial in study.trials()}, [], settings, progress)
    run.evaluate([space.full(bits) for bits in space.bits_choices], "full")
    if settings.algorithm in PUBLISHED:
        _run_published(space, latency, run)
    else:
        _run_seeded(space, evaluator, latency, run)
    return run.trials


def _run_seeded(space: SearchSpace, evaluator: Evaluates, latency: Latency, run: _Run) -> None:
    settings = run.settings
    scores = score_parts(space, evaluator, run.study, run.progress)
    run.scores = scores = replace(scores, bits={t.subnet.bits: t.quality.kl for t in run.trials})
    count = settings.evaluations if settings.algorithm == "additive" else settings.seeds_per_bits
    seeds = [
        seed
        for bits in space.bits_choices
        for seed in _ends_first(ladder(scores, latency, bits, count, worst_kl=_WORST_KL))
    ]
    # of mixed bits one that is at 8 throughout may be the one that 8 bits alone have found
    seeds = _interleaved(list(dict.fromkeys(seeds)), space.bits_choices)
    if settings.budget_ms is not None:
        at_budget = [optimum(scores, latency, bits, settings.budget_ms) for bits in space.bits_choices]
        seeds = list(dict.fromkeys([*(seed for seed in at_budget if seed is not None), *seeds]))
    evaluated = {trial.subnet for trial in run.trials}  # the full models
    seeds = [seed for seed in seeds if seed not in evaluated]
    run.evaluate(seeds[: settings.evaluations], "seed")
    while run.left > 0 and settings.algorithm == "seeded":
        proposals = propose(space, scores, latency, run.trials, settings, min(settings.batch, run.left))
        if not proposals:
            break  # the space is used up
        run.evaluate(proposals, "search")


def _run_published(space: SearchSpace, latency: Latency, run: _Run) -> None:
    """Batches until the evaluations are used up, or no batch brings anything new. What came before costs nothing."""
    batches = PUBLISHED[run.settings.algorithm](space, latency, run.settings.seed)
    batch = next(batches)
    stale = 0
    while run.left > 0 and stale < _STALE_BATCHES:
        seen = {trial.subnet for trial in run.trials}
        new = [subnet for subnet in dict.fromkeys(batch) if subnet not in seen][: run.left]
        stale = 0 if new else stale + 1
        run.evaluate(new, "search")
        if run.left > 0:
            try:
                batch = batches.send([run.stored[subnet].quality.loss for subnet in batch])
            except StopIteration:
                break


def score_parts(space: SearchSpace, evaluator: Evaluates, study: Study, progress: Progress) -> AdditiveScores:
    """KL of every layer's attention and MLP at every size, replaced alone in the unrounded full model.

    With mixed bits also of each whole part at 4, and of the head.
    """
    stored = study.scores()
    full = {part: space.sizes(part)[-1] for part in PARTS}
    exact: Precision = "fp32"
    wanted = [
        (layer, part, choice, precision)
        for layer in range(space.depth)
        for part in PARTS
        for choice, precision in (
            *((size, exact) for size in scored_choices(space, part)),
            *([(full[part], NARROW)] if space.mixed_bits else []),
        )
    ]
    for done, (layer, part, choice, precision) in enumerate(wanted):
        name = _score_name(layer, part, choice, precision)
        if name not in stored:
            stored[name] = evaluator.block_kl(layer, part, choice, precision)
            study.add_score(name, stored[name])
        progress(done + 1, len(wanted), f"scoring layer {layer} {part} at {choice}")

    def table(part: Part) -> Floats:
        rows, choices = [], space.sizes(part)
        for layer in range(space.depth):
            scored = {c: stored[_score_name(layer, part, c)] for c in scored_choices(space, part)}
            errors = {c: evaluator.reformation_error(layer, part, c) for c in choices[:-1]}
            rows.append(fill_in(choices, scored, errors))
        return np.array(rows)

    narrow, narrow_head = None, 0.0
    if space.mixed_bits:
        if _HEAD_SCORE not in stored:
            stored[_HEAD_SCORE] = evaluator.narrow_head_kl()
            study.add_score(_HEAD_SCORE, stored[_HEAD_SCORE])
        narrow_head = stored[_HEAD_SCORE]
        names = [[_score_name(layer, p, full[p], NARROW) for p in PARTS] for layer in range(space.depth)]
        narrow = np.maximum([[stored[name] for name in row] for row in names], _LEAST_KL)
    return AdditiveScores(space, table("attention"), table("mlp"), {}, narrow, narrow_head)


def propose(
    space: SearchSpace,
    scores: AdditiveScores,
    latency: Latency,
    trials: Sequence[Trial],
    settings: SearchSettings,
    count: int,
) -> list[Subnet]:
    """The next batch: evolution on the quality predictor and the latency, from the trials and fresh additive optima."""
    round_seed = settings.seed * 100_003 + len(trials)
    predictor = quality_predictor(space, scores, trials, settings.seed)

    def objectives(subnets: Sequence[Subnet]) -> Floats:
        predicted = predictor.predict(quality_features(space, subnets), scores.predict(subnets)).value
        return np.column_stack([np.log(predicted), latency(subnets)])

    optima = [
        s for bits in space.bits_choices for s in ladder(scores, latency, bits, settings.population // 4, _WORST_KL)
    ]
    start = [trial.subnet for trial in sorted(trials, key=lambda trial: trial.quality.loss)] + optima
    start = list(dict.fromkeys(start))[: settings.population * 3 // 4]
    found = evolve(
        space,
        objectives,
        start,
        population=settings.population,
        generations=settings.generations,
        seed=round_seed,
    )
    seen = {trial.subnet for trial in trials}
    candidates = [s for s in dict.fromkeys([*found, *optima]) if s not in seen]
    if not candidates:
        return _unseen(space, seen, count, round_seed)
    predicted = objectives(candidates)
    known_ms = latency([trial.subnet for trial in trials])
    losses = [max(trial.quality.loss, 1e-6) for trial in trials]
    known = np.column_stack([np.log(losses), known_ms])
    worst = max(losses) * 1.01 if _by_task(trials) else _WORST_KL
    reference = np.array([np.log(worst), known_ms.max() * 1.01])
    picked: list[int] = []
    if settings.budget_ms is not None:
        # half of the batch goes where the answer will be: the best predicted just within the budget
        within = [i for i in np.argsort(predicted[:, 0]) if predicted[i, 1] <= settings.budget_ms]
        picked = [int(i) for i in within[: (count + 1) // 2]]
    rest = [i for i in range(len(candidates)) if i not in picked]
    known = np.vstack([known, predicted[picked]])
    batch = choose_batch(predicted[rest], known, reference, count - len(picked))
    return [candidates[i] for i in [*picked, *(rest[j] for j in batch)]]


def _unseen(space: SearchSpace, seen: Collection[Subnet], count: int, seed: int) -> list[Subnet]:
    """Up to `count` random subnets beside those seen."""
    rng = np.random.default_rng(seed)
    draws = dict.fromkeys(space.sample(rng) for _ in range(_DRAWS_PER_SUBNET * count))
    return [subnet for subnet in draws if subnet not in seen and keeps_attention(subnet)][:count]


def quality_predictor(
    space: SearchSpace, scores: AdditiveScores, trials: Sequence[Trial], seed: int
) -> QualityPredictor:
    subnets = [trial.subnet for trial in trials]
    losses = np.array([trial.quality.loss for trial in trials])
    features = quality_features(space, subnets)
    return QualityPredictor.fit(features, scores.predict(subnets), losses, seed, is_kl=not _by_task(trials))


def _by_task(trials: Sequence[Trial]) -> bool:
    return any(trial.quality.task_loss is not None for trial in trials)


def quality_report(space: SearchSpace, trials: Sequence[Trial]) -> QualityReport | None:
    """Rank correlations of the quality predictor on trials it was not fitted on; None with too few of them."""
    usable = [trial for trial in trials if trial.additive_kl is not None]
    if len(usable) < MINIMUM_JUDGED_TRIALS:
        return None
    additive_kl = np.array([trial.additive_kl for trial in usable], dtype=np.float64)
    losses = np.array([trial.quality.loss for trial in usable])
    features = quality_features(space, [trial.subnet for trial in usable])
    return cross_validated(features, additive_kl, losses, seed=0, is_kl=not _by_task(usable))


def quality_features(space: SearchSpace, subnets: Sequence[Subnet]) -> Floats:
    """Choice indices, then sums: [n, 2 x layers + 1 + 4]; with mixed bits also how many parts have more than 4."""
    genes = np.array([space.encode(subnet) for subnet in subnets], dtype=np.float64)
    attention, mlp, *own = (genes[:, i : -1 : space.genes_per_layer] for i in range(space.genes_per_layer))
    sums = [attention.sum(1), mlp.sum(1), (attention == 0).sum(1), (mlp == 0).sum(1)]
    if own:  # a subnet of more bits has them in all parts
        more = np.array([subnet.bits > NARROW_BITS for subnet in subnets])
        sums += [np.where(more, space.depth, wide.sum(1)) for wide in own]
    return np.column_stack([genes, *sums])


@dataclass
class _Run:
    """Trials of this run in order, whether evaluated now or found stored."""

    evaluator: Evaluates
    study: Study
    stored: dict[Subnet, Trial]
    trials: list[Trial]
    settings: SearchSettings
    progress: Progress
    scores: AdditiveScores | None = None

    @property
    def left(self) -> int:
        return self.settings.evaluations - sum(trial.role != "full" for trial in self.trials)

    def evaluate(self, subnets: Sequence[Subnet], role: TrialRole) -> None:
        for subnet in subnets:
            trial = self.stored.get(subnet)
            if trial is None:
                additive_kl = float(self.scores.predict([subnet])[0]) if self.scores else None
                trial = Trial(subnet, self.evaluator.evaluate(subnet), role, additive_kl)
                self.study.add(trial)
                self.stored[subnet] = trial
            # the role is this run's: a study may hold the same subnet from a run with another seed
            self.trials.append(replace(trial, role=role))
            done = self.settings.evaluations - self.left
            self.progress(done, self.settings.evaluations, f"evaluating {role} {subnet.id}")


def _ends_first(seeds: Sequence[Subnet]) -> list[Subnet]:
    """The smallest, the largest, then each the farthest from those before it: a short search spans the whole ladder."""
    order: list[int] = []
    while len(order) < len(seeds):
        rest = [i for i in reversed(range(len(seeds))) if i not in order]
        order.append(max(rest, key=lambda i: min((abs(i - j) for j in order), default=i)))
    return [seeds[i] for i in order]


def _interleaved(seeds: Sequence[Subnet], bits_choices: Sequence[int]) -> list[Subnet]:
    """Round robin over the bits, so that a short search sees all of them."""
    queues = [[seed for seed in seeds if seed.bits == bits] for bits in bits_choices]
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def _score_name(layer: int, part: Part, choice: Size, precision: Precision = "fp32") -> str:
    return f"{layer}.{part}.{choice}" + (f" at {BLOCK_BITS[precision]} bits" if precision != "fp32" else "")
