"""Rows of token ids become batch tensors; and which rows make up which optimizer step.

B pairs give 2B sequences, the B chosen ones first; B rankings of K completions give K·B, the best ones first and then
the second best. T is the padded length of prompt + completion.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader


@dataclass
class DataCollatorForPreference:
    """Pads B tokenised pairs to rectangles: prompts on the left, completions on the right.

    Args: pad_token_id, any id (masks, not ids, tell what is padding); layout, "padded" is the only one yet.

    >>> rows = [{"prompt_input_ids": [7, 8], "chosen_input_ids": [9], "rejected_input_ids": [11, 12]}]
    >>> DataCollatorForPreference(pad_token_id=0)(rows)["rejected_input_ids"]
    tensor([[11, 12]])
    """

    pad_token_id: int
    layout: str = "padded"

    def __post_init__(self):
        if self.layout != "padded":
            raise ValueError(f"layout {self.layout!r} is unknown: choose padded")

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Rows with prompt_input_ids, chosen_input_ids and rejected_input_ids to those keys as (B, P), (B, C), (B, R)
        int64 tensors, each with its X_attention_mask of zeros and ones; and margin and weight, (B,) float32, where the
        rows have them. Where a row's rejected_input_ids are several lists, rejected is (B, K−1, R), all padding where a
        row has fewer; and scores (B, K), then 0. Other keys of a row are ignored."""
        batch = {}
        for part in ("prompt", "chosen", "rejected"):
            rows = [row[f"{part}_input_ids"] for row in features]
            several = part == "rejected" and any(isinstance(value, list) for value in rows[0])
            if several:
                most = max(map(len, rows))
                rows = [completion for row in rows for completion in row + [[]] * (most - len(row))]
            rows = [torch.tensor(row, dtype=torch.long) for row in rows]
            padded = {"input_ids": pad(rows, self.pad_token_id, left=part == "prompt")}
            padded["attention_mask"] = pad([torch.ones_like(row) for row in rows], 0, left=part == "prompt")
            for key, value in padded.items():
                batch[f"{part}_{key}"] = value.unflatten(0, (len(features), most)) if several else value
        for column in ("margin", "weight", "scores"):
            if column in features[0]:
                values = [torch.tensor(row[column], dtype=torch.float32) for row in features]
                batch[column] = pad(values, 0) if column == "scores" else torch.stack(values)
        return batch


def pad(rows: list[torch.Tensor], value: int, *, left: bool = False) -> torch.Tensor:
    """Stacks 1-D tensors of differing lengths to (len(rows), longest), filling with value at the left or right end."""
    longest = max(len(row) for row in rows)
    return torch.stack(
        [F.pad(row, (longest - len(row), 0) if left else (0, longest - len(row)), value=value) for row in rows]
    )


def concatenated_inputs(batch: dict[str, torch.Tensor], padding_value: int) -> dict[str, torch.Tensor]:
    """Stacks chosen over rejected, so that one forward pass scores both (one pass is what DDP and FSDP want, too).

    Returns prompt_input_ids and prompt_attention_mask (2B, P), completion_input_ids and completion_attention_mask
    (2B, max(C, R)); completions are padded with padding_value, masks with 0. Where rejected is (B, K−1, R) they are
    (K·B, ...), chosen first, then the rejected ones by rank.
    """
    width = max(batch["chosen_input_ids"].shape[-1], batch["rejected_input_ids"].shape[-1])
    joined = {}
    for key, value in (("input_ids", padding_value), ("attention_mask", 0)):
        chosen, rejected = batch[f"chosen_{key}"], batch[f"rejected_{key}"]
        completions = [chosen, *(rejected.unbind(1) if rejected.ndim == 3 else [rejected])]
        joined[f"prompt_{key}"] = batch[f"prompt_{key}"].repeat(len(completions), 1)
        joined[f"completion_{key}"] = torch.cat(
            [F.pad(completion, (0, width - completion.shape[1]), value=value) for completion in completions]
        )
    return joined


