"""Talk to a trained model: `python -m dpo.chat --model_name_or_path DIR`. With --prompt it answers once and ends."""

import argparse
import sys

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from dpo import models
from dpo.rows import first_line

HELP = "/reset forgets the conversation, /quit ends it (so does Ctrl-D); Ctrl-C stops an answer."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dpo.chat", description=__doc__)
    parser.add_argument("--model_name_or_path", required=True, help="Hub name or directory, an adapter's too")
    parser.add_argument("--prompt", help="answer this and end")
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
        (0 <= args.seed < 2**32, "--seed must be at least 0, and below 2**32"),
    ):
        if not is_right:
            sys.exit(f"error: {words}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name, trust = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    try:
        model = models.load_model(name, dtype=args.dtype, **trust).eval()
        tokenizer = models.load_processor(name, **trust)
    except ValueError as error:
        sys.exit(f"error: {error}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}

    start = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    if args.prompt is not None:
        try:
            answer(model, tokenizer, [*start, {"role": "user", "content": args.prompt}], sampling)
        except ValueError as error:
            sys.exit(f"error: {error}")
    else:
        converse(model, tokenizer, start, sampling)


def converse(model: torch.nn.Module, tokenizer, start: list[dict], sampling: dict) -> None:
    print(HELP)
    messages = list(start)
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
            messages = list(start) if text == "/reset" else messages
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, sampling)})
            except KeyboardInterrupt:
                messages.pop()  # the question goes with the answer that was cut short
                print("(stopped)")
            except ValueError as error:
                messages.pop()
                print(f"({error})")


def answer(model: torch.nn.Module, tokenizer, messages: list[dict], sampling: dict) -> str:
    """Prints the answer to a conversation while it is made, and returns it. Without a chat template the model goes on
    from the last message's text. Raises: ValueError in one line if the template or the model cannot take it."""
    if tokenizer.chat_template:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            inputs = tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template cannot take this conversation: {first_line(error)}") from error
    else:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    length, limit = (
        inputs["input_ids"].shape[1],
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
    )
    if limit is not None and length >= limit:
        raise ValueError(f"the conversation has {length} tokens, the model reads {limit}: make it shorter")
    if not length:
        raise ValueError("there is nothing to answer: write something")
    if getattr(model.config, "output_router_logits", False):
        sampling = {**sampling, "output_router_logits": False}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        ids = model.generate(**inputs, **sampling, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
