"""A batch and a model give log π(y_w|x) and log π(y_l|x), float32, whatever the layout of the batch.

Only the positions that predict a completion token reach the language-model head: prompts and padding would cost most of
the head's time and memory for logits that nobody reads.
"""

import inspect

import torch
import torch.nn.functional as F

from dpo.collate import concatenated_inputs, padded_inputs


def token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target], one per kept position.

    Args: logits (M, V), any float dtype; targets (M,) int64. Returns: (M,) float32, nats.
    In bfloat16 a log-softmax is off by up to 0.9 nats a sequence: hence float32 first.
    """
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def sum_by_owner(values: torch.Tensor, owner: torch.Tensor, sequences: int) -> torch.Tensor:
    """Adds up the values of each sequence: out[s] = Σ_{m: owner[m] = s} values[m].

    Args: values (M,); owner (M,) int64 in 0 … sequences − 1. Returns: (sequences,), 0 where a sequence owns nothing.
    """
    return values.new_zeros(sequences).index_add(0, owner, values)


def concatenated_forward(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], *, padding_value: int = 0
) -> dict[str, torch.Tensor]:
    """Scores chosen and rejected completions in one forward pass: log π(y|x) = Σ_t log π(y_t | x, y_<t).

    Args:
        model: a causal language model; its own forward is called, so soft-capping, logit scales and biases apply.
        batch: what the collator gives (B pairs), or model inputs that already carry logits_to_keep, targets and owner.
        padding_value: fills the padding of input_ids; never seen by a real token.

    Returns: chosen_logps, rejected_logps (B,) float32 sums in nats; chosen_lengths, rejected_lengths (B,) int64,
    completion tokens; tokens (B,) int64, all that the model read of the pair.
    """
    if "owner" not in batch:
        batch = padded_inputs(concatenated_inputs(batch, padding_value), padding_value)
    targets, owner, lengths = batch["targets"], batch["owner"], batch["lengths"]
    inputs = {key: value for key, value in batch.items() if key not in ("targets", "owner", "lengths", "tokens")}
    if accepts_logits_to_keep(model):
        logits = model(**inputs, use_cache=False).logits  # (M, V)
    else:
        keep = inputs.pop("logits_to_keep")
        logits = model(**inputs, use_cache=False).logits[keep]
    logps = sum_by_owner(token_logps(logits, targets), owner, len(lengths))
    (chosen_logps, rejected_logps), (chosen_lengths, rejected_lengths) = logps.chunk(2), lengths.chunk(2)
    return {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "tokens": batch["tokens"],
    }


def accepts_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether the model can leave out logits itself. Looks through DDP's and PEFT's wrappers, whose forward takes
    anything; a compiled or accelerated model keeps its signature."""
    model = getattr(model, "module", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(model.forward).parameters
