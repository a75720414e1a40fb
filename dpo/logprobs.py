"""A batch and a model give log π(y_w|x) and log π(y_l|x), float32, whatever the layout of the batch.

Only the positions that predict a completion token reach the language-model head: prompts and padding would cost most of
the head's time and memory for logits that nobody reads.
"""

import inspect

import torch
import torch.nn.functional as F

from dpo.collate import ready_batch


def token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target], one per kept position.

    Args: logits (M, V), any float dtype; targets (M,) int64. Returns: (M,) float32, of float64 float64, nats.
    In bfloat16 a log-softmax is off by up to 0.9 nats a sequence: hence float32 first.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    return -F.cross_entropy(logits.to(exact), targets, reduction="none")


def sum_by_owner(values: torch.Tensor, owner: torch.Tensor, sequences: int) -> torch.Tensor:
    """Adds up the values of each sequence: out[s] = Σ_{m: owner[m] = s} values[m].

    Args: values (M,); owner (M,) int64 in 0 … sequences − 1. Returns: (sequences,) in the dtype of values, 0 where a
    sequence owns nothing. Added up in float64: in float32 a completion of 70 tokens is off by 2e-4 nats.
    """
    total = torch.zeros(sequences, dtype=torch.float64, device=values.device)
    return total.index_add(0, owner, values.double()).to(values.dtype)


def ld_weights(owner: torch.Tensor, lengths: torch.Tensor, *, ld_alpha: float) -> torch.Tensor:
    """LD-DPO: 1 for the tokens of a completion up to the length of the shorter one of its pair, ld_alpha beyond.

    Summed with these weights a longer completion gains less by its length alone. ld_alpha = 1 is DPO.

    Args: owner (M,), in order; lengths (2B,) completion tokens, chosen first. Returns: (M,) float32.
    Policy and reference alike. Source: Liu et al. 2024 (arXiv 2409.06411).
    """
    position = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    return 1.0 - (1.0 - ld_alpha) * (position >= shorter[owner]).float()


def wpo_alignment(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """WPO: log π_t − log Σ_v π_v², how likely the token is next to what the policy would expect of its own sample.

    Args: logits (M, V); targets (M,). Returns: (M,) float32, without gradient.
    Source: Zhou et al. 2024 (arXiv 2406.11827), eq. 2, sampled alignment; that a pair's weight
    is at most 1 is from the authors' code.
    """
    logps = logits.detach().float().log_softmax(-1)
    return logps.gather(-1, targets[:, None])[:, 0] - (2 * logps).logsumexp(-1)


def concatenated_forward(
    model, batch: dict, *, padding_value: int = 0, ld_alpha: float | None = None, use_weighting: bool = False
) -> dict[str, torch.Tensor]:
    """Chosen and rejected completions in one forward pass: log π(y|x) = Σ_t log π(y_t | x, y_<t).

    Args: model, a causal language model (its own forward is called, so soft-capping, logit scales and biases apply);
    batch, what the collator gives of B pairs, in any layout; padding_value, fills the padding where the plain layout is
    made ready here; ld_alpha, weigh the tokens as `ld_weights` says; use_weighting, give the pairs' WPO weights, too.
    Returns: chosen_logps, rejected_logps (B,) float32 sums in nats; chosen_lengths, rejected_lengths (B,) int64,
    completion tokens; with use_weighting wpo_weights (B,) = min(1, exp(s_w + s_l)), s the mean of a completion's
    `wpo_alignment`; aux_loss () where the model returns one. With K > 2 completions rejected_logps and rejected_lengths
    are (B, K−1), by rank, 0 where a row has fewer.
    """
    batch = ready_batch(batch, model, padding_value)
    targets, owner, lengths, B = batch["targets"], batch["owner"], batch["lengths"], len(batch["tokens"])
    if len(lengths) > 2 * B and (ld_alpha is not None or use_weighting):
        raise ValueError("ld_alpha and use_weighting are for pairs, the batch ranks more completions: leave them out")
    output, logits = forward_kept_positions(model, batch["inputs"])  # logits (M, V)
    per_token = token_logps(logits, targets)
    if ld_alpha is not None:
        per_token = per_token * ld_weights(owner, lengths, ld_alpha=ld_alpha)
    logps = sum_by_owner(per_token, owner, len(lengths))
    result = {}
    for key, values in (("logps", logps), ("lengths", lengths)):
        rejected = values[B:].unflatten(0, (-1, B)).T  # (B, K−1)
        result |= {f"chosen_{key}": values[:B], f"rejected_{key}": rejected.squeeze(1)}
    if use_weighting:
        means = sum_by_owner(wpo_alignment(logits, targets), owner, len(lengths)) / lengths
        result["wpo_weights"] = sum(means.chunk(2)).exp().clamp(max=1)
    if isinstance(getattr(output, "aux_loss", None), torch.Tensor):
        result["aux_loss"] = output.aux_loss
    return result


def forward_kept_positions(model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
    """(the model's output, its logits (M, V) at the positions of inputs["logits_to_keep"], (S, T) bool or, of a batch
    of one row, (M,) int64).

    A model that takes logits_to_keep leaves the other logits out itself; one that takes no attention_mask does without,
    since padding is at the end.
    """
    optional = {**inputs, "use_cache": False}
    own = {name: optional.pop(name) for name in ("logits_to_keep", "attention_mask", "use_cache") if name in optional}
    output = model(**optional, **{name: value for name, value in own.items() if takes(model, name)})
    logits, keep = output.logits, inputs["logits_to_keep"]
    if keep.ndim == 1:
        return output, logits[0] if logits.shape[1] == len(keep) and takes(model, "logits_to_keep") else logits[0, keep]
    return output, logits if logits.ndim == 2 else logits[keep]


def takes(module: torch.nn.Module, name: str) -> bool:
    """Whether an argument reaches a forward that knows its name: a model's own stands somewhere inside the wrappers
    that DDP, torch.compile, PEFT and callers put around it, which hand on what they do not know."""
    parameters = inspect.signature(module.forward).parameters
    if name in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return name in parameters
    return any(takes(child, name) for child in module.children())
