import pytest
import torch
from torch.nn import functional as F

from nas.distillation import half_of_each, kl_to_teacher, next_token_loss


@pytest.fixture
def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, and a teacher's; more positions than are done at once."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((600, 24), (50, 24), (600, 16), (50, 16))
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def _capped(logits: torch.Tensor, cap: float) -> torch.Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def _assert_same(loss: torch.Tensor, wanted: torch.Tensor, ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Both losses, and the gradients of three times each at `ours` and `plain`."""
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (3 * loss).backward()
    (3 * wanted).backward()
    assert ours.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_kl_and_its_gradient_are_those_of_plain_torch(head_inputs: tuple[torch.Tensor, ...], cap: float) -> None:
    hidden, head, teacher, teacher_head = head_inputs
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = kl_to_teacher(ours, head, teacher, teacher_head, torch.float32, cap)
    wanted = F.kl_div(
        _capped(plain @ head.T, cap).log_softmax(-1),
        _capped(teacher @ teacher_head.T, cap).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    _assert_same(loss, wanted, ours, plain)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_next_token_loss_and_its_gradient_are_cross_entropy(head_inputs: tuple[torch.Tensor, ...], cap: float) -> None:
    hidden, head = head_inputs[:2]
    targets = torch.randint(0, len(head), (len(hidden),), generator=torch.Generator().manual_seed(1))
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = next_token_loss(ours, head, targets, torch.float32, cap)
    wanted = F.cross_entropy(_capped(plain @ head.T, cap), targets)
    _assert_same(loss, wanted, ours, plain)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_half_of_each_is_the_mean_of_both_and_of_their_gradients(
    head_inputs: tuple[torch.Tensor, ...], cap: float
) -> None:
    hidden, head, teacher, teacher_head = head_inputs
    targets = torch.randint(0, len(head), (len(hidden),), generator=torch.Generator().manual_seed(1))
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = half_of_each(ours, head, teacher, teacher_head, targets, torch.float32, cap)
    log_q = _capped(plain @ head.T, cap).log_softmax(-1)
    log_p = _capped(teacher @ teacher_head.T, cap).log_softmax(-1)
    wanted = (F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") + F.nll_loss(log_q, targets)) / 2
    _assert_same(loss, wanted, ours, plain)


def test_half_precision_products_still_sum_in_fp32(head_inputs: tuple[torch.Tensor, ...]) -> None:
    hidden, head, teacher, teacher_head = head_inputs
    exact = kl_to_teacher(hidden, head, teacher, teacher_head, torch.float32)
    rough = kl_to_teacher(hidden, head, teacher, teacher_head, torch.bfloat16)
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(exact), rel=0.02)
