"""Times a training step in each layout of a batch, against the padded one and a textbook's loop, over a grid of cases.

    python tests/benchmarks/layouts.py --quick                              # some minutes on two cores
    python tests/benchmarks/layouts.py --markdown grid.md --picture grid.png --growth     # all of it: hours
    python tests/benchmarks/layouts.py --ratio 4:1 --vocab 49k --train full --reference live --completions 2
    python tests/benchmarks/layouts.py --shape qwen2-7b --train lora --dtype bfloat16 --rows 8 --tokens 1000   # a GPU
    python tests/benchmarks/layouts.py --growth only --vocab 49k

A case is a ratio of prompt to completion, a vocabulary, what trains, a reference, and how many completions a row has:
of two a pair and the sigmoid loss, of more a ranking and Plackett and Luce's. In each case compete, every one a process
with a random model of its own: our layouts, and "plain", the loop of a textbook, which pads, takes a float32
log-softmax of all logits, gathers and sums up. Each round they take one step on the same rows, one after the other in
an order that rotates, and their losses must agree. A step is collating, policy, reference, loss, backward, clipping and
AdamW.

Figures are medians over rounds, without the first two, of which the second measures memory. The table says how many
times faster than padded a layout is, and, beside it, what counted operations allow (`common.step_flops`).
Utilisation is the operations that are of use (each prompt once, no padding, as in prefix_shared) over what a large
multiplication of matrices would have done in the same seconds. Memory is the most that a process held beyond the
models, gradients and the state of AdamW. On a CPU all keep the memory that they free, as the training command does.
Linux only.
"""

import argparse
import itertools
import math
import multiprocessing
import signal
import statistics
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from common import layout_counts, llama_shape, make_token_rows, memory, now, reset_peak_memory, step_flops

import dpo  # noqa: F401  sets how long threads spin, before torch is imported

import torch  # isort: skip
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from dpo.attention import attend_by_segments
from dpo.batches import moved
from dpo.collate import DataCollatorForPreference, completions_of
from dpo.distributed import keep_freed_memory
from dpo.logprobs import concatenated_forward
from dpo.losses import dpo_loss
from dpo.reference import Reference, compute_ref_log_probs

warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, in each process
# The parent imports, and computes nothing: so its forks begin at once, and each may have threads and a GPU of its own.
FORK = multiprocessing.get_context("fork")
OUT_OF_MEMORY = 3  # the exit status of a competitor that found too little
COMPETITORS = ("plain", "padded", "padding_free", "prefix_shared")
OURS = ("padding_free", "prefix_shared")  # what is measured against padded
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # of losses, relative
VOCABULARIES = {"32k": 32_000, "49k": 49_152, "152k": 151_936}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
QWEN2_05B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
SHAPES = {  # the configuration of each, and the vocabularies that are tried where none is named
    "tiny": (LlamaConfig, llama_shape(hidden=64, layers=2, vocab=512), [512]),  # for tests
    "44m": (LlamaConfig, llama_shape(hidden=512, layers=6, vocab=49_152), [32_000, 151_936]),
    "smollm2": (LlamaConfig, SMOLLM2 | {"num_key_value_heads": 3, "tie_word_embeddings": True}, [49_152]),
    "qwen2-0.5b": (Qwen2Config, QWEN2_05B | {"num_key_value_heads": 2, "tie_word_embeddings": True}, [151_936]),
    "qwen2-7b": (Qwen2Config, QWEN2_7B | {"num_key_value_heads": 4, "tie_word_embeddings": False}, [152_064]),
}
# What grows, one at a time, and the values that it takes.
GROWTH = {"rows": [1, 2, 4, 8], "tokens": [125, 250, 500, 1000], "completions": [2, 4, 8]}
GROWTH |= {"vocab": [8_000, 32_000, 49_152, 151_936]}
HEAD = """| case | layout | s a step | CPU s | rows/s | tokens/s | unique tokens/s | utilisation | peak MiB | \
× padded | allowed | × padded, CPU | × plain |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
GROWTH_HEAD = """| what | value | padded, s | prefix_shared, s | × padded | allowed |
|---|---|---|---|---|---|"""


# ------------------------------------------------------------------------------------------- a competitor, in a process


def make_models(case: dict, setup: dict) -> tuple[torch.nn.Module, torch.nn.Module | None, dict]:
    """(policy, reference or None, what `step_flops` wants to know of their weights). Policy and reference are random,
    and differ, of LoRA by an adapter that is not zero, so that losses say something from the first step on."""

    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        kind, shape, _ = SHAPES[setup["shape"]]
        config = kind(**shape | {"vocab_size": case["vocab"], "max_position_embeddings": 8192})
        with torch.device(setup["device"]):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setup["dtype"]))

    policy, ref_model = model(0), None
    config, blocks = policy.config, policy.model.layers
    weights = {"trunk": sum(p.numel() for p in blocks.parameters() if p.ndim == 2), "adapter": 0}
    weights |= {"head": policy.lm_head.weight.numel(), "layers": config.num_hidden_layers}
    weights |= {"width": config.num_attention_heads * blocks[0].self_attn.head_dim}
    if case["train"] == "lora":
        lora = {"r": setup["lora_r"], "lora_alpha": 2 * setup["lora_r"], "target_modules": ["q_proj", "v_proj"]}
        policy = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora))
        weights["adapter"] = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    elif case["reference"] == "live":
        ref_model = model(1).eval().requires_grad_(False)
    return policy.train(), ref_model, weights


def our_loss(policy, reference: Reference, rows: list[dict], layout: str, loss_type: str, device: str) -> torch.Tensor:
    """The loss as `loop.get_batch_loss_metrics` has it."""
    batch = moved(DataCollatorForPreference(pad_token_id=0, layout=layout)(rows), torch.device(device))
    logps = concatenated_forward(policy, batch, logits_budget=reference.logits_budget)
    losses, _, _ = dpo_loss(logps["chosen_logps"], logps["rejected_logps"], *reference(batch), loss_type=loss_type)
    return losses.mean()


def plain_loss(policy, reference: Reference, rows: list[dict], loss_type: str, device: str) -> torch.Tensor:
    """The loss as a textbook has it: every sequence whole, all logits, and most of them thrown away."""
    by_rank = zip(*(completions_of(row) for row in rows), strict=True)
    pairs = [pair for rank in by_rank for pair in zip((row["prompt_input_ids"] for row in rows), rank, strict=True)]
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids, attention_mask, is_scored = torch.zeros(3, len(pairs), width, dtype=torch.long)
    for number, (prompt, completion) in enumerate(pairs):
        length = len(prompt) + len(completion)
        ids[number, :length] = torch.tensor(prompt + completion)
        attention_mask[number, :length] = 1
        is_scored[number, len(prompt) : length] = 1
    ids, attention_mask, is_scored = (each.to(device) for each in (ids, attention_mask, is_scored))

    def logps(model) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()
        per_token = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        chosen, *rejected = (per_token * is_scored[:, 1:]).sum(dim=1).view(-1, len(rows))
        return chosen, torch.stack(rejected, dim=1).squeeze(1)

    policy_logps = logps(policy)
    if reference.is_cached:
        columns = ("ref_chosen_logps", "ref_rejected_logps")
        ref_logps = [torch.tensor([row[column] for row in rows], device=device) for column in columns]
    else:
        with torch.no_grad(), reference.model() as model:
            ref_logps = logps(model)
    return dpo_loss(*policy_logps, *ref_logps, loss_type=loss_type)[0].mean()


def compete(pipe, layout: str, case: dict, setup: dict) -> None:
    """Takes a step for each list of rows that comes through the pipe, and answers with what it took."""
    policy, ref_model, weights = make_models(case, setup)
    if layout in OURS:
        for model in filter(None, (policy, ref_model)):
            attend_by_segments(model)
    own = {"is_cached": case["reference"] == "cached", "logits_budget": setup["logits_budget"]}
    reference = Reference(policy=policy, ref_model=ref_model, **own)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    loss_type = "sigmoid" if case["completions"] == 2 else "plackett_luce"
    on_gpu, gradients = setup["device"] == "cuda", sum(parameter.nbytes for parameter in trained) / 2**20
    if not on_gpu:
        keep_freed_memory()
    pipe.send(weights)
    steps = 0
    while (rows := pipe.recv()) is not None:
        steps += 1
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**20 + gradients
        elif steps <= 2:  # it costs the next step time
            reset_peak_memory()
            before = memory("VmRSS") + gradients
        kept = layout_counts(layout, lengths_of(rows))["kept"]
        if not on_gpu and 4 * 4 * kept * case["vocab"] > available_memory():  # logits, float32, some four times over
            sys.exit(OUT_OF_MEMORY)
        started = synchronized_now(on_gpu)
        if layout == "plain":
            loss = plain_loss(policy, reference, rows, loss_type, setup["device"])
        else:
            loss = our_loss(policy, reference, rows, layout, loss_type, setup["device"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ended = synchronized_now(on_gpu)
        most = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory("VmHWM")
        answer = {"loss": loss.item(), "memory": most - before}
        pipe.send(answer | {"seconds": ended[0] - started[0], "cpu": ended[1] - started[1]})


def score(pipe, case: dict, setup: dict, rounds: list[list[dict]]) -> None:
    """Answers with the rows and the columns of a reference that was asked before."""
    policy, ref_model, _ = make_models(case | {"reference": "live"}, setup)
    collator, device = DataCollatorForPreference(pad_token_id=0, layout="padded"), torch.device(setup["device"])
    for rows in rounds:
        for row in rows:
            chosen, rejected = compute_ref_log_probs(moved(collator([row]), device), policy=policy, ref_model=ref_model)
            row |= {"ref_chosen_logps": chosen[0].tolist(), "ref_rejected_logps": rejected[0].tolist()}
    pipe.send(rounds)


def measure_rate(pipe, setup: dict) -> None:
    """Answers with the device and the floating-point operations a second of a large multiplication of matrices."""
    device = setup["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (1024, 1024, 4096)
    options, seconds = {"device": device, "dtype": getattr(torch, setup["dtype"])}, []
    a, b = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
    for _ in range(12):
        started = synchronized_now(device == "cuda")
        a @ b
        seconds.append(synchronized_now(device == "cuda")[0] - started[0])
    pipe.send((device, 2 * rows * inner * columns / statistics.median(seconds[2:])))


def synchronized_now(on_gpu: bool) -> tuple[float, float]:
    """`now`, after all that the GPU has to do is done."""
    if on_gpu:
        torch.cuda.synchronize()
    return now()


def available_memory() -> float:
    """Bytes that the machine can still give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 2**10


