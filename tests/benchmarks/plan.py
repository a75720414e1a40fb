"""The bytes that DDP and FSDP keep and send, counted on real processes, for tutorial 8 and its tests.

    torchrun --standalone --nproc_per_node 4 tests/benchmarks/plan.py

One optimizer step of each case on a random Llama of 29 million parameters, laid out by dpo.sharding. Prints a Python
dict: of each case the bytes that the process with the most holds, those of 16-bit copies of weights (autocast's that
its graph keeps; the largest matrix made of 4 bits), and those of all collectives' buffers in the step (the whole one of
an all-gather or a reduce-scatter, of all processes together).

    python tests/benchmarks/plan.py --peaks
    torchrun --standalone --nproc_per_node 4 tests/benchmarks/plan.py --peaks

A whole run of dpo.loop, of three steps in float32 on a random Llama of 50 million parameters, loaded by its name; of
many processes with --fsdp full_shard. Prints the most memory that each process had in each phase beyond what it had
before. With MALLOC_MMAP_THRESHOLD_=65536 in the environment what is freed goes at once; else it counts.
"""

import argparse
import ctypes
import gc
import os
import pprint
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo import checkpoint, costs, distributed, models
from dpo.config import DPOConfig
from dpo.loop import train
from dpo.sharding import local, shard

SIZES = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1376, "vocab_size": 16384}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CASES = {  # the words of the tutorial's plan
    "DDP": {},
    "DDP, autocast": {"compute": "bfloat16"},
    "DDP, LoRA": {"rank": 6},
    "DDP, QLoRA": {"rank": 6, "weights": "nf4", "compute": "bfloat16"},
    "FSDP": {"how": "fsdp"},
    "FSDP, two micro-batches": {"how": "fsdp", "micro_batches": 2},
    "FSDP, checkpointing": {"how": "fsdp", "checkpointing": True},
    "FSDP, live reference": {"how": "fsdp", "reference": "live"},
    "FSDP, autocast": {"how": "fsdp", "compute": "bfloat16"},
    "FSDP, gathered in bfloat16": {"how": "fsdp", "compute": "bfloat16", "gathered_in": "bfloat16"},
    "FSDP, all in bfloat16": {
        "how": "fsdp", "weights": "bfloat16", "compute": "bfloat16", "gathered_in": "bfloat16"
    },
    "FSDP, LoRA": {"how": "fsdp", "rank": 6},
    "FSDP, LoRA, live reference": {"how": "fsdp", "rank": 6, "reference": "live"},
    "FSDP, LoRA, bfloat16 base": {"how": "fsdp", "rank": 6, "weights": "bfloat16", "compute": "bfloat16"},
    "FSDP, QLoRA": {"how": "fsdp", "rank": 6, "weights": "nf4", "compute": "bfloat16"},
    "FSDP, QLoRA, bf16, live": {
        "how": "fsdp", "rank": 6, "weights": "nf4", "compute": "bfloat16", "gathered_in": "bfloat16",
        "reference": "live",
    },
}  # fmt: skip
COLLECTIVES = {
    "c10d._allgather_base_.default": "all_gathered",
    "c10d._reduce_scatter_base_.default": "reduce_scattered",
    "c10d.allreduce_.default": "all_reduced",
}


class Counted(TorchDispatchMode):
    """Inside, adds up the bytes of collectives' buffers: of each the largest tensor that it takes; and remembers the
    largest matrix made of 4 bits."""

    def __init__(self):
        super().__init__()
        self.bytes, self.unpacked = dict.fromkeys(COLLECTIVES.values(), 0), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in COLLECTIVES:
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            self.bytes[COLLECTIVES[str(func)]] += max(each.nbytes for each in tensors)
        result = func(*args, **(kwargs or {}))
        if str(func) == "bitsandbytes.dequantize_4bit.default":
            self.unpacked = max(self.unpacked, result.nbytes)
        return result


