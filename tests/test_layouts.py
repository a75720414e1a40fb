"""The flat layouts: each token sees what it should, log-probabilities and gradients are those of each sequence alone;
the head in chunks is the head; micro-batches by tokens."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_model, make_rankings, make_rows, make_tokenizer, start
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dpo import attention, logprobs
from dpo.attention import attend_as_before, attend_by_segments, attend_segment, attend_varlen
from dpo.batches import epoch_windows
from dpo.checks import generation_error, head_error, layout_error
from dpo.collate import DataCollatorForPreference
from dpo.data import part_lengths, prepare_dataset
from dpo.distributed import keep_freed_memory
from dpo.logprobs import concatenated_forward

FLAT = ["padding_free", "prefix_shared"]
BUDGET = 400 * 4 * 7 / 2**30  # GiB of 7 positions' logits
ids = st.lists(st.integers(0, 50), min_size=1, max_size=7)
parts = {"prompt_input_ids": ids, "chosen_input_ids": ids, "rejected_input_ids": st.lists(ids, min_size=1, max_size=3)}
rankings = st.lists(st.fixed_dictionaries(parts), min_size=1, max_size=5)


def tokenised(rows: list[dict], ranked: bool = False) -> list[dict]:
    return list(prepare_dataset({"rows": Dataset.from_list(rows)}, make_tokenizer(), ranked=ranked))


PAIRS, RANKINGS = tokenised(make_rows(6)), tokenised(make_rankings(6), ranked=True)


def completions(row: dict) -> list[list[int]]:
    rejected = row["rejected_input_ids"]
    return [row["chosen_input_ids"], *(rejected if isinstance(rejected[0], list) else [rejected])]


# ------------------------------------------------------------------------------------------------------------- batches


def what_each_target_sees(batch: dict) -> list[tuple[int, list[int], list[int], int]]:
    """(sequence, the ids that its prediction may look at, their positions, the target) by the segments of a flat row,
    one token at a time."""
    inputs, seen = batch["inputs"], []
    row, positions = inputs["input_ids"][0].tolist(), inputs["position_ids"][0].tolist()
    start, before = 0, []
    places = []  # of each segment's tokens in the row
    for length, other, shared in inputs["attention_mask"][0, 0].tolist():
        places.append(list(range(start, start + length)))
        before.append(places[other][:shared])
        start += length
    assert start == len(row)
    for place, target, owner in zip(
        inputs["logits_to_keep"].tolist(), batch["targets"].tolist(), batch["owner"].tolist(), strict=True
    ):
        segment = next(i for i, own in enumerate(places) if place in own)
        visible = before[segment] + [p for p in places[segment] if p <= place]
        seen.append((owner, [row[p] for p in visible], [positions[p] for p in visible], target))
    return seen


@pytest.mark.parametrize("layout", FLAT)
@given(rows=rankings)
def test_each_target_of_a_flat_row_sees_its_prompt_and_what_came_before(layout, rows):
    batch = DataCollatorForPreference(pad_token_id=0, layout=layout)(rows)
    expected = []
    for i, row in enumerate(rows):
        for rank, completion in enumerate(completions(row)):
            for t, target in enumerate(completion):
                context = row["prompt_input_ids"] + completion[:t]
                expected.append((i + rank * len(rows), context, list(range(len(context))), target))
    assert what_each_target_sees(batch) == sorted(expected, key=lambda seen: (seen[0], len(seen[1])))
    read = [(len(row["prompt_input_ids"]), list(map(len, completions(row)))) for row in rows]
    every = sum(prompt * len(own) + sum(own) for prompt, own in read)
    unique = sum(prompt + sum(own) for prompt, own in read)
    assert batch["inputs"]["input_ids"].numel() == (unique if layout == "prefix_shared" else every)
    assert int(batch["unique_tokens"].sum()) == unique and int(batch["tokens"].sum()) == every


# ------------------------------------------------------------------------------------------------- log-probabilities


def mistral() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.3}
    return MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()


def gemma2() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.3}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **caps)).eval()


def logps_and_gradients(model, batch: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    result = concatenated_forward(model, batch, **options)
    return with_gradients(model, torch.cat([result["chosen_logps"], result["rejected_logps"].flatten()]))


def with_gradients(model, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    gradients = torch.autograd.grad(logps @ weights, [p for p in model.parameters() if p.requires_grad])
    return logps.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def logps_alone(model, rows: list[dict]) -> torch.Tensor:
    """Each sequence by itself, by a plain forward pass."""
    most, values = max(len(completions(row)) for row in rows), []
    for row in rows:
        prompt, own = row["prompt_input_ids"], []
        for completion in completions(row):
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            own.append(logps[range(len(completion)), completion].sum())
        values.append(torch.stack(own + [torch.zeros((), dtype=torch.float64)] * (most - len(own))))
    values = torch.stack(values)
    return torch.cat([values[:, 0], values[:, 1:].flatten()])


@pytest.mark.parametrize("rows", [PAIRS, RANKINGS], ids=["pairs", "rankings"])
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (make_model, torch.float64, 1e-10),
        (mistral, torch.float64, 1e-10),
        (make_model, torch.float32, 1e-4),
        (mistral, torch.float32, 1e-4),
        (gemma2, torch.float32, 1e-4),
    ],
    ids=str,
)
def test_all_layouts_give_the_log_probabilities_of_each_sequence_alone_and_the_same_gradient(
    make, rows, dtype, tolerance
):
    model = make().to(dtype)
    alone, expected = with_gradients(model, logps_alone(model, rows))
    attend_by_segments(model)
    for layout in ("padded", *FLAT):
        batch = DataCollatorForPreference(pad_token_id=0, layout=layout)(rows)
        logps, gradient = logps_and_gradients(model, batch)
        assert logps.dtype == dtype and (logps.double() - alone).abs().max() < tolerance
        # The models themselves take norms in float32, whatever their weights.
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layout", FLAT)
def test_a_row_has_the_same_log_probabilities_alone_to_rounding_and_in_other_company_to_the_bit(layout):
    model, collator = make_model(), DataCollatorForPreference(pad_token_id=0, layout=layout)
    attend_by_segments(model)
    together = concatenated_forward(model, collator(PAIRS))
    for i, row in enumerate(PAIRS):
        alone = concatenated_forward(model, collator([row]))
        for key in ("chosen_logps", "rejected_logps"):
            assert alone[key].item() == pytest.approx(together[key][i].item(), rel=1e-6)
    company = [PAIRS[0], *({**row, "chosen_input_ids": row["chosen_input_ids"][::-1]} for row in PAIRS[1:])]
    assert torch.equal(concatenated_forward(model, collator(company))["chosen_logps"][0], together["chosen_logps"][0])


@pytest.mark.parametrize("layout", FLAT)
def test_tokens_that_are_not_scored_and_all_weights_of_tokens_are_as_in_the_padded_layout(layout):
    rows = [{**row, "scored": [[t % 3 > 0 for t in range(len(own))] for own in completions(row)]} for row in PAIRS[:4]]
    rows[1]["scored"] = []  # all of its are
    model = make_model()
    attend_by_segments(model)
    padded, flat = (
        concatenated_forward(model, DataCollatorForPreference(0, each)(rows), ld_alpha=0.3, use_weighting=True)
        for each in ("padded", layout)
    )
    assert padded.keys() == flat.keys()
    for key, values in padded.items():
        assert torch.allclose(values.float(), flat[key].float(), atol=1e-4), key
    assert not torch.allclose(padded["chosen_logps"], concatenated_forward(model, collated(PAIRS[:4]))["chosen_logps"])


def collated(rows: list[dict], layout: str = "padded") -> dict:
    return DataCollatorForPreference(pad_token_id=0, layout=layout)(rows)


# ----------------------------------------------------------------------------------------------------------- attention


def attention_by_hand(query, key, value, *, scale, window=None, softcap=None, sinks=None) -> np.ndarray:
    """(H, Q, D) of (H, Q, D) queries, the last ones of (H_kv, K, D) keys: one query of one head at a time."""
    (H, Q, _), K, out = query.shape, key.shape[1], np.zeros(query.shape)
    for head in range(H):
        group = head // (H // key.shape[0])
        for q in range(Q):
            own = K - Q + q
            first = 0 if window is None else max(0, own - window + 1)
            scores = key[group, first : own + 1] @ query[head, q] * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores)
            total = weights.sum() + (0 if sinks is None else math.exp(sinks[head]))
            out[head, q] = weights @ value[group, first : own + 1] / total
    return out


@settings(max_examples=60)
@given(
    seed=st.integers(0, 100),
    queries=st.integers(1, 6),
    before=st.integers(0, 5),
    group=st.sampled_from([1, 2]),
    window=st.sampled_from([None, 1, 3, 50]),
    softcap=st.sampled_from([None, 1.5]),
    has_sinks=st.booleans(),
)
def test_attention_of_a_segment_is_that_of_each_query_by_hand(seed, queries, before, group, window, softcap, has_sinks):
    torch.manual_seed(seed)
    H, D, options = 4, 8, {"scale": 0.4, "window": window, "softcap": softcap}
    query = torch.randn(1, H, queries, D, dtype=torch.float64)
    key, value = torch.randn(2, 1, H // group, before + queries, D, dtype=torch.float64)
    sinks = torch.randn(H, dtype=torch.float64) if has_sinks else None
    result = attend_segment(query, key, value, **options, sinks=sinks)
    arrays = [each[0].numpy() for each in (query, key, value)]
    expected = attention_by_hand(*arrays, **options, sinks=None if sinks is None else sinks.tolist())
    assert np.abs(result[0].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("layout", FLAT)
def test_the_varlen_kernel_is_given_the_keys_that_each_segment_sees(layout, window, monkeypatch):
    """On a GPU; here a loop stands in for the kernel, by its documentation: causal, aligned at the end."""

    def varlen_attn(query, key, value, cu_q, cu_k, most_q, most_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and enable_gqa
        assert window_size[1] == 0 and most_q == max(cu_q.diff()) and most_k == max(cu_k.diff())
        parts = []
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
            arrays = [each.transpose(0, 1).numpy() for each in (query[q0:q1], key[k0:k1], value[k0:k1])]
            seen = None if window_size[0] < 0 else window_size[0] + 1
            parts.append(attention_by_hand(*arrays, scale=scale, window=seen).transpose(1, 0, 2))
        return torch.from_numpy(np.concatenate(parts))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    mask = collated(RANKINGS, layout)["inputs"]["attention_mask"]
    segments = tuple(map(tuple, mask[0, 0].tolist()))
    U = sum(length for length, _, _ in segments)
    torch.manual_seed(0)
    query = torch.randn(1, 4, U, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, U, 8, dtype=torch.float64)
    looped, _ = attention.attend(None, query, key, value, mask, otherwise="sdpa", scaling=0.4, sliding_window=window)
    assert (attend_varlen(query, key, value, segments, scale=0.4, window=window) - looped).abs().max() < 1e-12


def test_other_batches_reach_the_attention_that_a_model_had_and_may_have_it_back():
    model = make_model()
    before = {"padded": concatenated_forward(model, collated(PAIRS)), "kind": model.config._attn_implementation}
    prompt = {"input_ids": torch.tensor([[5, 6, 7], [5, 8, 9]]), "max_new_tokens": 5, "do_sample": False}
    said = model.generate(**prompt, pad_token_id=0)
    attend_by_segments(model)
    attend_by_segments(model)  # once more changes nothing
    assert torch.equal(concatenated_forward(model, collated(PAIRS))["chosen_logps"], before["padded"]["chosen_logps"])
    assert torch.equal(model.generate(**prompt, pad_token_id=0), said)
    attend_as_before(model)
    assert model.config._attn_implementation == before["kind"]
    with pytest.raises(ValueError, match="it is no model of transformers"):
        attend_by_segments(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize(
    ("make", "layout"), [(make_model, "padded"), (make_model, "prefix_shared"), (gemma2, "prefix_shared")]
)
def test_the_head_in_chunks_gives_the_same_numbers_and_gradients(make, layout, monkeypatch):
    model, batch, sizes = make().double(), collated(PAIRS, layout), []
    attend_by_segments(model)
    whole, parts = (concatenated_forward(model, batch, use_weighting=True, logits_budget=x) for x in (None, BUDGET))
    assert whole.keys() == parts.keys()
    assert all((values - parts[key]).abs().max() < 1e-10 for key, values in whole.items())
    original = logprobs.token_logps
    monkeypatch.setattr(
        logprobs, "token_logps", lambda logits, own: (sizes.append(len(logits)), original(logits, own))[1]
    )
    expected, (_, gradient) = logps_and_gradients(model, batch), logps_and_gradients(model, batch, logits_budget=BUDGET)
    assert (gradient - expected[1]).abs().max() < 1e-7 * expected[1].abs().max()
    assert sizes[0] == len(batch["targets"]) and max(sizes[1:]) == 7 and sum(sizes[1:]) == sizes[0]


def test_logits_beyond_the_budget_are_worked_out_in_chunks_by_policy_and_reference(tmp_path, unlooked):
    model, widths = make_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[-1]))
    start(tmp_path / "whole", model, make_rows(8), max_steps=1)
    start(tmp_path / "parts", model, make_rows(8), max_steps=1, logits_budget=BUDGET)
    assert widths == [400, 400, 1, 1]


SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "eos_token_id": 2}
SCALED = {  # families that do something to their logits
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SIZES, lm_head_multiplier=0.4, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16)
    ),
    "gemma2": gemma2,
}


@pytest.mark.parametrize("family", SCALED)
def test_chunks_do_to_their_logits_what_the_family_does(family):
    torch.manual_seed(0)
    model = SCALED[family]().eval()
    whole, parts = (concatenated_forward(model, collated(PAIRS), logits_budget=x) for x in (None, BUDGET))
    assert torch.allclose(whole["chosen_logps"], parts["chosen_logps"], atol=1e-4)


def test_chunks_compute_in_the_precision_of_autocast():
    model, batch = make_model(), collated(PAIRS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, parts = (concatenated_forward(model, batch, logits_budget=x) for x in (None, BUDGET))
    exact = concatenated_forward(model, batch)
    assert torch.allclose(whole["chosen_logps"], parts["chosen_logps"], atol=1e-4)
    assert not torch.allclose(whole["chosen_logps"], exact["chosen_logps"], atol=1e-2)


def test_a_head_that_chunks_would_make_another_is_refused_by_name_and_else_left_whole(tmp_path):
    class Odd(type(make_model())):
        """Does to its logits what no configuration tells of."""

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.5
            return output

    model = Odd(make_model().config)
    run = start(tmp_path / "whole", model, make_rows(8), max_steps=1)
    assert run.args.logits_budget is None and run.reference.logits_budget is None
    assert start(tmp_path / "plain", rows=make_rows(8), max_steps=1).args.logits_budget == 4.0
    with pytest.raises(ValueError, match="logits_budget: the head of Odd does not work in chunks: leave it out"):
        start(tmp_path / "named", model, make_rows(8), max_steps=1, logits_budget=BUDGET)


def test_chunks_add_up_the_heads_gradient_in_float32():
    """In bfloat16 weights whose gradient is made of many chunks, each lost in the rounding of the sum before it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 16).bfloat16(), (0.1 * torch.randn(40, 16)).bfloat16()
    targets, grad = torch.randint(40, (512,)), torch.ones(512)

    def gradient(chunk: int, dtype: torch.dtype) -> torch.Tensor:
        own = weight.to(dtype).requires_grad_()
        logps, _ = logprobs.ChunkedLogps.apply(hidden.to(dtype), own, None, targets, chunk, False, dtype, 1.0, None)
        return torch.autograd.grad(logps, own, grad.to(logps.dtype))[0].double()

    exact = gradient(512, torch.float64)
    error = (gradient(1, torch.bfloat16) - exact).abs().max() / exact.abs().max()
    assert error < 2 * (gradient(512, torch.bfloat16) - exact).abs().max() / exact.abs().max()


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gradient_of_chunks_is_that_of_finite_differences(scale, cap, has_bias):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3), (7, 3), (7,))
    )
    targets = torch.tensor([0, 6, 3, 3, 1])

    def logps(hidden, weight, bias):
        own = bias if has_bias else None
        return logprobs.ChunkedLogps.apply(hidden, weight, own, targets, 2, False, torch.float64, scale, cap)[0]

    torch.autograd.gradcheck(logps, (hidden, weight, bias) if has_bias else (hidden, weight, bias.detach()))


