# %% [markdown]
# # 2. The loss, derived
#
# Tutorial 1 used the loss $-\log \sigma(\beta h)$. Where does it come from? Rafailov et al. (2023) found it in a few
# lines: from "get much reward, but stay near where you began" follows what the best policy is; from the best policy
# follows what its reward must have been; and a model of how people choose turns that reward into a likelihood.
#
# We follow these lines on a problem so small that everything can be counted: one prompt, and six completions. Each
# claim is checked with numbers beside it. There are no models here, a policy is a table of six probabilities.

# %%
import math

import matplotlib.pyplot as plt
import torch

from dpo.losses import LOSSES, dpo_loss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
answers = ["brilliant", "clever", "quiet", "short", "dull", "awful"]
r = torch.tensor([2.0, 1.5, 0.5, 0.0, -1.0, -2.0])  # r(y): the reward of each completion, how good it really is
pi_ref = torch.tensor([0.05, 0.15, 0.20, 0.25, 0.20, 0.15])  # π_ref(y): how likely the model writes it before training
beta = 0.5

# %% [markdown]
# ## 1. What we want
#
# The policy $\pi$ should earn much reward on average, but stay near the reference $\pi_{ref}$, which writes good
# language and knows its subject. How far two distributions are apart is measured by the Kullback–Leibler divergence,
# $KL(\pi \| \pi_{ref}) = \sum_y \pi(y) \log \frac{\pi(y)}{\pi_{ref}(y)}$: 0 where they are equal, else above 0. A
# number $\beta$ (beta) sets its price, and the wish becomes one number to maximise:
#
# $$J(\pi) = \sum_y \pi(y)\, r(y) - \beta\, KL(\pi \| \pi_{ref})$$


# %%
def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum(-1)


def J(pi: torch.Tensor) -> torch.Tensor:
    return (pi * r).sum(-1) - beta * kl(pi, pi_ref)


print(f"J of the reference itself: {J(pi_ref).item():.4f}")
elsewhere = torch.distributions.Dirichlet(torch.ones(6)).sample((1000,))
assert kl(pi_ref, pi_ref) == 0 and kl(elsewhere, pi_ref).min() > 0
assert torch.isclose(J(pi_ref), (pi_ref * r).sum())

# %% [markdown]
# ## 2. The best policy
#
# It has a closed form: the reference, each completion weighed by the exponential of its reward.
#
# $$\pi^\star(y) = \frac{1}{Z}\, \pi_{ref}(y)\, e^{r(y)/\beta} \qquad Z = \sum_y \pi_{ref}(y)\, e^{r(y)/\beta}$$
#
# $Z$, the *partition function*, makes it add up to 1. Why is it the best? Solve this for the reward,
# $r = \beta \log (\pi^\star / \pi_{ref}) + \beta \log Z$, and put that into $J$; $\pi_{ref}$ drops out:
#
# $$J(\pi) = \sum_y \pi(y) \left[\beta \log \frac{\pi^\star(y)}{\pi_{ref}(y)} + \beta \log Z
# - \beta \log \frac{\pi(y)}{\pi_{ref}(y)}\right] = \beta \log Z - \beta\, KL(\pi \| \pi^\star)$$
#
# The first part does not depend on $\pi$; the second is never above 0, and is 0 for $\pi = \pi^\star$ alone. We check
# the identity on 100,000 random policies, and that none of them is better.

# %%
Z = (pi_ref * (r / beta).exp()).sum()
pi_star = pi_ref * (r / beta).exp() / Z
policies = torch.distributions.Dirichlet(torch.full((6,), 0.7)).sample((100_000,)).clamp(min=1e-12)
policies /= policies.sum(-1, keepdim=True)
assert torch.allclose(J(policies), beta * Z.log() - beta * kl(policies, pi_star))
assert J(policies).max() < J(pi_star) and torch.isclose(J(pi_star), beta * Z.log())
print(f"β log Z = {beta * Z.log().item():.4f}   J(π*) = {J(pi_star).item():.4f}")
print(f"the best of 100,000 random policies: {J(policies).max().item():.4f}")

# %% [markdown]
# A small $\beta$ lets the policy run to the best completion, a large one keeps it at home.

# %%
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
shown = [("π_ref", pi_ref)]
for value in (3.0, 1.0, 0.5):
    tilted = pi_ref * (r / value).exp()
    shown.append((f"π*, β = {value:g}", tilted / tilted.sum()))
for i, (label, pi) in enumerate(shown):
    grey = ("white", "0.8", "0.5", "0.15")[i]
    axis.bar(torch.arange(6) + 0.2 * i - 0.3, pi, width=0.19, label=label, color=grey, edgecolor="black", linewidth=0.6)
