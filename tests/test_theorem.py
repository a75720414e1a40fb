"""The theorem: on a table of completions with known rewards each loss ends at the policy that its paper promises.

Three prompts, four completions each, a reference that is not uniform, and preferences in expectation: every pair (or
ranking) is in the batch, weighted by its probability under the rewards. Nothing is sampled: the policy must get there.
"""

import itertools
import math

import conftest
import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from dpo.losses import dpo_loss, exo_loss, f_divergence_score, plackett_luce_loss

REWARDS = np.array([[1.0, 0.2, -0.5, 0.4], [-1.0, 0.8, 0.1, 0.0], [0.3, -0.2, 0.6, -0.9]])
REFERENCE = np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.05, 0.5, 0.2], [0.6, 0.1, 0.1, 0.2]])
PROMPTS, COMPLETIONS = REWARDS.shape
BETAS = [0.1, 0.5, 2.0]
# One row for each prompt and each ordered pair: how often is the chosen one preferred to the rejected one?
ROWS = [(x, i, j) for x in range(PROMPTS) for i, j in itertools.permutations(range(COMPLETIONS), 2)]
X, CHOSEN, REJECTED = torch.tensor(ROWS).unbind(1)
WINS = torch.tensor([1 / (1 + math.exp(REWARDS[x, j] - REWARDS[x, i])) for x, i, j in ROWS], dtype=torch.float64)
LOG_REFERENCE = torch.tensor(REFERENCE).log()


def kl_to(policy: torch.Tensor, optimum: np.ndarray) -> float:
    """The greatest KL(policy ‖ optimum) of a prompt."""
    assert np.allclose(optimum.sum(1), 1, atol=1e-12)
    p = policy.exp().numpy()
    return float((p * (np.log(p) - np.log(optimum))).sum(1).max())


def train(loss_of_log_policy, *, optimizer: str | float = "lbfgs") -> torch.Tensor:
    """Minimises a loss of the table log π (prompts, completions), from the reference on; returns the table.

    Args: optimizer, lbfgs, adam, or a number, which is the learning rate of plain gradient descent.
    """
    logits = LOG_REFERENCE.clone().requires_grad_()
    if optimizer == "lbfgs":
        steps, options = 1, {"max_iter": 2000, "tolerance_grad": 1e-12, "tolerance_change": 0.0}
        stepper = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **options)
    elif optimizer == "adam":
        steps, stepper = 1000, torch.optim.Adam([logits], lr=0.05)
    else:
        steps, stepper = 1000, torch.optim.SGD([logits], lr=optimizer)

    def closure():
        stepper.zero_grad()
        loss = loss_of_log_policy(logits.log_softmax(-1))
        loss.backward()
        return loss

    for _ in range(steps):
        stepper.step(closure)
    return logits.detach().log_softmax(-1)


def preference_loss(**options):
    """The expected `dpo_loss` over all pairs, as a function of log π."""

    def loss(log_policy):
        table = [t[X, which] for t in (log_policy, LOG_REFERENCE) for which in (CHOSEN, REJECTED)]
        return (WINS * dpo_loss(*table, **options)[0]).sum() / WINS.sum()

    return loss


def tilted(beta: float, reward: np.ndarray = REWARDS) -> np.ndarray:
    """π* ∝ π_ref exp(r/β), the optimum of E r − β KL(π ‖ π_ref)."""
    weights = REFERENCE * np.exp((reward - reward.max(1, keepdims=True)) / beta)
    return weights / weights.sum(1, keepdims=True)


def optimum_of_divergence(ratio_of_score, beta: float, highest: float = np.inf) -> np.ndarray:
    """The optimum of E r − β D_f(π ‖ π_ref): f′(π/π_ref) = (r − λ)/β, with λ such that Σ π = 1, found by bisection.

    Args: ratio_of_score, the inverse of f′; highest, the supremum of f′.
    """
    table = []
    for reward, reference in zip(REWARDS, REFERENCE, strict=True):
        # Σ π falls in λ. At λ = max(r) − β f′(1) no ratio exceeds 1; going down it exceeds 1 in the end.
        low = reward.max() - beta * highest + 1e-14 if np.isfinite(highest) else reward.min() - 100
        high = reward.max() + 100 * beta
        for _ in range(200):
            middle = (low + high) / 2
            total = (reference * ratio_of_score((reward - middle) / beta)).sum()
            low, high = (middle, high) if total > 1 else (low, middle)
        table.append(reference * ratio_of_score((reward - low) / beta))
    return np.array(table) / np.sum(table, axis=1, keepdims=True)


@pytest.mark.parametrize("beta", BETAS)
def test_sigmoid_ends_at_the_tilted_reference(beta):
    assert kl_to(train(preference_loss(beta=beta)), tilted(beta)) < 1e-8


