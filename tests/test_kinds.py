"""Every kind of reference: they train alike where theory says so, go on exactly, and what makes no sense is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_model, make_rankings, make_rows, make_tokenizer, read, run, same, start, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo import reference
from dpo.collate import DataCollatorForPreference
from dpo.config import UserError
from dpo.merge import main as merge
from dpo.models import load_model

COLLATOR = DataCollatorForPreference(pad_token_id=0)
ROWS, EVAL_ROWS = make_rows(24), make_rows(7, seed=1)
STEPS = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "shuffle": False}
NAMED = {"model_adapter_name": "train", "ref_adapter_name": "reference"}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A base model, and adapters that were trained on it before DPO: two that are equal but for dropout, and one with a
    head of its own."""
    folder = tmp_path_factory.mktemp("sft")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    adapters = {"adapter": {}, "noisy": {"lora_dropout": 0.5}, "with-head": {"modules_to_save": ["lm_head"]}}
    for name, options in adapters.items():
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
        model = get_peft_model(load_model(str(folder / "base")), lora)
        with torch.no_grad():
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        model.save_pretrained(folder / name)
    return folder


def two_names(path, base):
    """The code of the document's option 3."""
    model = PeftModel.from_pretrained(load_model(str(base)), path, is_trainable=True, adapter_name="policy")
    model.load_adapter(path, adapter_name="reference")
    return model


def kinds(sft, name: str, cache) -> dict:
    """{a kind of reference: how a run gets it}, of one adapter that was trained before."""
    path = str(sft / name)
    return {
        "frozen adapter": {"model": path},
        "two names": {"model": path, **NAMED},
        "two names in Python": {"model": two_names(path, sft / "base"), **NAMED, "model_adapter_name": "policy"},
        "two instances": {"model": path, "ref_model_name_or_path": path, "force_use_ref_model": True},
        "two instances in Python": {"model": path, "ref_model": load_model(path), "force_use_ref_model": True},
        "cached": {"model": path, "precompute_ref_log_probs": True, "ref_cache_dir": str(cache)},
    }


def told(run_) -> list[tuple[float, ...]]:
    keys = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen")
    return [tuple(row[key] for key in keys) for row in run_.rows]


@pytest.mark.parametrize("name", ["adapter", pytest.param("with-head", marks=pytest.mark.slow)])
def test_all_references_of_a_trained_adapter_are_its_start(name, sft, tmp_path):
    runs = {
        kind: start(tmp_path / kind, rows=ROWS, **STEPS, **options)
        for kind, options in kinds(sft, name, tmp_path / "cache").items()
    }
    expected = told(runs["two instances"])  # another model altogether, from the same files
    assert len(expected) == 12 and expected[0][0] == pytest.approx(0.6931472, abs=1e-6) and expected[0][2:4] == (0, 0)
    assert abs(expected[-1][2]) > 1e-3
    for kind, run_ in runs.items():
        assert told(run_) == expected, kind
    copies = {kind: run_.reference.bytes() for kind, run_ in runs.items()}
    own = sum(p.nbytes for p in runs["cached"].model.parameters() if p.requires_grad)
    assert copies["frozen adapter"] == copies["two names"] == own and copies["cached"] == 0
    assert copies["two instances"] == sum(p.nbytes for p in load_model(str(sft / name)).parameters())
    for kind in ("frozen adapter", "two names", "two names in Python"):  # and what is left is one ordinary adapter
        left = load_model(str(tmp_path / kind))
        assert list(left.peft_config) == ["default"]
        trained = {key: value for key, value in weights(runs["cached"].model).items() if "default" in key}
        assert trained and all(torch.equal(weights(left)[key], value) for key, value in trained.items())


