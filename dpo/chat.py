"""Talk to a trained model: `python -m dpo.chat --model_name_or_path DIR`. With --prompt it answers once and ends."""

import argparse
import sys

import torch
from transformers import TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from dpo import models

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
    parser.add_argument("--dtype", default="auto", help="of the weights: auto (as saved), float32, bfloat16, float16")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name, trust = args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    try:
        model = models.load_model(name, dtype=args.dtype, **trust).eval()
        tokenizer = models.load_tokenizer(name, **trust)
    except ValueError as error:
        sys.exit(f"error: {error}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(args.seed)
    sampling = {"do_sample": args.temperature > 0, "max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0}

    start = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    if args.prompt is not None:
        answer(model, tokenizer, [*start, {"role": "user", "content": args.prompt}], sampling)
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


def answer(model: torch.nn.Module, tokenizer, messages: list[dict], sampling: dict) -> str:
    """Prints the answer to a conversation while it is made, and returns it. Without a chat template the model goes on
    from the last message's text."""
    if tokenizer.chat_template:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = tokenizer.apply_chat_template(messages, **options)
    else:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.no_grad():
        ids = model.generate(**inputs, **sampling, streamer=streamer, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
