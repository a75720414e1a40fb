"""Every loss, proven: value and gradient against closed forms in float64 `math`, the properties that each must have by
name, refusals, and that each function still works where it is pasted alone."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo.collate
import dpo.logprobs
import dpo.losses
from dpo.losses import LOSSES, capped_exp, check_loss, dpo_loss

# ------------------------------------------------------------------- the closed forms, by hand: value and derivatives


def ls(z: float) -> float:
    """log σ(z)"""
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sg(z: float) -> float:
    """σ(z)"""
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


def dsg(z: float) -> float:
    """σ′(z)"""
    return sg(z) * sg(-z)


def sigmoid(h, *, beta=0.1, label_smoothing=0.0):
    x, e = beta * h, label_smoothing
    return -(1 - e) * ls(x) - e * ls(-x), [beta * (e * sg(x) - (1 - e) * sg(-x))]


def robust(h, *, beta=0.1, label_smoothing=0.0):
    x, e = beta * h, label_smoothing
    slope = -beta * ((1 - e) * sg(-x) + e * sg(x)) / (1 - 2 * e)
    return (-(1 - e) * ls(x) + e * ls(-x)) / (1 - 2 * e), [slope]


def hinge(h, *, beta=0.1):
    return max(0.0, 1 - beta * h), [-beta if 1 - beta * h > 0 else 0.0]


def ipo(h, *, beta=0.1):
    return (h - 1 / (2 * beta)) ** 2, [2 * (h - 1 / (2 * beta))]


def exo_pair(h, *, beta=0.1, label_smoothing=0.0):
    x, e = beta * h, label_smoothing or 0.001
    value = sg(x) * (ls(x) - math.log(1 - e)) + sg(-x) * (ls(-x) - math.log(e))
    return value, [beta * dsg(x) * (x - math.log((1 - e) / e))]  # ls(x) − ls(−x) = x


def discopop(h, *, beta=0.1, discopop_tau=0.05):
    x, tau = beta * h, discopop_tau
    exponential = math.exp(ls(x / tau) - x)
    value = -sg(-x / tau) * ls(x) + exponential
    slope = -sg(-x / tau) * sg(-x) + dsg(x / tau) / tau * ls(x) + exponential * (sg(-x / tau) / tau - 1)
    return value, [beta * slope]


def odpo(h, offset, *, beta=0.1):
    slope = sg(offset - beta * h)
    return -ls(beta * h - offset), [-beta * slope, slope]


def r_dpo(h, chosen_length, rejected_length, *, beta=0.1, alpha=0.01):
    x = beta * h + alpha * (chosen_length - rejected_length)
    return -ls(x), [-beta * sg(-x), -alpha * sg(-x), alpha * sg(-x)]


def nca_pair(w, l, *, beta=0.1):
    value = -ls(beta * w) - 0.5 * (ls(-beta * w) + ls(-beta * l))
    return value, [beta * (0.5 * sg(beta * w) - sg(-beta * w)), beta * 0.5 * sg(beta * l)]


def bco_pair(w, l, *, beta=0.1, delta=0.0):
    return -ls(beta * w - delta) - ls(delta - beta * l), [-beta * sg(delta - beta * w), beta * sg(beta * l - delta)]


def sppo_hard(w, l, *, beta=0.1):
    a, b = w - 1 / (2 * beta), l + 1 / (2 * beta)
    return a * a + b * b, [2 * a, 2 * b]


def apo_zero(w, l, *, beta=0.1):
    return 1 - sg(beta * w) + sg(beta * l), [-beta * dsg(beta * w), beta * dsg(beta * l)]


def apo_down(w, l, *, beta=0.1):
    apart = beta * dsg(beta * (w - l))
    return sg(beta * w) + 1 - sg(beta * (w - l)), [beta * dsg(beta * w) - apart, apart]


def dpop(w, l, *, beta=0.1, dpop_lambda=50.0):
    x = beta * (w - l - dpop_lambda * max(0.0, -w))
    return -ls(x), [-beta * (1 + (dpop_lambda if w < 0 else 0.0)) * sg(-x), beta * sg(-x)]


def chipo(w, l, *, beta=0.1, chipo_clip=10.0):
    x = beta * (math.exp(w) + w) - beta * (math.exp(l) + l)
    if abs(x) > chipo_clip:
        return -ls(math.copysign(chipo_clip, x)), [0.0, 0.0]
    return -ls(x), [-beta * (math.exp(w) + 1) * sg(-x), beta * (math.exp(l) + 1) * sg(-x)]


def sigmoid_norm(w, l, chosen_length, rejected_length, *, beta=2.0):
    x = beta * (w / chosen_length - l / rejected_length)
    slope = -beta * sg(-x)
    by_lengths = [-slope * w / chosen_length**2, slope * l / rejected_length**2]
    return -ls(x), [slope / chosen_length, -slope / rejected_length, *by_lengths]


def simpo(chosen_mean, rejected_mean, *, beta=2.0, gamma=0.5):
    x = beta * (chosen_mean - rejected_mean) - gamma
    return -ls(x), [-beta * sg(-x), beta * sg(-x)]


def orpo(chosen_mean, rejected_mean, *, orpo_lambda=0.1):
    log_odds = math.log(math.exp(chosen_mean) / -math.expm1(chosen_mean))
    log_odds -= math.log(math.exp(rejected_mean) / -math.expm1(rejected_mean))
    slope = -orpo_lambda * sg(-log_odds)  # d log odds / d log p = 1/(1 − p)
    value = -chosen_mean - orpo_lambda * ls(log_odds)
    return value, [-1 - slope / math.expm1(chosen_mean), slope / math.expm1(rejected_mean)]


def cpo(chosen_logp, rejected_logp, chosen_length, *, beta=0.1, cpo_alpha=1.0):
    x = beta * (chosen_logp - rejected_logp)
    value = -ls(x) - cpo_alpha * chosen_logp / chosen_length
    slope = -beta * sg(-x)
    return value, [slope - cpo_alpha / chosen_length, -slope, cpo_alpha * chosen_logp / chosen_length**2]


def sft(chosen_logp, chosen_length):
    return -chosen_logp / chosen_length, [-1 / chosen_length, chosen_logp / chosen_length**2]


def f_divergence(z, *, f_divergence_type="reverse_kl", f_alpha_divergence_coef=1.0):
    alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(f_divergence_type, f_alpha_divergence_coef)
    if f_divergence_type == "js_divergence":
        return math.log(2) + ls(z), [sg(-z)]
    return (z, [1.0]) if alpha == 0 else (-math.expm1(-alpha * z) / alpha, [math.exp(-alpha * z)])


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = top + math.log(math.fsum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def plackett_luce(*ratios, beta=0.1):
    rewards, value, slopes = [beta * ratio for ratio in ratios], 0.0, [0.0] * len(ratios)
    for k in range(len(ratios)):  # the k-th choice is made among those that are left
        logps = log_softmax(rewards[k:])
        value -= logps[0]
        slopes[k] -= beta
        for j, logp in enumerate(logps, start=k):
            slopes[j] += beta * math.exp(logp)
    return value, slopes


def exo(*values, beta=0.1, exo_beta_r=1.0):
    ratios, scores = values[: len(values) // 2], values[len(values) // 2 :]
    policy, target = log_softmax([beta * r for r in ratios]), log_softmax([s / exo_beta_r for s in scores])
    value = math.fsum(math.exp(p) * (p - t) for p, t in zip(policy, target, strict=True))
    by_ratios = [beta * math.exp(p) * (p - t - value) for p, t in zip(policy, target, strict=True)]
    return value, by_ratios + [(math.exp(t) - math.exp(p)) / exo_beta_r for p, t in zip(policy, target, strict=True)]


# ----------------------------------------------------------------------------------- what each function is fed with

logps, lengths, ratios, means = (
    st.floats(-60, 0),
    st.integers(1, 40).map(float),
    st.floats(-60, 60),
    st.floats(-12, -0.01),
)
small = st.floats(-20, 20)
BETA = {"beta": st.floats(0.01, 5)}
SMOOTH = BETA | {"label_smoothing": st.floats(1e-6, 0.49) | st.just(0.0)}
DIVERGENCE = {
    "f_divergence_type": st.sampled_from(["reverse_kl", "js_divergence", "alpha_divergence", "forward_kl"]),
    "f_alpha_divergence_coef": st.floats(0.05, 1.8) | st.just(1.0) | st.floats(-1, -0.1),
}
PAIRWISE = {  # function: (closed form, its inputs, its options)
    "sigmoid_loss": (sigmoid, [ratios], SMOOTH),
    "robust_loss": (robust, [ratios], SMOOTH),
    "hinge_loss": (hinge, [ratios], BETA),
    "ipo_loss": (ipo, [ratios], BETA),
    "exo_pair_loss": (exo_pair, [ratios], SMOOTH),
    "discopop_loss": (discopop, [ratios], BETA | {"discopop_tau": st.floats(0.02, 1)}),
    "odpo_loss": (odpo, [ratios, st.floats(0, 10)], BETA),
    "r_dpo_loss": (r_dpo, [ratios, lengths, lengths], BETA | {"alpha": st.floats(0, 2)}),
    "nca_pair_loss": (nca_pair, [ratios, ratios], BETA),
    "bco_pair_loss": (bco_pair, [ratios, ratios], BETA | {"delta": st.floats(-5, 5)}),
    "sppo_hard_loss": (sppo_hard, [ratios, ratios], BETA),
    "apo_zero_loss": (apo_zero, [ratios, ratios], BETA),
    "apo_down_loss": (apo_down, [ratios, ratios], BETA),
    "dpop_loss": (dpop, [ratios, ratios], BETA | {"dpop_lambda": st.floats(0, 50)}),
    "chipo_loss": (chipo, [st.floats(-8, 8)] * 2, BETA | {"chipo_clip": st.floats(0.5, 500)}),
    "sigmoid_norm_loss": (sigmoid_norm, [ratios, ratios, lengths, lengths], BETA),
    "simpo_loss": (simpo, [means, means], BETA | {"gamma": st.floats(0, 3)}),
    "orpo_loss": (orpo, [means, means], {"orpo_lambda": st.floats(0, 3)}),
    "cpo_loss": (cpo, [logps, logps, lengths], BETA | {"cpo_alpha": st.floats(0, 3)}),
    "sft_loss": (sft, [logps, lengths], {}),
    "f_divergence_score": (f_divergence, [small], DIVERGENCE),
    "capped_exp": (lambda x: (math.exp(x), [math.exp(x)]), [st.floats(-60, 40)], {}),
}


def near(value, scale: float = 0.0):
    return pytest.approx(value, rel=1e-9, abs=1e-9 + 1e-12 * scale)


def leaves(rows) -> list[torch.Tensor]:
    """Columns of rows as float64 tensors that want a gradient."""
    return [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in zip(*rows, strict=True)]


def function(name: str):
    return getattr(dpo.losses, name)


def test_every_function_and_every_loss_type_has_a_closed_form_here():
    public = {name for name, value in vars(dpo.losses).items() if inspect.isfunction(value)}
    elsewhere = {"aot_loss", "aot_pair_loss", "plackett_luce_loss", "exo_loss", "check_loss", "dpo_loss"}
    assert public == {*PAIRWISE, *elsewhere}
    assert {loss.__name__ for loss in LOSSES.values()} == {
        name for name in public if name.endswith("_loss") and name not in ("check_loss", "dpo_loss")
    }
    for name, loss in LOSSES.items():
        assert loss.__name__ == ("aot_pair_loss" if name == "aot_unpaired" else f"{name}_loss")


@pytest.mark.parametrize("name", PAIRWISE)
@given(data=st.data())
def test_value_and_gradient_equal_the_closed_form(name, data):
    closed, inputs, options = PAIRWISE[name]
    rows = data.draw(st.lists(st.tuples(*inputs), min_size=1, max_size=3))
    options = {key: data.draw(values, label=key) for key, values in options.items()}
    tensors = leaves(rows)
    result = function(name)(*tensors, **options)
    assert result.shape == (len(rows),) and result.dtype == torch.float64
    expected = [closed(*row, **options) for row in rows]
    assert result.tolist() == [near(value) for value, _ in expected]
    result.sum().backward()
    for i, (_, slopes) in enumerate(expected):
        assert [tensor.grad[i].item() for tensor in tensors] == [near(slope) for slope in slopes]


def by_quantile(first, second, closed, options):
    """Sorts two lists, pairs them by rank and gives values by rank and slopes in the lists' own order."""
    order, other = (sorted(range(len(first)), key=values.__getitem__) for values in (first, second))
    values, slopes = [], [[0.0] * len(first), [0.0] * len(first)]
    for i, j in zip(order, other, strict=True):
        value, (slope,) = closed(first[i] - second[j], **options)
        values.append(value)
        slopes[0][i], slopes[1][j] = slope, -slope
    return values, slopes