axis.set_xticks(range(6), [f"{name}\nr = {value:g}" for name, value in zip(answers, r.tolist(), strict=True)])
axis.set_ylabel("probability")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 3. The reward, read off the policy
#
# Solve the closed form for the reward:
#
# $$r(y) = \beta \log \frac{\pi^\star(y)}{\pi_{ref}(y)} + \beta \log Z$$
#
# So whoever has the best policy has the reward, up to a number that is the same for all completions of the prompt. The
# first part is called the *implicit reward*. DPO's title says it: your language model is secretly a reward model.

# %%
implicit = beta * (pi_star / pi_ref).log()
assert torch.allclose(implicit + beta * Z.log(), r)
print("implicit reward:", [f"{value:.3f}" for value in implicit.tolist()])
print("r − β log Z:    ", [f"{value:.3f}" for value in (r - beta * Z.log()).tolist()])

# %% [markdown]
# $Z$ is the trouble: for a language model it is a sum over all texts there are. But in the *difference* of two
# completions of one prompt it cancels, and that is all that a comparison needs.

# %%
for i, j in ((0, 5), (1, 2), (4, 3)):
    assert torch.isclose(implicit[i] - implicit[j], r[i] - r[j])
    print(f"{answers[i]:>9} minus {answers[j]:5}: implicit {implicit[i] - implicit[j]:+.3f}   true {r[i] - r[j]:+.3f}")

# %% [markdown]
# ## 4. How people choose
#
# Nobody tells us rewards. People compare two completions, and do not always agree. The model of Bradley and Terry
# (1952) says that of two completions $y_1$ is preferred to $y_2$ with probability
#
# $$p(y_1 \succ y_2) = \frac{e^{r(y_1)}}{e^{r(y_1)} + e^{r(y_2)}} = \sigma(r(y_1) - r(y_2))$$
#
# with the logistic function $\sigma(z) = 1 / (1 + e^{-z})$. So a choice depends on the difference of the rewards, and
# on nothing else. One way to see it: each time, each completion's reward is felt with an error of its own (of the
# Gumbel kind), and the larger feeling wins.

# %%
gumbel = torch.distributions.Gumbel(0.0, 1.0)
felt = r + gumbel.sample((200_000, 6))
for i, j in ((0, 2), (3, 4)):
    counted, model = (felt[:, i] > felt[:, j]).double().mean(), torch.sigmoid(r[i] - r[j])
    print(f"{answers[i]} over {answers[j]}: {counted:.3f} of 200,000 votes, σ(r − r) = {model:.3f}")
    assert abs(counted - model) < 0.005

# %% [markdown]
# ## 5. The loss
#
# Now put the implicit reward of the policy that we train, $\beta \log \frac{\pi}{\pi_{ref}}$, in the place of $r$.
# Given a comparison that $y_w$ won against $y_l$, the probability that the model gives to it is $\sigma(\beta h)$, with
#
# $$h = \log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}$$
#
# and its negative logarithm is the loss. (Maximum likelihood: make what was observed as probable as possible.) With
# many prompts all of this holds for each prompt $x$ by itself: $\pi(y)$ becomes $\pi(y|x)$, rewards and $Z$ belong to
# the prompt, and the loss is the mean over all pairs. That is the formula of tutorial 1.

# %%
pi = policies[0]
for winner, loser in ((0, 5), (5, 0), (2, 3)):
    h = (pi[winner] / pi_ref[winner]).log() - (pi[loser] / pi_ref[loser]).log()
    by_hand = -math.log(1 / (1 + math.exp(-beta * h)))
    logs = [pi[[winner]].log(), pi[[loser]].log(), pi_ref[[winner]].log(), pi_ref[[loser]].log()]
    by_dpo = dpo_loss(*logs, beta=beta)[0].item()
    print(f"{answers[winner]:>9} beats {answers[loser]:9} h = {h:+.3f}   loss {by_hand:.4f}   dpo_loss {by_dpo:.4f}")
    assert math.isclose(by_hand, by_dpo)

# %% [markdown]
# ## 6. The gradient, and what its weight means
#
# $$\nabla L = -\beta\, \sigma(-\beta h)\, \left[\nabla \log \pi(y_w) - \nabla \log \pi(y_l)\right]$$
#
# The bracket raises the chosen completion and lowers the rejected one. The weight in front is
# $\sigma(-\beta h) = \sigma(\hat r(y_l) - \hat r(y_w))$, where $\hat r$ is the implicit reward: the probability that
# the policy itself would choose the wrong one. So a pair that it judges wrongly pulls with full force, one that it has
# learned hardly at all. (Rafailov et al. report that without the weight a language model degenerates.)

