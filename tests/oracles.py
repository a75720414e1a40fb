"""The losses by hand, in float64 NumPy: values and derivatives as the papers have them, nothing of the code under test.

A function has the name, the parameters and the defaults of a loss, and returns the values and {parameter: derivative}.
`dpo_loss`, at the end, has the arguments of the function that puts them together.
"""

import inspect
from collections import defaultdict

import numpy as np


def ls(z):
    return -np.logaddexp(0, -z)  # log σ(z)


def sg(z):
    return np.exp(ls(z))  # σ(z)


def dsg(z):
    return sg(z) * sg(-z)  # σ′(z)


# ------------------------------------------------------------------------------------------- losses of h = w − l
def sigmoid(h, *, beta=0.1, label_smoothing=0.0):
    x, e = beta * h, label_smoothing
    return -(1 - e) * ls(x) - e * ls(-x), {"h": beta * (e * sg(x) - (1 - e) * sg(-x))}


def robust(h, *, beta=0.1, label_smoothing=0.0):
    x, e = beta * h, label_smoothing
    slope = -beta * ((1 - e) * sg(-x) + e * sg(x)) / (1 - 2 * e)
    return (-(1 - e) * ls(x) + e * ls(-x)) / (1 - 2 * e), {"h": slope}


def hinge(h, *, beta=0.1):
    return np.maximum(0, 1 - beta * h), {"h": np.where(1 - beta * h > 0, -beta, 0)}


def ipo(mean_h, *, beta=0.1):
    return (mean_h - 1 / (2 * beta)) ** 2, {"mean_h": 2 * (mean_h - 1 / (2 * beta))}


def exo_pair(h, *, beta=0.1, label_smoothing=0.0):
    x, e = beta * h, label_smoothing or 0.001
    value = sg(x) * (ls(x) - np.log(1 - e)) + sg(-x) * (ls(-x) - np.log(e))
    return value, {"h": beta * dsg(x) * (x - np.log((1 - e) / e))}  # ls(x) − ls(−x) = x


def discopop(h, *, beta=0.1, discopop_tau=0.05):
    x, tau = beta * h, discopop_tau
    exponential = np.exp(ls(x / tau) - x)
    slope = -sg(-x / tau) * sg(-x) + dsg(x / tau) / tau * ls(x) + exponential * (sg(-x / tau) / tau - 1)
    return -sg(-x / tau) * ls(x) + exponential, {"h": beta * slope}


def odpo(h, margins, *, beta=0.1):
    x = beta * h - margins
    return -ls(x), {"h": -beta * sg(-x)}


def r_dpo(h, length_difference, *, beta=0.1, r_dpo_alpha=0.01):
    x = beta * h + r_dpo_alpha * length_difference
    return -ls(x), {"h": -beta * sg(-x)}


# ---------------------------------------------------------------------------------- losses of w and l, each by itself
def nca_pair(w, l, *, beta=0.1):
    by_w, by_l = beta * (0.5 * sg(beta * w) - sg(-beta * w)), 0.5 * beta * sg(beta * l)
    return -ls(beta * w) - 0.5 * (ls(-beta * w) + ls(-beta * l)), {"w": by_w, "l": by_l}


def bco_pair(w, l, *, beta=0.1, bco_delta=0.0):
    x, y = beta * w - bco_delta, beta * l - bco_delta
    return -ls(x) - ls(-y), {"w": -beta * sg(-x), "l": beta * sg(y)}


def sppo_hard(w, l, *, beta=0.1):
    a, b = w - 1 / (2 * beta), l + 1 / (2 * beta)
    return a * a + b * b, {"w": 2 * a, "l": 2 * b}


def apo_zero(w, l, *, beta=0.1):
    return 1 - sg(beta * w) + sg(beta * l), {"w": -beta * dsg(beta * w), "l": beta * dsg(beta * l)}


def apo_down(w, l, *, beta=0.1):
    apart = beta * dsg(beta * (w - l))
    return sg(beta * w) + 1 - sg(beta * (w - l)), {"w": beta * dsg(beta * w) - apart, "l": apart}


def dpop(w, l, *, beta=0.1, dpop_lambda=50.0):
    x = beta * (w - l - dpop_lambda * np.maximum(0, -w))
    return -ls(x), {"w": -beta * (1 + dpop_lambda * (w < 0)) * sg(-x), "l": beta * sg(-x)}


def chipo(w, l, *, beta=0.1, chipo_clip=10.0):
    x = beta * (np.exp(w) + w) - beta * (np.exp(l) + l)
    slope = -beta * sg(-x) * (np.abs(x) <= chipo_clip)
    return -ls(np.clip(x, -chipo_clip, chipo_clip)), {"w": slope * (np.exp(w) + 1), "l": -slope * (np.exp(l) + 1)}