distinct = st.integers(1, 5).flatmap(lambda n: st.tuples(*[st.lists(ratios, min_size=n, max_size=n, unique=True)] * 2))


@pytest.mark.parametrize("name", ["aot_loss", "aot_pair_loss"])
@given(columns=distinct, beta=BETA["beta"], label_smoothing=SMOOTH["label_smoothing"])
def test_losses_over_the_batch_equal_the_closed_form_by_quantile(name, columns, beta, label_smoothing):
    options = {"beta": beta, "label_smoothing": label_smoothing}
    tensors = leaves(zip(*columns, strict=True))
    result = function(name)(*tensors, **options)
    values, slopes = by_quantile(*columns, sigmoid, options)
    assert result.tolist() == near(values)
    result.sum().backward()
    assert [tensor.grad.tolist() for tensor in tensors] == [near(slope) for slope in slopes]


RANKINGS = ("plackett_luce", "exo")
RANKED = st.lists(st.lists(ratios, min_size=2, max_size=5), min_size=1, max_size=3)  # rows of 2 to 5 completions


def ragged(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of numbers as a float64 leaf (B, K), with 77 for what is missing, and the mask of what is there."""
    most = max(map(len, rows))
    values = torch.tensor([row + [77.0] * (most - len(row)) for row in rows], dtype=torch.float64, requires_grad=True)
    return values, torch.tensor([[i < len(row) for i in range(most)] for row in rows])


def assert_rows_equal(result, tensors, expected):
    """Values and slopes of rows of different lengths; what is missing gets no gradient."""
    assert result.tolist() == [near(value) for value, _ in expected]
    grads = torch.autograd.grad(result.sum(), tensors)
    for i, (_, slopes) in enumerate(expected):
        own = len(slopes) // len(tensors)
        for j, grad in enumerate(grads):
            assert grad[i].tolist() == near(slopes[j * own : (j + 1) * own] + [0.0] * (grad.shape[1] - own))


@given(rows=RANKED, beta=BETA["beta"])
def test_plackett_luce_equals_the_closed_form(rows, beta):
    values, mask = ragged(rows)
    expected = [plackett_luce(*row, beta=beta) for row in rows]
    assert_rows_equal(dpo.losses.plackett_luce_loss(values, beta=beta, mask=mask), [values], expected)
    if mask.all():
        assert_rows_equal(dpo.losses.plackett_luce_loss(values, beta=beta), [values], expected)


@given(data=st.data(), rows=RANKED, beta=BETA["beta"], exo_beta_r=st.floats(0.1, 3))
def test_exo_over_many_completions_equals_the_closed_form(data, rows, beta, exo_beta_r):
    values, mask = ragged(rows)
    points = [data.draw(st.lists(small, min_size=len(row), max_size=len(row))) for row in rows]
    scores, _ = ragged(points)
    options = {"beta": beta, "exo_beta_r": exo_beta_r}
    expected = [exo(*row, *own, **options) for row, own in zip(rows, points, strict=True)]
    assert_rows_equal(dpo.losses.exo_loss(values, scores, **options, mask=mask), [values, scores], expected)
    if mask.all():
        assert_rows_equal(dpo.losses.exo_loss(values, scores, **options), [values, scores], expected)


@given(rows=RANKED, beta=BETA["beta"], epsilon=st.just(0.0) | st.floats(1e-6, 0.49))
def test_exo_without_scores_has_the_best_completion_for_a_label(rows, beta, epsilon):
    values, mask = ragged(rows)
    share = epsilon or 1e-3
    labels = [[math.log(1 - share)] + [math.log(share / (len(row) - 1))] * (len(row) - 1) for row in rows]
    expected = [exo(*row, *label, beta=beta) for row, label in zip(rows, labels, strict=True)]
    expected = [(value, slopes[: len(slopes) // 2]) for value, slopes in expected]
    result = dpo.losses.exo_loss(values, beta=beta, label_smoothing=epsilon, mask=mask)
    assert_rows_equal(result, [values], expected)


@given(data=st.data(), rows=RANKED, beta=BETA["beta"], rpo_alpha=st.none() | st.floats(0, 3))
def test_dpo_loss_of_rankings_equals_the_closed_form(data, rows, beta, rpo_alpha):
    """Policy and reference as (B,) and (B, K−1), rows of different lengths, every option that a ranking has."""
    loss_type = data.draw(st.sampled_from(["plackett_luce", "exo", ["plackett_luce", "exo", "sft"]]))
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    divergence = {key: data.draw(values, label=key) for key, values in DIVERGENCE.items()}
    scores, exo_beta_r = None, data.draw(st.floats(0.1, 3))
    if data.draw(st.booleans()):
        scores = [data.draw(st.lists(small, min_size=len(row), max_size=len(row))) for row in rows]
    rows = [[ratio / 4 for ratio in row] for row in rows]  # else e^15 here and there
    lengths = [[3 + i for i in range(len(row))] for row in rows]

    values, mask = ragged(rows)
    reference = torch.where(mask, -20.0 - torch.arange(values.shape[1]), 0.0).double()
    policy = torch.where(mask, values + reference, 0.0)
    counts = torch.where(mask, 3 + torch.arange(values.shape[1]), 0)
    arguments = [policy[:, 0], policy[:, 1:], reference[:, 0], reference[:, 1:]]
    options = {"scores": None if scores is None else ragged(scores)[0].detach(), "exo_beta_r": exo_beta_r}
    options |= {"chosen_lengths": counts[:, 0], "rejected_lengths": counts[:, 1:], "rpo_alpha": rpo_alpha}
    losses, chosen, rejected = dpo_loss(*arguments, loss_type=loss_type, beta=beta, **divergence, **options)
    assert torch.equal(chosen, (beta * (policy - reference))[:, 0].detach())
    assert torch.equal(rejected, (beta * (policy - reference))[:, 1:].detach())

    expected = []
    for i, row in enumerate(rows):
        moved = [f_divergence(ratio, **divergence) for ratio in row]
        points, temperature = ([math.log(0.999)] + [math.log(1e-3 / (len(row) - 1))] * (len(row) - 1)), 1.0
        if scores is not None:
            points, temperature = scores[i], exo_beta_r
        value, slopes = 0.0, [0.0] * len(row)
        for name in names:
            if name == "sft":
                part, by_score = 0.0, [0.0] * len(row)
            elif name == "exo":
                part, by_score = exo(*(z for z, _ in moved), *points, beta=beta, exo_beta_r=temperature)
            else:
                part, by_score = plackett_luce(*(z for z, _ in moved), beta=beta)
            value += part
            slopes = [s + b * dz for s, b, (_, (dz,)) in zip(slopes, by_score, moved, strict=False)]
        likelihood = ("sft" in names) + (rpo_alpha or 0.0)
        value -= likelihood * (row[0] - 20.0) / lengths[i][0]
        expected.append((value, [slopes[0] - likelihood / lengths[i][0], *slopes[1:]]))
    scale = max(abs(slope) for _, slopes in expected for slope in slopes)
    assert losses.tolist() == near([value for value, _ in expected], scale)
    (grad,) = torch.autograd.grad(losses.sum(), values)
    for i, (_, slopes) in enumerate(expected):
        assert grad[i].tolist() == near(slopes + [0.0] * (grad.shape[1] - len(slopes)), scale)


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in RANKINGS])
def test_losses_of_pairs_refuse_rankings(loss_type):
    chosen, rejected = torch.zeros(2), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"loss_type {loss_type} is for pairs .* choose plackett_luce or exo"):
        dpo_loss(chosen, rejected, chosen, rejected, loss_type=loss_type, margins=chosen, chosen_lengths=chosen + 1)


GRADCHECK = {  # options away from the defaults; the defaults are checked, too
    "sigmoid_loss": {"beta": 0.7, "label_smoothing": 0.2},
    "robust_loss": {"beta": 0.7, "label_smoothing": 0.2},
    "exo_pair_loss": {"beta": 0.7, "label_smoothing": 0.2},
    "discopop_loss": {"beta": 0.3, "discopop_tau": 0.5},
    "bco_pair_loss": {"beta": 0.7, "delta": 0.4},
    "dpop_loss": {"beta": 0.7, "dpop_lambda": 2.0},
    "f_divergence_score": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "aot_loss": {"beta": 0.7, "label_smoothing": 0.2},
    "aot_pair_loss": {"beta": 0.7, "label_smoothing": 0.2},
    "plackett_luce_loss": {"beta": 0.7},
    "exo_loss": {"beta": 0.7, "exo_beta_r": 2.0},
}


def random_inputs(name: str, seed: int, dtype=torch.float64) -> list[torch.Tensor]:
    """Inputs of the right shape and range for a function of losses.py."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3) if name in ("plackett_luce_loss", "exo_loss") else (4,)
    tensors = []
    for parameter in inspect.signature(function(name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            continue
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
        if "lengths" in parameter.name:
            values = torch.randint(1, 20, shape, generator=generator).double()
        elif "means" in parameter.name or "logps" in parameter.name:
            values = -values.abs() - 0.1
        tensors.append(values.to(dtype))
    return tensors


LOSS_FUNCTIONS = [*PAIRWISE, "aot_loss", "aot_pair_loss", "plackett_luce_loss", "exo_loss"]


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_gradcheck(name):
    for seed, options in ((0, {}), (1, GRADCHECK.get(name, {}))):
        tensors = [tensor.requires_grad_() for tensor in random_inputs(name, seed)]
        assert torch.autograd.gradcheck(lambda *args, o=options: function(name)(*args, **o), tensors)


# ------------------------------------------------------------------------------ dpo_loss: each loss_type × its options

OF_H = {"sigmoid": sigmoid, "robust": robust, "hinge": hinge, "ipo": ipo, "exo_pair": exo_pair, "discopop": discopop}
OF_H |= {"odpo": odpo, "r_dpo": r_dpo, "plackett_luce": sigmoid, "exo": exo_pair}  # of two completions
OF_W_AND_L = {"nca_pair": nca_pair, "bco_pair": bco_pair, "sppo_hard": sppo_hard, "apo_zero": apo_zero}
OF_W_AND_L |= {"apo_down": apo_down, "dpop": dpop, "chipo": chipo, "sigmoid_norm": sigmoid_norm}
NO_REFERENCE = {"simpo": simpo, "orpo": orpo, "cpo": cpo, "sft": sft}
BATCH = ("aot", "aot_pair", "aot_unpaired")
OWN = {  # loss_type: {option of dpo_loss: the closed form's name for it}
    "discopop": {"discopop_tau": "discopop_tau"},
    "bco_pair": {"bco_delta": "delta"},
    "dpop": {"dpop_lambda": "dpop_lambda"},
    "chipo": {"chipo_clip": "chipo_clip"},
    "simpo": {"simpo_gamma": "gamma"},
    "orpo": {"orpo_lambda": "orpo_lambda"},
    "cpo": {"cpo_alpha": "cpo_alpha"},
    "r_dpo": {"r_dpo_alpha": "alpha"},
} | {name: {"label_smoothing": "label_smoothing"} for name in ("sigmoid", "robust", "exo_pair", "exo", *BATCH)}
RANGES = {
    "label_smoothing": SMOOTH["label_smoothing"],
    "discopop_tau": st.floats(0.02, 1),
    "bco_delta": st.floats(-5, 5),
    "dpop_lambda": st.floats(0, 50),
    "chipo_clip": st.floats(0.5, 500),
    "simpo_gamma": st.floats(0, 3),
    "orpo_lambda": st.floats(0, 3),
    "cpo_alpha": st.floats(0, 3),
    "r_dpo_alpha": st.floats(0, 2),
}


def closed_form(name: str, pair: dict, options: dict) -> tuple[float, list[float]]:
    """Value and slopes by the log-probabilities (chosen, rejected, chosen of the reference, rejected of it)."""
    mine = {mine: options[theirs] for theirs, mine in OWN.get(name, {}).items() if theirs in options}
    mine |= {"beta": options["beta"]} if name not in ("orpo", "sft") else {}
    chosen, rejected = pair["chosen"], pair["rejected"]
    long, short = pair["chosen_length"], pair["rejected_length"]
    if name in NO_REFERENCE:
        if name == "sft":
            value, slopes = sft(chosen, long)
        elif name == "cpo":
            value, slopes = cpo(chosen, rejected, long, **mine)
        else:
            value, slopes = NO_REFERENCE[name](chosen / long, rejected / short, **mine)
            slopes = [slopes[0] / long, slopes[1] / short]
        return value, [slopes[0], 0.0 if name == "sft" else slopes[1], 0.0, 0.0]
    w, l = chosen - pair["ref_chosen"], rejected - pair["ref_rejected"]
    if name in OF_W_AND_L:
        more = [long, short] if name == "sigmoid_norm" else []
        value, (by_w, by_l, *_) = OF_W_AND_L[name](w, l, *more, **mine)
    else:
        divergence = {key: options[key] for key in DIVERGENCE if key in options}
        if name != "ipo":
            long, short = 1.0, 1.0
        (first, (dw,)), (second, (dl,)) = f_divergence(w / long, **divergence), f_divergence(l / short, **divergence)
        more = {"odpo": [pair["margin"]], "r_dpo": [pair["chosen_length"], pair["rejected_length"]]}.get(name, [])
        value, (slope, *_) = OF_H[name](first - second, *more, **mine)
        by_w, by_l = slope * dw / long, -slope * dl / short
    return value, [by_w, by_l, -by_w, -by_l]


def closed_forms(names, weights, pairs: list[dict], options: dict) -> tuple[list[float], list[list[float]], float]:
    """The same for a mixture over a batch, with WPO weights and the RPO term; and the size of what was added up."""
    totals, slopes, scale = [0.0] * len(pairs), [[0.0] * 4 for _ in pairs], 0.0
    for name, weight in zip(names, weights, strict=True):
        if name in BATCH:
            if name == "aot":
                lists = [[p["chosen"] - p["rejected"] for p in pairs]]
                lists += [[p["ref_chosen"] - p["ref_rejected"] for p in pairs]]
                signs = ((0, 0, 1), (0, 1, -1), (1, 2, 1), (1, 3, -1))  # (list, log-probability, sign)
            else:
                lists = [
                    [p["chosen"] - p["ref_chosen"] for p in pairs],
                    [p["rejected"] - p["ref_rejected"] for p in pairs],
                ]
                signs = ((0, 0, 1), (0, 2, -1), (1, 1, 1), (1, 3, -1))
            mine = {"beta": options["beta"], "label_smoothing": options.get("label_smoothing", 0.0)}
            values, by_list = by_quantile(*lists, sigmoid, mine)
            of_pairs = [
                (value, [sum(sign * by_list[k][i] for k, at, sign in signs if at == j) for j in range(4)])
                for i, value in enumerate(values)
            ]
        else:
            of_pairs = [closed_form(name, pair, options) for pair in pairs]
        for i, (value, slope) in enumerate(of_pairs):
            factor = weight * (pairs[i]["wpo"] if options.get("wpo") and name != "sft" else 1.0)
            totals[i] += factor * value
            slopes[i] = [a + factor * b for a, b in zip(slopes[i], slope, strict=True)]
            scale = max(scale, abs(value), *map(abs, slope))
    if options.get("rpo_alpha") is not None:
        for i, pair in enumerate(pairs):
            totals[i] -= options["rpo_alpha"] * pair["chosen"] / pair["chosen_length"]
            slopes[i][0] -= options["rpo_alpha"] / pair["chosen_length"]
    return totals, slopes, scale


PAIR = st.fixed_dictionaries(
    {key: st.floats(-15, -0.5) for key in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
    | {"chosen_length": st.integers(1, 9), "rejected_length": st.integers(1, 9)}
    | {"margin": st.floats(0, 5), "wpo": st.floats(0.01, 1)}
)
PAIRS = st.lists(PAIR, min_size=1, max_size=4, unique_by=lambda p: p["chosen"])
ORDER = ("chosen", "rejected", "ref_chosen", "ref_rejected")


def call(names, pairs: list[dict], options: dict, dtype=torch.float64):
    """dpo_loss on a list of pairs; its four log-probabilities as leaves, and its three results."""
    columns = {key: torch.tensor([pair[key] for pair in pairs], dtype=dtype) for key in pairs[0]}
    tensors = [columns[key].requires_grad_() for key in ORDER]
    options = {key: value for key, value in options.items() if key != "wpo"} | (
        {"wpo_weights": columns["wpo"]} if options.get("wpo") else {}
    )
    more = {f"{which}_lengths": columns[f"{which}_length"].long() for which in ("chosen", "rejected")}
    more |= {"margins": columns["margin"]}
    return tensors, dpo_loss(*tensors, loss_type=names, **more, **options)


def assert_equal_to_the_closed_form(names, weights, pairs, options):
    given_options = {**options, **({"loss_weights": weights} if weights else {})}
    tensors, (losses, chosen_rewards, rejected_rewards) = call(names, pairs, given_options)
    names = [names] if isinstance(names, str) else names
    if options.get("reference_free"):
        pairs = [{**pair, "ref_chosen": 0.0, "ref_rejected": 0.0} for pair in pairs]
    values, slopes, scale = closed_forms(names, weights or [1.0] * len(names), pairs, options)
    assert losses.tolist() == near(values, scale)
    beta = options["beta"]
    assert chosen_rewards.tolist() == near([beta * (p["chosen"] - p["ref_chosen"]) for p in pairs])
    assert rejected_rewards.tolist() == near([beta * (p["rejected"] - p["ref_rejected"]) for p in pairs])
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    losses.sum().backward()
    for j, tensor in enumerate(tensors):
        found = [0.0] * len(pairs) if tensor.grad is None else tensor.grad.tolist()
        expected = [0.0 if options.get("reference_free") and j > 1 else slope[j] for slope in slopes]
        assert found == near(expected, scale)


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=60)
@given(data=st.data(), pairs=PAIRS, beta=st.floats(0.02, 2))
def test_dpo_loss_equals_the_closed_form_with_every_option(loss_type, data, pairs, beta):
    ranges = {key: RANGES[key] for key in OWN.get(loss_type, {})}
    ranges |= DIVERGENCE if loss_type in OF_H else {}
    ranges |= {"reference_free": st.booleans()} if loss_type not in NO_REFERENCE else {}
    ranges |= {"wpo": st.booleans()} if loss_type not in (*BATCH, *RANKINGS) else {}
    ranges |= {"rpo_alpha": st.none() | st.floats(0, 3)}
    options = {key: data.draw(values, label=key) for key, values in ranges.items()}
    if loss_type in BATCH and options["reference_free"]:  # zeros are ties: any order of them is right
        options["reference_free"] = loss_type != "aot"
    assert_equal_to_the_closed_form(loss_type, None, pairs, options | {"beta": beta})


@given(data=st.data(), pairs=PAIRS, beta=st.floats(0.02, 2))
def test_a_mixture_is_the_weighted_sum_of_its_losses(data, pairs, beta):
    mixable = data.draw(st.sampled_from([[name for name in LOSSES if name not in RANKINGS], [*RANKINGS, "sft"]]))
    names = data.draw(st.lists(st.sampled_from(mixable), min_size=1, max_size=4, unique=True))
    weights = data.draw(st.none() | st.lists(st.floats(0, 3), min_size=len(names), max_size=len(names)))
    options = {"beta": beta, "rpo_alpha": data.draw(st.none() | st.floats(0, 3))}
    for name in names:
        options |= {key: data.draw(RANGES[key], label=key) for key in OWN.get(name, {}) if key not in options}
    options["wpo"] = not set(names) & {*BATCH, *RANKINGS} and data.draw(st.booleans())
    if not set(names) - {*OF_H, "sft"} and set(names) != {"sft"}:
        options |= {key: data.draw(values, label=key) for key, values in DIVERGENCE.items()}
    assert_equal_to_the_closed_form(names, weights, pairs, options)


DEFAULTS = {
    "discopop": {"discopop_tau": 0.05},
    "bco_pair": {"delta": 0.0},
    "dpop": {"dpop_lambda": 50.0},
    "chipo": {"chipo_clip": 10.0},
    "simpo": {"gamma": 0.5},
    "orpo": {"orpo_lambda": 0.1},
    "cpo": {"cpo_alpha": 1.0},
    "r_dpo": {"alpha": 0.01},
    "exo": {"exo_beta_r": 1.0},
}


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in BATCH])
@settings(max_examples=25)
@given(pair=PAIR)
def test_the_defaults_are_those_of_the_papers(loss_type, pair):
    _, (losses, _, _) = call(loss_type, [pair], {})
    theirs = {ours: theirs for theirs, ours in OWN.get(loss_type, {}).items()}
    options = {theirs[key]: value for key, value in DEFAULTS.get(loss_type, {}).items() if key in theirs}
    assert losses.item() == near(closed_form(loss_type, pair, {"beta": 0.1, **options})[0])
    defaults = {
        p.name: p.default
        for p in inspect.signature(LOSSES[loss_type]).parameters.values()
        if p.default not in (p.empty, None)  # None where a tensor may be left out
    }
    beta = {} if loss_type in ("orpo", "sft") else {"beta": 2.0 if loss_type in ("simpo", "sigmoid_norm") else 0.1}
    smoothing = {"label_smoothing": 0.0} if "label_smoothing" in OWN.get(loss_type, {}) else {}
    assert defaults == beta | smoothing | DEFAULTS.get(loss_type, {})


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "simpo", "orpo", "cpo", "sft"])
@settings(max_examples=25)
@given(pair=PAIR)
def test_without_lengths_log_probabilities_are_means_already(loss_type, pair):
    tensors = [torch.tensor([pair[key]], dtype=torch.float64) for key in ORDER]
    losses, _, _ = dpo_loss(*tensors, loss_type=loss_type)
    of_length_1 = {**pair, "chosen_length": 1, "rejected_length": 1}
    assert losses.item() == near(closed_form(loss_type, of_length_1, {"beta": 0.1})[0])