def test_a_head_that_is_more_than_a_linear_layer_stays_whole():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    whole, parts = (concatenated_forward(model, collated(PAIRS), logits_budget=x) for x in (None, BUDGET))
    assert torch.equal(whole["chosen_logps"], parts["chosen_logps"])


# ---------------------------------------------------------------------------------------------------------------- runs

RUNS = {
    "full": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "checkpointed": {"gradient_checkpointing": True},
    "adapter": {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]},
    "cached": {"precompute_ref_log_probs": True},
    "ranked": {"loss_type": "plackett_luce"},
    "moving": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "in chunks": {"logits_budget": BUDGET},
    "by tokens": {"max_tokens_per_micro_batch": 60},
}
COMPARED = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected", "eval_loss")


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_the_same_in_all_layouts(kind, tmp_path):
    """Also in chunks of the head and in micro-batches of tokens: as one that does without."""
    rows = make_rankings(16) if kind == "ranked" else make_rows(16)
    plain = {} if kind in ("in chunks", "by tokens", "accumulated", "checkpointed", "cached") else RUNS[kind]
    common = {
        "rows": rows,
        "eval_rows": make_rows(6) if kind == "evaluated" else None,
        "per_device_train_batch_size": 8,
    }
    told = []
    for layout in (None, "padded", *FLAT):
        options = {**common, **(plain if layout is None else RUNS[kind]), "layout": layout or "padded"}
        cache = {"ref_cache_dir": str(tmp_path / f"cache-{layout}")} if "precompute_ref_log_probs" in options else {}
        run = start(tmp_path / str(layout), **options, **cache)
        told.append([row[key] for row in run.rows for key in COMPARED if key in row])
        assert len(told[-1]) >= 10
    for values in told[1:]:
        assert values == pytest.approx(told[0], rel=1e-4, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- token budgets


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=60),
    world_size=st.integers(1, 3),
    most=st.integers(1, 300),
    padded=st.booleans(),
)
def test_micro_batches_have_as_many_tokens_as_they_may_and_no_more(lengths, world_size, most, padded):
    def tokens_of(rows: list[int]) -> int:
        own = [lengths[row] for row in rows]
        return max(own, default=0) * len(own) if padded else sum(own)

    size = {"batch_size": 4, "accumulation": 3, "world_size": world_size}
    whole = epoch_windows(lengths, **size)
    cut = epoch_windows(lengths, **size, most_tokens=most, tokens_of=tokens_of)
    assert [sorted(row for micro in window for rank in micro for row in rank) for window in cut] == [
        sorted(row for micro in window for rank in micro for row in rank) for window in whole
    ]
    for window in cut:
        for rank in range(world_size):  # the longest first: neighbours are of like length
            own = [lengths[row] for micro in window for row in micro[rank]]
            assert own == sorted(own, reverse=True)
        for number, micro in enumerate(window):
            assert len(micro) == world_size and micro[0]
            assert all(len(rows) <= 1 or tokens_of(rows) <= most for rows in micro)
            if number + 1 < len(window):  # one row more for each would have been too many
                assert any(
                    tokens_of(rows + more[:1]) > most for rows, more in zip(micro, window[number + 1], strict=True)
                )


