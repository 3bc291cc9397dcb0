import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nas import calibration, sequential
from nas.evaluate import Evaluator
from nas.protocol import EvaluationProtocol
from nas.refinement import check_refinable, knapsack, refine
from nas.sequential import fit_in_sequence
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet

from .synthetic import latency_ms

#: Thin where the tiny model needs it, whole where not: an exchange has something to find.
UNEVEN = (LayerChoice(3, 128), LayerChoice(1, 32), LayerChoice(2, 64))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    for module in (calibration, sequential):
        monkeypatch.setattr(module, "fast_dtype", lambda: torch.float32)


def _evaluator(loaded, windows, **space):
    supernet = Supernet(loaded, SearchSpace.from_config(loaded.config, **space))
    supernet.prepare(windows)
    return Evaluator(supernet, windows[:4], dtype=torch.float32)


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_keeps_to_its_limit_and_is_near_the_best(seed):
    rng = np.random.default_rng(seed)
    places = [(layer, part) for layer in range(3) for part in ("attention", "mlp")]
    ms = {place: {(size, 0): float(size + rng.uniform(0, 0.1)) for size in range(3)} for place in places}
    kl = {place: {(size, 0): float(scale * (2 - size) ** 2) for size in range(3)}
          for place, scale in zip(places, rng.uniform(0.1, 1, 6), strict=True)}  # fmt: skip
    limit_ms = float(rng.uniform(4, 9))
    chosen = knapsack(kl, ms, limit_ms)
    assert sum(ms[place][option] for place, option in chosen.items()) <= limit_ms + 1e-6
    every = itertools.product(*(kl[place] for place in places))
    best = min(
        sum(kl[place][o] for place, o in zip(places, options, strict=True))
        for options in every
        if sum(ms[place][o] for place, o in zip(places, options, strict=True)) <= limit_ms
    )
    found = sum(kl[place][option] for place, option in chosen.items())
    assert best <= found + 1e-9
    assert found <= best + max(max(costs.values()) for costs in kl.values())  # the step that did not fit


def test_a_knapsack_that_nothing_fits_into():
    assert knapsack({(0, "mlp"): {(1, 0): 0.0}}, {(0, "mlp"): {(1, 0): 2.0}}, 1.0) is None


@pytest.mark.parametrize("bits", [32, 4])
def test_exchanges_lower_the_kl_at_no_more_latency(tiny, windows, bits):
    evaluator = _evaluator(tiny(), windows)
    subnet, fitted, kept = Subnet(UNEVEN, bits), [], {}

    def fit(other):
        fitted.append(other)
        fit_in_sequence(evaluator.supernet, other, windows)

    found = refine(evaluator, subnet, latency_ms, fit, rounds=3, store=kept.__setitem__)
    assert fitted[0] == subnet
    assert found.rounds >= 1
    assert found.subnet != subnet
    assert found.after.kl < found.before.kl
    assert latency_ms([found.subnet])[0] <= latency_ms([subnet])[0]
    assert evaluator.evaluate(found.subnet).kl == pytest.approx(found.after.kl)
    # a step at a time: sizes next to those before
    space = evaluator.supernet.space
    steps = np.abs(space.encode(found.subnet.at("int8")) - space.encode(subnet.at("int8")))[:-1]
    assert 0 < steps.max() <= found.rounds
    # asked again, nothing is scored again, and it ends alike
    again = refine(evaluator, subnet, latency_ms, fit, rounds=3, stored=kept, store=lambda name, kl: pytest.fail(name))
    assert (again.subnet, again.rounds) == (found.subnet, found.rounds)


def test_parts_keep_bits_of_their_own(tiny, windows):
    evaluator = _evaluator(tiny(), windows, mixed_bits=True)
    layers = (LayerChoice(3, 128, 8, 0), LayerChoice(1, 32, 0, 8), LayerChoice(2, 64, 8, 8))
    found = refine(
        evaluator, Subnet(layers, 4), latency_ms, lambda other: fit_in_sequence(evaluator.supernet, other, windows)
    )
    for before, after in zip(layers, found.subnet.layers, strict=True):
        assert after.attention_bits == (before.attention_bits if after.num_key_value_heads else 0)
        assert after.mlp_bits == (before.mlp_bits if after.intermediate_size else 0)


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("tasks", ["items.jsonl"], "goes by KL, .* which goes by tasks"),
        ("reform", False, "searched with --no-reform"),
        ("dtype", "float64", "computed in .* in float64; refine where it was searched"),
    ],
)
def test_studies_of_other_trials_are_refused(field, value, got):
    protocol = EvaluationProtocol().to_dict()
    check_refinable(SimpleNamespace(name="s", protocol=protocol))
    with pytest.raises(ValueError, match=got):
        check_refinable(SimpleNamespace(name="s", protocol=protocol | {field: value}))


def test_what_cannot_be_refined_is_refused(tiny, windows):
    alike = _evaluator(tiny(), windows, homogeneous=True)
    with pytest.raises(ValueError, match="wanted a space whose layers may differ"):
        refine(alike, alike.supernet.space.full(8), latency_ms, lambda other: None)
    evaluator = _evaluator(tiny(), windows)
    with pytest.raises(ValueError, match="wanted rounds of at least 1, got 0"):
        refine(evaluator, Subnet(UNEVEN, 8), latency_ms, lambda other: None, rounds=0)