# ------------------------------------------------------------------------------------------- the properties, by name


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in NO_REFERENCE])
@settings(max_examples=25)
@given(pairs=PAIRS, shift=st.floats(-20, 20))
def test_a_constant_on_policy_and_reference_changes_nothing(loss_type, pairs, shift):
    divergence = {"f_divergence_type": "js_divergence"} if loss_type in OF_H else {}
    _, (losses, *rewards) = call(loss_type, pairs, divergence)
    for which in ("chosen", "rejected"):
        moved = [{**p, which: p[which] + shift, f"ref_{which}": p[f"ref_{which}"] + shift} for p in pairs]
        _, (again, *rewards_again) = call(loss_type, moved, divergence)
        if loss_type == "aot":  # sorts policy and reference each by itself: one constant for the whole batch only
            assert again.sum().item() == near(losses.sum().item())
        else:
            assert again.tolist() == near(losses.tolist())
        assert [r.tolist() for r in rewards_again] == [near(r.tolist()) for r in rewards]


KNOWN = {  # with w = l = 0 and β = 0.1; log 2 = 0.693...
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": -math.log(2) - 0.5 * (math.log(0.999) + math.log(0.001)),
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "aot": math.log(2),
    "aot_pair": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sigmoid_norm": math.log(2),
    "dpop": math.log(2),
    "odpo": math.log1p(math.exp(1.5)),
    "r_dpo": math.log1p(math.exp(-0.02)),
    "chipo": math.log(2),
    "plackett_luce": math.log(2),
    "exo": -math.log(2) - 0.5 * (math.log(0.999) + math.log(0.001)),
    # These four see the policy alone: log π = −6 and −4 over 3 and 1 tokens.
    "sft": 2.0,
    "simpo": math.log1p(math.exp(-0.1 * (-2 + 4) + 0.5)),
    "orpo": 2 + 0.1 * math.log1p((1 - math.exp(-2)) / math.exp(-2) * math.exp(-4) / (1 - math.exp(-4))),
    "cpo": math.log1p(math.exp(0.2)) + 2.0,
}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("f_divergence_type", ["reverse_kl", "js_divergence", "alpha_divergence", "forward_kl"])
def test_policy_equal_to_reference_has_the_known_loss_and_no_reward(loss_type, f_divergence_type):
    if f_divergence_type != "reverse_kl" and loss_type not in OF_H:
        return
    pair = {"chosen": -6.0, "rejected": -4.0, "ref_chosen": -6.0, "ref_rejected": -4.0}
    pair |= {"chosen_length": 3, "rejected_length": 1, "margin": 1.5}
    _, (losses, *rewards) = call(loss_type, [pair] * 2, {"f_divergence_type": f_divergence_type, "beta": 0.1})
    assert losses.tolist() == near([KNOWN[loss_type]] * 2)
    assert [reward.tolist() for reward in rewards] == [[0, 0]] * 2