@pytest.mark.parametrize("layout", ["padded", *FLAT])
def test_a_budget_counts_the_tokens_that_the_model_reads(layout, tmp_path, unlooked):
    model, shapes, rows = make_model(), [], make_rankings(24)
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(inputs["input_ids"].numel()), with_kwargs=True)
    options = {"layout": layout, "max_tokens_per_micro_batch": 150, "per_device_train_batch_size": 24}
    run = start(tmp_path, model, rows, loss_type="plackett_luce", max_steps=1, reference_free=True, **options)
    assert max(shapes) <= 150 and len(shapes) > 1
    counts = part_lengths(run.train_rows)
    assert counts == [(len(row["prompt_input_ids"]), [len(own) for own in completions(row)]) for row in run.train_rows]
    if layout == "prefix_shared":
        assert sum(shapes) == sum(prompt + sum(own) for prompt, own in counts)


def test_a_budget_counts_both_halves_of_an_encoder_decoder(tmp_path, unlooked):
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    model, read = T5ForConditionalGeneration(T5Config(**sizes, **ends)), []

    def note(_, __, inputs):
        read.append(inputs["input_ids"].numel() + inputs["decoder_input_ids"].numel())

    model.register_forward_pre_hook(note, with_kwargs=True)
    budget = {"max_tokens_per_micro_batch": 120, "per_device_train_batch_size": 16}
    start(tmp_path, model, make_rows(16), max_steps=1, loss_type="simpo", **budget)
    assert len(read) > 1 and max(read) <= 120


