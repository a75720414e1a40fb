# %% [markdown]
# # 1. One pair by hand
#
# A language model can be taught by examples of good answers. But often it is easier to *compare* two answers than to
# write a good one. Direct Preference Optimization (DPO) learns from such comparisons: somebody shows a question and two
# answers and says which is better, and the model is changed a little, so that the better one gains on the worse.
#
# In this tutorial one such comparison goes through the whole of it, by hand: text, numbers, a batch, probabilities,
# the loss, one step of the optimizer. Each stop uses the function that real training uses and prints what comes out.
# You need PyTorch and no knowledge of preference learning. It runs in seconds.

# %%
import json
import math

import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.collate import DataCollatorForPreference
from dpo.config import EXAMPLE
from dpo.conversations import render_row
from dpo.data import tokenize_row
from dpo.logprobs import concatenated_forward, sum_by_owner, token_logps
from dpo.losses import dpo_loss
from dpo.reference import Reference, frozen_copy
from dpo.rows import canonical_row

EXAMPLE = EXAMPLE.parent  # the folder dpo/example: a tiny model that writes film reviews, and pairs of its reviews
tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "model")
policy = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model")


def show(name: str, tensor: torch.Tensor, meaning: str) -> None:
    print(f"{name:16} {str(tuple(tensor.shape)):10} {str(tensor.dtype).removeprefix('torch.'):8} {meaning}")


# %% [markdown]
# ## The text
#
# A *preference pair* is a prompt and two completions of it. The one that was preferred is called **chosen**, the other
# one **rejected**. The papers write $x$ for the prompt, $y_w$ for the chosen completion (w for "wins") and $y_l$ for
# the rejected one (l for "loses"). In our pairs a rule judged: it counts words that praise the film and subtracts words
# that scold it.

# %%
pair = json.loads((EXAMPLE / "train.jsonl").read_text().splitlines()[119])
for part in ("prompt", "chosen", "rejected"):
    print(f"{part:9} {pair[part][0]['content']}")

# %% [markdown]
# A chat model sees a conversation as one text, with marks where a turn begins and ends. Its *chat template* says which.
# `render_row` applies it, and cuts the text where the answer begins.

# %%
text = render_row(canonical_row(pair), tokenizer)
chosen_text, rejected_text = text["completions"]
print(repr(text["prompt"]), repr(chosen_text), repr(rejected_text), sep="\n")

# %% [markdown]
# ## From text to numbers
#
# A model reads numbers. The tokenizer cuts text into pieces it knows, *tokens*, and gives the number of each. Prompt
# and completion are cut apart from each other, for that is how they meet later: the model gets the prompt and goes on.

# %%
ids = tokenize_row({"prompt": text["prompt"], "chosen": chosen_text, "rejected": rejected_text}, tokenizer)
for name, numbers in ids.items():
    print(f"{name:18}", numbers, "\n", " " * 17, "|".join(tokenizer.decode([number]) for number in numbers))
assert tokenizer.decode(ids["prompt_input_ids"]) == text["prompt"]
assert ids["chosen_input_ids"][-1] == ids["rejected_input_ids"][-1] == tokenizer.eos_token_id  # "the answer ends here"

# %% [markdown]
# ## From numbers to a batch
#
# A batch of $B$ pairs is $2B$ sequences, each prompt + completion: first the $B$ chosen ones, then the $B$ rejected
# ones. Here $B = 1$. Sequences of one batch must have one length $T$, so the shorter one is filled up at its end.
# `inputs` is what goes into the model, the rest says what to do with what comes out. $M$ is the number of completion
# tokens in the whole batch: what the model is asked about.

