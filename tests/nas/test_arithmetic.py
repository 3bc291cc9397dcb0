import pytest
import torch

from nas import arithmetic


@pytest.mark.parametrize(("halves_s", "wanted"), [(0.5, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32)])
def test_halves_are_taken_where_they_are_much_faster(monkeypatch, halves_s, wanted):
    monkeypatch.setattr(arithmetic, "_product_s", lambda dtype: halves_s if dtype == torch.bfloat16 else 1.0)
    arithmetic.fast_dtype.cache_clear()
    try:
        assert arithmetic.fast_dtype() == wanted
    finally:
        arithmetic.fast_dtype.cache_clear()


def test_products_are_timed_one_by_one():
    """Twelve products of 0.45 GFLOP: no machine takes as long as a second for one, or none at all."""
    assert 1e-6 < arithmetic._product_s(torch.float32) < 1


def test_computing_in_halves_leaves_weights_alone():
    layer, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
    with arithmetic.computing(torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with arithmetic.computing(torch.float32):
        assert layer(x).dtype == layer.weight.dtype == torch.float32
