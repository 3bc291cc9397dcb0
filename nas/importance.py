"""Keep-orders: which inputs of a linear map to drop first, by the optimal brain surgeon's saliency.

Shapes: W [out, in] the map, H [in, in] the sum of x x^T over calibration tokens. All arithmetic is in float64.

Dropping input j and letting the others make up for it costs s_j = |W_:j|^2 / [H^-1]_jj (Hassibi and Stork 1993);
dropping a block g of inputs costs tr(W_g ([H^-1]_gg)^-1 W_g^T). Backward elimination drops the least costly, updates
W and H^-1 to what is left, and goes on; the reverse is the keep-order, of which every width is a prefix.
"""

from __future__ import annotations

import torch

#: Ridge relative to each input's own energy H_jj. A ridge relative to the mean drowns every input but the largest:
#: one channel in SmolLM2's layer 11 has 8e5 times the median's energy.
DAMPING = 1e-2


def normalise(H: torch.Tensor, damping: float = DAMPING) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, d): the correlation matrix C [in, in] = H_ij / (d_i d_j) + damping on its diagonal, and the scales d [in].

    Inputs that never fired count as a millionth of the loudest: nothing divides by zero, and they are dropped first.
    """
    C = H.to(torch.float64, copy=True)  # the one copy: of a 7B model's widest input it takes a gigabyte
    scale = C.diagonal().clamp_min(0).sqrt()
    scale = scale.clamp_min(max(1e-6 * float(scale.max()), 1e-30))
    C.div_(scale.unsqueeze(0)).div_(scale.unsqueeze(1))
    C.diagonal().fill_(1 + damping)
    return C, scale


def keep_order(
    W: torch.Tensor, H: torch.Tensor, *, group: int = 1, chunk: int = 1, damping: float = DAMPING
) -> torch.Tensor:
    """Groups of `group` consecutive inputs, most important first: int64 [in / group]; `chunk` groups go at a step.

    Saliencies do not depend on the inputs' scales, so the elimination runs on the correlation matrix.
    """
    C, scale = normalise(H, damping)
    W = W.double() * scale
    L = torch.linalg.cholesky(C)
    del C  # such matrices are what memory goes to
    inverse = torch.cholesky_inverse(L)
    del L
    left = torch.arange(W.shape[1] // group)
    dropped: list[torch.Tensor] = []
    while len(left):
        ascending = _saliency(W, inverse, left, group).argsort(stable=True)
        dropped.append(left[ascending[:chunk]])
        left = left[ascending[chunk:].sort().values]
        _eliminate(W, inverse, _inputs(dropped[-1], group))
    return torch.cat(dropped).flip(0)


def _saliency(W: torch.Tensor, inverse: torch.Tensor, left: torch.Tensor, group: int) -> torch.Tensor:
    """Cost of dropping each of the groups `left`, [left]."""
    if group == 1:
        return W.square().sum(0)[left] / inverse.diagonal()[left]
    blocks = torch.stack([inverse[i : i + group, i : i + group] for i in (left * group).tolist()])
    W_g = W.reshape(W.shape[0], -1, group)[:, left].permute(1, 2, 0)  # [left, group, out]
    # the blocks are positive definite; besides, oneMKL's batched LU solve never returned on some of SmolLM2's
    saved: torch.Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), W_g, upper=False)
    return saved.square().sum((1, 2))


def _eliminate(W: torch.Tensor, inverse: torch.Tensor, out: torch.Tensor) -> None:
    """Let the other inputs take over what `out` carried (the surgeon's step for a block), in place.

    The rows and columns of `out` become zero and stay: cutting them off would copy both matrices at every step, which
    takes five times as long.
    """
    across = inverse[out]
    gain = torch.cholesky_solve(across, torch.linalg.cholesky(across[:, out]))
    W.addmm_(W[:, out], gain, alpha=-1)
    inverse.addmm_(across.T, gain, alpha=-1)


def _inputs(groups: torch.Tensor, group: int) -> torch.Tensor:
    return (groups.unsqueeze(1) * group + torch.arange(group)).flatten()
