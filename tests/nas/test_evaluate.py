import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nas import calibration, evaluate
from nas.arithmetic import fast_dtype
from nas.evaluate import Evaluator
from nas.space import SearchSpace
from nas.subnet import LayerChoice, Subnet
from nas.supernet import Supernet


@pytest.fixture
def supernet(tiny, windows, monkeypatch):
    monkeypatch.setattr(calibration, "fast_dtype", lambda: torch.float32)
    loaded = tiny(tied=False)
    made = Supernet(loaded, SearchSpace.from_config(loaded.config, width_fractions=(0, 0.5, 1)))
    made.prepare(windows)
    return made


@pytest.fixture
def held_out():
    return torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(2))


SUBNET = Subnet((LayerChoice(1, 64), LayerChoice(0, 128), LayerChoice(3, 0)), 4)


@torch.no_grad()
def _by_hand(supernet, windows, subnet, positions):
    supernet.activate(supernet.space.full(32))
    p = supernet.model(windows).logits.double().log_softmax(-1)
    supernet.activate(subnet)
    q = supernet.model(windows).logits.double().log_softmax(-1)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[:, positions].mean()
    nll = F.nll_loss(q[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none")[:, positions].mean()
    return float(kl), float(nll.exp())


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_kl_and_perplexity_are_those_of_plain_logits(supernet, held_out, monkeypatch, stride):
    monkeypatch.setattr(evaluate, "_TOKENS_AT_ONCE", 50)
    monkeypatch.setattr(evaluate, "_LOGITS_AT_ONCE", 7)
    quality = Evaluator(supernet, held_out, torch.float32, stride=stride).evaluate(SUBNET)
    kl, perplexity = _by_hand(supernet, held_out, SUBNET, slice(stride - 1, None, stride))
    assert quality.kl == pytest.approx(kl, rel=1e-4)
    assert quality.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert quality.tokens == 144


def test_the_full_model_costs_nothing_and_rounding_something(supernet, held_out):
    evaluator = Evaluator(supernet, held_out)
    assert evaluator.evaluate(evaluator.supernet.space.full(32)).kl == 0
    assert (
        0
        < evaluator.evaluate(evaluator.supernet.space.full(8)).kl
        < evaluator.evaluate(evaluator.supernet.space.full(4)).kl
    )


def test_one_part_replaced_is_the_subnet_that_differs_in_it(supernet, held_out):
    evaluator = Evaluator(supernet, held_out, torch.float32)
    full = supernet.space.full(32)
    for layer, part, choice, other in (
        (0, "mlp", 64, LayerChoice(3, 64)),
        (1, "attention", 0, LayerChoice(0, 128)),
        (2, "attention", 2, LayerChoice(2, 128)),
    ):
        layers = tuple(other if i == layer else kept for i, kept in enumerate(full.layers))
        wanted = evaluator.evaluate(Subnet(layers, 32)).kl
        assert evaluator.block_kl(layer, part, choice) == pytest.approx(wanted, rel=1e-4)
    assert evaluator.block_kl(1, "mlp", 128, "fp32") == 0
    assert evaluator.block_kl(1, "mlp", 128, "int4") > 0


def test_same_subnet_same_floats(supernet, held_out):
    evaluator = Evaluator(supernet, held_out)
    first = evaluator.evaluate(SUBNET)
    evaluator.block_kl(1, "mlp", 0)
    again = evaluator.evaluate(SUBNET)
    assert (again.kl, again.perplexity) == (first.kl, first.perplexity)


@pytest.mark.skipif(fast_dtype() == torch.float32, reason="no native bfloat16 here")
def test_bfloat16_is_near_float32(supernet, held_out):
    fast = Evaluator(supernet, held_out, torch.bfloat16).evaluate(SUBNET)
    exact = Evaluator(supernet, held_out, torch.float32).evaluate(SUBNET)
    assert fast.kl == pytest.approx(exact.kl, rel=0.03)


def test_parts_are_scored_on_the_first_windows_alone(supernet, held_out):
    some = Evaluator(supernet, held_out, torch.float32, score_windows=2)
    first = Evaluator(supernet, held_out[:2], torch.float32)
    assert some.block_kl(1, "mlp", 64) == pytest.approx(first.block_kl(1, "mlp", 64), rel=1e-5)
    subnet = supernet.space.sample(np.random.default_rng(0))
    assert some.evaluate(subnet).kl == pytest.approx(Evaluator(supernet, held_out, torch.float32).evaluate(subnet).kl)


def test_teacher_logits_kept_or_made_anew_give_the_same(supernet, held_out, monkeypatch):
    subnet = supernet.space.sample(np.random.default_rng(0))
    keeping = Evaluator(supernet, held_out, torch.float32)
    twice = [keeping.evaluate(subnet).kl for _ in range(2)]
    monkeypatch.setattr("nas.evaluate._KEPT_LOGITS_BYTES", 0)
    assert twice == pytest.approx([Evaluator(supernet, held_out, torch.float32).evaluate(subnet).kl] * 2, rel=1e-5)
