"""The theorem: on a table of completions with known rewards a loss ends at the policy that its paper promises.

Three prompts, four completions each, a reference that is not uniform, and preferences in expectation: every pair (or
ranking) is in the batch, weighted by its probability under the rewards. Nothing is sampled: the policy must get there.
"""

import itertools
import math
from functools import partial

import conftest
import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dpo.losses import F_DIVERGENCES, LOSSES, dpo_loss, exo_loss, plackett_luce_loss

REWARDS = np.array([[1.0, 0.2, -0.5, 0.4], [-1.0, 0.8, 0.1, 0.0], [0.3, -0.2, 0.6, -0.9]])
REFERENCE = np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.05, 0.5, 0.2], [0.6, 0.1, 0.1, 0.2]])
PROMPTS, COMPLETIONS = REWARDS.shape
BETAS = [0.1, 0.5, 2.0]
LOG_REFERENCE = torch.tensor(REFERENCE).log()


def chance(x: int, *ranking: int) -> float:
    """How probable this ranking of some completions of prompt x is under the rewards (Plackett–Luce, Bradley–Terry)."""
    worth = np.exp(REWARDS[x, list(ranking)])
    return math.prod(worth[k] / worth[k:].sum() for k in range(len(ranking)))


def rankings(of: int) -> list[tuple[int, ...]]:
    """(prompt, best completion, second best, ...) for each prompt and each ordered choice of so many completions."""
    return [(x, *row) for x in range(PROMPTS) for row in itertools.permutations(range(COMPLETIONS), of)]


ROWS = rankings(of=2)
X, CHOSEN, REJECTED = torch.tensor(ROWS).unbind(1)
WINS = torch.tensor([chance(*row) for row in ROWS], dtype=torch.float64)


def kl_to(policy: torch.Tensor, optimum: np.ndarray) -> float:
    """The greatest KL(policy ‖ optimum) of a prompt."""
    assert np.allclose(optimum.sum(1), 1, atol=1e-12)
    p = policy.exp().numpy()
    return float((p * (np.log(p) - np.log(optimum))).sum(1).max())


precise = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 0}
lbfgs = partial(torch.optim.LBFGS, max_iter=2000, **precise)


def train(loss_of_log_policy, *, optimizer=lbfgs, steps: int = 1) -> torch.Tensor:
    """Minimises a loss of the table log π (prompts, completions), from the reference on; returns the table."""
    logits = LOG_REFERENCE.clone().requires_grad_()
    stepper = optimizer([logits])

    def closure():
        stepper.zero_grad()
        loss = loss_of_log_policy(logits.log_softmax(-1))
        loss.backward()
        return loss

    for _ in range(steps):
        stepper.step(closure)
    return logits.detach().log_softmax(-1)


def loss_of_table(log_policy: torch.Tensor, **options):
    """`dpo_loss` of ROWS, each of them once."""
    return dpo_loss(*[t[X, which] for t in (log_policy, LOG_REFERENCE) for which in (CHOSEN, REJECTED)], **options)


def preference_loss(wins: torch.Tensor = WINS, **options):
    """The expected `dpo_loss` over all pairs, as a function of log π."""
    return lambda log_policy: (wins * loss_of_table(log_policy, **options)[0]).sum() / wins.sum()


def tilted(beta: float, reward: np.ndarray = REWARDS, reference: np.ndarray = REFERENCE) -> np.ndarray:
    """π* ∝ π_ref exp(r/β), the optimum of E r − β KL(π ‖ π_ref)."""
    weights = reference * np.exp((reward - reward.max(1, keepdims=True)) / beta)
    return weights / weights.sum(1, keepdims=True)


