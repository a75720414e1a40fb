"""log π_ref of a batch: from a frozen copy of the policy, or from a PEFT policy with its adapter switched off."""

import copy
from contextlib import contextmanager

import torch

from dpo.logprobs import concatenated_forward


def frozen_copy(policy: torch.nn.Module) -> torch.nn.Module:
    """π_ref = π at the start of training: the same weights, never to be trained, no dropout. Parameters that do not
    train in the policy either (the base model under an adapter) are shared with it, not copied."""
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
    policy = getattr(policy, "module", policy)
    was_training = policy.training
    policy.eval()
    try:
        with policy.disable_adapter():
            yield policy
    finally:
        policy.train(was_training)


@torch.no_grad()
def compute_ref_log_probs(
    batch: dict[str, torch.Tensor],
    *,
    policy: torch.nn.Module | None = None,
    ref_model: torch.nn.Module | None = None,
    padding_value: int = 0,
    ld_alpha: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log π_ref(y_w|x), log π_ref(y_l|x)), each (B,) float32, no gradient.

    Args: ref_model, scored if given; otherwise policy, a PEFT model, is scored with its adapter off. padding_value and
    ld_alpha as in `concatenated_forward`.
    """
    options = {"padding_value": padding_value, "ld_alpha": ld_alpha}
    if ref_model is not None:
        scores = concatenated_forward(ref_model, batch, **options)
    else:
        with null_ref_context(policy) as base:
            scores = concatenated_forward(base, batch, **options)
    return scores["chosen_logps"], scores["rejected_logps"]


@torch.no_grad()
def sync_reference(policy: torch.nn.Module, ref_model: torch.nn.Module, *, mixup_alpha: float) -> None:
    """TR-DPO: π_ref ← α π + (1 − α) π_ref, weight by weight, over the parameters that train; α = 1 is the hard update.

    Source: Gorbatovski et al. 2024 (arXiv 2404.09656).
    """
    for parameter, reference in zip(policy.parameters(), ref_model.parameters(), strict=True):
        if parameter.requires_grad:
            reference.lerp_(parameter.to(reference.dtype), mixup_alpha)