# ------------------------------------------------------------------------------------------------ losses over a batch
def sigmoid_by_rank(first, second, **options):
    """The sigmoid loss of sort(first) − sort(second): by rank; its derivatives in the order of first and of second."""
    value, slope = sigmoid(np.sort(first) - np.sort(second), **options)
    by_first, by_second = np.empty_like(value), np.empty_like(value)
    by_first[np.argsort(first)], by_second[np.argsort(second)] = slope["h"], -slope["h"]
    return value, by_first, by_second


def aot(batch_policy_h, batch_ref_h, *, beta=0.1, label_smoothing=0.0):
    value, *slopes = sigmoid_by_rank(batch_policy_h, batch_ref_h, beta=beta, label_smoothing=label_smoothing)
    return value, {"batch_policy_h": slopes[0], "batch_ref_h": slopes[1]}


def aot_pair(batch_w, batch_l, *, beta=0.1, label_smoothing=0.0):
    value, *slopes = sigmoid_by_rank(batch_w, batch_l, beta=beta, label_smoothing=label_smoothing)
    return value, {"batch_w": slopes[0], "batch_l": slopes[1]}


aot_unpaired = aot_pair


# -------------------------------------------------------------------------------------------- losses of per-token means
def sigmoid_norm(w, l, chosen_lengths, rejected_lengths, *, beta=2.0):
    x = beta * (w / chosen_lengths - l / rejected_lengths)
    return -ls(x), {"w": -beta * sg(-x) / chosen_lengths, "l": beta * sg(-x) / rejected_lengths}


def simpo(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, *, beta=2.0, simpo_gamma=0.5):
    x = beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - simpo_gamma
    slope = beta * sg(-x)
    return -ls(x), {"chosen_logps": -slope / chosen_lengths, "rejected_logps": slope / rejected_lengths}


def orpo(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, *, orpo_lambda=0.1):
    p, q = np.exp(chosen_logps / chosen_lengths), np.exp(rejected_logps / rejected_lengths)
    log_odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    slope = orpo_lambda * sg(-log_odds)  # d log odds / d log p = 1/(1 − p)
    by_chosen, by_rejected = (-1 - slope / (1 - p)) / chosen_lengths, slope / (1 - q) / rejected_lengths
    return -np.log(p) - orpo_lambda * ls(log_odds), {"chosen_logps": by_chosen, "rejected_logps": by_rejected}


def cpo(chosen_logps, rejected_logps, chosen_lengths, *, beta=0.1, cpo_alpha=1.0):
    x = beta * (chosen_logps - rejected_logps)
    by_chosen, by_rejected = -beta * sg(-x) - cpo_alpha / chosen_lengths, beta * sg(-x)
    value = -ls(x) - cpo_alpha * chosen_logps / chosen_lengths
    return value, {"chosen_logps": by_chosen, "rejected_logps": by_rejected}


def sft(chosen_logps, chosen_lengths):
    return -chosen_logps / chosen_lengths, {"chosen_logps": -1 / chosen_lengths}


# ------------------------------------------------------------------------------------------- K completions of a prompt
def log_softmax(values):
    return values - np.logaddexp.reduce(values)


def plackett_luce(ratios, *, beta=0.1, mask=None):
    values, slopes = np.zeros(len(ratios)), np.zeros_like(ratios)
    for i, row in enumerate(ratios):
        there = len(row) if mask is None else mask[i].sum()
        for k in range(there):  # the k-th choice is made among those that are left
            logps = log_softmax(beta * row[k:there])
            values[i] -= logps[0]
            slopes[i, k] -= beta
            slopes[i, k:there] += beta * np.exp(logps)
    return values, {"ratios": slopes}


def exo(ratios, scores=None, *, beta=0.1, exo_beta_r=1.0, label_smoothing=0.0, mask=None):
    values, slopes, by_scores = np.zeros(len(ratios)), np.zeros_like(ratios), np.zeros_like(ratios)
    for i, row in enumerate(ratios):
        there, e = len(row) if mask is None else mask[i].sum(), label_smoothing or 0.001
        p, target = log_softmax(beta * row[:there]), np.log([1 - e] + [e / (there - 1)] * (there - 1))
        if scores is not None:
            target = log_softmax(scores[i, :there] / exo_beta_r)
        values[i] = (np.exp(p) * (p - target)).sum()
        slopes[i, :there] = beta * np.exp(p) * (p - target - values[i])
        by_scores[i, :there] = (np.exp(target) - np.exp(p)) / exo_beta_r
    return values, {"ratios": slopes, "scores": by_scores}


