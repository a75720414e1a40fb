# %% [markdown]
# # 7. What the losses look like
#
# The losses of a pair in `dpo/losses.py` start from four numbers: how likely the chosen and the rejected completion are
# under the policy, and how likely they were under the reference (some need the lengths or an offset as well). Most look
# at one number alone that is made of these, the *log-ratio margin*
#
#     h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)) = w − l
#
# which says how much more the policy has come to prefer the chosen completion than the reference did. Training starts
# at h = 0, and most losses want it to grow, some only up to a point. What they do not agree on is how much a pair still
# matters once it is learned (h is large), and how hard to pull at a pair that is wrong (h is negative). The slope of
# the loss tells: it is the force on the pair. Nothing is trained here; it takes a few seconds.

# %%
import matplotlib.pyplot as plt
import torch

from dpo.losses import OF_RANKINGS, OVER_THE_BATCH, dpo_loss

# %% [markdown]
# ## The panels
#
# One panel for each loss: its title, what is set in it, and the options. β is 1 throughout, so that one unit to the
# right is one nat; real runs take 0.1 or so, which draws the same curves ten times as wide.

# %%
PANELS = [
    ("DPO", "", {"loss_type": "sigmoid"}),
    ("conservative DPO", "ε = 0.2", {"loss_type": "sigmoid", "label_smoothing": 0.2}),
    ("robust DPO", "ε = 0.2", {"loss_type": "robust", "label_smoothing": 0.2}),
    ("hinge", "", {"loss_type": "hinge"}),
    ("IPO", "length 1", {"loss_type": "ipo"}),
    ("EXO, pairs", "ε = 0.001", {"loss_type": "exo_pair"}),
    ("DiscoPOP", "τ = 0.05", {"loss_type": "discopop"}),
    ("ODPO", "margin 2", {"loss_type": "odpo", "margins": 2.0}),
    ("R-DPO", "chosen 2 tokens longer, α = 1", {"loss_type": "r_dpo", "r_dpo_alpha": 1.0, "chosen_lengths": 3.0}),
    ("AOT, AOT pair", "batch of 1", {"loss_type": "aot"}),
    ("NCA", "", {"loss_type": "nca_pair"}),
    ("BCO", "δ = 1", {"loss_type": "bco_pair", "bco_delta": 1.0}),
    ("SPPO", "", {"loss_type": "sppo_hard"}),
    ("APO zero", "", {"loss_type": "apo_zero"}),
    ("APO down", "", {"loss_type": "apo_down"}),
    ("DPO-Positive", "λ = 1", {"loss_type": "dpop", "dpop_lambda": 1.0}),
    ("χPO", "R = 4", {"loss_type": "chipo", "chipo_clip": 4.0}),
    ("DPO, Jensen–Shannon", "", {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"}),
    ("DPO, forward KL", "", {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"}),
    ("normalised DPO", "length 1", {"loss_type": "sigmoid_norm"}),
    ("SimPO", "length 1, γ = 1", {"loss_type": "simpo", "simpo_gamma": 1.0}),
    ("ORPO", "length 1, λ = 1", {"loss_type": "orpo", "orpo_lambda": 1.0}),
    ("CPO", "length 1, α = ½", {"loss_type": "cpo", "cpo_alpha": 0.5}),
    ("SFT", "length 1", {"loss_type": "sft"}),
    ("DPO + RPO term", "length 1, α = ½", {"loss_type": "sigmoid", "rpo_alpha": 0.5, "chosen_lengths": 1.0}),
    ("Plackett–Luce", "three, h apart", {"loss_type": "plackett_luce"}),
    ("EXO, rankings", "three, scores 3, 2, 1", {"loss_type": "exo", "scores": (3.0, 2.0, 1.0)}),
]

# %% [markdown]
# ## From a margin to a loss
#
# A margin can grow because the chosen completion gains or because the rejected one loses. Here both do half of it:
# w = h/2 and l = −h/2. Both completions are a single token long, of which the reference thinks log π_ref = −4. A
# ranking of three is drawn with the same margin h from each to the next. The slope comes from the very derivative that
# trains the model, automatic differentiation.


# %%
def curve(margins: torch.Tensor, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its derivative by the margin, at each of the margins."""
    h = margins.clone().requires_grad_()
    reference = torch.full_like(h, -4.0)
    tensors = {k: torch.full_like(h, v) for k, v in options.items() if k in ("margins", "chosen_lengths")}
    if "chosen_lengths" in tensors:
        tensors["rejected_lengths"] = torch.ones_like(h)
    chosen, rejected, ref_rejected = reference + h / 2, reference - h / 2, reference
    if options["loss_type"] in OF_RANKINGS:
        chosen, rejected, ref_rejected = reference + h, torch.stack([reference, reference - h], 1), reference[:, None]
    if "scores" in options:
        tensors["scores"] = torch.tensor(options["scores"], dtype=h.dtype).expand(len(h), -1)
    losses, _, _ = dpo_loss(chosen, rejected, reference, ref_rejected, beta=1.0, **(options | tensors))
    losses.sum().backward()
    return losses.detach(), h.grad


margins = torch.linspace(-6, 6, 481, dtype=torch.float64)
at_zero = torch.zeros(1, dtype=torch.float64)

# %% [markdown]
# Losses that sort the batch are drawn for a batch of one pair: one margin at a time.

# %%
curves = []
for title, setting, options in PANELS:
    if options["loss_type"] in OVER_THE_BATCH:
        points = [curve(margin[None], options) for margin in margins]
        losses, slopes = (torch.cat(part) for part in zip(*points, strict=True))
    else:
        losses, slopes = curve(margins, options)
    curves.append((losses, slopes))
    value, slope = (float(part) for part in curve(at_zero, options))
    print(f"{title:24}{setting:32}at h = 0: loss {value:7.4f}, slope {slope:7.4f}")

# %% [markdown]
# ## The picture
#
# All panels share their axes. Where the dashed slope is near zero the loss leaves a pair alone. Look at the left end:
# DPO pulls at a pair that is wrong with constant force, IPO and SPPO ever harder, APO and EXO give it up as noise. And
# at the right end: DPO never quite stops, the hinge stops at once, and IPO, SPPO and NCA pull back.

# %%
rows, columns = 7, 4
figure, axes = plt.subplots(rows, columns, figsize=(11, 17), sharex=True, sharey=True, layout="constrained")
for axis, (title, setting, _), (losses, slopes) in zip(axes.flat, PANELS, curves, strict=False):
    axis.axhline(0, color="0.75", linewidth=0.8)
    axis.axvline(0, color="0.75", linewidth=0.8)
    axis.plot(margins, losses, color="black", linewidth=1.8)
    axis.plot(margins, slopes, color="0.5", linewidth=1.6, linestyle="--")
    axis.set_title(title, fontsize=11, fontweight="bold", loc="left")
    axis.set_title(setting, fontsize=8, color="0.2", loc="right")
    axis.set(xlim=(-6, 6), ylim=(-3, 9), xticks=(-4, 0, 4), yticks=(-2, 0, 2, 4, 6, 8))
    axis.spines[["top", "right"]].set_visible(False)
for axis in axes.flat[len(PANELS) :]:
    axis.set_axis_off()
for axis in axes.flat[len(PANELS) - columns : len(PANELS)]:  # the lowest of each column
    axis.set_xlabel("log-ratio margin h  [nats]")
figure.supylabel("loss of a pair [nats], and its slope by h")
lines = axes[0, 0].get_lines()[-2:]
figure.legend(lines, ["loss", "its slope"], loc="outside upper center", ncols=2, fontsize=12, frameon=False)
plt.show()

# %% [markdown]
# ## Exercises
#
# 1. At which margin does the IPO panel have its smallest loss, and what has β to do with it? Ask `dpo_loss`.
# 2. DPO's slope is −½ at h = 0 in the picture. What is it with β = 0.1?
# 3. Two panels do not change when both completions become less likely by the same factor, and two do. Find two of each.


# %%
def slope(h: float, beta: float) -> float:
    h = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    dpo_loss(h / 2, -h / 2, torch.zeros(1), torch.zeros(1), beta=beta)[0].sum().backward()
    return h.grad.item()


answer = None  # of exercise 2
print("exercise 2:", "yet to do" if answer is None else abs(answer - slope(0.0, 0.1)) < 1e-6)
