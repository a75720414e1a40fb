"""A preference dataset becomes rows of token ids: prompt, chosen, rejected.

`rows.canonical_row` checks a row and brings it into one form, `render_row` turns conversations into text,
`tokenize_row` turns text into ids, and `prepare_dataset` does all of that to a whole dataset (sources.py opens it).
"""

import hashlib
import itertools
import logging
import re
from collections.abc import Iterator
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from dpo.conversations import render_row, sees, tokenizer_of
from dpo.images import digest, lift_images, open_image
from dpo.rows import NothingToLearn, canonical_row, column_of, first_line, is_several

logger = logging.getLogger(__name__)
NUMBER = r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
IDS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")


# ---------------------------------------------------------------------------------------------------- from text to ids


def tokenize_row(
    features: dict[str, str | list[str]],
    processing_class,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    add_special_tokens: bool = False,
    *,
    prepend_bos: bool = False,
) -> dict[str, list[int]]:
    """Text to token ids: {"prompt_input_ids", "chosen_input_ids", "rejected_input_ids"}, the last a list of lists where
    rejected is a list of texts.

    Prompt and completions are tokenised apart, as they meet at inference: the model gets the prompt's own tokens and
    goes on from there. A completion ends with exactly one end-of-sequence token; one that is cut has none.

    Args: features, prompt, chosen and rejected, each text (rejected may be a list of texts); processing_class, a
    tokenizer, or a processor that has one; add_special_tokens, put BOS before and EOS after the prompt, as
    encoder-decoder models want it; prepend_bos, put BOS before a prompt that does not begin with it; the limits as in
    `truncate_row`.
    """
    tokenizer = tokenizer_of(processing_class)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = _prompt_ids(features["prompt"], tokenizer, prepend_bos=add_special_tokens or prepend_bos)
    if add_special_tokens and eos is not None:
        prompt = prompt + [eos]
    several = features["rejected"] if is_several(features["rejected"]) else [features["rejected"]]
    chosen, *rejected = [_completion_ids(text, tokenizer) for text in (features["chosen"], *several)]
    rejected = rejected if is_several(features["rejected"]) else rejected[0]
    ids = dict(zip(IDS, (prompt, chosen, rejected), strict=True))
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    return truncate_row(ids, bos_token_id=bos, eos_token_id=eos if add_special_tokens else None, **limits)


def process_row(
    features: dict,
    processing_class,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    add_special_tokens: bool = False,
) -> dict:
    """`tokenize_row` for a model that sees: features has images, too, one (or a list) for the places in the prompt.

    Returns: the same ids, those of the prompt with as many tokens as its pictures take; and whatever else the processor
    gives (pixel_values, image_grid_thw, token_type_ids, ...), tensors of this one row. Raises: ValueError if the
    prompt is longer than max_prompt_length: pictures are never cut.
    """
    if not features.get("images"):
        return tokenize_row(features, processing_class, max_prompt_length, max_completion_length, add_special_tokens)
    ids = tokenize_row(features, processing_class, max_completion_length=max_completion_length)
    text = _with_special_tokens(features["prompt"], processing_class, bos=add_special_tokens, eos=add_special_tokens)
    images = features["images"] if isinstance(features["images"], list | tuple) else [features["images"]]
    inputs = image_inputs(text, images, processing_class)
    prompt = inputs.pop("input_ids")[0].tolist()
    if max_prompt_length is not None and len(prompt) > max_prompt_length:
        raise ValueError(
            f"the prompt with its pictures has {len(prompt)} tokens, max_prompt_length {max_prompt_length}"
        )
    return {**ids, "prompt_input_ids": prompt, **inputs}


def _with_special_tokens(text: str, processing_class, *, bos: bool, eos: bool) -> str:
    tokenizer = tokenizer_of(processing_class)
    before, after = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
    return before * (bos and not text.startswith(before)) + text + after * eos


