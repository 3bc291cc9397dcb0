import json
from dataclasses import replace

import numpy as np
import pytest

from hw_profiles.planning import with_wide_parts
from hw_profiles.shapes import BlockShape, ModelShape, Workload
from predictors.latency import MINIMUM_SAMPLES, MINIMUM_TRANSFER_SAMPLES, LatencyPredictor, training_digest
from predictors.metrics import coverage, mape, spearman

DECODE = Workload("decode", 256)


@pytest.fixture
def fit(sample_shapes, device):
    def fitted(samples: int, seed: int, cache_penalty: float = 0.0) -> LatencyPredictor:
        shapes = sample_shapes(samples, seed)
        return LatencyPredictor.fit(
            shapes,
            device(shapes, seed, cache_penalty=cache_penalty),
            DECODE,
            "int8",
            seed,
            target="cpu/fake/int8/2",
            runtime_version="1.0",
        )

    return fitted


@pytest.mark.parametrize("seed", range(3))
def test_twenty_samples_predict_within_three_per_cent(fit, sample_shapes, device, seed) -> None:
    test = sample_shapes(200, seed=100 + seed)
    value_ms = fit(20, seed).predict(test, DECODE).value_ms
    assert mape(value_ms, device(test, noise=0.0)) < 0.03
    assert spearman(value_ms, device(test, noise=0.0)) > 0.99


def test_noiseless_costs_are_recovered(sample_shapes, device) -> None:
    shapes = sample_shapes(20, seed=0)
    fitted = LatencyPredictor.fit(shapes, device(shapes, noise=0.0), DECODE, "int8", seed=0)
    test = sample_shapes(100, seed=1)
    assert mape(fitted.predict(test, DECODE).value_ms, device(test, noise=0.0)) < 1e-3
    assert fitted.provenance.linear_held_out_error < 1e-3


@pytest.mark.parametrize("cache_penalty", [0.0, 0.1])
def test_trees_never_cost_much(fit, sample_shapes, device, cache_penalty) -> None:
    test = sample_shapes(200, seed=99)
    actual = device(test, noise=0.0, cache_penalty=cache_penalty)
    for seed in range(6):
        learned = fit(15, seed, cache_penalty)
        linear = replace(learned, boost=replace(learned.boost, booster=None, shrinkage=0.0))
        assert (
            mape(learned.predict(test, DECODE).value_ms, actual)
            < mape(linear.predict(test, DECODE).value_ms, actual) + 0.005
        )


def test_trees_learn_what_is_not_linear(fit, sample_shapes, device) -> None:
    test = sample_shapes(200, seed=99)
    learned = fit(60, seed=0, cache_penalty=0.15)
    linear = replace(learned, boost=replace(learned.boost, booster=None, shrinkage=0.0))
    actual = device(test, noise=0.0, cache_penalty=0.15)
    assert mape(learned.predict(test, DECODE).value_ms, actual) < 0.7 * mape(
        linear.predict(test, DECODE).value_ms, actual
    )
    assert learned.provenance.held_out_error < learned.provenance.linear_held_out_error


def test_intervals_hold_what_they_promise(fit, sample_shapes, device) -> None:
    """Over 30 fits of 20 samples; the mean coverage has a standard error near 1.5 %."""
    test = sample_shapes(200, seed=99)
    found = []
    for seed in range(30):
        prediction = fit(20, seed).predict(test, DECODE)
        found.append(coverage(prediction.low_ms, prediction.high_ms, device(test, seed=1000 + seed)))
    assert 0.85 < np.mean(found) < 0.96


def test_a_wider_promise_is_a_wider_interval(fit, full) -> None:
    fitted = fit(30, seed=0)
    half, most = fitted.predict([full], DECODE, coverage=0.5), fitted.predict([full], DECODE, coverage=0.9)
    assert most.low_ms < half.low_ms < half.value_ms < half.high_ms < most.high_ms
    assert half.value_ms == most.value_ms