# ------------------------------------------------------------------------------------------------------------- a case


def start(function, *args) -> tuple:
    """(a process that runs function(pipe, *args), our end of the pipe)."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=stop_without_memory, args=(function, there, *args), daemon=True)
    process.start()
    there.close()
    return process, here


def stop_without_memory(function, *args) -> None:
    try:
        function(*args)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            sys.exit(OUT_OF_MEMORY)
        raise


def hear(process, pipe):
    """What a process answers, None if it found too little memory, or was killed for it."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        if process.exitcode in (OUT_OF_MEMORY, -signal.SIGKILL):
            return None
        sys.exit("a process failed, what it says is above")


def lengths_of(rows: list[dict]) -> list[tuple[int, list[int]]]:
    """As `layout_counts` wants them."""
    return [(len(row["prompt_input_ids"]), list(map(len, completions_of(row)))) for row in rows]


def run_case(case: dict, layouts: list[str], setup: dict) -> tuple[dict, dict, list]:
    """All rounds of a case. Returns: ({layout: what it answered in each round}, the weights as in `make_models`, the
    lengths of each round's rows); a layout that found too little memory is not among them."""
    prompt, completion = map(int, case["ratio"].split(":"))
    means = {name: case["tokens"] * part / (prompt + completion) for name, part in
             (("prompt", prompt), ("completion", completion))}  # fmt: skip
    shape = {**means, "completions": case["completions"], "vocab": case["vocab"]}
    rounds = [make_token_rows(case["rows"], **shape, seed=number) for number in range(setup["rounds"])]
    lengths = [lengths_of(rows) for rows in rounds]
    if case["reference"] == "cached" and (rounds := hear(*start(score, case, setup, rounds))) is None:
        return {}, {}, lengths
    found, weights = {layout: [] for layout in layouts}, {}
    for group in [[layout] for layout in layouts] if setup["one_by_one"] else [layouts]:
        running = {layout: start(compete, layout, case, setup) for layout in group}
        first = {layout: hear(*each) for layout, each in running.items()}
        weights = next(filter(None, first.values()), weights)
        gone = {layout for layout, answer in first.items() if answer is None}
        for number, rows in enumerate(rounds):
            turn = number % len(group)
            for layout in group[turn:] + group[:turn]:
                if layout in gone:
                    continue
                process, pipe = running[layout]
                with suppress(BrokenPipeError):
                    pipe.send(rows)
                found[layout].append(hear(process, pipe))
                gone |= {layout} if found[layout][-1] is None else set()
        for layout, (process, pipe) in running.items():
            if layout not in gone:
                pipe.send(None)
            process.join()
        for layout in gone:
            del found[layout]
    for layout in found:
        if not (error := loss_error(found, layout)) <= TOLERANCE[setup["dtype"]]:  # it would not be the same work
            sys.exit(f"{name_of(case)}: losses of {layout} are off from those of {next(iter(found))} by {error:.1e}")
    return found, weights, lengths


