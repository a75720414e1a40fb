"""A preference dataset becomes rows of token ids: prompt, chosen, rejected.

`rows.canonical_row` checks a row and brings it into one form, `render_row` turns conversations into text,
`tokenize_row` turns text into ids, and `prepare_dataset` does all of that to a whole dataset (sources.py opens it).
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets

from dpo.rows import NothingToLearn, canonical_row, column_of, is_several

logger = logging.getLogger(__name__)
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content
IDS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")


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
    prompt, *completions = (_with_parsed_calls(_without_nulls(value)) for value in (prompt, *completions))
    if isinstance(prompt, list) and prompt:
        repeated = all(completion[: len(prompt)] == prompt for completion in completions)
        return prompt, [completion[len(prompt) if repeated else 0 :] for completion in completions]
    parted = (i for i, each in enumerate(zip(*completions, strict=False)) if any(other != each[0] for other in each))
    shared = next(parted, min(map(len, completions)))
    start = completions[0][:shared]
    if prompt and not any(message["role"] == "user" for message in start):
        start = [{"role": "user", "content": prompt}] + start  # else the conversations repeat a prompt that is text
    return start, [completion[shared:] for completion in completions]


def _with_parsed_calls(messages):
    """Messages whose tool calls have their arguments as an object: templates write them as JSON, and what is JSON
    already (OpenAI's form) would be written as a text in quotes."""
    if not isinstance(messages, list):
        return messages
    parsed = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                try:
                    function = {**function, "arguments": json.loads(arguments or "{}")}
                except ValueError as error:
                    raise ValueError(f"a tool call's arguments are not JSON: {error}") from error
                call = {**call, "function": function} if "function" in call else function
            calls.append(call)
        parsed.append({**message, "tool_calls": calls} if calls else message)
    return parsed


def _without_nulls(value):
    """Drops the keys that a column of a datasets table fills with None; chat templates ask whether a key is there."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None}
        return {key: item if key == "arguments" else _without_nulls(item) for key, item in kept.items()}
    return value


def render_row(row: dict, processing_class, chat_template_kwargs: dict | None = None) -> dict:
    """A canonical row to text: {"prompt", "completions", "turns", "closed", "templated", "unstable"}.

    Conversations go through the chat template: the prompt with its generation prompt, and each completion as what the
    whole conversation has beyond that, up to the token that ends the last turn (`closed`; without one an EOS will).
    A template that renders the whole otherwise than it began (`unstable`) is split where the renderings part.

    Args: chat_template_kwargs, variables of the template; the row's own win over them.
    Returns: completions, a list of texts, best first; turns, the same cut into (text, whether it is scored): of several
    messages only what the assistant says is. Raises: ValueError that names the column, where roles are not those of
    a completion, the template fails, or it leaves out something that the row says.
    """
    prompt, completions = split_prompt(row["prompt"], row["completions"])
    plain = {"closed": False, "templated": False, "unstable": False}
    if isinstance(completions[0], str):
        return {"prompt": prompt, "completions": completions, "turns": [[(c, True)] for c in completions], **plain}
    if getattr(processing_class, "chat_template", None) is None:
        name = getattr(processing_class, "name_or_path", "")
        raise ValueError(f"it is a conversation and the tokenizer {name!r} has no chat template: take one that has")
    _check_roles(row, prompt, completions)
    options = {"tools": row["tools"], **(chat_template_kwargs or {}), **(row["chat_template_kwargs"] or {})}

    def render(messages: list[dict], **more) -> str:
        return processing_class.apply_chat_template(messages, tokenize=False, **{**options, **more})

    before, wholes = None, []
    try:
        before = render(prompt, add_generation_prompt=True) if prompt else ""
        for completion in completions:
            wholes.append(render(prompt + completion))
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        column = "'prompt'" if before is None and row["prompt"] else column_of(row, len(wholes))
        raise ValueError(f"column {column} does not fit the chat template: {first_line(error)}") from error
    for rank, (completion, whole) in enumerate(zip(completions, wholes, strict=True)):
        _check_all_is_rendered(row, rank, prompt, completion, whole, render)
    start, turns = os.path.commonprefix([before, *wholes]), []
    end = turn_end(processing_class, processing_class.chat_template)
    for rank, (completion, whole) in enumerate(zip(completions, wholes, strict=True)):
        try:
            turns.append(split_turns(prompt, completion, whole, start, end, render))
        except ValueError as error:
            raise ValueError(f"column {column_of(row, rank)} {error}") from error
    texts = ["".join(text for text, _ in turn) for turn in turns]
    closed = end is not None and all(whole.endswith(end[0]) for whole in wholes)
    return {
        "prompt": start, "completions": texts, "turns": turns, "closed": closed, "templated": True,
        "unstable": start != before,
    }  # fmt: skip


def split_turns(prompt: list[dict], completion: list[dict], whole: str, start: str, end: tuple | None, render) -> list:
    """The text of a completion as (text, whether it is scored): the assistant's messages are, each with what ends its
    turn (see `turn_end`); other roles' messages and what stands between are not."""
    turns, position = [], len(start)
    for number, message in enumerate(completion):
        if message["role"] != "assistant":
            continue
        opened, is_last = start, number + 1 == len(completion)
        if number:
            opened = render(prompt + completion[:number], add_generation_prompt=True)
        closed = whole if is_last else render(prompt + completion[: number + 1])
        if not (whole.startswith(opened) and whole.startswith(closed)):
            raise ValueError(
                "has several turns, and the chat template changes a turn when another follows: cut the row"
            )
        stop = len(closed) - (len(end[0]) - len(end[1]) if end and closed.endswith(end[0]) else 0)
        turns += [(whole[position : len(opened)], False)] if len(opened) > position else []
        turns.append((whole[len(opened) : stop], True))
        position = stop
    return turns


@functools.lru_cache(maxsize=8)
def turn_end(processing_class, _template) -> tuple[str, str] | None:
    """(what a chat template writes behind an assistant's message, that up to the token which ends the turn); None if no
    token does. A model writes that token and stops: what the template puts behind it (a newline, an EOS) it never
    writes, and training on it would only cost nats."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "probe"}]
    try:
        tail = processing_class.apply_chat_template(messages, tokenize=False).rpartition("probe")[2]
    except Exception:  # a template that wants other messages
        return None
    ends = [tail.index(token) + len(token) for token in tokenizer.get_added_vocab() if token.strip() and token in tail]
    return (tail, tail[: min(ends)]) if ends else None


def _check_roles(row: dict, prompt: list[dict], completions: list[list[dict]]) -> None:
    """Refuses conversations that do not part where an assistant answers."""
    for rank, completion in enumerate(completions):
        if not completion:
            raise NothingToLearn(f"column {column_of(row, rank)} is empty after the shared prompt")
    if prompt and prompt[-1]["role"] == "assistant":
        where = "column 'prompt'" if isinstance(row["prompt"], list) else "the start that the completions share"
        raise ValueError(f"{where} ends with an assistant message: a completion must begin with one, move it there")
    for rank, completion in enumerate(completions):
        total, column = len(row["completions"][rank]), column_of(row, rank)
        for number in (total - len(completion), total - 1):
            role = row["completions"][rank][number]["role"]
            if role != "assistant":
                how = "a completion begins and ends with the assistant's"
                raise ValueError(f"column {column}, message {number + 1} is of role {role!r}: {how}")


def _check_all_is_rendered(row: dict, rank: int, prompt: list, completion: list, whole: str, render) -> None:
    """Refuses a row of which the chat template leaves out a message, a tool call, the reasoning, or the tools."""

    def is_left_out(**changed) -> bool:
        try:
            return render(changed.pop("messages", messages), **changed) == whole
        except Exception:  # it asks for what was taken away
            return False

    messages, offset = prompt + completion, len(row["completions"][rank]) - len(completion)
    for number, message in enumerate(messages):
        in_prompt = number < len(prompt)
        keys = ("content", "tool_calls") if in_prompt else ("content", "tool_calls", *REASONING)
        for key in keys:
            value = message.get(key)
            if not value or (isinstance(value, str) and value.strip() in whole):
                continue
            less = {name: each for name, each in message.items() if name != key}
            less = {**less, "content": ""} if key == "content" else less
            if is_left_out(messages=[*messages[:number], less, *messages[number + 1 :]]):
                column = "'prompt'" if in_prompt else column_of(row, rank)
                where = f"column {column}, message {number + 1 if in_prompt else number - len(prompt) + offset + 1}"
                raise ValueError(f"{where}: the chat template leaves out its {key}: take another, or mend the row")
    if row["tools"] and is_left_out(tools=None):
        raise ValueError("column 'tools': the chat template leaves tools out: take another, or leave out the column")


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
    prompt = _prompt_ids(features["prompt"], tokenizer, prepend_bos=add_special_tokens or prepend_bos)
    if add_special_tokens and eos is not None:
        prompt = prompt + [eos]
    several = features["rejected"] if is_several(features["rejected"]) else [features["rejected"]]
    chosen, *rejected = [_completion_ids(text, tokenizer) for text in (features["chosen"], *several)]
    rejected = rejected if is_several(features["rejected"]) else rejected[0]
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
    several = is_several(rejected)
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

ROWS_VERSION = 2  # raise it when this file makes other ids of a row than before: the cache's are then not taken
BOUNDARY_SAMPLE = 1000  # rows of a part whose prompt and completion are tokenised together, too, to see what differs
FLAGS = {  # what is counted, and the words that report it
    "bad": "left out as bad rows (skip_bad_rows)",
    "useless": "left out: they teach nothing",
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
    chat_template_kwargs: dict | None = None,
    read_margin: bool = True,
    num_proc: int | None = None,
) -> Dataset:
    """Checks, renders and tokenises every row; named datasets become one dataset of token ids.

    Args: ranked, rows may rank more than two completions: rejected_input_ids is then a list of lists; read_scores, keep
    their scores; allow_ties, some completions or scores of a row may be equal; the limits as in `truncate_row`.
    Returns: a Dataset with prompt_input_ids, chosen_input_ids, rejected_input_ids, source (its part and row), length
    (tokens of the prompt and the longest completion) and, where rows have them, margin, weight and scores, best first.
    Raises: ValueError that names part, row (counting from 1) and column of the first bad row, unless skip_bad_rows, or
    if no row is left. Rows left out, and what else is worth knowing, are counted and logged.
    """
    numbers = [column for column in ("margin", "weight") if all(_has_numbers(rows, column) for rows in parts.values())]
    numbers = [column for column in numbers if read_margin or column != "margin"]
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    limits |= {"max_length": max_length, "truncation_mode": truncation_mode}
    options = {"processing_class": processing_class, "numbers": numbers, "limits": limits, "ranked": ranked}
    options |= {"read_scores": read_scores, "allow_ties": allow_ties, "version": ROWS_VERSION}
    options |= {"chat_template_kwargs": chat_template_kwargs}
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    bos = tokenizer.bos_token_id
    options["prepend_bos"] = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    features = {column: List(Value("int64")) for column in IDS} | dict.fromkeys(FLAGS, Value("bool"))
    features |= {"rejected_input_ids": List(List(Value("int64")))} if ranked else {}
    features |= {"length": Value("int64"), "problem": Value("string"), "scores": List(Value("float32"))}
    features |= {"source": Value("string"), "scored": List(List(Value("bool")))}
    features |= dict.fromkeys(numbers, Value("float32"))
    prepared = []
    for name, rows in parts.items():
        _check_columns(name, rows)
        rows = rows.with_format(None).map(
            _prepare_row,
            with_indices=True,
            fn_kwargs={**options, "name": name, "prompts": _has_prompts(rows)},
            remove_columns=rows.column_names,
            features=Features(features),
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
        )
        said = rows.select_columns(["problem", "bad"])[:]
        for number, (problem, is_bad) in enumerate(zip(said["problem"], said["bad"], strict=True), start=1):
            if is_bad and not skip_bad_rows:
                raise ValueError(f"{name}, row {number}: {problem} (skip_bad_rows leaves such rows out)")
        prepared.append(rows)
    rows = concatenate_datasets(prepared)
    kept = _kept_rows(rows, list(parts))
    columns = [*IDS, "length", "source", *numbers]
    if read_scores and _have_scores(rows, kept, parts):
        columns.append("scores")
    if any(rows.select_columns("scored")[:]["scored"]):
        columns.append("scored")
    rows = rows.select_columns(columns)
    return rows.select(kept) if len(kept) < len(rows) else rows


def fingerprint(rows: Dataset) -> str:
    """A few digits that tell tokenised rows from others: a hash of all their ids and numbers."""
    digest = hashlib.sha256()
    for part in rows.with_format("arrow").iter(batch_size=1000):
        for name in part.column_names:
            values = part.column(name).combine_chunks()
            while isinstance(values, pa.ListArray):
                digest.update(pc.list_value_length(values).to_numpy(zero_copy_only=False).tobytes())
                values = pc.list_flatten(values)
            if name != "source":
                digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return f"{len(rows)} of {digest.hexdigest()[:16]}"


def largest_id(rows: Dataset) -> int:
    """The largest token id in tokenised rows."""
    largest = 0
    for part in rows.select_columns(list(IDS)).with_format("arrow").iter(batch_size=1000):
        for column in part.columns:
            values = column.combine_chunks()
            while isinstance(values, pa.ListArray):
                values = pc.list_flatten(values)
            largest = max(largest, pc.max(values).as_py() or 0)
    return largest


def _check_columns(name: str, rows: Dataset) -> None:
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows: it must hold at least one preference pair")
    missing = {"chosen", "rejected"} - set(rows.column_names)
    if "completions" in rows.column_names and missing:
        missing = {"scores"} - set(rows.column_names)
    if missing:
        present = ", ".join(map(repr, rows.column_names))
        raise ValueError(f"{name}: column {min(missing)!r} is missing; it has {present}: add it, or rename one")
    images = {"image", "images", "video", "videos", "audio"} & set(rows.column_names)
    if images:
        what = f"{name}: column {min(images)!r}: this version trains on text alone"
        raise ValueError(f"{what}: leave out the column if the completions do not depend on it")


def _has_numbers(rows: Dataset, column: str) -> bool:
    """Whether a column has numbers to read: of numbers' type, or text whose first values all are (as in a CSV file)."""
    if column not in rows.column_names:
        return False
    kind = str(getattr(rows.features[column], "dtype", ""))
    if not kind.startswith(("int", "uint", "float", "string", "large_string", "null")) and "Json" not in str(
        rows.features
    ):
        logger.warning("column %r is no number: it is not read", column)
        return False
    if "string" not in kind:
        return True
    texts = [text for text in rows.select(range(min(100, len(rows))))[column] if text is not None]
    if any(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", text) for text in texts):
        return True
    logger.warning("column %r is no number: it is not read", column)
    return False


def _has_prompts(rows: Dataset) -> bool:
    """Whether any row has a prompt of its own."""
    if "prompt" not in rows.column_names:
        return False
    column = rows.select_columns("prompt").with_format("arrow")
    return any(part.column("prompt").null_count < len(part) for part in column.iter(batch_size=1000))


def _prepare_row(
    row: dict, index: int, *, name: str, prompts: bool, numbers: list[str], ranked: bool, version: int, **options
) -> dict:
    """One row to token ids and flags; what is wrong with it is returned, since a worker process that raises would lose
    the row's number and the words. `version` only tells the cache of datasets that this file changed."""
    result = dict.fromkeys(IDS, []) | dict.fromkeys(FLAGS, False) | dict.fromkeys(numbers, 0.0)
    result |= {"scores": [], "length": 0, "problem": "", "source": f"{name}, row {index + 1}", "scored": []}
    read_scores, ties = options.pop("read_scores"), options["allow_ties"]
    try:
        if prompts and row["prompt"] is None:
            raise ValueError("column 'prompt' is missing, and other rows have it: fill it in")
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
    prepend_bos: bool,
    limits: dict,
    allow_ties: bool,
    try_boundary: bool,
) -> dict:
    """Renders, tokenises and truncates a canonical row; rejected_input_ids is a list of lists.

    Raises: ValueError that names what is wrong with the row.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    text = render_row(row, processing_class, chat_template_kwargs)
    _check_texts(row, text, allow_ties=allow_ties)
    prompt = _prompt_ids(text["prompt"], tokenizer, prepend_bos=prepend_bos and not text["templated"])
    if not prompt:
        if tokenizer.bos_token_id is None:
            raise ValueError("column 'prompt' is empty and the tokenizer has no BOS token to start from")
        prompt = [tokenizer.bos_token_id]
    (chosen, *rejected), scored = zip(
        *(_turn_ids(t, tokenizer, closed=text["closed"]) for t in text["turns"]), strict=True
    )
    ids = dict(zip(IDS, (prompt, chosen, rejected), strict=True))
    cut = truncate_row(ids, bos_token_id=tokenizer.bos_token_id, **limits)
    prompt, chosen, rejected = cut.values()
    scored = [mask[: len(ids)] for mask, ids in zip(scored, (chosen, *rejected), strict=True)]
    is_partly = not all(map(all, scored))  # else the masks would say nothing
    return {
        **cut,
        "scored": scored if is_partly else [],
        "length": len(prompt) + max(map(len, (chosen, *rejected))),
        "lost": not all(map(any, scored)),
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
    out = zip(flags["bad"], flags["useless"], flags["lost"], strict=True)
    kept = [i for i, reasons in enumerate(out) if not any(reasons)]
    if not kept:
        lost = f"of {sum(flags['lost'])} truncation would leave nothing of a completion: mend them, or raise max_length"
        useless = f"{sum(flags['useless'])} teach nothing"
        useless += f" ({rows[flags['useless'].index(True)]['problem']})" if any(flags["useless"]) else ""
        raise ValueError(f"{where}: no row is left; {sum(flags['bad'])} are bad, {useless} and {lost}")
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