def test_a_fresh_adapter_switched_off_is_its_base(sft, tmp_path):
    base, lora = str(sft / "base"), {"use_peft": True, "lora_r": 4, "lora_modules_to_save": ["lm_head"]}
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    two = {"ref_model_name_or_path": base, "force_use_ref_model": True}
    runs = [start(tmp_path / str(i), base, ROWS, **STEPS, **lora, **more) for i, more in enumerate(({}, two, cached))]
    expected = [pytest.approx(row, rel=1e-5, abs=1e-6) for row in told(runs[1])]
    assert told(runs[0]) == expected and told(runs[2]) == expected and runs[0].reference.bytes() == 0
    assert runs[0].rows[0]["rewards/chosen"] == 0 != runs[0].rows[-1]["rewards/chosen"]


@pytest.mark.slow
def test_cached_equals_online_in_all_models_and_the_policy_is_never_copied(tmp_path, monkeypatch):
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    for loss, rows in (("sigmoid", ROWS), (["plackett_luce"], make_rankings(24)), ("ipo", ROWS)):
        options = {"rows": rows, "loss_type": loss, "eval_strategy": "epoch", "eval_rows": rows[:7], **STEPS}
        online = start(tmp_path / f"a{loss}", **options)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "__deepcopy__", lambda *_: pytest.fail("a model was copied"), raising=False)
            offline = start(tmp_path / f"b{loss}", **options, **cached)
        assert offline.reference.ref_model is None
        for a, b in zip(online.rows, offline.rows, strict=True):
            rest = {key: value for key, value in a.items() if "tokens_per" not in key}
            assert {key: b[key] for key in rest} == pytest.approx(rest, rel=1e-6, abs=2e-6)
    whole = {"rows": ROWS[:8], "per_device_train_batch_size": 8, "shuffle": False, "num_train_epochs": 4}
    cached["ref_cache_dir"] = str(tmp_path / "another")
    a, b = start(tmp_path / "a", **whole), start(tmp_path / "b", **whole, **cached)
    assert told(a) == told(b) and same(weights(a.model), weights(b.model))  # at the same shape: to the bit


# ------------------------------------------------------------------------------------------------------- the cache


class Counted:
    """The rows that `precompute_ref_log_probs` works out, run by run."""

    def __init__(self, monkeypatch):
        self.rows, original = [], reference.precompute_ref_log_probs

        def count(*arguments):
            self.rows.append(len(done := original(*arguments)))
            return done

        monkeypatch.setattr("dpo.build.precompute_ref_log_probs", count)

    def of(self, output_dir, **options) -> int:
        self.rows.clear()
        start(output_dir, **{"rows": ROWS, "max_steps": 1, "precompute_ref_log_probs": True, **options})
        return sum(self.rows)


@pytest.mark.slow
def test_a_cache_serves_every_run_with_the_same_reference_and_no_other(sft, tmp_path, monkeypatch):
    count, base, cache = Counted(monkeypatch), str(sft / "base"), {"ref_cache_dir": str(tmp_path / "cache")}
    names = iter(range(100))

    def worked_out(model=base, **options) -> int:
        model = model() if callable(model) else model
        return count.of(tmp_path / str(next(names)), model=model, **{**cache, **options})

    assert worked_out() == 24
    assert {path.parent.parent for path in tmp_path.rglob("*.parquet")} == {tmp_path / "cache"}
    monkeypatch.setattr("dpo.prepare.HF_HOME", str(tmp_path / "home"))
    assert worked_out(ref_cache_dir=None, precompute_ref_batch_size=5) == 24  # by default it is the Hub's own cache
    assert len(list((tmp_path / "home" / "dpo").iterdir())) == 1
    for free in (
        {"learning_rate": 1e-2, "beta": 0.5, "seed": 3, "max_steps": 2},
        {"loss_type": "ipo", "precompute_ref_batch_size": 7},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"rows": ROWS[::-2]},  # matched by row, not by order
        {"rows": [*ROWS[:5], *ROWS[:5]]},
        {"use_peft": True, "lora_r": 2},  # the model without its adapter is the same model
        {"use_peft": True, "lora_r": 8, "lora_modules_to_save": ["lm_head"]},
        {"model": lambda: load_model(base)},  # nor does its name matter
        {"ref_model_name_or_path": base, "model": make_model},
    ):
        assert worked_out(**free) == 0, free
    assert worked_out(rows=[*ROWS, *EVAL_ROWS]) == len(
        {json.dumps(row) for row in EVAL_ROWS} - set(map(json.dumps, ROWS))
    )
    for stale in (
        {"model": make_model},
        {"model_init_kwargs": {"rms_norm_eps": 0.1}},
        {"model": str(sft / "adapter")},
        {"ld_alpha": 0.5},
        {"bf16": True},
        {"dtype": "bfloat16"},
        {"rows": ROWS, "max_completion_length": 2},
        {"rows": [{**row, "rejected": row["rejected"] + " sea"} for row in ROWS]},
    ):
        assert worked_out(**stale) == 24, stale
        assert worked_out(**stale) == 0, stale


