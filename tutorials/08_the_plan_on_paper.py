# %% [markdown]
# # 8. The plan on paper
#
# Will it fit? How long do the devices wait for each other? Before renting eight GPUs one would like to know, and a
# pencil is enough: nearly every byte of a training step has an owner, and its number follows from the model's
# configuration. This tutorial adds them up for models of 0.5, 7 and 70 billion parameters, on 1, 8 and 64 GPUs, and
# checks what it says against PyTorch.
#
# The function `plan` below needs nothing but Python: copy it out and ask it about your own run. Units: 1 GiB is
# $2^{30}$ bytes, as memory is counted; 1 GB is $10^9$ bytes, as links and disks are sold.

# %%
import math

import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.attention import attend_by_segments
from dpo.collate import DataCollatorForPreference
from dpo.costs import kept_by_autograd
from dpo.logprobs import concatenated_forward

GIB, GB = 2**30, 10**9

# %% [markdown]
# ## 1. The parameters, counted
#
# A decoder of Llama's kind is a table of word vectors, L equal blocks, a norm and a head. With $h$ the hidden size, $m$
# the intermediate size, $k$ the width of all key heads together and $V$ the vocabulary, a block has two norms of $h$
# numbers and seven matrices:
#
# $$\underbrace{2h^2}_{q,\,o} + \underbrace{2hk}_{k,\,v} + \underbrace{3hm}_{gate,\,up,\,down}$$
#
# (Qwen2 adds biases to q, k and v.) Outside are $Vh$ for the table, another $Vh$ for the head unless it is *tied* to
# the table, and $h$ for the last norm. A LoRA adapter of rank $r$ puts two thin matrices beside each one of
# $a \times b$: $r \times b$ and $a \times r$.


