"""The type in which this machine multiplies matrices fastest, and computing in it."""

from __future__ import annotations

import time
from functools import cache

import torch

#: How much faster products of halves have to be for their rounding to be worth it.
_WORTH_HALVES = 1.5
_PRODUCTS = 12


@cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where matrices of it multiply much faster than those of float32, else float32.

    Timed, once a process: what a processor lists does not tell. Without AMX, with dot products of bfloat16 alone
    (AVX512-BF16), a Xeon took twice as long as in float32, an EPYC less than half. So far from `_WORTH_HALVES` noise
    does not decide, which matters: a study holds trials of one type.
    """
    return torch.bfloat16 if _product_s(torch.float32) > _WORTH_HALVES * _product_s(torch.bfloat16) else torch.float32


def fast_dtype_name() -> str:
    """What a study's protocol says of it."""
    return str(fast_dtype()).removeprefix("torch.")


def _product_s(dtype: torch.dtype) -> float:
    """The least of several times, of a product that is done before others get the processor."""
    x, y = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    seconds = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, y)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def computing(dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`; weights, norms and the residual stream stay fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