def optimum_under(ratio_of, beta: float, highest: float = np.inf) -> np.ndarray:
    """The optimum of E r − β D_f(π ‖ π_ref): f′(π/π_ref) = (r − λ)/β, with λ such that Σ π = 1, found by bisection.

    Args: ratio_of, the inverse of f′; highest, the supremum of f′.
    """
    table = []
    for reward, reference in zip(REWARDS, REFERENCE, strict=True):
        # Σ π falls in λ. At λ = max(r) − β f′(1) no ratio exceeds 1; going down it exceeds 1 in the end.
        low = reward.max() - beta * highest + 1e-14 if np.isfinite(highest) else reward.min() - 100
        high = reward.max() + 100 * beta
        for _ in range(200):
            middle = (low + high) / 2
            total = (reference * ratio_of((reward - middle) / beta)).sum()
            low, high = (middle, high) if total > 1 else (low, middle)
        table.append(reference * ratio_of((reward - low) / beta))
    return np.array(table) / np.sum(table, axis=1, keepdims=True)


def ratio_of_chi(phi: np.ndarray) -> np.ndarray:
    """The inverse of φ(u) = u + log u, by Newton's method on z = log u: e^z + z = φ."""
    z = np.where(phi > 1, np.log(np.maximum(phi, 1)), phi - 1)
    for _ in range(100):
        z = z - (np.exp(z) + z - phi) / (np.exp(z) + 1)
    return np.exp(z)