# %%
logits = torch.randn(6, requires_grad=True)
log_pi = logits.log_softmax(-1)
losses, _, _ = dpo_loss(log_pi[[0]], log_pi[[5]], pi_ref[[0]].log(), pi_ref[[5]].log(), beta=beta)
(gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
(bracket,) = torch.autograd.grad(log_pi[0] - log_pi[5], logits)
h = (log_pi[0] - pi_ref[0].log() - log_pi[5] + pi_ref[5].log()).item()
weight = 1 / (1 + math.exp(beta * h))
assert torch.allclose(gradient, -beta * weight * bracket)

h = torch.linspace(-8, 8, 401)
figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
axis.plot(h, LOSSES["sigmoid"](h, beta=1.0), color="black", label="loss −log σ(h)")
axis.plot(h, torch.sigmoid(-h), color="black", linestyle="--", label="weight σ(−h)")
axis.set_xlabel("log-ratio margin h, for β = 1  [nats]")
axis.set_ylabel("loss [nats], and weight")
axis.annotate("judged wrongly:\nfull force", (-5, 1), (-7.5, 2.4), arrowprops={"arrowstyle": "->"})
axis.annotate("learned:\nleft alone", (5, 0), (4.5, 1.6), arrowprops={"arrowstyle": "->"})
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## 7. Does it get there?
#
# The proof of the pudding: train a table of six logits with `dpo_loss` on comparisons, starting from the reference,
# without ever showing it a reward. All 30 ordered pairs are seen, each as often as the Bradley–Terry model says that
# people would choose so. If the derivation is right, the policy becomes $\pi^\star$.

# %%
winners, losers = (index.flatten() for index in torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"))
winners, losers = winners[winners != losers], losers[winners != losers]
frequency = torch.sigmoid(r[winners] - r[losers])
logits = pi_ref.log().clone().requires_grad_()
optimizer = torch.optim.Adam([logits], lr=0.05)
distances = []
for _ in range(400):
    log_pi = logits.log_softmax(-1)
    ref = pi_ref.log()
    losses, _, _ = dpo_loss(log_pi[winners], log_pi[losers], ref[winners], ref[losers], beta=beta)
    (frequency * losses).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    distances.append(kl(logits.detach().softmax(-1), pi_star).item())
trained = logits.detach().softmax(-1)
print("π*:     ", [f"{value:.4f}" for value in pi_star.tolist()])
print("trained:", [f"{value:.4f}" for value in trained.tolist()])
assert torch.allclose(trained, pi_star, atol=1e-4)

figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
bars = [("π_ref", pi_ref, "white"), ("π*", pi_star, "0.7"), ("trained", trained, "0.2")]
for i, (label, pi, grey) in enumerate(bars):
    axes[0].bar(torch.arange(6) + 0.27 * (i - 1), pi, width=0.26, label=label, color=grey, edgecolor="black")
axes[0].set_xticks(range(6), answers)
axes[0].set_ylabel("probability")
axes[0].legend(frameon=False)
axes[1].semilogy(distances, color="black")
axes[1].set_xlabel("optimizer step")
axes[1].set_ylabel("KL(trained ‖ π*)  [nats]")
plt.show()

# %% [markdown]
# The tests hold the same of the whole program: `tests/test_theorem.py` trains a model with `dpo.loop.train` on
# comparisons weighted in this way, and it ends at the tilted reference.
#
# ## Exercises
#
# Put numbers in the place of `None` and run the cell again: `dpo_loss`, minimised over the table as above, says.
#
# 1. With β = 2, how probable is "brilliant" under π*?
# 2. If *every* vote goes to the better one, the likelihood has no maximum: $h$ grows for ever. IPO has another loss,
#    $(h - \frac{1}{2\beta})^2$ for completions of one token. At which $h$ does it stop, for β = 0.1?
# 3. All rewards are equal. What is the ratio of the probabilities of "short" and "brilliant" under π*, for any β?


# %%
def trained_on(rewards: torch.Tensor, beta: float) -> torch.Tensor:
    """The policy that minimises `dpo_loss` on all comparisons, each as frequent as these rewards make it."""
    logits, shares = pi_ref.log().clone().requires_grad_(), torch.sigmoid(rewards[winners] - rewards[losers])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        log_pi = logits.log_softmax(-1)
        losses, _, _ = dpo_loss(log_pi[winners], log_pi[losers], ref[winners], ref[losers], beta=beta)
        (shares * losses).mean().backward()
        return (shares * losses).mean()

    optimizer.step(loss)
    return logits.detach().softmax(-1)


mine, margins = {"1": None, "2": None, "3": None}, torch.linspace(0, 10, 1001)
equal = trained_on(torch.zeros(6), beta)
checked = {"1": trained_on(r, 2.0)[0].item(), "2": margins[LOSSES["ipo"](margins, beta=0.1).argmin()].item()}
checked["3"] = (equal[3] / equal[0]).item()
for question, answer in mine.items():
    print(f"exercise {question}:", "yet to do" if answer is None else abs(answer - checked[question]) < 1e-3)
