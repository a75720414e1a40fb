"""A preference dataset becomes rows of token ids: prompt, chosen, rejected.

check_row says what is wrong with a row, render_row turns conversations into text, tokenize_row turns text into ids,
and prepare_dataset does all of that to a whole dataset (sources.py opens it). Where a row ranks more than two
completions, `rejected` is a list of them, best first.
"""

import itertools
import json
import logging
import math
import os
from pathlib import Path

from datasets import Dataset, Features, List, Value, concatenate_datasets

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------- checking it


def check_row(row: dict) -> str | None:
    """What is wrong with a row, in words that name the column; None for a good row."""
    problem = _check_scores(row)
    if problem:
        return problem
    completions, prompt = completions_of(row), row.get("prompt")
    for column, value in completions.items():
        if value is None:
            there = [name for name, value in row.items() if value is not None]
            return f"column {column} is missing; the row has {', '.join(map(repr, there)) or 'nothing'}"
    for column, value in {"'prompt'": "" if prompt is None else prompt, **completions}.items():
        if isinstance(value, list):
            for number, message in enumerate(value, start=1):
                problem = _check_message(message)
                if problem:
                    return f"column {column}, message {number} {problem}"
            if not value and column != "'prompt'":
                return f"column {column} is an empty list of messages"
        elif not isinstance(value, str):
            return f"column {column} is {type(value).__name__}: it must be text or a list of messages"
        elif not value.strip() and column != "'prompt'":
            return f"column {column} is empty"
    (best, chosen), *others = completions.items()
    for column, value in others:
        if isinstance(chosen, list) != isinstance(value, list):
            return f"columns {best} and {column} differ in kind: both must be text, or both lists of messages"
    if isinstance(prompt, list) and isinstance(chosen, str):
        return f"column 'prompt' is a list of messages but {best} is text: make both the same kind"
    if all(chosen == value for _, value in others):
        return f"columns {best} and {others[0][0]} are equal: there is no preference to learn"
    return None


def completions_of(row: dict) -> dict:
    """The completions of a row, best first, under the names that messages give them: chosen, then rejected, one or a
    list of several; or, where there is neither, `completions` by falling `scores`."""
    if _is_scored(row):
        order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
        return {f"'completions' number {i + 1}": row["completions"][i] for i in order}
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not _is_several(rejected):
        return {"'chosen'": chosen, "'rejected'": rejected}
    return {"'chosen'": chosen} | {f"'rejected' number {i}": each for i, each in enumerate(rejected, start=1)}


def _is_scored(row: dict) -> bool:
    return row.get("chosen") is None and row.get("rejected") is None and row.get("completions") is not None


def _is_several(value) -> bool:
    """Whether a value holds several completions: a list of texts, of conversations or of token ids."""
    return isinstance(value, list) and any(isinstance(each, str | list) for each in value)


