"""One result whatever the layout: a step is the same however it is cut into micro-batches and processes, for every
loss, those that look beyond the pair too."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import curve, make_model, make_rankings, make_rows, make_tokenizer, read, run, start
from datasets import Dataset
from transformers import MixtralConfig, MixtralForCausalLM

import dpo.loop
from dpo.collate import DataCollatorForPreference
from dpo.data import prepare_dataset
from dpo.logprobs import concatenated_forward
from dpo.losses import LOSSES
from dpo.reference import Reference

BEYOND = ["aot", "aot_pair", "bco_pair"]  # look beyond the pair
MIXTURES = {
    "sorted and centred": {"loss_type": ["aot", "bco_pair", "sigmoid"], "loss_weights": [1.0, 2.0, 0.5]},
    "centred and weighed": {"loss_type": ["bco_pair", "sft"], "use_weighting": True},
    "sorted, with RPO": {"loss_type": "aot_pair", "rpo_alpha": 0.3, "ld_alpha": 0.5},
    "sorted, without a reference": {"loss_type": "aot_pair", "reference_free": True},
}
CUTS = {
    "4×2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "2×4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "1×8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "by tokens": {"max_tokens_per_micro_batch": 60},
}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
QUICK = {"save_strategy": "no", "learning_rate": 1e-2, "num_train_epochs": 2, "layout": "padded"}
TIMES = {"tokens_per_second", "unique_tokens_per_second"}


def rows_for(loss: str) -> list[dict]:
    """Eleven, so that the last window of 8 has 3; with the numbers that the loss takes."""
    if loss in ("plackett_luce", "exo"):
        return make_rankings(11, scores=loss == "exo")
    names = [] if "sort" in loss or loss.startswith("aot") else ["weight", "margin"]
    return [row | {name: 0.5 + i % 3 for name in names} for i, row in enumerate(make_rows(11))]


def same_metrics(cut: list[dict], whole: list[dict]) -> None:
    """All that the rows tell but the time, to 1e-5."""
    assert len(cut) == len(whole) > 1
    for one, other in zip(cut, whole, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - TIMES:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), key


WHOLE = {}  # runs whose windows are one batch each, by loss


def check_cut(folder, name: str, cut: str) -> None:
    options = {"rows": rows_for(name), **QUICK, **MIXTURES.get(name, {"loss_type": name})}
    if name not in WHOLE:
        WHOLE[name] = start(folder / "whole", make_model(**SMALL), **options).rows
    same_metrics(start(folder / "cut", make_model(**SMALL), **options, **CUTS[cut]).rows, WHOLE[name])


@pytest.mark.parametrize("loss", LOSSES)
def test_eight_pairs_at_once_equal_two_four_times_for_every_loss(loss, tmp_path, unlooked):
    check_cut(tmp_path, loss, "2×4")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("loss", [*BEYOND, *MIXTURES])
def test_losses_that_look_beyond_the_pair_are_the_same_in_every_cut(loss, cut, tmp_path, unlooked):
    check_cut(tmp_path, loss, cut)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "2×4"])
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in BEYOND])
def test_all_losses_are_the_same_in_every_cut(loss, cut, tmp_path, unlooked):
    check_cut(tmp_path, loss, cut)


# ---------------------------------------------------------------------------------------------------- by brute force


def quantiles(first: torch.Tensor, second: torch.Tensor, beta: float) -> torch.Tensor:
    """AOT by hand: the k-th smallest of the one beside the k-th smallest of the other."""
    first, second = (values[torch.argsort(values.detach())] for values in (first, second))
    return F.softplus(-beta * (first - second))


def by_hand(loss: str, w, l, policy_h, ref_h, beta: float) -> torch.Tensor:
    """The mean loss of all pairs, from all of their log-probabilities at once."""
    delta = beta * torch.cat([w, l]).detach().mean()
    losses = {
        "aot": lambda: quantiles(policy_h, ref_h, beta),
        "aot_pair": lambda: quantiles(w, l, beta),
        "bco_pair": lambda: F.softplus(delta - beta * w) + F.softplus(beta * l - delta),
    }
    if loss == "sorted and centred":
        return (losses["aot"]() + 2 * losses["bco_pair"]() + 0.5 * F.softplus(-beta * (w - l))).mean()
    return losses[loss]().mean()


@pytest.mark.parametrize("cut", ["2×4", "by tokens"])
@pytest.mark.parametrize("loss", [*BEYOND, "sorted and centred"])
def test_a_cut_window_has_the_gradient_of_all_its_pairs_at_once(loss, cut, tmp_path, unlooked):
    """In float64; of seven pairs, which fill no window: a step of plain gradient descent tells what it was."""
    policy, reference = (make_model(seed, **SMALL).double() for seed in (0, 19))
    rows, beta = make_rows(7), 0.7
    before = {name: value.clone() for name, value in policy.named_parameters()}
    batch = DataCollatorForPreference(0)(list(prepare_dataset({"rows": Dataset.from_list(rows)}, make_tokenizer())))
    own = concatenated_forward(policy, batch)
    with torch.no_grad():
        other = concatenated_forward(reference, batch)
    chosen, rejected = own["chosen_logps"], own["rejected_logps"]
    w, l = chosen - other["chosen_logps"], rejected - other["rejected_logps"]
    mean = by_hand(loss, w, l, chosen - rejected, other["chosen_logps"] - other["rejected_logps"], beta)
    expected = dict(zip(before, torch.autograd.grad(mean, policy.parameters()), strict=True))

    options = {"optim": "sgd", "max_grad_norm": 0, "learning_rate": 0.5, "max_steps": 1, "beta": beta} | CUTS[cut]
    options |= MIXTURES.get(loss, {"loss_type": loss}) | {"rows": rows, "ref_model": reference, "layout": "padded"}
    row = start(tmp_path, policy, **options).rows[0]
    assert row["loss"] == pytest.approx(mean.item(), abs=1e-9)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, value in policy.named_parameters():
        assert ((before[name] - value) / 0.5 - expected[name]).abs().max() < 1e-6 * largest, name


@pytest.mark.parametrize("cut", [{}, CUTS["2×4"], CUTS["by tokens"]], ids=["8×1", "2×4", "by tokens"])
def test_bco_takes_the_mean_of_all_rewards_up_to_this_windows(cut, tmp_path, unlooked, monkeypatch):
    """δ of each forward pass against a running mean in plain Python, over the windows' own rewards as they are logged;
    an evaluation in between leaves it as it is."""
    used, options_of = [], dpo.loop.loss_options
    monkeypatch.setattr(dpo.loop, "loss_options", lambda *a: (used.append(a[1].bco_delta), options_of(*a))[1])
    options = {"loss_type": "bco_pair", "eval_strategy": "steps", "eval_steps": 1, "eval_rows": make_rows(4, seed=1)}
    done = start(tmp_path, make_model(**SMALL), rows_for("bco_pair"), **QUICK, **options, **cut)
    total, count, means = 0.0, 0, []
    for row, pairs in zip([row for row in done.rows if "loss" in row], [8, 3, 8, 3], strict=True):
        total += pairs * (row["rewards/chosen"] + row["rewards/rejected"])
        count += 2 * pairs
        means.append(total / count)
    assert max(map(abs, means)) > 1e-2 and means[0] == 0
    assert done.state.bco_delta == pytest.approx(means[-1], abs=1e-6) and done.state.bco_count == 2 * 22
    steps = [value for i, value in enumerate(used) if i == 0 or value != used[i - 1]]  # those of one window are alike
    assert steps == pytest.approx(means, abs=1e-6)


# ------------------------------------------------------------------------------------------------------ the look ahead


def test_dropout_in_the_look_ahead_is_that_of_the_real_passes_and_takes_nothing_from_the_run(tmp_path, monkeypatch):
    seen, original = [], dpo.loop.among_others
    monkeypatch.setattr(dpo.loop, "among_others", lambda *a: (seen.append(a), original(*a))[1])
    noisy = {"disable_dropout": False, "max_steps": 2, "rows": make_rows(8), **CUTS["2×4"]}
    plain = start(tmp_path / "a", make_model(attention_dropout=0.5), **noisy)
    seen.clear()
    sorted_ = start(tmp_path / "b", make_model(attention_dropout=0.5), loss_type="aot", **noisy)
    assert curve(sorted_, "logps/chosen")[0] == curve(plain, "logps/chosen")[0]
    assert curve(sorted_, "rewards/margins")[0] == curve(plain, "rewards/margins")[0] != 0
    assert len(seen) == 8 and all(len(window.pairs["chosen_logps"]) == 8 for _, window in seen)
    for pairs, window in seen:
        for name, values in pairs.items():
            assert torch.equal(values, window.pairs[name][window.own]), name


@pytest.mark.parametrize(
    ("loss", "cut", "passes"), [("sigmoid", "2×4", 4), ("aot", "2×4", 8), ("bco_pair", "2×4", 8), ("aot", None, 1)]
)
def test_a_look_ahead_is_only_taken_where_it_is_needed_and_asks_the_reference_once(
    loss, cut, passes, tmp_path, unlooked, monkeypatch
):
    asked, original, forwards = [], Reference.__call__, []
    monkeypatch.setattr(Reference, "__call__", lambda self, batch: (asked.append(batch), original(self, batch))[1])
    forward = dpo.logprobs.forward_kept_positions
    monkeypatch.setattr(
        dpo.logprobs, "forward_kept_positions", lambda model, own: (forwards.append(model), forward(model, own))[1]
    )
    model = make_model(**SMALL)
    start(tmp_path, model, make_rows(8), loss_type=loss, max_steps=1, layout="padded", **CUTS.get(cut, {}))
    assert len(asked) == (4 if cut else 1) and sum(each is model for each in forwards) == passes


def test_the_load_balance_of_a_mixture_of_experts_stays_that_of_each_forward_pass(tmp_path, unlooked):
    sizes = {"vocab_size": 400, "num_key_value_heads": 1, "num_local_experts": 4, **SMALL}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.3))
    options = {"loss_type": "aot", "max_steps": 1, "layout": "padded", **CUTS["2×4"]}
    row = start(tmp_path, model, make_rows(8), **options).rows[0]
    assert row["aux_loss"] > 0.5
    assert row["loss"] == pytest.approx(math.log(2) + 0.3 * row["aux_loss"], rel=1e-5)


def test_a_batch_alone_is_its_own_window():
    """`get_batch_loss_metrics` as a user calls it: each pair has the batch's mean, and its gradient."""
    model, args = make_model(**SMALL), dpo.loop.DPOConfig(loss_type="aot_pair", beta=0.7)
    batch = DataCollatorForPreference(0)(
        list(prepare_dataset({"rows": Dataset.from_list(make_rows(5))}, make_tokenizer()))
    )
    reference = Reference(model, make_model(19, **SMALL))
    losses, metrics = dpo.loop.get_batch_loss_metrics(model, batch, reference, args=args)
    own, other = concatenated_forward(model, batch), reference(batch)
    mean = quantiles(own["chosen_logps"] - other[0], own["rejected_logps"] - other[1], 0.7).mean()
    assert torch.allclose(losses, mean.expand(5)) and torch.equal(metrics["loss"], losses.detach())
    for one, two in zip(*(torch.autograd.grad(x, model.parameters()) for x in (losses.mean(), mean)), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- processes

LAYOUTS = {
    "two, accumulating": (2, "--per_device_train_batch_size 1 --gradient_accumulation_steps 4"),
    "two, by tokens": (2, "--per_device_train_batch_size 4 --max_tokens_per_micro_batch 40"),
    "four, accumulating": (4, "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"),
}
SPREAD = [(loss, layout) for loss in ("sigmoid", "aot", "aot_pair", "bco_pair") for layout in list(LAYOUTS)[:2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and 17 rows: the last of three windows has one, and most processes none."""
    path = tmp_path_factory.mktemp("processes")
    make_model(**SMALL).save_pretrained(path / "model")
    make_tokenizer().save_pretrained(path / "model")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(17)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "layout"), [*SPREAD, ("aot bco_pair sft", "four, accumulating")])
def test_processes_that_accumulate_equal_one_that_does_not(loss, layout, folder):
    said = f"--model_name_or_path model --dataset_name rows.jsonl --loss_type {loss} --logging_steps 1 --beta 0.5"
    said += " --learning_rate 1e-2 --num_train_epochs 2 --save_strategy no --use_cpu --overwrite_output_dir"
    processes, how = LAYOUTS[layout]
    whole, cut = f"{loss} whole", f"{loss} {layout}"
    if not (folder / whole).exists():
        run("dpo.loop", *said.split(), "--output_dir", whole, cwd=folder)
    run("dpo.loop", *said.split(), *how.split(), "--output_dir", cut, processes=processes, cwd=folder)
    same_metrics(read(folder / cut), read(folder / whole))
    assert len(read(folder / whole)) == 6