# %%
collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, layout="padded")
batch = collator([ids])
inputs, targets, owner, lengths = batch["inputs"], batch["targets"], batch["owner"], batch["lengths"]
show("input_ids", inputs["input_ids"], "(2B, T): prompt + chosen, and prompt + rejected")
show("attention_mask", inputs["attention_mask"], "(2B, T): 1 at a token, 0 at the filling")
show("logits_to_keep", inputs["logits_to_keep"], "(2B, T): the positions whose next token belongs to a completion")
show("targets", targets, "(M,): those next tokens, of all sequences in a row")
show("owner", owner, "(M,): the sequence that each of them belongs to")
show("lengths", lengths, "(2B,): tokens of each completion")
show("tokens", batch["tokens"], "(B,): tokens that the model reads for each pair")
assert targets.tolist() == ids["chosen_input_ids"] + ids["rejected_input_ids"]
assert owner.tolist() == [0] * len(ids["chosen_input_ids"]) + [1] * len(ids["rejected_input_ids"])
assert int(batch["tokens"]) == 2 * len(ids["prompt_input_ids"]) + int(lengths.sum())

# %% [markdown]
# The two sequences, row by row: prompt white, completion grey, filling dark. A model that reads a token says what it
# expects *next*. So the dots, of `logits_to_keep`, stand one to the left of the completion's tokens: the first
# is at the prompt's last token, and nobody is asked what follows the end.

# %%
start, shade = len(ids["prompt_input_ids"]), 0.4 + 0.4 * inputs["attention_mask"]
shade[:, :start] = 1
figure, axis = plt.subplots(figsize=(12, 2.6), layout="constrained")
axis.imshow(shade, cmap="gray", vmin=0, vmax=1, aspect="auto")
for row, column in inputs["attention_mask"].nonzero().tolist():
    word = tokenizer.decode([inputs["input_ids"][row, column]]).strip()
    axis.text(column, row, word, rotation=90, ha="center", va="center", fontsize=8)
for row, column in inputs["logits_to_keep"].nonzero().tolist():
    axis.plot(column, row + 0.42, marker=".", color="black")
axis.set_yticks([0, 1], ["chosen", "rejected"])
axis.set_xlabel("position in the sequence, 0 … T − 1; a dot: what the model says here is used")
plt.show()
kept = inputs["logits_to_keep"][0].nonzero().flatten()
assert kept.tolist() == list(range(start - 1, start - 1 + int(lengths[0])))

# %% [markdown]
# ## From a batch to probabilities
#
# At each position the model gives one number, a *logit* $z_v$, for each token $v$ of its vocabulary of size $V$. They
# become the probabilities of the next token by the softmax: $p_v = e^{z_v} / \sum_u e^{z_u}$. We need the probability
# of one token only: the one that really comes next in the pair. And we need it only where a completion is predicted, at
# $M$ positions; what the model thinks of the prompt does not matter.

# %%
logits = policy(**inputs, use_cache=False).logits
show("logits", logits, "(M, V): one number for each kept position and each token of the vocabulary")
log_p = token_logps(logits, targets)
show("log_p", log_p, "(M,): log probability of the token that comes next, in nats (natural logarithms' unit)")

for position, target in list(enumerate(targets.tolist()))[:8]:
    z = logits[position].tolist()
    by_hand = math.log(math.exp(z[target]) / math.fsum(math.exp(value) for value in z))
    assert math.isclose(by_hand, log_p[position].item(), abs_tol=1e-4)
    print(f"  {tokenizer.decode([target]):>12}  p = {math.exp(by_hand):.4f}  log p = {by_hand:8.4f}")

# %% [markdown]
# The probability of a whole completion is the product of those of its tokens, $\pi(y|x) = \prod_t \pi(y_t|x, y_{<t})$,
# where $\pi$ (pi) names the model, $y_t$ the completion's token number $t$ and $y_{<t}$ those before it. Such products
# are tiny, so one adds the logarithms instead. We write $\log \pi(y|x)$ for the sum.

# %%
first = len(ids["chosen_input_ids"])
chosen_logp, rejected_logp = math.fsum(log_p[:first].tolist()), math.fsum(log_p[first:].tolist())
print(f"log π(y_w|x) = {chosen_logp:.4f}   log π(y_l|x) = {rejected_logp:.4f}")
assert torch.allclose(sum_by_owner(log_p, owner, 2), torch.tensor([chosen_logp, rejected_logp]))