def _check_scores(row: dict) -> str | None:
    if not _is_scored(row):
        return None
    completions, scores = row["completions"], row.get("scores")
    if not _is_several(completions) or len(completions) < 2:
        return "column 'completions' must be a list of two or more texts, or conversations, each a list of messages"
    if not isinstance(scores, list) or len(scores) != len(completions):
        return f"column 'scores' must be a list of {len(completions)} numbers, one for each of 'completions'"
    if not all(_is_number(score) for score in scores):
        return f"column 'scores' is {scores}: each must be a number"
    return None


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _check_message(message) -> str | None:
    if not isinstance(message, dict):
        return f"is {type(message).__name__}: it must be an object with role and content"
    if not isinstance(message.get("role"), str):
        return "has no 'role'"
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        return "has no 'content'"
    if content is not None and not isinstance(content, str):
        return f"has a 'content' that is {type(content).__name__}: it must be text"
    if message["role"] == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        return "is empty"
    return None


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
    """Row to text: {"prompt", "completions", "templated", "unstable"}, completions a list, best first.

    Conversations go through the chat template: the prompt with its generation prompt, and each completion as what the
    whole conversation has beyond that. A template that renders the whole otherwise than it began (`unstable`) is split
    where the renderings part. `tools` may be a list of JSON schemas or their JSON text.

    Raises: ValueError that names the column, if `tools` is not JSON or the template fails.
    """
    columns, completions = zip(*completions_of(row).items(), strict=True)
    prompt, completions = split_prompt(row.get("prompt"), list(completions))
    if isinstance(completions[0], str):
        return {"prompt": prompt, "completions": completions, "templated": False, "unstable": False}
    tools = row.get("tools") or None
    try:
        tools = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools)
    except json.JSONDecodeError as error:
        raise ValueError(f"column 'tools' is not valid JSON: {error}") from error

    def render(messages: list[dict], column: str, **options) -> str:
        if not messages:
            return ""
        try:
            return processing_class.apply_chat_template(messages, tools=tools, tokenize=False, **options)
        except Exception as error:  # a template is a program of somebody else's: it may raise anything
            raise ValueError(f"column {column} does not fit the chat template: {first_line(error)}") from error

    ask = bool(prompt) and prompt[-1]["role"] != "assistant"
    before = render(prompt, "'prompt'" if row.get("prompt") else columns[0], add_generation_prompt=ask)
    wholes = [render(prompt + each, column) for each, column in zip(completions, columns, strict=True)]
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
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
    prepend_bos: bool = False,
) -> dict[str, list[int]]:
    """Text to token ids: {"prompt_input_ids", "chosen_input_ids", "rejected_input_ids"}, the last a list of lists where
    rejected is a list of texts.

    Prompt and completions are tokenised apart, as they meet at inference: the model gets the prompt's own tokens and
    goes on from there. A completion ends with exactly one end-of-sequence token; one that is cut has none.

    Args:
        features: prompt, chosen and rejected, each text; rejected may be a list of texts.
        processing_class: a tokenizer, or a processor that has one.
        max_prompt_length, max_completion_length, max_length, truncation_mode: see `truncate_row`.
        add_special_tokens: put BOS before and EOS after the prompt, as encoder-decoder models want it.
        prepend_bos: put BOS before the prompt if it does not begin with it.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = tokenizer(features["prompt"], add_special_tokens=False)["input_ids"]
    if (add_special_tokens or prepend_bos) and bos is not None and prompt[:1] != [bos]:
        prompt = [bos] + prompt
    if add_special_tokens and eos is not None:
        prompt = prompt + [eos]
    chosen, rejected = _completion_ids(features["chosen"], tokenizer), features["rejected"]
    if _is_several(rejected):
        rejected = [_completion_ids(text, tokenizer) for text in rejected]
    else:
        rejected = _completion_ids(rejected, tokenizer)
    return truncate_row(
        {"prompt_input_ids": prompt, "chosen_input_ids": chosen, "rejected_input_ids": rejected},
        bos_token_id=bos,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        max_length=max_length,
        truncation_mode=truncation_mode,
    )


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

    Args:
        max_prompt_length: a longer prompt loses its start (truncation_mode "keep_end") or its end ("keep_start"); a
            begin-of-sequence token in front stays, unless there is room for one token only.
        max_completion_length: a longer completion loses its end, its end-of-sequence token with it.
        max_length: of prompt and completion together. "keep_end" takes the excess of the longer completion off the
            prompt's start (all completions keep the same prompt, of at least one token); what is then still too long,
            and all with "keep_start", comes off the completion's end, even if nothing of it is left.
    """
    prompt, rejected = ids["prompt_input_ids"], ids["rejected_input_ids"]
    several = _is_several(rejected)
    completions = [ids["chosen_input_ids"], *(rejected if several else [rejected])]
    completions = [completion[:max_completion_length] for completion in completions]
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
    rejected = rejected if several else rejected[0]
    return {"prompt_input_ids": prompt, "chosen_input_ids": chosen, "rejected_input_ids": rejected}


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


IDS = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
FLAGS = ("lost", "same", "truncated", "unstable", "boundary")