def wants_bos(text: str, processing_class) -> bool:
    """Whether a text still lacks the BOS that its tokenizer puts before texts. Processors put it before what a chat
    template wrote, too (LLaVA's and Idefics2's leave it to them), where tokenizers leave that as it is."""
    tokenizer = tokenizer_of(processing_class)
    bos, ids = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
    is_put = bos is not None and ids[:1] == [bos] and ids[-1:] != [tokenizer.eos_token_id]
    return is_put and not text.startswith(str(tokenizer.bos_token))


def image_inputs(
    text: str, images: list, processing_class, *, add_special_tokens: bool = False
) -> dict[str, torch.Tensor]:
    """What a processor makes of a prompt and the pictures in it, without the attention mask: input_ids (1, P) and
    whatever else its model reads; add_special_tokens, with its own BOS. Raises: ValueError if it cannot."""
    images = [open_image(image) for image in images]
    how = {} if add_special_tokens else {"add_special_tokens": False}  # some take no True
    try:
        inputs = processing_class(text=[text], images=[images], return_tensors="pt", **how)
    except Exception as error:  # a processor is a program of somebody else's, and pictures come in all sizes
        raise ValueError(f"the processor cannot take the prompt with its pictures: {first_line(error)}") from error
    if "input_ids" not in inputs:
        raise ValueError("the processor gives no input_ids of a prompt with pictures: its model reads them otherwise")
    return {key: value for key, value in inputs.items() if key not in ("attention_mask", "labels")}


def read_images(row: dict, processing_class) -> dict[str, torch.Tensor]:
    """What the model reads of a prepared row beside its token ids: the collator asks for it, batch by batch."""
    try:
        changed = [digest(image) for image in row["images"]] != row["pictures"]
    except OSError as error:
        raise ValueError(f"{row['source']}: a picture cannot be read: {error}") from error
    if changed:
        raise ValueError(f"{row['source']}: a picture is not what it was when the row was prepared: put it back")
    bos = wants_bos(row["prompt"], processing_class)
    inputs = image_inputs(row["prompt"], row["images"], processing_class, add_special_tokens=bos)
    if inputs.pop("input_ids")[0].tolist() != row["prompt_input_ids"]:
        raise ValueError(f"{row['source']}: the processor gives other tokens than before: has it been changed?")
    return inputs


def truncate_row(
    ids: dict[str, list[int]],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
) -> dict[str, list[int]]:
    """Cuts a tokenised row to its limits, all in tokens, None for no limit; before any padding.

    A prompt longer than max_prompt_length loses its start (truncation_mode "keep_end") or its end ("keep_start"); a
    begin-of-sequence token in front, and an end-of-sequence one behind, stay, unless there is room for one token only.
    A completion longer than max_completion_length loses its end. max_length is of both together: "keep_end" takes the
    excess of the longest completion off the prompt's start (all completions keep the same prompt, of at least one
    token); what is then still too long, and all with "keep_start", comes off the completion's end, even if nothing of
    it is left.
    """
    prompt, chosen, rejected = (ids[name] for name in IDS)
    several = is_several(rejected)
    completions = [ids_[:max_completion_length] for ids_ in (chosen, *(rejected if several else [rejected]))]
    room = len(prompt) if max_prompt_length is None else min(len(prompt), max_prompt_length)
    if max_length is not None and truncation_mode == "keep_end":
        room = min(room, max(1, max_length - max(map(len, completions))))
    if len(prompt) > room:
        head = prompt[:1] if room > 1 and prompt[0] == bos_token_id else []
        tail = prompt[-1:] if room > 1 + len(head) and prompt[-1] == eos_token_id else []
        middle, kept = prompt[len(head) : len(prompt) - len(tail)], room - len(head) - len(tail)
        prompt = head + (middle[len(middle) - kept :] if truncation_mode == "keep_end" else middle[:kept]) + tail
    if max_length is not None:
        completions = [completion[: max(0, max_length - len(prompt))] for completion in completions]
    chosen, *rejected = completions
    return dict(zip(IDS, (prompt, chosen, rejected if several else rejected[0]), strict=True))


def _prompt_ids(text: str, tokenizer, *, prepend_bos: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    has_to = prepend_bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] + ids if has_to else ids