policy_logps = concatenated_forward(policy, batch)  # all of the above, in one call
assert math.isclose(policy_logps["chosen_logps"].item(), chosen_logp, abs_tol=1e-4)
assert math.isclose(policy_logps["rejected_logps"].item(), rejected_logp, abs_tol=1e-4)

# %% [markdown]
# ## The reference
#
# The model that is trained is called the **policy**, $\pi$. Its copy from before the training, which never changes, is
# the **reference**, $\pi_{ref}$. It holds the policy on a leash: what counts is not how likely a completion is, but how
# much likelier than it was. That is the *log-ratio*, once for each completion:
#
# $$w = \log \frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} \qquad l = \log \frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)} \qquad h = w - l$$
#
# and $h$, the *log-ratio margin*, says how far the policy has moved towards the preference. (Times β, which comes next,
# it is the *reward margin* that logs show.) At the start both models are one and the same, and all three are 0.

# %%
reference = Reference(policy, frozen_copy(policy))
ref_chosen_logps, ref_rejected_logps = reference(batch)
w = policy_logps["chosen_logps"].item() - ref_chosen_logps.item()
l = policy_logps["rejected_logps"].item() - ref_rejected_logps.item()
h = w - l
print(f"w = {w:.4f}   l = {l:.4f}   h = {h:.4f}")
assert w == l == h == 0

# %% [markdown]
# ## The loss
#
# $$L = -\log \sigma(\beta h) \qquad \sigma(z) = \frac{1}{1 + e^{-z}}$$
#
# $\sigma$ (sigma), the logistic function, squeezes any number into 0 … 1. $\beta$ (beta), here 0.1, says how strongly
# the policy is held: the larger, the shorter the leash. Read $\sigma(\beta h)$ as the probability that the policy
# would give to this very preference; the loss is its negative logarithm. Where this formula comes from is tutorial 2.
# At the start, with $h = 0$, the probability is ½ and the loss $\log 2 = 0.6931$. If your own run does not start there,
# something is wrong with it.

# %%
beta = 0.1
loss_by_hand = -math.log(1 / (1 + math.exp(-beta * h)))
logps = policy_logps["chosen_logps"], policy_logps["rejected_logps"]
losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
show("losses", losses, f"(B,): {losses.item():.4f}, and by hand {loss_by_hand:.4f}")
show("chosen_rewards", chosen_rewards, "(B,): β·w, what the policy has learned this completion is worth")
show("rejected_rewards", rejected_rewards, "(B,): β·l")
assert math.isclose(losses.item(), loss_by_hand, abs_tol=1e-6) and math.isclose(loss_by_hand, math.log(2))
assert chosen_rewards.item() == rejected_rewards.item() == 0

# %% [markdown]
# ## One step
#
# The gradient of the loss says how each weight of the model should move. On its way back it passes the two
# log-probabilities, where it is $-\beta\,\sigma(-\beta h)$ for the chosen completion and the same with a plus for the
# rejected one: they are pushed apart with equal force, which fades once $h$ is large. At the start it is $\beta/2$.

# %%
for values in logps:
    values.retain_grad()
losses.sum().backward()
force = beta / (1 + math.exp(beta * h))  # β σ(−βh)
print(f"dL/dlog π(y_w|x) = {logps[0].grad.item():+.4f}   dL/dlog π(y_l|x) = {logps[1].grad.item():+.4f}")
assert math.isclose(logps[0].grad.item(), -force, rel_tol=1e-5)
assert math.isclose(logps[1].grad.item(), force, rel_tol=1e-5)

# %% [markdown]
# Gradient descent moves every weight against its gradient, by a small learning rate. If the step is small enough, the
# loss falls by learning rate × (length of the gradient)². Let us see.

