"""From conversation to text: the prompt that completions share, and what a chat template makes of them.

A row is trained as a chat user would meet it, or refused: the assistant's words are scored and those of others are not,
a turn ends with the token that ends it, and nothing that the row says is left out.
"""

import datetime
import functools
import itertools
import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from dpo.rows import NothingToLearn, column_of, first_line, text_of

NO_VARIABLES = ("conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message")
# Keys of a message beside its content that say something, too.
SAID = """reasoning_content reasoning thinking thought thoughts reasoning_details thinking_blocks images image audio
video""".split()


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
            return prompt[:cut], [completion[cut:] for completion in completions]
        # A prompt of a few words that all completions begin with was written twice: once in its own column.
        twice = len(prompt.split()) > 3 and all(completion.startswith(prompt) for completion in completions)
        return prompt, [completion[len(prompt) if twice else 0 :] for completion in completions]
    prompt, *completions = (_with_parsed_calls(_without_nulls(value)) for value in (prompt, *completions))
    if isinstance(prompt, list) and prompt:
        repeated = all(completion[: len(prompt)] == prompt for completion in completions)
        return prompt, [completion[len(prompt) if repeated else 0 :] for completion in completions]
    parted = (i for i, each in enumerate(zip(*completions, strict=False)) if any(other != each[0] for other in each))
    shared = next(parted, min(map(len, completions)))
    start = completions[0][:shared]
    if prompt and not any(message["role"] == "user" for message in start):
        start = [{"role": "user", "content": prompt}] + start
    elif prompt and not any(prompt.strip() in text_of(message) for message in start):
        raise ValueError("column 'prompt' is not what the conversations begin with: leave one of the two out")
    return start, [completion[shared:] for completion in completions]


def _with_parsed_calls(messages):
    """Messages whose tool calls have their arguments as an object: templates write them as JSON, and what is JSON
    already (OpenAI's form) would be written as a text in quotes."""
    if not isinstance(messages, list):
        return messages
    parsed = []
    for message in messages:
        message, calls = dict(message), []
        if message.get("function_call"):  # as OpenAI had it before there could be several
            message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if isinstance(arguments, str):
                try:
                    function = {**function, "arguments": json.loads(arguments or "{}")}
                except (ValueError, RecursionError) as error:
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
        calls = value.get("tool_calls")  # beside them templates ask whether the content is None
        kept = {key: item for key, item in value.items() if item is not None or (calls and key == "content")}
        return {key: item if key == "arguments" else _without_nulls(item) for key, item in kept.items()}
    return value