FAR = [0.0, 1.0, -39.9, 40.1, 60.0, -60.0, 89.0, -89.0, 1e3, -1e3, 1e4, -1e4]
EXTREME = {  # options that make it worse
    "discopop": [{}, {"discopop_tau": 1.0}, {"discopop_tau": 2.0}],
    "chipo": [{}, {"chipo_clip": 1e4}],
    "bco_pair": [{"bco_delta": -30.0}],
} | {name: [{}, {"label_smoothing": 0.4}] for name in ("sigmoid", "robust", "exo_pair", "exo", *BATCH)}
DIVERGENCES = [{"f_divergence_type": name} for name in ("js_divergence", "forward_kl")]
DIVERGENCES += [{"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a} for a in (-1.0, 0.3, 1.0, 2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient_are_finite_however_far_apart(loss_type, dtype):
    columns = [torch.tensor(FAR, dtype=dtype)[i] for i in torch.cartesian_prod(*[torch.arange(len(FAR))] * 2).unbind(1)]
    ones = torch.ones(len(columns[0]), dtype=dtype)
    for options in EXTREME.get(loss_type, [{}]):
        for divergence in [{}, *(DIVERGENCES if loss_type in OF_H else [])]:
            for beta in (0.1, 1.0):
                tensors = [column.clone().requires_grad_() for column in columns]
                losses, _, _ = dpo_loss(
                    *tensors,
                    *(0 * ones, 0 * ones),
                    loss_type=loss_type,
                    chosen_lengths=ones,
                    rejected_lengths=ones,
                    margins=ones,
                    beta=beta,
                    **options,
                    **divergence,
                )
                losses.sum().backward()
                assert losses.dtype == torch.float32
                assert torch.isfinite(losses).all()
                if dtype != torch.float16:  # its own largest number is 65504
                    assert all(t.grad is None or torch.isfinite(t.grad).all() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
def test_each_function_by_itself_is_finite_however_far_apart(name, dtype):
    inputs = random_inputs(name, 0, dtype)
    parameters = list(inspect.signature(function(name)).parameters)
    for far in FAR:
        tensors = [
            tensor
            if "lengths" in key
            else (tensor * 0 + (-abs(far) if "means" in key or "logps" in key else far * sign))
            for tensor, key, sign in zip(inputs, parameters, (1, -1, 1, 1), strict=False)
        ]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        result = function(name)(*tensors)
        result.sum().backward()
        assert result.dtype == dtype and torch.isfinite(result).all()
        assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "inputs"), [("plackett_luce_loss", 1), ("exo_loss", 1), ("exo_loss", 2)])
def test_losses_of_many_completions_are_finite_however_far_apart(name, inputs, dtype):
    generator = torch.Generator().manual_seed(0)
    far = torch.tensor(FAR, dtype=dtype) / (10 if dtype == torch.float16 else 1)  # its own largest number is 65504
    tensors = [far[torch.randint(len(FAR), (200, 4), generator=generator)].requires_grad_() for _ in range(inputs)]
    fewer = torch.arange(4) < torch.randint(2, 5, (200, 1), generator=generator)
    for mask in (None, fewer):
        result = function(name)(*tensors, beta=1.0, mask=mask)
        grads = torch.autograd.grad(result.sum(), tensors)
        assert torch.isfinite(result).all() and all(torch.isfinite(grad).all() for grad in grads)
    if dtype == torch.float32:
        for i, there in enumerate(fewer):
            alone = function(name)(*(tensor[i : i + 1, there] for tensor in tensors), beta=1.0)
            assert result[i].item() == pytest.approx(alone.item(), rel=1e-5, abs=1e-5)


def test_bfloat16_inputs_are_subtracted_in_float32():
    pair = {"chosen": -300.0, "rejected": -296.0, "ref_chosen": -302.0, "ref_rejected": -299.0}
    tensors = [torch.tensor([pair[key]], dtype=torch.bfloat16) for key in ORDER]
    exact = [tensor.double() for tensor in tensors]
    assert dpo_loss(*tensors, beta=0.3)[0].item() == pytest.approx(dpo_loss(*exact, beta=0.3)[0].item(), rel=1e-6)
    chosen, rejected = torch.tensor([256.0]).bfloat16(), torch.tensor([1.0]).bfloat16()
    zero = torch.zeros(1).bfloat16()
    losses, rewards, _ = dpo_loss(chosen, rejected, zero, zero, loss_type="hinge", beta=-1.0)
    assert losses.item() == 256.0 and rewards.dtype == torch.float32  # 256 − 1 is 256 in bfloat16


@given(x=st.floats(-1e6, 1e6))
def test_capped_exp_rises_without_a_kink_and_its_square_stays_in_float32(x):
    tensors = [torch.tensor(value, requires_grad=True) for value in (x, x + 1)]
    values = [capped_exp(tensor) for tensor in tensors]
    assert values[1] >= values[0] and torch.isfinite(values[1] ** 2)
    (slope,) = torch.autograd.grad(values[0] ** 2, tensors[0])
    assert torch.isfinite(slope) and slope >= 0
    below, above = (torch.tensor(40 + step, dtype=torch.float64, requires_grad=True) for step in (-1e-9, 1e-9))
    slopes = [torch.autograd.grad(capped_exp(t), t)[0].item() for t in (below, above)]
    assert slopes == pytest.approx([math.exp(40)] * 2, rel=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=25)
@given(pairs=PAIRS, random=st.randoms(use_true_random=False))
def test_reordering_the_batch_reorders_the_losses(loss_type, pairs, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    _, (losses, *rewards) = call(loss_type, pairs, {})
    _, (again, *rewards_again) = call(loss_type, [pairs[i] for i in order], {})
    if loss_type in BATCH:  # quantiles belong to no pair: they stay where they are
        assert again.tolist() == near(losses.tolist())
        assert again.mean().item() == near(losses.mean().item())
    else:
        assert torch.equal(again, losses[order])
    assert all(torch.equal(a, b[order]) for a, b in zip(rewards_again, rewards, strict=True))


@given(pairs=PAIRS, beta=BETA["beta"])
def test_limit_robust_without_flips_is_sigmoid(pairs, beta):
    losses = [call(name, pairs, {"beta": beta})[1][0].tolist() for name in ("robust", "sigmoid")]
    assert losses[0] == near(losses[1])


@given(h=ratios, beta=BETA["beta"], epsilon=st.floats(0, 0.49))
def test_expectation_of_robust_over_flipped_labels_is_the_clean_sigmoid_loss(h, beta, epsilon):
    h = torch.tensor([h], dtype=torch.float64)
    right, flipped = (dpo.losses.robust_loss(sign * h, beta=beta, label_smoothing=epsilon) for sign in (1, -1))
    clean = dpo.losses.sigmoid_loss(h, beta=beta)
    assert ((1 - epsilon) * right + epsilon * flipped).item() == near(clean.item(), scale=1e5)


@given(z=small)
def test_limit_alpha_divergence_goes_from_reverse_kl_to_forward_kl(z):
    def score(name, alpha=1.0):
        tensor = torch.tensor([z], dtype=torch.float64)
        options = {"f_divergence_type": name, "f_alpha_divergence_coef": alpha}
        return dpo.losses.f_divergence_score(tensor, **options).item()

    assert score("alpha_divergence", 1.0) == score("forward_kl") == near(-math.expm1(-z))
    assert score("alpha_divergence", 0.0) == score("alpha_divergence", 1e-9) == score("reverse_kl") == z
    for alpha in (1e-5, -1e-5):
        assert score("alpha_divergence", alpha) == pytest.approx(z - alpha * z * z / 2, rel=1e-9, abs=1e-6)


@given(ratio=st.floats(1e-4, 1e4))
def test_scores_are_the_derivatives_of_their_divergences(ratio):
    generators = {  # f with f(1) = 0, up to a multiple of u − 1; Wang et al., table 1
        ("reverse_kl", 1.0): lambda u: u * math.log(u),
        ("forward_kl", 1.0): lambda u: -math.log(u),
        ("js_divergence", 1.0): lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
        ("alpha_divergence", 0.4): lambda u: (u**0.6 - 0.6 * u - 0.4) / (0.4 * (0.4 - 1)),
    }
    for (name, alpha), f in generators.items():
        step = 1e-5 * ratio
        slopes = [(f(u + step) - f(u - step)) / (2 * step) for u in (ratio, 1.0 * ratio * 1.5)]
        z = torch.tensor([ratio, ratio * 1.5], dtype=torch.float64).log()
        scores = dpo.losses.f_divergence_score(z, f_divergence_type=name, f_alpha_divergence_coef=alpha).tolist()
        assert scores[1] - scores[0] == pytest.approx(slopes[1] - slopes[0], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("loss_type", BATCH)
@settings(max_examples=25)
@given(pair=PAIR, beta=BETA["beta"], label_smoothing=SMOOTH["label_smoothing"])
def test_limit_aot_at_batch_1_is_sigmoid(loss_type, pair, beta, label_smoothing):
    options = {"beta": beta, "label_smoothing": label_smoothing}
    losses = [call(name, [pair], options)[1][0].tolist() for name in (loss_type, "sigmoid")]
    assert losses[0] == near(losses[1])


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=25)
@given(pairs=PAIRS)
def test_limit_a_mixture_of_one_loss_is_that_loss(loss_type, pairs):
    losses = [call(names, pairs, {})[1][0] for names in (loss_type, [loss_type])]
    assert torch.equal(*losses)
    assert torch.equal(2 * losses[0], call([loss_type], pairs, {"loss_weights": [2.0]})[1][0])


@given(pairs=PAIRS, alpha=st.floats(0, 3), wpo=st.booleans())
def test_limit_a_mixture_of_sigmoid_and_sft_is_sigmoid_with_the_rpo_term(pairs, alpha, wpo):
    mixed = call(["sigmoid", "sft"], pairs, {"loss_weights": [1.0, alpha], "wpo": wpo})[1][0]
    assert mixed.tolist() == near(call("sigmoid", pairs, {"rpo_alpha": alpha, "wpo": wpo})[1][0].tolist())


@given(w=ratios, l=ratios, beta=BETA["beta"])
def test_limit_plackett_luce_of_two_is_sigmoid(w, l, beta):
    loss = dpo.losses.plackett_luce_loss(torch.tensor([[w, l]], dtype=torch.float64), beta=beta)
    assert loss.item() == near(sigmoid(w - l, beta=beta)[0])


@given(w=ratios, l=ratios, beta=BETA["beta"], epsilon=st.floats(1e-6, 0.49))
def test_limit_exo_pair_is_exo_with_the_two_point_target(w, l, beta, epsilon):
    two = torch.tensor([[w, l]], dtype=torch.float64)
    target = torch.tensor([[math.log(1 - epsilon), math.log(epsilon)]], dtype=torch.float64)
    full = dpo.losses.exo_loss(two, target, beta=beta)
    pair = dpo.losses.exo_pair_loss(two[:, 0] - two[:, 1], beta=beta, label_smoothing=epsilon)
    assert full.item() == near(pair.item())


@settings(max_examples=25)
@given(pairs=PAIRS, beta=BETA["beta"])
def test_limits_that_lead_back_to_sigmoid(pairs, beta):
    plain = call("sigmoid", pairs, {"beta": beta})[1][0].tolist()
    even = [{**pair, "chosen_length": 7, "rejected_length": 7} for pair in pairs]
    short = [{**pair, "chosen_length": 1, "rejected_length": 1} for pair in pairs]
    bare = [{**pair, "ref_chosen": 0.0, "ref_rejected": 0.0} for pair in short]
    no_margin = [{**pair, "margin": 0.0} for pair in pairs]
    assert call("odpo", no_margin, {"beta": beta})[1][0].tolist() == near(plain)
    assert call("r_dpo", even, {"beta": beta, "r_dpo_alpha": 0.7})[1][0].tolist() == near(plain)
    assert call("r_dpo", pairs, {"beta": beta, "r_dpo_alpha": 0.0})[1][0].tolist() == near(plain)
    assert call("dpop", pairs, {"beta": beta, "dpop_lambda": 0.0})[1][0].tolist() == near(plain)
    assert call("sigmoid_norm", short, {"beta": beta})[1][0].tolist() == near(plain)
    free = call("sigmoid", pairs, {"beta": beta, "reference_free": True})[1][0].tolist()
    assert call("sigmoid", bare, {"beta": beta})[1][0].tolist() == near(free)
    assert call("cpo", pairs, {"beta": beta, "cpo_alpha": 0.0})[1][0].tolist() == near(free)
    assert call("simpo", short, {"beta": beta, "simpo_gamma": 0.0})[1][0].tolist() == near(free)


def test_sides_are_taken_as_the_papers_take_them():
    """Which of two completions, and which sign: what a closed form copied wrongly would get wrong, too."""
    h, ones = torch.tensor([3.0]), torch.ones(1)
    assert dpo.losses.r_dpo_loss(h, 50 * ones, ones) < dpo.losses.r_dpo_loss(h, ones, ones)  # length explains it
    assert dpo.losses.odpo_loss(h, ones) > dpo.losses.odpo_loss(h, 0 * ones)  # must win by more
    assert dpo.losses.simpo_loss(-ones, -2 * ones, gamma=1.0) > dpo.losses.simpo_loss(-ones, -2 * ones, gamma=0.0)
    assert dpo.losses.dpop_loss(-ones, -2 * ones) > dpo.losses.dpop_loss(
        ones, 0 * ones
    )  # the chosen one got less likely
    for name in LOSSES:
        tensors = [torch.tensor([value], requires_grad=True) for value in (-2.0, -3.0, -2.5, -2.5)]
        losses, *_ = dpo_loss(*tensors, loss_type=name, margins=ones, chosen_lengths=ones, rejected_lengths=ones)
        losses.sum().backward()
        chosen, rejected = (0.0 if tensor.grad is None else tensor.grad.item() for tensor in tensors[:2])
        assert (chosen < 0 or name == "apo_down") and (rejected > 0 or name == "sft"), name


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in NO_REFERENCE])
def test_reference_free_needs_no_reference_and_looks_at_none(loss_type):
    policy = torch.tensor([-3.0, -1.0]), torch.tensor([-5.0, -0.5])
    more = {"margins": torch.ones(2), "chosen_lengths": torch.tensor([2, 3]), "rejected_lengths": torch.tensor([1, 4])}
    options = {"loss_type": loss_type, "beta": 0.5, **more}
    without = dpo_loss(*policy, None, None, reference_free=True, **options)
    with_one = dpo_loss(*policy, policy[1], policy[0], reference_free=True, **options)
    zeros = dpo_loss(*policy, torch.zeros(2), torch.zeros(2), **options)
    for a, b, c in zip(without, with_one, zeros, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert without[1].tolist() == [-1.5, -0.5]


@pytest.mark.parametrize("loss_type", NO_REFERENCE)
def test_losses_without_reference_take_none(loss_type):
    policy = torch.tensor([-3.0, -1.0]), torch.tensor([-5.0, -0.5])
    losses = [dpo_loss(*policy, *ref, loss_type=loss_type)[0] for ref in ((None, None), policy)]
    assert torch.equal(*losses)


# --------------------------------------------------------------------------------------------------------- refusals

FOUR = [torch.zeros(2)] * 4
REFUSED = {
    "unknown loss": ({"loss_type": "sigmoind"}, "loss_type 'sigmoind' is unknown"),
    "unknown in a mixture": ({"loss_type": ["sigmoid", "nll"]}, "loss_type 'nll'"),
    "no loss": ({"loss_type": []}, "loss_type .* at least one"),
    "twice the same": ({"loss_type": ["sigmoid", "sigmoid"]}, "loss_type .* each once"),
    "too few weights": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers for 2"),
    "weights for one loss": ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 numbers for 1"),
    "no weights for one loss": ({"loss_weights": []}, "loss_weights has 0 numbers for 1"),
    "half the labels flipped": ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
    "half, robust": ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
    "most, exo": ({"loss_type": "exo_pair", "label_smoothing": 1.0}, "label_smoothing is 1.0"),
    "negative share": ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    "no number": ({"label_smoothing": math.nan}, "label_smoothing is nan"),
    "unknown divergence": ({"f_divergence_type": "chi"}, "f_divergence_type 'chi' is unknown"),
}
for _name in LOSSES:
    if "label_smoothing" not in OWN.get(_name, {}):
        REFUSED[f"{_name}, smoothing"] = ({"loss_type": _name, "label_smoothing": 0.1}, f"label_smoothing .* {_name}")
    if _name not in OF_H:
        for _kind in ("js_divergence", "alpha_divergence", "forward_kl"):
            options = {"loss_type": _name, "f_divergence_type": _kind}
            REFUSED[f"{_name}, {_kind}"] = (options, f"f_divergence_type {_kind} .* loss_type {_name}")
    if _name not in (*OF_H, "sft"):
        options = {"loss_type": ["sigmoid", _name], "f_divergence_type": "js_divergence"}
        REFUSED[f"sigmoid + {_name}, js_divergence"] = (options, "f_divergence_type js_divergence")
    if _name in NO_REFERENCE:
        REFUSED[f"{_name}, reference_free"] = ({"loss_type": _name, "reference_free": True}, "reference_free")
    if _name not in (*RANKINGS, "sft"):
        REFUSED[f"plackett_luce + {_name}"] = ({"loss_type": ["plackett_luce", _name]}, "mixes losses of rankings")


@pytest.mark.parametrize("case", REFUSED)
def test_options_without_meaning_are_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_loss(**({"loss_type": "sigmoid"} | options))
    with pytest.raises(ValueError, match=message):
        dpo_loss(*FOUR, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "odpo"}, "odpo needs a margin"),
        ({"loss_type": "r_dpo"}, "r_dpo need chosen_lengths"),
        ({"rpo_alpha": 1.0}, "rpo_alpha .* chosen_lengths"),
        *(
            ({"loss_type": name, "wpo_weights": torch.ones(2)}, f"wpo_weights .* {name}")
            for name in (*BATCH, *RANKINGS)
        ),
        ({"loss_type": "exo", "scores": torch.ones(2, 2), "label_smoothing": 0.1}, "label_smoothing .* exo"),
        *(({"loss_type": name, "reference": None}, f"{name} needs ref_chosen_logps") for name in (*OF_W_AND_L, *BATCH)),
        ({"loss_type": ["sft", "sigmoid"], "reference": None}, "needs ref_chosen_logps"),
    ],
)
def test_what_a_loss_lacks_is_named(options, message):
    reference = [None, None] if "reference" in options else FOUR[2:]
    with pytest.raises(ValueError, match=message):
        dpo_loss(*FOUR[:2], *reference, **{key: value for key, value in options.items() if key != "reference"})


