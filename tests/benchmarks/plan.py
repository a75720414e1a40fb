"""The bytes that DDP and FSDP keep and send, counted on real processes, for tutorial 8 and its tests.

    torchrun --standalone --nproc_per_node 4 tests/benchmarks/plan.py

One optimizer step of each case on a random Llama of 29 million parameters. Prints a Python dict: of each case the bytes
that the process with the most holds, those of autocast's copies of weights that its graph keeps, and those of all
collectives' buffers in the step (the whole one of an all-gather or a reduce-scatter, of all processes together).
"""

import argparse
import pprint
from contextlib import contextmanager

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1376, "vocab_size": 16384}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CASES = {  # the words of the tutorial's plan
    "DDP": {},
    "DDP, autocast": {"compute": "bfloat16"},
    "DDP, LoRA": {"rank": 6},
    "FSDP": {"how": "fsdp"},
    "FSDP, two micro-batches": {"how": "fsdp", "micro_batches": 2},
    "FSDP, checkpointing": {"how": "fsdp", "checkpointing": True},
    "FSDP, live reference": {"how": "fsdp", "reference": "live"},
    "FSDP, autocast": {"how": "fsdp", "compute": "bfloat16"},
    "FSDP, gathered in bfloat16": {"how": "fsdp", "compute": "bfloat16", "gathered_in": "bfloat16"},
    "FSDP, LoRA": {"how": "fsdp", "rank": 6},
    "FSDP, LoRA, live reference": {"how": "fsdp", "rank": 6, "reference": "live"},
    "FSDP, LoRA, bfloat16 base": {"how": "fsdp", "rank": 6, "weights": "bfloat16", "compute": "bfloat16"},
}
COLLECTIVES = {
    "c10d._allgather_base_.default": "all_gathered",
    "c10d._reduce_scatter_base_.default": "reduce_scattered",
    "c10d.allreduce_.default": "all_reduced",
}


class Counted(TorchDispatchMode):
    """Inside, adds up the bytes of collectives' buffers: of each the largest tensor that it takes."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(COLLECTIVES.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in COLLECTIVES:
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            self.bytes[COLLECTIVES[str(func)]] += max(each.nbytes for each in tensors)
        return func(*args, **(kwargs or {}))


def shard(model: torch.nn.Module, gathered_in: str | None) -> None:
    """FSDP2's way: each block, then the root."""
    mixed = {"param_dtype": getattr(torch, gathered_in), "reduce_dtype": torch.float32} if gathered_in else {}
    for module in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"] + [model]:
        fully_shard(module, mp_policy=MixedPrecisionPolicy(**mixed))


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
    return sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)


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
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, use_cache=False)).to(getattr(torch, weights))
    second = None
    if reference == "live" and not rank:
        second = LlamaForCausalLM(model.config).to(getattr(torch, weights)).requires_grad_(False)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = model if how == "fsdp" else DistributedDataParallel(model)
    for each in (model, second) if how == "fsdp" else ():
        if each is not None:
            shard(each, gathered_in)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    is_autocast = compute != (gathered_in or weights)
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
        "weights": held(model.parameters()),
        "copies": sum(copies.values()) if is_autocast else 0,
        "gradients": held(each.grad for each in trained),
    }
    return sizes | {"optimizer": held(state)} | counted.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
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
