"""Rankings of more than two completions: against sums by hand, pairs, and themselves cut another way."""

import math

import numpy as np
import pytest
import torch
from conftest import curve, make_model, make_rankings, make_rows, make_tokenizer, start
from datasets import Dataset

from dpo.collate import DataCollatorForPreference
from dpo.config import DPOConfig
from dpo.data import prepare_dataset
from dpo.logprobs import concatenated_forward
from dpo.loop import get_batch_loss_metrics
from dpo.losses import exo_loss, plackett_luce_loss
from dpo.reference import Reference

COLLATOR = DataCollatorForPreference(pad_token_id=0)


def losses_and_metrics(model, ref_model, rows, **options):
    reference = Reference(policy=model, ref_model=ref_model)
    return get_batch_loss_metrics(model, COLLATOR(rows), reference, args=DPOConfig(**options))


@pytest.mark.parametrize(("ranking", "pair"), [("plackett_luce", "sigmoid"), ("exo", "exo_pair")])
def test_a_loss_of_rankings_trains_on_pairs_as_its_pair_loss_does(tmp_path, ranking, pair):
    options = {"eval_rows": make_rows(7, seed=1), "eval_strategy": "epoch"}
    a, b = (start(tmp_path / name, loss_type=name, **options) for name in (ranking, pair))
    for key in {*a.rows[0], *a.rows[-1]} - {"tokens_per_second", "unique_tokens_per_second"}:
        assert curve(a, key) == pytest.approx(curve(b, key), abs=1e-6, rel=1e-5), key


def test_a_rankings_loss_and_metrics_equal_those_added_up_by_hand():
    """Each completion scored as one of a pair, alone; Plackett and Luce's choices multiplied out in float64."""
    rows = list(prepare_dataset({"rows": Dataset.from_list(make_rankings(6))}, make_tokenizer(), ranked=True))
    model, ref_model = make_model(), make_model(seed=3)
    losses, metrics = losses_and_metrics(model, ref_model, rows, beta=0.3, loss_type="plackett_luce")

    def log_probability(scored, row, completion) -> float:
        pair = {**row, "chosen_input_ids": completion, "rejected_input_ids": completion}
        return concatenated_forward(scored, COLLATOR([pair]))["chosen_logps"].item()

    for i, row in enumerate(rows):
        completions = [row["chosen_input_ids"], *row["rejected_input_ids"]]
        logps = [log_probability(model, row, completion) for completion in completions]
        references = [log_probability(ref_model, row, completion) for completion in completions]
        rewards = [0.3 * (p - q) for p, q in zip(logps, references, strict=True)]
        chance = math.prod(math.exp(r) / sum(map(math.exp, rewards[k:])) for k, r in enumerate(rewards))
        others = sum(rewards[1:]) / len(rewards[1:])
        expected = {"rewards/chosen": rewards[0], "rewards/rejected": others, "rewards/margins": rewards[0] - others}
        expected |= {"loss": -math.log(chance), "rewards/accuracies": float(rewards[0] > max(rewards[1:]))}
        expected |= {"logps/chosen": logps[0], "logps/rejected": sum(logps[1:]) / len(logps[1:])}
        assert {key: metrics[key][i].item() for key in expected} == pytest.approx(expected, abs=2e-4)
        assert losses[i].item() == metrics["loss"][i].item()


@pytest.mark.parametrize("loss_type", ["plackett_luce", "exo", ["plackett_luce", "exo", "sft"]], ids=str)
@pytest.mark.parametrize("scores", [False, True], ids=["ranked", "scored"])
def test_rankings_of_different_lengths_train_the_same_however_they_are_cut(tmp_path, loss_type, scores):
    options = {"rows": make_rankings(11, scores=scores), "eval_rows": make_rankings(5, seed=1, scores=scores)}
    options |= {"loss_type": loss_type, "eval_strategy": "epoch"}
    at_once = start(tmp_path / "a", **options)
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1}
    in_turn = start(tmp_path / "b", **options, **cut)
    keys = "loss grad_norm rewards/margins tokens_seen eval_loss eval_rewards/rejected eval_logps/rejected"
    for key in keys.split():
        assert curve(in_turn, key) == pytest.approx(curve(at_once, key), abs=1e-5, rel=1e-4), key


