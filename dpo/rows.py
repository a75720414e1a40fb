"""A row of a preference dataset in the one form that data.py knows, checked: refused in words, or left out."""

import ast
import json
import math
import os
import re
from decimal import Decimal

ROLES = "system developer user assistant tool function environment ipython".split()
READ = "prompt chosen rejected completions scores tools chat_template_kwargs margin weight images".split()
# Names of columns that hold what this code calls prompt, or what belongs to it; not their ids, sources and kinds.
QUESTIONS = r"prompt|question|quer(y|ies)|instruct|input|user|problem|task|dialog|convers|messages|history|context|post"
QUESTIONS += r"|article|trajectory"
NO_QUESTIONS = r"(^|_)(ids?|hash|source|types?|category|lang(uage)?|name|len(gth)?|tokens|uuid|url)$"
CONTEXTS = "input context history messages conversation conversations documents instruction".split()  # beside a prompt
SYSTEMS = "system system_prompt system_message".split()


class NothingToLearn(ValueError):
    """A row that is whole but teaches nothing: its completions are equal, or one is empty. It is left out."""


def canonical_row(row: dict, *, numbers: tuple = (), read_scores: bool = False, allow_ties: bool = False) -> dict:
    """A row in the one form that conversations.py and data.py know, checked.

    Args: row, with chosen and rejected (one completion, or several, best first), or with completions and their scores,
    its pictures in the column images (see images.py; a row that has some may call its prompt question); numbers,
    columns to keep; read_scores, keep `scores` beside chosen and rejected, too; allow_ties, of scores.
    Returns: {"prompt": text, messages or None; "completions": a list, best first; "scores": theirs, or None; "tools";
    "chat_template_kwargs"; "images": its pictures; "row": the row itself, for messages} and the numbers.
    Raises: ValueError in words that name the column; NothingToLearn where the row is whole and teaches nothing.
    """
    if _is_scored(row):
        completions, scores = row["completions"], row.get("scores")
        if not is_several(completions) or len(completions) < 2:
            raise ValueError("column 'completions' must be a list of two or more texts, or lists of messages")
        _check_scores(scores, len(completions), sorted_already=False, allow_ties=allow_ties)
        completions, scores = [completions[i] for i in _best_first(scores)], sorted(scores, reverse=True)
    else:
        rejected, scores = row.get("rejected"), row.get("scores") if read_scores else None
        completions = [row.get("chosen"), *(rejected if is_several(rejected) else [rejected])]
        if scores is not None:
            _check_scores(scores, len(completions), sorted_already=True, allow_ties=allow_ties)
    images = row.get("images") or []
    prompt = row.get("question") if images and row.get("prompt") is None else row.get("prompt")
    prompt = with_plain_content(_parsed(prompt, "'prompt'"))
    canonical = {"prompt": prompt, "completions": completions, "scores": scores, "images": images, "row": row}
    parsed = [_parsed(each, column_of(canonical, i)) for i, each in enumerate(completions)]
    canonical["completions"] = [with_plain_content(each) for each in parsed]
    for column in ("tools", "chat_template_kwargs"):
        canonical[column] = _from_json(row.get(column), column) or None
    kwargs = canonical["chat_template_kwargs"]
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"column 'chat_template_kwargs' is {type(kwargs).__name__}: it must be an object")
    canonical["chat_template_kwargs"] = {key: value for key, value in (kwargs or {}).items() if value is not None}
    for column in numbers:
        canonical[column] = _number(row.get(column), column)
    _check_kinds(canonical)
    _check_unread(canonical)
    return canonical


def with_plain_content(messages):
    """Messages whose content is text wherever it has parts of text alone; what is not messages stays as it is."""
    if not isinstance(messages, list):
        return messages

    def is_text(part) -> bool:
        return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)

    def plain(message):
        content = message.get("content") if isinstance(message, dict) else None
        is_plain = isinstance(content, list) and all(map(is_text, content))
        return {**message, "content": text_of(message)} if is_plain else message

    return [plain(message) for message in messages]