@pytest.mark.parametrize(("beta", "optimizer"), [(0.1, 200.0), (0.5, 20.0), (2.0, 2.0), (0.5, "adam"), (2.0, "adam")])
def test_plain_gradient_descent_and_adam_get_there_too(beta, optimizer):
    assert kl_to(LOG_REFERENCE, tilted(beta)) > 1e-2  # it has a way to go
    assert kl_to(train(preference_loss(beta=beta), optimizer=optimizer), tilted(beta)) < 1e-4


def test_the_implicit_rewards_are_the_rewards_up_to_a_constant_for_each_prompt():
    log_policy = train(preference_loss(beta=0.5))
    table = [t[X, which] for t in (log_policy, LOG_REFERENCE) for which in (CHOSEN, REJECTED)]
    _, chosen, rejected = dpo_loss(*table, beta=0.5)
    expected = [REWARDS[x, i] - REWARDS[x, j] for x, i, j in ROWS]
    assert (chosen - rejected).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_uniform_reference_is_what_reference_free_means(beta):
    weights = np.exp((REWARDS - REWARDS.max(1, keepdims=True)) / beta)
    policy = train(preference_loss(beta=beta, reference_free=True))
    assert kl_to(policy, weights / weights.sum(1, keepdims=True)) < 1e-8


@pytest.mark.parametrize("beta", BETAS)
def test_robust_undoes_the_flips_of_a_known_share_of_labels(beta):
    epsilon = 0.3
    partner = {row: k for k, row in enumerate(ROWS)}
    flipped = WINS[[partner[(x, j, i)] for x, i, j in ROWS]]
    seen = (1 - epsilon) * WINS + epsilon * flipped

    def loss(log_policy, loss_type, **options):
        table = [t[X, which] for t in (log_policy, LOG_REFERENCE) for which in (CHOSEN, REJECTED)]
        return (seen * dpo_loss(*table, beta=beta, loss_type=loss_type, **options)[0]).mean()

    assert kl_to(train(lambda p: loss(p, "robust", label_smoothing=epsilon)), tilted(beta)) < 1e-8
    assert kl_to(train(lambda p: loss(p, "sigmoid")), tilted(beta)) > 1e-3  # which DPO does not


@pytest.mark.parametrize("beta", BETAS)
def test_r_dpo_ends_at_the_optimum_of_reward_minus_length(beta):
    lengths = torch.tensor([[3, 1, 2, 5], [2, 2, 4, 1], [1, 6, 3, 2]])
    options = {"chosen_lengths": lengths[X, CHOSEN], "rejected_lengths": lengths[X, REJECTED], "r_dpo_alpha": 0.3}
    policy = train(preference_loss(loss_type="r_dpo", beta=beta, **options))
    assert kl_to(policy, tilted(beta, REWARDS - 0.3 * lengths.numpy())) < 1e-8


