"""A training set that is read while training: of it nothing is kept but the rows that are next.

It is one sequence of rows, the same in every process, cut into windows of one optimizer step each. The loader's sampler
reads it, in each process all of it; its workers tokenise this process's share of each window. A place, behind a window,
says all that is needed to go on from there.
"""

import hashlib
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from dpo.batches import cut_by_tokens, moved
from dpo.collate import DataCollatorForPreference, completions_of
from dpo.data import FLAGS, holds_number, prepare_row
from dpo.distributed import World, gather_lists, gather_numbers, ignore_signals
from dpo.images import without_objects
from dpo.rows import first_line
from dpo.sources import load_preferences

SAMPLE = 1000  # rows, at least, that are read in advance: they tell what the rest has to be like
START = {"pass": 0, "block": 0, "used": 0, "part": 0, "row": 0, "prompts": False, "state": None, "digest": ""}
TOLD = [flag for flag in FLAGS if flag != "boundary"]  # what is counted while training
BITS = 40  # of a row's index, for its number in its part; the bits above are the part's
logger = logging.getLogger("dpo")


@dataclass
class Stream:
    """A training set in parts, by their names; as a DataLoader's dataset it tokenises the shares that are its indices.

    Args: window, rows of an optimizer step over all processes; block, rows that are shuffled together, with seed, or
    None for the set's own order; options, of `prepare_row`; columns, of the rows read in advance; prompts, which parts
    have some, as far as these tell; numbers, columns that rows may have if the first ones do; largest and longest, the
    token id and the number of tokens that are known to fit the model; apart, count prompt and completions apart.
    place is behind the window that was brought last; counts are of rows so far, by data.FLAGS; told, as last told;
    why, of useless ones an example.
    """

    parts: dict[str, IterableDataset]
    window: int
    block: int
    seed: int | None
    options: dict
    columns: list[str]
    prompts: dict[str, bool]
    numbers: list[str]
    skip_bad_rows: bool = False
    largest: int = 0
    longest: int = 0
    apart: bool = False
    place: dict = field(default_factory=lambda: START)
    counts: Counter = field(default_factory=Counter)
    told: Counter = field(default_factory=Counter)
    why: str = ""

    def __getitem__(self, share: tuple[list, str]) -> dict:
        return tokenised(self, *share)


def first_rows(parts: dict[str, IterableDataset], count: int) -> dict[str, Dataset]:
    """The first rows of a stream, as many as count if there are so many, in its parts."""
    sample = {}
    for name, part in parts.items():
        part.load_state_dict(None)
        rows = list(islice(rows_of(name, part), count))
        count -= len(rows)
        if rows:
            sample[name] = load_preferences(rows)["dataset"]
    if not sample:
        raise ValueError(f"{', '.join(parts)} has no rows: it must hold at least one preference pair")
    return sample


def source_of(stream: Stream, index: int) -> str:
    """A row's part and number in it, of its index in a batch."""
    return f"{list(stream.parts)[index >> BITS]}, row {index % 2**BITS}"


# ------------------------------------------------------------------------------------------------------ in what order


def rows_of(name: str, rows: IterableDataset, number: int = 0) -> Iterator[dict]:
    """The rows of a part, of which so many are read already. Raises: ValueError in one line if it cannot be read."""
    try:
        for row in rows:
            number += 1
            yield row
    except Exception as error:  # of a file format, a network, or the caller's own code
        words = first_line(error)
        where = "" if words.startswith(name) else f"{name}, behind row {number}: it cannot be read: "
        raise ValueError(where + words) from error


def read_blocks(stream: Stream, place: dict) -> Iterator[tuple[dict, list[tuple], bool]]:
    """From the block on that place is in, pass after pass without end: (the place of its beginning, its rows as (part,
    number in the part, whether the part has prompts, row), whether the pass ends with it)."""
    here, names = {**place, "used": 0}, list(stream.parts)
    while True:
        block, number, prompts, state = [], here["row"], here["prompts"], here["state"]
        for part in range(here["part"], len(names)):
            rows = stream.parts[names[part]]
            rows.load_state_dict(state)
            for row in rows_of(names[part], rows, number):
                number += 1
                if number == 1:
                    prompts = stream.prompts.get(names[part], row.get("prompt") is not None)
                block.append((part, number, prompts, row))
                if len(block) == stream.block:
                    yield here | {"digest": digest(block)}, block, False
                    here = {"pass": here["pass"], "block": here["block"] + 1, "used": 0, "digest": ""}
                    here |= {"part": part, "row": number, "prompts": prompts, "state": rows.state_dict()}
                    block = []
            number, state = 0, None
        yield here | {"digest": digest(block)}, block, True
        if not block and here["block"] == 0:
            raise ValueError(f"{', '.join(names)} gives no row when it is read again: max_steps asks for more of them")
        here = {**START, "pass": here["pass"] + 1}


