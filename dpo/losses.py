"""Every loss of preference optimization as a plain function of (B,) tensors: one value per pair (AOT: per quantile), no
mean taken. Those of rankings take (B, K) tensors of K completions and give one value per row.

Notation, here and in the papers: w = log π(y_w|x) − log π_ref(y_w|x) for the chosen completion, l the same for the
rejected one, h = w − l, σ the logistic function, |y| the number of completion tokens, all log-probabilities in nats and
summed over completion tokens unless a bar says mean. The training loss is the mean over pairs. `dpo_loss` puts them
together: it finds what a loss needs by the names of its parameters, so that a new loss is its function and its line in
`LOSSES`. Each function needs torch and F alone, or the neighbours that its docstring names.
"""

import inspect

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------- losses of h = w − l


def sigmoid_loss(h: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO: −(1−ε) log σ(βh) − ε log σ(−βh). The default, and the one to beat.

    The negative log-likelihood of the preferences under the Bradley–Terry model whose reward is β log π/π_ref.
    ε = label_smoothing > 0 is conservative DPO: a share ε of the labels is taken to be flipped. TRL 1.x ignores ε here.

    Args: h (B,). Returns: (B,). Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; ε: Mitchell 2023, cDPO.
    """
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_loss(h: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """Robust DPO: [−(1−ε) log σ(βh) + ε log σ(−βh)] / (1 − 2ε). For labels of which a known share ε < ½ is flipped.

    Its expectation over the flips is the sigmoid loss of the clean labels; single values may be negative.

    Args: h (B,). Returns: (B,). Source: Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1.
    """
    clean, flipped = -F.logsigmoid(beta * h), -F.logsigmoid(-beta * h)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def hinge_loss(h: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """SLiC on likelihood ratios: max(0, 1 − βh). Pairs that are apart by 1/β or more no longer train.

    Args: h (B,). Returns: (B,). Source: Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425); Liu et al. 2023 (RSO, arXiv
    2309.06657).
    """
    return torch.relu(1 - beta * h)


def ipo_loss(mean_h: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """IPO: (h̄ − 1/(2β))². A regression onto a finite margin, so that certain preferences do not push for ever.

    Args: mean_h (B,), w/|y_w| − l/|y_l|, the difference of PER-TOKEN MEAN log-ratios: the authors confirmed means. β is
    the paper's τ; implementations that take sums need another β. Returns: (B,). Source: Azar et al. 2023 (arXiv
    2310.12036), eq. 17.
    """
    return (mean_h - 1 / (2 * beta)) ** 2


def exo_pair_loss(h: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """EXO: σ(βh)[log σ(βh) − log(1−ε)] + σ(−βh)[log σ(−βh) − log ε], the reverse KL to the labels (1−ε, ε).

    Mode-seeking where DPO's forward KL covers. ε = 0 would be infinite and means 1e-3.

    Args: h (B,). Returns: (B,). Source: Ji et al. 2024 (arXiv 2402.00856), eq. 16.
    """
    epsilon = h.new_tensor(label_smoothing or 1e-3)
    chosen = torch.sigmoid(beta * h) * (F.logsigmoid(beta * h) - torch.log1p(-epsilon))
    rejected = torch.sigmoid(-beta * h) * (F.logsigmoid(-beta * h) - torch.log(epsilon))
    return chosen + rejected


def discopop_loss(h: torch.Tensor, *, beta: float = 0.1, discopop_tau: float = 0.05) -> torch.Tensor:
    """DiscoPOP: −(1−m) log σ(βh) + m e^(−βh) with m = σ(βh/τ). A blend that a language model found by search.

    Not convex. m e^(−βh) is taken as exp(log m − βh): e^(−βh) alone overflows where m makes it nothing.

    Args: h (B,). Returns: (B,). Needs: capped_exp. Source: Lu et al. 2024 (arXiv 2406.08414), eq. 5.
    """
    exponential = capped_exp(F.logsigmoid(beta * h / discopop_tau) - beta * h)
    return -torch.sigmoid(-beta * h / discopop_tau) * F.logsigmoid(beta * h) + exponential


def odpo_loss(h: torch.Tensor, margins: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """DPO with an offset: −log σ(βh − Δ). For pairs whose distance is known: the reward margin must exceed Δ.

    Args: h (B,); margins (B,), Δ in units of reward. Returns: (B,). Source: Amini et al. 2024 (arXiv 2402.10571).
    """
    return -F.logsigmoid(beta * h - margins)


def r_dpo_loss(
    h: torch.Tensor, length_difference: torch.Tensor, *, beta: float = 0.1, r_dpo_alpha: float = 0.01
) -> torch.Tensor:
    """Length-regularised DPO: −log σ(βh + α|y_w| − α|y_l|). Against answers that only grow longer.

    The optimum of reward − α|y| has r = β log π/π_ref + α|y|: pairs that length explains train less.

    Args: h (B,); length_difference (B,), |y_w| − |y_l| in tokens; r_dpo_alpha α, the price of a token.
    Returns: (B,). Source: Park et al. 2024 (arXiv 2403.19159).
    """
    return -F.logsigmoid(beta * h + r_dpo_alpha * length_difference.to(h.dtype))


# ---------------------------------------------------------------------------------- losses of w and l, each by itself


def nca_pair_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """NCA: −log σ(βw) − ½ log σ(−βw) − ½ log σ(−βl). Holds up the likelihood of the chosen completion itself.

    Args: w, l (B,). Returns: (B,). Source: Chen et al. 2024 (arXiv 2402.05369), section 4.1 with K = 2.
    """
    return -F.logsigmoid(beta * w) - 0.5 * F.logsigmoid(-beta * w) - 0.5 * F.logsigmoid(-beta * l)


def bco_pair_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1, bco_delta: float = 0.0) -> torch.Tensor:
    """BCO: −log σ(βw − δ) − log σ(−(βl − δ)). A classifier of good and bad completions, for pairs that share little.

    Args: w, l (B,); bco_delta δ, the running mean of the rewards of both kinds, a constant to the gradient (the loop
    keeps it over all processes; TRL 1.x and Liger leave it out). Returns: (B,). Source: Jung et al. 2024 (arXiv
    2404.04656).
    """
    return -F.logsigmoid(beta * w - bco_delta) - F.logsigmoid(-(beta * l - bco_delta))


def sppo_hard_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """SPPO with hard labels: (w − 1/(2β))² + (l + 1/(2β))². For rounds of self-play; β is the paper's 1/η.

    Args: w, l (B,). Returns: (B,). Source: Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 and 0.
    """
    return (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2


def apo_zero_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """APO-zero: 1 − σ(βw) + σ(βl). Chosen up, rejected down; for chosen completions better than the model's own.

    Args: w, l (B,). Returns: (B,), in [0, 2]. Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, plus 1.
    """
    return torch.sigmoid(-beta * w) + torch.sigmoid(beta * l)


def apo_down_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """APO-down: σ(βw) + 1 − σ(β(w − l)). Both down, rejected more; for a model better than the chosen completions.

    Args: w, l (B,). Returns: (B,), in [0, 2]. Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8, plus 1.
    """
    return torch.sigmoid(beta * w) + torch.sigmoid(-beta * (w - l))


def dpop_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> torch.Tensor:
    """DPO-Positive: −log σ(β(w − l − λ max(0, −w))). For pairs of small edits, where DPO lowers both likelihoods.

    Args: w, l (B,). Returns: (B,). Source: Pal et al. 2024 (Smaug, arXiv 2402.13228).
    """
    return -F.logsigmoid(beta * (w - l - dpop_lambda * torch.relu(-w)))


def chipo_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1, chipo_clip: float = 10.0) -> torch.Tensor:
    """χPO: −log σ(clip(βφ(w) − βφ(l), ±R)) with φ(z) = e^z + z. χ²-regularised against over-optimisation.

    Args: w, l (B,); chipo_clip R, the paper's 2R_max (10 is our default). Returns: (B,). Needs: capped_exp.
    Source: Huang et al. 2024 (arXiv 2407.13399), algorithm 1.
    """
    margin = beta * (capped_exp(w) + w) - beta * (capped_exp(l) + l)
    return -F.logsigmoid(margin.clamp(-chipo_clip, chipo_clip))


# ---------------------------------------------------------------------- losses over a batch: distributions, not pairs


def aot_loss(
    batch_policy_h: torch.Tensor, batch_ref_h: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """AOT for paired data: d = sort(log π_w − log π_l) − sort(log π_ref,w − log π_ref,l), then the sigmoid loss of d.

    The policy's margins are to dominate the reference's at each quantile. The sort runs over the batch: give it all
    pairs of an optimizer step, or the loss changes with how that is cut into micro-batches and processes.

    Args: batch_policy_h, batch_ref_h (B,), differences of the log-probabilities of chosen and rejected, over the global
    batch. Returns: (B,), by quantile and not by pair. Needs: sigmoid_loss. Source: Melnyk et al. 2024 (arXiv
    2406.05882), paired.
    """
    d = batch_policy_h.sort().values - batch_ref_h.sort().values
    return sigmoid_loss(d, beta=beta, label_smoothing=label_smoothing)


def aot_pair_loss(
    batch_w: torch.Tensor, batch_l: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """AOT for unpaired data: d = sort(w) − sort(l), then the sigmoid loss of d. TRL's newer name: aot_unpaired.

    Args: batch_w, batch_l (B,), w and l over the global batch. Returns: (B,), by quantile and not by pair.
    Needs: sigmoid_loss. Source: Melnyk et al. 2024 (arXiv 2406.05882), unpaired.
    """
    return sigmoid_loss(batch_w.sort().values - batch_l.sort().values, beta=beta, label_smoothing=label_smoothing)


# ---------------------------------------------------- losses of per-token means: log-probabilities divided by lengths


def sigmoid_norm_loss(
    w: torch.Tensor, l: torch.Tensor, chosen_lengths: torch.Tensor, rejected_lengths: torch.Tensor, *, beta: float = 2.0
) -> torch.Tensor:
    """Length-normalised DPO: −log σ(β(w/|y_w| − l/|y_l|)). Length is no longer a way to margin; wants β of 2 to 5.

    Args: w, l, lengths (B,). Returns: (B,). Source: Lambert et al. 2024 (Tülu 3, arXiv 2411.15124), eq. 6.
    """
    return -F.logsigmoid(beta * (w / chosen_lengths - l / rejected_lengths))


def simpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    *,
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
) -> torch.Tensor:
    """SimPO: −log σ(β(log π_w/|y_w| − log π_l/|y_l|) − γ). No reference: fewer forward passes, no leash.

    Args: logps (B,) sums, lengths (B,); simpo_gamma γ, the target margin. Returns: (B,).
    Source: Meng et al. 2024 (arXiv 2405.14734).
    """
    return -F.logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - simpo_gamma)


def orpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    *,
    orpo_lambda: float = 0.1,
) -> torch.Tensor:
    """ORPO: NLL_w − λ log σ(log odds_w − log odds_l), odds = p/(1−p), log p the mean log-probability of a token.

    Supervised fine-tuning and preference in one stage from a base model, without reference.

    Args: logps (B,) sums, at most 0; lengths (B,). Returns: (B,). Source: Hong et al. 2024 (arXiv 2403.07691), the odds
    ratio eq. 7.
    """
    chosen_means, rejected_means = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    chosen, rejected = chosen_means.clamp(max=-1e-6), rejected_means.clamp(max=-1e-6)  # p = 1 has infinite odds
    log_odds = chosen - torch.log(-torch.expm1(chosen)) - rejected + torch.log(-torch.expm1(rejected))
    return -chosen_means - orpo_lambda * F.logsigmoid(log_odds)


def cpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    *,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
) -> torch.Tensor:
    """CPO: −log σ(β(log π_w − log π_l)) + α NLL_w. DPO with a uniform reference, held by the likelihood of the chosen.

    Args: logps (B,) sums, lengths (B,). NLL_w is the mean over tokens; the paper sums. Returns: (B,).
    Source: Xu et al. 2024 (arXiv 2401.08417), eqs. 3 and 5.
    """
    return -F.logsigmoid(beta * (chosen_logps - rejected_logps)) - cpo_alpha * chosen_logps / chosen_lengths


def sft_loss(chosen_logps: torch.Tensor, chosen_lengths: torch.Tensor) -> torch.Tensor:
    """Supervised fine-tuning on the chosen completion: −log π(y_w|x)/|y_w|. A part of mixtures.

    Args: chosen_logps (B,) sums, chosen_lengths (B,). Returns: (B,). RPO (Pang et al. 2024, arXiv 2404.19733)
    adds α times this to the DPO loss: `rpo_alpha`.
    """
    return -chosen_logps / chosen_lengths


# ------------------------------------------------------------------------------------------- K completions of a prompt


def plackett_luce_loss(ratios: torch.Tensor, *, beta: float = 0.1, mask: torch.Tensor | None = None) -> torch.Tensor:
    """DPO over a ranking: −Σ_k log [e^(β r_k) / Σ_{j≥k} e^(β r_j)]. The sigmoid loss where K = 2.

    Each completion is to be the best of itself and those that come after it. For rankings of three or more, which
    say it all at once where pairs cut out of them would say it piece by piece.

    Args: ratios (B, K), log π/π_ref of K completions, best first; mask (B, K) bool, False where a row has fewer.
    Returns: (B,). Source: Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3, eq. 20.
    """
    rewards = beta * ratios
    if mask is not None:  # as good as −∞ in the sums, and rest − rewards is 0
        rewards = rewards.masked_fill(~mask, torch.finfo(ratios.dtype).min / 2)
    rest = rewards.flip(-1).logcumsumexp(-1).flip(-1)  # log Σ_{j≥k} e^(β r_j)
    return (rest - rewards).sum(-1)


def exo_loss(
    ratios: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    exo_beta_r: float = 1.0,
    label_smoothing: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """EXO over K completions: KL(softmax(β r) ‖ p), p = softmax(s/β_r). The more completions, the nearer to the RL
    objective. Without scores p is (1−ε, ε/(K−1), …): the best one against the rest, exo_pair where K = 2.

    Args: ratios (B, K), log π/π_ref, best first; scores (B, K), a reward model's; exo_beta_r β_r, their temperature;
    label_smoothing ε, 0 means 1e-3; mask (B, K) bool, False where a row has fewer completions.
    Returns: (B,). Raises: ValueError for label_smoothing beside scores. Source: Ji et al. 2024 (arXiv 2402.00856),
    section 3.2; smoothed labels for K > 2 are ours.
    """
    if scores is not None and label_smoothing:
        raise ValueError("label_smoothing has no meaning for loss_type exo where there are scores: set it to 0")
    mask = torch.ones_like(ratios, dtype=torch.bool) if mask is None else mask
    lowest = torch.finfo(ratios.dtype).min / 2  # as good as −∞ in the softmax
    policy = torch.log_softmax((beta * ratios).masked_fill(~mask, lowest), -1)
    if scores is not None:
        target = torch.log_softmax((scores / exo_beta_r).masked_fill(~mask, lowest), -1)
    else:
        epsilon = ratios.new_tensor(label_smoothing or 1e-3)
        target = torch.log(epsilon / (mask.sum(-1, keepdim=True) - 1)).repeat(1, ratios.shape[-1])
        target[:, 0] = torch.log1p(-epsilon)
    apart = (policy - target).masked_fill(~mask, 0)  # a weight would carry its −∞ over the edge, and 0 · ∞ is NaN
    return (policy.exp() * apart).sum(-1)


# ----------------------------------------------------------------------------------------------------- f-divergences

F_DIVERGENCES = ("reverse_kl", "js_divergence", "alpha_divergence", "forward_kl")


def f_derivative(
    ratio: torch.Tensor, *, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 1.0
) -> torch.Tensor:
    """f′(π/π_ref) up to a constant, which takes the log-ratio's place in h under another divergence than reverse KL.

    reverse_kl: z; js_divergence: log 2 + log σ(z); alpha_divergence: (1 − e^(−αz))/α; forward_kl: 1 − e^(−z), where
    z = log π/π_ref. α → 0 is reverse_kl, α = 1 is forward_kl (TRL 1.x counts α otherwise: its α is 1 − ours).

    Args: ratio (B,). Returns: (B,). Needs: capped_exp. Source: Wang et al. 2023 (arXiv 2309.16240).
    """
    if f_divergence_type == "reverse_kl":
        return ratio
    if f_divergence_type == "js_divergence":
        return 0.6931471805599453 + F.logsigmoid(ratio)
    alpha = 1.0 if f_divergence_type == "forward_kl" else f_alpha_divergence_coef
    if abs(alpha) < 1e-6:
        return ratio
    x = -alpha * ratio
    return torch.where(x.abs() < 1, -torch.expm1(x.clamp(-1, 1)), 1 - capped_exp(x)) / alpha


def capped_exp(x: torch.Tensor) -> torch.Tensor:
    """e^x, which goes on as e^40 (1 + log(x − 39)) above 40: float32 ends at e^88 and, where IPO squares it, at e^44.

    Args: x, any shape. Returns: the same shape, finite in value, square and gradient; no kink at 40.
    """
    return torch.exp(x.clamp(max=40)) * (1 + torch.log1p(torch.relu(x - 40)))


# ----------------------------------------------------------------------------------------------------- all of it


# A loss may have these parameters: w, l, h = w − l, mean_h (of per-token means), chosen_logps, rejected_logps,
# chosen_lengths, rejected_lengths, length_difference; batch_w, batch_l, batch_policy_h, batch_ref_h (the global batch);
# ratios and mask (B, K), scores, margins; beta, label_smoothing and options of its own.
LOSSES = {
    "sigmoid": sigmoid_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_pair": aot_pair_loss,
    "aot_unpaired": aot_pair_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sft": sft_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "cpo": cpo_loss,
    "dpop": dpop_loss,
    "odpo": odpo_loss,
    "r_dpo": r_dpo_loss,
    "chipo": chipo_loss,
    "plackett_luce": plackett_luce_loss,
    "exo": exo_loss,
}
PARAMETERS = {name: inspect.signature(loss).parameters for name, loss in LOSSES.items()}


def takers(*parameters: str) -> tuple[str, ...]:
    """The names of the losses that have one of these parameters."""
    return tuple(name for name in LOSSES if set(parameters) & set(PARAMETERS[name]))


OF_RANKINGS = takers("ratios")  # they take two or more completions of a prompt
OVER_THE_BATCH = takers("batch_w", "batch_policy_h")  # one value a quantile; want the global batch
BEYOND_THE_PAIR = (*OVER_THE_BATCH, *takers("bco_delta"))  # want to see all pairs of an optimizer step
WITH_F_DIVERGENCE = takers("h", "mean_h", "ratios")  # built on log-ratios that another divergence may replace
WITH_REFERENCE = takers("w", "h", "mean_h", "ratios", "batch_w", "batch_policy_h")  # the others never look at π_ref


def check_loss(
    loss_type: str | list[str],
    loss_weights: list[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    reference_free: bool = False,
) -> list[str]:
    """The names of a loss or a mixture, as a list. Needs: this whole file.

    Raises: ValueError for a combination that has no meaning.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    listed = ", ".join(names)
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"loss_type {name!r} is unknown: choose one of {', '.join(LOSSES)}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"loss_type is {names}: name at least one loss, and each once")
    if loss_weights is not None and len(loss_weights) != len(names):
        raise ValueError(f"loss_weights has {len(loss_weights)} numbers for {len(names)} losses: give one for each")
    if loss_weights is not None and not any(loss_weights):
        raise ValueError(f"loss_weights are {loss_weights}: nothing would be learnt: give one of them a number above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below 0.5")
    if label_smoothing and not set(names) & set(takers("label_smoothing")):
        raise ValueError(f"label_smoothing has no meaning for loss_type {listed}: set it to 0")
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(f"f_divergence_type {f_divergence_type!r} is unknown: choose {', '.join(F_DIVERGENCES)}")
    if f_divergence_type != "reverse_kl" and not set() < set(names) - {"sft"} <= set(WITH_F_DIVERGENCE):
        why = f"has no meaning for loss_type {listed}: it is of {', '.join(WITH_F_DIVERGENCE)}"
        raise ValueError(f"f_divergence_type {f_divergence_type} {why}")
    if set(names) & set(OF_RANKINGS) and not set(names) <= {*OF_RANKINGS, "sft"}:
        others = f"{', '.join(OF_RANKINGS)} go with each other and sft only"
        raise ValueError(f"loss_type {listed} mixes losses of rankings with losses of pairs: {others}")
    if reference_free and not set(names) & set(WITH_REFERENCE):
        raise ValueError(f"loss_type {listed} has no reference: leave out reference_free")
    return names


