"""A batch and a model give log π(y_w|x) and log π(y_l|x), float32, whatever the layout of the batch.

Only the positions that predict a completion token reach the language-model head: prompts and padding would cost most of
the head's time and memory for logits that nobody reads.
"""

import inspect
import sys

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
    model,
    batch: dict,
    *,
    padding_value: int = 0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    logits_budget: float | None = None,
) -> dict[str, torch.Tensor]:
    """Chosen and rejected completions in one forward pass: log π(y|x) = Σ_t log π(y_t | x, y_<t).

    Args: model, a causal language model (its own forward is called, so soft-capping, logit scales and biases apply);
    batch, what the collator gives of B pairs, in any layout; padding_value, fills the padding where the plain layout is
    made ready here; ld_alpha, weigh the tokens as `ld_weights` says; use_weighting, give the pairs' WPO weights, too;
    logits_budget, GiB: where float32 logits would take more, the head works in chunks (see `forward_in_chunks`).
    Returns: chosen_logps, rejected_logps (B,) float32 sums in nats; chosen_lengths, rejected_lengths (B,) int64,
    completion tokens; with use_weighting wpo_weights (B,) = min(1, exp(s_w + s_l)), s the mean of a completion's
    `wpo_alignment`; aux_loss () where the model returns one. With K > 2 completions rejected_logps and rejected_lengths
    are (B, K−1), by rank, 0 where a row has fewer.
    """
    batch = ready_batch(batch, model, padding_value)
    targets, owner, lengths, B = batch["targets"], batch["owner"], batch["lengths"], len(batch["tokens"])
    if len(lengths) > 2 * B and (ld_alpha is not None or use_weighting):
        raise ValueError("ld_alpha and use_weighting are for pairs, the batch ranks more completions: leave them out")
    chunk = positions_within(model, logits_budget) if logits_budget else len(targets)
    if len(targets) > chunk:
        output, per_token, alignment = forward_in_chunks(
            model, batch["inputs"], targets, chunk=chunk, aligned=use_weighting
        )
    else:
        output, logits = forward_kept_positions(model, batch["inputs"])  # logits (M, V)
        per_token = token_logps(logits, targets)
        alignment = wpo_alignment(logits, targets) if use_weighting else None
    if ld_alpha is not None:
        per_token = per_token * ld_weights(owner, lengths, ld_alpha=ld_alpha)
    logps = sum_by_owner(per_token, owner, len(lengths))
    result = {}
    for key, values in (("logps", logps), ("lengths", lengths)):
        rejected = values[B:].unflatten(0, (-1, B)).T  # (B, K−1)
        result |= {f"chosen_{key}": values[:B], f"rejected_{key}": rejected.squeeze(1)}
    if use_weighting:
        means = sum_by_owner(alignment, owner, len(lengths)) / lengths
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
    output, keep = call(model, inputs), inputs["logits_to_keep"]
    logits = output.logits
    if keep.ndim == 1:
        return output, logits[0] if logits.shape[1] == len(keep) and takes(model, "logits_to_keep") else logits[0, keep]
    return output, logits if logits.ndim == 2 else logits[keep]


def call(model: torch.nn.Module, inputs: dict[str, torch.Tensor]):
    """The model's output: model(**inputs), without those of the usual names that it does not take."""
    optional = {**inputs, "use_cache": False}
    own = {name: optional.pop(name) for name in ("logits_to_keep", "attention_mask", "use_cache") if name in optional}
    return model(**optional, **{name: value for name, value in own.items() if takes(model, name)})


# ------------------------------------------------------------------------------------------- the head, in little memory


def forward_in_chunks(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], targets: torch.Tensor, *, chunk: int, aligned: bool
):
    """(the model's output, without logits; `token_logps` (M,); `wpo_alignment` (M,), zeros unless aligned), with the
    logits of so many positions in memory at a time. The head, a torch.nn.Linear, is replaced for one forward pass;
    whether that is all that a family does to its logits says `checks.head_error`.
    Needs: output_head, transformers_model, scale_and_cap, call, takes, ChunkedLogps, head_logits, add_product,
    token_logps, wpo_alignment."""
    head, config, results = output_head(model), transformers_model(model).config.get_text_config(), []

    def in_chunks(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1].numel() != len(targets):  # the model leaves no position out
            keep = inputs["logits_to_keep"]
            hidden = hidden[keep] if keep.ndim == 2 else hidden[0, keep]
        hidden = hidden.reshape(len(targets), -1)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        how = chunk, aligned, dtype, *scale_and_cap(config)
        results.extend(ChunkedLogps.apply(hidden, head.weight, head.bias, targets, *how))
        return results[0][None, :, None].clone()  # of a shape that the model takes for logits

    head.forward = in_chunks
    try:
        output = call(model, inputs)
    finally:
        del head.forward
    logps, alignment = results
    # Nothing is added, but the gradient passes through the output, where FSDP learns that the weights are needed again.
    return output, logps + 0.0 * output.logits.reshape(logps.shape), alignment


