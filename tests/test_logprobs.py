"""Log-probabilities: against one sequence at a time and NumPy in float64, in every company and every dtype."""

import math

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from dpo.collate import DataCollatorForPreference, concatenated_inputs, padded_inputs
from dpo.logprobs import concatenated_forward, sum_by_owner, token_logps

ids = st.lists(st.integers(0, 399), min_size=1, max_size=9)
pairs = st.lists(
    st.fixed_dictionaries({f"{part}_input_ids": ids for part in ("prompt", "chosen", "rejected")}),
    min_size=1,
    max_size=4,
)


def one_at_a_time(model, prompt: list[int], completion: list[int]) -> float:
    """Σ_t log π(y_t | x, y_<t) from the full logits of one unpadded sequence, softmax in float64 by NumPy."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().numpy()
    total = 0.0
    for t, token in enumerate(completion):
        row = logits[len(prompt) + t - 1]
        total += row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


@settings(max_examples=25)
@given(pairs)
def test_batched_log_probabilities_equal_those_of_each_sequence_alone(rows):
    model = make_model()
    scores = concatenated_forward(model, DataCollatorForPreference(pad_token_id=0)(rows))
    for i, row in enumerate(rows):
        for which in ("chosen", "rejected"):
            alone = one_at_a_time(model, row["prompt_input_ids"], row[f"{which}_input_ids"])
            assert scores[f"{which}_logps"][i].item() == pytest.approx(alone, abs=2e-4)
            assert scores[f"{which}_lengths"][i].item() == len(row[f"{which}_input_ids"])
    assert scores["chosen_logps"].dtype == torch.float32 and scores["chosen_logps"].shape == (len(rows),)


ROWS = [
    {"prompt_input_ids": [5, 6, 7, 8], "chosen_input_ids": [9, 10], "rejected_input_ids": [11, 12, 13, 14, 15]},
    {"prompt_input_ids": [16], "chosen_input_ids": [17, 18, 19], "rejected_input_ids": [20]},
]


def test_log_probabilities_match_closed_form_on_a_model_whose_logits_are_known():
    class Bigram(torch.nn.Module):
        """log π(next | token) = log softmax(table[token]); takes no logits_to_keep, as others' models may not."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(21, 21, generator=torch.Generator().manual_seed(0)))

        def forward(self, input_ids, attention_mask, use_cache):
            return type("Output", (), {"logits": self.table[input_ids]})

    model = Bigram()
    table = model.table.detach().double().numpy()
    logps = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    scores = concatenated_forward(model, DataCollatorForPreference(pad_token_id=0)(ROWS))
    expected = [logps[8, 9] + logps[9, 10], logps[16, 17] + logps[17, 18] + logps[18, 19]]
    assert scores["chosen_logps"].tolist() == pytest.approx(expected, abs=1e-5)
    assert scores["rejected_logps"][1].item() == pytest.approx(logps[16, 20], abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2 (sliding window, soft-capped logits)"])
def test_other_families_score_the_same_in_company_as_alone(family):
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    else:
        sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4, "initializer_range": 0.3}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()
    scores = concatenated_forward(model, DataCollatorForPreference(pad_token_id=0)(ROWS))
    for i, row in enumerate(ROWS):
        alone = one_at_a_time(model, row["prompt_input_ids"], row["rejected_input_ids"])
        assert scores["rejected_logps"][i].item() == pytest.approx(alone, abs=1e-4)


def test_each_completion_of_a_ranking_scores_as_it_does_in_a_pair():
    model, rejected = make_model(), [[[11, 12], [13], [14, 15, 16]], [[20]]]
    rows = [{**row, "rejected_input_ids": lists} for row, lists in zip(ROWS, rejected, strict=True)]
    collator = DataCollatorForPreference(pad_token_id=0)
    scores = concatenated_forward(model, collator(rows))
    assert scores["rejected_logps"].shape == scores["rejected_lengths"].shape == (2, 3)
    assert scores["rejected_lengths"].tolist() == [[2, 1, 3], [1, 0, 0]]
    assert scores["rejected_logps"][1, 1:].tolist() == [0, 0]
    for i, (row, lists) in enumerate(zip(ROWS, rejected, strict=True)):
        for rank, completion in enumerate(lists):
            pair = concatenated_forward(model, collator([{**row, "rejected_input_ids": completion}]))
            assert scores["rejected_logps"][i, rank].item() == pytest.approx(pair["rejected_logps"].item(), abs=1e-4)
            assert scores["chosen_logps"][i].item() == pytest.approx(pair["chosen_logps"].item(), abs=1e-4)
    for options in ({"ld_alpha": 0.5}, {"use_weighting": True}):
        with pytest.raises(ValueError, match="ld_alpha and use_weighting are for pairs"):
            concatenated_forward(model, collator(rows), **options)


def test_rankings_of_two_are_pairs():
    model, collator = make_model(), DataCollatorForPreference(pad_token_id=0)
    ranked = collator([{**row, "rejected_input_ids": [row["rejected_input_ids"]]} for row in ROWS])
    scores = concatenated_forward(model, ranked, ld_alpha=0.5)
    pairs = concatenated_forward(model, collator(ROWS), ld_alpha=0.5)
    assert all(torch.equal(scores[key], pairs[key]) for key in pairs)


def test_only_completion_positions_reach_the_head():
    model, seen = make_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    concatenated_forward(model, DataCollatorForPreference(pad_token_id=0)(ROWS))
    assert seen == [(2 + 3 + 5 + 1, 400)]


def test_a_batch_that_is_model_inputs_already_scores_the_same():
    model, batch = make_model(), DataCollatorForPreference(pad_token_id=0)(ROWS)
    plain = concatenated_forward(model, batch)
    ready = concatenated_forward(model, padded_inputs(concatenated_inputs(batch, 0), 0))
    assert all(torch.equal(plain[key], ready[key]) for key in plain)


def test_what_the_padding_holds_changes_nothing():
    model = make_model()
    scores = [concatenated_forward(model, DataCollatorForPreference(pad_token_id=pad)(ROWS)) for pad in (0, 399)]
    assert torch.equal(scores[0]["chosen_logps"], scores[1]["chosen_logps"])


def test_log_softmax_of_bfloat16_logits_is_taken_in_float32():
    logits = (torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    targets = torch.arange(64)
    values = logits.double().numpy()
    expected = values[range(64), range(64)] - np.log(np.exp(values).sum(axis=1))
    result = token_logps(logits, targets)
    assert result.dtype == torch.float32
    assert np.abs(result.double().numpy() - expected).max() < 1e-5


def test_gradient_of_a_log_probability_is_onehot_minus_softmax():
    logits = torch.randn(3, 7, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    token_logps(logits, torch.tensor([1, 0, 6])).sum().backward()
    values = logits.detach().double().numpy()
    softmax = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    assert np.abs(logits.grad.double().numpy() - (np.eye(7)[[1, 0, 6]] - softmax)).max() < 1e-6


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5, width=32)), min_size=1, max_size=30))
def test_sum_by_owner_equals_a_loop(entries):
    owner, values = torch.tensor([o for o, _ in entries]), torch.tensor([v for _, v in entries])
    expected = [math.fsum(v for o, v in entries if o == sequence) for sequence in range(5)]
    assert sum_by_owner(values, owner, 5).tolist() == pytest.approx(expected, abs=1e-4)