HALF, LENGTHS = {"f_alpha_divergence_coef": 0.5}, torch.tensor([[3, 1, 2, 5], [2, 2, 4, 1], [1, 6, 3, 2]])
OF_PAIRS = {"chosen_lengths": LENGTHS[X, CHOSEN], "rejected_lengths": LENGTHS[X, REJECTED]}
# How often a completion wins against a random one: what IPO tilts by, with every pair once and here without lengths.
SHARES = np.array([[sum(1 / (1 + math.exp(r - s)) for r in row) / COMPLETIONS for s in row] for row in REWARDS])
OPTIMA = {  # what the loss is given, the optimum under β
    "sigmoid": ({}, tilted),
    "reference_free": ({"reference_free": True}, partial(tilted, reference=np.ones_like(REFERENCE))),
    "r_dpo": ({"r_dpo_alpha": 0.3, **OF_PAIRS}, partial(tilted, reward=REWARDS - 0.3 * LENGTHS.numpy())),
    "ipo": ({}, partial(tilted, reward=SHARES)),
    "chipo": ({"chipo_clip": 100.0}, partial(optimum_under, ratio_of_chi)),
    # the inverses of f′(u) = log(2u / (1 + u)), 1 − 1/u and (1 − u^−α)/α, and how large f′ gets
    "js_divergence": ({}, partial(optimum_under, lambda s: 1 / (2 * np.exp(-s) - 1), highest=math.log(2))),
    "forward_kl": ({}, partial(optimum_under, lambda s: 1 / (1 - s), highest=1.0)),
    "alpha_divergence": (HALF, partial(optimum_under, lambda s: (1 - 0.5 * s) ** -2.0, highest=2.0)),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", OPTIMA)
def test_each_loss_ends_at_the_optimum_of_its_paper(name, beta):
    options, optimum = OPTIMA[name]
    options |= {"loss_type": name} if name in LOSSES else {}
    options |= {"f_divergence_type": name} if name in F_DIVERGENCES else {}
    policy = train(preference_loss(beta=beta, **options))
    assert kl_to(policy, optimum(beta)) < 1e-7
    assert name == "sigmoid" or kl_to(policy, tilted(beta)) > 1e-4  # not that of plain DPO


SGD, ADAM = torch.optim.SGD, partial(torch.optim.Adam, lr=0.05)
FIRST_ORDER = [(0.1, partial(SGD, lr=200.0)), (0.5, partial(SGD, lr=20.0)), (2.0, partial(SGD, lr=2.0))]


@pytest.mark.parametrize(("beta", "optimizer"), [*FIRST_ORDER, (0.5, ADAM), (2.0, ADAM)])
def test_plain_gradient_descent_and_adam_get_there_too(beta, optimizer):
    assert kl_to(LOG_REFERENCE, tilted(beta)) > 1e-2  # it has a way to go
    assert kl_to(train(preference_loss(beta=beta), optimizer=optimizer, steps=1000), tilted(beta)) < 1e-4


def test_the_implicit_rewards_are_the_rewards_up_to_a_constant_for_each_prompt():
    _, chosen, rejected = loss_of_table(train(preference_loss(beta=0.5)), beta=0.5)
    expected = [REWARDS[x, i] - REWARDS[x, j] for x, i, j in ROWS]
    assert (chosen - rejected).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_robust_undoes_the_flips_of_a_known_share_of_labels(beta):
    epsilon = 0.3
    flipped = torch.tensor([chance(x, j, i) for x, i, j in ROWS], dtype=torch.float64)
    seen = {"wins": (1 - epsilon) * WINS + epsilon * flipped, "beta": beta}
    robust = train(preference_loss(**seen, loss_type="robust", label_smoothing=epsilon))
    assert kl_to(robust, tilted(beta)) < 1e-8
    assert kl_to(train(preference_loss(**seen)), tilted(beta)) > 1e-3  # which DPO does not


@pytest.mark.parametrize("beta", BETAS)
def test_plackett_luce_of_three_completions_ends_at_the_tilted_reference(beta):
    rows = rankings(of=3)
    weights = torch.tensor([chance(*row) for row in rows], dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(PROMPTS * math.comb(COMPLETIONS, 3))
    x, ranking = torch.tensor(rows)[:, 0], torch.tensor(rows)[:, 1:]

    def loss(log_policy):
        ratios = (log_policy - LOG_REFERENCE)[x[:, None], ranking]
        return (weights * plackett_luce_loss(ratios, beta=beta)).sum() / weights.sum()

    assert kl_to(train(loss), tilted(beta)) < 1e-8


@pytest.mark.parametrize("beta", BETAS)
def test_exo_over_all_completions_ends_at_the_tilted_reference(beta):
    policy = train(lambda p: exo_loss(p - LOG_REFERENCE, torch.tensor(REWARDS), beta=beta, exo_beta_r=1.0).mean())
    assert kl_to(policy, tilted(beta)) < 1e-8


class Table(PreTrainedModel):
    """A language model that is a table: log π(next | token) = log softmax(row of the token)."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.rows = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return CausalLMOutput(logits=self.rows(input_ids))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("loss_type", ["sigmoid", pytest.param("plackett_luce", marks=pytest.mark.slow)])
def test_the_whole_loop_ends_at_the_tilted_reference(tmp_path, beta, loss_type):
    """The same from text to trained model: rows weighted by their probability go through `dpo.loop.train`."""
    prompts, completions = ("the sky", "the sea", "now"), (" blue", " red", " grey", " green")
    tokenizer, rows = conftest.make_tokenizer(), []
    for x, *ranking in rankings(of=2 if loss_type == "sigmoid" else 3):
        best, *others = (completions[i] for i in ranking)
        row = {"prompt": prompts[x], "chosen": best, "weight": chance(x, *ranking)}
        rows.append(row | {"rejected": others[0] if loss_type == "sigmoid" else others})
    torch.manual_seed(0)
    model = Table(PretrainedConfig(vocab_size=len(tokenizer)))

    def distribution() -> np.ndarray:
        """π over the four completions of each prompt, each of them one token and the end of the sequence."""
        logps = model.rows.weight.detach().double().log_softmax(-1)
        last, first = ([tokenizer(text)["input_ids"][-1] for text in texts] for texts in (prompts, completions))
        table = logps[last][:, first] + logps[first, tokenizer.eos_token_id]
        return table.softmax(-1).numpy()

    reference = distribution()
    optimum = tilted(beta, reference=reference)
    assert kl_to(torch.tensor(reference).log(), optimum) > 1e-2  # it has a way to go
    options = {"beta": beta, "loss_type": loss_type, "per_device_train_batch_size": len(rows), "logging_steps": 1000}
    conftest.start(tmp_path, model, rows, **options, max_steps=200, learning_rate=0.3, lr_scheduler_type="cosine")
    assert kl_to(torch.tensor(distribution()).log(), optimum) < 1e-4
