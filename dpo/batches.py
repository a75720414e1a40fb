"""Which rows make up which optimizer step, and the loader that brings them as batches."""

from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from dpo.attention import is_segments
from dpo.distributed import World, ignore_signals


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
    most_tokens: int | None = None,
    tokens_of=None,
    window_size: int | None = None,
) -> list[list[list[list[int]]]]:
    """Which rows train together: windows[optimizer step][micro-batch][rank] -> row indices.

    A window holds the batch_size × accumulation × world_size pairs of one optimizer step, the same ones whatever the
    factors: 8×1×1, 1×8×1 and 4×1×2 train alike. Inside it rows are sorted by length before they are cut into
    micro-batches: its gradient, a sum, stays the same, the padding shrinks. The last window may be smaller (drop_last
    leaves it out), and a rank may then get an empty list. lengths are tokens of each row; group_by_length makes windows
    of similar length throughout (the gradient noise is then no longer independent of length). With most_tokens a window
    is cut where a rank's next batch would have more, as tokens_of(row indices) counts them, instead of every batch_size
    rows: the gradient is the same, too. window_size, in place of that product, is for a run that goes on with another
    number of ranks: its windows stay. Needs: cut_by_tokens.
    """
    window_size = window_size or batch_size * accumulation * world_size
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
        if window_size > batch_size or most_tokens:
            window = sorted(window, key=lambda row: lengths[row], reverse=True)
        # Deal the rows out like cards: neighbours in length go to different ranks, which then take equally long.
        ranks = [window[rank::world_size] for rank in range(world_size)]
        if most_tokens:
            plan.append(cut_by_tokens(ranks, most_tokens=most_tokens, tokens_of=tokens_of))
        else:
            starts = range(0, len(ranks[0]), batch_size)
            plan.append([[rows[start : start + batch_size] for rows in ranks] for start in starts])
    return plan


def cut_by_tokens(ranks: list[list[int]], *, most_tokens: int, tokens_of) -> list[list[list[int]]]:
    """Micro-batches [number][rank] of the rows that each rank has of a window: as many as fit, at least one each."""
    micro_batches, start = [], 0
    while start < len(ranks[0]):
        end = start + 1
        while end < len(ranks[0]) and all(tokens_of(rows[start : end + 1]) <= most_tokens for rows in ranks):
            end += 1
        micro_batches.append([rows[start:end] for rows in ranks])
        start = end
    return micro_batches


def load_windows(
    rows: Dataset, windows: list, world: World, collator: Callable, *, num_workers: int = 0, prefetch_factor=None
) -> Iterator[tuple[int, list[dict]]]:
    """For each window its number of rows, over all ranks, and this rank's micro-batches, on its device.

    A batch is as the collator makes it in the loader's worker, and has `index`, each row's position in the dataset. A
    rank without a row computes row 0, with the index −1, and does not count it: every rank runs the same number of
    forward passes, or the others wait.
    """
    loader = DataLoader(
        rows,
        batch_sampler=[micro[world.rank] or [0] for window in windows for micro in window],
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        prefetch_factor=prefetch_factor,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # its workers' seed would else be drawn from the numbers that dropout uses
    )
    batches = iter(loader)
    for window in windows:
        micro_batches = []
        for micro, batch in zip(window, batches, strict=False):
            # The index stays here: what a GPU is asked for makes the step wait.
            micro_batches.append(moved(batch, world.device) | {"index": torch.tensor(micro[world.rank] or [-1])})
        yield sum(len(numbers) for micro in window for numbers in micro), micro_batches


def moved(batch: dict, device: torch.device) -> dict:
    """A batch, and what it holds for the model, on a device; but for the segments of a flat row, which are read here:
    fetched from a GPU, they would make each layer wait."""

    def there(name: str, value):
        if isinstance(value, dict):
            return moved(value, device)
        return value if is_segments(name, value) else value.to(device, non_blocking=True)

    return {name: there(name, value) for name, value in batch.items()}
