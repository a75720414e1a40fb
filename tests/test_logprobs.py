"""Log-probabilities: against one sequence at a time and NumPy in float64, in every company and every dtype."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collate import pairs
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from dpo.collate import DataCollatorForPreference, completions_of, padded_batch
from dpo.logprobs import concatenated_forward, sum_by_owner, token_logps

ROWS = [
    {"prompt_input_ids": [5, 6, 7, 8], "chosen_input_ids": [9, 10], "rejected_input_ids": [11, 12, 13, 14, 15]},
    {"prompt_input_ids": [16], "chosen_input_ids": [17, 18, 19], "rejected_input_ids": [20]},
]


def forward(model, rows=ROWS, pad_id: int = 0, **options) -> dict:
    batch = DataCollatorForPreference(pad_token_id=pad_id)(rows)
    return concatenated_forward(model, batch, padding_value=pad_id, **options)


def one_at_a_time(model, prompt: list[int], completion: list[int], scored: list[bool] | None = None) -> float:
    """Σ_t log π(y_t | x, y_<t) from the full logits of one unpadded sequence, softmax in float64 by NumPy; with scored,
    over those t where it is true."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double().numpy()
    total = 0.0
    for t, token in enumerate(completion):
        if scored and not scored[t]:
            continue
        row = logits[len(prompt) + t - 1]
        total += row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


@settings(max_examples=25)
@given(pairs, st.sampled_from([0, 399]))
def test_batched_log_probabilities_equal_those_of_each_sequence_alone(rows, pad_id):
    """Whatever the padding holds: real tokens never see it."""
    model = make_model()
    scores = forward(model, rows, pad_id)
    for i, row in enumerate(rows):
        for which in ("chosen", "rejected"):
            alone = one_at_a_time(model, row["prompt_input_ids"], row[f"{which}_input_ids"])
            assert scores[f"{which}_logps"][i].item() == pytest.approx(alone, abs=2e-4)
            assert scores[f"{which}_lengths"][i].item() == len(row[f"{which}_input_ids"])
    assert scores["chosen_logps"].dtype == torch.float32 and scores["chosen_logps"].shape == (len(rows),)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("layout", ["plain", "padded"])
def test_tokens_that_are_not_scored_are_read_and_not_counted(layout, ranked):
    """Of a completion of several turns the assistant's; the second row says nothing of it: all of its are."""
    rows = [{**ROWS[0], "scored": [[True, False], [False, True, True, False, True]]}, {**ROWS[1], "scored": []}]
    if ranked:
        rows[0] |= {"rejected_input_ids": [ROWS[0]["rejected_input_ids"], [3, 4]]}
        rows[0]["scored"] = [*rows[0]["scored"], [False, True]]
        rows[1] |= {"rejected_input_ids": [ROWS[1]["rejected_input_ids"]]}
    model, batch = make_model(), DataCollatorForPreference(pad_token_id=0, layout=layout)(rows)
    scores = concatenated_forward(model, batch)
    for i, row in enumerate(rows):
        rejected = row["rejected_input_ids"] if ranked else [row["rejected_input_ids"]]
        for rank, completion in enumerate([row["chosen_input_ids"], *rejected]):
            mask = row["scored"][rank] if row["scored"] else [True] * len(completion)
            logps, lengths = (
                scores[f"{'rejected' if rank else 'chosen'}_{key}"][i].flatten() for key in ("logps", "lengths")
            )
            alone = one_at_a_time(model, row["prompt_input_ids"], completion, mask)
            assert logps[max(0, rank - 1)].item() == pytest.approx(alone, abs=2e-4)
            assert lengths[max(0, rank - 1)].item() == sum(mask)
    read = [sum(len(row["prompt_input_ids"]) + len(c) for c in completions_of(row)) for row in rows]
    assert padded_batch(batch)["tokens"].tolist() == read if layout == "plain" else batch["tokens"].tolist() == read