def test_training_on_rankings_puts_them_in_order(tmp_path):
    rows, held_out = make_rankings(48), make_rankings(8, seed=5)
    options = {"loss_type": "plackett_luce", "num_train_epochs": 8, "learning_rate": 5e-3, "eval_strategy": "epoch"}
    run_ = start(tmp_path, rows=rows, eval_rows=held_out, **options)
    by_chance = sum(math.log(math.factorial(2 + i % 3)) for i in range(48)) / 48
    assert run_.rows[0]["loss"] == pytest.approx(by_chance, rel=0.2)
    assert run_.rows[-1]["eval_rewards/accuracies"] == 1 and run_.rows[-1]["eval_loss"] < 0.8 * by_chance


def test_exo_starts_at_the_divergence_of_equal_chances_from_its_labels(tmp_path):
    """KL(1/K ‖ label) in NumPy: the label is softmax(scores / β_r), or without scores (1−ε, ε/(K−1), …)."""

    def label(k: int, temperature: float | None = None, epsilon: float = 1e-3) -> np.ndarray:
        if temperature is None:
            return np.log([1 - epsilon] + [epsilon / (k - 1)] * (k - 1))
        scores = 0.5 * np.arange(k) / temperature
        return scores - np.log(np.exp(scores).sum())

    smoothed = (({}, {}), ({"label_smoothing": 0.2}, {"epsilon": 0.2}))
    scored = (({}, {"temperature": 1.0}), ({"exo_beta_r": 0.5}, {"temperature": 0.5}))
    for i, (options, of_label) in enumerate(smoothed + scored):
        expected = np.mean([-np.log(k) - label(k, **of_label).mean() for k in (2, 3, 4)])
        weighted = [{**row, "weight": 1.0 + i} for row in make_rankings(6, scores="temperature" in of_label)]
        first = start(tmp_path / str(i), loss_type="exo", rows=weighted, max_steps=1, **options).rows[0]
        assert first["loss"] == pytest.approx((1.0 + i) * expected, rel=1e-5)


def test_what_rankings_cannot_do_is_refused_before_training(tmp_path):
    ranked, scored = make_rankings(8), make_rankings(8, scores=True)
    for rows, options, words in (
        (ranked, {}, "row 2: it ranks more than two completions, .* take plackett_luce or exo"),
        (ranked, {"loss_type": "exo", "exo_beta_r": 2.0}, "exo_beta_r does nothing without scores"),
        (scored, {"loss_type": "exo", "label_smoothing": 0.1}, "label_smoothing does nothing where rows have scores"),
        (scored, {"loss_type": "exo", "eval_strategy": "epoch", "eval_rows": ranked}, "evaluation set one has scores"),
    ):
        with pytest.raises(ValueError, match=words):
            start(tmp_path, rows=rows, **options)


@pytest.mark.parametrize("loss_type", ["plackett_luce", "exo"])
def test_a_ranking_of_weight_zero_counts_for_nothing_and_breaks_nothing(loss_type, tmp_path):
    rows = [{**row, "weight": float(number % 2)} for number, row in enumerate(make_rankings(8))]
    options = {"per_device_train_batch_size": 8, "max_steps": 2, "loss_type": loss_type, "optim": "sgd"}
    run = start(tmp_path / "a", rows=rows, **options)
    counted = start(tmp_path / "b", rows=[row for row in rows if row["weight"]], **options)
    assert [row["loss"] for row in run.rows] == pytest.approx([row["loss"] / 2 for row in counted.rows], rel=1e-5)
    assert [row["grad_norm"] for row in run.rows] == pytest.approx([r["grad_norm"] / 2 for r in counted.rows], rel=1e-2)


@pytest.mark.parametrize("scale", [0.0, 3.0, 2.0**16])
@pytest.mark.parametrize("loss", [plackett_luce_loss, exo_loss])
def test_a_scaled_loss_has_a_scaled_gradient_where_rankings_differ_in_length(loss, scale):
    """As float16's loss scaler and weights scale it: what stands for −∞ must not become it."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    gradients = []
    for factor in (1.0, scale):
        ratios = torch.tensor([[0.5, -1.0, 0.0], [2.0, 1.0, -3.0]], requires_grad=True)
        (factor * loss(ratios, mask=mask)).sum().backward()
        gradients.append(ratios.grad)
    assert torch.allclose(gradients[1], scale * gradients[0], rtol=1e-4) and gradients[0].any()
