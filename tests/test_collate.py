"""Collation: the document's example to the letter, layouts against a brute-force loop, and the plan of an epoch."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.collate import DataCollatorForPreference, concatenated_inputs, epoch_windows, padded_inputs

EXAMPLES = [
    {"prompt_input_ids": [1, 2, 3], "chosen_input_ids": [4, 5], "rejected_input_ids": [6]},
    {"prompt_input_ids": [7, 8], "chosen_input_ids": [9, 10], "rejected_input_ids": [11, 12, 13]},
]
ids = st.lists(st.integers(0, 50), min_size=1, max_size=7)
pairs = st.lists(
    st.fixed_dictionaries({f"{part}_input_ids": ids for part in ("prompt", "chosen", "rejected")}),
    min_size=1,
    max_size=5,
)


def test_collator_gives_the_documents_example():
    batch = DataCollatorForPreference(pad_token_id=0)(EXAMPLES)
    expected = {
        "prompt_input_ids": [[1, 2, 3], [0, 7, 8]],
        "prompt_attention_mask": [[1, 1, 1], [0, 1, 1]],
        "chosen_input_ids": [[4, 5], [9, 10]],
        "chosen_attention_mask": [[1, 1], [1, 1]],
        "rejected_input_ids": [[6, 0, 0], [11, 12, 13]],
        "rejected_attention_mask": [[1, 0, 0], [1, 1, 1]],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert list(batch) == list(expected)
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_concatenated_inputs_stacks_chosen_over_rejected_as_documented():
    joined = concatenated_inputs(DataCollatorForPreference(pad_token_id=0)(EXAMPLES), padding_value=9)
    assert joined["prompt_input_ids"].tolist() == [[1, 2, 3], [0, 7, 8]] * 2
    assert joined["prompt_attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]] * 2
    assert joined["completion_input_ids"].tolist() == [[4, 5, 9], [9, 10, 9], [6, 0, 0], [11, 12, 13]]
    assert joined["completion_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]]


@given(pairs, st.integers(0, 50))
def test_padded_rows_are_prompt_then_completion_and_score_each_completion_token_once(rows, pad_id):
    batch = DataCollatorForPreference(pad_token_id=pad_id)(rows)
    inputs = padded_inputs(concatenated_inputs(batch, pad_id), pad_id)
    sequences = [
        (row["prompt_input_ids"], row[key]) for key in ("chosen_input_ids", "rejected_input_ids") for row in rows
    ]
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    targets, owner = [], []
    assert inputs["input_ids"].shape == (2 * len(rows), longest)
    for i, (prompt, completion) in enumerate(sequences):
        text, padding = prompt + completion, longest - len(prompt) - len(completion)
        assert inputs["input_ids"][i].tolist() == text + [pad_id] * padding
        assert inputs["attention_mask"][i].tolist() == [1] * len(text) + [0] * padding
        # The token at position t is predicted at position t − 1.
        predicting = [len(prompt) <= t + 1 < len(text) for t in range(longest)]
        assert inputs["logits_to_keep"][i].tolist() == predicting
        targets += completion
        owner += [i] * len(completion)
    assert inputs["targets"].tolist() == targets
    assert inputs["owner"].tolist() == owner
    assert inputs["lengths"].tolist() == [len(completion) for _, completion in sequences]
    read = [len(p) + len(c) for p, c in sequences]
    assert inputs["tokens"].tolist() == [read[i] + read[i + len(rows)] for i in range(len(rows))]


rankings = st.lists(
    st.fixed_dictionaries(
        {"prompt_input_ids": ids, "chosen_input_ids": ids, "rejected_input_ids": st.lists(ids, min_size=1, max_size=3)}
    ),
    min_size=1,
    max_size=4,
)


@given(rankings, st.integers(0, 50))
def test_rankings_are_stacked_by_rank_and_missing_completions_are_not_read(rows, pad_id):
    batch = DataCollatorForPreference(pad_token_id=pad_id)(rows)
    most = max(len(row["rejected_input_ids"]) for row in rows)
    longest = max(len(completion) for row in rows for completion in row["rejected_input_ids"])
    assert batch["rejected_input_ids"].shape == batch["rejected_attention_mask"].shape == (len(rows), most, longest)
    inputs = padded_inputs(concatenated_inputs(batch, pad_id), pad_id, 1 + most)
    sequences = [(row["prompt_input_ids"], row["chosen_input_ids"]) for row in rows]
    for rank in range(most):
        for row in rows:
            there = rank < len(row["rejected_input_ids"])
            sequences.append((row["prompt_input_ids"], row["rejected_input_ids"][rank] if there else []))
    there = [i for i, (_, completion) in enumerate(sequences) if completion]
    assert len(inputs["input_ids"]) == len(there)  # the model reads no prompt for nothing
    for at, i in enumerate(there):
        prompt, completion = sequences[i]
        read = inputs["input_ids"][at][inputs["attention_mask"][at].bool()]
        assert read.tolist() == prompt + completion
        assert inputs["targets"][inputs["owner"] == i].tolist() == completion
        assert (inputs["owner"] == i).sum() == inputs["logits_to_keep"][at].sum() == len(completion)
    assert inputs["lengths"].tolist() == [len(completion) for _, completion in sequences]
    read = [len(p) + len(c) if c else 0 for p, c in sequences]
    assert inputs["tokens"].tolist() == [sum(read[i :: len(rows)]) for i in range(len(rows))]


def test_scores_are_padded_like_the_completions_they_belong_to():
    rows = [{**EXAMPLES[0], "rejected_input_ids": [[6]], "scores": [2.0, 1.0]}]
    rows += [{**EXAMPLES[1], "rejected_input_ids": [[11, 12], [13]], "scores": [3.0, 2.5, -1.0]}]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert batch["scores"].tolist() == [[2.0, 1.0, 0.0], [3.0, 2.5, -1.0]]
    assert batch["rejected_input_ids"].tolist() == [[[6, 0], [0, 0]], [[11, 12], [13, 0]]]


plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 99), min_size=1, max_size=60),
        "batch_size": st.integers(1, 4),
        "accumulation": st.integers(1, 3),
        "world_size": st.integers(1, 3),
        "shuffle": st.booleans(),
        "group_by_length": st.booleans(),
        "seed": st.integers(0, 5),
    }
)


@given(plans)
def test_an_epoch_trains_on_each_row_once_and_every_rank_makes_the_same_steps(plan):
    windows = epoch_windows(**plan)
    seen = [row for window in windows for micro in window for rank in micro for row in rank]
    assert sorted(seen) == list(range(len(plan["lengths"])))
    for window in windows:
        assert len(window) <= plan["accumulation"]
        for micro in window:
            assert len(micro) == plan["world_size"]
            sizes = [len(rank) for rank in micro]
            assert max(sizes) <= plan["batch_size"] and max(sizes) - min(sizes) <= 1


@given(plans)
def test_the_same_pairs_make_a_step_however_they_are_cut(plan):
    size = plan["batch_size"] * plan["accumulation"] * plan["world_size"]
    whole = epoch_windows(**{**plan, "batch_size": size, "accumulation": 1, "world_size": 1})
    cut = epoch_windows(**plan)
    as_sets = [
        [{row for micro in window for rank in micro for row in rank} for window in windows] for windows in (whole, cut)
    ]
    assert as_sets[0] == as_sets[1]


def test_rows_keep_their_order_without_shuffling_and_change_it_with_the_seed():
    lengths = [5] * 20
    flat = [window[0][0] for window in epoch_windows(lengths, batch_size=4, shuffle=False)]
    assert flat == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert epoch_windows(lengths, batch_size=4, seed=1) != epoch_windows(lengths, batch_size=4, seed=2)
    assert epoch_windows(lengths, batch_size=4, seed=1) == epoch_windows(lengths, batch_size=4, seed=1)


def test_drop_last_leaves_out_the_smaller_window():
    assert [len(w[0][0]) for w in epoch_windows([1] * 10, batch_size=4)] == [4, 4, 2]
    assert [len(w[0][0]) for w in epoch_windows([1] * 10, batch_size=4, drop_last=True)] == [4, 4]
    assert epoch_windows([1] * 3, batch_size=4, drop_last=True) == []


def test_grouping_by_length_saves_padding():
    lengths = torch.randint(1, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(**options) -> int:
        windows = epoch_windows(lengths, batch_size=8, seed=0, **options)
        return sum(max(lengths[i] for i in w[0][0]) * len(w[0][0]) - sum(lengths[i] for i in w[0][0]) for w in windows)

    assert padding(group_by_length=True) < padding() / 4