def test_every_layer_costs(fit, full) -> None:
    """Keeping one more layer of the full model, whole or in part, always costs more."""
    skipped = BlockShape(0, 0, 0)
    for kept in (BlockShape(9, 3, 1536), BlockShape(9, 3, 0), BlockShape(0, 0, 384)):
        ladder = [replace(full, blocks=(kept,) * n + (skipped,) * (30 - n)) for n in range(31)]
        assert (np.diff(fit(20, seed=1).predict(ladder, DECODE).value_ms) > 0).all()


def test_relative_errors_weigh_small_models_as_much(full) -> None:
    """A cost per layer of 1 ms against 2: the best relative slope is (1 + 1/2) / (1 + 1/4) = 1.2, not 1.5."""
    skipped, kept = BlockShape(0, 0, 0), BlockShape(9, 3, 1536)
    shapes = [replace(full, blocks=(kept,) * n + (skipped,) * (30 - n)) for n in range(5, 31)] * 2
    y = np.concatenate([np.arange(5, 31) * 1.0, np.arange(5, 31) * 2.0])
    fitted = LatencyPredictor.fit(shapes, y, DECODE, "int8", seed=0)
    assert fitted.boost.shrinkage == 0
    assert fitted.predict([full], DECODE).value_ms[0] == pytest.approx(30 * 1.2, rel=0.01)
    heavier = LatencyPredictor.fit(shapes, y, DECODE, "int8", 0, weights=[1e6] * 26 + [1.0] * 26)
    assert heavier.predict([full], DECODE).value_ms[0] == pytest.approx(30 * 1.0, rel=0.01)


def test_the_same_seed_gives_the_same_predictor(fit, sample_shapes) -> None:
    test = sample_shapes(50, seed=9)
    one, other = fit(40, seed=2, cache_penalty=0.15), fit(40, seed=2, cache_penalty=0.15)
    assert one.boost.shrinkage > 0
    np.testing.assert_array_equal(one.predict(test, DECODE).value_ms, other.predict(test, DECODE).value_ms)
    np.testing.assert_array_equal(one.predict(test, DECODE).low_ms, other.predict(test, DECODE).low_ms)


def test_no_models_have_no_latencies(fit) -> None:
    assert fit(20, seed=0).predict([], DECODE).value_ms.shape == (0,)


TARGET = {"target": "cpu/fake/int8/2", "runtime_version": "1.0"}


def reread(fitted: LatencyPredictor) -> LatencyPredictor:
    made = fitted.provenance
    return LatencyPredictor.from_json(
        fitted.to_json(), target=made.target, runtime_version=made.runtime_version, digest=made.digest
    )


@pytest.mark.parametrize("cache_penalty", [0.0, 0.15])  # without trees and with
def test_a_kept_predictor_predicts_the_same(fit, sample_shapes, cache_penalty) -> None:
    fitted, test = fit(60, seed=0, cache_penalty=cache_penalty), sample_shapes(50, seed=9)
    assert (fitted.boost.booster is None) == (cache_penalty == 0)
    again = reread(fitted)
    assert again.provenance == fitted.provenance
    one, other = fitted.predict(test, DECODE), again.predict(test, DECODE)
    np.testing.assert_array_equal(one.value_ms, other.value_ms)
    np.testing.assert_array_equal(one.high_ms, other.high_ms)


@pytest.mark.parametrize("field", ["target", "runtime_version", "digest"])
def test_a_predictor_of_something_else_is_not_read(fit, field) -> None:
    fitted = fit(20, seed=0)
    asked = {**TARGET, "digest": fitted.provenance.digest, field: "another"}
    with pytest.raises(ValueError, match=f"wanted a predictor of {field} 'another'"):
        LatencyPredictor.from_json(fitted.to_json(), **asked)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("format", 0, "format"), ("feature_names", ["constant"], "columns"), ("held_out_log_errors", [0.1], "held-out")],
)
def test_a_predictor_of_another_version_is_not_read(fit, field, value, message) -> None:
    fitted = fit(20, seed=0)
    text = json.dumps(json.loads(fitted.to_json()) | {field: value})
    with pytest.raises(ValueError, match=message):
        LatencyPredictor.from_json(text, **TARGET, digest=fitted.provenance.digest)