@contextmanager
def counted_copies(model: torch.nn.Module):
    """Inside, the dict given gets the bytes of the 16-bit matrices of a weight's shape that autograd keeps."""
    shapes, found = {tuple(sorted(each.shape)) for each in model.parameters() if each.ndim == 2}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in shapes:
            found[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def held(tensors) -> int:
    """Bytes that this process keeps of tensors."""
    return sum(local(each).nbytes for each in tensors)


def scales() -> list[torch.Tensor]:
    """What this process has of the scales of 4-bit weights, wherever bitsandbytes keeps them."""
    gc.collect()
    return [each.absmax for each in gc.get_objects() if type(each).__name__ == "QuantState"]


def make(weights: str, compute: str) -> LlamaForCausalLM:
    """The random model; one in 4 bits as the code loads it."""
    config = LlamaConfig(**SIZES, **HEADS, use_cache=False)
    if weights != "nf4":
        return LlamaForCausalLM(config).to(getattr(torch, weights))
    bits = {"load_in_4bit": True, "load_in_8bit": False, "quant_type": "nf4", "nested": False, "dtype": compute}
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            LlamaForCausalLM(config).save_pretrained(own)
        dist.barrier()
        model = models.load_model(folder[0], dtype=compute, **models.quantization(**bits))
        dist.barrier()
    return model


def measure(
    *,
    how: str = "ddp",
    micro_batches: int = 1,
    weights: str = "float32",
    compute: str = "float32",
    gathered_in: str | None = None,
    rank: int | None = None,
    reference: str = "cached",
    checkpointing: bool = False,
) -> dict[str, int]:
    """What this process holds after a step, and the buffers of that step, the second."""
    torch.manual_seed(0)
    model, second = make(weights, compute), None
    if reference == "live" and not rank:
        second = make(weights, compute).requires_grad_(False)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = model if how == "fsdp" else DistributedDataParallel(model)
    for each in (model, second) if how == "fsdp" else ():
        if each is not None:
            shard(each, torch.device("cpu"), compute_dtype=gathered_in and getattr(torch, gathered_in))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    is_autocast = compute != (gathered_in or (compute if weights == "nf4" else weights))
    ids = torch.randint(0, SIZES["vocab_size"], (2, 16))
    for _ in range(2):
        optimizer.zero_grad()
        with Counted() as counted:
            for number in range(micro_batches):
                if how == "ddp":  # as in a window of micro-batches: gradients travel once
                    policy.require_backward_grad_sync = number == micro_batches - 1
                with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast), counted_copies(model) as copies:
                    loss = policy(input_ids=ids, labels=ids).loss
                if reference == "live":
                    with torch.no_grad():
                        if second is not None:
                            second(input_ids=ids)
                        else:
                            with model.disable_adapter():
                                policy(input_ids=ids)
                loss.backward()
        optimizer.step()
    state = [each for one in optimizer.state.values() for key, each in one.items() if key != "step"]
    sizes = {
        "weights": held(model.parameters()) + held(scales() if weights == "nf4" else ()),
        "copies": sum(copies.values()) if is_autocast else counted.unpacked,
        "gradients": held(each.grad for each in trained),
    }
    return sizes | {"optimizer": held(state)} | counted.bytes


# --------------------------------------------------------------------------------------------- the peak of a whole run

LARGE = {"num_hidden_layers": 16, "hidden_size": 512, "intermediate_size": 1376, "vocab_size": 4096}
TINY = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 16}


def save_random(sizes: dict[str, int], folder: Path) -> None:
    """A random model and a tokenizer of a few words, saved as users have them."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **HEADS)).save_pretrained(folder)
    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", "a", "b", "c"))}
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


@contextmanager
def noted_peaks():
    """Inside, the dict given gets the most memory of each phase of a run of dpo.loop. A checkpoint's phase goes on with
    the training that follows."""
    calls = {"training": (costs, "begin_measuring"), "checkpoint": (checkpoint, "begin_checkpoint")}
    calls["export"] = (checkpoint, "save_model")
    peaks, phase = {}, ["loading"]

    def turn(to: str) -> None:
        peaks[phase[0]] = max(peaks.get(phase[0], 0), costs.of_process("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        phase[0] = to

    def turning(to: str, function):
        def turned(*args, **kwargs):
            turn(to)
            return function(*args, **kwargs)

        return turned

    with ExitStack() as stack:
        for to, (module, name) in calls.items():
            stack.enter_context(mock.patch.object(module, name, turning(to, getattr(module, name))))
        yield peaks
        turn("after")


def go(folder: Path, output_dir: Path, *, saves: bool) -> None:
    """A run of three steps of one short pair in each process."""
    rows = [{"prompt": "a b " * 8 + "a" * (i % 2), "chosen": " b" * 8, "rejected": " c" * 8} for i in range(16)]
    options = {"per_device_train_batch_size": 1, "max_steps": 3, "use_cpu": True, "disable_tqdm": True}
    options |= {"save_strategy": "steps", "save_steps": 2} if saves else {"save_strategy": "no"}
    options |= {"fsdp": "full_shard"} if "WORLD_SIZE" in os.environ else {}
    train(str(folder), args=DPOConfig(output_dir=str(output_dir), **options), train_dataset=rows)


def measure_peaks(folder: Path, *, saves: bool) -> list[dict[str, int]]:
    """Of each process the most memory in each phase of a run, beyond what it had before."""
    go(folder / "tiny", folder / f"warm {saves}", saves=saves)  # what libraries load at first use is no part of a model
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = costs.of_process("VmRSS")
    with noted_peaks() as peaks:
        go(folder / "large", folder / f"run {saves}", saves=saves)
    own = {phase: peak - base for phase, peak in peaks.items()}
    return distributed.gather_lists([own], distributed.setup(use_cpu=True))


def print_peaks() -> None:
    world = distributed.setup(use_cpu=True)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(distributed.from_first(own, world))
        if world.rank == 0:  # a process of its own makes the models: their memory is gone with it
            subprocess.run([sys.executable, __file__, "--make", folder], check=True)
        distributed.barrier(world)
        found = {kind: measure_peaks(folder, saves=kind == "checkpoint") for kind in ("plain", "checkpoint")}
        distributed.barrier(world)
    if world.rank == 0:
        pprint.pp(found, width=118)
    distributed.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peaks", action="store_true", help="the peak of a whole run")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.make:
        for name, sizes in (("tiny", TINY), ("large", LARGE)):
            save_random(sizes, args.make / name)
    elif args.peaks:
        print_peaks()
    else:
        print_counts()


def print_counts() -> None:
    dist.init_process_group("gloo")
    result = {}
    for name, case in CASES.items():
        own = [None] * dist.get_world_size()
        dist.all_gather_object(own, measure(**case))
        result[name] = {key: max(each[key] for each in own) for key in own[0]}
    if dist.get_rank() == 0:
        pprint.pp(result, width=118)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
