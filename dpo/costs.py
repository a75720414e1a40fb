"""What a step costs: useful FLOPs beside the device's best rate, memory predicted and measured, a profile of it.

Useful is what the method asks for: each prompt read once, no padding, no recomputed activation. A run that counts the
prompt twice, or padding, flatters itself.
"""

import ctypes
import inspect
import logging
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from dpo.logprobs import takes

PARTS = ("weights", "gradients", "optimizer", "reference", "activations", "logits")  # of memory
logger = logging.getLogger("dpo")


# ------------------------------------------------------------------------------------------------------- useful FLOPs


def prices(model: torch.nn.Module, *, trains: bool) -> dict:
    """What `useful_flops` multiplies with, in FLOPs, of a decoder of transformers: "token", of all matrices but
    embedding and head for each token read; "kept", of the head for each position that predicts a completion token;
    "pairs", {window: of all layers with that window, None for none, for each query and key that meet}.

    A forward pass multiplies and adds: 2 FLOPs a parameter. trains: backward takes 2 more for the gradient of what goes
    in, and 2 for that of the matrix itself unless it is frozen. Of experts those that a token reaches count.
    Raises: ValueError, in words, for a model of which this would not be true.
    """
    config = getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not hasattr(config, "get_text_config") or head is None or config.is_encoder_decoder:
        raise ValueError("it is no decoder of transformers that reads text alone")
    if config.get_text_config() is not config:
        raise ValueError("it sees, and what its eyes cost is not counted")
    windows = windows_of(config)
    tables = [each for each in model.modules() if isinstance(each, torch.nn.Embedding)]
    of_head, of_tables = ({id(p) for m in each for p in m.parameters()} for each in ([head], tables))
    idle = {*getattr(model, "peft_config", ()), "original_module"} - {getattr(model, "active_adapter", None)}
    result = {"token": 0.0, "kept": 0.0, "pairs": {}}
    for name, parameter in model.named_parameters():
        shape, parts = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape), name.split(".")
        kind = "kept" if id(parameter) in of_head else "token"
        if len(shape) < 2 or idle & set(parts) or (kind == "token" and id(parameter) in of_tables):
            continue
        share = share_of_experts(config) if "experts" in parts else 1.0
        result[kind] += share * math.prod(shape) * (2 + trains * (2 + 2 * parameter.requires_grad))
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None)
    width = width or config.hidden_size // heads
    if hasattr(config, "qk_nope_head_dim"):  # of latent attention, whose queries are wider than its values
        width = (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) / 2
    for window in windows:
        cost = 4 * heads * width * (3 if trains else 1)  # scores, and what they gather
        result["pairs"][window] = result["pairs"].get(window, 0.0) + cost
    return result


def share_of_experts(config) -> float:
    """How many of a layer's experts a token reaches, of all. Raises: ValueError where the configuration is silent."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    total = next((count for name in names if (count := getattr(config, name, None))), None)
    active = getattr(config, "num_experts_per_tok", None)
    if not total or not active:
        raise ValueError("its configuration does not say how many experts a token reaches")
    return active / total


def windows_of(config) -> list[int | None]:
    """How far back each layer sees, None for all the way."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "num_hidden_layers", None)
    if layers is None or not getattr(config, "num_attention_heads", None):
        raise ValueError("it has no attention whose cost could be counted")
    of_kinds = {"full_attention": None, "sliding_attention": window}
    of_kinds["chunked_attention"] = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    if unknown := set(kinds) - of_kinds.keys():
        raise ValueError(f"the cost of its layers of {min(unknown)} is not counted")
    return [of_kinds[kind] for kind in kinds]


def useful_flops(
    lengths: torch.Tensor, tokens: torch.Tensor, unique: torch.Tensor, *, token: float, kept: float, pairs: dict
) -> torch.Tensor:
    """The FLOPs of each row, (B,) float64: token·U + kept·M + Σ_window pairs[window]·(queries and keys that meet).

    Args: lengths (K·B,), tokens (B,) and unique_tokens (B,) of a ready batch; token, kept, pairs, of `prices`.
    A prompt of P tokens meets itself, a completion of C the prompt and itself: P(P+1)/2 + Σ (P·C + C(C+1)/2) pairs.
    Stays on the device. Where only some of a completion's tokens are scored, C of each is told by their share.
    """
    scored = lengths.double().unflatten(0, (-1, len(tokens)))  # (K, B)
    copies = ((scored > 0).sum(dim=0) - 1).clamp(min=1)
    prompts = (tokens - unique) / copies
    own = scored * ((unique - prompts) / scored.sum(dim=0).clamp(min=1))
    total = token * unique + kept * scored.sum(dim=0)
    for window, price in pairs.items():
        beside = met(prompts, window)
        total = total + price * (beside + (met(prompts + own, window) - beside).sum(dim=0))
    return total