def loss_error(found: dict, layout: str) -> float:
    """How far a layout's losses are from those of the case's first competitor, of their size, over all rounds."""
    first = next(iter(found.values()))
    pairs = zip(found[layout], first, strict=True)
    return max(abs(own["loss"] - other["loss"]) / abs(other["loss"]) for own, other in pairs)


def figures(case: dict, found: dict, weights: dict, lengths: list, setup: dict) -> dict[str, dict[str, float]]:
    """{layout: its figures}, medians over the rounds that count; ratios are of each round, whose rows are the same."""

    def flops(layout: str, number: int) -> float:
        counts = layout_counts(layout, lengths[number])
        return step_flops(**counts, **weights, live=case["reference"] == "live")

    def median(value) -> float:
        return statistics.median(value(number) for number in range(2, setup["rounds"]))

    def ratio(layout: str, other: str, clock: str) -> float:
        if other not in found:
            return float("nan")
        return median(lambda number: found[other][number][clock] / found[layout][number][clock])

    def of(layout: str) -> dict[str, float]:
        own = found[layout]
        tokens, unique = (
            [layout_counts(name, each)["tokens"] for each in lengths] for name in ("padding_free", "prefix_shared")
        )
        return {
            "seconds": median(lambda number: own[number]["seconds"]),
            "cpu": median(lambda number: own[number]["cpu"]),
            "rows": median(lambda number: case["rows"] / own[number]["seconds"]),
            "tokens": median(lambda number: tokens[number] / own[number]["seconds"]),
            "unique": median(lambda number: unique[number] / own[number]["seconds"]),
            "utilisation": median(
                lambda number: flops("prefix_shared", number) / own[number]["seconds"] / setup["rate"]
            ),
            "memory": own[1]["memory"],  # from then on AdamW has its state
            "ratio": ratio(layout, "padded", "seconds"),
            "allowed": median(lambda number: flops("padded", number) / flops(layout, number)),
            "cpu_ratio": ratio(layout, "padded", "cpu"),
            "of_plain": ratio(layout, "plain", "seconds"),
            "loss_error": loss_error(found, layout),
        }

    return {layout: of(layout) for layout in found}


# ------------------------------------------------------------------------------------------------------ what is printed


def name_of(case: dict) -> str:
    """A case in a few words."""
    vocab = next((name for name, size in VOCABULARIES.items() if size == case["vocab"]), str(case["vocab"]))
    return f"{case['ratio']}, {vocab}, {case['train']}, {case['reference']}, K={case['completions']}"


def table_lines(case: dict, layouts: list[str], measured: dict) -> list[str]:
    """A case's lines in the table."""
    lines = []
    for layout in layouts:
        if layout not in measured:
            lines.append(f"| {name_of(case)} | {layout} | too little memory |" + " |" * 10)
            continue
        f = measured[layout]
        cells = [f"{f['seconds']:.3g}", f"{f['cpu']:.3g}", f"{f['rows']:.3g}", f"{f['tokens']:,.0f}"]
        cells += [f"{f['unique']:,.0f}", f"{f['utilisation']:.2f}", f"{f['memory']:,.0f}"]
        ratios = [f[name] for name in ("ratio", "allowed", "cpu_ratio", "of_plain")]
        cells += ["–" if math.isnan(each) else f"{each:.2f}" for each in ratios]
        lines.append(f"| {name_of(case)} | {layout} | {' | '.join(cells)} |")
    return lines