def test_combinations_with_a_meaning_are_taken():
    assert check_loss("sigmoid") == ["sigmoid"]
    assert check_loss(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], label_smoothing=0.1) == [
        "sigmoid",
        "bco_pair",
        "sft",
    ]
    assert check_loss(["sft", "ipo"], f_divergence_type="forward_kl", reference_free=True) == ["sft", "ipo"]
    for name in OF_H:
        assert check_loss(name, f_divergence_type="js_divergence") == [name]
    for name in ("sigmoid", "robust", "exo_pair", "exo", *BATCH):
        assert check_loss(name, label_smoothing=0.49) == [name]


# ------------------------------------------------------------------------------- the leaf functions of logprobs.py

LENGTHS = st.integers(1, 4).flatmap(lambda pairs: st.lists(st.integers(1, 7), min_size=2 * pairs, max_size=2 * pairs))


def owners(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)])


@given(lengths=LENGTHS, ld_alpha=st.floats(0, 1))
def test_ld_weights_equal_a_loop_over_tokens(lengths, ld_alpha):
    expected, pairs = [], len(lengths) // 2
    for i, length in enumerate(lengths):
        shorter = min(lengths[i % pairs], lengths[i % pairs + pairs])
        expected += [1.0 if t < shorter else ld_alpha for t in range(length)]
    weights = dpo.logprobs.ld_weights(owners(lengths), torch.tensor(lengths), ld_alpha=ld_alpha)
    assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(expected, abs=1e-6)


