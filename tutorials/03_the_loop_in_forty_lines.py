# %% [markdown]
# # 3. The loop in forty lines
#
# Tutorial 1 took one pair through one step, tutorial 2 showed why that step is the right one. Here is a whole training
# run: 800 pairs of film reviews, a tiny model that wrote them, batches, a schedule, two models side by side. It fits
# into forty lines, and at the end it is compared with `dpo.loop.train`, the program behind `torchrun -m dpo.loop`: the
# same weights, to the last bit.
#
# It takes about a minute. Whoever has understood these lines has understood the program; the rest of it saves,
# resumes, evaluates, and spreads the same over several processes.

# %%
import matplotlib.pyplot as plt
import torch
from transformers import get_scheduler, set_seed

from dpo.adapters import add_adapter
from dpo.batches import epoch_windows, load_windows
from dpo.collate import DataCollatorForPreference
from dpo.config import EXAMPLE, DPOConfig
from dpo.data import prepare_dataset
from dpo.distributed import World
from dpo.logprobs import concatenated_forward
from dpo.loop import train
from dpo.losses import dpo_loss
from dpo.models import load_model, load_processor, make_optimizer
from dpo.reference import Reference, frozen_copy
from dpo.sources import load_preferences

model_dir, pairs_file = str(EXAMPLE.parent / "model"), str(EXAMPLE.parent / "train.jsonl")

# %% [markdown]
# ## What is needed
#
# * `rows`: the preference pairs as token ids, all of them at once (tutorial 1 did it with one).
# * `policy` and `reference`: the model that learns, and its frozen copy.
# * `windows`: which rows make up which step, and in which order. All rows once are an *epoch*; each has a new order.
# * `optimizer`: AdamW. Its learning rate *warms up* from 0 in the first tenth of the steps, while AdamW does not yet
#   know how large gradients are, and then falls to 0 along a cosine, so that the run settles down.
# * The norm of the gradient is cut at 1, so that one odd batch cannot throw the model off.
#
# Five numbers describe each step. The *reward* of a completion is $\beta \log \frac{\pi}{\pi_{ref}}$, as tutorial 2 has
# it; the *margin* is the chosen reward minus the rejected one, β·h of tutorial 1; the *accuracy* is the share of pairs
# whose chosen completion has the higher reward (a tie does not count).

# %%
beta, learning_rate, batch_size, steps = 0.1, 2e-4, 16, 40

set_seed(42)
tokenizer = load_processor(model_dir)
rows = prepare_dataset(load_preferences(pairs_file), tokenizer)
policy = load_model(model_dir)
reference = Reference(policy, frozen_copy(policy))
collator = DataCollatorForPreference(tokenizer.pad_token_id, layout="padded")
optimizer = make_optimizer(policy, learning_rate=learning_rate)
scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
one_process = World(rank=0, size=1, device=torch.device("cpu"))  # which process this is, of how many