def _turn_ids(turns: list[tuple[str, bool]], tokenizer, *, closed: bool) -> tuple[list[int], list[bool]]:
    """(token ids of a completion, whether each is scored), of its turns as `render_row` gives them."""
    ids, scored = [], []
    for number, (text, is_scored) in enumerate(turns, start=1):
        is_last = number == len(turns)
        part = _completion_ids(text, tokenizer) if is_last and not closed else _continuation_ids(text, tokenizer)
        ids, scored = ids + part, scored + [is_scored] * len(part)
    return ids, scored


def _completion_ids(text: str, tokenizer) -> list[int]:
    eos = tokenizer.eos_token
    if eos is not None and text.rstrip().endswith(eos):
        text = text.rstrip()  # a chat template's newline after the end of the turn is never generated
    ids = _continuation_ids(text, tokenizer)
    return ids if eos is None or ids[-1:] == [tokenizer.eos_token_id] else ids + [tokenizer.eos_token_id]


def _continuation_ids(text: str, tokenizer) -> list[int]:
    """Tokens of text that continues other text. SentencePiece tokenizers put a space before whatever they are given
    (and so do byte-level ones with add_prefix_space); behind an anchor, whose own tokens are then taken off, they do
    not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = "".join(tokenizer.convert_ids_to_tokens(ids[:1]))
    if first.startswith("▁") or first.startswith("Ġ") and not text.startswith(" "):
        anchor = tokenizer("\n", add_special_tokens=False)["input_ids"]
        anchored = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
        if anchored[: len(anchor)] == anchor:
            return anchored[len(anchor) :]
    return ids


# ---------------------------------------------------------------------------------------------------- a whole dataset

ROWS_VERSION = 5  # raise it when this file makes other ids of a row than before: the cache's are then not taken
BOUNDARY_SAMPLE = 1000  # rows of a part whose prompt and completion are tokenised together, too, to see what differs
FLAGS = {  # what is counted, and the words that report it
    "bad": "left out as bad rows (skip_bad_rows)",
    "useless": "left out: they teach nothing",
    "lost": "left out: truncation would leave nothing of a completion (raise max_length)",
    "cropped": "left out: truncation would cut their pictures (raise max_prompt_length or max_length)",
    "same": "teach nothing: truncation leaves the same of chosen and rejected (raise max_length)",
    "truncated": "truncated to max_prompt_length, max_completion_length or max_length",
    "unstable": "rendered by a chat template that is not prefix-stable: split at the common start",
    "boundary": "have other tokens at the prompt's end when tokenised in one piece: kept apart",
}


def prepare_dataset(
    parts: dict[str, Dataset],
    processing_class,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
    ranked: bool = False,
    read_scores: bool = False,
    allow_ties: bool = False,
    skip_bad_rows: bool = False,
    chat_template_kwargs: dict | None = None,
    today: str | None = None,
    add_special_tokens: bool = False,
    read_margin: bool = True,
    read_reference: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Checks, renders and tokenises every row; named datasets become one dataset of token ids.

    Args: ranked, rows may rank more than two completions: rejected_input_ids is then a list of lists; read_scores, keep
    their scores; allow_ties, some completions or scores of a row may be equal; chat_template_kwargs and today, as
    in `render_row`; add_special_tokens, as in `tokenize_row`, where no chat template writes them; read_margin, keep the
    column margin; read_reference, keep the columns ref_chosen_logps and ref_rejected_logps, of pairs; the limits as in
    `truncate_row`.
    Returns: a Dataset with prompt_input_ids, chosen_input_ids, rejected_input_ids, source (its part and row), length
    (tokens of the prompt and the longest completion) and, where rows have them, margin, weight and scores, best first;
    and scored, of each completion whether its tokens are, where not all of all rows' are. Where rows have pictures,
    and processing_class is a processor, also prompt, its text, images, and pictures, a few digits of each.
    Raises: ValueError that names part, row (counting from 1) and column of the first bad row, unless skip_bad_rows, or
    if no row is left. Rows left out, and what else is worth knowing, are counted and logged.
    """
    options = row_options(
        parts,
        processing_class,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        max_length=max_length,
        truncation_mode=truncation_mode,
        ranked=ranked,
        read_scores=read_scores,
        allow_ties=allow_ties,
        chat_template_kwargs=chat_template_kwargs,
        today=today,
        add_special_tokens=add_special_tokens,
        read_margin=read_margin,
        read_reference=read_reference,
    )
    numbers = options["numbers"]
    features = {column: List(Value("int64")) for column in IDS} | dict.fromkeys(FLAGS, Value("bool"))
    features |= {"rejected_input_ids": List(List(Value("int64")))} if ranked else {}
    features |= {"length": Value("int64"), "problem": Value("string"), "scores": List(Value("float32"))}
    features |= {"source": Value("string"), "scored": List(List(Value("bool")))}
    features |= dict.fromkeys(numbers, Value("float32"))
    with_images = {"prompt": Value("string"), "images": List(Image(decode=False)), "pictures": List(Value("int64"))}
    features |= with_images if sees(processing_class) else {}
    prepared = []
    for name, rows in parts.items():
        _check_columns(name, rows, processing_class)
        rows = _undecoded(rows.with_format(None)).map(
            prepare_row,
            with_indices=True,
            fn_kwargs={**options, "name": name, "prompts": has_prompts(rows)},
            remove_columns=rows.column_names,
            features=Features(features),
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
        bad = rows.select_columns("bad")[:]["bad"]
        if any(bad) and not skip_bad_rows:
            first = rows[bad.index(True)]
            raise ValueError(f"{first['source']}: {first['problem']} (skip_bad_rows leaves such rows out)")
        prepared.append(rows)
    rows = concatenate_datasets(prepared)
    kept = _kept_rows(rows, list(parts))
    columns = [*IDS, "length", "source", *numbers]
    if read_scores and _have_scores(rows, kept):
        columns.append("scores")
    if any(rows.select_columns("scored")[:]["scored"]):
        columns.append("scored")
    if sees(processing_class) and any(rows.select_columns("pictures")[:]["pictures"]):
        columns += with_images
    rows = rows.select_columns(columns)
    return rows.select(kept) if len(kept) < len(rows) else rows


def row_options(
    parts: dict[str, Dataset],
    processing_class,
    *,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    max_length: int | None,
    truncation_mode: str,
    ranked: bool,
    read_scores: bool,
    allow_ties: bool,
    chat_template_kwargs: dict | None,
    today: str | None,
    add_special_tokens: bool,
    read_margin: bool,
    read_reference: bool,
) -> dict:
    """What `prepare_row` needs beside a row and its place, the same for all rows of parts; arguments as in
    `prepare_dataset`. numbers are the columns of numbers that all parts have."""
    numbers = [column for column in ("margin", "weight") if all(_has_numbers(rows, column) for rows in parts.values())]
    numbers = [column for column in numbers if read_margin or column != "margin"]
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    if read_reference and all(_has_numbers(rows, column) for rows in parts.values() for column in columns):
        if ranked:
            raise ValueError(f"column {columns[0]!r} is of pairs, the loss ranks more: leave the column out")
        numbers += columns
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    limits |= {"max_length": max_length, "truncation_mode": truncation_mode}
    options = {"processing_class": processing_class, "numbers": numbers, "limits": limits, "ranked": ranked}
    options |= {"read_scores": read_scores, "allow_ties": allow_ties, "version": ROWS_VERSION}
    writes_dates = "strftime_now" in str(getattr(processing_class, "chat_template", None))
    options |= {"today": today if writes_dates else None}
    options |= {"chat_template_kwargs": chat_template_kwargs, "add_special_tokens": add_special_tokens}
    tokenizer = tokenizer_of(processing_class)
    bos = tokenizer.bos_token_id
    return options | {"prepend_bos": bos is not None and tokenizer("a")["input_ids"][:1] == [bos]}


def fingerprint(rows: Dataset) -> str:
    """A few digits that tell tokenised rows from others: a hash of all their ids and numbers."""
    seen = hashlib.sha256()
    others = [column for column in ("source", "prompt", "images") if column in rows.column_names]  # pictures has these
    for lengths, values in _flat_columns(rows.remove_columns(others)):
        for array in (*lengths, values):
            seen.update(array.to_numpy(zero_copy_only=False).tobytes())
    return f"{len(rows)} of {seen.hexdigest()[:16]}"


def largest_id(rows: Dataset) -> int:
    """The largest token id in tokenised rows."""
    return max(pc.max(values).as_py() or 0 for _, values in _flat_columns(rows.select_columns(list(IDS))))


def largest_length(rows: Dataset) -> int:
    """The number of tokens of the longest prompt or completion in tokenised rows."""
    return max(pc.max(lengths[-1]).as_py() or 0 for lengths, _ in _flat_columns(rows.select_columns(list(IDS))))


def part_lengths(rows: Dataset) -> list[tuple[int, list[int]]]:
    """Of each tokenised row the number of tokens of its prompt, and of each of its completions, best first."""
    counts = []
    for part in rows.select_columns(list(IDS)).with_format("arrow").iter(batch_size=1000):
        prompt, chosen, rejected = (part[name].combine_chunks() for name in IDS)
        lengths = [pc.list_value_length(each).to_pylist() for each in (prompt, chosen)]
        if isinstance(rejected.type.value_type, pa.ListType):  # several
            others = [[len(ids) for ids in each] for each in rejected.to_pylist()]
        else:
            others = [[count] for count in pc.list_value_length(rejected).to_pylist()]
        counts += [(own, [best, *rest]) for own, best, rest in zip(*lengths, others, strict=True)]
    return counts


def _flat_columns(rows: Dataset) -> Iterator[tuple[list[pa.Array], pa.Array]]:
    """Each column in parts, as (the lengths of its lists, level by level; the values in them, in a row)."""
    for part in rows.with_format("arrow").iter(batch_size=1000):
        for column in part.columns:
            lengths, values = [], column.combine_chunks()
            while isinstance(values, pa.ListArray):
                lengths.append(pc.list_value_length(values))
                values = pc.list_flatten(values)
            yield lengths, values


def _undecoded(rows: Dataset) -> Dataset:
    """Rows, which are this function's own, whose pictures are read as they are stored."""
    features = rows.features  # a copy

    def leave(feature) -> None:
        if isinstance(feature, Image):
            feature.decode = False
        for each in feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]:
            if each is not None:
                leave(each)

    leave(features)
    rows.info.features = features
    return rows


