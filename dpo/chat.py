"""Talk to a trained model: `python -m dpo.chat --model_name_or_path DIR`. With --prompt it answers once and ends; with
--compare REF a second model answers beside it, by the same noise; with --image FILE the first question shows a
picture."""

import argparse
import shutil
import sys
import textwrap
from contextlib import nullcontext

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from dpo import models
from dpo.checks import check_answers
from dpo.conversations import image_token, sees, takes_parts, tokenizer_of, with_parts
from dpo.data import image_inputs, tokenize_row, wants_bos
from dpo.distributed import unwrap
from dpo.images import as_stored
from dpo.reference import without_aux_loss
from dpo.rows import first_line, text_of

HELP = "/reset forgets the conversation, /quit ends it (so does Ctrl-D); Ctrl-C stops an answer."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dpo.chat", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Hub name or directory, an adapter's too")
    parser.add_argument("--compare", metavar="REF", help="another one, whose answers are shown beside")
    parser.add_argument("--prompt", help="answer this and end")
    parser.add_argument("--image", action="append", default=[], help="picture of the first question; may be repeated")
    parser.add_argument("--system_prompt", help="stands before the conversation")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from the likeliest tokens of this share")
    parser.add_argument("--seed", type=int, default=0)
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto is as saved")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    for is_right, words in (
        (args.max_new_tokens >= 1, "--max_new_tokens must be at least 1"),
        (0 <= args.temperature < float("inf"), "--temperature must be a number, 0 or above"),
        (0 < args.top_p <= 1, "--top_p must be above 0, at most 1"),
        (args.compare != args.model_name_or_path, "--compare names the model itself: name another one"),
        (0 <= args.seed < 2**32, "--seed must be at least 0, and below 2**32"),
    ):
        if not is_right:
            sys.exit(f"error: {words}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    speakers = {}
    try:
        for name in filter(None, (args.model_name_or_path, args.compare)):
            trust = {"trust_remote_code": args.trust_remote_code}
            model = models.load_model(name, dtype=args.dtype, **trust).eval()
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            speakers[name] = (model, models.load_processor(name, **trust))
            if not (args.image and sees(speakers[name][1])):  # some that see answer nothing without a picture
                check_answers(*speakers[name])
        if args.image and not all(sees(processor) for _, processor in speakers.values()):
            raise ValueError("--image is for a model that sees: leave it out")
        images = [as_stored(image) for image in args.image]
    except ValueError as error:
        sys.exit(f"error: {error}")
    set_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}

    start = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    if args.prompt is not None:
        try:
            answers_of(speakers, {name: [*start, question(args.prompt, images)] for name in speakers}, images, sampling)
        except ValueError as error:
            sys.exit(f"error: {error}")
    else:
        converse(speakers, start, images, sampling)


def question(text: str, images: list) -> dict:
    places = [{"type": "image"}] * len(images)
    return {"role": "user", "content": [*places, {"type": "text", "text": text}] if images else text}


def converse(speakers: dict, start: list[dict], images: list, sampling: dict) -> None:
    """Asks and answers until the end of input. Each of the speakers, {name: (model, processor)}, has a conversation of
    its own: to the same questions its own answers."""
    print(HELP)
    said = {name: list(start) for name in speakers}
    while True:
        try:
            text = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text.startswith("/"):
            print("(forgotten)" if text == "/reset" else HELP)
            said = {name: list(start) for name in speakers} if text == "/reset" else said
        elif text:
            asked = question(text, images if not any(m["role"] == "user" for m in next(iter(said.values()))) else [])
            try:
                answers = answers_of(speakers, {name: [*said[name], asked] for name in speakers}, images, sampling)
                for name, answer_ in answers.items():
                    said[name] += [asked, {"role": "assistant", "content": answer_}]
            except KeyboardInterrupt:  # the question goes with the answer that was cut short
                print("(stopped)")
            except ValueError as error:
                print(f"({error})")


def answers_of(speakers: dict, said: dict[str, list[dict]], images: list, sampling: dict) -> dict[str, str]:
    """{name: its answer to its conversation}; printed while it is made where one speaks, side by side where two do."""
    if len(speakers) == 1:
        ((name, (model, processor)),) = speakers.items()
        return {name: answer(model, processor, said[name], sampling, images=images)}
    answers = {}
    for name, (model, processor) in speakers.items():
        with torch.random.fork_rng() if name == next(iter(speakers)) else nullcontext():  # the same noise for both
            answers[name] = answer(model, processor, said[name], sampling, images=images, streams=False)
    print(side_by_side(answers, width=shutil.get_terminal_size().columns))
    return answers


def side_by_side(texts: dict[str, str], *, width: int) -> str:
    """Texts in columns under their names, wrapped to fit."""
    own = (width - 3 * (len(texts) - 1)) // len(texts)
    columns = []
    for name, text in texts.items():
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, own) or [""]]
        columns.append([name[-own:], "─" * own, *lines])
    height = max(map(len, columns))
    rows = zip(*(column + [""] * (height - len(column)) for column in columns), strict=True)
    return "\n".join(" │ ".join(cell.ljust(own) for cell in row).rstrip() for row in rows)


def answer(
    model: torch.nn.Module, processor, messages: list[dict], sampling: dict, *, images: list = (), streams: bool = True
) -> str:
    """The answer to a conversation with its pictures; streams, printed while it is made. Without a chat template the
    model goes on from the last message's text. Raises: ValueError in one line if the template or the model cannot
    take it."""
    tokenizer = tokenizer_of(processor)
    if processor.chat_template:
        messages = with_parts(messages) if takes_parts(processor, str(processor.chat_template)) else messages
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template cannot take this conversation: {first_line(error)}") from error
        special = sees(processor) and wants_bos(text, processor)
    else:
        text = (image_token(processor) or "") * len(images) + text_of(messages[-1])
        special = not images or wants_bos(text, processor)
    reads_apart = getattr(model.config, "is_encoder_decoder", False)
    if images:
        inputs = image_inputs(text, images, processor, add_special_tokens=special)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    elif reads_apart and not processor.chat_template:  # as its rows are
        row = tokenize_row({"prompt": text, "chosen": "", "rejected": ""}, processor, add_special_tokens=True)
        inputs = {"input_ids": torch.tensor([row["prompt_input_ids"]])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        inputs = tokenizer(text, add_special_tokens=special, return_tensors="pt")
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    length, limit = (
        inputs["input_ids"].shape[1],
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    if limit is not None and length >= limit:
        raise ValueError(f"the conversation has {length} tokens, the model reads {limit}: make it shorter")
    if not length:
        raise ValueError("there is nothing to answer: write something")
    streamer = TextStreamer(tokenizer, skip_prompt=not reads_apart, skip_special_tokens=True) if streams else None
    try:
        with torch.no_grad(), without_aux_loss(model):
            ids = model.generate(**inputs, **sampling, streamer=streamer, pad_token_id=tokenizer.pad_token_id)[0]
    except Exception as error:  # of one of many families' own ways to generate
        raise ValueError(f"{type(unwrap(model)).__name__} cannot answer this: {first_line(error)}") from error
    return tokenizer.decode(ids if reads_apart else ids[length:], skip_special_tokens=True)


if __name__ == "__main__":
    main()
