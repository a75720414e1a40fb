"""FSDP2: parameters, gradients and optimizer state in shards, one on each process.

A block's parameters are gathered for its forward pass, let go, and gathered again for its backward pass; each process
then keeps its own share of the summed gradient. A parameter is a DTensor of rows: rank r of n has the r-th n-th.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

ADDED = r"^base_model\.model\.|\.base_layer(?=\.)|\.original_module(?=\.)|\.modules_to_save\.[^.]+(?=\.)"  # by PEFT
APART = re.compile(r"vision|visual|image|audio")  # parts that a batch may leave out


def shard(
    model: torch.nn.Module,
    device: torch.device,
    *,
    block_names: list[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> torch.nn.Module:
    """Lays a model out in shards over all processes, in place: first each of its blocks, then the rest with the root.

    Args: block_names, classes of what is gathered at a time, by default those that the model itself says must not be
    split; compute_dtype, that parameters travel and compute in, where it is another than they are kept in (gradients
    are summed in float32); offload, keep the shards in the host's memory. A parameter that has no gradient in one
    process's batch counts as one of zeros. Raises: ValueError if no module is of these classes.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    how = {"mesh": mesh, "reshard_after_forward": True}
    how["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32)
    how["offload_policy"] = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in reversed(blocks_of(model, block_names)):  # a block inside another comes first
        fully_shard(block, **how)
    fully_shard(model, **how)
    empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    model._apply(lambda each: on_device(each, torch.device("cpu") if offload else device))
    places = [vars(module).pop("places_of_weights", {}) for module in list(model.modules())]
    fill(model, {name: place for each in places for name, place in each.items()}, empty)
    model.set_reduce_scatter_unused_params(True)
    if hasattr(model, "generate"):  # which calls the model inside the root's wrappers
        register_fsdp_forward_method(model, "generate")
    return model


def blocks_of(model: torch.nn.Module, names: list[str] | None = None) -> list[torch.nn.Module]:
    """The modules of a model that are gathered one at a time. A batch without pictures leaves a model's eyes out, and
    a process that does not gather keeps the others waiting: the eyes stay with the root."""
    own = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = [(path, module) for path, module in model.named_modules() if type(module).__name__ in (names or own)]
    found = [(path, module) for path, module in found if not APART.search(path)]
    missing = set(names or ()) - {type(module).__name__ for _, module in found}
    if missing or not found:
        kinds = {type(module).__name__ for path, module in model.named_modules() if re.search(r"\.\d+$", path)}
        what = (
            f"no module of the model is a {min(missing)}" if missing else "the model does not say what its blocks are"
        )
        raise ValueError(f"fsdp_transformer_layer_cls_to_wrap: {what}: name one of {', '.join(sorted(kinds))}")
    return [module for _, module in found]


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; one that has no memory yet gets some, whose content means nothing."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def is_sharded(model: torch.nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a tensor; all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that a model computes on, which its shards may be kept off."""
    first = next(model.parameters())
    return torch.device(first.device_mesh.device_type) if isinstance(first, DTensor) else first.device


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered if it is sharded: then every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(named: dict[str, torch.Tensor], *, keep: bool, copy: bool) -> dict[str, torch.Tensor]:
    """Named tensors, whole, in the host's memory, one gathered at a time; a tied one is one under several names. Of the
    processes, all of which must ask, only those that keep them get any. copy: none may be the model's own."""
    gathered = {}
    for tensor in {id(tensor): tensor for tensor in named.values()}.values():
        full = whole(tensor.detach())
        if keep:
            gathered[id(tensor)] = full.to("cpu", copy=copy)
    return {name: gathered[id(tensor)] for name, tensor in named.items()} if keep else {}


# ---------------------------------------------------------------------------- models that no process could hold whole


def find_weights(model: torch.nn.Module, files: Iterable[Path]) -> dict[str, tuple[Path, str]] | None:
    """{parameter or buffer: (the safetensors file that has it, its name there)} of a model whose parameters have no
    memory, a tied one under all its names; None if the files lack one, or have one more, under another name or in
    another shape: then it has to be loaded as its family does it."""
    places, shapes = {}, {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                places[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
    wanted = model.state_dict(keep_vars=True)
    names = {id(value): name for name, value in reversed(wanted.items())}  # of a tied one the first
    fits = all(shapes.get(name) == tuple(wanted[name].shape) for name in names.values())
    if not fits or not places.keys() <= wanted.keys():
        return None
    return {name: (places[names[id(value)]], names[id(value)]) for name, value in wanted.items()}


@contextmanager
def as_if_in_memory(model: torch.nn.Module):
    """Inside, parameters without memory pretend to be on the CPU (as one number each, in all places): PEFT puts an
    adapter where its layer is, and the adapter's own numbers are to be real."""
    stand_ins = {}

    def swap(stand_in: Callable) -> None:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and (parameter.is_meta or id(parameter) in stand_ins):
                    module._parameters[name] = stand_in(parameter)

    def pretend(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        if id(parameter) not in stand_ins:  # a tied weight is one parameter in two places
            one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            one = torch.nn.Parameter(one, requires_grad=parameter.requires_grad)
            stand_ins[id(parameter)] = stand_ins[id(one)] = (one, parameter)
        return stand_ins[id(parameter)][0]

    def go_back(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        one, original = stand_ins[id(parameter)]
        return original.requires_grad_(one.requires_grad)

    swap(pretend)
    try:
        yield
    finally:
        swap(go_back)


@torch.no_grad()
def fill(model: torch.nn.Module, places: dict[str, tuple[Path, str]], empty: set[str]) -> None:
    """Reads this process's rows of each parameter that `find_weights` has found, under whatever adapter the model has
    got since, and the buffers. Nobody ever holds all of a parameter. Args: empty, names of those without content.
    Raises: ValueError if one of them stays so, or a weight is not finite."""
    filled = set()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        path, own = places.get(re.sub(ADDED, "", name), (None, None))
        if path is not None:
            with safe_open(path, framework="pt") as file:
                if isinstance(value, DTensor):
                    rows, mine = file.get_slice(own), local(value)
                    start = min(-(-len(value) // dist.get_world_size()) * dist.get_rank(), len(value))
                    mine.copy_(rows[start : start + len(mine)])
                else:
                    value.copy_(file.get_tensor(own))
            if not torch.isfinite(local(value)).all():
                raise ValueError(f"the model is broken: the weights of {own} are not all finite")
            filled.add(name)
    if left := empty - filled:
        raise ValueError(
            f"{min(left)} of the model has no values, and no file has them: load it whole, or leave out fsdp"
        )