def check_tensors(names, rejected_logps, ref_chosen_logps, chosen_lengths, rejected_lengths, wpo_weights, rpo_alpha):
    """Raises ValueError where the losses of these names and what they get do not fit. Needs: this whole file."""
    listed = ", ".join(names)
    if ref_chosen_logps is None and set(names) & set(WITH_REFERENCE):
        raise ValueError(f"loss_type {listed} needs ref_chosen_logps and ref_rejected_logps, or reference_free")
    if chosen_lengths is None and rpo_alpha is not None:
        raise ValueError("rpo_alpha needs chosen_lengths: give them, or leave it out")
    one_sided = (chosen_lengths is None) != (rejected_lengths is None)
    if one_sided and set(names) & set(takers("rejected_lengths", "mean_h", "length_difference")):
        raise ValueError(f"loss_type {listed} needs both chosen_lengths and rejected_lengths, or neither")
    if wpo_weights is not None and set(names) & {*OVER_THE_BATCH, *OF_RANKINGS}:
        raise ValueError(f"wpo_weights belong to pairs and loss_type {listed} does not: leave them out")
    if rejected_logps.ndim > 1 and not set(names) & set(OF_RANKINGS):
        shape, others = tuple(rejected_logps.shape), " or ".join(OF_RANKINGS)
        raise ValueError(f"loss_type {listed} is for pairs and rejected_logps is {shape}: choose {others}")