DIVERGENCES = {  # options: (the inverse of f′ or of the score, the supremum of f′)
    "js_divergence": ({}, lambda s: 1 / (2 * np.exp(-s) - 1), math.log(2)),  # f′(u) = log(2u / (1 + u))
    "forward_kl": ({}, lambda s: 1 / (1 - s), 1.0),  # 1 − 1/u
    "alpha_divergence": ({"f_alpha_divergence_coef": 0.5}, lambda s: (1 - 0.5 * s) ** -2.0, 2.0),  # (1 − u^−α)/α
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_f_divergence_ends_at_its_own_optimum(name, beta):
    options, ratio_of_score, highest = DIVERGENCES[name]
    optimum = optimum_of_divergence(ratio_of_score, beta, highest)
    scores = f_divergence_score(torch.tensor(optimum / REFERENCE).log(), f_divergence_type=name, **options).numpy()
    apart = beta * scores - REWARDS  # the condition of optimality: the same for all completions of a prompt
    assert np.allclose(apart, apart.mean(1, keepdims=True), atol=1e-8)
    policy = train(preference_loss(beta=beta, f_divergence_type=name, **options))
    assert kl_to(policy, optimum) < 1e-6
    assert kl_to(policy, tilted(beta)) > 1e-4  # another one than that of reverse KL


def ratio_of_chi_score(score: np.ndarray) -> np.ndarray:
    """The inverse of φ(u) = u + log u, by Newton's method on z = log u: e^z + z = score."""
    z = np.where(score > 1, np.log(np.maximum(score, 1)), score - 1)
    for _ in range(100):
        z = z - (np.exp(z) + z - score) / (np.exp(z) + 1)
    return np.exp(z)


@pytest.mark.parametrize("beta", BETAS)
def test_chipo_ends_at_the_optimum_under_chi_squared_and_kl(beta):
    optimum = optimum_of_divergence(ratio_of_chi_score, beta)
    policy = train(preference_loss(loss_type="chipo", beta=beta, chipo_clip=100.0))
    assert kl_to(policy, optimum) < 1e-6
    assert kl_to(policy, tilted(beta)) > 1e-4


@pytest.mark.parametrize("beta", BETAS)
def test_ipo_ends_at_its_least_squares_solution(beta):
    """The mean of p (h − 1/2β)² + (1 − p) (h + 1/2β)² over a pair is least at h = (2p − 1)/2β. The log-ratios of four
    completions give six such margins, which cannot all have their own way: least squares, here by linear algebra.
    With every pair once this is π* ∝ π_ref exp(mean of its wins over the others/β), as IPO's theorem has it."""
    optimum = []
    for x in range(PROMPTS):
        pairs = list(itertools.combinations(range(COMPLETIONS), 2))
        wins = [1 / (1 + math.exp(REWARDS[x, j] - REWARDS[x, i])) for i, j in pairs]
        system = np.zeros((len(pairs) + 1, COMPLETIONS))
        for k, (i, j) in enumerate(pairs):
            system[k, i], system[k, j] = 1, -1
        system[-1] = 1  # any constant will do
        target = [*((2 * p - 1) / (2 * beta) for p in wins), 0.0]
        weights = REFERENCE[x] * np.exp(np.linalg.lstsq(system, np.array(target), rcond=None)[0])
        optimum.append(weights / weights.sum())
        shares = [sum(1 / (1 + math.exp(r - s)) for r in REWARDS[x]) / COMPLETIONS for s in REWARDS[x]]
        theorem = REFERENCE[x] * np.exp(np.array(shares) / beta)
        assert np.allclose(optimum[-1], theorem / theorem.sum(), atol=1e-12)
    ones = torch.ones(len(ROWS), dtype=torch.long)
    lengths = {"chosen_lengths": ones, "rejected_lengths": ones}
    assert kl_to(train(preference_loss(loss_type="ipo", beta=beta, **lengths)), np.array(optimum)) < 1e-8


@pytest.mark.parametrize("beta", BETAS)
def test_plackett_luce_of_three_completions_ends_at_the_tilted_reference(beta):
    rows = [(x, *ranking) for x in range(PROMPTS) for ranking in itertools.permutations(range(COMPLETIONS), 3)]
    probabilities = []
    for x, *ranking in rows:
        worth = np.exp(REWARDS[x, ranking])
        probabilities.append(math.prod(worth[k] / worth[k:].sum() for k in range(3)))
    assert math.fsum(probabilities) == pytest.approx(PROMPTS * math.comb(COMPLETIONS, 3))
    x, weights = torch.tensor([row[0] for row in rows]), torch.tensor(probabilities, dtype=torch.float64)
    ranking = torch.tensor([row[1:] for row in rows])

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
@pytest.mark.parametrize("loss_type", ["sigmoid", "plackett_luce"])
def test_the_whole_loop_ends_at_the_tilted_reference(tmp_path, beta, loss_type):
    """The same from text to trained model: rows weighted by their probability go through `dpo.loop.train`."""
    prompts, completions = ("the sky", "the sea", "now"), (" blue", " red", " grey", " green")
    tokenizer, rows = conftest.make_tokenizer(), []
    for x, *ranking in itertools.product(range(PROMPTS), *[range(COMPLETIONS)] * (2 if loss_type == "sigmoid" else 3)):
        if len(set(ranking)) == len(ranking):
            worth = np.exp(REWARDS[x, ranking])
            weight = math.prod(worth[k] / worth[k:].sum() for k in range(len(ranking)))
            best, *others = (completions[i] for i in ranking)
            others = others[0] if loss_type == "sigmoid" else others
            rows.append({"prompt": prompts[x], "chosen": best, "rejected": others, "weight": weight})
    torch.manual_seed(0)
    model = Table(PretrainedConfig(vocab_size=len(tokenizer)))

    def distribution() -> np.ndarray:
        """π over the four completions of each prompt, each of them one token and the end of the sequence."""
        logps = model.rows.weight.detach().double().log_softmax(-1)
        last, first = ([tokenizer(text)["input_ids"][-1] for text in texts] for texts in (prompts, completions))
        table = logps[last][:, first] + logps[first, tokenizer.eos_token_id]
        return table.softmax(-1).numpy()

    reference = distribution()
    optimum = reference * np.exp(REWARDS / beta)
    optimum /= optimum.sum(1, keepdims=True)
    assert kl_to(torch.tensor(reference).log(), optimum) > 1e-2  # it has a way to go
    options = {"beta": beta, "loss_type": loss_type, "per_device_train_batch_size": len(rows), "logging_steps": 1000}
    conftest.start(tmp_path, model, rows, **options, max_steps=200, learning_rate=0.3, lr_scheduler_type="cosine")
    assert kl_to(torch.tensor(distribution()).log(), optimum) < 1e-4
