"""What the benchmarks beside it share: random models and rows, clocks, memory, and the counting of a step's work."""

import ctypes
import random
import sys
import time
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
# A script here finds the package wherever it was started from; and `import trl` the library, not the file of that name.
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path or ".").resolve() not in (HERE, ROOT))]
EOS = "<|eos|>"


# ------------------------------------------------------------------------------------------------------ model and rows


def llama_shape(*, hidden: int, layers: int, vocab: int) -> dict:
    """A LlamaConfig's arguments, with heads of 64 and tied embeddings: 44M parameters with 512, 6 and 49,152."""
    shape = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 32 * 32}
    shape |= {"num_hidden_layers": layers, "tie_word_embeddings": True, "max_position_embeddings": 2048}
    return shape | {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}


def make_model(path: Path, *, hidden: int, layers: int, vocab: int) -> None:
    """A random Llama with a tokenizer that knows `vocab - 2` words of four letters, each with the space before it."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [" " + "".join(chr(97 + number // 26**place % 26) for place in range(4)) for number in range(vocab - 2)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<|unk|>", EOS, *words])}, "<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<|unk|>", eos_token=EOS, pad_token=EOS)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**llama_shape(hidden=hidden, layers=layers, vocab=vocab), **ids)).save_pretrained(path)


def make_rows(model: str, count: int, *, prompt: list[int], completion: list[int]) -> list[dict]:
    """Rows of random words that are one token each. Every piece of text begins with a space, so that it makes no
    difference whether prompt and completion are tokenised together, as TRL does it, or apart, as we do it."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model).get_vocab()
    words = sorted(token[1:] for token in tokens if token[0] in "Ġ▁ " and token[1:].isascii() and token[1:].islower())
    words = [word for word in words if word.isalpha()]
    generator = random.Random(0)

    def text(limits: list[int]) -> str:
        return "".join(f" {word}" for word in generator.choices(words, k=generator.randint(*limits)))

    return [{"prompt": text(prompt), "chosen": text(completion), "rejected": text(completion)} for _ in range(count)]


def make_token_rows(
    count: int, *, prompt: float, completion: float, completions: int, vocab: int, seed: int
) -> list[dict]:
    """Rows of random token ids: prompt and completion are mean lengths, each length is uniform between half and one and
    a half of its mean. Of two completions a pair, of more a ranking, as the collator takes them."""
    generator = random.Random(seed)

    def ids(mean: float) -> list[int]:
        length = max(1, round(generator.uniform(0.5, 1.5) * mean))
        return [generator.randrange(vocab) for _ in range(length)]

    rows = []
    for _ in range(count):
        row = {"prompt_input_ids": ids(prompt), "chosen_input_ids": ids(completion)}
        rejected = [ids(completion) for _ in range(completions - 1)]
        rows.append(row | {"rejected_input_ids": rejected if completions > 2 else rejected[0]})
    return rows


# --------------------------------------------------------------------------------------------------- clocks and memory


def now() -> tuple[float, float]:
    """Wall clock, and CPU seconds of this process over all its threads (a busy machine changes those less)."""
    return time.perf_counter(), time.process_time()


def memory(which: str) -> float:
    """What this process holds in memory (VmRSS), or the most that it held (VmHWM), in MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) / 2**10


def reset_peak_memory() -> None:
    """From here on VmHWM is the most that the process holds from here on; what it keeps without need is given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------------------------- a step's work


def layout_counts(layout: str, lengths: list[tuple[int, list[int]]]) -> dict[str, int]:
    """What a layout makes of rows, in numbers: tokens that the trunk reads, padding included; kept, positions that the
    head reads; pairs of query and key that the causal mask of one layer lets through.

    Args: layout, of the collator, or "plain", padded with a head that reads every position; lengths, of each row the
    tokens of its prompt and of each completion.
    """
    kept = sum(sum(completions) for _, completions in lengths)
    whole = [prompt + completion for prompt, completions in lengths for completion in completions]
    if layout in ("plain", "padded"):
        tokens = len(whole) * max(whole)
        counts = {"tokens": tokens, "pairs": len(whole) * triangle(max(whole))}
        return counts | {"kept": tokens if layout == "plain" else kept}
    if layout == "padding_free":
        return {"tokens": sum(whole), "kept": kept, "pairs": sum(map(triangle, whole))}
    own = [triangle(prompt) for prompt, _ in lengths]
    own += [triangle(y) + y * prompt for prompt, completions in lengths for y in completions]
    return {"tokens": kept + sum(prompt for prompt, _ in lengths), "kept": kept, "pairs": sum(own)}


def triangle(tokens: int) -> int:
    """Pairs of query and key of so many tokens, each of which sees itself and those before it."""
    return tokens * (tokens + 1) // 2


def step_flops(
    *,
    tokens: int,
    kept: int,
    pairs: int,
    trunk: int,
    head: int,
    width: int,
    layers: int,
    adapter: int = 0,
    live: bool = False,
) -> float:
    """Floating-point operations of one training step: a multiplication and an addition for each weight and position,
    the backward pass twice as many, once for the gradient of what came in and once for that of the weight.

    Args: tokens, kept, pairs as in `layout_counts`; trunk, the weights in the matrices of all blocks; head, those of
    the language-model head; width, of all query heads together; layers; adapter, LoRA's weights, 0 where all weights
    train: beside it trunk and head are frozen and need no gradient of their own; live, a reference of the same shape
    is asked, forward only, of LoRA with its adapter off.
    """
    weights = trunk * tokens + head * kept
    training = (4 * weights + 6 * adapter * tokens) if adapter else 6 * weights
    attention = 4 * width * layers * pairs  # scores, and the weighted sum of values
    return float(training + 3 * attention + (2 * weights + attention if live else 0))
