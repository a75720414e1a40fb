"""log π_ref of a batch: of a frozen model, of the policy with its adapter off or with another one, or from a cache."""

import copy
import hashlib
import json
import logging
import os
import re
import time
import types
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from dpo.collate import ready_batch
from dpo.logprobs import concatenated_forward

logger = logging.getLogger("dpo")
CACHED = ("ref_chosen_logps", "ref_rejected_logps")  # columns of rows, and their names in a batch


@dataclass
class Reference:
    """π_ref, whatever stands behind it: `reference(batch)` gives (log π_ref(y_w|x), log π_ref(y_l|x)) of B pairs.

    Args: policy, the model that trains; kind, what is asked, in words; ref_model, a frozen one, or None: the policy is
    asked, with its adapter ref_adapter_name or with none; exists, False where there is none to ask: log π_ref = 0;
    is_cached, the batches bring its values; digest, of what they were worked out by; ld_alpha and logits_budget as in
    `concatenated_forward`; sync_steps and mixup_alpha, TR-DPO: move it towards the policy every so many optimizer
    steps, 0 for never.
    """

    policy: torch.nn.Module
    ref_model: torch.nn.Module | None = None
    kind: str = ""
    ref_adapter_name: str | None = None
    exists: bool = True
    is_cached: bool = False
    digest: str = ""
    ld_alpha: float | None = None
    logits_budget: float | None = None
    sync_steps: int = 0
    mixup_alpha: float = 1.0

    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_cached:
            if missing := [name for name in CACHED if name not in batch]:
                raise ValueError(f"the batch has no {missing[0]}: the data_collator must hand that column on")
            chosen, rejected = (batch[name] for name in CACHED)
            return chosen, rejected.squeeze(1) if rejected.ndim == 2 else rejected  # (B, 1) is that of pairs
        if not self.exists:
            B, lengths = len(batch["tokens"]), batch["lengths"]
            zeros = torch.zeros(len(lengths), device=lengths.device)
            return zeros[:B], zeros[B:].unflatten(0, (-1, B)).T.squeeze(1)
        models = {"policy": self.policy, "ref_model": self.ref_model, "ref_adapter_name": self.ref_adapter_name}
        return compute_ref_log_probs(batch, **models, ld_alpha=self.ld_alpha, logits_budget=self.logits_budget)

    def after_step(self, step: int) -> None:
        """What an optimizer step, the step-th, does to the reference."""
        if self.sync_steps and step % self.sync_steps == 0:
            sync_reference(self.pairs(), mixup_alpha=self.mixup_alpha)

    @contextmanager
    def model(self) -> Iterator[torch.nn.Module | None]:
        """Inside, the model that answers as the reference does; None where there is none."""
        asks_policy = self.exists and not self.is_cached and self.ref_model is None
        context = null_ref_context(self.policy, self.ref_adapter_name) if asks_policy else nullcontext(self.ref_model)
        with context as model:
            yield model

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{name: (a parameter of the policy that trains, the reference's own)}."""
        own = self.policy if self.ref_model is None else self.ref_model
        active, other = getattr(self.policy, "active_adapter", None), self.ref_adapter_name
        trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        named = dict(own.named_parameters())
        return {
            name: (p, named[".".join(other if other and part == active else part for part in name.split("."))])
            for name, p in trained.items()
        }

    def bytes(self) -> int:
        """The memory that it takes beside the policy's."""
        if self.ref_model is not None:
            shared = {held(parameter).data_ptr() for parameter in self.policy.parameters()}
            own = [held(parameter) for parameter in self.ref_model.parameters()]
            return sum(p.nbytes for p in own if p.data_ptr() not in shared)
        return sum(held(own).nbytes for _, own in self.pairs().values()) if self.ref_adapter_name else 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What of it belongs into a checkpoint: the weights of a reference that moves; else it is made anew."""
        return {name: own for name, (_, own) in self.pairs().items()} if self.sync_steps else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, (_, own) in self.pairs().items() if self.sync_steps else ():
            own.copy_(state[name])


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: of one in shards its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def frozen_copy(policy: torch.nn.Module) -> torch.nn.Module:
    """π_ref = π at the start of training: the same weights, never to be trained, no dropout. Parameters that do not
    train in the policy either (the base model under an adapter) are shared with it, not copied.

    Raises: ValueError if a module's forward was replaced by a function: a copy would have the same one, and with it the
    policy's own layers, so that policy and reference stayed equal for ever.
    """
    for name, module in policy.named_modules():
        is_compiled = hasattr(module, "_orig_mod")  # torch.compile's wrapper, whose copy calls the copy
        if isinstance(vars(module).get("forward"), types.FunctionType) and not is_compiled:
            where = name or type(module).__name__
            raise ValueError(f"the forward of {where} was replaced, a copy would call the original: pass a ref_model")
    shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    return copy.deepcopy(policy, shared).eval().requires_grad_(False)


def frozen_adapter(policy: PeftModel, name: str = "reference") -> str:
    """π_ref = π at the start of training, of a PEFT policy: its adapter as it is now once more, in the same model under
    another name, never to be trained. Returns: the name."""
    config = copy.deepcopy(policy.peft_config[policy.active_adapter])
    for option in ("init_lora_weights", "init_weights"):
        if hasattr(config, option):
            setattr(config, option, True)  # PiSSA and its like would take their share out of the base a second time
    config.inference_mode = True
    trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    while name in policy.peft_config:
        name += "_"
    weights = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter, save_embedding_layers=False)
    policy.add_adapter(name, config)
    set_peft_model_state_dict(policy, weights, adapter_name=name)
    let_train(policy, trained)
    return name


def adapter_starts_at_zero(policy: torch.nn.Module) -> bool:
    """Whether a PEFT policy with its adapter off is what it is now with its adapter on: so for LoRA as it is born, with
    B = 0 and nothing else trained; not for an adapter trained before, nor for DoRA, PiSSA or trained biases."""
    return all(
        "lora_A." in name or "modules_to_save." in name or ("lora_B." in name and not parameter.any())
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    )


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """The model in eval mode, but for layers of bitsandbytes, which in training mode take the kernels that the policy
    trains with (in 8 bits others are not quite equal)."""
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()
    return model


@contextmanager
def null_ref_context(policy: torch.nn.Module, ref_adapter_name: str | None = None):
    """Inside, a PEFT policy is its own reference: with its adapter ref_adapter_name, or with none and the original of
    each module that trains beside it (modules_to_save); without dropout. Costs no memory for a second model."""
    was_training, active = policy.training, policy.active_adapter
    trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    without_dropout(policy)
    try:
        if ref_adapter_name is None:
            with policy.disable_adapter():
                let_train(policy, trained)
                yield policy
        else:
            policy.set_adapter(ref_adapter_name, inference_mode=True)
            let_train(policy, trained)
            yield policy
    finally:
        if ref_adapter_name is not None:
            policy.set_adapter(active)
        let_train(policy, trained)
        policy.train(was_training)


def let_train(policy: torch.nn.Module, trained: set[int]) -> None:
    """Lets the parameters of these ids train and freezes the others, which PEFT changes as it switches adapters (and
    FSDP takes, of what it gathers first, for good)."""
    for parameter in policy.parameters():
        parameter.requires_grad_(id(parameter) in trained)


@contextmanager
def without_aux_loss(model: torch.nn.Module):
    """Inside, a mixture of experts does not work out its load balance, which is a matter of the policy's alone."""
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else None  # of a model that sees
    configs = [each for each in (config, text_config) if getattr(each, "output_router_logits", False)]
    for each in configs:
        each.output_router_logits = False
    try:
        yield
    finally:
        for each in configs:
            each.output_router_logits = True


@torch.no_grad()
def compute_ref_log_probs(
    batch: dict,
    *,
    policy: torch.nn.Module | None = None,
    ref_model: torch.nn.Module | None = None,
    ref_adapter_name: str | None = None,
    padding_value: int = 0,
    ld_alpha: float | None = None,
    logits_budget: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log π_ref(y_w|x), log π_ref(y_l|x)), each (B,) float32, no gradient.

    Args: ref_model, asked if given; otherwise policy, a PEFT model, with its adapter ref_adapter_name, or with none.
    padding_value, ld_alpha and logits_budget as in `concatenated_forward`.
    """
    asked = null_ref_context(policy, ref_adapter_name) if ref_model is None else nullcontext(ref_model)
    with asked as model, without_aux_loss(model):
        how = {"padding_value": padding_value, "ld_alpha": ld_alpha, "logits_budget": logits_budget}
        result = concatenated_forward(model, batch, **how)
    return result["chosen_logps"], result["rejected_logps"]


@torch.no_grad()
def sync_reference(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], *, mixup_alpha: float) -> None:
    """TR-DPO: π_ref ← α π + (1 − α) π_ref, weight by weight, over the parameters that train; α = 1 is the hard update.

    Args: pairs, {name: (the policy's, the reference's)}. Source: Gorbatovski et al. 2024 (arXiv 2404.09656).
    """
    for parameter, own in pairs.values():
        own.lerp_(parameter.to(own.dtype), mixup_alpha)


# -------------------------------------------------------------------------------------- log-probabilities kept on disk

CACHE_VERSION = 1  # raise it when log-probabilities come out otherwise than before
# Of configurations, what says nothing about the numbers that a model gives.
NAMES = """_name_or_path name_or_path transformers_version dtype torch_dtype use_cache architectures peft_version
base_model_name_or_path revision inference_mode task_type auto_mapping output_router_logits router_aux_loss_coef"""


def reference_digest(reference: Reference, *, read: str) -> str:
    """All that log π_ref of a row depends on beside its token ids, as a few digits: the reference's weights, those of
    its adapter, their dtypes and configurations, how tokens are added up (ld_alpha), and how it reads them, in words of
    the caller's (the precision, what its pictures become). Not its name, nor anything that concerns the training."""
    model = reference.policy if reference.ref_model is None else reference.ref_model
    adapters, name = getattr(model, "peft_config", {}), None
    if adapters:  # a frozen model is asked as it is; the policy with the adapter named, or with none
        name = model.active_adapter if reference.ref_model is not None else reference.ref_adapter_name
    configs = [getattr(model, "config", None), adapters.get(name)]
    said = [config.to_dict() for config in configs if config is not None and hasattr(config, "to_dict")]
    said = [{key: value for key, value in each.items() if key not in NAMES.split()} for each in said]
    if getattr(model, "config", None) is None:  # of a module without one, the plain values that its parts hold
        said += [{path: _plain_values(module) for path, module in model.named_modules()}, type(model).__qualname__]
    text = json.dumps([CACHE_VERSION, reference.ld_alpha, read, said], sort_keys=True, default=_in_order)
    digest = hashlib.sha256(text.encode())
    weights = {}
    for path, tensor in model.state_dict().items():
        parts = path.split(".")
        if isinstance(tensor, torch.Tensor) and not any(part in adapters and part != name for part in parts):
            # The same weights have the same names under an adapter and without one.
            path = ".".join("adapter" if part == name else part for part in parts)
            weights[re.sub(r"^base_model\.model\.|\.base_layer(?=\.)|\.original_module(?=\.)", "", path)] = tensor
    for path in sorted(weights):
        tensor = weights[path].detach()
        tensor = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _plain_values(module: torch.nn.Module) -> dict:
    held = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return {key: value for key, value in held.items() if key != "training"}


def _in_order(value):
    """What JSON does not know, as what it does: a set in the same order in every process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def row_key(row: dict) -> bytes:
    """Which row it is: a digest of its token ids, of which of them are scored, and of its pictures."""
    rejected = row["rejected_input_ids"]
    parts = [row["prompt_input_ids"], row["chosen_input_ids"], rejected, row.get("scored") or []]
    parts += [row["pictures"]] if row.get("pictures") else []
    return hashlib.sha256(json.dumps(parts).encode()).digest()[:16]


def precompute_ref_log_probs(
    reference: Reference, keys: list[bytes], batches: Iterable[dict], directory: Path, *, seconds: float = 30.0
) -> dict[bytes, list[float]]:
    """log π_ref of rows, as `read_cache` gives it, added to a cache every so many seconds: what a run did that was
    killed is not done again. Args: keys, of the rows that each batch's index counts."""
    known, unsaved, saved = {}, {}, time.monotonic()
    for batch in batches:
        batch = ready_batch(batch, reference.policy)
        chosen, rejected = reference(batch)
        logps = torch.cat([chosen[:, None], rejected.reshape(len(chosen), -1)], dim=1)
        present = batch["lengths"].unflatten(0, (-1, len(chosen))).T > 0  # a ranking may have fewer completions
        for number, own, is_there in zip(batch["index"].tolist(), logps, present, strict=True):
            if number >= 0:  # else it only stands in
                unsaved[keys[number]] = own[is_there].tolist()
        if time.monotonic() - saved > seconds:
            add_to_cache(directory, unsaved)
            known, unsaved, saved = known | unsaved, {}, time.monotonic()
    if unsaved:
        add_to_cache(directory, unsaved)
    return known | unsaved


def read_cache(directory: Path, keys: list[bytes]) -> dict[bytes, list[float]]:
    """{row_key: log π_ref of its completions, the chosen one first} of the wanted rows that a cache has; a file of it
    that is not whole is passed over."""
    known, wanted = {}, set(keys)
    for path in sorted(directory.glob("*.parquet")):
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            pairs = zip(table["key"].to_pylist(), table["logps"].to_pylist(), strict=True)
            known |= {key: logps for key, logps in pairs if key in wanted}
        except (OSError, pa.ArrowException, KeyError) as error:
            logger.warning("%s is damaged (%s): passed over", path, str(error).splitlines()[0])
    return known


def add_to_cache(directory: Path, values: dict[bytes, list[float]]) -> None:
    """One file more in a cache, whole or not at all: any number of processes and runs may add to one cache at once."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f"{uuid.uuid4().hex}.unfinished"
    logps = pa.array(list(values.values()), pa.list_(pa.float32()))
    with aside.open("wb") as file:
        table = pa.table({"key": pa.array(list(values), pa.binary()), "logps": logps})
        pq.write_table(table, file, write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(aside.with_suffix(".parquet"))
