"""The pairs of a batch, and of its window: all that one optimizer step trains on, in all processes and micro-batches.

Two kinds of losses look beyond the pair: AOT sorts pairs, BCO takes the mean of their rewards. Both do it over the
window, so that a step is the same however it is cut. Each batch brings its own pairs with their gradient; the others
stand beside them as numbers.
"""

from typing import NamedTuple

import torch

from dpo.checkpoint import TrainingState
from dpo.distributed import World, gather_rows
from dpo.logprobs import concatenated_forward
from dpo.reference import Reference


class Window(NamedTuple):
    """What a batch sees of its window.

    Args: pairs, what `dpo_loss` takes of each of the N, by its names, (N,) without gradient; own, where the batch's are
    among them; ref_logps, what the reference says of the batch, so that it is not asked twice.
    """

    pairs: dict[str, torch.Tensor]
    own: slice
    ref_logps: tuple[torch.Tensor, torch.Tensor]


def counted_pairs(batch: dict, policy: dict, reference: tuple) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """(what `dpo_loss` takes of each pair, by its names; the pairs' weights; the tokens that the model read of each).
    A row that only stands in, so that this process has something to do, is left out."""
    values = {**policy, "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    values |= {name: batch[name] for name in ("margins", "scores", "weights", "tokens") if name in batch}
    if "index" in batch and not (present := batch["index"] >= 0).all():
        values = {name: value[present] for name, value in values.items()}
    weights = values.pop("weights", torch.ones_like(values["chosen_logps"]))
    return values, weights, values.pop("tokens")


@torch.no_grad()
def look_ahead(model: torch.nn.Module, batches: list[dict], reference: Reference, world: World, **how) -> tuple:
    """What `open_window` takes of several micro-batches: one more forward pass of each, before those with a gradient.
    Dropout draws what it will draw in these. how: options of `concatenated_forward`."""
    parts, ref_logps = [], []
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        for batch in batches:
            policy_logps = concatenated_forward(model, batch, **how)
            policy_logps.pop("aux_loss", None)
            ref_logps.append(reference(batch))
            parts.append(counted_pairs(batch, policy_logps, ref_logps[-1])[0])
    return parts, ref_logps


def open_window(
    parts: list[dict], ref_logps: list[tuple], world: World, state: TrainingState | None, *, beta: float
) -> list[Window]:
    """A window, as each of this process's batches sees it. Before anyone does, the rewards of its pairs join the
    running mean of state, if one is given. Args: parts, the `counted_pairs` of each batch; ref_logps alike."""
    pairs, start = gather_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, world)
    if state is not None:
        ratios = [pairs[f"{which}_logps"] - pairs[f"ref_{which}_logps"] for which in ("chosen", "rejected")]
        state.bco_sum += float((beta * torch.cat(ratios)).double().sum())
        state.bco_count += 2 * len(ratios[0])
    windows = []
    for part, logps in zip(parts, ref_logps, strict=True):
        own = slice(start, start + len(part["chosen_logps"]))
        windows.append(Window(pairs, own, logps))
        start = own.stop
    return windows


def among_others(pairs: dict, window: Window | None) -> tuple[dict[str, torch.Tensor], slice]:
    """(all pairs of the window, those of the batch with their gradient; where these are); without one the batch's."""
    if window is None:
        return pairs, slice(None)
    own, others = window.own, window.pairs
    return {name: torch.cat([others[name][: own.start], pairs[name], others[name][own.stop :]]) for name in pairs}, own


def mean_over_window(losses: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of all (N,) losses, once for each of the batch's own pairs, (count,): AOT has a value for each quantile,
    not for each pair. Added up they have the gradient of the sum of all losses, of which each batch of the window gives
    the part that goes through its own pairs."""
    total = losses.sum()
    gradient_alone = (total - total.detach()).expand(count) / max(count, 1)
    return losses.mean().detach() + gradient_alone
