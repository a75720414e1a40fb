"""Times whole training steps of this package against TRL's DPOTrainer, and checks that both learn the same.

    python tests/benchmarks/trl.py --trl_python OTHER_VENV/bin/python     # a random model of 44M parameters
    python tests/benchmarks/trl.py --trl_python A/bin/python B/bin/python # two versions of TRL
    python tests/benchmarks/trl.py --trl_python python@DIR                # TRL by `pip install --no-deps --target DIR`
    python tests/benchmarks/trl.py --model DIR --pairs 4 --lora 16        # any causal LM; TRL in the same environment
    python tests/benchmarks/trl.py --agreement                            # one batch for eight steps, compared

All train in processes of their own, in turns so that a machine's moods hit all: same model, rows, order, batch size,
float32, AdamW, learning rate, no length limit, no gradient checkpointing, the default number of threads. A step's time
runs from one metrics row to the next: loading, collating, policy, reference, backward, clipping, optimizer, logging.
TRL may be any version from 0.13 on. Adapters (--lora) begin with random numbers of their own, so that losses then agree
roughly.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, make_model, make_rows, now

COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
TOLERANCE = 1e-4
LORA = {"lora_alpha": 32, "lora_dropout": 0.0}  # of both


# --------------------------------------------------------------------------- the two trainers, each in its own process


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
    if setup["lora"]:
        options |= {"use_peft": True, "lora_r": setup["lora"], "lora_target_modules": "q_proj,v_proj"} | LORA
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

    # On a GPU newer versions send only completion positions through the head; here they can be made to.
    is_compact = setup["trl_compact"] and hasattr(trl.trainer.utils, "_use_triton")
    if is_compact:
        trl.trainer.utils._use_triton = lambda device: True

    stamps, rows = [], []

    class Stamp(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:  # the last call has the whole run's summary instead
                stamps.append(now())
                rows.append(dict(logs))

    class Trainer(trl.DPOTrainer):
        def _get_train_sampler(self, *args):  # in the rows' order; older versions have no option for it
            return torch.utils.data.SequentialSampler(self.train_dataset)

    # Versions differ in what they have; of what this one has none shall cut anything.
    known = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    no_limits = dict.fromkeys(("max_length", "max_prompt_length", "max_completion_length"))
    is_newer = int(transformers.__version__.split(".")[0]) >= 5
    dtype = "dtype" if is_newer else "torch_dtype"
    options = {"report_to": "none", "bf16": False, "gradient_checkpointing": False, **no_limits}
    options |= {"model_init_kwargs": {dtype: "float32"}}
    args = trl.DPOConfig(**common_options(setup), **{key: value for key, value in options.items() if key in known})
    lora = None
    if setup["lora"]:
        from peft import LoraConfig

        lora = LoraConfig(task_type="CAUSAL_LM", r=setup["lora"], target_modules=["q_proj", "v_proj"], **LORA)
    data = {"train_dataset": load_dataset("json", data_files=setup["data"], split="train")}
    # Older versions do not know the name under which newer ones save a tokenizer's class.
    tokenizer_class = transformers.AutoTokenizer if is_newer else transformers.PreTrainedTokenizerFast
    data |= {"processing_class": tokenizer_class.from_pretrained(setup["model"])}
    Trainer(model=setup["model"], args=args, **data, peft_config=lora, callbacks=[Stamp()]).train()
    return {
        "stamps": stamps,
        "rows": rows,
        "name": f"TRL {trl.__version__}{', compact' if is_compact else ''}",
        "tokens": rows[-1].get("num_tokens"),  # older versions do not count them
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
    """Runs this file again as one of the three above, in a process of its own. Args: python, an interpreter, or
    INTERPRETER@DIR, DIR a directory of packages that it imports first."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        setup = {**setup, "output": str(Path(scratch) / "out"), "result": str(result)}
        # What dpo/__init__.py sets for ours, TRL shall have, too: threads that do not spin for long.
        environment = {"GOMP_SPINCOUNT": "1000", **os.environ, "HF_DATASETS_CACHE": str(Path(scratch) / "cache")}
        python, _, packages = python.partition("@")
        if kind != "trl":
            environment["PYTHONPATH"] = str(ROOT)
        elif packages:
            environment["PYTHONPATH"] = os.path.abspath(packages)
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
    interpreters = "interpreters that have TRL, each may be PYTHON@DIR of packages; by default this one"
    parser.add_argument("--trl_python", nargs="+", default=[sys.executable], help=interpreters)
    parser.add_argument("--model", help="model directory or Hub name; by default a random model of the shape below")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--prompt", type=int, nargs=2, default=[40, 200], help="fewest and most tokens of a prompt")
    parser.add_argument("--completion", type=int, nargs=2, default=[10, 80], help="the same of a completion")
    parser.add_argument("--pairs", type=int, default=8, help="preference pairs a step")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="R", help="train a LoRA of this rank on q_proj and v_proj"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--drop", type=int, default=2, help="steps before those, which warm up, at least 1")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--layout", default="auto", help="of our batches")
    parser.add_argument(
        "--trl_compact", action="store_true", help="TRLs that can score completions only, as on a GPU, do"
    )
    parser.add_argument("--gpu", action="store_true", help="train on the GPU instead of the CPU")
    parser.add_argument("--agreement", action="store_true", help="one batch for eight steps: compare, do not time")
    parser.add_argument("--child", choices=("ours", "trl", "profile"), help=argparse.SUPPRESS)
    parser.add_argument("--setup", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drop < 1:
        parser.error("--drop must be at least 1: the first step has no row before it to count from")
    if args.agreement and args.lora:
        parser.error("--agreement is of all weights: adapters begin with other random numbers; leave out --lora")
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
        setup |= {
            key: getattr(args, key) for key in ("pairs", "drop", "learning_rate", "layout", "lora", "trl_compact")
        }

        ratios = [([], []) for _ in args.trl_python]  # of each TRL, by wall clock and by CPU seconds
        for number in range(1 if args.agreement else args.rounds):
            ours = run_child("ours", sys.executable, setup)
            others = [run_child("trl", python, setup) for python in args.trl_python]
            if number == 0:
                print(f"ours {ours['versions']}, threads {ours['threads']}")
                print(f"{args.pairs} pairs a step, {ours['tokens'] / steps:.0f} tokens without padding")
            for trl, (by_clock, by_cpu) in zip(others, ratios, strict=True):
                if number == 0:
                    print(f"{trl['name']} {trl['versions']}, threads {trl['threads']}")
                if trl["tokens"] not in (None, ours["tokens"]):
                    sys.exit(f"not the same batches: {ours['tokens']:.0f} tokens ours, {trl['tokens']:.0f} TRL's")
                if args.agreement:
                    continue
                (mine, theirs), (my_cpu, their_cpu) = (
                    [step_time(result, args.drop, clock) for result in (ours, trl)] for clock in (0, 1)
                )
                by_clock.append(theirs / mine)
                by_cpu.append(their_cpu / my_cpu)
                print(
                    f"round {number + 1}: {mine:.3f} s a step ours, {theirs:.3f} s {trl['name']}, "
                    f"ratio {by_clock[-1]:.2f}; CPU seconds {my_cpu:.3f} and {their_cpu:.3f}, ratio {by_cpu[-1]:.2f}"
                )
        if args.agreement:
            for trl in others:
                print(f"each metric ours, then that of {trl['name']}")
                print_agreement(ours, trl)
            worst = max(max(differences(ours, trl).values()) for trl in others)
            is_close = worst < TOLERANCE
            print(f"largest difference {worst:.1e}: {'agreed' if is_close else 'NOT agreed'} (below {TOLERANCE})")
            sys.exit(not is_close)
        for trl, (by_clock, by_cpu) in zip(others, ratios, strict=True):
            print(f"median ratio, time of {trl['name']} / ours ({args.layout}): {statistics.median(by_clock):.2f}")
            print(f"the same in CPU seconds, which other processes disturb less: {statistics.median(by_cpu):.2f}")
            print("largest absolute differences to it over the steps:")
            print(", ".join(f"{key} {value:.1e}" for key, value in differences(ours, trl).items()))
        print("where our step's time goes")
        shares = run_child("profile", sys.executable, setup)["shares"]
        for name, share in shares.items():
            print(f"{share:8.1%}  {name}")
        outside = 1 - sum(shares[name] for name in ("forward, policy and reference", "backward", "optimizer"))
        print(f"{outside:8.1%}  outside forward, backward and optimizer (clipping is part of it)")


if __name__ == "__main__":
    main()