def test_damaged_parts_are_worked_out_again_and_half_of_a_killed_run_is_not(tmp_path, monkeypatch, caplog):
    count, cache = Counted(monkeypatch), {"ref_cache_dir": str(tmp_path / "cache")}
    expected = told(start(tmp_path / "online", rows=ROWS, max_steps=1))
    forward, calls = reference.compute_ref_log_probs, []

    def fail_at_the_third(batch, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(batch, **options)

    monkeypatch.setattr(reference.precompute_ref_log_probs, "__kwdefaults__", {"seconds": -1.0})  # after each batch
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "compute_ref_log_probs", fail_at_the_third)
        count.of(tmp_path / "killed", **cache)
    assert count.of(tmp_path / "again", **cache) == 24 - 2 * 8
    parts = sorted((tmp_path / "cache").rglob("*.parquet"))
    assert len(parts) == 3 and not list((tmp_path / "cache").rglob("*.unfinished"))
    content = bytearray(parts[0].read_bytes())
    content[40] ^= 1
    parts[0].write_bytes(content)
    parts[1].write_bytes(parts[1].read_bytes()[:50])
    assert count.of(tmp_path / "mended", **cache) == 16
    assert caplog.text.count("is damaged") == 2
    cached = start(tmp_path / "last", rows=ROWS, max_steps=1, precompute_ref_log_probs=True, **cache)
    assert told(cached) == [pytest.approx(row, abs=1e-6) for row in expected]


def test_two_runs_may_add_to_one_cache(tmp_path):
    values = [{bytes([number, other]): [float(number), 0.5] for other in range(3)} for number in range(4)]
    for number in (0, 2, 1, 3):
        reference.add_to_cache(tmp_path, values[number])
    keys = [key for each in values for key in each]
    assert reference.read_cache(tmp_path, keys) == {key: value for each in values for key, value in each.items()}
    assert reference.read_cache(tmp_path, keys[:1]) == {keys[0]: [0.0, 0.5]} and not reference.read_cache(
        tmp_path / "no", keys
    )


def test_columns_of_the_dataset_are_the_reference(tmp_path):
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    rows = [{**row, columns[0]: -1.0 * i, columns[1]: "-2.5"} for i, row in enumerate(ROWS)]
    run_ = start(tmp_path / "a", rows=rows, per_device_train_batch_size=24, max_steps=1, beta=0.5)
    row, pairs = run_.rows[0], range(len(rows))
    assert row["rewards/chosen"] == pytest.approx(0.5 * (row["logps/chosen"] + sum(pairs) / len(rows)), abs=1e-5)
    assert row["rewards/rejected"] == pytest.approx(0.5 * (row["logps/rejected"] + 2.5), abs=1e-5)
    assert run_.reference.ref_model is None and run_.reference.bytes() == 0
    only_one = [{key: value for key, value in row.items() if key != columns[1]} for row in rows]
    assert start(tmp_path / "b", rows=only_one, max_steps=1).rows[0]["rewards/chosen"] == 0
    for options, words in (
        ({"precompute_ref_log_probs": True}, "leave out precompute_ref_log_probs, or the columns"),
        ({"ref_model": make_model(1)}, "leave out ref_model, or the columns"),
        ({"ld_alpha": 0.5}, "leave out ld_alpha, or the columns"),
        ({"loss_type": "plackett_luce"}, "is of pairs, the loss ranks more"),
        ({"rows": [*rows[:3], ROWS[0]]}, "row 4: column 'ref_chosen_logps' is None: it must be a number"),
        ({"eval_strategy": "epoch", "eval_rows": ROWS}, "one has ref_chosen_logps: give them to both, or none"),
    ):
        with pytest.raises(UserError, match=words):
            start(tmp_path / "c", **{"rows": rows, **options})