def _check_columns(name: str, rows: Dataset, processing_class) -> None:
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows: it must hold at least one preference pair")
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if "completions" in rows.column_names and missing:
        missing = {"scores"} - set(rows.column_names)
    if missing:
        present = ", ".join(map(repr, rows.column_names))
        raise ValueError(f"{name}: column {min(missing)!r} is missing; it has {present}: add it, or rename one")
    kinds, reads = {column: repr(kind) for column, kind in rows.features.items()}, "text alone"
    names, types = {"video", "videos", "audio"}, r"\b(Audio|Video)\("
    if sees(processing_class):
        reads = "text and pictures"
    else:
        names, types = names | {"image", "images"}, r"\b(Audio|Video|Image)\("
    if unread := sorted(column for column, kind in kinds.items() if column in names or re.search(types, kind)):
        what = f"{name}: column {unread[0]!r}: the model reads {reads}"
        raise ValueError(f"{what}: leave out the column if the completions do not depend on it")


def _has_numbers(rows: Dataset, column: str) -> bool:
    """Whether a column has numbers to read, as numbers or (as in a CSV file) as text."""
    if column not in rows.column_names:
        return False
    values = [value for value in rows.with_format(None)[column] if value is not None]
    if any(map(holds_number, values)):
        return True
    if values:
        logger.warning("column %r holds no numbers: it is not read", column)
    return False


