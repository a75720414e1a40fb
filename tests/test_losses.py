"""Every loss, proven: value and gradient against the oracles, the properties that each must have by name, refusals, and
that each function still works where it is pasted alone."""

import inspect
import math
import re
from functools import partial

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dpo.batches
import dpo.collate
import dpo.logprobs
import dpo.losses
from dpo.losses import LOSSES, PARAMETERS, capped_exp, check_loss, dpo_loss, f_derivative


# ------------------------------------------------------------------------------------- which losses, with which inputs
def taking(*wanted: str) -> list[str]:
    """The losses whose oracles have one of these parameters."""
    return [name for name in LOSSES if set(wanted) & set(inspect.signature(getattr(oracles, name)).parameters)]


RANKINGS, BATCH, OF_H = taking("ratios"), taking("batch_w", "batch_policy_h"), taking("h", "mean_h", "ratios")
PAIRS, REFERENCED = [name for name in LOSSES if name not in (*RANKINGS, *BATCH)], [*taking("w", "l"), *OF_H, *BATCH]
FUNCTIONS = LOSSES | {"f_derivative": f_derivative, "capped_exp": capped_exp}
KINDS = ("reverse_kl", "js_divergence", "alpha_divergence", "forward_kl")
FOUR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")

DIVERGENCE = {"f_divergence_type": st.sampled_from(KINDS)}
DIVERGENCE |= {"f_alpha_divergence_coef": st.floats(0.05, 1.8) | st.just(1.0) | st.floats(-1, -0.1)}
# Any input that has no range here is from −12 to 12, any option from 0.1 to 2.
RANGES = dict.fromkeys("h mean_h ratios batch_w batch_l batch_policy_h batch_ref_h".split(), st.floats(-60, 60))
RANGES |= dict.fromkeys(("chosen_logps", "rejected_logps"), st.floats(-60, -0.5))
RANGES |= dict.fromkeys(("chosen_lengths", "rejected_lengths"), st.integers(1, 40).map(float))
RANGES |= {"length_difference": st.integers(-40, 40).map(float), "beta": st.floats(0.02, 5)}
RANGES |= {"label_smoothing": st.just(0.0) | st.floats(1e-6, 0.49), "bco_delta": st.floats(-5, 5)}
RANGES |= {"chipo_clip": st.floats(0.5, 500), "discopop_tau": st.floats(0.02, 1)} | DIVERGENCE


def options_of(*names: str) -> dict[str, st.SearchStrategy]:
    """What the losses' options may be; the mask of a ranking follows from its lengths."""
    keys = {key for name in names for key in oracles.parameters(name)[1]} - {"mask"}
    return {key: RANGES.get(key, st.floats(0.1, 2)) for key in sorted(keys)}


def random_batch(seed: int, ranking: bool = False) -> dict[str, np.ndarray]:
    """One to four pairs, or rankings of two to four completions, for `dpo_loss`: continuous, so without ties."""
    random, pairs = np.random.default_rng(seed), 1 + seed % 4
    shape = (pairs, 3) if ranking else (pairs,)
    batch = {key: random.uniform(-8, -0.5, shape if "rejected" in key else pairs) for key in FOUR}
    batch |= {"chosen_lengths": random.integers(1, 10, pairs), "rejected_lengths": random.integers(1, 10, shape)}
    if ranking:
        batch["rejected_lengths"] *= np.arange(3) < random.integers(1, 4, (pairs, 1))
    return batch | {"margins": random.uniform(0, 5, pairs)}


BATCHES = st.builds(random_batch, st.integers(0, 10**6))


def call(batch: dict[str, np.ndarray], **options):
    """`dpo_loss` of NumPy arrays: the four log-probabilities as leaves, and the three results."""
    tensors = {key: torch.tensor(value) for key, value in batch.items()}
    leaves = [tensors[key].requires_grad_() for key in FOUR]
    return leaves, dpo_loss(**tensors, **options)


def losses_of(batch: dict[str, np.ndarray], loss_type: str | list[str], **options) -> np.ndarray:
    return call(batch, loss_type=loss_type, **options)[1][0].detach().numpy()


def near(expected, scale: float = 0.0):
    return pytest.approx(expected, rel=1e-9, abs=1e-9 + 1e-12 * scale)


def assert_same(found: torch.Tensor | None, expected: np.ndarray) -> None:
    found = np.zeros_like(expected) if found is None else found.detach().numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 + 1e-12 * np.abs(expected).max(initial=0))