# ------------------------------------------------------------------------------------------------ going on, and wrong


RESUMED = ["frozen adapter", "two names", "two instances", "cached", "synced", "synced names", "dora", "pissa", "qlora"]


QUANTISED = "__bnb_optimizer_quant_state__"  # where bitsandbytes puts what it saves of a tensor


def whole_and_resumed(folder, **options):
    """A run, and the same stopped after its 8th step and gone on with from the 5th; they are equal to the bit."""
    options = {**STEPS, "rows": ROWS, "save_strategy": "steps", "save_steps": 5, **options}
    whole = start(folder / "whole", **options)

    def stop(row):
        if row["step"] == 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        start(folder / "cut", callbacks=[stop], **options)
    resumed = start(folder / "cut", resume_from_checkpoint="true", **options)
    assert told(resumed) == told(whole) and len(told(whole)) == 12
    assert same(weights(whole.model), weights(resumed.model))
    return whole, resumed


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_of_each_kind_goes_on_as_if_it_had_never_stopped(kind, sft, tmp_path):
    base, fresh = str(sft / "base"), {"use_peft": True, "lora_r": 4}
    ways = kinds(sft, "with-head", tmp_path / "cache") | {
        "synced": {"model": str(sft / "adapter"), "sync_ref_model": True, "ref_model_sync_steps": 2},
        "synced names": {"model": str(sft / "adapter"), **NAMED, "sync_ref_model": True, "ref_model_sync_steps": 2},
        "dora": {"model": base, **fresh, "use_dora": True},
        "pissa": {"model": base, **fresh, "init_lora_weights": "pissa"},
        "qlora": {"model": base, **fresh, "load_in_4bit": True, "use_bnb_nested_quant": True},
    }
    whole, _ = whole_and_resumed(tmp_path, **ways[kind])
    assert whole.rows[0]["rewards/chosen"] == 0


def test_an_optimizer_of_8_bits_goes_on_as_if_it_had_never_stopped(sft, tmp_path):
    """bitsandbytes does so with tensors of 4096 numbers or more: here with the matrices, those of k and v left out."""
    _, resumed = whole_and_resumed(tmp_path, model=str(sft / "base"), optim="adamw_8bit")
    saved = torch.load(tmp_path / "cut" / "checkpoint-5" / "state.pt", weights_only=True)["optimizer"]["state"]
    for states in (resumed.optimizer.state, {key: state[QUANTISED] for key, state in saved.items()}):
        moments = [state[name] for state in states.values() for name in ("state1", "state2")]
        assert len(moments) == 2 * len(list(resumed.model.parameters()))
        kinds_of = {size: {m.dtype for m in moments if (m.numel() >= 4096) == size} for size in (True, False)}
        assert kinds_of == {True: {torch.uint8}, False: {torch.float32}}