def met(tokens: torch.Tensor, window: int | None) -> torch.Tensor:
    """Σ_{t=1}^{tokens} min(t, window): the queries and keys of a causal sequence that meet."""
    seen = tokens if window is None else tokens.clamp(max=window)
    return seen * (seen + 1) / 2 + (tokens - seen) * seen


def count(sums: dict, batches: list[dict], prices: list[dict], *, rate: float) -> None:
    """Adds to sums the unique_tokens of ready batches, and where the rate is known their best_seconds: how long a
    device would take that did nothing but useful FLOPs. Rows that only stand in do not count; nobody waits."""
    for batch in batches:
        if batch["index"][0] < 0:  # a batch that stands in has one row; index is on the CPU, the rest may be on a GPU
            batch = {name: batch[name] * 0 for name in ("tokens", "unique_tokens", "lengths") if name in batch}
        unique = batch.get("unique_tokens", batch["tokens"])
        sums["unique_tokens"] += unique.double().sum()
        for each in prices if rate else ():
            sums["best_seconds"] += useful_flops(batch["lengths"], batch["tokens"], unique, **each).sum() / rate


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the device's matrix products, of squares as large as take 10 ms: the median of nine."""

    def seconds(n: int) -> float:
        torch.mm(a[:n, :n], a[:n, :n], out=b[:n, :n])
        wait_for(device)
        started = time.perf_counter()
        torch.mm(a[:n, :n], a[:n, :n], out=b[:n, :n])
        wait_for(device)
        return time.perf_counter() - started

    n, most = 256, 8192 if device.type == "cuda" else 2048
    a, b = (torch.ones(most, most, dtype=dtype, device=device) for _ in range(2))
    while n < most and seconds(n) < 0.01:
        n *= 2
    return 2 * n**3 / statistics.median(seconds(n) for _ in range(9))


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------- memory


def bytes_of(tensors) -> int:
    """The memory behind tensors, what they share once."""
    storages = (each.untyped_storage() for each in tensors)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> float:
    """The memory of an optimizer's state after its first step, told by that of one like it for a matrix of 128×128."""
    own = [each for each in tree_leaves(optimizer.state) if isinstance(each, torch.Tensor)]
    if own:  # it goes on from a checkpoint
        return bytes_of(own)
    group, total = optimizer.param_groups[0], 0.0
    options = {key: value for key, value in group.items() if key in inspect.signature(type(optimizer)).parameters}
    for (dtype, device), size in sizes_by_kind(optimizer).items():
        probe = torch.zeros(128, 128, dtype=dtype, device=device, requires_grad=True)
        probe.grad = torch.zeros_like(probe)
        like = type(optimizer)(**{**options, "params": [probe]})
        like.step()
        state = [each for each in tree_leaves(like.state[probe]) if isinstance(each, torch.Tensor)]
        total += size * bytes_of(state) / probe.nbytes
    return total


def sizes_by_kind(optimizer: torch.optim.Optimizer) -> dict[tuple, int]:
    sizes = {}
    for each in (p for group in optimizer.param_groups for p in group["params"]):
        sizes[each.dtype, each.device] = sizes.get((each.dtype, each.device), 0) + each.nbytes
    return sizes