@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_limit_ld_alpha_1_is_the_plain_sum_and_0_the_sum_up_to_the_shorter_one(lengths, seed):
    owner, generator = owners(lengths), torch.Generator().manual_seed(seed)
    values = torch.randn(len(owner), generator=generator)
    plain = dpo.logprobs.sum_by_owner(values, owner, len(lengths))
    one, none = (
        dpo.logprobs.sum_by_owner(
            values * dpo.logprobs.ld_weights(owner, torch.tensor(lengths), ld_alpha=alpha), owner, len(lengths)
        )
        for alpha in (1.0, 0.0)
    )
    assert torch.equal(one, plain)
    starts, pairs = np.cumsum([0, *lengths]), len(lengths) // 2
    for i in range(len(lengths)):
        shorter = min(lengths[i % pairs], lengths[i % pairs + pairs])
        assert none[i].item() == pytest.approx(math.fsum(values[starts[i] : starts[i] + shorter].tolist()), abs=1e-5)


@given(tokens=st.integers(1, 6), vocabulary=st.integers(2, 9), scale=st.floats(0.1, 30), seed=st.integers(0, 99))
def test_wpo_token_scores_equal_a_loop_over_the_vocabulary(tokens, vocabulary, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * scale).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    scores = dpo.logprobs.wpo_token_scores(logits, targets)
    assert not scores.requires_grad and scores.dtype == torch.float32 and scores.shape == (tokens,)
    for row, target, score in zip(logits.tolist(), targets.tolist(), scores.tolist(), strict=True):
        policy = log_softmax(row)
        squares = math.log(math.fsum(math.exp(2 * logp) for logp in policy))
        assert score == pytest.approx(policy[target] - squares, rel=1e-5, abs=1e-5)