def holds_number(value) -> bool:
    """Whether a value is a number, or (as in a CSV file) the text of one."""
    return isinstance(value, int | float | Decimal) or isinstance(value, str) and bool(re.match(NUMBER, value))


def has_prompts(rows: Dataset) -> bool:
    """Whether any row has a prompt of its own."""
    if "prompt" not in rows.column_names:
        return False
    column = rows.select_columns("prompt").with_format("arrow")
    return any(part.column("prompt").null_count < len(part) for part in column.iter(batch_size=1000))


def prepare_row(
    row: dict, index: int, *, name: str, prompts: bool, numbers: list[str], ranked: bool, version: int, **options
) -> dict:
    """One row to token ids and flags; what is wrong with it is returned, since a worker process that raises would lose
    the row's number and the words. `version` only tells the cache of datasets that this file changed."""
    result = dict.fromkeys(IDS, []) | dict.fromkeys(FLAGS, False) | dict.fromkeys(numbers, 0.0)
    result |= {"scores": [], "length": 0, "problem": "", "source": f"{name}, row {index + 1}", "scored": []}
    result |= {"prompt": "", "images": [], "pictures": []} if sees(options["processing_class"]) else {}
    read_scores, ties = options.pop("read_scores"), options["allow_ties"]
    try:
        if prompts and row.get("prompt") is None:
            raise ValueError("column 'prompt' is missing, and other rows have it: fill it in")
        row = lift_images(row) if sees(options["processing_class"]) else row
        canonical = canonical_row(row, numbers=tuple(numbers), read_scores=read_scores, allow_ties=ties)
        if not ranked and len(canonical["completions"]) > 2:
            raise ValueError("it ranks more than two completions, the loss is one of pairs: take plackett_luce or exo")
        result |= _row_to_ids(canonical, try_boundary=index < BOUNDARY_SAMPLE, **options)
    except NothingToLearn as error:
        return result | {"useless": True, "problem": str(error)}
    except ValueError as error:
        return result | {"bad": True, "problem": str(error)}
    result["scores"] = (canonical["scores"] or []) if read_scores else []
    result["rejected_input_ids"] = result["rejected_input_ids"] if ranked else result["rejected_input_ids"][0]
    return result | {column: float(canonical[column]) for column in numbers}