history = []
policy.train()
windows = epoch_windows(rows["length"][:], batch_size=batch_size, shuffle=True, seed=42)[:steps]
for pairs, (batch,) in load_windows(rows, windows, one_process, collator):  # 16, and the one batch that holds them
    logps = concatenated_forward(policy, batch)
    chosen_logps, rejected_logps = logps["chosen_logps"], logps["rejected_logps"]  # (16,) each, as all that follow
    ref_chosen_logps, ref_rejected_logps = reference(batch)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta
    )
    loss = losses.sum() / pairs
    loss.backward()

    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()

    history.append({
        "loss": loss.item(),
        "rewards/chosen": chosen_rewards.mean().item(),
        "rewards/rejected": rejected_rewards.mean().item(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean().item(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean().item(),
    })  # fmt: skip

for step in (0, 9, 19, 29, 39):
    print(f"step {step + 1:2}  ", "  ".join(f"{key} {value:6.3f}" for key, value in history[step].items()))
assert abs(history[0]["loss"] - 0.6931472) < 1e-6 and history[0]["rewards/margins"] == 0
assert history[1]["rewards/margins"] == 0  # the first step's learning rate is 0: the warm-up begins there

# %% [markdown]
# ## How it went
#
# Look at the margin first: it is what the loss wants to grow. Then at the two rewards it is made of. Here the chosen
# one rises while the rejected one falls, but often *both* fall, the rejected one faster: the loss only sees their
# difference. If the chosen reward falls far, the model may forget how to write; a larger β or fewer steps hold it. At
# steps 1 and 2 the accuracy is 0, not ½: the policy still is the reference, and all pairs are ties.

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for axis, keys, label in (
    (axes[0], {"loss": "-"}, "loss  [nats]"),
    (
        axes[1],
        {"rewards/chosen": "--", "rewards/rejected": ":", "rewards/margins": "-"},
        "reward β·log π/π_ref  [nats·β]",
    ),
    (axes[2], {"rewards/accuracies": "-"}, "share of pairs ranked rightly"),
):
    for key, style in keys.items():
        values = [row[key] for row in history]
        axis.plot(range(1, steps + 1), values, style, color="black", label=key.split("/")[-1])
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(label)
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# ## The same by the program
#
# `train` gets the same choices as options. Each weight of its model is compared with ours, and each number of its log.
# Left to itself it would lay the pairs out without padding and each prompt once, which is faster: the same sums, in
# another order, so that the last bits would differ.

# %%
args = DPOConfig(
    model_name_or_path=model_dir,
    dataset_name=pairs_file,
    output_dir="tutorial-3",
    overwrite_output_dir=True,
    beta=beta,
    learning_rate=learning_rate,
    lr_scheduler_type="cosine",
    warmup_ratio=0.1,
    per_device_train_batch_size=batch_size,
    layout="padded",
    max_steps=steps,
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
)
run = train(args=args)

theirs = run.model.state_dict()
assert all(torch.equal(value, theirs[name]) for name, value in policy.state_dict().items())
print(f"{len(theirs)} tensors, {sum(value.numel() for value in theirs.values()):,} numbers: equal to the bit")
for ours, row in zip(history, run.rows, strict=True):
    assert all(abs(value - row[key]) < 1e-6 for key, value in ours.items())
print(f"{len(history)} rows of metrics: equal")

# %% [markdown]
# ## Where each line lives in the program
#
# | here | in `dpo/` |
# |---|---|
# | everything before `history` | `prepare.py`, which makes the Run |
# | the two models' log-probabilities and the loss | `get_batch_loss_metrics` in `loop.py` |
# | the rest of the loop's body | `train_step` in `loop.py` |
# | the loop | `train` in `loop.py` |
#
# ## Exercises
#
# Put numbers in the place of `None` and run the cell again.
#
# 1. Cut a batch of 16 into parts of 4 and 12: forward and backward for one after the other, then one optimizer step. By
#    what must the *sum* of each part's losses be divided, so that the gradient is that of the whole batch?
# 2. Put IPO in the place of DPO's loss: `loss_type="ipo"` (with β = 0.1). Where does its loss start?
# 3. Train an adapter only: `add_adapter(policy, {"r": 8})` of `dpo.adapters`, and `Reference(policy)` without a copy:
#    the reference is the policy with its adapter off. How many numbers does it train?


# %%
mine = {"1": None, "2": None, "3": None}

model = load_model(model_dir).train()
frozen = Reference(model, frozen_copy(model))


def gradient(parts: list[list[int]], divide_by: float) -> torch.Tensor:
    model.zero_grad()
    for part in parts:
        batch = collator([rows[i] for i in part])
        logps = concatenated_forward(model, batch)
        losses, _, _ = dpo_loss(logps["chosen_logps"], logps["rejected_logps"], *frozen(batch), beta=beta)
        (losses.sum() / divide_by).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


numbers = windows[0][0][0]  # of the first step, its one batch, and the one process: 16 row numbers
whole, parts = gradient([numbers], len(numbers)), [numbers[:4], numbers[4:]]
checked = {"1": mine["1"] is not None and torch.allclose(gradient(parts, mine["1"]), whole, atol=1e-5)}
zeros, length = torch.zeros(1), torch.ones(1)
ipo = dpo_loss(zeros, zeros, zeros, zeros, loss_type="ipo", chosen_lengths=length, rejected_lengths=length, beta=beta)
checked["2"] = mine["2"] is not None and abs(mine["2"] - ipo[0].item()) < 1e-3
adapted = add_adapter(model, {"r": 8})
checked["3"] = mine["3"] == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
batch = collator([rows[i] for i in numbers])
assert torch.equal(Reference(adapted)(batch)[0], concatenated_forward(adapted, batch)["chosen_logps"].detach())
for question, answer in mine.items():
    print(f"exercise {question}:", "yet to do" if answer is None else checked[question])