def render_row(row: dict, processing_class, chat_template_kwargs: dict | None = None, today: str | None = None) -> dict:
    """A canonical row to text: {"prompt", "completions", "turns", "closed", "templated", "unstable"}.

    Conversations go through the chat template: the prompt with its generation prompt, and each completion as what the
    whole conversation has beyond that, up to the token that ends its last turn (it is `closed`; else an EOS will).
    A template that renders the whole otherwise than it began (`unstable`) is split where the renderings part.

    Args: chat_template_kwargs, variables of the template; the row's own win over them; today, as 2026-01-31, for
    templates that write the date (by default the clock's: rows would be others tomorrow).
    Returns: completions, a list of texts, best first; turns, the same cut into (text, whether it is scored): of several
    messages only what the assistant says is. Raises: ValueError that names the column, where roles are not those of
    a completion, the template fails, or it leaves out something that the row says.
    """
    prompt, completions = split_prompt(row["prompt"], row["completions"])
    if row["images"]:
        prompt, completions = with_places(prompt, completions, len(row["images"]), processing_class)
        row = {**row, "completions": completions} if isinstance(row["completions"][0], str) else row
    if isinstance(completions[0], str):
        kwargs = chat_template_kwargs or row["chat_template_kwargs"]
        for what, value in (("column 'tools'", row["tools"]), ("chat_template_kwargs", kwargs)):
            if value:
                raise ValueError(f"{what}: it is for a chat template, the row is text: leave it out, or write messages")
        for rank, text in enumerate(completions):
            _check_no_turns_within(text, column_of(row, rank), turn_tokens(processing_class))
        turns = [split_text(prompt, text, column_of(row, rank)) for rank, text in enumerate(completions)]
        _check_places(prompt, completions, len(row["images"]), processing_class)
        whole = {"turns": turns, "closed": [False] * len(completions)}
        return {"prompt": prompt, "completions": completions, **whole, "templated": False, "unstable": False}
    if getattr(processing_class, "chat_template", None) is None:
        name = getattr(processing_class, "name_or_path", "")
        raise ValueError(f"it is a conversation and the tokenizer {name!r} has no chat template: take one that has")
    _check_roles(row, prompt, completions)
    options = {**(chat_template_kwargs or {}), **(row["chat_template_kwargs"] or {})}
    for key in options:
        if key in NO_VARIABLES or not reads_variable(str(processing_class.chat_template), key):
            raise ValueError(f"chat_template_kwargs has {key!r}, which the chat template has no use for: leave it out")
    options["tools"] = _without_nulls(row["tools"])
    if today is not None and isinstance(processing_class.chat_template, str):
        options["chat_template"] = with_date(processing_class.chat_template, today)

    has_calls = any(message.get("tool_calls") for message in itertools.chain(prompt, *completions))
    as_text = has_calls and takes_arguments_as_text(processing_class, str(processing_class.chat_template))
    in_parts = takes_parts(processing_class, str(processing_class.chat_template))
    if row["images"] and not in_parts:
        raise ValueError("it has pictures, and the chat template takes none: leave them out, or take a model that sees")

    def render(messages: list[dict], **more) -> str:
        messages = with_text_arguments(messages) if as_text else messages
        messages = with_parts(messages) if in_parts else messages
        return processing_class.apply_chat_template(messages, tokenize=False, **{**options, **more})

    before, wholes = None, []
    try:
        before = render(prompt, add_generation_prompt=True) if prompt else ""
        for completion in completions:
            whole = render(prompt + completion)
            whole.encode("utf-8")
            wholes.append(whole)
    except Exception as error:  # a template is a program of somebody else's: it may raise anything
        column = "'prompt'" if before is None and row["prompt"] else column_of(row, len(wholes))
        raise ValueError(f"column {column} does not fit the chat template: {first_line(error)}") from error
    for rank, (completion, whole) in enumerate(zip(completions, wholes, strict=True)):
        _check_all_is_rendered(row, rank, prompt, completion, whole, render)
    start, turns = os.path.commonprefix([before, *wholes]), []
    _check_places(start, [whole[len(start) :] for whole in wholes], len(row["images"]), processing_class)
    asked = text_of(prompt[-1]).strip() if prompt else ""
    if asked in before and asked not in start:
        raise ValueError("column 'prompt': the chat template writes it otherwise when an answer follows: take another")
    end, tokens = turn_end(processing_class, str(processing_class.chat_template)), turn_tokens(processing_class)
    tokens += (end.within, end.between) if end else ()
    for rank, (completion, whole) in enumerate(zip(completions, wholes, strict=True)):
        try:
            turns.append(split_turns(prompt, completion, whole, start, end, tokens, render))
        except ValueError as error:
            raise ValueError(f"column {column_of(row, rank)} {error}") from error
    texts = ["".join(text for text, _ in turn) for turn in turns]
    cut = {"turns": turns, "closed": [text.endswith(tokens) for text in texts]}
    return {"prompt": start, "completions": texts, **cut, "templated": True, "unstable": start != before}


class TurnEnd(NamedTuple):
    """What a chat template writes behind an assistant's message that is the last: all of it, and that up to the token
    which ends the turn; and the token that ends it where another message follows."""

    tail: str
    within: str
    between: str


def split_text(prompt: str, completion: str, column: str) -> list[tuple[str, bool]]:
    """A completion that is text as (text, whether it is scored): all of it; in Anthropic's HH format, where it goes on
    for several turns, what the assistant says."""
    if not prompt.endswith("\n\nAssistant:") or "\n\nHuman:" not in completion:
        return [(completion, True)]
    parts = re.split(r"(\n\nHuman:.*?\n\nAssistant:)", completion, flags=re.DOTALL)  # assistant, human, assistant, ...
    if "\n\nHuman:" in parts[-1]:
        raise ValueError(f"column {column} ends with what the human says: a completion ends with the assistant's turn")
    return [(text, number % 2 == 0) for number, text in enumerate(parts) if text]