def _prepare_row(row: dict, *, numbers: list[str], ranked: bool, source: str, **options) -> dict:
    """One row to token ids and what there is to say about it; problems are returned, since a worker process that
    raises would lose the row's number and the words. `source` only tells the cache of datasets that the code changed.
    """
    result = dict.fromkeys(IDS, []) | dict.fromkeys(FLAGS, False) | dict.fromkeys(numbers, 0.0)
    result |= {"scores": [], "length": 0, "problem": ""}
    try:
        problem = check_row(row)
        for column in numbers:
            if not _is_number(row[column]):
                problem = problem or f"column {column!r} is {row[column]!r}: it must be a number"
        if not problem and not ranked and len(completions_of(row)) > 2:
            problem = "it ranks more than two completions, the loss is one of pairs: choose plackett_luce or exo"
        if problem:
            raise ValueError(problem)
        result |= {column: float(row[column]) for column in numbers} | _row_to_ids(row, **options)
    except ValueError as error:
        return result | {"problem": str(error)}
    if not ranked:
        result["rejected_input_ids"] = result["rejected_input_ids"][0]
    return result


def _row_to_ids(row: dict, *, processing_class, prepend_bos: bool, scored: bool, allow_ties: bool, **limits) -> dict:
    """Renders, tokenises and truncates a checked row; rejected_input_ids is a list of lists.

    Raises: ValueError that names what is wrong with the row.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    columns, text = list(completions_of(row)), render_row(row, processing_class)
    scores = _scores_of(row, allow_ties=allow_ties) if scored or _is_scored(row) else []
    for column, completion in zip(columns, text["completions"], strict=True):
        if not completion.strip():
            raise ValueError(f"column {column} is empty after the shared prompt")
    for (one, first), (other, second) in itertools.combinations(zip(columns, text["completions"], strict=True), 2):
        if first == second and (not allow_ties or len(set(text["completions"])) == 1):
            as_rendered = " as the chat template renders them" if text["templated"] else ""
            raise ValueError(f"columns {one} and {other} are equal{as_rendered}: neither can be the better one")

    chosen, *rejected = text["completions"]
    features = {"prompt": text["prompt"], "chosen": chosen, "rejected": rejected}
    ids = tokenize_row(features, processing_class, prepend_bos=prepend_bos and not text["templated"])
    if not ids["prompt_input_ids"]:
        if tokenizer.bos_token_id is None:
            raise ValueError("column 'prompt' is empty and the tokenizer has no BOS token to start from")
        ids["prompt_input_ids"] = [tokenizer.bos_token_id]
    boundary = False
    tokens_of = [ids["chosen_input_ids"], *ids["rejected_input_ids"]]
    for completion, tokens in zip(text["completions"], tokens_of, strict=True):
        # Up to the completion's first token: what follows it lies beyond the boundary.
        apart = ids["prompt_input_ids"] + tokens[:1]
        joint = tokenizer(text["prompt"] + completion, add_special_tokens=False)["input_ids"]
        if apart[0] == tokenizer.bos_token_id and joint[0] != apart[0]:
            joint = apart[:1] + joint
        boundary = boundary or joint[: len(apart)] != apart
    cut = truncate_row(ids, bos_token_id=tokenizer.bos_token_id, **limits)
    prompt, chosen, rejected = cut.values()
    return {
        **cut,
        "scores": scores if scored else [],
        "length": len(prompt) + max(map(len, (chosen, *rejected))),
        "lost": not all((chosen, *rejected)),
        "same": bool(chosen) and all(completion == chosen for completion in rejected),
        "truncated": cut != ids,
        "unstable": text["unstable"],
        "boundary": boundary,
    }


def _scores_of(row: dict, *, allow_ties: bool) -> list[float]:
    """The scores of a checked row's completions, best first; none where it has none."""
    scores, completions = row.get("scores"), completions_of(row)
    if scores is None:
        return []
    if _is_scored(row):
        scores = sorted(scores, reverse=True)
    elif not isinstance(scores, list) or len(scores) != len(completions) or not all(map(_is_number, scores)):
        raise ValueError(f"column 'scores' is {scores}: give {len(completions)} numbers, that of 'chosen' first")
    elif scores != sorted(scores, reverse=True):
        raise ValueError(f"column 'scores' is {scores}: they must fall, 'chosen' has the highest")
    if len(set(scores)) < len(scores) and not allow_ties:
        raise ValueError(f"column 'scores' is {row['scores']}: equal ones are no ranking (loss_type exo takes them)")
    return scores