def closing_lines(results: list[tuple[dict, dict]]) -> list[str]:
    """What stands out in the grid."""
    ours = [(name_of(case), layout, own[layout]) for case, own in results for layout in OURS if layout in own]
    short = [f"{name} {layout} {f['ratio']:.2f} of {f['allowed']:.2f}" for name, layout, f in ours
             if f["ratio"] < 0.85 * f["allowed"]]  # fmt: skip
    slow = [f"{name} {layout} {f['ratio']:.2f}" for name, layout, f in ours if f["ratio"] < 0.97]
    best = [(max(f["utilisation"] for f in own.values()), name_of(case)) for case, own in results if own]
    lowest = "{:.2f} ({})".format(*min(best)) if best else "none"
    error = max([0.0, *(f["loss_error"] for _, own in results for f in own.values())])
    return [
        f"Below 85% of allowed: {'; '.join(short) or 'none'}.",
        f"Below 0.97 of padded: {'; '.join(slow) or 'none'}.",
        f"Lowest utilisation of a case's best layout: {lowest}.",
        f"Losses agree to {error:.0e} of their size.",
    ]


def growth_lines(axis: str, points: list[tuple[int, dict]]) -> list[str]:
    """How seconds a step grow with one axis, and the exponent of the power law that fits best."""

    def figure(measured: dict, layout: str, name: str) -> str:
        return f"{measured[layout][name]:.3g}" if layout in measured else "–"

    names = (
        ("padded", "seconds"),
        ("prefix_shared", "seconds"),
        ("prefix_shared", "ratio"),
        ("prefix_shared", "allowed"),
    )
    lines = [f"| {axis} | {value:,} | {' | '.join(figure(own, *name) for name in names)} |" for value, own in points]
    exponents = []
    for layout in ("padded", "prefix_shared"):
        logs = [(math.log(value), math.log(own[layout]["seconds"])) for value, own in points if layout in own]
        slope = statistics.linear_regression(*zip(*logs, strict=True)).slope if len(logs) > 1 else math.nan
        exponents.append("–" if math.isnan(slope) else f"value^{slope:.2f}")
    return [*lines, f"| {axis} | grows as | {' | '.join(exponents)} | | |"]