def in_float32(logps: torch.Tensor, ref_logps: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32 or wider: bfloat16 holds 8 bits, −300.0 and −301.0 are the same number there. None becomes 0."""
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
    return logps, torch.zeros_like(logps) if ref_logps is None else ref_logps.to(logps.dtype)


def terms_of_ratios(w: torch.Tensor, l: torch.Tensor, chosen_lengths, rejected_lengths, **divergence) -> dict:
    """What losses name that is made of log-ratios and lengths: {name: value, or a function that computes it on demand}.
    w (B,); l (B,) or (B, K−1); lengths alike or None; divergence, the options of `f_derivative`, which it needs."""
    f_w, f_l = f_derivative(w, **divergence), f_derivative(l, **divergence)  # by default w and l themselves
    n_w, n_l = (1, 1) if chosen_lengths is None else (chosen_lengths, rejected_lengths)  # 1: means already
    terms = {"w": w, "l": l, "batch_w": w, "batch_l": l, "chosen_lengths": n_w, "rejected_lengths": n_l}
    terms["h"] = f_w - f_l if l.ndim == 1 else None
    terms["mean_h"] = lambda: f_derivative(w / n_w, **divergence) - f_derivative(l / n_l, **divergence)
    terms["length_difference"] = None if chosen_lengths is None else lambda: n_w - n_l
    terms["ratios"] = lambda: torch.column_stack([f_w, f_l])  # (B, K)
    if rejected_lengths is not None:
        terms["mask"] = lambda: torch.column_stack([torch.ones_like(w), rejected_lengths]) > 0
    return terms


def arguments_of(name: str, terms: dict) -> dict:
    """Those of the terms that a loss has as parameters. Raises: ValueError if one that it needs is missing."""
    for needed, parameter in PARAMETERS[name].items():
        if parameter.default is parameter.empty and terms.get(needed) is None:
            needed = needed.replace("length_difference", "chosen_lengths and rejected_lengths")
            raise ValueError(f"loss_type {name} needs {needed}, for each pair: give it, or take another loss")
    values = {parameter: terms[parameter] for parameter in PARAMETERS[name] if parameter in terms}
    return {parameter: value() if callable(value) else value for parameter, value in values.items()}


def dpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor | None,
    ref_rejected_logps: torch.Tensor | None,
    *,
    loss_type: str | list[str] = "sigmoid",
    loss_weights: list[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 1.0,
    reference_free: bool = False,
    rpo_alpha: float | None = None,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    wpo_weights: torch.Tensor | None = None,
    parts: dict[str, torch.Tensor] | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each pair and its two implicit rewards r = β log π/π_ref (DPO, section 5.1).

    By default equation 7 of the paper, −log σ(β [log π/π_ref(y_w|x) − log π/π_ref(y_l|x)]). In general
    Σ_i v weight_i L_i + rpo_alpha · (−log π(y_w|x)/|y_w|), with v the pair's WPO weight, which is 1 where L_i is sft.

    Args:
        chosen_logps, rejected_logps: (B,) float, log π(y|x) summed over completion tokens, nats. For the losses of
            OF_RANKINGS rejected_logps may be (B, K−1), best first, its rejected_lengths 0 where a row has fewer.
        ref_chosen_logps, ref_rejected_logps: the same under the reference; None for losses that have none.
        loss_type, loss_weights: a key of LOSSES, or several with their weights (by default 1 each).
        beta: how strongly the policy is held to the reference; label_smoothing: ε in [0, 0.5), the share of flipped
            labels; f_divergence_type, f_alpha_divergence_coef: see `f_derivative`; rpo_alpha: α of the RPO term.
        reference_free: take log π_ref = 0, in the rewards, too, where TRL 0.x subtracts a reference that it is given.
        chosen_lengths, rejected_lengths: (B,) completion tokens. Without them the losses of per-token means take
            log-probabilities that are means already.
        wpo_weights: (B,) v of `concatenated_forward`, min(1, exp(s_w + s_l)).
        parts: a dict that gets the losses of each part of a mixture, {name: (B,)}.
        options: what else the losses name as parameters: discopop_tau, simpo_gamma, bco_delta, ..., the margins (B,) of
            odpo and the scores (B, K) of exo, what a reward model gave to the completions, chosen first.

    Returns: (losses, chosen_rewards, rejected_rewards), each (B,) float32 (float64 stays); the rewards are detached,
        those of rejected completions have the shape of rejected_logps.
    Raises: ValueError for an unknown loss, a combination without meaning, something missing. Needs: this whole file.
    """
    names = check_loss(loss_type, loss_weights, label_smoothing, f_divergence_type, reference_free)
    if reference_free:
        ref_chosen_logps, ref_rejected_logps = torch.zeros_like(chosen_logps), torch.zeros_like(rejected_logps)
    check_tensors(names, rejected_logps, ref_chosen_logps, chosen_lengths, rejected_lengths, wpo_weights, rpo_alpha)
    chosen_logps, ref_chosen_logps = in_float32(chosen_logps, ref_chosen_logps)
    rejected_logps, ref_rejected_logps = in_float32(rejected_logps, ref_rejected_logps)
    w = chosen_logps - ref_chosen_logps  # log π/π_ref(y_w|x)
    l = rejected_logps - ref_rejected_logps  # log π/π_ref(y_l|x); equation 7 is sigmoid_loss(h = w − l)

    divergence = {"f_divergence_type": f_divergence_type, "f_alpha_divergence_coef": f_alpha_divergence_coef}
    terms = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps}
    terms |= {"batch_policy_h": lambda: chosen_logps - rejected_logps}
    terms |= {"batch_ref_h": lambda: ref_chosen_logps - ref_rejected_logps}
    terms |= {"beta": beta, "label_smoothing": label_smoothing}
    terms |= terms_of_ratios(w, l, chosen_lengths, rejected_lengths, **divergence)
    for option in options:
        if option in terms or not takers(option):
            raise TypeError(f"dpo_loss has no option {option!r}, nor has any loss a parameter of this name")

    losses = torch.zeros_like(w)
    for name, weight in zip(names, loss_weights or [1.0] * len(names), strict=True):
        part = LOSSES[name](**arguments_of(name, terms | options))
        if wpo_weights is not None and name != "sft":
            part = part * wpo_weights
        if parts is not None:
            parts[name] = part
        losses = losses + weight * part
    if rpo_alpha is not None:
        losses = losses + rpo_alpha * sft_loss(chosen_logps, chosen_lengths)
    return losses, (beta * w).detach(), (beta * l).detach()