# ---------------------------------------------------------------------------------------------------------- modifiers
def f_derivative(ratio, *, f_divergence_type="reverse_kl", f_alpha_divergence_coef=1.0):
    alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(f_divergence_type, f_alpha_divergence_coef)
    if f_divergence_type == "js_divergence":
        return np.log(2) + ls(ratio), {"ratio": sg(-ratio)}
    if alpha == 0:
        return ratio, {"ratio": np.ones_like(ratio)}
    return -np.expm1(-alpha * ratio) / alpha, {"ratio": np.exp(-alpha * ratio)}


def capped_exp(x):
    """Below its cap."""
    return np.exp(x), {"x": np.exp(x)}


def ld_weights(lengths, ld_alpha):
    """One weight a token, of all chosen completions and then of all rejected ones."""
    shorter = np.tile(np.minimum(*np.split(np.array(lengths), 2)), 2)
    return [1.0 if t < short else ld_alpha for n, short in zip(lengths, shorter, strict=True) for t in range(n)]


def wpo_token(logits, target):
    """log π(target) − log Σ_v π(v)²"""
    logps = log_softmax(logits)
    return logps[target] - np.log((np.exp(logps) ** 2).sum())


# ----------------------------------------------------------------------------------------------------------- all of it
def parameters(name):
    """Of a loss: its inputs, and its options with their defaults."""
    own = inspect.signature(globals()[name]).parameters
    options = {key: value.default for key, value in own.items() if value.kind is value.KEYWORD_ONLY}
    return [key for key in own if key not in options], options


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, loss_type="sigmoid", **options):
    """The losses, both rewards, and the derivatives of the losses by the four log-probabilities."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    beta, free, lengths = options.get("beta", 0.1), options.get("reference_free", False), "chosen_lengths" in options
    if free:
        ref_chosen_logps, ref_rejected_logps = 0 * chosen_logps, 0 * rejected_logps
    w, l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    n_w, n_l = (options["chosen_lengths"], np.maximum(options["rejected_lengths"], 1)) if lengths else (1.0, 1.0)
    divergence = {key: value for key, value in options.items() if key.startswith("f_")}
    moved = [f_derivative(ratio, **divergence) for ratio in (w, l, w / n_w, l / n_l)]
    f_w, f_l, mean_w, mean_l = (value for value, _ in moved)
    slope_w, slope_l, slope_mean_w, slope_mean_l = (by["ratio"] for _, by in moved)
    terms = options | {"beta": beta, "w": w, "l": l, "batch_w": w, "batch_l": l}
    terms |= {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    terms |= {"chosen_lengths": n_w, "rejected_lengths": n_l, "ratios": np.column_stack([f_w, f_l])}
    terms |= {"mask": np.column_stack([w == w, options["rejected_lengths"] > 0])} if lengths else {}
    if l.ndim == 1:
        terms |= {"h": f_w - f_l, "mean_h": mean_w - mean_l, "length_difference": n_w - n_l}
        terms |= {"batch_policy_h": chosen_logps - rejected_logps, "batch_ref_h": ref_chosen_logps - ref_rejected_logps}

    alpha, weights = options.get("rpo_alpha", 0.0), options.get("loss_weights", [1.0] * len(names))
    losses, slopes = -alpha * chosen_logps / n_w, [-alpha / n_w + 0 * w, 0 * l, 0 * w, 0 * l]
    for name, weight in zip(names, weights, strict=True):
        loss = globals()[name]
        value, by = loss(**{key: terms[key] for key in inspect.signature(loss).parameters if key in terms})
        by = defaultdict(float, by)  # 0 by what it does not depend on; by_w and by_l: through the log-ratios
        by_ratios = by["ratios"] + 0 * terms["ratios"]
        by_w = by["w"] + by["batch_w"] + by["mean_h"] * slope_mean_w / n_w + (by["h"] + by_ratios[:, 0]) * slope_w
        by_l = by["l"] + by["batch_l"] - by["mean_h"] * slope_mean_l / n_l
        by_l = by_l + (by_ratios[:, 1:].reshape(l.shape) - by["h"]) * slope_l
        own = [by_w + by["chosen_logps"] + by["batch_policy_h"], by_l + by["rejected_logps"] - by["batch_policy_h"]]
        own += [by["batch_ref_h"] - by_w, -by["batch_ref_h"] - by_l]
        factor = weight * (1.0 if name == "sft" else options.get("wpo_weights", 1.0))
        losses = losses + factor * value
        slopes = [total + factor * slope for total, slope in zip(slopes, own, strict=True)]
    return losses, (beta * w, beta * l), slopes[:2] + [0 * slope if free else slope for slope in slopes[2:]]
