# %% [markdown]
# # 5. The preferences
#
# A preference pair is a prompt with two answers to it, of which somebody prefers one: the *chosen* one to the
# *rejected* one. DPO needs nothing else: no scores, no model of rewards.
#
# Where do pairs come from? Usually from people. Here we do much as the DPO paper does in its first experiment
# (Rafailov et al. 2023, section 6 and appendix C): the SFT model itself writes six answers to each prompt, and a
# *ground-truth reward* says which are the better ones. There it is a sentiment classifier, here it counts praising and
# scolding words (`dpo/example/reviews.py`). Because we know the truth, we can measure later whether the model has
# learned it.
#
# That the answers come from the model that we will train matters: DPO can best shift what the model already does.
#
# The pairs inside the package were made by `python tutorials/05_preference_pairs.py --output dpo/example`, in about a
# minute; with `--prompts 4` you only see it run.

# %%
import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.config import EXAMPLE
from dpo.example.reviews import invent_film, reward, write_prompt

parser = argparse.ArgumentParser(description="Sample answers from the SFT model and make preference pairs of them.")
parser.add_argument("--model", type=Path, default=EXAMPLE.parent / "model", help="what tutorial 4 made")
parser.add_argument("--output", type=Path, default=Path("my-example"), help="where train.jsonl and test.jsonl go")
parser.add_argument("--prompts", type=int, default=800, help="training prompts; a tenth as many more for the test")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line of ours

# With the seeds fixed, running this again on the same machine gives the same pairs.
rng = random.Random(1)
torch.manual_seed(1)

tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(args.model).eval()

# %% [markdown]
# ## Six answers to every prompt
#
# Sampled at temperature 1, which is the model's own distribution. The prompts of one batch differ in length, so they
# are padded on the left: each one then ends where its answer begins.

# %%
ANSWERS = 6


@torch.no_grad()
def sample_answers(prompts: list[str], batch_size: int = 32) -> list[list[str]]:
    """For each user message, the model's answers to it: those that came to an end, without repeats."""
    answers = []
    for start in range(0, len(prompts), batch_size):
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
            for p in prompts[start : start + batch_size]
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        outputs = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=128, num_return_sequences=ANSWERS
        )
        completions = outputs[:, inputs["input_ids"].shape[1] :]
        for rows in completions.split(ANSWERS):
            # An answer that was cut off at the token limit has no <|end|>; the model should not learn to write such.
            whole = [row for row in rows if tokenizer.eos_token_id in row]
            decoded = (tokenizer.decode(row, skip_special_tokens=True) for row in whole)
            answers.append(list(dict.fromkeys(text for text in decoded if text.strip())))
    return answers


# %% [markdown]
# ## The best and the worst make a pair
#
# The paper takes four answers and makes six pairs of them, each answer against each other one. We take six answers
# and make one pair: those that the ground truth finds best and worst. Such a pair says its point clearly, and pairs
# from many prompts have less in common. Where all answers are equally good, there is nothing to prefer: no pair.
#
# The two scores are kept as columns of their own to look at; the training does not use them.


# %%
def make_pair(prompt: str, answers: list[str]) -> dict | None:
    """The best and the worst answer, in the conversational format: lists of messages. None if no answer is better."""
    if not answers:
        return None
    scores = [reward(prompt, answer) for answer in answers]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        return None
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": answers[best]}],
        "rejected": [{"role": "assistant", "content": answers[worst]}],
        "score_chosen": scores[best],
        "score_rejected": scores[worst],
    }


# %% [markdown]
# ## The two files
#
# The test prompts ask about films with held-out titles, which neither tutorial 4 nor the training pairs ever name.

# %%
args.output.mkdir(parents=True, exist_ok=True)
for name, count in (("train", args.prompts), ("test", max(1, args.prompts // 10))):
    prompts = [write_prompt(rng, invent_film(rng, held_out=name == "test")) for _ in range(count)]
    answers = sample_answers(prompts)
    pairs = [pair for prompt, texts in zip(prompts, answers, strict=True) if (pair := make_pair(prompt, texts))]

    with open(args.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)

    rewards = [reward(prompt, text) for prompt, texts in zip(prompts, answers, strict=True) for text in texts]
    print(
        f"{name}: {count} prompts with {len(rewards)} different answers, mean reward {sum(rewards) / len(rewards):+.2f}"
    )
    print(f"  {len(pairs)} of them ({len(pairs) / count:.0%}) give a pair -> {args.output / name}.jsonl")
    for pair in pairs[:2]:
        print(f"  prompt:   {pair['prompt'][0]['content']}")
        print(f"  chosen:   {pair['chosen'][0]['content']} ({pair['score_chosen']:+.0f})")
        print(f"  rejected: {pair['rejected'][0]['content']} ({pair['score_rejected']:+.0f})\n")