def check_function(name: str, data) -> None:
    """A function by itself: values, and gradients by the inputs by which its oracle has derivatives."""
    rows, most = data.draw(st.integers(1, 4), label="rows"), data.draw(st.integers(2, 5), label="completions")
    inputs, options = oracles.parameters(name)[0], data.draw(st.fixed_dictionaries(options_of(name)), label="options")
    if "scores" in inputs and (options["label_smoothing"] or data.draw(st.booleans(), label="without scores")):
        inputs.remove("scores")
    shape, mask = (rows, most) if "ratios" in inputs else rows, {}
    if "ratios" in inputs:
        mask = {"mask": np.arange(most) < data.draw(arrays(int, (rows, 1), elements=st.integers(2, most)))}
    ranges = {key: RANGES.get(key, st.floats(-12, 12)) for key in inputs}
    arguments = {key: data.draw(arrays(float, shape, elements=ranges[key], unique=True), label=key) for key in inputs}
    values, slopes = getattr(oracles, name)(**arguments, **options, **mask)
    tensors = {key: torch.tensor(value) for key, value in (arguments | mask).items()}
    leaves = {key: tensors[key].requires_grad_() for key in slopes if key in inputs}
    result = FUNCTIONS[name](**tensors, **options)
    assert_same(result, values)
    result.sum().backward()
    for key, leaf in leaves.items():
        assert_same(leaf.grad, slopes[key])