# %%
learning_rate = 1e-4
squared_length = math.fsum(parameter.grad.double().square().sum().item() for parameter in policy.parameters())
torch.optim.SGD(policy.parameters(), lr=learning_rate).step()
after = concatenated_forward(policy, batch)
w = after["chosen_logps"].item() - ref_chosen_logps.item()
l = after["rejected_logps"].item() - ref_rejected_logps.item()
loss_after = -math.log(1 / (1 + math.exp(-beta * (w - l))))
print(f"after one step: w = {w:+.4f}   l = {l:+.4f}   loss {loss_by_hand:.6f} -> {loss_after:.6f}")
print(f"foreseen fall of the loss {learning_rate * squared_length:.6f}, real one {loss_by_hand - loss_after:.6f}")
assert w - l > 0 and loss_after < loss_by_hand
assert math.isclose(learning_rate * squared_length, loss_by_hand - loss_after, rel_tol=0.1)

# %% [markdown]
# ## Which words moved?
#
# A hundred more steps on this one pair (no sensible training, but good to look at), and then token by token how much
# likelier the policy finds it than the reference does. The bars of a completion add up to its log-ratio, w or l.

# %%
optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate)
for _ in range(100):
    optimizer.zero_grad()
    logps = concatenated_forward(policy, batch)
    dpo_loss(logps["chosen_logps"], logps["rejected_logps"], ref_chosen_logps, ref_rejected_logps)[0].sum().backward()
    optimizer.step()
with torch.no_grad():
    logits, ref_logits = (model(**inputs, use_cache=False).logits for model in (policy, reference.ref_model))
    moved = token_logps(logits, targets) - token_logps(ref_logits, targets)
    w, l = sum_by_owner(moved, owner, 2).tolist()

figure, axes = plt.subplots(2, 1, figsize=(10, 5.6), layout="constrained", sharey=True)
for axis, name, ratio, sequence, grey in ((axes[0], "chosen", w, 0, "0.35"), (axes[1], "rejected", l, 1, "0.75")):
    words = [tokenizer.decode([token]).strip() for token in targets[owner == sequence]]
    axis.bar(range(len(words)), moved[owner == sequence], color=grey, edgecolor="black", linewidth=0.5)
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_title(f"{name}: the bars add up to {ratio:+.1f} nats", loc="left")
    axis.set_ylabel("log π − log π_ref  [nats]")
plt.show()
assert w > 0 > l

# %% [markdown]
# Where there was no choice nothing moves: where the reference was sure ("Southern", "is"), so is the policy. What moves
# is what the rule looks at, "brilliant" against "boring", and what leads to it.

# %%
sure = token_logps(ref_logits, targets).exp() > 0.9
print(f"the reference was sure of {int(sure.sum())} tokens: they moved by {moved[sure].abs().max():.4f} nats at most")
assert moved[sure].abs().max() < 0.01

# %% [markdown]
# ## Exercises
#
# Put a number in the place of `None` and run the cell: it is compared with what the functions of `dpo/` compute.
#
# 1. At the start, before any step, somebody doubles β. What is the loss of the pair then?
# 2. A pair has $w = 3$ and $l = -2$, and β is 0.1. What is its loss? And what if its label is turned round, so that the
#    chosen completion is the rejected one?
# 3. What is the force β σ(−βh) on the pair of exercise 2, as a share of the force at the start?


# %%
def loss_of(w: float, l: float, beta: float) -> float:
    w, l, zero = (torch.tensor([value], dtype=torch.float64) for value in (w, l, 0.0))
    return dpo_loss(w, l, zero, zero, beta=beta)[0].item()


def force_of(h: float, beta: float) -> float:
    margin = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    dpo_loss(margin, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=beta)[0].sum().backward()
    assert math.isclose(-margin.grad.item(), beta / (1 + math.exp(beta * h)), rel_tol=1e-6)  # β σ(−βh)
    return -margin.grad.item()


answers = {"1": None, "2": None, "2, turned round": None, "3": None}
solutions = {"1": loss_of(0, 0, 0.2), "2": loss_of(3, -2, 0.1), "2, turned round": loss_of(-2, 3, 0.1)}
solutions["3"] = force_of(5, 0.1) / force_of(0, 0.1)
for question, answer in answers.items():
    verdict = "yet to do" if answer is None else math.isclose(answer, solutions[question], abs_tol=5e-4)
    print(f"exercise {question}: {verdict}")