WRONG = {
    "unknown adapter": ({"ref_adapter_name": "ref", "model_adapter_name": "sft"}, "two names",
                        "model_adapter_name 'sft' is no adapter of the model: it has policy, reference"),
    "unknown reference": ({"ref_adapter_name": "ref"}, "two names", "ref_adapter_name 'ref' is no adapter of the mod"),
    "one name": ({"ref_adapter_name": "policy"}, "two names", "ref_adapter_name 'policy' is the adapter that trains"),
    "no adapter": ({"ref_adapter_name": "ref"}, "base", "ref_adapter_name needs an adapter, and .* is none"),
    "no adapter to merge": ({"merge_adapter": True}, "base", "merge_adapter needs an adapter"),
    "bits alone": ({"load_in_4bit": True}, "base", "load_in_4bit needs an adapter"),
    "both bits": ({"load_in_4bit": True, "load_in_8bit": True}, "base", "exclude each other"),
    "sync of another": ({"sync_ref_model": True, "ref_model": make_model(1)}, "base", "leave out ref_model"),
    "pissa in 4 bits": ({"load_in_4bit": True, "use_peft": True, "init_lora_weights": "pissa"}, "base",
                        "the adapter cannot be added"),
    "pissa by chance": ({"use_peft": True, "init_lora_weights": "pissa_niter_4"}, "base", "draws random numbers"),
    "sync": ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "base", "leave out precompute_ref_log_probs"),
    "free": ({"reference_free": True, "precompute_ref_log_probs": True}, "base", "leave out precompute_ref_log_probs"),
    "loss": ({"loss_type": "simpo", "precompute_ref_log_probs": True}, "base", "simpo has no reference"),
    "two": ({"ref_adapter_name": "a", "ref_model_name_or_path": "b"}, "base", "are two references: keep one"),
    "not forced": ({"ref_model_name_or_path": "b"}, "two names", "leave out ref_model, or add force_use_ref_model"),
    "forced": ({"force_use_ref_model": True}, "two names", "force_use_ref_model is for a model with an adapter that"),
    "forced alone": ({"force_use_ref_model": True, "ref_model": "b"}, "base", "force_use_ref_model is for a model"),
    "dora in 8 bits": ({"load_in_8bit": True, "use_peft": True, "use_dora": True}, "base", "load_in_4bit wil"),
    "start": ({"use_peft": True, "init_lora_weights": "pizza"}, "base", "init_lora_weights"),
    "optim": ({"optim": "adamw_hf"}, "base", "optim is 'adamw_hf': choose one of .*adamw_torch_fused"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_combinations_get_one_clear_line(name, sft, tmp_path):
    options, model, words = WRONG[name]
    model = two_names(str(sft / "adapter"), sft / "base") if model == "two names" else str(sft / "base")
    with pytest.raises(UserError, match=words) as refused:
        start(tmp_path / "out", model=model, **options)
    assert "\n" not in str(refused.value)


def test_quantisation_without_its_package_is_refused(sft, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="need bitsandbytes: pip install bitsandbytes"):
        start(tmp_path, str(sft / "base"), use_peft=True, load_in_4bit=True)


# ------------------------------------------------------------------------------------------ adapters, and what is left


ADAPTERS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "all-linear": {"lora_target_modules": "all-linear", "lora_modules_to_save": ["lm_head"]},
    "4 bits": {"load_in_4bit": True, "lora_target_modules": "all-linear"},
    "4 bits, dora": {"load_in_4bit": True, "use_bnb_nested_quant": True, "use_dora": True},
    "4 bits, 8-bit adam": {"load_in_4bit": True, "optim": "adamw_bnb_8bit", "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25).view(2, 10)).logits


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS if name not in ("dora", "pissa", "4 bits")]


@pytest.mark.parametrize("name", ["dora", "pissa", "4 bits", *SLOW])
def test_adapters_start_as_the_reference_and_are_left_as_they_were_trained(name, sft, tmp_path):
    options = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2, "merge_adapter": True, **ADAPTERS[name]}
    run_ = start(tmp_path / "run", str(sft / "base"), ROWS, per_device_train_batch_size=4, **options)
    first, last = run_.rows[0], run_.rows[-1]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(first["rewards/chosen"]) < 1e-6 < abs(last["rewards/margins"])
    how = {"quantization_config": run_.model.config.quantization_config} if "bits" in name else {}
    again, merged = load_model(str(tmp_path / "run"), **how), load_model(str(tmp_path / "run" / "merged"))
    assert isinstance(again, PeftModel) and not isinstance(merged, PeftModel)
    assert torch.allclose(logits(again), logits(run_.model), atol=1e-5)
    assert not hasattr(merged.config, "quantization_config")
    if name != "8 bits":  # whose products are rounded, too
        assert torch.allclose(logits(merged), logits(run_.model), atol=1e-4)
    base = load_model(str(sft / "base"), **how)
    assert (logits(base) - logits(run_.model)).abs().max() > 1e-3