def _row_to_ids(
    row: dict,
    *,
    processing_class,
    chat_template_kwargs: dict | None,
    today: str | None,
    add_special_tokens: bool,
    prepend_bos: bool,
    limits: dict,
    allow_ties: bool,
    try_boundary: bool,
) -> dict:
    """Renders, tokenises and truncates a canonical row; rejected_input_ids is a list of lists.

    Raises: ValueError that names what is wrong with the row.
    """
    tokenizer = tokenizer_of(processing_class)
    text = render_row(row, processing_class, chat_template_kwargs, today)
    _check_texts(row, text, allow_ties=allow_ties)
    eos = add_special_tokens and not text["templated"]
    if row["images"]:
        text["prompt"] = _with_special_tokens(text["prompt"], processing_class, bos=eos, eos=eos)
        bos = wants_bos(text["prompt"], processing_class)
        inputs = image_inputs(text["prompt"], row["images"], processing_class, add_special_tokens=bos)
        prompt = inputs["input_ids"][0].tolist()
    else:
        prepend_bos = eos or prepend_bos and (not text["templated"] or sees(processing_class))
        prompt = _prompt_ids(text["prompt"], tokenizer, prepend_bos=prepend_bos)
        prompt += [tokenizer.eos_token_id] * (eos and tokenizer.eos_token_id is not None)
    if not prompt:
        if tokenizer.bos_token_id is None:
            raise ValueError("column 'prompt' is empty and the tokenizer has no BOS token to start from")
        prompt = [tokenizer.bos_token_id]
    parts = zip(text["turns"], text["closed"], strict=True)
    (chosen, *rejected), scored = zip(*(_turn_ids(turns, tokenizer, closed=c) for turns, c in parts), strict=True)
    ids = dict(zip(IDS, (prompt, chosen, rejected), strict=True))
    specials = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id if eos else None}
    cut = truncate_row(ids, **specials, **limits)
    prompt, chosen, rejected = cut.values()
    scored = [mask[: len(ids)] for mask, ids in zip(scored, (chosen, *rejected), strict=True)]
    is_partly = not all(map(all, scored))  # else the masks would say nothing
    return {
        **cut,
        "scored": scored if is_partly else [],
        "length": len(prompt) + max(map(len, (chosen, *rejected))),
        "lost": not all(map(any, scored)),
        "cropped": bool(row["images"]) and cut["prompt_input_ids"] != ids["prompt_input_ids"],
        "same": bool(chosen) and all(completion == chosen for completion in rejected),
        "truncated": cut != ids,
        "unstable": text["unstable"],
        "boundary": try_boundary and not row["images"] and _differs_in_one_piece(text, ids, tokenizer),
        **({"prompt": text["prompt"], "images": row["images"]} if sees(processing_class) else {}),
        **({"pictures": [digest(image) for image in row["images"]]} if sees(processing_class) else {}),
    }