def test_a_model_is_trained_in_the_layout_that_its_copy_is_asked_in(tmp_path):
    """The reference is a copy, made before the layout is chosen: it must read flat rows, too."""
    model = make_model()
    run = start(tmp_path, model, make_rows(8), max_steps=1)
    assert run.layout.startswith("prefix_shared (as padded to ")
    assert run.rows[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert run.rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    other = copy.deepcopy(run.model)
    assert torch.equal(
        concatenated_forward(other, collated(PAIRS, "prefix_shared"))["chosen_logps"],
        concatenated_forward(run.model, collated(PAIRS, "prefix_shared"))["chosen_logps"],
    )


def test_a_try_leaves_each_module_in_its_own_mode():
    """Of a quantised reference some layers train, so that they take the policy's kernels, and the others do not."""
    model = make_model().eval()
    model.model.layers[0].mlp.train()
    modes = [module.training for module in model.modules()]
    how = {"company": [], "trains": True, "is_quiet": True}
    attend_by_segments(model)
    assert layout_error(model, PAIRS, DataCollatorForPreference(0, "padded"), "prefix_shared", **how) < 1e-4
    assert head_error(model, collated(PAIRS)) < 1e-4
    assert generation_error(model, PAIRS[:1], DataCollatorForPreference(0, "padded")) < 1e-3
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2


@pytest.mark.parametrize(("environment", "calls"), [({}, 2), ({"MALLOC_ARENA_MAX": "2"}, 0)])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(environment, calls, monkeypatch):
    asked = []
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: asked.append(option)))
    monkeypatch.setattr("os.environ", environment)
    keep_freed_memory()
    assert len(asked) == calls


def test_a_layout_that_is_not_exact_is_refused_by_name_and_passed_over_by_auto(tmp_path, monkeypatch):
    errors = {"prefix_shared": 0.25, "padding_free": 2e-6}
    monkeypatch.setattr("dpo.checks.layout_error", lambda model, rows, collator, layout, **_: errors[layout])
    run = start(tmp_path / "auto", rows=make_rows(8), max_steps=1)
    why = "padding_free (as padded to 2e-06 nats a token; prefix_shared differs from padded by 0.25 nats a token)"
    assert run.layout == why and run.collator.layout == "padding_free"
    with pytest.raises(ValueError, match="prefix_shared differs from padded by 0.25 nats a token: leave out layout"):
        start(tmp_path / "named", rows=make_rows(8), max_steps=1, layout="prefix_shared")
    errors["padding_free"] = math.inf
    run = start(tmp_path / "neither", rows=make_rows(8), max_steps=1)
    assert run.collator.layout == "padded" and run.layout.startswith("padded (prefix_shared differs")
    assert not run.model.config._attn_implementation.startswith("segments")
