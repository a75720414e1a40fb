"""Collation: the document's example to the letter, what a model reads against a loop, and the plan of an epoch."""

from types import SimpleNamespace

import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from dpo.batches import epoch_windows, load_windows
from dpo.collate import DataCollatorForPreference, concatenated_inputs
from dpo.distributed import World
from dpo.logprobs import concatenated_forward

EXAMPLES = [
    {"prompt_input_ids": [1, 2, 3], "chosen_input_ids": [4, 5], "rejected_input_ids": [6]},
    {"prompt_input_ids": [7, 8], "chosen_input_ids": [9, 10], "rejected_input_ids": [11, 12, 13]},
]
ids = st.lists(st.integers(0, 50), min_size=1, max_size=7)


def tokenised_rows(rejected):
    """One to five rows, with what this strategy makes as their rejected completions."""
    parts = {"prompt_input_ids": ids, "chosen_input_ids": ids, "rejected_input_ids": rejected}
    return st.lists(st.fixed_dictionaries(parts), min_size=1, max_size=5)


pairs, rankings = tokenised_rows(ids), tokenised_rows(st.lists(ids, min_size=1, max_size=3))


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


class Reader(torch.nn.Module):
    """Keeps what a model is given to read, and says nothing about it."""

    def forward(self, input_ids, attention_mask, logits_to_keep, use_cache):
        self.rows = list(zip(input_ids.tolist(), attention_mask.tolist(), logits_to_keep.tolist(), strict=True))
        return SimpleNamespace(logits=torch.zeros(int(logits_to_keep.sum()), 51))


@given(pairs | rankings, st.integers(0, 50))
def test_a_model_reads_each_prompt_and_completion_once_and_predicts_the_completions_tokens(rows, pad_id):
    """The chosen ones first, then the rejected ones by rank; where a row ranks fewer than others, nothing is read."""
    model = Reader()
    batch = DataCollatorForPreference(pad_token_id=7, layout="plain")(rows)  # made ready with another padding
    concatenated_forward(model, batch, padding_value=pad_id)
    made_ready = model.rows
    batch = DataCollatorForPreference(pad_token_id=pad_id, layout="padded")(rows)
    result = concatenated_forward(model, batch)
    rejected = [row["rejected_input_ids"] for row in rows]
    rejected = [each if isinstance(each[0], list) else [each] for each in rejected]
    sequences = [(row["prompt_input_ids"], row["chosen_input_ids"]) for row in rows]
    for rank in range(max(map(len, rejected))):
        for row, completions in zip(rows, rejected, strict=True):
            sequences.append((row["prompt_input_ids"], completions[rank] if rank < len(completions) else []))
    longest = max(len(prompt + completion) for prompt, completion in sequences if completion)
    expected = []
    for prompt, completion in sequences:
        text, padding = prompt + completion, longest - len(prompt + completion)
        predicting = [len(prompt) <= t + 1 < len(text) for t in range(longest)]  # position t predicts token t + 1
        if completion:
            expected.append((text + [pad_id] * padding, [1] * len(text) + [0] * padding, predicting))
    assert model.rows == made_ready == expected
    by_rank = torch.tensor([len(completion) for _, completion in sequences]).unflatten(0, (-1, len(rows)))
    assert result["chosen_lengths"].tolist() == by_rank[0].tolist()
    assert result["rejected_lengths"].reshape(len(rows), -1).tolist() == by_rank[1:].mT.tolist()
    read = [len(prompt + completion) if completion else 0 for prompt, completion in sequences]
    assert batch["tokens"].tolist() == [sum(read[i :: len(rows)]) for i in range(len(rows))]


def test_numbers_come_along_and_scores_are_padded_like_the_completions_they_belong_to():
    rows = [{**EXAMPLES[0], "rejected_input_ids": [[6]], "scores": [2.0, 1.0]}]
    rows += [{**EXAMPLES[1], "rejected_input_ids": [[11, 12], [13]], "scores": [3.0, 2.5, -1.0]}]
    rows = [{**row, "margin": -1.5, "weight": 2.0} for row in rows]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    assert batch["scores"].tolist() == [[2.0, 1.0, 0.0], [3.0, 2.5, -1.0]]
    assert (batch["margins"].tolist(), batch["weights"].tolist()) == ([-1.5] * 2, [2.0] * 2)
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

    def steps(windows) -> list[set[int]]:
        return [{row for micro in window for rank in micro for row in rank} for window in windows]

    assert steps(whole) == steps(cut)


def test_rows_keep_their_order_without_shuffling_and_change_it_with_the_seed():
    lengths = [5] * 20
    for grouped in (False, True):
        plan = epoch_windows(lengths, batch_size=4, shuffle=False, group_by_length=grouped)
        assert [window[0][0] for window in plan] == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert epoch_windows(lengths, batch_size=4, seed=1) != epoch_windows(lengths, batch_size=4, seed=2)
    assert epoch_windows(lengths, batch_size=4, seed=1) == epoch_windows(lengths, batch_size=4, seed=1)


def test_drop_last_leaves_out_the_smaller_window():
    assert [len(w[0][0]) for w in epoch_windows([1] * 10, batch_size=4)] == [4, 4, 2]
    assert [len(w[0][0]) for w in epoch_windows([1] * 10, batch_size=4, drop_last=True)] == [4, 4]
    assert epoch_windows([1] * 3, batch_size=4, drop_last=True) == []
    assert len(epoch_windows([1] * 8, batch_size=4, drop_last=True)) == 2


def test_ranks_take_rows_of_like_length_and_one_that_has_none_stands_in():
    lengths, rows = [1, 9, 2, 8, 5], Dataset.from_list([{**EXAMPLES[0], "number": i} for i in range(5)])
    windows = epoch_windows(lengths, batch_size=2, world_size=2, shuffle=False)
    assert windows == [[[[1, 2], [3, 0]]], [[[4], []]]]
    for rank, indices in enumerate(([[1, 2], [4]], [[3, 0], [-1]])):
        world = World(rank=rank, size=2, device=torch.device("cpu"))
        loaded = list(load_windows(rows, windows, world, DataCollatorForPreference(pad_token_id=0)))
        assert [pairs for pairs, _ in loaded] == [4, 1]  # of both ranks
        assert [batch["index"].tolist() for _, (batch,) in loaded] == indices


def test_grouping_by_length_saves_padding_and_takes_the_windows_in_random_order():
    lengths = torch.randint(1, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def plan(seed: int = 0, **options) -> list[list[int]]:
        return [window[0][0] for window in epoch_windows(lengths, batch_size=8, seed=seed, **options)]

    def padding(windows) -> int:
        return sum(max(lengths[i] for i in rows) - lengths[row] for rows in windows for row in rows)

    def longest(windows) -> list[int]:
        return [max(lengths[i] for i in rows) for rows in windows]

    assert padding(plan(group_by_length=True)) < padding(plan()) / 4
    # One pool of 400 rows, sorted: the windows go from long to short unless they are shuffled, otherwise in each epoch.
    falling, *shuffled = (longest(plan(group_by_length=True, **more)) for more in ({"shuffle": False}, {}, {"seed": 1}))
    assert falling == sorted(falling, reverse=True) and shuffled[0] != shuffled[1]
    for windows in shuffled:
        assert 15 < sum(after > before for before, after in zip(windows, windows[1:], strict=False)) < 35  # of 49