def split_turns(
    prompt: list[dict], completion: list[dict], whole: str, start: str, end: TurnEnd | None, tokens: tuple, render
) -> list[tuple[str, bool]]:
    """The text of a completion as (text, whether it is scored): the assistant's messages are, each with what ends its
    turn (see `turn_end`; tokens, others that may); other roles' messages and what stands between are not."""
    turns, position, problem = [], len(start), "has several turns, and the chat template changes a turn when another "
    for number, message in enumerate(completion):
        if message["role"] != "assistant":
            continue
        opened, is_last = start, number + 1 == len(completion)
        if number:
            opened = render(prompt + completion[:number], add_generation_prompt=True)
            opened = os.path.commonprefix([opened, whole])  # the prompt may open a reasoning, which the whole has not
            if text_of(completion[number - 1]).strip() not in opened[position:]:
                raise ValueError(f"{problem}follows: cut the row")
        closed = whole if is_last else render(prompt + completion[: number + 1])
        if end and closed.endswith(end.tail):
            stop = len(closed) - len(end.tail) + len(end.within)
        elif closed.rstrip().endswith(tokens):  # a turn that ends otherwise, as one with a tool call may
            stop = len(closed.rstrip())
        else:
            stop = len(closed)
        if not whole.startswith(closed[:stop]):  # Qwen3 leaves out an empty reasoning, gpt-oss ends a turn otherwise
            said = whole.find(text_of(message).strip(), len(opened))
            stop = whole.find(end.between, said) + len(end.between) if end and said >= 0 else 0
            if stop <= len(opened):
                raise ValueError(f"{problem}follows: cut the row")
        turns += [(whole[position : len(opened)], False)] if len(opened) > position else []
        turns.append((whole[len(opened) : stop], True))
        position = stop
    return turns


@functools.lru_cache(maxsize=8)
def turn_end(processing_class, _template) -> TurnEnd | None:
    """How a chat template ends an assistant's turn; None if no token does. A model writes that token and stops: what
    the template puts behind it (a newline, an EOS) it never writes, and training on it would only cost nats."""
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "probe"}
    try:
        tail, followed = (
            processing_class.apply_chat_template(messages, tokenize=False).rpartition("probe")[2]
            for messages in ([user, said], [user, said, user])
        )
    except Exception:  # a template that wants other messages
        return None
    shared = os.path.commonprefix([tail, followed])  # what belongs to the turn, and not to the end of the whole
    tokens = [token for token in tokenizer_of(processing_class).get_added_vocab() if token.strip()]
    within = shared if any(token in shared for token in tokens) else tail
    ends = [within.rindex(token) + len(token) for token in tokens if token in within]
    between = [(followed.index(token), token) for token in tokens if token in followed]
    return TurnEnd(tail, tail[: max(ends)], min(between)[1]) if ends and between else None


@functools.lru_cache(maxsize=8)
def takes_arguments_as_text(processing_class, _template) -> bool:
    """Whether a chat template joins a call's arguments to other text (DeepSeek-V3's does), and fails on objects."""
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"a": "probe"}}}

    def is_rendered(written: Callable) -> bool:
        for content in ("", None):
            messages = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": content, "tool_calls": [call]},
            ]
            try:
                if "probe" in processing_class.apply_chat_template(written(messages), tokenize=False):
                    return True
            except Exception:  # whatever a template raises
                continue
        return False

    return not is_rendered(list) and is_rendered(with_text_arguments)