def _check_texts(row: dict, text: dict, *, allow_ties: bool) -> None:
    """Refuses completions of which the shared prompt left nothing, and equal ones."""
    completions = text["completions"]
    for rank, completion in enumerate(completions):
        if not completion.strip():
            raise NothingToLearn(f"column {column_of(row, rank)} is empty after the shared prompt")
    if allow_ties and len(set(completions)) > 1:
        return
    for one, other in itertools.combinations(range(len(completions)), 2):
        if completions[one] == completions[other]:
            columns = f"columns {column_of(row, one)} and {column_of(row, other)}"
            how = " as the chat template renders them" if text["templated"] else ""
            raise NothingToLearn(f"{columns} are equal{how}: neither can be the better one")


def _differs_in_one_piece(text: dict, ids: dict[str, list], tokenizer) -> bool:
    """Whether prompt and chosen completion, tokenised together, have other tokens up to the completion's first."""
    apart = ids["prompt_input_ids"] + ids["chosen_input_ids"][:1]
    joint = tokenizer(text["prompt"] + text["completions"][0], add_special_tokens=False)["input_ids"]
    if apart[0] == tokenizer.bos_token_id and joint[0] != apart[0]:
        joint = apart[:1] + joint
    return joint[: len(apart)] != apart


def _kept_rows(rows: Dataset, names: list[str]) -> list[int]:
    """The numbers of the rows to train on; logs how many are left out, and why, and what else was counted."""
    flags = rows.select_columns(list(FLAGS))[:]
    where = ", ".join(names)
    for flag, words in FLAGS.items():
        if any(flags[flag]):
            if flag == "useless":
                first = rows[flags[flag].index(True)]
                words += f", such as {first['source']}: {first['problem']}"
            of = min(len(rows), BOUNDARY_SAMPLE) if flag == "boundary" else len(rows)
            logger.warning("%d of %d rows of %s %s", sum(flags[flag]), of, where, words)
    out = zip(*(flags[reason] for reason in ("bad", "useless", "lost", "cropped")), strict=True)
    kept = [i for i, reasons in enumerate(out) if not any(reasons)]
    if not kept:
        lost = f"of {sum(flags['lost'])} truncation would leave nothing of a completion"
        lost += f", of {sum(flags['cropped'])} it would cut pictures" if any(flags["cropped"]) else ""
        lost += ": mend them, or raise max_length"
        useless = f"{sum(flags['useless'])} teach nothing"
        useless += f" ({rows[flags['useless'].index(True)]['problem']})" if any(flags["useless"]) else ""
        raise ValueError(f"{where}: no row is left; {sum(flags['bad'])} are bad, {useless} and {lost}")
    return kept


def _have_scores(rows: Dataset, kept: list[int]) -> bool:
    """Whether the kept rows have scores. Raises: ValueError if only some have."""
    scores = rows.select_columns("scores")[:]["scores"]
    without = [i for i in kept if not scores[i]]
    if 0 < len(without) < len(kept):
        others = f"{len(kept) - len(without)} other rows have: loss_type exo takes them in all rows or none"
        raise ValueError(f"{rows[without[0]]['source']}: it has no scores, {others}")
    return not without