def prepare_dataset(
    parts: dict[str, Dataset],
    processing_class,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_end",
    ranked: bool = False,
    scored: bool = False,
    allow_ties: bool = False,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """Checks, renders and tokenises every row; named datasets become one dataset of token ids.

    Args: ranked, rows may rank more than two completions: rejected_input_ids is then a list of lists; scored, keep
    their scores; allow_ties, some completions or scores of a row may be equal; the limits as in `truncate_row`.
    Returns: a Dataset with prompt_input_ids, chosen_input_ids, rejected_input_ids and length (tokens of the prompt and
    the longest completion); and margin and weight, numbers of a row, and scores, best first, where the rows have them.
    Other columns are left out.
    Raises: ValueError that names part, row (counting from 1) and column of the first bad row, unless skip_bad_rows;
    ValueError when no row is left. Rows left out, and what else is worth knowing, are counted and logged.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    numbers = [column for column in ("margin", "weight") if all(column in rows.column_names for rows in parts.values())]
    options = {
        "processing_class": processing_class,
        "numbers": numbers,
        "prepend_bos": tokenizer.bos_token_id is not None
        and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id],
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "ranked": ranked,
        "scored": scored,
        "allow_ties": allow_ties,
        "source": Path(__file__).read_text(encoding="utf-8"),
    }
    features = {column: List(Value("int64")) for column in IDS} | dict.fromkeys(FLAGS, Value("bool"))
    features |= {"rejected_input_ids": List(List(Value("int64")))} if ranked else {}
    features |= {"length": Value("int64"), "problem": Value("string"), "scores": List(Value("float32"))}
    features |= dict.fromkeys(numbers, Value("float32"))
    prepared = []
    for name, rows in parts.items():
        if len(rows) == 0:
            raise ValueError(f"{name} has no rows: it must hold at least one preference pair")
        missing = {"chosen", "rejected"} - set(rows.column_names)
        if "completions" in rows.column_names and missing:
            missing = {"scores"} - set(rows.column_names)
        if missing:
            there = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"{name}: column {min(missing)!r} is missing; it has {there}: add it, or rename one")
        first = completions_of(rows[0]) if check_row(rows[0]) is None else {}
        conversational = any(isinstance(completion, list) for completion in first.values())
        if conversational and getattr(processing_class, "chat_template", None) is None:
            raise ValueError(
                f"{name} holds conversations but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
                "take a model made for chat, or save its tokenizer with a chat_template"
            )
        rows = rows.with_format(None).map(
            _prepare_row,
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

    columns = [*IDS, "length", *numbers]
    said = rows.remove_columns(columns)[:]
    keep = [i for i, out in enumerate(zip(said["problem"], said["lost"], strict=True)) if not any(out)]
    bad = sum(map(bool, said["problem"]))
    for count, what in (
        (bad, "left out as bad rows (skip_bad_rows)"),
        (sum(said["lost"]), "left out: truncation would leave nothing of a completion (raise max_length)"),
        (sum(said["same"]), "teach nothing: truncation leaves the same of chosen and rejected (raise max_length)"),
        (sum(said["truncated"]), "truncated to max_prompt_length, max_completion_length or max_length"),
        (sum(said["unstable"]), "rendered by a chat template that is not prefix-stable: split at the common start"),
        (sum(said["boundary"]), "have other tokens at the prompt's end when tokenised in one piece: kept apart"),
    ):
        if count:
            logger.warning("%d of %d rows of %s %s", count, len(rows), ", ".join(parts), what)
    if not keep:
        raise ValueError(
            f"{', '.join(parts)}: no row is left; {bad} are bad and of {sum(said['lost'])} truncation would leave "
            "nothing of a completion: mend the rows, or raise max_length"
        )
    unscored = [i for i in keep if not said["scores"][i]]
    if 0 < len(unscored) < len(keep) and scored:
        where = [f"{name}, row {number}" for name, part in parts.items() for number in range(1, len(part) + 1)]
        raise ValueError(
            f"{where[unscored[0]]}: it has no scores, {len(keep) - len(unscored)} other rows have: loss_type exo takes "
            "them in all rows or in none"
        )
    rows = rows.select_columns(columns if unscored else [*columns, "scores"])
    return rows.select(keep) if len(keep) < len(rows) else rows
