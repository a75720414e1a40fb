"""The reference: what a frozen copy and a switched-off adapter must be, and when the latter will not do."""

import copy

import pytest
import torch
from conftest import make_model
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, get_peft_model

from dpo.collate import DataCollatorForPreference
from dpo.logprobs import concatenated_forward
from dpo.reference import (
    Reference,
    adapter_starts_at_zero,
    compute_ref_log_probs,
    frozen_adapter,
    frozen_copy,
    null_ref_context,
)

BATCH = DataCollatorForPreference(pad_token_id=0)(
    [{"prompt_input_ids": [5, 6, 7], "chosen_input_ids": [9, 10], "rejected_input_ids": [11, 12, 13]}]
)


def make_adapter(attention_bias: bool = False, **options):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(make_model(attention_bias=attention_bias), config)


def shift(model) -> None:
    """Stands for training: every parameter that may move does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def score(model) -> float:
    return concatenated_forward(model, BATCH)["chosen_logps"].item()


def test_frozen_copy_stays_where_the_policy_started():
    policy = make_model()
    before = score(policy)
    reference = frozen_copy(policy)
    shift(policy)
    chosen, rejected = compute_ref_log_probs(BATCH, policy=policy, ref_model=reference)
    assert chosen.item() == before != score(policy)
    assert not chosen.requires_grad and not rejected.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert not reference.training and not frozen_copy(policy.train()).training
    limited = Reference(policy, reference, ld_alpha=0.5)(BATCH)  # of the longer completion's tail a half
    assert limited[0].item() == before and rejected.item() < limited[1].item()


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("make", [make_model, make_adapter])
def test_a_synced_reference_moves_by_alpha_towards_what_trains(make, alpha):
    policy = make()
    reference = frozen_copy(policy)
    before = {name: parameter.clone().double().numpy() for name, parameter in reference.named_parameters()}
    shift(policy)
    moving = Reference(policy, reference, sync_steps=2, mixup_alpha=alpha)
    moving.after_step(1)
    assert all((parameter.double().numpy() == before[name]).all() for name, parameter in reference.named_parameters())
    moving.after_step(2)
    moved = dict(reference.named_parameters())
    for name, parameter in policy.named_parameters():
        expected = alpha * parameter.detach().double().numpy() + (1 - alpha) * before[name]
        assert abs(moved[name].double().numpy() - expected).max() < 1e-6
        assert (moved[name].double().numpy() != before[name]).any() == parameter.requires_grad


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "modules_to_save"])
def test_adapter_switched_off_is_the_model_before_training(options):
    policy = make_adapter(**options)
    base = score(make_model())
    assert adapter_starts_at_zero(policy)
    shift(policy)
    assert score(policy) != base
    assert compute_ref_log_probs(BATCH, policy=policy)[0].item() == base


def test_adapter_is_on_and_training_again_after_the_reference_was_scored():
    policy = make_adapter(lora_dropout=0.5).train()
    shift(policy)
    with null_ref_context(policy) as base:
        assert not any(module.training for module in base.modules())
    assert policy.training and policy.get_base_model().training
    with null_ref_context(policy.eval()):
        pass
    assert not policy.training
    assert score(policy.eval()) != compute_ref_log_probs(BATCH, policy=policy)[0].item()


BIAS = {"bias": "all", "attention_bias": True}


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, BIAS], ids=str)
def test_adapters_that_do_not_start_at_zero_need_a_copy(options):
    assert not adapter_starts_at_zero(make_adapter(**options))


def test_an_adapter_trained_before_is_copied_with_its_base_shared():
    policy = make_adapter()
    shift(policy)  # the adapter's life before DPO
    assert not adapter_starts_at_zero(policy)
    start = score(policy)
    reference = frozen_copy(policy)
    shift(policy)
    assert compute_ref_log_probs(BATCH, policy=policy, ref_model=reference)[0].item() == start
    policies = {parameter.data_ptr() for parameter in policy.parameters()}
    copied = [p for p in reference.parameters() if p.data_ptr() not in policies]
    assert sum(p.numel() for p in copied) == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


OTHERS = {
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, target_r=2, total_step=100),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    "dora": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, use_dora=True),
    "pissa": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, init_lora_weights="pissa"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_of_any_make_stays_where_it_started_beside_the_one_that_trains(kind):
    policy = get_peft_model(make_model(), copy.deepcopy(OTHERS[kind]))
    shift(policy)  # the adapter's life before DPO
    before, trained = score(policy), {name for name, p in policy.named_parameters() if p.requires_grad}
    name = frozen_adapter(policy)
    assert score(policy) == before and {n for n, p in policy.named_parameters() if p.requires_grad} == trained
    shift(policy)
    assert compute_ref_log_probs(BATCH, policy=policy, ref_adapter_name=name)[0].item() == before != score(policy)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == trained
