# %% [markdown]
# # 4. The model to begin with
#
# Direct Preference Optimization teaches a language model which of two answers people like better. It does not teach the
# language itself: it starts from a model that already writes answers of the right kind, and only shifts which of them
# it writes more often. Making that first model is called *supervised fine-tuning* (SFT): we show it questions with
# answers, and it learns to continue the one with the other.
#
# Here we make such a model from nothing, small enough for a laptop's processor. It writes reviews of films that do
# not exist, and it praises as often as it scolds. Tutorial 5 collects preferences about its reviews. The model inside
# the package, which tutorials 1 and 3 use, was made by this file, with `--output dpo/example`. It takes about three
# minutes; with `--steps 20` you only see it run.

# %%
import argparse
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from dpo.example.reviews import Film, invent_film, reward, write_prompt, write_review

parser = argparse.ArgumentParser(description="Train the tiny SFT model of the example.")
parser.add_argument("--output", type=Path, default=Path("my-example"), help="the folder that gets a folder model")
parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
parser.add_argument("--batch_size", type=int, default=32, help="conversations per step")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line of ours

# With the seeds fixed, running this again on the same machine gives the same model.
rng = random.Random(0)
torch.manual_seed(0)

# %% [markdown]
# ## The conversations
#
# A conversation is a list of messages, each with a role and a content. The reviews come from a small grammar
# (`dpo/example/reviews.py`), which never runs out: the model sees every conversation only once. One film title in
# eight is held out, the model never sees it here.


# %%
def write_conversation(film: Film) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": write_prompt(rng, film)},
        {"role": "assistant", "content": write_review(rng, film)},
    ]


conversations = [write_conversation(invent_film(rng)) for _ in range(args.steps * args.batch_size)]
print(f"{len(conversations):,} conversations, for example:")
for conversation in conversations[:3]:
    for message in conversation:
        print(f"  {message['role']:>9}: {message['content']}")

# %% [markdown]
# ## The tokenizer
#
# A model reads numbers, so the text is cut into pieces ("tokens") that are numbered. Byte-level BPE begins with the
# 256 bytes, which can spell any text, and joins the pair of pieces that occurs most often, again and again. A word
# that is frequent in our reviews becomes one token.
#
# The special tokens are ours: one for each role, one that ends a message, one that fills short rows of a batch.

# %%
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
# The text of a prompt, which ends with <|assistant|>, is exactly the beginning of the text of the whole conversation:
# there `make_batch` below tells the prompt's tokens from the completion's, and there DPO cuts the text in two.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(
    (message["content"] for conversation in conversations[:10_000] for message in conversation),
    trainers.BpeTrainer(
        vocab_size=1280,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ),
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    pad_token="<|pad|>",
    eos_token="<|end|>",
    extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    model_max_length=512,
    clean_up_tokenization_spaces=False,
    chat_template=CHAT_TEMPLATE,
)
print("\nA conversation as the model sees it, one token per field:")
text = tokenizer.apply_chat_template(conversations[0], tokenize=False)
print("  " + "|".join(tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]))

# %% [markdown]
# ## The model
#
# A Llama, only a thousand times smaller than its namesakes.

# %%
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
)
# How to sample: from the model's own distribution, nothing cut off and nothing sharpened.
model.generation_config = GenerationConfig(
    do_sample=True,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=128,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
print(f"\n{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")

# %% [markdown]
# ## The training
#
# The loss is the mean of -log p(token | all tokens before it) over the tokens of the answers. The questions are there
# to be read, not to be learned, and so are left out of the loss: label -100 is the one that cross-entropy ignores.


# %%
def make_batch(batch: list[list[dict[str, str]]]) -> dict[str, torch.Tensor]:
    """Conversations -> input_ids, attention_mask and labels, each (B, T), padded on the right."""
    rows = []
    for conversation in batch:
        prompt = tokenizer.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
        rows.append((len(tokenizer(prompt)["input_ids"]), tokenizer(whole)["input_ids"]))
    length = max(len(ids) for _, ids in rows)
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for i, (prompt_length, ids) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        attention_mask[i, : len(ids)] = 1
        labels[i, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)

print("\nTraining:")
model.train()
start = time.time()
for step in range(args.steps):
    batch = make_batch(conversations[step * args.batch_size : (step + 1) * args.batch_size])
    loss = model(**batch).loss  # the model itself shifts the labels by one: position t predicts token t+1
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if step % 100 == 0 or step == args.steps - 1:
        print(f"  step {step:5d}   loss {loss.item():.3f}   grad_norm {grad_norm:.2f}   {time.time() - start:4.0f} s")

# %% [markdown]
# ## What it writes
#
# We ask about films with held-out titles and print the grammar's answer beside the model's. The model's mean reward
# should be near 0, as the grammar's is: it praises and scolds alike. Changing that is the work of DPO.

# %%
model.eval()
films = [invent_film(rng, held_out=True) for _ in range(64)]
tests = [write_conversation(film) for film in films]
with torch.no_grad():
    test_loss = model(**make_batch(tests)).loss.item()
    prompts = [tokenizer.apply_chat_template(t[:-1], tokenize=False, add_generation_prompt=True) for t in tests]
    # Padded on the left, so that every prompt ends where its answer begins.
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    outputs = model.generate(**inputs)
answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

for test, answer in list(zip(tests, answers, strict=True))[:4]:
    print(f"\n  {test[0]['content']}\n    grammar: {test[1]['content']}\n    model:   {answer}")
print(f"\nOn {len(tests)} held-out films: loss {test_loss:.3f}")
named = sum(film.title in answer for film, answer in zip(films, answers, strict=True))
print(f"  answers that name the right title: {named} of {len(tests)}")
for name, texts in (("grammar", [test[1]["content"] for test in tests]), ("model", answers)):
    print(f"  mean reward of the {name}: {sum(reward('', text) for text in texts) / len(texts):+.2f}")

# %%
args.output.mkdir(parents=True, exist_ok=True)
model.save_pretrained(args.output / "model")
tokenizer.save_pretrained(args.output / "model")
print(f"\nSaved to {args.output / 'model'}")