def padded_inputs(joined: dict[str, torch.Tensor], padding_value: int, completions: int = 2) -> dict[str, torch.Tensor]:
    """The padded layout: each sequence is [prompt, completion, padding], one a row.

    With all padding at the end, positions count from 0 and causal attention never sees it: right for every family.

    Args: joined, what `concatenated_inputs` returns; completions K, of a prompt, 2 in a pair.
    Returns: of the S = K·B sequences, less those without a completion (of rankings with fewer than K),
        input_ids, attention_mask: (S, T) int64, what the model reads.
        logits_to_keep: (S, T) bool, the positions whose next token belongs to a completion; M of them.
        targets: (M,) int64, those next tokens.
        owner: (M,) int64, the sequence (0 … K·B−1, chosen first) that each of them belongs to.
        lengths: (K·B,) int64, completion tokens of each sequence.
        tokens: (B,) int64, what the model reads of each row.
    """
    lengths = joined["completion_attention_mask"].sum(dim=1)
    there = lengths.nonzero()[:, 0]
    ids, mask = (
        torch.cat([joined[f"prompt_{key}"], joined[f"completion_{key}"]], dim=1)[there]
        for key in ("input_ids", "attention_mask")
    )
    scored = F.pad(joined["completion_attention_mask"][there], (joined["prompt_input_ids"].shape[1], 0))
    # A stable sort by "is padding" moves the real tokens to the left and keeps their order.
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(dim=1).max())]
    ids, mask, scored = ids.gather(1, order), mask.gather(1, order), scored.gather(1, order)
    keep = F.pad(scored[:, 1:], (0, 1)).bool()  # shift by one: position t predicts token t + 1
    return {
        "input_ids": ids.masked_fill(mask == 0, padding_value),
        "attention_mask": mask,
        "logits_to_keep": keep,
        "targets": ids[:, 1:][keep[:, :-1]],
        "owner": there[keep.nonzero()[:, 0]],
        "lengths": lengths,
        "tokens": torch.zeros_like(lengths).index_add(0, there, mask.sum(dim=1)).unflatten(0, (completions, -1)).sum(0),
    }


def epoch_windows(
    lengths: list[int],
    *,
    batch_size: int,
    accumulation: int = 1,
    world_size: int = 1,
    shuffle: bool = True,
    seed: int = 0,
    group_by_length: bool = False,
    drop_last: bool = False,
) -> list[list[list[list[int]]]]:
    """Which rows train together: windows[optimizer step][micro-batch][rank] -> row indices.

    A window holds the batch_size × accumulation × world_size pairs of one optimizer step. Which pairs these are depends
    on their product alone, so 8×1×1, 1×8×1 and 4×1×2 train on the same windows. Inside a window rows are sorted by
    length before they are cut into micro-batches: the window's gradient is a sum and stays the same, the padding
    shrinks. The last window may be smaller (drop_last leaves it out), and a rank may then get an empty list.

    Args: lengths, tokens of each row; seed, set it to another value in each epoch; group_by_length, windows of similar
    length throughout (the gradient noise is then no longer independent of length).
    """
    window_size = batch_size * accumulation * world_size
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist() if shuffle else list(range(len(lengths)))
    if group_by_length:
        pool = 50 * window_size  # sort within pools of 50 windows: short windows, long windows, yet random neighbours
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        order = [row for rows in pools for row in sorted(rows, key=lambda row: lengths[row], reverse=True)]
    windows = [order[i : i + window_size] for i in range(0, len(order), window_size)]
    if len(windows[-1]) < window_size and drop_last:
        windows.pop()
    if group_by_length and shuffle:
        windows = [windows[i] for i in torch.randperm(len(windows), generator=generator).tolist()]
    plan = []
    for window in windows:
        if accumulation * world_size > 1:
            window = sorted(window, key=lambda row: lengths[row], reverse=True)
        step = batch_size * world_size
        micro_batches = [window[i : i + step] for i in range(0, len(window), step)]
        # Deal the rows out like cards: neighbours in length go to different ranks, which then take equally long.
        plan.append([[micro[rank::world_size] for rank in range(world_size)] for micro in micro_batches])
    return plan


def load_batches(
    rows,
    windows: list[list[list[list[int]]]],
    rank: int,
    collator,
    *,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """One rank's micro-batches of all windows, in order. Where it has no row, row 0 stands in, for the loop to leave
    out: every rank runs the same number of steps, or the others would wait for it."""
    return DataLoader(
        rows,
        batch_sampler=[micro[rank] or [0] for window in windows for micro in window],
        collate_fn=collator,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its workers' seed would else be drawn from the numbers that dropout uses
    )
