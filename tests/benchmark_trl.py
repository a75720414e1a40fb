"""Times whole training steps of this package against TRL's DPOTrainer, and checks that both learn the same.

    python tests/benchmark_trl.py --trl_python OTHER_VENV/bin/python     # a random model of 44M parameters
    python tests/benchmark_trl.py --model DIR --pairs 4                  # any causal LM; TRL in the same environment
    python tests/benchmark_trl.py --agreement                            # one batch for eight steps, metrics compared

Both train in processes of their own, in turns so that a machine's moods hit both: same model, rows, order, batch size,
float32, AdamW, learning rate, no length limit, no gradient checkpointing, the default number of threads. A step's time
runs from one metrics row to the next: loading, collating, policy, reference, backward, clipping, optimizer, logging.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EOS = "<|eos|>"
COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
TOLERANCE = 1e-4


# ------------------------------------------------------------------------------------------------------ model and rows


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
    shape = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": hidden * 8 // 3 // 32 * 32}
    shape |= {"num_hidden_layers": layers, "tie_word_embeddings": True, "max_position_embeddings": 2048}
    shape |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=1)).save_pretrained(path)


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


# --------------------------------------------------------------------------- the two trainers, each in its own process


def now() -> tuple[float, float]:
    """Wall clock, and CPU seconds of this process over all its threads (a busy machine changes those less)."""
    return time.perf_counter(), time.process_time()


def common_options(setup: dict) -> dict:
    """What both call by the same names."""
    options = {"output_dir": setup["output"], "per_device_train_batch_size": setup["pairs"], "logging_steps": 1}
    options |= {"max_steps": setup["steps"], "learning_rate": setup["learning_rate"], "use_cpu": setup["use_cpu"]}
    return options | {"save_strategy": "no"}


def run_ours(setup: dict) -> dict:
    """What `python -m dpo.loop` does with this command line, plus a time stamp at each metrics row."""
    import torch
    import transformers

    from dpo.config import parse_args
    from dpo.loop import train

    stamps = []
    options = {"model_name_or_path": setup["model"], "dataset_name": setup["data"], "layout": setup["layout"]}
    options |= {"shuffle": False} | common_options(setup)
    argv = [f"--{name}={value}" for name, value in options.items()]
    rows = train(args=parse_args(argv), callbacks=[lambda row: stamps.append(now())]).rows
    return {
        "stamps": stamps,
        "rows": rows,
        "tokens": rows[-1]["tokens_seen"],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def run_trl(setup: dict) -> dict:
    """TRL's DPOTrainer as its documentation has it, plus a time stamp at each metrics row."""
    import torch
    import transformers
    import trl
    from datasets import load_dataset

    if setup["trl_compact"]:  # on a GPU TRL sends only completion positions through the head; here it can be made to
        trl.trainer.utils._use_triton = lambda device: True

    stamps, rows = [], []

    class Stamp(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:  # the last call has the whole run's summary instead
                stamps.append(now())
                rows.append(dict(logs))

    options = {"report_to": "none", "train_sampling_strategy": "sequential", "bf16": False, "max_length": None}
    options |= {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": "float32"}}
    args = trl.DPOConfig(**common_options(setup), **options)
    rows_of_text = load_dataset("json", data_files=setup["data"], split="train")
    trl.DPOTrainer(model=setup["model"], args=args, train_dataset=rows_of_text, callbacks=[Stamp()]).train()
    return {
        "stamps": stamps,
        "rows": rows,
        "tokens": rows[-1]["num_tokens"],
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


def run_profile(setup: dict) -> dict:
    """`run_ours` with clocks around the parts of a step, put there from outside."""
    import torch

    import dpo.loop
    import dpo.reference

    clocks = {}

    def clock(name: str, holder, attribute: str) -> None:
        original, clocks[name] = getattr(holder, attribute), []

        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if not setup["use_cpu"]:
                    torch.cuda.synchronize()
                clocks[name].append((started, time.perf_counter()))

        setattr(holder, attribute, timed)

    clock("forward, policy and reference", dpo.loop, "get_batch_loss_metrics")
    clock("of which reference", dpo.reference, "compute_ref_log_probs")
    clock("backward", torch.Tensor, "backward")
    clock("optimizer", torch.optim.AdamW, "step")
    clock("clipping", torch.nn.utils, "clip_grad_norm_")
    result = run_ours(setup)
    start, end = result["stamps"][setup["drop"] - 1][0], result["stamps"][-1][0]
    seconds = {name: sum(b - a for a, b in spans if start <= a <= end) for name, spans in clocks.items()}
    return {"shares": {name: part / (end - start) for name, part in seconds.items()}}


def run_child(kind: str, python: str, setup: dict) -> dict:
    """Runs this file again as one of the three above, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        setup = {**setup, "output": str(Path(scratch) / "out"), "result": str(result)}
        # What dpo/__init__.py sets for ours, TRL shall have, too: threads that do not spin for long.
        environment = {"GOMP_SPINCOUNT": "1000", **os.environ, "HF_DATASETS_CACHE": str(Path(scratch) / "cache")}
        if kind != "trl":
            environment["PYTHONPATH"] = str(ROOT)
        command = [python, str(Path(__file__).resolve()), "--child", kind, "--setup", json.dumps(setup)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command[:4])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(result.read_text())


# ----------------------------------------------------------------------------------------------------- what comes of it


def step_time(result: dict, drop: int, clock: int = 0) -> float:
    """Median seconds from one metrics row to the next, without the first `drop` steps; clock 1 is CPU seconds."""
    stamps = [stamp[clock] for stamp in result["stamps"][drop - 1 :]]
    return statistics.median(b - a for a, b in zip(stamps, stamps[1:], strict=False))


def differences(ours: dict, trl: dict) -> dict[str, float]:
    """The largest absolute difference of each compared metric over the steps."""
    pairs = list(zip(ours["rows"], trl["rows"], strict=True))
    return {key: max(abs(a[key] - b[key]) for a, b in pairs) for key in COMPARED}


def print_agreement(ours: dict, trl: dict) -> None:
    print("step  " + "".join(f"{key:>34}" for key in COMPARED))
    for step, (a, b) in enumerate(zip(ours["rows"], trl["rows"], strict=True), start=1):
        print(f"{step:4}  " + "".join(f"{a[key]:17.7f}{b[key]:17.7f}" for key in COMPARED))
    print(" diff " + "".join(f"{value:34.1e}" for value in differences(ours, trl).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl_python", default=sys.executable, help="interpreter that has TRL; by default this one")
    parser.add_argument("--model", help="model directory or Hub name; by default a random model of the shape below")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--prompt", type=int, nargs=2, default=[40, 200], help="fewest and most tokens of a prompt")
    parser.add_argument("--completion", type=int, nargs=2, default=[10, 80], help="the same of a completion")
    parser.add_argument("--pairs", type=int, default=8, help="preference pairs a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--drop", type=int, default=2, help="steps before those, which warm up, at least 1")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--layout", default="padded", help="of our batches")
    parser.add_argument("--trl_compact", action="store_true", help="let TRL score completions only, as on a GPU")
    parser.add_argument("--gpu", action="store_true", help="train on the GPU instead of the CPU")
    parser.add_argument("--agreement", action="store_true", help="one batch for eight steps: compare, do not time")
    parser.add_argument("--child", choices=("ours", "trl", "profile"), help=argparse.SUPPRESS)
    parser.add_argument("--setup", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drop < 1:
        parser.error("--drop must be at least 1: the first step has no row before it to count from")
    if args.child:
        result = {"ours": run_ours, "trl": run_trl, "profile": run_profile}[args.child](args.setup)
        Path(args.setup["result"]).write_text(json.dumps(result))
        return

    sys.stdout.reconfigure(line_buffering=True)  # a long run: each line as it comes, into files, too
    with tempfile.TemporaryDirectory() as scratch:
        model, data = args.model or str(Path(scratch) / "model"), Path(scratch) / "pairs.jsonl"
        if not args.model:
            make_model(Path(model), hidden=args.hidden, layers=args.layers, vocab=args.vocab)
        steps = 8 if args.agreement else args.drop + args.steps
        count = args.pairs if args.agreement else args.pairs * steps
        rows = make_rows(model, count, prompt=args.prompt, completion=args.completion)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        setup = {"model": model, "data": str(data), "steps": steps, "use_cpu": not args.gpu}
        setup |= {key: getattr(args, key) for key in ("pairs", "drop", "learning_rate", "layout", "trl_compact")}

        ratios, cpu_ratios = [], []
        for number in range(1 if args.agreement else args.rounds):
            ours = run_child("ours", sys.executable, setup)
            trl = run_child("trl", args.trl_python, setup)
            if number == 0:
                print(f"ours {ours['versions']}, TRL {trl['versions']}, threads {ours['threads']} and {trl['threads']}")
                print(f"{args.pairs} pairs a step, {ours['tokens'] / steps:.0f} tokens without padding")
                if ours["tokens"] != trl["tokens"]:
                    sys.exit(f"not the same batches: {ours['tokens']:.0f} tokens ours, {trl['tokens']:.0f} TRL's")
            if args.agreement:
                break
            (mine, theirs), (my_cpu, their_cpu) = (
                [step_time(result, args.drop, clock) for result in (ours, trl)] for clock in (0, 1)
            )
            ratios.append(theirs / mine)
            cpu_ratios.append(their_cpu / my_cpu)
            print(
                f"round {number + 1}: {mine:.3f} s a step ours, {theirs:.3f} s TRL's, ratio {ratios[-1]:.2f}; "
                f"CPU seconds {my_cpu:.3f} and {their_cpu:.3f}, ratio {cpu_ratios[-1]:.2f}"
            )
        if not args.agreement:
            print(f"median ratio, TRL's time / ours ({args.layout}): {statistics.median(ratios):.2f}")
            print(f"the same in CPU seconds, which other processes disturb less: {statistics.median(cpu_ratios):.2f}")
            print("where our step's time goes")
            shares = run_child("profile", sys.executable, setup)["shares"]
            for name, share in shares.items():
                print(f"{share:8.1%}  {name}")
            outside = 1 - sum(shares[name] for name in ("forward, policy and reference", "backward", "optimizer"))
            print(f"{outside:8.1%}  outside forward, backward and optimizer (clipping is part of it)")
            print("largest absolute differences to TRL over the steps:")
            print(", ".join(f"{key} {value:.1e}" for key, value in differences(ours, trl).items()))
            return
        print("each metric ours, then TRL's")
        print_agreement(ours, trl)
        worst = max(differences(ours, trl).values())
        print(f"largest difference {worst:.1e}: {'agreed' if worst < TOLERANCE else 'NOT agreed'} (below {TOLERANCE})")
        sys.exit(worst >= TOLERANCE)


if __name__ == "__main__":
    main()