def digest(block: list[tuple]) -> str:
    """A few digits of a block's first and last row: whether it is the one that it was."""
    ends = repr([without_objects(row) for *_, row in (block[:1] + block[-1:])])
    return hashlib.sha256(ends.encode("utf-8", "backslashreplace")).hexdigest()[:16] if block else ""


def read_windows(stream: Stream, place: dict) -> Iterator[tuple[dict, list[tuple]]]:
    """From a place on, the windows of the stream without end: (the place behind it, its rows). The last one of a pass
    may be smaller, as that of an epoch."""
    window, done = [], place["used"]
    for here, block, is_last in read_blocks(stream, place):
        if done and here["digest"] != place["digest"]:
            raise ValueError(f"{', '.join(stream.parts)} gives other rows than before: it cannot be resumed exactly")
        order = list(range(len(block)))
        if stream.seed is not None:
            random.Random(f"{stream.seed} {here['pass']} {here['block']}").shuffle(order)
        for used in range(done, len(block)):
            window.append(block[order[used]])
            if len(window) == stream.window:
                yield here | {"used": used + 1}, window
                window = []
        if is_last and window:
            yield here | {"used": len(block)}, window
            window = []
        done = 0


def shares(stream: Stream, world: World, places: deque) -> Iterator[tuple[list, str]]:
    """This process's rows of each window, and the words of an error that ends the stream, which comes in its turn, or
    "". Meanwhile places gets the place behind each window."""
    try:
        for place, window in read_windows(stream, stream.place):
            places.append(place)
            yield window[world.rank :: world.size], ""
    except ValueError as error:
        places.append(stream.place)
        yield [], str(error)


# --------------------------------------------------------------------------------------------- in the loader's workers


def tokenised(stream: Stream, share: list[tuple], problem: str) -> dict:
    """A share's rows as `prepare_dataset` has them, those left out that it leaves out; beyond, what does not fit into
    what fits for sure: (largest id, tokens, source) of each such row; why, of useless ones an example; and counts."""
    names, rows, beyond, why = list(stream.parts), [], [], ""
    counts = Counter(rows=len(share))
    for part, number, prompts, row in share:
        made = prepare_row(row, number - 1, name=names[part], prompts=prompts, **stream.options)
        counts.update(flag for flag in TOLD if made[flag])
        strange = misfit(stream, row, made, prompts=prompts)
        if strange or made["bad"] and not stream.skip_bad_rows:
            how = strange or f"{made['problem']} (skip_bad_rows leaves such rows out)"
            problem = problem or f"{made['source']}: {how}"
        if made["useless"]:
            why = why or f", such as {made['source']}: {made['problem']}"
        if any(made[flag] for flag in ("bad", "useless", "lost", "cropped")):
            continue
        parts = (made["prompt_input_ids"], *completions_of(made))
        largest, longest = max(map(max, parts)), max(map(len, parts)) if stream.apart else made["length"]
        if largest > stream.largest or longest > stream.longest:
            beyond.append((largest, longest, made["source"]))
        row = {column: made[column] for column in (*stream.columns, "scored")}
        rows.append(row | {"index": part << BITS | number})
    return {"rows": rows, "beyond": beyond, "problem": problem, "why": why, "counts": dict(counts)}


def misfit(stream: Stream, row: dict, made: dict, *, prompts: bool) -> str:
    """What a row has, or lacks, otherwise than the rows that were read in advance, in words; "" if nothing."""
    if made["bad"] or made["useless"]:
        return ""
    new = [name for name in stream.numbers if name not in stream.options["numbers"] and holds_number(row.get(name))]
    new += ["scores"] if made["scores"] and "scores" not in stream.columns else []
    new += ["images"] if made.get("pictures") and "pictures" not in stream.columns else []
    new += ["prompt"] if row.get("prompt") is not None and not prompts else []
    if new:
        return f"it has {new[0]!r}, and none of the first rows has: give it to all rows, or none"
    lacks = "scores" in stream.columns and not made["scores"]
    return "it has no scores, and the first rows have: give them to all rows, or none" if lacks else ""


