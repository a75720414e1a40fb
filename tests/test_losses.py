"""Losses: value and gradient against closed forms in float64 `math`, and the properties that each must have."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.losses import LOSSES, dpo_loss

logps = st.floats(-60, 0)
four = st.tuples(logps, logps, logps, logps)
betas = st.floats(0.01, 2.0)


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sigmoid(z: float) -> float:
    return math.exp(log_sigmoid(z))


CLOSED = {  # loss_type: (h, β) -> (value, derivative by h)
    "sigmoid": lambda h, beta: (-log_sigmoid(beta * h), -beta * sigmoid(-beta * h)),
    "hinge": lambda h, beta: (max(0.0, 1 - beta * h), -beta if beta * h < 1 else 0.0),
    "ipo": lambda h, beta: ((h - 0.5 / beta) ** 2, 2 * (h - 0.5 / beta)),
}


def call(values, **options):
    tensors = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]
    return tensors, dpo_loss(*tensors, **options)


@pytest.mark.parametrize("loss_type", LOSSES)
@given(values=four, beta=betas)
def test_value_gradient_and_rewards_equal_the_closed_form(loss_type, values, beta):
    tensors, (losses, chosen_rewards, rejected_rewards) = call(values, loss_type=loss_type, beta=beta)
    w, l = values[0] - values[2], values[1] - values[3]
    value, slope = CLOSED[loss_type](w - l, beta)
    assert losses.item() == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert chosen_rewards.item() == pytest.approx(beta * w, abs=1e-12)
    assert rejected_rewards.item() == pytest.approx(beta * l, abs=1e-12)
    losses.sum().backward()
    if loss_type != "hinge" or abs(beta * (w - l) - 1) > 1e-9:
        assert [t.grad.item() for t in tensors] == pytest.approx([slope, -slope, -slope, slope], rel=1e-9, abs=1e-9)


@given(values=four, beta=betas, epsilon=st.floats(0, 0.49))
def test_label_smoothing_mixes_both_labels(values, beta, epsilon):
    h = values[0] - values[2] - values[1] + values[3]
    _, (losses, _, _) = call(values, beta=beta, label_smoothing=epsilon)
    expected = -(1 - epsilon) * log_sigmoid(beta * h) - epsilon * log_sigmoid(-beta * h)
    assert losses.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("loss_type", LOSSES)
@given(values=four, shift=st.floats(-20, 20))
def test_a_constant_on_policy_and_reference_changes_nothing(loss_type, values, shift):
    _, (losses, _, _) = call(values, loss_type=loss_type)
    _, (shifted, _, _) = call((values[0] + shift, values[1], values[2] + shift, values[3]), loss_type=loss_type)
    assert shifted.item() == pytest.approx(losses.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("loss_type", "known"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_policy_equal_to_reference_has_the_known_loss_and_no_reward(loss_type, known):
    same = torch.tensor([-3.0, -40.0]), torch.tensor([-7.0, -5.0])
    losses, chosen_rewards, rejected_rewards = dpo_loss(*same, *same, loss_type=loss_type, beta=0.1)
    assert losses.tolist() == pytest.approx([known] * 2)
    assert chosen_rewards.tolist() == rejected_rewards.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("h", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_value_and_gradient_are_finite_however_far_apart(loss_type, h, dtype):
    chosen = torch.tensor([h], dtype=dtype, requires_grad=True)
    losses, _, _ = dpo_loss(chosen, *(torch.zeros(1, dtype=dtype),) * 3, loss_type=loss_type, beta=1.0)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all() and torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_reordering_the_batch_reorders_the_losses(loss_type):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(6, generator=generator) * 10 for _ in range(4)]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    losses, _, _ = dpo_loss(*values, loss_type=loss_type)
    reordered, _, _ = dpo_loss(*(value[order] for value in values), loss_type=loss_type)
    assert torch.equal(losses[order], reordered)


def test_reference_free_takes_the_reference_to_be_indifferent():
    chosen, rejected = torch.tensor([-3.0]), torch.tensor([-5.0])
    losses, chosen_rewards, _ = dpo_loss(chosen, rejected, None, None, reference_free=True, beta=0.5)
    assert losses.item() == pytest.approx(-log_sigmoid(0.5 * 2.0))
    assert chosen_rewards.item() == -1.5


def test_ipo_divides_by_lengths_where_it_gets_them():
    sums = [torch.tensor([value]) for value in (-12.0, -30.0, -10.0, -24.0)]
    lengths = {"chosen_lengths": torch.tensor([4]), "rejected_lengths": torch.tensor([3])}
    losses, chosen_rewards, _ = dpo_loss(*sums, loss_type="ipo", beta=0.25, **lengths)
    assert losses.item() == pytest.approx((-2 / 4 + 6 / 3 - 2.0) ** 2)
    assert chosen_rewards.item() == pytest.approx(0.25 * -2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoind"},
        {"label_smoothing": 0.5},
        {"label_smoothing": -0.1},
        {"loss_type": "ipo", "label_smoothing": 0.1},
    ],
)
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ValueError, match="loss_type|label_smoothing"):
        dpo_loss(*(torch.zeros(2),) * 4, **options)