def test_log_probabilities_match_closed_form_on_a_model_whose_logits_are_known():
    class Bigram(torch.nn.Module):
        """log π(next | token) = log softmax(table[token]); takes no logits_to_keep, as others' models may not."""

        table = torch.randn(21, 21, generator=torch.Generator().manual_seed(0))

        def forward(self, input_ids, attention_mask, use_cache):
            return SimpleNamespace(logits=self.table[input_ids])

    Bigram.table[[16, 16, 17, 18], [17, 20, 18, 19]] = 4.0  # the second pair is likely: its WPO weight is capped
    table = Bigram.table.double().numpy()
    logps = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    expect = np.log((np.exp(logps) ** 2).sum(axis=1))  # log Σ_v π_v², WPO's measure of a likely token
    plain, weighed = forward(Bigram()), forward(Bigram(), use_weighting=True, ld_alpha=0.25)
    for i, row in enumerate(ROWS):
        likely = 0.0  # WPO's log-weight before it is capped
        for which, other in (("chosen", "rejected"), ("rejected", "chosen")):
            completion = row[f"{which}_input_ids"]
            before = [row["prompt_input_ids"][-1], *completion[:-1]]
            tokens, shorter = logps[before, completion], len(row[f"{other}_input_ids"])
            assert plain[f"{which}_logps"][i].item() == pytest.approx(tokens.sum(), abs=1e-5)
            tail = tokens[:shorter].sum() + 0.25 * tokens[shorter:].sum()
            assert weighed[f"{which}_logps"][i].item() == pytest.approx(tail, abs=1e-5)
            likely += (tokens - expect[before]).mean()
        assert weighed["wpo_weights"][i].item() == pytest.approx(min(1, math.exp(likely)), abs=1e-5)
        assert (likely > 0) == (i == 1)  # one weight is below 1, one capped
    assert not weighed["wpo_weights"].requires_grad


def test_other_families_score_the_same_in_company_as_alone():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4, "initializer_range": 0.3}
    for model in (gpt2.eval(), Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()):  # with soft-capped logits
        for score, row in zip(forward(model)["rejected_logps"].tolist(), ROWS, strict=True):
            alone = one_at_a_time(model, row["prompt_input_ids"], row["rejected_input_ids"])
            assert score == pytest.approx(alone, abs=1e-4), type(model)


def test_each_completion_of_a_ranking_scores_as_it_does_in_a_pair():
    model, rejected = make_model(), [[[11, 12], [13], [14, 15, 16]], [[20]]]
    rows = [{**row, "rejected_input_ids": lists} for row, lists in zip(ROWS, rejected, strict=True)]
    scores = forward(model, rows)
    assert scores["rejected_lengths"].tolist() == [[2, 1, 3], [1, 0, 0]]
    assert scores["rejected_logps"].shape == (2, 3) and scores["rejected_logps"][1, 1:].tolist() == [0, 0]
    for i, (row, lists) in enumerate(zip(ROWS, rejected, strict=True)):
        for rank, completion in enumerate(lists):
            pair = forward(model, [{**row, "rejected_input_ids": completion}])
            assert scores["rejected_logps"][i, rank].item() == pytest.approx(pair["rejected_logps"].item(), abs=1e-4)
            assert scores["chosen_logps"][i].item() == pytest.approx(pair["chosen_logps"].item(), abs=1e-4)
    for options in ({"ld_alpha": 0.5}, {"use_weighting": True}):
        with pytest.raises(ValueError, match="ld_alpha and use_weighting are for pairs"):
            forward(model, rows, **options)


def test_only_completion_positions_reach_the_head():
    model, seen = make_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    forward(model)
    assert seen == [(2 + 3 + 5 + 1, 400)]


def test_log_softmax_of_bfloat16_logits_is_taken_in_float32():
    logits = (torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    targets = torch.arange(64)
    values = logits.double().numpy()
    expected = values[range(64), range(64)] - np.log(np.exp(values).sum(axis=1))
    result = token_logps(logits, targets)
    assert result.dtype == torch.float32
    assert np.abs(result.double().numpy() - expected).max() < 1e-5


def test_sums_of_long_completions_are_exact_but_for_the_last_rounding():
    generator = torch.Generator().manual_seed(0)
    values, owner = -5 * torch.rand(4000, generator=generator), torch.randint(4, (4000,), generator=generator)
    expected = [math.fsum(values[owner == sequence].tolist()) for sequence in range(5)]  # the last owns nothing
    assert sum_by_owner(values, owner, 5).tolist() == pytest.approx(expected, rel=1.01 * 2**-24)