def collated(
    share: dict, collator: Callable, *, batch_size: int, longest: int, most_tokens: int | None = None, tokens_of=None
) -> dict:
    """A tokenised share, with its batches in place of its rows, each with its rows' indices; cut as `epoch_windows`
    does. A row that is longer than any on which a flat layout was tried is in a padded batch, exact for all lengths."""
    rows, batches = share.pop("rows"), []
    if len(rows) > batch_size or most_tokens:
        rows = sorted(rows, key=lambda row: row["length"], reverse=True)
    if most_tokens:
        lengths = [(len(row["prompt_input_ids"]), list(map(len, completions_of(row)))) for row in rows]
        of_rows = {"tokens_of": lambda numbers: tokens_of([lengths[number] for number in numbers])}
        numbered = cut_by_tokens([list(range(len(rows)))], most_tokens=most_tokens, **of_rows)
        cut = [[rows[number] for number in numbers] for (numbers,) in numbered]
    else:
        cut = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    is_ours = isinstance(collator, DataCollatorForPreference)
    is_flat = is_ours and collator.layout in ("padding_free", "prefix_shared")
    padded = replace(collator, layout="padded") if is_flat else collator
    try:
        for own in cut:
            index = [row.pop("index") for row in own]
            collate = padded if max(row["length"] for row in own) > longest else collator
            batches.append((collate(own), index))
    except ValueError as error:  # of a picture
        share["problem"] = share["problem"] or first_line(error)
    return share | {"batches": batches}


# ------------------------------------------------------------------------------------------------ in the process itself


def load_stream(
    stream: Stream,
    world: World,
    collate: Callable,
    *,
    stand_in: Callable,
    fit: Callable,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
) -> Iterator[tuple[int, list[dict]]]:
    """As `batches.load_windows`, of the windows behind stream.place without end, which moves on with them.

    Args: collate, `collated` but for the share; stand_in, makes the batch of a process that has fewer than others; fit,
    of a token id and a number of tokens, raises ValueError if the model cannot take them. A window of which no row is
    left is passed over, in all processes. Raises: ValueError in all of them where one has a row that cannot be trained.
    """
    places, trained = deque(), stream.place["pass"] - (stream.place == START)  # the last pass that had a row to train
    loader = DataLoader(
        stream,
        sampler=shares(stream, world, places),
        batch_size=None,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        prefetch_factor=prefetch_factor,
        pin_memory=world.device.type == "cuda",
        generator=torch.Generator(),  # its workers' seed would else be drawn from the numbers that dropout uses
    )
    for share in loader:
        place, batches = places.popleft(), share["batches"]
        problem = share["problem"] or unfit(share["beyond"], fit)
        own = [len(batches), bool(problem), sum(len(index) for _, index in batches)]
        own += [share["counts"].get(name, 0) for name in ("rows", *TOLD)]
        passes, failed, pairs, *counts = zip(*gather_numbers(list(map(int, own)), world), strict=True)
        if any(failed):
            raise ValueError(next(words for words in gather_lists([problem], world) if words))
        stream.counts.update(dict(zip(("rows", *TOLD), map(sum, counts), strict=True)))
        stream.why = stream.why or share["why"]
        if place["pass"] > trained + 1:
            why = in_words(stream, [flag for flag in TOLD if stream.counts[flag]])
            raise ValueError(f"{', '.join(stream.parts)}: no row is left of a whole pass: {why}")
        stream.place = place
        if sum(pairs) == 0:
            continue
        trained = place["pass"]
        batches = [moved(batch, world.device) | {"index": torch.tensor(index)} for batch, index in batches]
        while len(batches) < max(passes):
            batches.append(moved(stand_in(), world.device) | {"index": torch.tensor([-1])})
        yield sum(pairs), batches


def unfit(beyond: list[tuple[int, int, str]], fit: Callable) -> str:
    """The words of the first row that the model cannot take; "" if it can take all."""
    for largest, longest, source in beyond:
        try:
            fit(largest=largest, longest=longest)
        except ValueError as error:
            return f"{source}: {error}"
    return ""


def in_words(stream: Stream, flags: list[str]) -> str:
    """How many rows were left out so far, and why, and what else was counted."""
    why = {"useless": stream.why}
    return "; ".join(f"{stream.counts[flag]} {FLAGS[flag]}{why.get(flag, '')}" for flag in flags)


def tell(stream: Stream, *, is_last: bool) -> None:
    """Logs what was counted of rows, whenever it has doubled, and at the end."""
    news = [flag for flag in TOLD if stream.counts[flag] > stream.told[flag] * (1 if is_last else 2)]
    if news:
        read = f"{stream.counts['rows']} rows of {', '.join(stream.parts)} read so far"
        logger.warning("%s: %s", read, in_words(stream, news))
        stream.told.update({flag: stream.counts[flag] - stream.told[flag] for flag in news})
