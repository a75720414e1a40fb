"""What each kind of reference costs: peak memory and seconds a step, of one model, as a Markdown table.

    python tests/benchmarks/reference.py                   # a random model of 44M parameters
    python tests/benchmarks/reference.py --model DIR       # any causal language model

Each kind trains in a process of its own, in turns so that a machine's moods hit all; medians over steps and rounds.
Memory is the largest that the process had while it trained, over what it had with its libraries loaded (on a GPU: that
torch allocated); what loading the model took for a moment is not in it. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, make_model, make_rows, memory, reset_peak_memory

LORA = {"use_peft": True, "lora_target_modules": "all-linear"}
NAMED = {"model_adapter_name": "policy", "ref_adapter_name": "reference"}
# What it is called in the table: the options, and which of the saved models they are for.
KINDS = {
    "all weights, a frozen copy": ("base", {}),
    "all weights, cached": ("base", {"precompute_ref_log_probs": True}),
    "LoRA, two instances": ("base", {**LORA, "force_use_ref_model": True, "ref_model_name_or_path": "base"}),
    "LoRA, its adapter off": ("base", LORA),
    "LoRA trained before, named adapters": ("adapter", NAMED),
    "LoRA, cached": ("base", {**LORA, "precompute_ref_log_probs": True}),
    "QLoRA (nf4), its adapter off": ("base", {**LORA, "load_in_4bit": True}),
    "QLoRA (nf4), cached": ("base", {**LORA, "load_in_4bit": True, "precompute_ref_log_probs": True}),
}


def make_models(folder: Path, model: str | None) -> None:
    """folder/base and, on it, folder/adapter, as if it had been trained; and rows of random words."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model is None:
        make_model(folder / "base", hidden=512, layers=6, vocab=49152)
        model = str(folder / "base")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "base")
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.save_pretrained(folder / "base")
    adapter = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    adapter.config._name_or_path = adapter.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter)) if parameter.requires_grad else None
    adapter.save_pretrained(folder / "adapter")
    rows = make_rows(str(folder / "base"), 64, prompt=[60, 140], completion=[60, 140])
    (folder / "rows.json").write_text(json.dumps(rows))


def train_one(folder: Path, kind: str, steps: int) -> None:
    """One kind, in this process; prints its seconds a step and its memory in MiB."""
    import torch

    from dpo.config import DPOConfig
    from dpo.loop import train

    name, options = KINDS[kind]
    options = {key: str(folder / value) if value == "base" else value for key, value in options.items()}
    options |= {"ref_cache_dir": str(folder / "cache")} if "precompute_ref_log_probs" in options else {}
    options |= {"per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "save_strategy": "no"}
    loaded, times, most = memory("VmRSS"), [], []
    args = DPOConfig(model_name_or_path=str(folder / name), output_dir=tempfile.mkdtemp(), disable_tqdm=True, **options)
    rows = json.loads((folder / "rows.json").read_text())

    def note(row: dict) -> None:
        times.append(time.perf_counter())
        if torch.cuda.is_available():
            most.append(torch.cuda.max_memory_allocated() / 2**20)
            torch.cuda.reset_peak_memory_stats()
        else:
            most.append(memory("VmHWM") - loaded)
            reset_peak_memory()

    run = train(args=args, train_dataset=rows, callbacks=[note])
    seconds = statistics.median(b - a for a, b in zip(times, times[1:], strict=False))
    print(json.dumps({"seconds": seconds, "memory": max(most[1:]), "own": run.reference.bytes() / 2**20}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or Hub name; by default random weights of 44M parameters")
    parser.add_argument("--steps", type=int, default=5, help="steps of each run, of which the first is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        return train_one(Path(args.folder), args.kind, args.steps)
    found = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), args.model)
        for _ in range(args.rounds):
            for kind in KINDS:
                command = [sys.executable, __file__, "--folder", folder, "--kind", kind, "--steps", str(args.steps)]
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    sys.exit(f"{kind}: {done.stderr.strip().splitlines()[-1]}")
                found[kind].append(json.loads(done.stdout.strip().splitlines()[-1]))
                print(f"{kind}: {found[kind][-1]}", file=sys.stderr)
    first = statistics.median(each["seconds"] for each in found["all weights, a frozen copy"])
    print("| what trains, and its reference | peak memory | the reference's own | a step | of a frozen copy's |")
    print("|---|---|---|---|---|")
    for kind, each in found.items():
        memory, own, seconds = (statistics.median(run[key] for run in each) for key in ("memory", "own", "seconds"))
        print(f"| {kind} | {memory:,.0f} MiB | {own:,.0f} MiB | {seconds:.2f} s | {seconds / first:.2f} |")


if __name__ == "__main__":
    main()