def with_text_arguments(messages: list[dict]) -> list[dict]:
    """Messages whose tool calls have their arguments as JSON text."""

    def written(call: dict) -> dict:
        function = call.get("function", call)
        function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
        return {**call, "function": function} if "function" in call else function

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def with_places(prompt, completions: list, count: int, processing_class) -> tuple:
    """(prompt, completions) with places for a row's pictures: where none of its messages has one they come before the
    first thing that the user says; texts become a conversation, unless they have the processor's own sign for them."""
    picture = [{"type": "image"}] * count
    if isinstance(completions[0], str):
        if (image_token(processing_class) or "") in (prompt or "") or not processing_class.chat_template:
            return prompt, completions
        said = [{"type": "text", "text": prompt}] if prompt else []
        completions = [[{"role": "assistant", "content": text}] for text in completions]
        return [{"role": "user", "content": [*picture, *said]}], completions
    if any(isinstance(message.get("content"), list) for message in prompt):
        return prompt, completions
    first = next((number for number, message in enumerate(prompt) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(
            "it has pictures, and no message of the user's before the answer: write {'type': 'image'} parts"
        )
    said = [{"type": "text", "text": text_of(prompt[first])}]
    return [*prompt[:first], {**prompt[first], "content": [*picture, *said]}, *prompt[first + 1 :]], completions


def with_parts(messages: list[dict]) -> list[dict]:
    """Messages whose content is a list of parts throughout, as the templates of processors want it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


@functools.lru_cache(maxsize=8)
def takes_parts(processing_class, _template) -> bool:
    """Whether a processor's chat template wants the content of messages as parts, and writes what is in them."""
    if not sees(processing_class):
        return False
    parts = [{"type": "image"}, {"type": "text", "text": "probe"}]
    try:
        text = processing_class.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except Exception:  # whatever a template raises
        return False
    return "probe" in text and "'text'" not in text  # else it wrote the list as Python does


def _check_places(start: str, completions: list[str], count: int, processing_class) -> None:
    """Refuses a text that has not a place for each picture, or has one outside of the prompt."""
    token = image_token(processing_class)
    if token and start.count(token) != count:
        how = f"write {token} where it belongs" if count else "add a column images, or leave it out"
        raise ValueError(f"the prompt has {start.count(token)} places {token} for {count} pictures: {how}")
    if token and any(token in completion for completion in completions):
        raise ValueError(f"a completion has a place {token} for a picture: only prompts may")


@functools.lru_cache(maxsize=8)
def turn_tokens(processing_class) -> tuple[str, ...]:
    """The texts of a tokenizer's special tokens, which nobody writes into an answer: one of them ends a turn."""
    added = tokenizer_of(processing_class).added_tokens_decoder.values()
    return tuple(token.content for token in added if token.special and token.content.strip())


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
        for number, message in enumerate(completion[:-1], start=total - len(completion) + 1):
            says = [message.get(key) for key in ("content", "tool_calls", *SAID)]
            if message["role"] == "assistant" and not any(says):
                raise ValueError(f"column {column}, message {number} is empty: the model would learn to say nothing")


def _check_all_is_rendered(row: dict, rank: int, prompt: list, completion: list, whole: str, render) -> None:
    """Refuses a row of which the chat template leaves out a message, a tool call, the reasoning, or the tools."""

    def is_left_out(**changed) -> bool:
        try:
            return render(changed.pop("messages", messages), **changed) == whole
        except Exception:  # it asks for what was taken away
            return False

    messages, offset = prompt + completion, len(row["completions"][rank]) - len(completion)
    plainly = all_in_order([text_of(message) for message in messages], whole)
    for number, message in enumerate(messages):
        in_prompt = number < len(prompt)
        keys = ("content", "tool_calls") if in_prompt else ("content", "tool_calls", *SAID)
        for key in keys:
            value, lost = message.get(key), False
            if not value or (key == "content" and plainly):
                continue
            if not in_prompt and message["role"] == "assistant" and isinstance(value, str):
                lost = not all(line.strip() in whole for line in value.splitlines())
            less = {name: each for name, each in message.items() if name != key}
            less = {**less, "content": ""} if key == "content" else less
            all_of_it = is_left_out(messages=[*messages[:number], less, *messages[number + 1 :]])
            for which in range(len(value)) if key == "tool_calls" and len(value) > 1 else ():
                fewer = {**message, key: value[:which] + value[which + 1 :]}
                lost = lost or is_left_out(messages=[*messages[:number], fewer, *messages[number + 1 :]])
            if lost or all_of_it:
                column = "'prompt'" if in_prompt else column_of(row, rank)
                where = f"column {column}, message {number + 1 if in_prompt else number - len(prompt) + offset + 1}"
                what = f"its {key}" if all_of_it else f"part of its {key}"
                raise ValueError(f"{where}: the chat template leaves out {what}: take another, or mend the row")
    if row["tools"] and is_left_out(tools=None):
        raise ValueError("column 'tools': the chat template leaves tools out: take another, or leave out the column")


def _check_no_turns_within(text: str, column: str, tokens: tuple) -> None:
    """Refuses a completion that is text and goes on behind a special token: another's turn would be trained."""
    for token in tokens:
        if token in text.rstrip().removesuffix(token):
            raise ValueError(f"column {column} has the token {token} within: store messages, or cut it there")


def with_date(template: str, today: str) -> str:
    """A chat template that writes this date, as 2026-01-31, where it would ask the clock."""

    def written(call: re.Match) -> str:
        return repr(datetime.date.fromisoformat(today).strftime(call[2]))

    return re.sub(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""", written, template)


def reads_variable(template: str, name: str) -> bool:
    """Whether a chat template asks for a variable that it does not set itself."""
    name = re.escape(name)
    is_set = re.search(rf"\b(for|set)\s+{name}\b", template)
    return not is_set and bool(re.search(rf"(?<![\w.'\"]){name}(?![\w'\"(])", template))


def all_in_order(contents: list[str], whole: str) -> bool:
    """Whether texts stand one after the other in a rendering, so that no look at each is needed: a few characters may
    stand anywhere, in the name of a role."""
    position = 0
    for content in (content.strip() for content in contents):
        position = whole.find(content, position) + len(content)
        if position < len(content) or 0 < len(content) < 8:
            return False
    return True


def sees(processing_class) -> bool:
    """Whether it prepares pictures, too: a processor, not a tokenizer."""
    return getattr(processing_class, "image_processor", None) is not None


def image_token(processing_class) -> str | None:
    """What a processor wants to see in a text where a picture belongs, if it says so."""
    token = getattr(processing_class, "image_token", None) if sees(processing_class) else None
    return None if token is None else str(token)


def tokenizer_of(processing_class):
    return getattr(processing_class, "tokenizer", processing_class)