# %%
def block_shapes(*, hidden: int, intermediate: int, heads: int, kv_heads: int, qkv_bias: bool) -> dict[str, tuple]:
    """The parameters of one block: name → shape, a matrix as (out, in)."""
    keys = hidden // heads * kv_heads
    shapes = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
    shapes |= {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    shapes |= {"q bias": (hidden,), "k bias": (keys,), "v bias": (keys,)} if qkv_bias else {}
    return shapes | {"first norm": (hidden,), "second norm": (hidden,)}


def outer_shapes(*, hidden: int, vocabulary: int, tied: bool) -> dict[str, tuple]:
    """The parameters outside the blocks."""
    head = {} if tied else {"head": (vocabulary, hidden)}
    return {"table": (vocabulary, hidden), "last norm": (hidden,)} | head


def adapter_shapes(block: dict[str, tuple], rank: int) -> dict[str, tuple]:
    """A LoRA adapter's parameters for all matrices of a block. Source: Hu et al. 2021 (arXiv 2106.09685)."""
    matrices = {name: shape for name, shape in block.items() if len(shape) == 2}
    down = {f"{name} A": (rank, columns) for name, (_, columns) in matrices.items()}
    return down | {f"{name} B": (rows, rank) for name, (rows, _) in matrices.items()}


def numbers(shapes: dict[str, tuple], devices: int = 1) -> int:
    """How many numbers of these parameters the first device has, when each is cut by its rows: ⌈rows/n⌉ × columns."""
    return sum(math.ceil(rows / devices) * math.prod(columns) for rows, *columns in shapes.values())


MODELS = {  # public configurations: config.json of Qwen/Qwen2-0.5B, Qwen/Qwen2-7B, Llama-2-7b, Llama-2-70b, Llama-3-70B
    "Qwen2 0.5B": {"layers": 24, "hidden": 896, "intermediate": 4864, "heads": 14, "kv_heads": 2, "vocabulary": 151936},
    "Qwen2 7B": {"layers": 28, "hidden": 3584, "intermediate": 18944, "heads": 28, "kv_heads": 4, "vocabulary": 152064},
    "Llama 2 7B": {
        "layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "vocabulary": 32000
    },
    "Llama 2 70B": {
        "layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "vocabulary": 32000
    },
    "Llama 3 70B": {
        "layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "vocabulary": 128256
    },
}  # fmt: skip
MODELS["Qwen2 0.5B"] |= {"tied": True, "qkv_bias": True}
MODELS["Qwen2 7B"] |= {"qkv_bias": True}


def count(
    *, layers: int, hidden: int, vocabulary: int, tied: bool = False, qkv_bias: bool = False, **of_block: int
) -> int:
    """All parameters of a model."""
    block = block_shapes(hidden=hidden, qkv_bias=qkv_bias, **of_block)
    return layers * numbers(block) + numbers(outer_shapes(hidden=hidden, vocabulary=vocabulary, tied=tied))


for name, model in MODELS.items():
    of_block = ("hidden", "intermediate", "heads", "kv_heads", "qkv_bias")
    block = block_shapes(**{key: model.get(key, False) for key in of_block})
    adapter = model["layers"] * numbers(adapter_shapes(block, 16))
    print(f"{name:12} {count(**model):14,} parameters; LoRA of rank 16 trains {adapter:11,}")

# %% [markdown]
# ## 2. What stays for the whole run
#
# Training in float32 with AdamW costs each trained parameter four numbers of 4 bytes: itself, its gradient, and the
# optimizer's two moments (running means of the gradient and of its square). 16 bytes: a billion parameters, 16 GB. DPO
# adds the frozen reference, 4 more:
#
# | | float32 | bfloat16 |
# |---|---|---|
# | weight | 4 | 2 |
# | gradient | 4 | 2 |
# | AdamW's two moments | 8 | 4 |
# | live reference | 4 | 2 |
# | together | 20 | 10 |
#
# Why not simply bfloat16 (`--dtype bfloat16`)? It has 8 significant bits: a step smaller than about 1/256 of a weight
# changes nothing, and at a learning rate of 1e-6 AdamW's steps are far smaller. So this project keeps float32 weights
# by default, and `--bf16` *computes* in bfloat16 (autocast): matrix products read a 16-bit copy of each weight. These
# copies are memory as well, 2 bytes a parameter: autograd holds them from the forward pass to the backward pass, and
# autocast itself until the forward pass ends, even where autograd does not (under gradient checkpointing).
#
# What makes this smaller:
#
# - **A cached reference** (`--precompute_ref_log_probs`): all pairs are scored before training, then the reference
#   goes. No memory, and no forward pass either.
# - **LoRA** (`--use_peft`): gradient and moments only of the adapter. The reference is the policy with its adapter off:
#   it takes a forward pass but no memory. The base is frozen and loses little in 16 bits (`--dtype bfloat16`).
# - **QLoRA** (`--use_peft --load_in_4bit`): the base's matrices in 4 bits, nf4, with a float32 scale for every 64
#   numbers: $\frac12 + \frac4{64} = 0.5625$ bytes a number. Norms, table and head stay in 16 bits. (Dettmers et al.
#   2023, who quantise the scales once more, to 0.516.)
# - **Sharding** (`--fsdp full_shard`): of all that stays, each of n devices keeps one n-th. Of a base in 4 bits the
#   packed numbers are cut, but the scales are no parameters: every device keeps all of them, 0.0625 bytes a number.
#
# DDP, the other way to use n devices, divides none of it: each device has everything and reads other pairs. It even
# adds the *buckets* in which gradients travel, once more the gradient's size.
#
# ## 3. What comes and goes
#
# **Activations.** What the forward pass computes the backward pass needs again. A block keeps, of each token that the
# model reads, so many bytes (go through its operations one by one: what does the derivative of each need?):
#
# $$A = a_h h + a_k k + a_m m + a_r r + 4 \cdot \text{heads} + 8$$
#
# with numbers that depend on the precision; they are in `KEPT` below. In float32, for example, 36 $h$ is nine vectors
# of $h$: each norm's input, its normalised value and its output, the rotated queries, attention's output, and that of
# all segments put together. 16 $k$ is keys and values, and the prompt's once more for the second completion; 16 $m$ is
# the gate, its SiLU, up, and the product of these two. The 4·heads + 8 are attention's normaliser of each head and each
# norm's factor. A T×T matrix is not kept: flash attention works it out again.
#
# **Gradient checkpointing** (`--gradient_checkpointing`) keeps one vector for each block, $h$ numbers, and works
# the rest out again block by block: a forward pass more, and one block's $A$ at a time.
#
# **Passing: logits.** The logits of one position are $V$ numbers of 4 bytes; with their log-softmax and its gradient
# it is three times that, 1.5 MB a position for Llama 3's vocabulary. Only positions that predict a completion token get
# logits, and where those, once, would take more than `--logits_budget` (4 GiB) the head works in chunks. They are gone
# before the blocks' backward passes begin, which have gradients of what they kept passing through: about one block's
# $A$ per token. So either the logits are there or these; the larger counts.
#
# **Exchanged.** FSDP cuts each parameter by its rows. To compute, a block needs its whole weights: all devices gather
# them, use them and let them go. While one block computes the next is being gathered, so that two are there, and in the
# backward pass gradients too: one block's as it computes them, and the one's before it in the dtype in which they are
# just being summed and cut. What is outside the blocks, the *root*, is gathered and let go in the same way. But all the
# blocks lie between its table and its head: it is whole during a whole forward pass, and again, with its gradients,
# during a whole backward pass. Policy and live reference take turns, so there is one such root at a time. (DDP's
# buckets are under "exchanged" as well.)
#
# **Sent.** Collectives go around in a ring of n devices. In an all-gather or a reduce-scatter of B bytes (all devices'
# parts together) each device sends $\frac{n-1}{n} B$; an all-reduce is one after the other, $2\,\frac{n-1}{n} B$. With
# $N$ parameters in float32, and with $g$ bytes for each that is gathered, an optimizer step of $s$ micro-batches sends
#
# $$\text{DDP: } 2\,\frac{n-1}{n}\, 4N \qquad
# \text{FSDP: } s\, \frac{n-1}{n} \left[(2 \text{ or } 3)\, g N + 4N\right]$$
#
# Everything is gathered for the forward and again for the backward pass, and a third time for a live reference. $g$ is
# 4; 2 with `--bf16`, which under `--fsdp` gathers in bfloat16 and sums gradients in float32. With an adapter the last
# $4N$ counts the adapter alone; the gathered bytes do not shrink, but for a base in 4 bits, which travels packed.
#
# **Loaded and saved.** From safetensors files that have the weights as the model does each process reads its own rows:
# nobody ever holds more than a shard. From others every process loads all of it, into the host's memory, and keeps its
# share; a base that is put into 4 bits likewise, on its own device (70B are some 40 GiB there until they are cut). A
# checkpoint is written while training goes on, from copies in the host's memory: each process has one of its shards of
# what trains, weights and moments, 12 bytes a parameter divided by n, and the first process one of the whole model
# besides, 4 bytes a parameter, for the files that everybody can load. For the export at the end it has that once more,
# and the moments are gone by then.


# %%
BYTES = {"float32": 4, "bfloat16": 2}

KEPT = {  # (weights, computes, adapter): bytes that a block keeps of a token for each of h, k, m, r
    ("float32", "float32", None): (36, 16, 16, 0),
    ("float32", "bfloat16", None): (32, 8, 8, 0),  # autocast: norms in float32; each product its own copy of its input
    ("bfloat16", "bfloat16", None): (22, 8, 8, 0),
    ("float32", "float32", "float32"): (28, 16, 16, 28),  # a frozen norm does not need its normalised values
    ("float32", "bfloat16", "float32"): (24, 8, 8, 14),
    ("bfloat16", "bfloat16", "float32"): (36, 8, 10, 28),  # PEFT turns each adapter's input into float32
    ("bfloat16", "bfloat16", "bfloat16"): (18, 8, 8, 14),
}
PARTS = ("weights", "copies", "gradients", "optimizer", "reference", "exchanged", "activations", "passing")


def plan(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool = False,
    qkv_bias: bool = False,
    tokens: int,
    kept: int,
    micro_batches: int = 1,
    devices: int = 1,
    how: str = "ddp",
    weights: str = "float32",
    compute: str = "bfloat16",
    gathered_in: str | None = None,
    rank: int | None = None,
    reference: str = "live",
    checkpointing: bool = False,
    logits_budget: float = 4.0,
) -> dict[str, float]:
    """What a DPO step with AdamW takes of each device: bytes by part, bytes sent, FLOPs.

    Args: the model's configuration; tokens that one micro-batch of one device reads, and positions kept of it for the
    head; micro_batches of an optimizer step; how, "ddp" or "fsdp" (every block, then the root; gradients are summed
    after each micro-batch); weights, "float32", "bfloat16" or, under an adapter, "nf4" (all else in compute);
    compute, of the matrix products; gathered_in, the dtype of FSDP's mixed precision (which sums in float32), None to
    gather and sum as kept; rank of the adapter, None to train all; reference, "live" or "cached"; logits_budget in GiB.
    Returns: PARTS and their sum "total"; the buffers of collectives, "all_gathered", "reduce_scattered",
    "all_reduced"; "sent", what a device sends of them when they go around in a ring; "flops", attention's left out.
    """
    if weights == "nf4" and rank is None:
        raise ValueError("nf4 weights do not train, only an adapter on them does: give a rank")
    n = devices if how == "fsdp" else 1
    block = block_shapes(hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, qkv_bias=qkv_bias)
    outer = outer_shapes(hidden=hidden, vocabulary=vocabulary, tied=tied)
    adapter = adapter_shapes(block, rank) if rank else {}
    matrices = {name: shape for name, shape in block.items() if len(shape) == 2}
    seen = gathered_in or (compute if weights == "nf4" else weights)  # the dtype in which a block finds its weights
    of_adapter = gathered_in or "float32"
    is_autocast = seen != compute

    # What stays. Of an adapter PEFT keeps float32; of 4 bits each device has its share, but all of the scales.
    size = BYTES[compute if weights == "nf4" else weights]
    plain = {name: shape for name, shape in block.items() if weights != "nf4" or name not in matrices}
    packed = {name: (rows * columns // 2,) for name, (rows, columns) in matrices.items() if weights == "nf4"}  # bytes
    scales = 4 * numbers(matrices) // 64 if weights == "nf4" else 0
    base = size * (layers * numbers(plain, n) + numbers(outer, n)) + layers * (numbers(packed, n) + scales)
    own = 4 * layers * numbers(adapter, n)
    trained = own if rank else base

    # What is exchanged: of DDP the buckets; FSDP gathers two blocks and the root whole, with the rows that even out the
    # shards. Of gradients there are the root's, a block's, and another's that are being summed.
    of_block = BYTES[seen] * numbers(plain, n) + BYTES[of_adapter] * numbers(adapter, n)
    whole_block = n * (numbers(packed, n) + of_block)
    whole_outer = n * BYTES[seen] * numbers(outer, n)
    summed_in = 4 if rank or gathered_in else size
    trained_block, trained_outer = (adapter, {}) if rank else (block, outer)
    computed_in = BYTES[of_adapter if rank else seen]
    exchanged = trained if devices > 1 else 0
    if how == "fsdp":
        exchanged = 2 * whole_block + whole_outer + n * computed_in * numbers(trained_outer, n)
        exchanged += n * (computed_in + summed_in) * numbers(trained_block, n)

    is_live = reference == "live"
    second = base if is_live and not rank else 0

    # Autocast's copies of weights, until the end of the forward pass at least; of frozen ones a block's, if that is
    # worked out again. 4 bits become a matrix at a time.
    copies = 0.0
    if is_autocast:
        blocks = 1 if checkpointing and rank else layers
        copies = BYTES[compute] * (layers * numbers(adapter) + blocks * numbers(matrices) + vocabulary * hidden)
    elif weights == "nf4":
        copies = BYTES[compute] * max(rows * columns for rows, columns in matrices.values())

    # What comes and goes.
    keys = hidden // heads * kv_heads
    sizes = (hidden, keys, intermediate, rank or 0)
    factors = KEPT[seen, compute, of_adapter if rank else None]
    a_token = sum(a * b for a, b in zip(factors, sizes, strict=True)) + 4 * heads + 8
    one_block = tokens * a_token
    activations = tokens * layers * BYTES[seen] * hidden if checkpointing else layers * one_block
    activations += tokens * hidden * (4 + (0 if rank else BYTES[seen]))  # the last norm: its input, what it normalised
    chunk = min(kept, max(1, int(logits_budget * GIB / (4 * vocabulary))))
    passing = max(3 * 4 * vocabulary * chunk, one_block)

    # What travels: all is gathered for a forward pass and anew for a backward pass.
    all_gathered = reduce_scattered = all_reduced = 0
    if how == "fsdp":
        passes = 3 if is_live else 2
        all_gathered = micro_batches * passes * (layers * whole_block + whole_outer)
        summed = layers * numbers(trained_block, n) + numbers(trained_outer, n)
        reduce_scattered = micro_batches * n * summed * summed_in
    elif devices > 1:
        all_reduced = trained
    sent = (all_gathered + reduce_scattered + 2 * all_reduced) * (devices - 1) / devices

    forward = 2 * (tokens * layers * numbers(matrices) + kept * vocabulary * hidden)
    # A backward pass costs two forward passes, or one where most weights get no gradient.
    forwards = 1 + is_live + checkpointing + (1 if rank else 2)
    parts = (base + own, copies, trained, 2 * trained, second, exchanged, activations, passing)
    result = dict(zip(PARTS, parts, strict=True)) | {"total": sum(parts)}
    result |= {"all_gathered": all_gathered, "reduce_scattered": reduce_scattered, "all_reduced": all_reduced}
    return result | {"sent": sent, "flops": micro_batches * forwards * forward}


# %% [markdown]
# ## 4. Is it true?
#
# First on one device, with a model of 8 million parameters: its parameters, their gradients and AdamW's state have the
# bytes that `plan` says, exactly (but for the 4 bytes in which AdamW counts the steps of each tensor, left out here).
# What autograd keeps of a micro-batch is counted with PyTorch's `saved_tensors_hooks`; there `plan` is an estimate.

# %%
torch.manual_seed(0)
small = {"layers": 6, "hidden": 256, "intermediate": 688, "heads": 8, "kv_heads": 4, "vocabulary": 8192}


def build(*, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int):
    """The model of a configuration, as transformers makes it."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    of_heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **of_heads))


prompt, completion = 128, 64  # of each pair; both completions are as long
rows = [{"prompt_input_ids": [7] * prompt, "chosen_input_ids": [8] * completion}] * 2
batch = DataCollatorForPreference(0, "prefix_shared")([row | {"rejected_input_ids": [9] * completion} for row in rows])
of_batch = {"tokens": 2 * (prompt + 2 * completion), "kept": 2 * 2 * completion}

model = build(**small)
attend_by_segments(model)
optimizer = torch.optim.AdamW(model.parameters())
concatenated_forward(model, batch)["chosen_logps"].sum().backward()
optimizer.step()
state = [each for one in optimizer.state.values() for key, each in one.items() if key != "step"]
measured = {
    "weights": sum(each.nbytes for each in model.parameters()),
    "gradients": sum(each.grad.nbytes for each in model.parameters()),
    "optimizer": sum(each.nbytes for each in state),
}
told = plan(**small, **of_batch, compute="float32")
for part, size in measured.items():
    print(f"{part:12} told {told[part]:11,}   measured {size:11,}")
    assert told[part] == size

for checkpointing in (False, True):
    for compute in ("float32", "bfloat16"):
        model = build(**small).train()
        attend_by_segments(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            found = kept_by_autograd(
                model, lambda batch, model=model: concatenated_forward(model, batch), batch, model.lm_head
            )["trunk"]
        told = plan(**small, **of_batch, compute=compute, checkpointing=checkpointing)
        # Autograd keeps the copies of the blocks' matrices as well; the head's are not in "trunk".
        copies = 0 if checkpointing else max(0, told["copies"] - 2 * small["vocabulary"] * small["hidden"])
        ratio = (told["activations"] + copies) / found
        kind = "checkpointing" if checkpointing else "all kept"
        print(f"activations, {kind:13}, {compute:8}: told / measured = {ratio:.2f}")
        assert 0.95 < ratio < 1.05

# %% [markdown]
# Then on four processes. `torchrun --standalone --nproc_per_node 4 tests/benchmarks/plan.py` trains a model of 29
# million parameters, laid out by DDP and, with this project's own `dpo/sharding.py`, by FSDP. It writes down what the
# process with the most of it keeps, and the bytes of every buffer that reaches PyTorch's collectives in an optimizer
# step (of a gathered block, the whole of it).
# These are its numbers, and `plan` says the same: nothing here is an estimate. (Rank 6 is chosen to be awkward: six
# rows among four devices become 2, 2, 2 and 0, and travel as eight.)

# %%
measured_model = {"layers": 4, "hidden": 512, "intermediate": 1376, "heads": 8, "kv_heads": 4, "vocabulary": 16384}
COLUMNS = ("weights", "copies", "gradients", "optimizer", "all_gathered", "reduce_scattered", "all_reduced")
MEASURED = {  # its options, and the bytes in the order of COLUMNS
    "DDP": ({}, 113526784, 0, 113526784, 227053568, 0, 0, 113526784),
    "DDP, autocast": ({"compute": "bfloat16"}, 113526784, 39976960, 113526784, 227053568, 0, 0, 113526784),
    "DDP, LoRA": ({"rank": 6}, 114414592, 0, 887808, 1775616, 0, 0, 887808),
    "DDP, QLoRA": (
        {"rank": 6, "weights": "nf4", "compute": "bfloat16"},
        40976384, 1409024, 887808, 1775616, 0, 0, 887808,
    ),
    "FSDP": ({"how": "fsdp"}, 28381696, 0, 28381696, 56763392, 227053568, 113526784, 0),
    "FSDP, two micro-batches": (
        {"how": "fsdp", "micro_batches": 2},
        28381696, 0, 28381696, 56763392, 454107136, 227053568, 0,
    ),
    "FSDP, checkpointing": (
        {"how": "fsdp", "checkpointing": True},
        28381696, 0, 28381696, 56763392, 227053568, 113526784, 0,
    ),
    "FSDP, live reference": (
        {"how": "fsdp", "reference": "live"},
        28381696, 0, 28381696, 56763392, 340580352, 113526784, 0,
    ),
    "FSDP, autocast": (
        {"how": "fsdp", "compute": "bfloat16"},
        28381696, 39976960, 28381696, 56763392, 227053568, 113526784, 0,
    ),
    "FSDP, gathered in bfloat16": (
        {"how": "fsdp", "compute": "bfloat16", "gathered_in": "bfloat16"},
        28381696, 0, 28381696, 56763392, 113526784, 113526784, 0,
    ),
    "FSDP, all in bfloat16": (
        {"how": "fsdp", "weights": "bfloat16", "compute": "bfloat16", "gathered_in": "bfloat16"},
        14190848, 0, 14190848, 28381696, 113526784, 113526784, 0,
    ),
    "FSDP, LoRA": ({"how": "fsdp", "rank": 6}, 28639232, 0, 257536, 515072, 229113856, 1030144, 0),
    "FSDP, LoRA, live reference": (
        {"how": "fsdp", "rank": 6, "reference": "live"},
        28639232, 0, 257536, 515072, 343670784, 1030144, 0,
    ),
    "FSDP, LoRA, bfloat16 base": (
        {"how": "fsdp", "rank": 6, "weights": "bfloat16", "compute": "bfloat16"},
        14448384, 0, 257536, 515072, 115587072, 1030144, 0,
    ),
    "FSDP, QLoRA": (
        {"how": "fsdp", "rank": 6, "weights": "nf4", "compute": "bfloat16"},
        10823424, 1409024, 257536, 515072, 80787456, 1030144, 0,
    ),
    "FSDP, QLoRA, bf16, live": (
        {"how": "fsdp", "rank": 6, "weights": "nf4", "compute": "bfloat16",
         "gathered_in": "bfloat16", "reference": "live"},
        10823424, 1409024, 257536, 515072, 119635968, 1030144, 0,
    ),
}  # fmt: skip
print(f"{'':27}" + "".join(f"{column.split('_')[-1]:>13}" for column in COLUMNS))
for name, (options, *sizes) in MEASURED.items():
    usual = {"tokens": 32, "kept": 32, "devices": 4, "compute": "float32", "reference": "cached"}
    told = plan(**measured_model, **usual | options)
    assert [told[column] for column in COLUMNS] == sizes, name
    print(f"{name:27}" + "".join(f"{size:13,}" for size in sizes))
print("all equal")

# %% [markdown]
# FSDP's pattern can be read off the numbers. All weights are gathered twice (thrice with a live reference); gradients
# are summed after each micro-batch, in the weights' own dtype or, where they were gathered in bfloat16, in float32.
# Under LoRA the sums almost vanish, but the frozen base travels as before: with an adapter DDP sends next to nothing,
# and FSDP is for models that do not fit otherwise. A base in 4 bits travels packed, and becomes matrices where they are
# needed.
#
# And see the copies under *FSDP, autocast*. The weights are sharded, but autograd keeps the 16-bit copies that autocast
# made of the gathered ones, *whole*, on every device: 139 GB for Llama 3 70B. So `--fsdp full_shard --bf16` gathers in
# bfloat16 instead (FSDP's own mixed precision): there are no copies, and half as much is gathered. From here on FSDP
# means that.
#
# And a whole run? With `--peaks` the script trains 50 million parameters in float32 and writes down the peak of each
# process's memory: from the loading by name to the export, with a live reference. `plan` says 1,037 MB for one process
# and 358 MB for each of four; measured were some 1,090 and 345, less than a third. The export at the end takes no more,
# though the first process then has the whole model. More is there only while a checkpoint is being written: 575 MB in
# the first process and 375 MB in the others (1,685 MB in the one process).
#
# ## 5. Where each byte goes
#
# Four pairs in a micro-batch, each with a prompt of 512 tokens and two completions of 256, the prompt read once:

# %%
PAIRS = 4
of_pairs = {"tokens": PAIRS * (512 + 2 * 256), "kept": PAIRS * 2 * 256}
LAYOUTS = {
    "all weights, DDP": {},
    "all weights, FSDP": {"how": "fsdp", "gathered_in": "bfloat16"},
    "all in bfloat16, DDP": {"weights": "bfloat16"},
    "LoRA, DDP": {"rank": 16, "weights": "bfloat16"},
    "LoRA, FSDP": {"rank": 16, "weights": "bfloat16", "how": "fsdp"},
    "QLoRA, DDP": {"rank": 16, "weights": "nf4"},
    "QLoRA, FSDP": {"rank": 16, "weights": "nf4", "how": "fsdp"},
}
SHOWN = ("Qwen2 0.5B", "Qwen2 7B", "Llama 3 70B")
seven = plan(**MODELS["Qwen2 7B"], **of_pairs)
frugal = plan(**MODELS["Qwen2 7B"], **of_pairs, checkpointing=True, reference="cached")
sharded = plan(**MODELS["Qwen2 7B"], **of_pairs, **LAYOUTS["all weights, FSDP"], devices=8)
print(f"{'Qwen2 7B, GiB of each device':30}{'one device':>14}{'frugal':>14}{'FSDP on 8':>14}")
for part in (*PARTS, "total"):
    print(f"{part:30}" + "".join(f"{each[part] / GIB:14.1f}" for each in (seven, frugal, sharded)))

# %% [markdown]
# (Frugal: with gradient checkpointing and a cached reference.) And of all three models, with gradient checkpointing and
# a live reference. The dashed line is what we call a fit: a GPU that is sold with 80 GB gives a program some 79 GiB, of
# which CUDA, its libraries and fragmentation want theirs, so we plan with 70.

# %%
BARS = [
    ("all\n1", 1, "all weights, DDP"), ("FSDP\n8", 8, "all weights, FSDP"), ("FSDP\n64", 64, "all weights, FSDP"),
    ("LoRA\n1", 1, "LoRA, DDP"), ("LoRA\nFSDP 8", 8, "LoRA, FSDP"), ("QLoRA\n1", 1, "QLoRA, DDP"),
]  # fmt: skip
SHADES = dict(zip(PARTS, ("0.15", "0.7", "0.4", "0.55", "white", "white", "0.9", "white"), strict=True))
HATCHES = dict(zip(PARTS, ("", "", "", "//", "xxx", "....", "", "--"), strict=True))
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
FITS = 70 * GIB
figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
for axis, name in zip(axes, SHOWN, strict=True):
    told = [
        plan(**MODELS[name], **of_pairs, **LAYOUTS[layout], devices=devices, checkpointing=True)
        for _, devices, layout in BARS
    ]
    bottom = [0.0] * len(BARS)
    for part in PARTS:
        heights = [each[part] / GIB for each in told]
        style = {"color": SHADES[part], "hatch": HATCHES[part], "edgecolor": "black", "linewidth": 0.5}
        axis.bar(range(len(BARS)), heights, bottom=bottom, width=0.72, label=part, **style)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    top = min(max(bottom), 190)
    for i, total in enumerate(bottom):
        axis.text(i, min(total, top) + top / 60, f"{total:,.0f}", ha="center", fontsize=8, bbox=BOX)
    axis.axhline(FITS / GIB, color="black", linestyle="--", linewidth=1) if top > 60 else None
    axis.set_ylim(0, top * 1.1)
    axis.set_xticks(range(len(BARS)), [label for label, _, _ in BARS], fontsize=8)
    axis.set_title(name, fontsize=11, fontweight="bold", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("memory of each device  [GiB]")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## 6. What fits
#
# Where a layout does not fit as it is, three things are tried in this order, each on top of the one before, and the
# first with which it fits is shown:
#
# - **c**, gradient checkpointing: one forward pass more, which is a quarter to a half of a step's time
# - **r**, a cached reference: one pass over all rows before the training; under LoRA it saves time, not memory
# - **p**, one pair at a time and four micro-batches: the same result

# %%
CHANGES = {"c": {"checkpointing": True}, "r": {"reference": "cached"}}
CHANGES["p"] = {key: value // PAIRS for key, value in of_pairs.items()} | {"micro_batches": PAIRS}


def cell(name: str, layout: str, devices: int) -> str:
    """GiB of each device, and the first changes with which it fits."""
    options, made = {**MODELS[name], **of_pairs, **LAYOUTS[layout], "devices": devices}, ""
    before = total = plan(**options)["total"]
    for letter, change in CHANGES.items():
        if total > FITS:
            options, made = options | change, made + letter
            total = plan(**options)["total"]
    if total > FITS:
        return f"no ({total / GIB:,.1f})"
    return f"{total / GIB:,.1f}" if not made else f"{before / GIB:,.1f} → {total / GIB:,.1f} {made}"


print(f"{'GiB of each device':33}{'1 GPU':>17}{'8 GPUs':>17}{'64 GPUs':>17}")
for name in SHOWN:
    for layout in LAYOUTS:
        cells = [cell(name, layout, devices) if devices > 1 or "FSDP" not in layout else "" for devices in (1, 8, 64)]
        print(f"{name:12}{layout:21}" + "".join(f"{each:>17}" for each in cells))

# %% [markdown]
# A "no" shows what it takes after all three. Then, in this order: shard instead of copying (FSDP); train an adapter
# instead of all weights; put the optimizer's state into the host's memory (CPU offload: 8 bytes a parameter, at the
# price of sending them over the slower bus); more devices. More devices never help DDP: its column on 64 is that on 8.
#
# So one GPU trains all of 0.5B; of 7B an adapter or, barely and as bfloat16 allows, the whole; of 70B an adapter on 4
# bits. Eight train all of 7B in float32, and an adapter of 70B in 16 bits. All of 70B in float32 is for 64. (There
# QLoRA takes more of each device than LoRA in 16 bits: the scales, whole everywhere, are most of what it keeps.)
#
# ## 7. How long they wait for each other
#
# $t_{compute}$ = FLOPs / (the device's rate × utilisation), $t_{link}$ = bytes sent / the link's speed. We take 989
# TFLOP/s (an H100's dense bfloat16), of which 40% are used; 450 GB/s each way between GPUs of one machine (NVLink), and
# 50 GB/s for each GPU between machines (400 Gbit/s). A good library sends while it computes: then the longer of the two
# counts. Here for 8 devices, with checkpointing and a live reference, whether it would fit or not:


# %%
def seconds(
    told: dict[str, float], *, link: float, rate: float = 989e12, utilisation: float = 0.4
) -> tuple[float, float]:
    """(that a step computes, that it sends), of a plan; link in bytes and rate in FLOPs a second."""
    return told["flops"] / (rate * utilisation), told["sent"] / link


print(f"{'a step of four micro-batches':33}{'sends':>12}{'computes':>12}{'NVLink':>12}{'network':>12}")
for name in SHOWN:
    for layout in ("all weights, DDP", "all weights, FSDP", "LoRA, DDP", "LoRA, FSDP", "QLoRA, FSDP"):
        told = plan(**MODELS[name], **of_pairs, **LAYOUTS[layout], devices=8, micro_batches=4, checkpointing=True)
        computes, inside = seconds(told, link=450 * GB)
        _, between = seconds(told, link=50 * GB)
        row = f"{told['sent'] / GB:9.1f} GB{computes:10.2f} s{inside:10.2f} s{between:10.2f} s"
        print(f"{name:12}{layout:21}{row}")

# %% [markdown]
# DDP sends its gradients once for a step, however many micro-batches that has; FSDP sends all weights for each of them.
# So under FSDP a larger micro-batch is worth its memory, and gradient checkpointing, which makes room for it, may cost
# nothing. A cached reference saves a quarter of the computing and a third of the gathering.
#
# ## What is exact, and what is not
#
# - Exact: parameters, gradients and AdamW's state of each device, and the buffers of all collectives. The tests hold
#   them to PyTorch's own count, byte for byte. (On processes of one machine, by a CPU's collectives; nobody has held a
#   stopwatch to section 7.)
# - To 3 %: activations, by the operations of today's transformers. Another version, a fused norm or dropout changes
#   them, and a GPU's attention may keep a copy more or less.
# - To a tenth: the whole peak, which `tests/test_plan.py` compares with what training runs took on a CPU. What is
#   there at the same moment is a question of timing; here all but logits and a block's work are added up.
# - By arithmetic alone: what FSDP has gathered at a time (but for the sum, in that run of four), and all that is
#   specific to a GPU.
# - Not counted: attention's FLOPs (little below some thousand tokens), buffers of libraries, a model in another style
#   than Llama's (the program's summary before training predicts from the model itself: `dpo/costs.py`).
#
# ## Exercises
#
# Put numbers in the place of `None` and run the cell again.
#
# 1. All weights of Llama 2 7B are trained in float32 with AdamW, with a live reference. How many GiB stay for the whole
#    run on one device, before any activation? (Parameters × bytes, by hand.)
# 2. Llama 3 70B, all weights, FSDP as above, with checkpointing and a cached reference: on how many devices, a power of
#    two, does it begin to fit?
# 3. Per parameter, how many times as many bytes does FSDP (gathering in bfloat16, live reference, one micro-batch) send
#    as DDP in float32?

# %%
mine = {"1": None, "2": None, "3": None}

llama = plan(**MODELS["Llama 2 7B"], **of_pairs)
checked = {"1": sum(llama[part] for part in ("weights", "gradients", "optimizer", "reference")) / GIB}
largest = {**MODELS["Llama 3 70B"], **of_pairs, **LAYOUTS["all weights, FSDP"], **CHANGES["c"], **CHANGES["r"]}
checked["2"] = next(n for n in (2**power for power in range(20)) if plan(**largest, devices=n)["total"] < FITS)
eight = {**MODELS["Llama 2 7B"], **of_pairs, "devices": 8}
checked["3"] = plan(**eight, **LAYOUTS["all weights, FSDP"])["sent"] / plan(**eight)["sent"]
for question, answer in mine.items():
    print(f"exercise {question}:", "yet to do" if answer is None else abs(answer / checked[question] - 1) < 0.01)
