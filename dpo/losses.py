"""The DPO losses: plain functions of (B,) tensors, one value per preference pair, nothing reduced.

Notation: w = log π(y_w|x) − log π_ref(y_w|x) for the chosen completion, l the same for the rejected one,
h = w − l, and σ the logistic function. The training loss is the mean over pairs.
"""

import torch
import torch.nn.functional as F


def sigmoid_loss(h: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO: −(1−ε) log σ(βh) − ε log σ(−βh).

    The negative log-likelihood of the preferences under the Bradley–Terry model whose reward is β log π/π_ref.
    ε = label_smoothing > 0 is conservative DPO: a share ε of the labels is taken to be flipped.

    Args: h (B,) log-ratio difference, nats. Returns: (B,).
    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; Mitchell 2023, a note on DPO with noisy preferences (cDPO).
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def hinge_loss(h: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """SLiC on likelihood ratios: max(0, 1 − βh). Pairs that are apart by 1/β or more no longer train.

    Args: h (B,) log-ratio difference, nats. Returns: (B,).
    Source: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425); Liu et al. 2023 (RSO, arXiv 2309.06657), eq. 10.
    """
    return torch.relu(1 - beta * h)


def ipo_loss(h: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """IPO: (h − 1/(2β))². A regression onto a finite margin, so that certain preferences do not push for ever.

    Args: h (B,) difference of the PER-TOKEN MEAN log-ratios, nats per token: the authors confirmed means. β is the
    paper's τ. Implementations that pass sums need another β. Returns: (B,).
    Source: Azar et al. 2023 (arXiv 2310.12036), eq. 17.
    """
    return (h - 1 / (2 * beta)) ** 2


LOSSES = {"sigmoid": sigmoid_loss, "hinge": hinge_loss, "ipo": ipo_loss}


def dpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None,
    ref_rejected_logps: torch.Tensor | None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each pair and its two implicit rewards r = β log π/π_ref (DPO, section 5.1).

    Args:
        chosen_logps, rejected_logps: (B,) float, log π(y|x) summed over completion tokens, nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference; may be None with reference_free.
        loss_type: a key of LOSSES.
        beta: how strongly the policy is held to the reference.
        label_smoothing: ε in [0, 0.5), the share of flipped labels; only the sigmoid loss has one.
        reference_free: take log π_ref = 0, a reference that likes all completions alike.
        chosen_lengths, rejected_lengths: (B,) completion tokens. IPO divides the sums by them; without them it takes
            the four log-probabilities to be per-token means already.

    Returns: (losses, chosen_rewards, rejected_rewards), each (B,) float32 (float64 stays); the rewards are detached.
    Raises: ValueError for an unknown loss_type, or a label_smoothing out of range or that the loss does not have.
    """
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type {loss_type!r} is unknown: choose one of {', '.join(LOSSES)}")
    if label_smoothing and loss_type != "sigmoid":
        raise ValueError(f"label_smoothing has no meaning for loss_type {loss_type!r}: set it to 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below 0.5")

    # bfloat16 holds 8 bits: −300.0 and −301.0 are the same number there. Subtract in float32 at least.
    dtype = torch.promote_types(chosen_logps.dtype, torch.float32)
    w, l = chosen_logps.to(dtype), rejected_logps.to(dtype)
    if not reference_free:
        w, l = w - ref_chosen_logps.to(dtype), l - ref_rejected_logps.to(dtype)

    if loss_type == "sigmoid":
        losses = sigmoid_loss(w - l, beta=beta, label_smoothing=label_smoothing)
    elif loss_type == "hinge":
        losses = hinge_loss(w - l, beta=beta)
    elif chosen_lengths is not None:
        losses = ipo_loss(w / chosen_lengths - l / rejected_lengths, beta=beta)
    else:
        losses = ipo_loss(w - l, beta=beta)
    return losses, (beta * w).detach(), (beta * l).detach()