def predict_memory(
    model: torch.nn.Module,
    score: Callable[[dict], dict],
    batches: list[dict],
    *,
    tokens: int,
    kept: int,
    optimizer: float,
    reference: int,
    accumulates: bool,
    copies: int,
    chunk: int,
) -> dict[str, float]:
    """The bytes of a training step at its peak, by their purpose.

    Args: score, a batch's forward pass, of which the logps are a result; batches, two small ready ones: what autograd
    keeps of them is counted, and goes on linearly to tokens that the largest micro-batch reads and positions kept of
    it; optimizer and reference, their bytes; accumulates, whether a backward pass finds gradients; copies of them (DDP
    has one more); chunk, how many positions have their logits at a time.

    Not all is there at once. Logits go before the trunk's backward pass, its activations while gradients come: the peak
    is at the head, inside the trunk, or at the end. Logits in float32 are there thrice in the head's backward pass.
    """
    known = bytes_of([*model.parameters(), *model.buffers()])
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = sum(p.nbytes for p in (head.parameters() if head is not None else ()) if id(p) in trained)
    gradients = copies * sum(p.nbytes for p in trained.values())
    small, large = (kept_by_autograd(model, score, batch, head) for batch in batches)
    trunk = line(small["tokens"], small["trunk"], large["tokens"], large["trunk"], at=tokens)
    saved = line(small["kept"], small["head"], large["kept"], large["head"], at=min(kept, chunk))
    # What a layer works with comes and goes; with checkpointing it is all that it would else have kept.
    work = trunk
    if any(getattr(each, "gradient_checkpointing", False) for each in model.modules()):
        whole = kept_by_autograd(model.eval(), score, batches[0], head)
        model.train()
        work = whole["trunk"] / whole["tokens"] * tokens
    work /= max((len(each) for each in model.modules() if isinstance(each, torch.nn.ModuleList)), default=1)
    in_float32 = 2 * min(kept, chunk) + (0 if takes(model, "logits_to_keep") else tokens)
    logits = saved + 4 * in_float32 * small["vocabulary"]
    parts = dict(zip(PARTS, (known, gradients, optimizer, reference, trunk, logits), strict=True))
    there = known + optimizer + reference + (gradients if accumulates else 0)
    comes = 0 if accumulates else gradients
    return parts | {"peak": there + max(trunk + logits, trunk + work + of_head, comes)}


def kept_by_autograd(model: torch.nn.Module, score: Callable[[dict], dict], batch: dict, head) -> dict[str, int]:
    """The bytes that a forward pass of a ready batch leaves to its backward pass beside the model's own, of the trunk
    and from the head on; and how many tokens it read, positions it kept and words it knows."""
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    saved, where, vocabulary = {"trunk": {}, "head": {}}, ["trunk"], [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known | saved["trunk"].keys():
            saved[where[0]][storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(*_) -> None:
        where[0] = "head"

    def leave(_module, _inputs, logits: torch.Tensor) -> None:
        vocabulary[0] = logits.shape[-1]

    hooks = [head.register_forward_pre_hook(enter), head.register_forward_hook(leave)] if head is not None else []
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = score(batch)  # while it lives, no address is given away a second time
    finally:
        for hook in hooks:
            hook.remove()
    totals = {part: sum(sizes.values()) if result else 0 for part, sizes in saved.items()}
    return totals | {"tokens": tokens_read(batch), "kept": len(batch["targets"]), "vocabulary": vocabulary[0]}


def tokens_read(batch: dict) -> int:
    """What goes through the model of a ready batch, padding included."""
    return sum(batch["inputs"][name].numel() for name in ("input_ids", "decoder_input_ids") if name in batch["inputs"])


def line(x1: float, y1: float, x2: float, y2: float, *, at: float) -> float:
    """The value at a place of the line through two points; through the second and 0 where they do not make one."""
    return y2 + (at - x2) * ((y2 - y1) / (x2 - x1) if x2 > x1 else y2 / x2)


def begin_measuring(device: torch.device, known: float) -> float | None:
    """Forgets the peak of memory so far. Returns: what a process has now beyond the known bytes, as libraries; None
    where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would else be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")
        return of_process("VmRSS") - known
    except (OSError, AttributeError):  # no Linux, or it may not
        return None


def measured_peak(device: torch.device, base: float | None) -> float | None:
    """The most bytes that there were since `begin_measuring` gave base: on a GPU what PyTorch had allocated, on a CPU
    what the process had beyond base. None where nobody counts."""
    if base is None:
        return None
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else of_process("VmHWM") - base


def of_process(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def in_words(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


# ------------------------------------------------------------------------------------------------------------- profile


def start_profile(directory: Path, rank: int) -> torch.profiler.profile:
    """A profiler that wants `between_steps` before each step: the third, fourth and fifth from here go to
    trace-rankN.json.gz, and the twenty dearest operators to operators-rankN.txt."""

    def write(profile: torch.profiler.profile) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"trace-rank{rank}.json.gz"
        profile.export_chrome_trace(str(path))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=20)
        (directory / f"operators-rank{rank}.txt").write_text(table, encoding="utf-8")
        logger.info("profile of three steps: %s (open it in ui.perfetto.dev), and operators-rank%d.txt", path, rank)

    steps = torch.profiler.schedule(skip_first=2, wait=0, warmup=1, active=3, repeat=1)
    profile = torch.profiler.profile(schedule=steps, on_trace_ready=write)
    profile.start()
    return profile


def between_steps(profile: torch.profiler.profile | None, sums: dict) -> None:
    """Tells a profile that a step begins; what it does then, as writing its files, is not of the run's "seconds"."""
    started = time.perf_counter()
    if profile:
        profile.step()
        sums["seconds"] -= time.perf_counter() - started