def test_an_adapter_of_tied_and_resized_embeddings_loads_again(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer, model = make_tokenizer(), make_model(tie_word_embeddings=True)
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    run_ = start(tmp_path / "run", str(tmp_path / "base"), ROWS, use_peft=True, lora_modules_to_save=["embed_tokens"])
    assert run_.rows[0]["rewards/chosen"] == 0 != run_.rows[-1]["rewards/chosen"]
    assert torch.allclose(logits(load_model(str(tmp_path / "run"))), logits(run_.model), atol=1e-6)


def test_an_adapter_is_merged_by_one_command(sft, tmp_path, capsys):
    """Option 2 of the document: merge, then a new adapter, whose reference is the merged model."""
    merge([str(sft / "adapter"), str(tmp_path / "merged")])
    merged, adapter = load_model(str(tmp_path / "merged")), load_model(str(sft / "adapter"))
    assert torch.allclose(logits(merged), logits(adapter), atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # by transformers alone
    assert torch.equal(logits(plain), logits(merged))
    run_ = start(tmp_path / "run", str(tmp_path / "merged"), ROWS, use_peft=True, max_steps=1)
    assert run_.rows[0]["rewards/chosen"] == 0
    merge([str(sft / "adapter"), str(tmp_path / "rounded"), "--load_in_4bit", "--use_bnb_nested_quant"])
    assert not torch.allclose(logits(load_model(str(tmp_path / "rounded"))), logits(merged), atol=1e-4)
    for arguments, words in (
        ([str(sft / "base"), str(tmp_path / "x")], "holds no adapter to merge"),
        ([str(sft / "adapter"), str(tmp_path / "merged")], "is there already: name another directory"),
    ):
        with pytest.raises(SystemExit, match=words):
            merge(arguments)


def test_the_summary_names_the_reference_and_what_it_takes(tmp_path, caplog):
    caplog.set_level("INFO")
    start(tmp_path / "a", max_steps=1)
    size = sum(p.nbytes for p in make_model().parameters()) / 2**20
    assert f"reference: a frozen copy of the policy; it takes {size:.1f} MB beside the policy" in caplog.text


@pytest.mark.slow
def test_two_processes_equal_one_with_every_kind(sft, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = "--dataset_name rows.jsonl --num_train_epochs 2 --logging_steps 1 --learning_rate 1e-3 --use_cpu"
    common = f"{common} --save_strategy no".split()
    ways = {
        "frozen": [],
        "named": "--model_adapter_name train --ref_adapter_name reference".split(),
        "cached": ["--precompute_ref_log_probs", "--ref_cache_dir"],
        "synced": "--sync_ref_model --ref_model_sync_steps 2".split(),
    }
    for kind, options in ways.items():
        left = []
        for processes in (0, 2):
            output, size = tmp_path / f"{kind}-{processes}", "4" if processes else "8"
            more = [*options, str(tmp_path / f"cache-{processes}")] if kind == "cached" else options
            more = [*more, "--per_device_train_batch_size", size, "--output_dir", str(output)]
            run(
                "dpo.loop",
                "--model_name_or_path",
                str(sft / "adapter"),
                *common,
                *more,
                processes=processes,
                cwd=tmp_path,
            )
            left.append([(row["loss"], row["grad_norm"], row["rewards/margins"]) for row in read(output)])
        assert [pytest.approx(row, abs=1e-5) for row in left[0]] == left[1], kind
        assert left[0][0][2] == pytest.approx(0, abs=1e-5) and abs(left[0][-1][2]) > 1e-4


def by_two_processes(folder, name: str, rows, eval_rows=(), **options) -> tuple[list[dict], str]:
    """What a run of two processes, by torchrun, leaves in metrics.jsonl, and what it says."""
    for file, own in (("rows.jsonl", rows), ("held-out.jsonl", eval_rows)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in own))
    options |= {"dataset_name": "rows.jsonl", "output_dir": name, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"save_strategy": "no", "use_cpu": True} | ({"eval_dataset_name": "held-out.jsonl"} if eval_rows else {})
    (folder / f"{name}.yaml").write_text(json.dumps(options))  # which is YAML, too
    said = run("dpo.loop", "--config", f"{name}.yaml", processes=2, cwd=folder).stderr
    return lasting(read(folder / name)), said


def lasting(rows: list[dict]) -> list[dict]:
    """Metrics rows without what the clock decides, or, where the rewards are 0, the rounding."""
    left_out = ("tokens_per_second", "unique_tokens_per_second", "rewards/accuracies")
    return [{key: value for key, value in row.items() if key not in left_out} for row in rows]


@pytest.mark.slow
def test_two_processes_find_all_that_two_worked_out(sft, tmp_path):
    options = {"model_name_or_path": str(sft / "adapter"), "num_train_epochs": 2, "per_device_train_batch_size": 4}
    options |= {"precompute_ref_log_probs": True, "ref_cache_dir": "cache"}
    cold, said = by_two_processes(tmp_path, "cold", ROWS, **options)
    assert "log π_ref of 0 rows found, 24 to be worked out" in said
    parts = set((tmp_path / "cache").rglob("*.parquet"))  # what a process works out it adds
    warm, said = by_two_processes(tmp_path, "warm", ROWS, **options)
    assert "log π_ref of 24 rows found, 0 to be worked out" in said
    assert set((tmp_path / "cache").rglob("*.parquet")) == parts
    assert warm == cold and len(cold) == 6 and abs(cold[-1]["rewards/margins"]) > 1e-4


@pytest.mark.slow
def test_two_processes_with_cached_rankings_and_an_evaluation_equal_one(sft, tmp_path, monkeypatch):
    rows, eval_rows = make_rankings(17), make_rankings(9, seed=1)  # of each, one process is without the last
    adapter, half = str(sft / "adapter"), {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    options = {"loss_type": "plackett_luce", "eval_strategy": "epoch", "max_steps": 6}
    cached = {**options, "precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    two, said = by_two_processes(tmp_path, "two", rows, eval_rows, **half, **cached, model_name_or_path=adapter)
    assert "of 0 rows found, 17 to be worked out" in said and "of 0 rows found, 9 to be worked out" in said
    one = {"model": adapter, "rows": rows, "eval_rows": eval_rows}
    start(tmp_path / "online", **one, **options)
    assert Counted(monkeypatch).of(tmp_path / "cached", **one, **cached) == 0  # but finds what two worked out
    assert len(two) == 6 + 2 and "eval_rewards/margins" in two[-1]
    for name in ("online", "cached"):
        assert lasting(read(tmp_path / name)) == [pytest.approx(row, abs=1e-5) for row in two], name


@pytest.mark.slow
def test_an_adapter_s_digest_is_the_same_in_every_process_and_tells_models_apart(sft, tmp_path):
    code = "import sys; from dpo.models import load_model; from dpo.reference import Reference, reference_digest\n"
    code += "model = load_model(sys.argv[1]); print(reference_digest(Reference(model, ref_model=model), read=''))"
    found = []
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(sft / "adapter")]
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1] and len(found[0]) == 33
    with pytest.raises(UserError, match="an adapter cannot be called 'layers', a module of the model is"):
        start(tmp_path, str(sft / "base"), use_peft=True, model_adapter_name="layers")


def test_a_cached_run_does_not_go_on_with_another_reference(sft, tmp_path):
    options = {"rows": ROWS, "precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), **STEPS}
    options |= {"save_strategy": "steps", "save_steps": 5, "model": str(sft / "base")}
    start(tmp_path / "run", **options)
    make_model(3, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="it is of another run, with reference "):
        other = {"ref_model_name_or_path": str(tmp_path / "other")}
        start(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"), **options, **other)


@pytest.mark.parametrize("size", [1, 3])
def test_cached_rankings_of_two_are_pairs(size, tmp_path):
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    options = {"rows": make_rankings(6), "loss_type": "plackett_luce", "per_device_train_batch_size": size}
    online, offline = start(tmp_path / "a", **options), start(tmp_path / "b", **options, **cached)
    assert told(offline) == [pytest.approx(row, abs=1e-5) for row in told(online)]


def test_a_collator_that_loses_the_reference_is_refused_at_once(tmp_path):
    own = lambda rows: {key: value for key, value in COLLATOR(rows).items() if "ref_" not in key}  # noqa: E731
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="the data_collator leaves out the column ref_chosen_logps"):
        start(tmp_path / "a", data_collator=own, **cached)
    start(tmp_path / "b", data_collator=COLLATOR, max_steps=1, **cached)


@pytest.mark.slow
def test_two_runs_at_once_on_one_cold_cache_end_as_one_alone(sft, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, "-m", "dpo.loop", "--model_name_or_path", str(sft / "adapter"), "--dataset_name"]
    command += ["rows.jsonl", "--precompute_ref_log_probs", "--logging_steps", "1", "--max_steps", "4", "--use_cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def launch(output: str, cache: str):
        more = ["--ref_cache_dir", cache, "--output_dir", output]
        return subprocess.Popen([*command, *more], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    both = [launch("a", "shared"), launch("b", "shared")]
    assert [each.wait(timeout=300) for each in both] == [0, 0]
    assert launch("alone", "own").wait(timeout=300) == 0 and launch("warm", "shared").wait(timeout=300) == 0
    left = [[(row["loss"], row["grad_norm"]) for row in read(tmp_path / name)] for name in ("alone", "a", "b", "warm")]
    assert left[1:] == left[:1] * 3 and len(left[0]) == 4
    assert not list((tmp_path / "shared").rglob("*.unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_references_of_quantised_models_are_their_start(bits, sft, tmp_path):
    """bitsandbytes computes otherwise in eval mode: reference and policy must be in one."""
    ways = kinds(sft, "adapter", tmp_path / "cache")
    for kind in ("frozen adapter", "two names", "two instances", "cached"):
        rows = told(start(tmp_path / kind, rows=ROWS, **STEPS, **ways[kind], **{bits: True}))
        assert rows[0][0] == pytest.approx(0.6931472, abs=1e-6) and rows[0][2:4] == pytest.approx((0, 0), abs=1e-6)
        assert abs(rows[-1][2]) > 1e-3


OWN = {"adapter": {}, "attention": {"model_init_kwargs": {"attention_dropout": 0.5}}}


@pytest.mark.parametrize("own", OWN)
def test_a_quantised_reference_has_no_dropout_though_its_policy_has(own, sft, tmp_path):
    common = {"rows": ROWS[:12], **STEPS, "load_in_4bit": True, "disable_dropout": False, "layout": "padded"}
    noisy = {"model": str(sft / "noisy"), **OWN[own]}

    def cached(name, **options):
        cache = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / f"cache-{name}")}
        run_ = start(tmp_path / name, **common, **cache, **options)
        return told(run_), [run_.train_rows[column][:] for column in reference.CACHED]

    (curve, logps), (plain_curve, plain) = cached("a", **noisy), cached("plain", model=str(sft / "adapter"))
    other_curve, other = cached("b", seed=1, **noisy)
    assert logps == plain == other
    assert curve != plain_curve and curve != other_curve  # the policy has its dropout
    assert told(start(tmp_path / "online", **common, **noisy)) == curve  # and draws the same: the reference draws none


def test_a_quantised_policy_is_evaluated_with_the_kernels_of_its_reference(sft, tmp_path):
    options = {"load_in_8bit": True, "use_peft": True, "eval_strategy": "steps", "eval_on_start": True}
    row = start(tmp_path / "run", str(sft / "base"), eval_rows=make_rows(6), **options, max_steps=1).rows[0]
    assert row["eval_rewards/chosen"] == 0 and row["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
