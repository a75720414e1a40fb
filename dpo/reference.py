"""log π_ref of a batch, from a frozen copy of the policy, another model, the policy with its adapter off, or none."""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from dpo.logprobs import concatenated_forward


@dataclass
class Reference:
    """π_ref, whatever stands behind it: `reference(batch)` gives (log π_ref(y_w|x), log π_ref(y_l|x)) of B pairs.

    Args: policy, the model that trains; ref_model, a frozen one, or None: the policy with its adapter off is asked;
    exists, False where there is none to ask: log π_ref = 0; ld_alpha as in `concatenated_forward`; sync_steps and
    mixup_alpha, TR-DPO: move ref_model towards the policy every so many optimizer steps, 0 for never.
    """

    policy: torch.nn.Module
    ref_model: torch.nn.Module | None = None
    exists: bool = True
    ld_alpha: float | None = None
    sync_steps: int = 0
    mixup_alpha: float = 1.0

    def __call__(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.exists:
            B, lengths = len(batch["tokens"]), batch["lengths"]
            zeros = torch.zeros(len(lengths), device=lengths.device)
            return zeros[:B], zeros[B:].unflatten(0, (-1, B)).T.squeeze(1)
        return compute_ref_log_probs(batch, policy=self.policy, ref_model=self.ref_model, ld_alpha=self.ld_alpha)

    def after_step(self, step: int) -> None:
        """What an optimizer step, the step-th, does to the reference."""
        if self.sync_steps and step % self.sync_steps == 0:
            sync_reference(self.policy, self.ref_model, mixup_alpha=self.mixup_alpha)

    @contextmanager
    def model(self) -> Iterator[torch.nn.Module | None]:
        """Inside, the model that answers as the reference does; None where there is none."""
        asks_policy = self.exists and self.ref_model is None
        with null_ref_context(self.policy) if asks_policy else nullcontext(self.ref_model) as model:
            yield model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What of it belongs into a checkpoint: the weights of a reference that moves; else it is made anew."""
        if not self.sync_steps:
            return {}
        trained = {name for name, parameter in self.policy.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in self.ref_model.state_dict().items() if name in trained}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if self.sync_steps:
            self.ref_model.load_state_dict(state, strict=False)  # what it shares with the policy is not saved twice


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


def adapter_starts_at_zero(policy: torch.nn.Module) -> bool:
    """Whether a PEFT policy with its adapter off is what it is now with its adapter on: so for LoRA as it is born, with
    B = 0 and nothing else trained; not for an adapter trained before, nor for DoRA, PiSSA or trained biases."""
    return all(
        "lora_A." in name or "modules_to_save." in name or ("lora_B." in name and not parameter.any())
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    )


@contextmanager
def null_ref_context(policy: torch.nn.Module):
    """Inside, a PEFT policy is its own reference: the adapter is off, the modules that train beside it
    (modules_to_save) are the original ones, dropout is off. Costs no memory for a second model."""
    was_training = policy.training
    if not getattr(policy, "is_quantized", False):  # bitsandbytes takes another kernel in eval mode: not quite equal
        policy.eval()
    try:
        with policy.disable_adapter():
            yield policy
    finally:
        policy.train(was_training)


@torch.no_grad()
def compute_ref_log_probs(
    batch: dict,
    *,
    policy: torch.nn.Module | None = None,
    ref_model: torch.nn.Module | None = None,
    padding_value: int = 0,
    ld_alpha: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log π_ref(y_w|x), log π_ref(y_l|x)), each (B,) float32, no gradient.

    Args: ref_model, asked if given; otherwise policy, a PEFT model, with its adapter off. padding_value and ld_alpha as
    in `concatenated_forward`.
    """
    with null_ref_context(policy) if ref_model is None else nullcontext(ref_model) as model:
        result = concatenated_forward(model, batch, padding_value=padding_value, ld_alpha=ld_alpha)
    return result["chosen_logps"], result["rejected_logps"]


@torch.no_grad()
def sync_reference(policy: torch.nn.Module, ref_model: torch.nn.Module, *, mixup_alpha: float) -> None:
    """TR-DPO: π_ref ← α π + (1 − α) π_ref, weight by weight, over the parameters that train; α = 1 is the hard update.

    Source: Gorbatovski et al. 2024 (arXiv 2404.09656).
    """
    for parameter, reference in zip(policy.parameters(), ref_model.parameters(), strict=True):
        if parameter.requires_grad:
            reference.lerp_(parameter.to(reference.dtype), mixup_alpha)