def test_the_digest_is_of_all_that_is_fitted_on(sample_shapes, device, fit) -> None:
    shapes = sample_shapes(20, seed=0)
    latency_ms = device(shapes)
    given = {
        "shapes": shapes,
        "latency_ms": latency_ms,
        "workloads": DECODE,
        "precision": "int8",
        "seed": 0,
        "weights": None,
        "priors": (),
        **TARGET,
    }
    changed = {
        "shapes": [*shapes[1:], shapes[0]],
        "latency_ms": latency_ms * (1 + 1e-12),
        "workloads": [DECODE] * 19 + [Workload("decode", 257)],
        "precision": "int4",
        "seed": 1,
        "weights": [2.0] + [1.0] * 19,
        "priors": [fit(20, seed=1)],
        "target": "another",
        "runtime_version": "1.1",
    }
    digests = [training_digest(**{**given, name: value}) for name, value in changed.items()]
    assert len({training_digest(**given), *digests}) == 1 + len(changed)
    assert LatencyPredictor.fit(**given).provenance.digest == training_digest(**given)


MEASURED = [Workload("prefill", tokens) for tokens in (16, 64, 256, 1024)]


def prefill_ms(shapes: list[ModelShape], workloads: list[Workload], noise: float = 0.0) -> np.ndarray:
    """Weights read once, FLOPs at a rate that rises with the tokens fed, attention quadratic in them."""
    rng = np.random.default_rng(0)
    total = []
    for shape, work in zip(shapes, workloads, strict=True):
        fed = work.tokens * work.batch_size
        rate = 4e8 * fed / (fed + 40)
        total.append(1.0 + shape.weight_bytes("int8") / 4e7 + shape.flops(work) / rate)
    return np.array(total) * np.exp(noise * rng.standard_normal(len(shapes)))