def test_wpo_token_scores_take_bfloat16_logits_in_float32():
    logits = (torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    scores = dpo.logprobs.wpo_token_scores(logits, torch.arange(8))
    assert torch.equal(scores, dpo.logprobs.wpo_token_scores(logits.float(), torch.arange(8)))


# ------------------------------------------------------------------------------------------------------ the copy test


def pasted(module, name: str):
    """The function as one who copies it has it: its source, torch, F, and the siblings that its docstring names."""
    found = re.search(r"Needs:\s+([^.]+)\.", inspect.getdoc(getattr(module, name)))
    needs = " ".join(found[1].split()) if found else ""
    namespace = {"torch": torch, "F": F}
    if needs == "this whole file":
        exec(inspect.getsource(module), namespace)
    else:
        for sibling in (*needs.replace(",", " ").replace(" and ", " ").split(), name):
            exec(inspect.getsource(getattr(module, sibling)), namespace)
    return namespace[name]


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", LOSS_FUNCTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_pasted_alone_gives_the_same(name, seed):
    inputs = random_inputs(name, seed)
    copy = pasted(dpo.losses, name)
    assert copy is not function(name)
    for options in ({}, GRADCHECK.get(name, {})):
        assert torch.equal(copy(*inputs, **options), function(name)(*inputs, **options))
    if name == "f_divergence_score":
        for kind in ("reverse_kl", "js_divergence", "alpha_divergence", "forward_kl"):
            assert torch.equal(copy(*inputs, f_divergence_type=kind), function(name)(*inputs, f_divergence_type=kind))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_dpo_loss_pasted_with_its_file_gives_the_same(loss_type):
    generator = torch.Generator().manual_seed(0)
    policy_and_reference = [-10 * torch.rand(5, generator=generator) for _ in range(4)]
    options = {"loss_type": loss_type, "margins": torch.rand(5, generator=generator), "rpo_alpha": 0.5}
    options |= {f"{which}_lengths": torch.randint(1, 9, (5,), generator=generator) for which in ("chosen", "rejected")}
    copy = pasted(dpo.losses, "dpo_loss")
    for a, b in zip(copy(*policy_and_reference, **options), dpo_loss(*policy_and_reference, **options), strict=True):
        assert torch.equal(a, b)
    assert pasted(dpo.losses, "check_loss")(loss_type) == [loss_type]


def leaf_inputs(seed: int) -> dict:
    """name: (module, positional arguments, keyword arguments) for the leaf functions of logprobs.py and collate.py."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (6,), generator=generator)
    owner = owners(lengths.tolist())
    logits = torch.randn(len(owner), 11, generator=generator)
    targets = torch.randint(11, (len(owner),), generator=generator)
    rows = [torch.randint(50, (int(length),), generator=generator) for length in lengths]
    batch = {}
    for part, some in zip(("prompt", "chosen", "rejected"), (rows[:2], rows[2:4], rows[4:]), strict=True):
        batch[f"{part}_input_ids"] = dpo.collate.pad(some, 0, left=part == "prompt")
        batch[f"{part}_attention_mask"] = dpo.collate.pad([torch.ones_like(r) for r in some], 0, left=part == "prompt")
    plan = {"batch_size": 2, "accumulation": 2, "world_size": 2, "seed": seed}
    return {
        "token_logps": (dpo.logprobs, (logits, targets), {}),
        "sum_by_owner": (dpo.logprobs, (logits[:, 0], owner, 6), {}),
        "ld_weights": (dpo.logprobs, (owner, lengths), {"ld_alpha": 0.3}),
        "wpo_token_scores": (dpo.logprobs, (logits, targets), {}),
        "pad": (dpo.collate, (rows, 9), {"left": True}),
        "concatenated_inputs": (dpo.collate, (batch, 9), {}),
        "padded_inputs": (dpo.collate, (dpo.collate.concatenated_inputs(batch, 9), 9), {}),
        "epoch_windows": (dpo.collate, (lengths.tolist() * 5,), plan | {"group_by_length": seed == 1}),
    }


@pytest.mark.parametrize("name", leaf_inputs(0))
@pytest.mark.parametrize("seed", range(3))
def test_a_leaf_function_pasted_alone_gives_the_same(name, seed):
    module, args, options = leaf_inputs(seed)[name]
    assert equal(pasted(module, name)(*args, **options), getattr(module, name)(*args, **options))
