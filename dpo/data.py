"""A preference dataset becomes rows of token ids: prompt, chosen, rejected.

`canonical_row` checks a row and brings it into one form, `render_row` turns conversations into text, `tokenize_row`
turns text into ids, and `prepare_dataset` does all of that to a whole dataset (sources.py opens it).
"""

import itertools
import json
import logging
import math
import os

from datasets import Dataset, Features, List, Value, concatenate_datasets

logger = logging.getLogger(__name__)
IDS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")


# ------------------------------------------------------------------------------------- one form for all kinds of rows


def canonical_row(row: dict, *, numbers: tuple = (), read_scores: bool = False, allow_ties: bool = False) -> dict:
    """A row in the one form that the rest of this file knows, checked.

    Args: row, with chosen and rejected (one completion, or several, best first), or with completions and their scores;
    numbers, columns to keep; read_scores, keep `scores` beside chosen and rejected, too; allow_ties, of scores.
    Returns: {"prompt": text, messages or None; "completions": a list, best first; "scores": theirs, or None; "tools";
    "row": the row itself, for messages} and the numbers. Raises: ValueError in words that name the column.
    """
    if _is_scored(row):
        completions, scores = row["completions"], row.get("scores")
        if not _is_several(completions) or len(completions) < 2:
            raise ValueError("column 'completions' must be a list of two or more texts, or lists of messages")
        _check_scores(scores, len(completions), sorted_already=False, allow_ties=allow_ties)
        completions, scores = [completions[i] for i in _best_first(scores)], sorted(scores, reverse=True)
    else:
        rejected, scores = row.get("rejected"), row.get("scores") if read_scores else None
        completions = [row.get("chosen"), *(rejected if _is_several(rejected) else [rejected])]
        if scores is not None:
            _check_scores(scores, len(completions), sorted_already=True, allow_ties=allow_ties)
    canonical = {"prompt": row.get("prompt"), "completions": completions, "scores": scores, "row": row}
    canonical |= {"tools": row.get("tools") or None, **{column: row[column] for column in numbers}}
    _check_kinds(canonical)
    for column in numbers:
        if not _is_number(row[column]):
            raise ValueError(f"column {column!r} is {row[column]!r}: it must be a number")
    return canonical


def column_of(canonical: dict, rank: int) -> str:
    """The name that messages give to a completion: the column that it stood in."""
    row = canonical["row"]
    if _is_scored(row):
        return f"'completions' number {_best_first(row['scores'])[rank] + 1}"
    if rank == 0:
        return "'chosen'"
    return f"'rejected' number {rank}" if _is_several(row["rejected"]) else "'rejected'"


def _is_scored(row: dict) -> bool:
    return row.get("chosen") is None and row.get("rejected") is None and row.get("completions") is not None