def text_of(message: dict) -> str:
    """What a message says: its content, or the text of its content's parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def column_of(canonical: dict, rank: int) -> str:
    """The name that messages give to a completion: the column that it stood in."""
    row = canonical["row"]
    if _is_scored(row):
        return f"'completions' number {_best_first(row['scores'])[rank] + 1}"
    if rank == 0:
        return "'chosen'"
    return f"'rejected' number {rank}" if is_several(row.get("rejected")) else "'rejected'"


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
        if problem := _problem_of(completion):
            raise ValueError(f"column {column_of(row, rank)}{problem}")
        last = completion[-1] if isinstance(completion, list) and completion else {"content": completion}
        says = text_of(last).strip() or last.get("tool_calls") or last.get("function_call")
        if not says and last.get("role") != "user":
            raise NothingToLearn(f"column {column_of(row, rank)} is empty")
    best = column_of(row, 0)
    for rank, completion in enumerate(completions):
        if isinstance(completion, list) != isinstance(completions[0], list):
            other = column_of(row, rank)
            raise ValueError(f"columns {best} and {other} differ in kind: both must be text, or both lists of messages")
    if isinstance(prompt, list) and isinstance(completions[0], str):
        raise ValueError(f"column 'prompt' is a list of messages but {best} is text: make both the same kind")
    if all(completion == completions[0] for completion in completions):
        raise NothingToLearn(f"columns {best} and {column_of(row, 1)} are equal: there is no preference to learn")


def _check_unread(row: dict) -> None:
    """Refuses a row of whose question or system message nobody would read: it stands in a column of another name."""
    source, prompt, completions = row["row"], row["prompt"], row["completions"]
    unread = {name: texts for name, value in source.items() if name not in READ and (texts := _texts(value))}
    said = "\n".join(_texts([prompt, completions]))
    asks = prompt if isinstance(prompt, str) else any(m["role"] == "user" for m in (prompt or []))
    asks = asks or (
        isinstance(completions[0], list) and completions[0][:1] and completions[0][0]["role"] != "assistant"
    )
    asked = said if asks else os.path.commonprefix(completions) if isinstance(completions[0], str) else ""
    for name, texts in unread.items():
        where = f"nobody reads the columns {', '.join(map(repr, unread))}" if len(unread) > 1 else "nobody reads it"
        if all(text in asked for text in texts):
            continue
        if name.lower() in SYSTEMS:
            raise ValueError(
                f"column {name!r} stands beside 'prompt': {where}; put it there as a message of role system"
            )
        if name.lower() in CONTEXTS and prompt:
            raise ValueError(f"column {name!r} stands beside 'prompt': {where}; put it there, or leave out the column")
        if re.search(QUESTIONS, name.lower()) and not re.search(NO_QUESTIONS, name.lower()) and not asks:
            raise ValueError(f"column {name!r} has what seems to be the prompt: {where}; rename it to prompt")


def _texts(value) -> list[str]:
    """All that a text, or messages in any depth, say."""
    if isinstance(value, dict):
        said = value.get("content") or value.get("value")
        value = [said] if said else [each for key, each in value.items() if key not in ("role", "from")]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value.strip()] if isinstance(value, str) and value.strip() else []


def _parsed(value, column: str):
    """Messages that were stored as text (JSON, or Python's repr of them as pandas writes it) as messages."""
    if not isinstance(value, str) or not re.match(r"\s*(array\()?\s*\[?\s*\{", value):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            messages = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        messages = [messages] if isinstance(messages, dict) and {"role", "content"} <= messages.keys() else messages
        if isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages):
            return messages
        if isinstance(messages, list) and all(isinstance(m, dict) and {"from", "value"} <= m.keys() for m in messages):
            raise ValueError(f"column {column} has messages of from and value: write them as role and content")
        return value  # JSON that somebody answered
    if re.search(r"""['"]role['"]\s*:""", value) and re.search(r"""['"]content['"]\s*:""", value):
        what = f"column {column} looks like messages stored as text, and cannot be parsed"
        raise ValueError(f"{what}: store a list of them")
    return value


def _from_json(value, column: str):
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"column {column!r} is not valid JSON: {error}") from error


def _number(value, column: str) -> float:
    """A number, also where a CSV file has it as text; a weight is not negative."""
    try:
        number = float(value) if isinstance(value, str | Decimal) else value
    except ValueError:
        number = None
    if not _is_number(number) or isinstance(number, bool):
        raise ValueError(f"column {column!r} is {value!r}: it must be a number")
    if column == "weight" and number < 0:
        raise ValueError(f"column 'weight' is {value!r}: it must be at least 0")
    return number


def _problem_of(value) -> str | None:
    """What is wrong with a prompt or a completion, in words that follow its column's name; None if nothing is."""
    if isinstance(value, str):
        return _problem_of_text(value)
    if not isinstance(value, list):
        return f" is {type(value).__name__}: it must be text or a list of messages"
    for number, message in enumerate(value, start=1):
        if problem := _problem_of_message(message):
            return f", message {number} {problem}"
    return None


def _problem_of_text(text: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f" has half a character (a lone surrogate) at {error.start + 1}: mend it"
    return None


def _problem_of_message(message) -> str | None:
    if not isinstance(message, dict):
        return f"is {type(message).__name__}: it must be an object with role and content"
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    older = message.get("function_call")  # OpenAI's, of one call
    if not isinstance(role, str):
        return "has no 'role'"
    if role not in ROLES:
        return f"has the role {role!r}: write one of {', '.join(ROLES[:5])}"
    if older is not None and not isinstance(older, dict):
        return "has a 'function_call' that is no object"
    if content is None and not calls and not older:
        return "has no 'content'"
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            return f"has a part of type {kind!r}: it must be text, or image for a model that sees"
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            return "has a part of type 'text' without its text"
        if part["type"] == "image" and role == "assistant":
            return "is the assistant's and has a picture: only prompts may"
    if content is not None and not isinstance(content, str | list):
        return f"has a 'content' that is {type(content).__name__}: it must be text"
    if content is not None and (problem := _problem_of_text(text_of(message))):
        return problem.strip()
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return "has 'tool_calls' that are not a list of objects"
    return None


def is_several(value) -> bool:
    """Whether a value holds several completions: a list of texts, of conversations or of token ids."""
    return isinstance(value, list) and any(isinstance(each, str | list) for each in value)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def first_line(error: Exception) -> str:
    """The first line of an error's words, or its name: what fits into a message of one line."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first
