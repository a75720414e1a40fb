"""Every loss of preference optimization as a plain function of (B,) tensors: one value per pair, nothing reduced.
Those of rankings take (B, K) tensors of K completions and give one value per row.

Notation, here and in the papers: w = log π(y_w|x) − log π_ref(y_w|x) for the chosen completion, l the same for the
rejected one, h = w − l, σ the logistic function, |y| the number of completion tokens, all log-probabilities in nats and
summed over completion tokens unless a bar says mean. The training loss is the mean over pairs. `dpo_loss` puts them
together. Each function needs torch and F alone, or the neighbours that its docstring names.
"""

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


def ipo_loss(h: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """IPO: (h̄ − 1/(2β))². A regression onto a finite margin, so that certain preferences do not push for ever.

    Args: h (B,), here the difference of PER-TOKEN MEAN log-ratios: the authors confirmed means. β is the paper's τ;
    implementations that take sums need another β. Returns: (B,). Source: Azar et al. 2023 (arXiv 2310.12036), eq. 17.
    """
    return (h - 1 / (2 * beta)) ** 2


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


def odpo_loss(h: torch.Tensor, offset: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """DPO with an offset: −log σ(βh − Δ). For pairs whose distance is known: the reward margin must exceed Δ.

    Args: h (B,); offset (B,), Δ in units of reward. Returns: (B,). Source: Amini et al. 2024 (arXiv 2402.10571).
    """
    return -F.logsigmoid(beta * h - offset)


def r_dpo_loss(
    h: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> torch.Tensor:
    """Length-regularised DPO: −log σ(βh + α|y_w| − α|y_l|). Against answers that only grow longer.

    The optimum of reward − α|y| has r = β log π/π_ref + α|y|: pairs that length explains train less.

    Args: h, lengths (B,). Returns: (B,). Source: Park et al. 2024 (arXiv 2403.19159).
    """
    return -F.logsigmoid(beta * h + alpha * (chosen_lengths - rejected_lengths).to(h.dtype))


# ---------------------------------------------------------------------------------- losses of w and l, each by itself


def nca_pair_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1) -> torch.Tensor:
    """NCA: −log σ(βw) − ½ log σ(−βw) − ½ log σ(−βl). Holds up the likelihood of the chosen completion itself.

    Args: w, l (B,). Returns: (B,). Source: Chen et al. 2024 (arXiv 2402.05369), section 4.1 with K = 2.
    """
    return -F.logsigmoid(beta * w) - 0.5 * F.logsigmoid(-beta * w) - 0.5 * F.logsigmoid(-beta * l)


def bco_pair_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1, delta: float = 0.0) -> torch.Tensor:
    """BCO: −log σ(βw − δ) − log σ(−(βl − δ)). A classifier of good and bad completions, for pairs that share little.

    Args: w, l (B,); delta δ, the running mean of the rewards of both kinds, a constant to the gradient (the loop keeps
    it over all processes; TRL 1.x and Liger leave it out). Returns: (B,). Source: Jung et al. 2024 (arXiv 2404.04656).
    """
    return -F.logsigmoid(beta * w - delta) - F.logsigmoid(-(beta * l - delta))


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
    policy_h: torch.Tensor, ref_h: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """AOT for paired data: d = sort(log π_w − log π_l) − sort(log π_ref,w − log π_ref,l), then the sigmoid loss of d.

    The policy's margins are to dominate the reference's at each quantile. The sort runs over the batch: give it the
    global one, or the loss changes with the number of processes.

    Args: policy_h, ref_h (B,), log-probability differences of chosen and rejected. Returns: (B,), by quantile and not
    by pair. Needs: sigmoid_loss. Source: Melnyk et al. 2024 (arXiv 2406.05882), paired.
    """
    d = policy_h.sort().values - ref_h.sort().values
    return sigmoid_loss(d, beta=beta, label_smoothing=label_smoothing)


def aot_pair_loss(w: torch.Tensor, l: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT for unpaired data: d = sort(w) − sort(l), then the sigmoid loss of d. TRL's newer name: aot_unpaired.

    Args: w, l (B,) over the global batch. Returns: (B,), by quantile and not by pair. Needs: sigmoid_loss.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), unpaired.
    """
    return sigmoid_loss(w.sort().values - l.sort().values, beta=beta, label_smoothing=label_smoothing)


# --------------------------------------------------------------------------- losses of per-token means and likelihoods


def sigmoid_norm_loss(
    w: torch.Tensor, l: torch.Tensor, chosen_lengths: torch.Tensor, rejected_lengths: torch.Tensor, *, beta: float = 2.0
) -> torch.Tensor:
    """Length-normalised DPO: −log σ(β(w/|y_w| − l/|y_l|)). Length is no longer a way to margin; wants β of 2 to 5.

    Args: w, l, lengths (B,). Returns: (B,). Source: Lambert et al. 2024 (Tülu 3, arXiv 2411.15124), eq. 6.
    """
    return -F.logsigmoid(beta * (w / chosen_lengths - l / rejected_lengths))


def simpo_loss(
    chosen_means: torch.Tensor, rejected_means: torch.Tensor, *, beta: float = 2.0, gamma: float = 0.5
) -> torch.Tensor:
    """SimPO: −log σ(β(log π_w/|y_w| − log π_l/|y_l|) − γ). No reference: fewer forward passes, no leash.

    Args: chosen_means, rejected_means (B,), mean log-probability of a token; gamma γ, the target margin.
    Returns: (B,). Source: Meng et al. 2024 (arXiv 2405.14734).
    """
    return -F.logsigmoid(beta * (chosen_means - rejected_means) - gamma)


def orpo_loss(chosen_means: torch.Tensor, rejected_means: torch.Tensor, *, orpo_lambda: float = 0.1) -> torch.Tensor:
    """ORPO: NLL_w − λ log σ(log odds_w − log odds_l), odds = p/(1−p), log p the mean log-probability of a token.

    Supervised fine-tuning and preference in one stage from a base model, without reference.

    Args: chosen_means, rejected_means (B,), at most 0. Returns: (B,). Source: Hong et al. 2024 (arXiv 2403.07691),
    the odds ratio eq. 7.
    """
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
    Returns: (B,). Source: Ji et al. 2024 (arXiv 2402.00856), section 3.2; smoothed labels for K > 2 are ours.
    """
    mask = torch.ones_like(ratios, dtype=torch.bool) if mask is None else mask
    lowest = torch.finfo(ratios.dtype).min / 2  # as good as −∞ in the softmax
    policy = torch.log_softmax((beta * ratios).masked_fill(~mask, lowest), -1)
    if scores is not None:
        target = torch.log_softmax((scores / exo_beta_r).masked_fill(~mask, lowest), -1)
    else:
        epsilon = ratios.new_tensor(label_smoothing or 1e-3)
        target = torch.log(epsilon / (mask.sum(-1, keepdim=True) - 1)).repeat(1, ratios.shape[-1])
        target[:, 0] = torch.log1p(-epsilon)
    return (policy.exp() * (policy - target)).sum(-1)


# ----------------------------------------------------------------------------------------------------- f-divergences


def f_divergence_score(
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
WITHOUT_REFERENCE = ("sft", "simpo", "orpo", "cpo")  # they never look at π_ref
OF_RANKINGS = ("plackett_luce", "exo")  # they take two or more completions of a prompt
# Built on differences of log-ratios, h where there are two:
WITH_F_DIVERGENCE = ("sigmoid", "robust", "hinge", "ipo", "exo_pair", "discopop", "odpo", "r_dpo", *OF_RANKINGS)
WITH_LABEL_SMOOTHING = ("sigmoid", "robust", "exo_pair", "aot", "aot_pair", "aot_unpaired", "exo")
OVER_THE_BATCH = ("aot", "aot_pair", "aot_unpaired")  # one value a quantile; want the global batch


def check_loss(
    loss_type: str | list[str],
    *,
    loss_weights: list[float] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    reference_free: bool = False,
) -> list[str]:
    """The names of a loss or a mixture, as a list. Needs: this whole file.

    Raises: ValueError for a combination that has no meaning.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"loss_type {name!r} is unknown: choose one of {', '.join(LOSSES)}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"loss_type is {names}: name at least one loss, and each once")
    if loss_weights is not None and len(loss_weights) != len(names):
        raise ValueError(f"loss_weights has {len(loss_weights)} numbers for {len(names)} losses: give one for each")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be at least 0 and below 0.5")
    if label_smoothing and not set(names) & set(WITH_LABEL_SMOOTHING):
        raise ValueError(f"label_smoothing has no meaning for loss_type {', '.join(names)}: set it to 0")
    if f_divergence_type not in ("reverse_kl", "js_divergence", "alpha_divergence", "forward_kl"):
        raise ValueError(
            f"f_divergence_type {f_divergence_type!r} is unknown: choose reverse_kl, js_divergence, alpha_divergence "
            "or forward_kl"
        )
    if f_divergence_type != "reverse_kl" and not set() < set(names) - {"sft"} <= set(WITH_F_DIVERGENCE):
        raise ValueError(
            f"f_divergence_type {f_divergence_type} has no meaning for loss_type {', '.join(names)}: it changes "
            f"the log-ratios of {', '.join(WITH_F_DIVERGENCE)}"
        )
    if set(names) & set(OF_RANKINGS) and not set(names) <= {*OF_RANKINGS, "sft"}:
        raise ValueError(
            f"loss_type {', '.join(names)} mixes losses of rankings with losses of pairs: put {', '.join(OF_RANKINGS)} "
            "together with each other or sft only"
        )
    if reference_free and set(names) <= set(WITHOUT_REFERENCE):
        raise ValueError(f"loss_type {', '.join(names)} has no reference: leave out reference_free")
    return names


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
    discopop_tau: float = 0.05,
    rpo_alpha: float | None = None,
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    margins: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    wpo_weights: torch.Tensor | None = None,
    bco_delta: float = 0.0,
    simpo_gamma: float = 0.5,
    orpo_lambda: float = 0.1,
    cpo_alpha: float = 1.0,
    dpop_lambda: float = 50.0,
    r_dpo_alpha: float = 0.01,
    chipo_clip: float = 10.0,
    exo_beta_r: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each pair and its two implicit rewards r = β log π/π_ref (DPO, section 5.1).

    losses = Σ_i v weight_i L_i + rpo_alpha · (−log π(y_w|x)/|y_w|), v the pair's WPO weight; v = 1 where L_i is sft.

    Args:
        chosen_logps, rejected_logps: (B,) float, log π(y|x) summed over completion tokens, nats. For the losses of
            OF_RANKINGS rejected_logps may be (B, K−1), best first, its rejected_lengths 0 where a row has fewer.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference; may be None with reference_free and for
            losses that have no reference.
        loss_type: a key of LOSSES, or several, with their loss_weights (1 each by default).
        beta: how strongly the policy is held to the reference.
        label_smoothing: ε in [0, 0.5), the share of flipped labels, for the losses of WITH_LABEL_SMOOTHING.
        f_divergence_type, f_alpha_divergence_coef: see `f_divergence_score`; for the losses of WITH_F_DIVERGENCE.
        reference_free: take log π_ref = 0, a reference that likes all completions alike; in the rewards, too, where TRL
            0.x subtracts a reference that it is given.
        rpo_alpha: α of the RPO term, per pair; needs chosen_lengths.
        chosen_lengths, rejected_lengths: (B,) completion tokens. Without them ipo, sigmoid_norm, simpo, orpo, cpo and
            sft take log-probabilities that are per-token means already.
        margins: (B,) the offset of odpo.
        scores: (B, K) what a reward model gave to the completions, chosen first, for exo.
        wpo_weights: (B,) v of `concatenated_forward`, min(1, exp(s_w + s_l)); multiplies the preference losses, neither
            sft nor the RPO term.
        bco_delta, discopop_tau, simpo_gamma, ...: of the loss that has it in its name.

    Returns: (losses, chosen_rewards, rejected_rewards), each (B,) float32 (float64 stays); the rewards are detached,
        those of rejected completions have the shape of rejected_logps.
    Raises: ValueError for an unknown loss or a combination that has no meaning (`check_loss`). Needs: this whole file.
    """
    names = check_loss(
        loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
        reference_free=reference_free,
    )
    if "odpo" in names and margins is None:
        raise ValueError("loss_type odpo needs a margin for each pair: add a column margin to the dataset")
    if ref_chosen_logps is None and not reference_free and not set(names) <= set(WITHOUT_REFERENCE):
        raise ValueError(
            f"loss_type {', '.join(names)} needs ref_chosen_logps and ref_rejected_logps, or reference_free"
        )
    if chosen_lengths is None and (rpo_alpha is not None or "r_dpo" in names):
        raise ValueError("rpo_alpha and loss_type r_dpo need chosen_lengths, r_dpo rejected_lengths, too")
    if wpo_weights is not None and set(names) & {*OVER_THE_BATCH, *OF_RANKINGS}:
        raise ValueError(f"wpo_weights belong to pairs and loss_type {', '.join(names)} does not: leave them out")
    if rejected_logps.ndim > 1 and not set(names) & set(OF_RANKINGS):
        raise ValueError(
            f"loss_type {', '.join(names)} is for pairs and rejected_logps is {tuple(rejected_logps.shape)}: choose "
            f"{' or '.join(OF_RANKINGS)}"
        )
    if scores is not None and "exo" in names and label_smoothing:
        raise ValueError("label_smoothing has no meaning for loss_type exo where there are scores: set it to 0")
    # bfloat16 holds 8 bits: −300.0 and −301.0 are the same number there. Subtract in float32 at least.
    dtype = torch.promote_types(chosen_logps.dtype, torch.float32)
    chosen_logps, rejected_logps = chosen_logps.to(dtype), rejected_logps.to(dtype)
    if reference_free or ref_chosen_logps is None:
        ref_chosen_logps, ref_rejected_logps = torch.zeros_like(chosen_logps), torch.zeros_like(rejected_logps)
    ref_chosen_logps, ref_rejected_logps = ref_chosen_logps.to(dtype), ref_rejected_logps.to(dtype)
    w, l = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    w_length, l_length = (1, 1) if chosen_lengths is None else (chosen_lengths, rejected_lengths)
    divergence = {"f_divergence_type": f_divergence_type, "f_alpha_divergence_coef": f_alpha_divergence_coef}
    w_score, l_score = f_divergence_score(w, **divergence), f_divergence_score(l, **divergence)
    if set(names) & set(OF_RANKINGS):
        ratios = torch.column_stack([w_score, l_score])  # (B, K)
        mask = None
        if rejected_lengths is not None:
            mask = torch.column_stack([torch.ones_like(w), rejected_lengths]) > 0
    else:
        h = w_score - l_score

    losses = torch.zeros_like(w)
    for name, weight in zip(names, loss_weights or [1.0] * len(names), strict=True):
        match name:
            case "sigmoid" | "robust" | "exo_pair":
                part = LOSSES[name](h, beta=beta, label_smoothing=label_smoothing)
            case "hinge":
                part = hinge_loss(h, beta=beta)
            case "ipo":
                means = f_divergence_score(w / w_length, **divergence) - f_divergence_score(l / l_length, **divergence)
                part = ipo_loss(means, beta=beta)
            case "discopop":
                part = discopop_loss(h, beta=beta, discopop_tau=discopop_tau)
            case "odpo":
                part = odpo_loss(h, margins, beta=beta)
            case "r_dpo":
                part = r_dpo_loss(h, chosen_lengths, rejected_lengths, beta=beta, alpha=r_dpo_alpha)
            case "nca_pair" | "sppo_hard" | "apo_zero" | "apo_down":
                part = LOSSES[name](w, l, beta=beta)
            case "bco_pair":
                part = bco_pair_loss(w, l, beta=beta, delta=bco_delta)
            case "dpop":
                part = dpop_loss(w, l, beta=beta, dpop_lambda=dpop_lambda)
            case "chipo":
                part = chipo_loss(w, l, beta=beta, chipo_clip=chipo_clip)
            case "aot":
                policy_h, ref_h = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
                part = aot_loss(policy_h, ref_h, beta=beta, label_smoothing=label_smoothing)
            case "aot_pair" | "aot_unpaired":
                part = aot_pair_loss(w, l, beta=beta, label_smoothing=label_smoothing)
            case "sigmoid_norm":
                part = sigmoid_norm_loss(w, l, w_length, l_length, beta=beta)
            case "simpo":
                part = simpo_loss(chosen_logps / w_length, rejected_logps / l_length, beta=beta, gamma=simpo_gamma)
            case "orpo":
                part = orpo_loss(chosen_logps / w_length, rejected_logps / l_length, orpo_lambda=orpo_lambda)
            case "cpo":
                part = cpo_loss(chosen_logps, rejected_logps, w_length, beta=beta, cpo_alpha=cpo_alpha)
            case "plackett_luce":
                part = plackett_luce_loss(ratios, beta=beta, mask=mask)
            case "exo":
                options = {"exo_beta_r": exo_beta_r, "label_smoothing": label_smoothing}
                part = exo_loss(ratios, scores, beta=beta, mask=mask, **options)
            case "sft":
                part = sft_loss(chosen_logps, w_length)
        if wpo_weights is not None and name != "sft":
            part = part * wpo_weights
        losses = losses + weight * part
    if rpo_alpha is not None:
        losses = losses + rpo_alpha * sft_loss(chosen_logps, w_length)
    return losses, (beta * w).detach(), (beta * l).detach()