@pytest.fixture
def surface(sample_shapes) -> LatencyPredictor:
    """Every model on two of the four workloads."""
    shapes = [shape for shape in sample_shapes(24, seed=0) for _ in range(2)]
    works = [MEASURED[i % 4] for i in range(12)] + [MEASURED[(i + i // 4) % 4] for i in range(36)]
    return LatencyPredictor.fit(shapes, prefill_ms(shapes, works, noise=0.01), works, "int8", seed=0)


@pytest.mark.parametrize("tokens", [16, 24, 40, 64, 128, 200, 500, 1024])
def test_any_workload_between_those_measured_is_predicted(surface, sample_shapes, tokens) -> None:
    test, work = sample_shapes(50, seed=1), Workload("prefill", tokens)
    assert mape(surface.predict(test, work).value_ms, prefill_ms(test, [work] * 50)) < 0.05


def test_batches_interpolate_as_well(sample_shapes) -> None:
    works = [Workload("prefill", tokens, batch) for tokens in (16, 64, 256) for batch in (1, 4, 16)]
    shapes = sample_shapes(36, seed=0)
    pairs = [(shape, works[(i + j) % 9]) for i, shape in enumerate(shapes) for j in (0, 4)]
    measured = [list(column) for column in zip(*pairs, strict=True)]
    fitted = LatencyPredictor.fit(measured[0], prefill_ms(*measured), measured[1], "int8", seed=0)
    test, between = sample_shapes(50, seed=1), Workload("prefill", 128, 8)
    assert mape(fitted.predict(test, between).value_ms, prefill_ms(test, [between] * 50)) < 0.06


@pytest.mark.parametrize(
    "outside", [Workload("prefill", 15), Workload("prefill", 1025), Workload("prefill", 64, 2), Workload("decode", 64)]
)
def test_a_workload_outside_those_measured_is_refused(surface, full, outside) -> None:
    with pytest.raises(ValueError, match=r"lies outside what was measured \(prefill at 16 to 1024 tokens\)"):
        surface.predict([full], outside)


def test_the_curve_is_exact_where_it_was_measured_and_straight_between(surface) -> None:
    curve = surface.curve
    assert list(curve.workloads) == MEASURED
    np.testing.assert_allclose(curve(MEASURED), curve.log_offsets, atol=1e-9)
    between = [Workload("prefill", tokens) for tokens in (64, 127, 256)]
    position = (np.log2(128) - np.log2(65)) / (np.log2(257) - np.log2(65))
    ends = curve(between)[[0, 2]]
    assert curve(between)[1] == pytest.approx(ends[0] + position * (ends[1] - ends[0]))


def test_a_kept_surface_predicts_the_same(surface, sample_shapes) -> None:
    work, test = Workload("prefill", 100), sample_shapes(20, seed=5)
    np.testing.assert_array_equal(reread(surface).predict(test, work).value_ms, surface.predict(test, work).value_ms)


def test_phases_are_not_mixed(sample_shapes) -> None:
    works = [DECODE] * 10 + [Workload("prefill", 256)] * 10
    shapes = sample_shapes(20, seed=0)
    with pytest.raises(ValueError, match="predictors of their own"):
        LatencyPredictor.fit(shapes, prefill_ms(shapes, works), works, "int8", seed=0)


def test_too_few_different_models_are_refused(sample_shapes, device) -> None:
    shapes = sample_shapes(MINIMUM_SAMPLES - 1, seed=0) * 3
    with pytest.raises(ValueError, match=f"at least {MINIMUM_SAMPLES} different models, got {MINIMUM_SAMPLES - 1}"):
        LatencyPredictor.fit(shapes, device(shapes), DECODE, "int8", seed=0)
    shapes = sample_shapes(MINIMUM_SAMPLES, seed=0)
    prediction = LatencyPredictor.fit(shapes, device(shapes), DECODE, "int8", seed=0).predict(shapes, DECODE)
    assert np.isfinite(prediction.high_ms).all()


@pytest.mark.parametrize("failed", [0.0, -1.0, np.nan, np.inf])
def test_failed_measurements_are_refused(sample_shapes, device, failed) -> None:
    shapes = sample_shapes(20, seed=0)
    latency_ms = device(shapes)
    latency_ms[3] = failed
    with pytest.raises(ValueError, match="leave failed measurements out"):
        LatencyPredictor.fit(shapes, latency_ms, DECODE, "int8", seed=0)


def test_latencies_must_match_the_shapes(sample_shapes, device) -> None:
    shapes = sample_shapes(20, seed=0)
    with pytest.raises(ValueError, match="one latency, one weight and one workload a shape"):
        LatencyPredictor.fit(shapes, device(shapes)[:-1], DECODE, "int8", seed=0)


def test_another_model_family_is_refused(fit, sample_shapes, device) -> None:
    other = ModelShape(960, 64, 49152, True, (BlockShape(15, 5, 2560),) * 30)
    with pytest.raises(ValueError, match="fitted on models of"):
        fit(20, seed=0).predict([other], DECODE)
    shapes = [*sample_shapes(20, seed=0), other]
    with pytest.raises(ValueError, match="differ only in their blocks"):
        LatencyPredictor.fit(shapes, device(shapes), DECODE, "int8", seed=0)


def similar_ms(shapes: list[ModelShape], device, seed: int = 0, noise: float = 0.03) -> np.ndarray:
    """Another device: 1.7 times as slow, each KV group costing 0.02 ms more and each part kept 0.01 ms less."""
    groups = np.array([sum(block.num_key_value_heads for block in shape.blocks) for shape in shapes])
    parts = np.array(
        [sum((b.num_key_value_heads > 0) + (b.intermediate_size > 0) for b in shape.blocks) for shape in shapes]
    )
    exact = 1.7 * device(shapes, noise=0.0, cache_penalty=0.15) + 0.02 * groups - 0.01 * parts
    return exact * np.exp(noise * np.random.default_rng(seed).standard_normal(len(shapes)))


def fit_similar(sample_shapes, device, count: int, seed: int, priors) -> LatencyPredictor:
    shapes = sample_shapes(count, 50 + seed)
    return LatencyPredictor.fit(shapes, similar_ms(shapes, device, seed), DECODE, "int8", seed, priors=priors)


def test_ten_anchors_and_a_prior_beat_ten_anchors(fit, sample_shapes, device) -> None:
    """Over ten draws; the prior also knows what ten anchors cannot show, that many KV groups cost extra."""
    prior, test = fit(60, seed=0, cache_penalty=0.15), sample_shapes(200, seed=99)
    actual = similar_ms(test, device, noise=0.0)
    leaning, alone = (
        [
            mape(fit_similar(sample_shapes, device, 10, seed, priors).predict(test, DECODE).value_ms, actual)
            for seed in range(10)
        ]
        for priors in ([prior], [])
    )
    assert np.mean(leaning) < 0.7 * np.mean(alone)
    assert np.mean(leaning) < 0.035


def test_a_prior_that_misleads_is_left_alone(sample_shapes, device) -> None:
    """It knows a device whose cost falls with the size of the model."""
    shapes, test = sample_shapes(60, seed=0), sample_shapes(200, seed=99)
    misleading = LatencyPredictor.fit(shapes, 100 / device(shapes), DECODE, "int8", seed=0)
    leaning, alone = (fit_similar(sample_shapes, device, 30, 0, priors) for priors in ([misleading], []))
    actual = similar_ms(test, device, noise=0.0)
    errors = [mape(fitted.predict(test, DECODE).value_ms, actual) for fitted in (leaning, alone)]
    assert errors[0] < errors[1] + 0.005


def test_of_several_priors_the_one_that_serves_best_is_leant_on(fit, sample_shapes, device) -> None:
    shapes = sample_shapes(60, seed=0)
    other = LatencyPredictor.fit(shapes, 30 + 0.1 * device(shapes), DECODE, "int8", seed=0)
    like = fit(60, seed=0, cache_penalty=0.15)
    for priors in ([other, like], [like, other]):
        assert fit_similar(sample_shapes, device, 6, 0, priors).prior is like


def test_intervals_of_a_leaning_predictor_hold_what_they_promise(fit, sample_shapes, device) -> None:
    """Over 30 fits of 12 samples on the same prior."""
    prior, test = fit(60, seed=0, cache_penalty=0.15), sample_shapes(200, seed=99)
    found = []
    for seed in range(30):
        fitted = fit_similar(sample_shapes, device, 12, seed, [prior])
        prediction = fitted.predict(test, DECODE)
        found.append(coverage(prediction.low_ms, prediction.high_ms, similar_ms(test, device, seed=1000 + seed)))
    assert 0.85 < np.mean(found) < 0.97


def test_too_few_samples_for_an_interval_still_scale_the_prior(fit, sample_shapes, device) -> None:
    prior, test = fit(60, seed=0, cache_penalty=0.15), sample_shapes(200, seed=99)
    fitted = fit_similar(sample_shapes, device, MINIMUM_TRANSFER_SAMPLES, 0, [prior])
    prediction = fitted.predict(test, DECODE)
    assert mape(prediction.value_ms, similar_ms(test, device, noise=0.0)) < 0.1
    assert np.isinf(prediction.high_ms).all()
    with pytest.raises(ValueError, match=f"at least {MINIMUM_TRANSFER_SAMPLES} different models, got 2"):
        fit_similar(sample_shapes, device, 2, 0, [prior])


def test_priors_of_other_models_or_fewer_workloads_are_left_out(fit, sample_shapes, device) -> None:
    other = ModelShape(960, 64, 49152, True, (BlockShape(15, 5, 2560),) * 30)
    family = [replace(other, blocks=other.blocks[:layers]) for layers in range(10, 30)]
    stranger = LatencyPredictor.fit(family, [float(len(s.blocks)) for s in family], DECODE, "int8", seed=0)
    shapes = sample_shapes(8, seed=1)
    for prior, works in (stranger, DECODE), (fit(30, seed=0), Workload("decode", 512)):
        with pytest.raises(ValueError, match=f"at least {MINIMUM_SAMPLES} different models, got 8"):
            LatencyPredictor.fit(shapes, device(shapes), works, "int8", seed=0, priors=[prior])


def test_a_kept_leaning_predictor_predicts_the_same(fit, sample_shapes, device) -> None:
    prior, test = fit(60, seed=0, cache_penalty=0.15), sample_shapes(50, seed=9)
    assert prior.boost.booster is not None
    fitted = fit_similar(sample_shapes, device, 8, 0, [prior])
    again = reread(fitted)
    assert again.prior is not None
    assert again.prior.provenance == prior.provenance
    np.testing.assert_array_equal(again.predict(test, DECODE).value_ms, fitted.predict(test, DECODE).value_ms)


def test_a_prior_of_many_workloads_serves_measurements_of_one(surface, sample_shapes) -> None:
    """Half as fast a device, of which a single prompt length was timed."""
    work, shapes, test = MEASURED[1], sample_shapes(8, seed=70), sample_shapes(50, seed=1)
    fitted = LatencyPredictor.fit(shapes, 2 * prefill_ms(shapes, [work] * 8), work, "int8", seed=0, priors=[surface])
    assert fitted.prior is surface
    assert mape(fitted.predict(test, work).value_ms, 2 * prefill_ms(test, [work] * 50)) < 0.03


def widened(shapes, seed=0, narrow_heads=True):
    """With 8 bits in some parts of each, 4 in every second head, and what that takes longer of a device that reads
    weights."""
    rng = np.random.default_rng(seed)
    mixed = [
        replace(with_wide_parts(shape, rng), head_bits=4 * (narrow_heads and i % 2)) for i, shape in enumerate(shapes)
    ]
    more_bytes = [m.read_weight_bytes("int4") - s.read_weight_bytes("int4") for m, s in zip(mixed, shapes, strict=True)]
    return mixed, np.array(more_bytes) / 1e7


def test_parts_and_heads_of_other_bits_are_learned_from_a_few_graphs(sample_shapes, device, fit) -> None:
    shapes, test = sample_shapes(26, seed=0), sample_shapes(200, seed=1)
    mixed, more_ms = widened(shapes[20:])
    measured = np.concatenate([device(shapes[:20], 0), device(shapes[20:], 1) + more_ms])
    fitted = LatencyPredictor.fit([*shapes[:20], *mixed], measured, DECODE, "int4", seed=0)
    judged, more_ms = widened(test, seed=2)
    wanted_ms = device(test, noise=0.0) + more_ms
    assert mape(fitted.predict(judged, DECODE).value_ms, wanted_ms) < 0.03
    assert mape(fitted.predict(test, DECODE).value_ms, device(test, noise=0.0)) < 0.03
    text, digest = fitted.to_json(), fitted.provenance.digest
    kept = LatencyPredictor.from_json(text, target="", runtime_version="", digest=digest)
    np.testing.assert_array_equal(kept.predict(judged, DECODE).value_ms, fitted.predict(judged, DECODE).value_ms)
    with pytest.raises(ValueError, match="not profiled with parts of other bits than the rest: run nas profile again"):
        fit(20, 0).predict(judged[::2], DECODE)
    with pytest.raises(ValueError, match="not profiled with a head of other bits"):
        fit(20, 0).predict([replace(test[0], head_bits=4)], DECODE)


def test_a_prior_without_parts_of_more_bits_is_not_leant_on(fit, sample_shapes, device) -> None:
    mixed, more_ms = widened(sample_shapes(12, seed=3))
    fitted = LatencyPredictor.fit(mixed, device(mixed) + more_ms, DECODE, "int4", seed=0, priors=[fit(40, 0)])
    assert fitted.prior is None


def test_parts_of_more_bits_have_costs_for_every_length_of_prompt(sample_shapes, device) -> None:
    prompts = [Workload("prefill", tokens) for tokens in (16, 128, 512)]
    mixed, more_ms = widened(sample_shapes(30, seed=0), narrow_heads=False)  # of a prompt it takes next to nothing
    works = [prompts[i % 3] for i in range(len(mixed))]
    tokens = np.array([work.tokens for work in works])
    measured = (device(mixed, noise=0.0) + 3 * more_ms) * tokens / 16
    fitted = LatencyPredictor.fit(mixed, measured, works, "int4", seed=0)
    judged, more_ms = widened(sample_shapes(100, seed=1), narrow_heads=False)
    for prompt in prompts:
        wanted_ms = (device(judged, noise=0.0) + 3 * more_ms) * prompt.tokens / 16
        assert mape(fitted.predict(judged, prompt).value_ms, wanted_ms) < 0.05