class ChunkedLogps(torch.autograd.Function):
    """`token_logps` and `wpo_alignment` of (M, V) logits = f(hidden weightᵀ + bias) that never exist at once: backward
    works out each chunk's again. The gradient of the weight is added up in float32, whatever its dtype.

    torch 2.13's F.linear_cross_entropy does as much in float32, with chunks of a size that one has to choose, but gives
    bfloat16 input bfloat16 losses, off by 0.06 nats a token.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk: int, aligned: bool, dtype: torch.dtype, scale: float, cap):
        """hidden (M, D), weight (V, D), bias (V,) or None, targets (M,); dtype, that the product is computed in; logits
        are times scale and, with a cap c, c·tanh(logits/c). Returns: (M,); (M,) without gradient, zeros unless
        aligned."""
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.options = chunk, dtype, scale, cap
        results = []
        for part, own in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = head_logits(part, weight, bias, dtype, scale, cap)
            logps = token_logps(logits, own)
            results.append((logps, wpo_alignment(logits, own) if aligned else torch.zeros_like(logps)))
        logps, alignment = (torch.cat(parts) for parts in zip(*results, strict=True))
        ctx.mark_non_differentiable(alignment)
        return logps, alignment

    @staticmethod
    def backward(ctx, grad, _):
        """∂ log π(y)/∂ logit_v = [v = y] − π_v, and from there through f and the linear layer."""
        hidden, weight, bias, targets = ctx.saved_tensors
        chunk, dtype, scale, cap = ctx.options
        exact = torch.promote_types(dtype, torch.float32)
        wanted_hidden, wanted_weight, wanted_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wanted_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wanted_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if wanted_bias else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = head_logits(hidden[part], weight, bias, dtype, scale, cap)
            change = logits.softmax(-1).mul_(-grad[part, None])
            change.scatter_add_(1, targets[part, None], grad[part, None].to(exact))
            if cap is not None:
                change.mul_(1 - (logits / cap) ** 2)
            del logits
            change = (change * scale if scale != 1 else change).to(dtype)
            if wanted_hidden:
                grad_hidden[part] = change @ weight.to(dtype)
            if wanted_weight:
                add_product(grad_weight, change.T, hidden[part].to(dtype))
            if wanted_bias:
                grad_bias += change.sum(0, dtype=exact)
        grad_weight = grad_weight.to(weight.dtype) if wanted_weight else None
        return grad_hidden, grad_weight, grad_bias.to(bias.dtype) if wanted_bias else None, *[None] * 6


def head_logits(hidden, weight, bias, dtype: torch.dtype, scale: float, cap: float | None) -> torch.Tensor:
    """(m, V) logits, float32 at least, of (m, D) hidden states; see `ChunkedLogps`."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    logits = logits * scale if scale != 1 else logits
    return logits if cap is None else torch.tanh(logits / cap) * cap


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, added up in the dtype of total."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:  # whose kernels give float32 of 16 bits; those of a CPU round first
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def positions_within(model: torch.nn.Module, budget: float) -> int:
    """How many positions have logits of so many GiB in float32, at least 1; without end for a head that is no plain
    linear layer (one that has an adapter, or is quantised)."""
    head = output_head(model)
    return sys.maxsize if head is None else max(1, int(budget * 2**30 / (4 * head.weight.shape[0])))


def output_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The layer that makes logits of hidden states, where it is a plain linear one. Needs: transformers_model."""
    own = transformers_model(model)
    head = None if own is None else own.get_output_embeddings()
    return head if type(head) is torch.nn.Linear else None


def transformers_model(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model of transformers inside the wrappers around it."""
    return next((m for m in model.modules() if hasattr(m, "get_output_embeddings")), None)


def scale_and_cap(config) -> tuple[float, float | None]:
    """(s, c) of what a family does to its logits, c·tanh(s·logit/c), c None without a cap: by the names that
    configurations have for it (Cohere, Falcon-H1, Granite; Gemma, RecurrentGemma, xLSTM)."""
    multipliers = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)
    scale = next((value for value in multipliers if value is not None), 1.0) / (divisor or 1.0)
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    caps = [getattr(config, name, None) for name in names]
    return scale, next((value for value in caps if value), None)


def takes(module: torch.nn.Module, name: str) -> bool:
    """Whether an argument reaches a forward that knows its name: a model's own stands somewhere inside the wrappers
    that DDP, torch.compile, PEFT and callers put around it, which hand on what they do not know."""
    parameters = inspect.signature(module.forward).parameters
    if name in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return name in parameters
    return any(takes(child, name) for child in module.children())