def _best_first(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def _check_scores(scores, count: int, *, sorted_already: bool, allow_ties: bool) -> None:
    if not isinstance(scores, list) or len(scores) != count or not all(map(_is_number, scores)):
        raise ValueError(f"column 'scores' is {scores}: give {count} numbers, one for each completion")
    if sorted_already and scores != sorted(scores, reverse=True):
        raise ValueError(f"column 'scores' is {scores}: they must fall, 'chosen' has the highest")
    if len(set(scores)) < count and not allow_ties:
        raise ValueError(f"column 'scores' is {scores}: equal ones are no ranking (loss_type exo takes them)")


def _check_kinds(row: dict) -> None:
    """Refuses a canonical row whose prompt and completions are not all texts, or all conversations."""
    prompt, completions = row["prompt"], row["completions"]
    if prompt and not (isinstance(prompt, str) and not prompt.strip()) and (problem := _problem_of(prompt)):
        raise ValueError(f"column 'prompt'{problem}")
    for rank, completion in enumerate(completions):
        if completion is None:
            present = ", ".join(repr(name) for name, value in row["row"].items() if value is not None) or "nothing"
            raise ValueError(f"column {column_of(row, rank)} is missing; the row has {present}")
        problem = " is an empty list of messages" if completion == [] else _problem_of(completion)
        if problem:
            raise ValueError(f"column {column_of(row, rank)}{problem}")
    best = column_of(row, 0)
    for rank, completion in enumerate(completions):
        if isinstance(completion, list) != isinstance(completions[0], list):
            other = column_of(row, rank)
            raise ValueError(f"columns {best} and {other} differ in kind: both must be text, or both lists of messages")
    if isinstance(prompt, list) and isinstance(completions[0], str):
        raise ValueError(f"column 'prompt' is a list of messages but {best} is text: make both the same kind")
    if all(completion == completions[0] for completion in completions):
        raise ValueError(f"columns {best} and {column_of(row, 1)} are equal: there is no preference to learn")


def _problem_of(value) -> str | None:
    """What is wrong with a prompt or a completion, in words that follow its column's name; None if nothing is."""
    if isinstance(value, str):
        return None if value.strip() else " is empty"
    if not isinstance(value, list):
        return f" is {type(value).__name__}: it must be text or a list of messages"
    for number, message in enumerate(value, start=1):
        if problem := _problem_of_message(message):
            return f", message {number} {problem}"
    return None


def _problem_of_message(message) -> str | None:
    if not isinstance(message, dict):
        return f"is {type(message).__name__}: it must be an object with role and content"
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(message.get("role"), str):
        return "has no 'role'"
    if content is None and not calls:
        return "has no 'content'"
    if content is not None and not isinstance(content, str):
        return f"has a 'content' that is {type(content).__name__}: it must be text"
    return "is empty" if message["role"] == "assistant" and not (content or "").strip() and not calls else None


def _is_several(value) -> bool:
    """Whether a value holds several completions: a list of texts, of conversations or of token ids."""
    return isinstance(value, list) and any(isinstance(each, str | list) for each in value)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ------------------------------------------------------------------------------------------- from conversation to text


def split_prompt(prompt: str | list[dict] | None, completions: list) -> tuple[str | list[dict], list]:
    """(prompt, completions), each apart from the other, whether or not the row has a prompt of its own.

    An implicit prompt is the shared start of the completions: their first equal messages, or in text all up to the
    last "\\n\\nAssistant:" in it (Anthropic's HH format), or else up to the last space before they part.
    """
    if isinstance(completions[0], str):
        if prompt is None:
            prompt = os.path.commonprefix(completions)
            turn = prompt.rfind("\n\nAssistant:")
            # The space stays with the completion, as byte-pair vocabularies have it; a word is never cut in two.
            cut = turn + len("\n\nAssistant:") if turn >= 0 else max(prompt.rfind(" "), prompt.rfind("\n"), 0)
            prompt, completions = prompt[:cut], [completion[cut:] for completion in completions]
        return prompt, completions
    prompt, completions = _without_nulls(prompt), _without_nulls(completions)
    if isinstance(prompt, list) and prompt:
        repeated = all(completion[: len(prompt)] == prompt for completion in completions)
        return prompt, [completion[len(prompt) if repeated else 0 :] for completion in completions]
    parted = (i for i, each in enumerate(zip(*completions, strict=False)) if any(other != each[0] for other in each))
    shared = next(parted, min(map(len, completions)))
    start = completions[0][:shared]
    if prompt and not any(message["role"] == "user" for message in start):
        start = [{"role": "user", "content": prompt}] + start  # else the conversations repeat a prompt that is text
    return start, [completion[shared:] for completion in completions]


def _without_nulls(value):
    """Drops the keys that a column of a datasets table fills with None; chat templates ask whether a key is there."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def render_row(row: dict, processing_class) -> dict:
    """A canonical row to text: {"prompt", "completions", "templated", "unstable"}, completions a list, best first.

    Conversations go through the chat template: the prompt with its generation prompt, and each completion as what the
    whole conversation has beyond that. A template that renders the whole otherwise than it began (`unstable`) is split
    where the renderings part. Raises: ValueError that names the column, if `tools` is not JSON or the template fails.
    """
    prompt, completions = split_prompt(row["prompt"], row["completions"])
    if isinstance(completions[0], str):
        return {"prompt": prompt, "completions": completions, "templated": False, "unstable": False}
    if getattr(processing_class, "chat_template", None) is None:
        name = getattr(processing_class, "name_or_path", "")
        raise ValueError(f"it is a conversation and the tokenizer {name!r} has no chat template: take one that has")
    tools = row["tools"]
    try:
        tools = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools)
    except json.JSONDecodeError as error:
        raise ValueError(f"column 'tools' is not valid JSON: {error}") from error

    def render(messages: list[dict], **options) -> str:
        return processing_class.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    before, wholes = None, []
    try:
        before = render(prompt, add_generation_prompt=prompt[-1]["role"] != "assistant") if prompt else ""
        for completion in completions:
            wholes.append(render(prompt + completion))
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        column = "'prompt'" if before is None and row["prompt"] else column_of(row, len(wholes))
        raise ValueError(f"column {column} does not fit the chat template: {first_line(error)}") from error
    start = os.path.commonprefix([before, *wholes])
    completions = [whole[len(start) :] for whole in wholes]
    return {"prompt": start, "completions": completions, "templated": True, "unstable": start != before}


def first_line(error: Exception) -> str:
    """The first line of an error's words, or its name: what fits into a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = tokenizer(features["prompt"], add_special_tokens=False)["input_ids"]
    if (add_special_tokens or prepend_bos) and bos is not None and prompt[:1] != [bos]:
        prompt = [bos] + prompt
    if add_special_tokens and eos is not None:
        prompt = prompt + [eos]
    several = features["rejected"] if _is_several(features["rejected"]) else [features["rejected"]]
    chosen, *rejected = [_completion_ids(text, tokenizer) for text in (features["chosen"], *several)]
    rejected = rejected if _is_several(features["rejected"]) else rejected[0]
    ids = dict(zip(IDS, (prompt, chosen, rejected), strict=True))
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    return truncate_row(ids, bos_token_id=bos, **limits)


def truncate_row(
    ids: dict[str, list[int]],
    *,
    bos_token_id: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
) -> dict[str, list[int]]:
    """Cuts a tokenised row to its limits, all in tokens, None for no limit; before any padding.

    A prompt longer than max_prompt_length loses its start (truncation_mode "keep_end") or its end ("keep_start"); a
    begin-of-sequence token in front stays, unless there is room for one token only. A completion longer than
    max_completion_length loses its end. max_length is of both together: "keep_end" takes the excess of the longest
    completion off the prompt's start (all completions keep the same prompt, of at least one token); what is then still
    too long, and all with "keep_start", comes off the completion's end, even if nothing of it is left.
    """
    prompt, chosen, rejected = (ids[name] for name in IDS)
    several = _is_several(rejected)
    completions = [ids_[:max_completion_length] for ids_ in (chosen, *(rejected if several else [rejected]))]
    room = len(prompt) if max_prompt_length is None else min(len(prompt), max_prompt_length)
    if max_length is not None and truncation_mode == "keep_end":
        room = min(room, max(1, max_length - max(map(len, completions))))
    if len(prompt) > room:
        head = prompt[:1] if room > 1 and prompt[0] == bos_token_id else []
        kept = room - len(head)
        prompt = head + (prompt[len(prompt) - kept :] if truncation_mode == "keep_end" else prompt[len(head) : room])
    if max_length is not None:
        completions = [completion[: max(0, max_length - len(prompt))] for completion in completions]
    chosen, *rejected = completions
    return dict(zip(IDS, (prompt, chosen, rejected if several else rejected[0]), strict=True))


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

ROWS_VERSION = 1  # raise it when this file makes other ids of a row than before: the cache's are then not taken
BOUNDARY_SAMPLE = 1000  # rows of a part whose prompt and completion are tokenised together, too, to see what differs
FLAGS = {  # what is counted, and the words that report it
    "bad": "left out as bad rows (skip_bad_rows)",
    "lost": "left out: truncation would leave nothing of a completion (raise max_length)",
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
    num_proc: int | None = None,
) -> Dataset:
    """Checks, renders and tokenises every row; named datasets become one dataset of token ids.

    Args: ranked, rows may rank more than two completions: rejected_input_ids is then a list of lists; read_scores, keep
    their scores; allow_ties, some completions or scores of a row may be equal; the limits as in `truncate_row`.
    Returns: a Dataset with prompt_input_ids, chosen_input_ids, rejected_input_ids, length (tokens of the prompt and the
    longest completion) and, where the rows have them, margin, weight and scores, best first.
    Raises: ValueError that names part, row (counting from 1) and column of the first bad row, unless skip_bad_rows, or
    if no row is left. Rows left out, and what else is worth knowing, are counted and logged.
    """
    numbers = [column for column in ("margin", "weight") if all(column in rows.column_names for rows in parts.values())]
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    limits |= {"max_length": max_length, "truncation_mode": truncation_mode}
    options = {"processing_class": processing_class, "numbers": numbers, "limits": limits, "ranked": ranked}
    options |= {"read_scores": read_scores, "allow_ties": allow_ties, "version": ROWS_VERSION}
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    bos = tokenizer.bos_token_id
    options["prepend_bos"] = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    features = {column: List(Value("int64")) for column in IDS} | dict.fromkeys(FLAGS, Value("bool"))
    features |= {"rejected_input_ids": List(List(Value("int64")))} if ranked else {}
    features |= {"length": Value("int64"), "problem": Value("string"), "scores": List(Value("float32"))}
    features |= dict.fromkeys(numbers, Value("float32"))
    prepared = []
    for name, rows in parts.items():
        _check_columns(name, rows)
        rows = rows.with_format(None).map(
            _prepare_row,
            with_indices=True,
            fn_kwargs=options,
            remove_columns=rows.column_names,
            features=Features(features),
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
        for number, problem in enumerate(rows.select_columns("problem")[:]["problem"], start=1):
            if problem and not skip_bad_rows:
                raise ValueError(f"{name}, row {number}: {problem} (skip_bad_rows leaves such rows out)")
        prepared.append(rows)
    rows = concatenate_datasets(prepared)
    kept = _kept_rows(rows, list(parts))
    columns = [*IDS, "length", *numbers]
    if read_scores and _have_scores(rows, kept, parts):
        columns.append("scores")
    rows = rows.select_columns(columns)
    return rows.select(kept) if len(kept) < len(rows) else rows


def _check_columns(name: str, rows: Dataset) -> None:
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows: it must hold at least one preference pair")
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if "completions" in rows.column_names and missing:
        missing = {"scores"} - set(rows.column_names)
    if missing:
        present = ", ".join(map(repr, rows.column_names))
        raise ValueError(f"{name}: column {min(missing)!r} is missing; it has {present}: add it, or rename one")


def _prepare_row(row: dict, index: int, *, numbers: list[str], ranked: bool, version: int, **options) -> dict:
    """One row to token ids and flags; what is wrong with it is returned, since a worker process that raises would lose
    the row's number and the words. `version` only tells the cache of datasets that this file changed."""
    result = dict.fromkeys(IDS, []) | dict.fromkeys(FLAGS, False) | dict.fromkeys(numbers, 0.0)
    result |= {"scores": [], "length": 0, "problem": ""}
    read_scores, ties = options.pop("read_scores"), options["allow_ties"]
    try:
        canonical = canonical_row(row, numbers=tuple(numbers), read_scores=read_scores, allow_ties=ties)
        if not ranked and len(canonical["completions"]) > 2:
            raise ValueError("it ranks more than two completions, the loss is one of pairs: take plackett_luce or exo")
        result |= _row_to_ids(canonical, try_boundary=index < BOUNDARY_SAMPLE, **options)
    except ValueError as error:
        return result | {"bad": True, "problem": str(error)}
    result["scores"] = (canonical["scores"] or []) if read_scores else []
    result["rejected_input_ids"] = result["rejected_input_ids"] if ranked else result["rejected_input_ids"][0]
    return result | {column: float(canonical[column]) for column in numbers}


def _row_to_ids(
    row: dict, *, processing_class, prepend_bos: bool, limits: dict, allow_ties: bool, try_boundary: bool
) -> dict:
    """Renders, tokenises and truncates a canonical row; rejected_input_ids is a list of lists.

    Raises: ValueError that names what is wrong with the row.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    text = render_row(row, processing_class)
    _check_texts(row, text, allow_ties=allow_ties)
    chosen, *rejected = text["completions"]
    features = {"prompt": text["prompt"], "chosen": chosen, "rejected": rejected}
    ids = tokenize_row(features, processing_class, prepend_bos=prepend_bos and not text["templated"])
    if not ids["prompt_input_ids"]:
        if tokenizer.bos_token_id is None:
            raise ValueError("column 'prompt' is empty and the tokenizer has no BOS token to start from")
        ids["prompt_input_ids"] = [tokenizer.bos_token_id]
    cut = truncate_row(ids, bos_token_id=tokenizer.bos_token_id, **limits)
    prompt, chosen, rejected = cut.values()
    return {
        **cut,
        "length": len(prompt) + max(map(len, (chosen, *rejected))),
        "lost": not all((chosen, *rejected)),
        "same": bool(chosen) and all(completion == chosen for completion in rejected),
        "truncated": cut != ids,
        "unstable": text["unstable"],
        "boundary": try_boundary and _differs_in_one_piece(text, ids, tokenizer),
    }


def _check_texts(row: dict, text: dict, *, allow_ties: bool) -> None:
    """Refuses completions of which the shared prompt left nothing, and equal ones."""
    completions = text["completions"]
    for rank, completion in enumerate(completions):
        if not completion.strip():
            raise ValueError(f"column {column_of(row, rank)} is empty after the shared prompt")
    if allow_ties and len(set(completions)) > 1:
        return
    for one, other in itertools.combinations(range(len(completions)), 2):
        if completions[one] == completions[other]:
            columns = f"columns {column_of(row, one)} and {column_of(row, other)}"
            how = " as the chat template renders them" if text["templated"] else ""
            raise ValueError(f"{columns} are equal{how}: neither can be the better one")


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
            of = min(len(rows), BOUNDARY_SAMPLE) if flag == "boundary" else len(rows)
            logger.warning("%d of %d rows of %s %s", sum(flags[flag]), of, where, words)
    kept = [i for i, out in enumerate(zip(flags["bad"], flags["lost"], strict=True)) if not any(out)]
    if not kept:
        lost = f"of {sum(flags['lost'])} truncation would leave nothing of a completion: mend them, or raise max_length"
        raise ValueError(f"{where}: no row is left; {sum(flags['bad'])} are bad and {lost}")
    return kept


def _have_scores(rows: Dataset, kept: list[int], parts: dict[str, Dataset]) -> bool:
    """Whether the kept rows have scores. Raises: ValueError if only some have."""
    scores = rows.select_columns("scores")[:]["scores"]
    without = [i for i in kept if not scores[i]]
    if 0 < len(without) < len(kept):
        where = [f"{name}, row {number}" for name, part in parts.items() for number in range(1, len(part) + 1)]
        others = f"{len(kept) - len(without)} other rows have: loss_type exo takes them in all rows or none"
        raise ValueError(f"{where[without[0]]}: it has no scores, {others}")
    return not without