def draw(path: str, results: list, growth: dict) -> None:
    """Measured against allowed, a point for each case and layout; and a curve for each axis of growth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, heights = max(1, len(growth)), [5] * bool(results) + [3.2] * bool(growth)
    figure = plt.figure(figsize=(max(6, 3.2 * columns), sum(heights)))
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    if results:
        axes = rows[0].subplots()
        for layout, marker in (("plain", "x"), ("padding_free", "s"), ("prefix_shared", "o")):
            found = [own[layout] for _, own in results if layout in own]
            axes.scatter([f["allowed"] for f in found], [f["ratio"] for f in found], marker=marker, label=layout)
        most = max([1.0, *(f["allowed"] for _, own in results for f in own.values())]) * 1.1
        axes.plot([0, most], [0, most], color="grey", linewidth=0.8, label="as allowed")
        axes.plot([0, most], [0, 0.85 * most], color="grey", linewidth=0.8, linestyle=":", label="85% of it")
        axes.axhline(0.97, color="grey", linewidth=0.8, linestyle="--", label="0.97 of padded")
        axes.set(xlabel="times faster than padded, as counted operations allow", ylabel="measured")
        axes.legend(fontsize=8)
    if growth:
        panels = rows[-1].subplots(1, columns, squeeze=False, gridspec_kw={"wspace": 0.35})[0]
        for axes, (axis, points) in zip(panels, growth.items(), strict=True):
            for layout in ("padded", "prefix_shared"):
                known = [(value, own[layout]["seconds"]) for value, own in points if layout in own]
                axes.plot([x for x, _ in known], [y for _, y in known], marker="o", label=layout)
            axes.set(xlabel=axis, ylabel="seconds a step" if axes is panels[0] else "", xlim=(0, None), ylim=(0, None))
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


# ---------------------------------------------------------------------------------------------------------------- main


def vocabulary(text: str) -> int:
    return VOCABULARIES[text] if text in VOCABULARIES else int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid, and few rounds")
    parser.add_argument("--layout", nargs="+", choices=COMPETITORS, default=list(COMPETITORS))
    parser.add_argument("--ratio", nargs="+", metavar="P:C", help="of prompt to completion; 4:1 1:1 1:4")
    vocabularies = "32k 49k 152k or numbers; by default 32k 152k, of other shapes their own"
    parser.add_argument("--vocab", nargs="+", type=vocabulary, metavar="V", help=vocabularies)
    parser.add_argument("--train", nargs="+", choices=("full", "lora"), help="full lora")
    parser.add_argument("--reference", nargs="+", choices=("live", "cached"), help="live cached")
    parser.add_argument("--completions", nargs="+", type=int, metavar="K", help="of a row; 2 4 8")
    parser.add_argument("--rows", type=int, default=4, help="a step")
    parser.add_argument("--tokens", type=int, default=250, help="mean of prompt and completion together")
    parser.add_argument("--rounds", type=int, help="of which the first two do not count; 6, quick 4")
    parser.add_argument("--shape", choices=SHAPES, default="44m", help="of the model, with random weights")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU if there is one")
    parser.add_argument(
        "--logits_budget", type=float, metavar="GIB", help="of our layouts; beyond it the head in chunks"
    )
    parser.add_argument("--lora_r", type=int, default=16, help="rank, on q_proj and v_proj")
    parser.add_argument("--one_by_one", action="store_true", help="not in turns: of large models few fit into memory")
    parser.add_argument("--growth", nargs="?", choices=("too", "only"), const="too", help="measure how a step grows")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there, too")
    parser.add_argument("--picture", metavar="FILE", help="draw them")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (4 if args.quick else 6)
    args.ratio = args.ratio or (["4:1", "1:4"] if args.quick else ["4:1", "1:1", "1:4"])
    args.vocab = args.vocab or SHAPES[args.shape][2][: 1 if args.quick else None]
    args.train = args.train or (["full"] if args.quick else ["full", "lora"])
    args.reference = args.reference or (["live"] if args.quick else ["live", "cached"])
    args.completions = args.completions or ([2, 4] if args.quick else [2, 4, 8])
    for ratio in args.ratio:
        parts = ratio.split(":")
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
            parser.error(f"--ratio {ratio}: two numbers above 0 with a colon between them, as 4:1")
    if args.rounds < 3:
        parser.error("--rounds must be at least 3: the first two do not count")
    if min(args.completions) < 2:
        parser.error("--completions must be at least 2: a pair")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sys.stdout.reconfigure(line_buffering=True)  # a long run: each line as it comes, into files, too
    names = ("shape", "dtype", "device", "lora_r", "rounds", "one_by_one", "logits_budget")
    setup = {name: getattr(args, name) for name in names}
    setup["device"], setup["rate"] = hear(*start(measure_rate, setup))
    written = []

    def say(*lines: str) -> None:
        written.extend(lines)
        print(*lines, sep="\n")
        if args.markdown:
            Path(args.markdown).write_text("\n".join(written) + "\n")

    say(
        f"{args.shape}, {args.dtype}, {setup['device']}, {args.rows} rows a step, prompt and completion {args.tokens} "
        f"tokens together, medians of {args.rounds - 2} rounds; matrices at {setup['rate'] / 1e9:,.0f} GFLOP/s",
        "",
    )
    results, growth = [], {}
    axes = ("ratio", "vocab", "train", "reference", "completions")
    grid = itertools.product(*(getattr(args, axis) for axis in axes))
    cases = [{"rows": args.rows, "tokens": args.tokens, **dict(zip(axes, values, strict=True))} for values in grid]
    if args.growth != "only":
        say(HEAD)
        for case in cases:
            found, weights, lengths = run_case(case, args.layout, setup)
            results.append((case, figures(case, found, weights, lengths, setup)))
            say(*table_lines(case, args.layout, results[-1][1]))
        say("")
    if args.growth:
        say(f"How a step grows from {name_of(cases[0])}:", "", GROWTH_HEAD)
        for axis, values in GROWTH.items():
            growth[axis] = []
            for value in values[:2] if args.quick else values:
                case = cases[0] | {axis: value}
                growth[axis].append((value, figures(case, *run_case(case, ["padded", "prefix_shared"], setup), setup)))
            say(*growth_lines(axis, growth[axis]))
        say("")
    if results:
        say(*closing_lines(results))
    if args.picture:
        draw(args.picture, results, growth)


if __name__ == "__main__":
    main()