def check_dpo_loss(loss_type: str | list[str], data, weights: list[float] | None = None) -> None:
    """The same through `dpo_loss`, with every option and modifier that has a meaning for the loss, or without it."""
    names, seed = {loss_type} if isinstance(loss_type, str) else {*loss_type}, data.draw(st.integers(0, 10**6))
    ranges = options_of(*names) | {"beta": st.floats(0.02, 2), "rpo_alpha": st.floats(0, 3)}
    ranges |= DIVERGENCE if set() < names - {"sft"} <= {*OF_H} else {}
    ranges |= {"reference_free": st.booleans()} if names & {*REFERENCED} else {}
    options = data.draw(st.fixed_dictionaries({}, optional=ranges), label="options")
    batch, random = random_batch(seed, ranking=bool(names & {*RANKINGS}) and seed % 3 > 0), np.random.default_rng(seed)
    pairs = len(batch["margins"])
    if names <= {*PAIRS} and data.draw(st.booleans(), label="weighted"):
        batch["wpo_weights"] = random.uniform(0.01, 1, pairs)
    if "exo" in names and not options.get("label_smoothing") and data.draw(st.booleans(), label="with scores"):
        batch["scores"] = random.normal(size=(pairs, 1 + batch["rejected_logps"].size // pairs))
    if "r_dpo" not in names and "rpo_alpha" not in options and data.draw(st.booleans(), label="means already"):
        del batch["chosen_lengths"], batch["rejected_lengths"]
    options |= {"loss_type": loss_type} | ({"loss_weights": weights} if weights else {})

    expected, rewards, slopes = oracles.dpo_loss(**batch, **options)
    leaves, (losses, *found_rewards) = call(batch, **options)
    losses.sum().backward()
    assert not any(reward.requires_grad for reward in found_rewards)
    found = [losses, *found_rewards, *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, [expected, *rewards, *slopes], strict=True):
        assert_same(one, other)


# -------------------------------------------------- value and gradient of each loss, by itself and through dpo_loss
FAMILIES = {"h": taking("h"), "mean_h": taking("mean_h"), "lengths": taking("chosen_lengths")}
FAMILIES |= {"batch": BATCH, "ratios": RANKINGS, "w and l": sorted({*taking("w", "l")} - {*FAMILIES["lengths"]})}


def test_every_loss_has_an_oracle_with_its_parameters_and_the_defaults_of_its_paper():
    assert sorted(name for family in FAMILIES.values() for name in family) == sorted(LOSSES)
    for name, loss in FUNCTIONS.items():
        own, expected = (inspect.signature(f).parameters.values() for f in (loss, getattr(oracles, name)))
        assert [(p.name, p.default, p.kind) for p in own] == [(p.name, p.default, p.kind) for p in expected], name


def of_family(family: str):
    """A test of the losses of a family: each equals its oracle, by itself and in `dpo_loss`, value and gradient."""

    @pytest.mark.parametrize("name", FAMILIES[family])
    @settings(max_examples=40)
    @given(data=st.data())
    def test(name, data):
        check_function(name, data)
        check_dpo_loss(name, data)

    return test


test_sigmoid_robust_hinge_exo_pair_discopop_odpo_and_r_dpo_are_functions_of_h = of_family("h")
test_ipo_is_a_regression_of_the_difference_of_means = of_family("mean_h")
test_nca_bco_sppo_apo_dpop_and_chipo_look_at_each_completion_by_itself = of_family("w and l")
test_sigmoid_norm_simpo_orpo_cpo_and_sft_divide_by_lengths = of_family("lengths")
test_aot_compares_quantiles_of_the_batch = of_family("batch")
test_plackett_luce_and_exo_rank_completions = of_family("ratios")


@given(data=st.data())
def test_f_divergences_and_capped_exp_equal_their_closed_forms(data):
    check_function("f_derivative", data)
    check_function("capped_exp", data)


@given(data=st.data())
def test_a_mixture_is_the_weighted_sum_of_its_losses(data):
    mixable = data.draw(st.sampled_from([PAIRS, [*PAIRS, *BATCH], [*taking("h", "mean_h"), "sft"], [*RANKINGS, "sft"]]))
    names = data.draw(st.lists(st.sampled_from(mixable), min_size=1, max_size=4, unique=True), label="names")
    weights = st.lists(st.floats(0, 3), min_size=len(names), max_size=len(names)).filter(any)
    check_dpo_loss(names, data, data.draw(st.none() | weights, label="weights"))


def test_parts_are_the_losses_of_a_mixture_by_name_each_computed_once(monkeypatch):
    names, calls, parts = ["sigmoid", "ipo", "sft"], [], {}
    for name in names:
        counted = lambda name=name, loss=LOSSES[name], **given: calls.append(name) or loss(**given)  # noqa: E731
        monkeypatch.setitem(LOSSES, name, counted)
    batch = random_batch(3) | {"wpo_weights": np.array([0.1, 0.5, 0.7, 1.0])}
    mixture = losses_of(batch, names, loss_weights=[0.5, 2.0, 3.0], rpo_alpha=0.7, parts=parts)
    assert calls == list(parts) == names
    for name, part in parts.items():
        assert_same(part, oracles.dpo_loss(**batch, loss_type=name)[0])
    assert_same(0.5 * parts["sigmoid"] + 2 * parts["ipo"] + 3.7 * parts["sft"], mixture)  # the RPO term is sft, too


def test_a_new_loss_is_a_function_and_a_row_of_the_table(monkeypatch):
    def toy_loss(w, margins, *, beta=1.0, toy_scale=2.0):
        return toy_scale * beta * w - margins

    monkeypatch.setitem(LOSSES, "toy", toy_loss)
    monkeypatch.setitem(PARAMETERS, "toy", inspect.signature(toy_loss).parameters)
    batch = random_batch(3)
    values = 2 * 0.5 * (batch["chosen_logps"] - batch["ref_chosen_logps"]) - batch["margins"]
    assert losses_of(batch, "toy", beta=0.5) == near(values)
    assert losses_of(batch, ["toy", "sft"], loss_weights=[1.0, 0.0], toy_scale=10.0) == near(values)  # β is 0.1


# ------------------------------------------------------------------------------------------- the properties, by name
@pytest.mark.parametrize("loss_type", REFERENCED)
@settings(max_examples=25)
@given(batch=BATCHES, shift=st.floats(-20, 20))
def test_a_constant_on_policy_and_reference_changes_nothing(loss_type, batch, shift):
    options = {"loss_type": loss_type} | ({"f_divergence_type": "js_divergence"} if loss_type in OF_H else {})
    _, (losses, *rewards) = call(batch, **options)
    for which in ("chosen_logps", "rejected_logps"):
        moved = {**batch, which: batch[which] + shift, f"ref_{which}": batch[f"ref_{which}"] + shift}
        _, (again, *rewards_again) = call(moved, **options)
        assert again.tolist() == near(losses.tolist())
        assert [r.tolist() for r in rewards_again] == [near(r.tolist()) for r in rewards]


LN_2 = math.log(2)
KNOWN = dict.fromkeys("sigmoid robust aot aot_pair aot_unpaired sigmoid_norm dpop chipo plackett_luce".split(), LN_2)
KNOWN |= {"hinge": 1.0, "ipo": 25.0, "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0}  # β = 0.1
KNOWN |= {"nca_pair": 2 * LN_2, "bco_pair": 2 * LN_2, "discopop": 0.5 * LN_2 + 0.5}
KNOWN |= dict.fromkeys(("exo_pair", "exo"), -LN_2 - 0.5 * (math.log(0.999) + math.log(0.001)))
KNOWN |= {"odpo": math.log1p(math.exp(1.5)), "r_dpo": math.log1p(math.exp(-0.02))}
# These four see the policy alone: log π = −6 and −4 over 3 and 1 tokens.
KNOWN |= {"sft": 2.0, "cpo": math.log1p(math.exp(0.2)) + 2, "simpo": math.log1p(math.exp(-0.1 * (-2 + 4) + 0.5))}
KNOWN["orpo"] = 2 + 0.1 * math.log1p((1 - math.exp(-2)) / math.exp(-2) * math.exp(-4) / (1 - math.exp(-4)))


@pytest.mark.parametrize("loss_type", KNOWN)
def test_policy_equal_to_reference_has_the_known_loss_and_no_reward(loss_type):
    batch = {"chosen_logps": -6.0, "rejected_logps": -4.0, "ref_chosen_logps": -6.0, "ref_rejected_logps": -4.0}
    batch = {key: np.array([value] * 2) for key, value in batch.items()} | {"margins": np.array([1.5] * 2)}
    batch |= {"chosen_lengths": np.array([3, 3]), "rejected_lengths": np.array([1, 1])}
    for kind in KINDS if loss_type in OF_H else KINDS[:1]:
        _, (losses, *rewards) = call(batch, loss_type=loss_type, f_divergence_type=kind)
        assert losses.tolist() == near([KNOWN[loss_type]] * 2)
        assert not any(reward.any() for reward in rewards)


FAR = [0.0, 1.0, -39.9, 40.1, 60.0, -60.0, 89.0, -89.0, 1e3, -1e3, 1e4, -1e4]
WORSE = [{}, {"label_smoothing": 0.4}, {"chipo_clip": 1e4}, {"bco_delta": -30.0}]  # options that make it worse
WORSE += [{"discopop_tau": tau} for tau in (1.0, 2.0)]
DIVERGENCES = [{}, *({"f_divergence_type": name} for name in ("js_divergence", "forward_kl"))]
DIVERGENCES += [{"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": a} for a in (-1.0, 0.3, 1.0, 2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_value_and_gradient_are_finite_however_far_apart(loss_type, dtype):
    columns = torch.cartesian_prod(*[torch.tensor(FAR, dtype=dtype)] * 2).unbind(1)
    ones = torch.ones_like(columns[0])
    more = {"chosen_lengths": ones, "rejected_lengths": ones, "margins": ones, "loss_type": loss_type}
    for options in [options for options in WORSE if set(options) <= set(PARAMETERS[loss_type])]:
        for divergence in DIVERGENCES if loss_type in OF_H else [{}]:
            for beta in (0.1, 1.0):
                leaves = [column.clone().requires_grad_() for column in columns]
                losses, _, _ = dpo_loss(*leaves, 0 * ones, 0 * ones, **more, beta=beta, **options, **divergence)
                losses.sum().backward()
                assert losses.dtype == torch.float32 and torch.isfinite(losses).all()
                if dtype != torch.float16:  # its own largest number is 65504
                    assert all(leaf.grad is None or torch.isfinite(leaf.grad).all() for leaf in leaves)


def far_inputs(name: str, seed: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Inputs as far apart as it gets for a function of losses.py; for those of rankings a mask, too."""
    generator, inputs = torch.Generator().manual_seed(seed), {}
    shape, far = (100, 4) if name in RANKINGS else (100,), torch.tensor(FAR, dtype=dtype)
    far = far / 10 if dtype == torch.float16 else far  # its own largest number is 65504
    for key in oracles.parameters(name)[0]:
        inputs[key] = far[torch.randint(len(FAR), shape, generator=generator)]
        if "lengths" in key:
            inputs[key] = torch.randint(1, 20, shape, generator=generator).to(dtype)
        elif "logps" in key:
            inputs[key] = -inputs[key].abs()
    mask = {"mask": torch.arange(4) < torch.randint(2, 5, (100, 1), generator=generator)} if name in RANKINGS else {}
    return inputs | mask


ALONE = [(name, dtype) for name in FUNCTIONS for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), [*ALONE, *((name, torch.float16) for name in RANKINGS)])
def test_each_function_by_itself_is_finite_however_far_apart(name, dtype):
    inputs = far_inputs(name, 0, dtype)
    for left_out in ([], ["mask"], ["mask", "scores"]):
        given = {key: value for key, value in inputs.items() if key not in left_out}
        leaves = [value.requires_grad_() for key, value in given.items() if key != "mask" and "lengths" not in key]
        result = FUNCTIONS[name](**given)
        assert result.dtype == dtype and torch.isfinite(result).all()
        assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(result.sum(), leaves))


def test_bfloat16_inputs_are_subtracted_in_float32():
    leaves = [torch.tensor([value], dtype=torch.bfloat16) for value in (-300.0, -296.0, -302.0, -299.0)]
    exact = [leaf.double() for leaf in leaves]
    assert dpo_loss(*leaves, beta=0.3)[0].item() == pytest.approx(dpo_loss(*exact, beta=0.3)[0].item(), rel=1e-6)
    chosen, rejected, zero = (torch.tensor([value]).bfloat16() for value in (256.0, 1.0, 0.0))
    losses, *rewards = dpo_loss(chosen, rejected, zero, zero, loss_type="hinge", beta=-1.0)
    assert losses.item() == 256.0  # 256 − 1 is 256 in bfloat16
    assert {losses.dtype, *(reward.dtype for reward in rewards)} == {torch.float32}


@given(x=st.floats(-1e6, 1e6))
def test_capped_exp_rises_without_a_kink_and_its_square_stays_in_float32(x):
    leaf = torch.tensor(x, requires_grad=True)
    assert torch.isfinite(capped_exp(leaf + 1) ** 2) and capped_exp(leaf + 1) >= capped_exp(leaf)
    (slope,) = torch.autograd.grad(capped_exp(leaf) ** 2, leaf)
    assert torch.isfinite(slope) and slope >= 0
    around = torch.tensor([40 - 1e-9, 40 + 1e-9], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(capped_exp(around).sum(), around)
    assert slopes.tolist() == pytest.approx([math.exp(40)] * 2, rel=1e-7)


@pytest.mark.parametrize("loss_type", LOSSES)
@settings(max_examples=25)
@given(batch=BATCHES, seed=st.integers(0, 99))
def test_reordering_the_batch_reorders_the_losses(loss_type, batch, seed):
    order = np.random.default_rng(seed).permutation(len(batch["margins"]))
    _, (losses, *rewards) = call(batch, loss_type=loss_type)
    _, (again, *rewards_again) = call({key: value[order] for key, value in batch.items()}, loss_type=loss_type)
    if loss_type in BATCH:  # quantiles belong to no pair: they stay where they are
        assert again.tolist() == near(losses.tolist())
    else:
        assert torch.equal(again, losses[order])
    assert all(torch.equal(a, b[order]) for a, b in zip(rewards_again, rewards, strict=True))


@settings(max_examples=50)
@given(batch=BATCHES, beta=RANGES["beta"], alpha=st.floats(0, 3))
def test_limits_that_lead_back_to_sigmoid(batch, beta, alpha):
    pairs, plain = len(batch["margins"]), losses_of(batch, "sigmoid", beta=beta)
    short = batch | {key: np.ones(pairs, dtype=int) for key in ("chosen_lengths", "rejected_lengths")}
    even, no_margin = short | {"chosen_lengths": short["rejected_lengths"]}, batch | {"margins": np.zeros(pairs)}
    for name in ("robust", "plackett_luce"):
        assert losses_of(batch, name, beta=beta) == near(plain)
    assert losses_of(no_margin, "odpo", beta=beta) == near(plain)
    assert losses_of(even, "r_dpo", beta=beta, r_dpo_alpha=0.7) == near(plain)
    assert losses_of(batch, "r_dpo", beta=beta, r_dpo_alpha=0.0) == near(plain)
    assert losses_of(batch, "dpop", beta=beta, dpop_lambda=0.0) == near(plain)
    assert losses_of(short, "sigmoid_norm", beta=beta) == near(plain)
    uniform = losses_of(batch, "sigmoid", beta=beta, reference_free=True)
    assert losses_of(batch, "cpo", beta=beta, cpo_alpha=0.0) == near(uniform)
    assert losses_of(short, "simpo", beta=beta, simpo_gamma=0.0) == near(uniform)
    one, smoothed = {key: value[:1] for key, value in batch.items()}, {"beta": beta, "label_smoothing": 0.2}
    for name in BATCH:
        assert losses_of(one, name, **smoothed) == near(losses_of(one, "sigmoid", **smoothed))
    with_sft = losses_of(batch, ["sigmoid", "sft"], beta=beta, loss_weights=[1.0, alpha])
    assert with_sft == near(losses_of(batch, "sigmoid", beta=beta, rpo_alpha=alpha))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_limit_a_mixture_of_one_loss_is_that_loss(loss_type):
    batch = random_batch(3)
    assert np.array_equal(losses_of(batch, loss_type), losses_of(batch, [loss_type]))
    assert np.array_equal(2 * losses_of(batch, loss_type), losses_of(batch, [loss_type], loss_weights=[2.0]))


@given(h=RANGES["h"], beta=RANGES["beta"], epsilon=st.floats(1e-6, 0.49))
def test_limits_of_flipped_labels(h, beta, epsilon):
    """Robust is the clean loss in expectation; exo of two completions scored log(1−ε), log ε is exo_pair."""
    h, scores = torch.tensor([h], dtype=torch.float64), torch.tensor([[1 - epsilon, epsilon]]).double().log()
    right, flipped = (dpo.losses.robust_loss(sign * h, beta=beta, label_smoothing=epsilon) for sign in (1, -1))
    clean = dpo.losses.sigmoid_loss(h, beta=beta)
    assert ((1 - epsilon) * right + epsilon * flipped).item() == near(clean.item(), scale=1e5)
    ratios, pair = torch.stack([h, 0 * h], -1), dpo.losses.exo_pair_loss(h, beta=beta, label_smoothing=epsilon)
    assert dpo.losses.exo_loss(ratios, scores, beta=beta).item() == pytest.approx(pair.item(), rel=1e-6, abs=1e-6)


@given(z=st.floats(-20, 20))
def test_limit_alpha_divergence_goes_from_reverse_kl_to_forward_kl(z):
    f = partial(f_derivative, torch.tensor(z, dtype=torch.float64))
    found = {
        alpha: f(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha).item()
        for alpha in (0.0, 1e-9, 1.0, 1e-5, -1e-5)
    }
    assert found[0.0] == found[1e-9] == f(f_divergence_type="reverse_kl") == z
    assert found[1.0] == f(f_divergence_type="forward_kl")
    for alpha in (1e-5, -1e-5):
        assert found[alpha] == pytest.approx(z - alpha * z * z / 2, rel=1e-9, abs=1e-6)


@given(ratio=st.floats(1e-4, 1e4))
def test_f_derivatives_are_the_derivatives_of_their_divergences(ratio):
    generators = {  # f with f(1) = 0, up to a multiple of u − 1; Wang et al., table 1
        ("reverse_kl", 1.0): lambda u: u * np.log(u),
        ("forward_kl", 1.0): lambda u: -np.log(u),
        ("js_divergence", 1.0): lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        ("alpha_divergence", 0.4): lambda u: (u**0.6 - 0.6 * u - 0.4) / (0.4 * (0.4 - 1)),
    }
    two, step = np.array([ratio, 1.5 * ratio]), 1e-5 * ratio  # their difference has no constant
    for (name, alpha), f in generators.items():
        slopes = (f(two + step) - f(two - step)) / (2 * step)
        found = f_derivative(torch.tensor(two).log(), f_divergence_type=name, f_alpha_divergence_coef=alpha)
        assert found.diff().item() == pytest.approx(np.diff(slopes).item(), rel=1e-3, abs=1e-4)


def test_sides_are_taken_as_the_papers_take_them():
    """Which of two completions, and which sign: what a closed form copied wrongly would get wrong, too."""
    h, ones = torch.tensor([3.0]), torch.ones(1)
    assert dpo.losses.r_dpo_loss(h, 50 * ones) < dpo.losses.r_dpo_loss(h, 0 * ones)  # length explains it
    assert dpo.losses.odpo_loss(h, ones) > dpo.losses.odpo_loss(h, 0 * ones)  # must win by more
    simpo = partial(dpo.losses.simpo_loss, -ones, -2 * ones, ones, ones)
    assert simpo(simpo_gamma=1.0) > simpo(simpo_gamma=0.0)
    less_likely, more_likely = dpo.losses.dpop_loss(-ones, -2 * ones), dpo.losses.dpop_loss(ones, 0 * ones)
    assert less_likely > more_likely  # of the chosen completion, at the same h
    for name in LOSSES:
        leaves = [torch.tensor([value], requires_grad=True) for value in (-2.0, -3.0, -2.5, -2.5)]
        losses, *_ = dpo_loss(*leaves, loss_type=name, margins=ones, chosen_lengths=ones, rejected_lengths=ones)
        losses.sum().backward()
        chosen, rejected = (0.0 if leaf.grad is None else leaf.grad.item() for leaf in leaves[:2])
        assert (chosen < 0 or name == "apo_down") and (rejected > 0 or name == "sft"), name


@pytest.mark.parametrize("loss_type", LOSSES)
def test_reference_free_and_losses_of_the_policy_alone_need_no_reference_and_look_at_none(loss_type):
    batch, free = random_batch(7), {"reference_free": True} if loss_type in REFERENCED else {}
    more = {key: torch.tensor(value) for key, value in batch.items() if key not in FOUR}
    policy = [torch.tensor(batch[key]) for key in FOUR[:2]]
    without = dpo_loss(*policy, None, None, loss_type=loss_type, beta=0.5, **more, **free)
    with_one = dpo_loss(*policy, *policy[::-1], loss_type=loss_type, beta=0.5, **more, **free)
    zeros = dpo_loss(*policy, 0 * policy[0], 0 * policy[1], loss_type=loss_type, beta=0.5, **more)
    assert torch.equal(without[0], with_one[0]) and all(map(torch.equal, without, zeros))
    assert torch.equal(without[1], 0.5 * policy[0]) and torch.equal(without[2], 0.5 * policy[1])
    assert not free or all(map(torch.equal, without, with_one))


@pytest.mark.parametrize("loss_type", sorted({*LOSSES} - {*taking("rejected_lengths", "mean_h", "length_difference")}))
def test_lengths_of_the_chosen_completions_are_enough_where_only_they_count(loss_type):
    both, one = random_batch(6), random_batch(6)
    del one["rejected_lengths"]
    assert np.array_equal(losses_of(one, loss_type, rpo_alpha=1.0), losses_of(both, loss_type, rpo_alpha=1.0))


# --------------------------------------------------------------------------------------------------------- refusals
ZEROS = [torch.zeros(2)] * 4
ONE_SIDED, NO_REFERENCE = {"chosen_lengths": torch.ones(2)}, dict.fromkeys(FOUR[2:])
REFUSED = [  # options without meaning, message
    ({"loss_type": "sigmoind"}, "loss_type 'sigmoind' is unknown"),
    ({"loss_type": ["sigmoid", "nll"]}, "loss_type 'nll'"),
    ({"loss_type": []}, "loss_type .* at least one"),
    ({"loss_type": ["sigmoid", "sigmoid"]}, "loss_type .* each once"),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers for 2"),
    ({"loss_weights": [1.0, 2.0]}, "loss_weights has 2 numbers for 1"),
    ({"loss_weights": []}, "loss_weights has 0 numbers for 1"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5"),
    *(({"label_smoothing": share}, f"label_smoothing is {share}") for share in (0.5, 1.0, -0.1, math.nan)),
    ({"f_divergence_type": "chi"}, "f_divergence_type 'chi' is unknown"),
]
LACKING = [  # tensors that lack or do not fit, message
    ({"loss_type": "odpo"}, "odpo needs margins"),
    ({"loss_type": "r_dpo"}, "r_dpo needs chosen_lengths and rejected_lengths"),
    ({"rpo_alpha": 1.0}, "rpo_alpha needs chosen_lengths"),
    ({"loss_type": "exo", "scores": torch.ones(2, 2), "label_smoothing": 0.1}, "label_smoothing .* exo"),
    (NO_REFERENCE | {"loss_type": ["sft", "sigmoid"]}, "needs ref_chosen_logps"),
]
for _name in LOSSES:
    _of, _with_sigmoid = {"loss_type": _name}, {"loss_type": ["sigmoid", _name]}
    if _name not in taking("label_smoothing"):
        REFUSED.append((_of | {"label_smoothing": 0.1}, f"label_smoothing has no meaning for loss_type {_name}"))
    if _name not in OF_H:
        REFUSED += [(_of | {"f_divergence_type": kind}, f"{kind} .* loss_type {_name}") for kind in KINDS[1:]]
    if _name not in (*OF_H, "sft"):
        REFUSED.append((_with_sigmoid | {"f_divergence_type": "forward_kl"}, f"forward_kl .* sigmoid, {_name}"))
    if _name not in (*RANKINGS, "sft"):
        REFUSED.append(({"loss_type": ["plackett_luce", _name]}, "mixes losses of rankings"))
    if _name in taking("rejected_lengths", "mean_h", "length_difference"):
        LACKING.append((_of | ONE_SIDED, f"{_name} needs both chosen_lengths and rejected_lengths"))
    if _name in REFERENCED:
        LACKING.append((_of | NO_REFERENCE, f"{_name} needs ref_chosen_logps"))
    else:
        REFUSED.append((_of | {"reference_free": True}, f"{_name} has no reference"))
    if _name not in PAIRS:
        LACKING.append((_of | {"wpo_weights": torch.ones(2)}, f"wpo_weights .* {_name}"))
    if _name not in RANKINGS:
        LACKING.append((_of | {"rejected_logps": torch.zeros(2, 3)}, f"{_name} is for pairs .* plackett_luce or exo"))


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_loss(**({"loss_type": "sigmoid"} | options))
    with pytest.raises(ValueError, match=message):
        dpo_loss(*ZEROS, **options)


@pytest.mark.parametrize(("arguments", "message"), LACKING)
def test_tensors_that_lack_or_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(**dict(zip(FOUR, ZEROS, strict=True)) | arguments)


@pytest.mark.parametrize("option", ["simpo_gama", "h", "w", "length_difference", "ratios"])
def test_options_that_no_loss_has_are_refused(option):
    with pytest.raises(TypeError, match=f"no option '{option}'"):
        dpo_loss(*ZEROS, **ONE_SIDED, **{option: torch.ones(2)})


def test_combinations_with_a_meaning_are_taken():
    names = ["sigmoid", "bco_pair", "sft"]
    assert check_loss(names, loss_weights=[0.8, 0.2, 1.0], label_smoothing=0.1) == names
    assert check_loss(["sft", "ipo"], f_divergence_type="forward_kl", reference_free=True) == ["sft", "ipo"]
    assert list(dpo.losses.OF_RANKINGS) == RANKINGS and list(dpo.losses.OVER_THE_BATCH) == BATCH
    assert list(dpo.losses.WITH_F_DIVERGENCE) == OF_H and set(dpo.losses.WITH_REFERENCE) == set(REFERENCED)


# ------------------------------------------------------------------------------- the leaf functions of logprobs.py
LENGTHS = st.integers(1, 4).flatmap(lambda pairs: st.lists(st.integers(1, 7), min_size=2 * pairs, max_size=2 * pairs))


def owners(lengths: list[int]) -> torch.Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


@given(lengths=LENGTHS, ld_alpha=st.floats(0, 1), seed=st.integers(0, 99))
def test_ld_dpo_weighs_the_tokens_beyond_the_shorter_completion(lengths, ld_alpha, seed):
    owner, values = owners(lengths), torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    weights = dpo.logprobs.ld_weights(owner, torch.tensor(lengths), ld_alpha=ld_alpha)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(oracles.ld_weights(lengths, ld_alpha), abs=1e-6)
    sums = dpo.logprobs.sum_by_owner(values * weights, owner, len(lengths))
    expected = [math.fsum(part.tolist()) for part in (values * weights).split(lengths)]
    assert sums.tolist() == pytest.approx(expected, abs=1e-5)
    assert (dpo.logprobs.ld_weights(owner, torch.tensor(lengths), ld_alpha=1.0) == 1).all()  # which is DPO


@given(tokens=st.integers(1, 6), vocabulary=st.integers(2, 9), scale=st.floats(0.1, 30), seed=st.integers(0, 99))
def test_wpo_compares_a_token_with_a_sample_of_the_policy(tokens, vocabulary, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocabulary, generator=generator) * scale).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weigh = partial(dpo.logprobs.wpo_alignment, targets=targets)
    found = weigh(logits)
    assert not found.requires_grad and found.dtype == torch.float32 and found.shape == (tokens,)
    rows = zip(logits.detach().double().numpy(), targets.tolist(), strict=True)
    assert found.tolist() == pytest.approx([oracles.wpo_token(*row) for row in rows], rel=1e-5, abs=1e-5)
    assert torch.equal(weigh(logits.bfloat16()), weigh(logits.bfloat16().float()))


# ------------------------------------------------------------------------------------------------------ the copy test
def pasted(module, name: str):
    """The function as one who copies it has it: its source, torch, F, and the siblings that its docstring names."""
    needs = re.findall(r"Needs:\s+([^.]+)\.", inspect.getdoc(getattr(module, name)))
    namespace, words = {"torch": torch, "F": F}, re.findall(r"\w+", "".join(needs))
    sources = [module] if "file" in words else [getattr(module, needed) for needed in (*words, name)]
    for source in sources:
        exec(inspect.getsource(source), namespace)
    return namespace[name]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_dpo_loss_pasted_with_its_file_gives_the_same(loss_type):
    options = {"loss_type": loss_type, "rpo_alpha": 0.5}
    options |= {key: torch.tensor(value) for key, value in random_batch(3).items()}
    assert all(map(torch.equal, pasted(dpo.losses, "dpo_loss")(**options), dpo_loss(**options)))
    assert pasted(dpo.losses, "check_loss")(loss_type) == [loss_type]


def calls(seed: int) -> dict:
    """name: (module, positional arguments, keyword arguments) of functions to copy; seed 0 leaves options out."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (6,), generator=generator)
    owner = owners(lengths.tolist())
    logits = torch.randn(len(owner), 11, generator=generator)
    targets = torch.randint(11, (len(owner),), generator=generator)
    rows, batch = targets.split(lengths.tolist()), {}
    for part, own in (("prompt", rows[:2]), ("chosen", rows[2:4]), ("rejected", rows[4:])):
        for key, values in (("input_ids", own), ("attention_mask", [torch.ones_like(row) for row in own])):
            batch[f"{part}_{key}"] = dpo.collate.pad(values, 0, left=part == "prompt")
    plan = {"batch_size": 2, "accumulation": 2, "world_size": 2, "seed": seed, "group_by_length": seed == 1}
    found = {
        "token_logps": (dpo.logprobs, (logits, targets), {}),
        "sum_by_owner": (dpo.logprobs, (logits[:, 0], owner, 6), {}),
        "ld_weights": (dpo.logprobs, (owner, lengths), {"ld_alpha": 0.3}),
        "wpo_alignment": (dpo.logprobs, (logits, targets), {}),
        "pad": (dpo.collate, (rows, 9), {"left": True}),
        "concatenated_inputs": (dpo.collate, (batch, 9), {}),
        "padded_batch": (dpo.collate, (batch, 9), {}),
        "padding_free_batch": (dpo.collate, (batch, 9), {}),
        "prefix_shared_batch": (dpo.collate, (batch, 9), {}),
        "epoch_windows": (dpo.batches, (lengths.tolist() * 5,), plan),
    }
    for name, function in FUNCTIONS.items():
        options = {key: 0.3 for key, value in oracles.parameters(name)[1].items() if isinstance(value, float) and seed}
        options |= {"f_divergence_type": KINDS[seed]} if name == "f_derivative" else {}
        inputs = {key: value for key, value in far_inputs(name, seed).items() if key != "scores" or not options}
        found[function.__name__] = (dpo.losses, (), inputs | options)
    return found


@pytest.mark.parametrize("name", calls(0))
@pytest.mark.parametrize("seed", range(4))
def test_a_function_pasted_alone_gives_the_same(name, seed):
    module, args, options = calls(seed)[name]
    assert pasted(module, name) is not getattr(module, name)
    found, expected = pasted(module, name)(*args, **options), getattr(module, name)(*args, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
