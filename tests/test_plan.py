"""Tutorial 8's plan of memory and communication, against what PyTorch and transformers make, keep and send."""

import ast
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import ROOT, WORDS, make_model, run, start
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config

from dpo import costs
from dpo.attention import attend_by_segments
from dpo.collate import DataCollatorForPreference
from dpo.logprobs import concatenated_forward

sys.path.insert(0, str(ROOT / "tutorials"))
import render  # noqa: E402

NAME = "08_the_plan_on_paper"
CODE = [cell.source for cell in render.read(NAME).cells if cell.cell_type == "code"]
TUTORIAL: dict = {}
for source in CODE[: 1 + next(i for i, source in enumerate(CODE) if "def plan(" in source)]:  # what can be copied out
    exec(compile(source, NAME, "exec"), TUTORIAL)
plan, PARTS = TUTORIAL["plan"], TUTORIAL["PARTS"]

SMALL = {"layers": 3, "hidden": 64, "intermediate": 160, "heads": 4, "kv_heads": 2, "vocabulary": 400}
NAMES = {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size"}
NAMES |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "vocabulary": "vocab_size"}
PUBLIC = {  # parameters, as the models' pages have them, and the rest of their configuration
    "Qwen2 0.5B": 494_032_768,
    "Qwen2 7B": 7_615_616_512,
    "Llama 2 7B": 6_738_415_616,
    "Llama 2 70B": 68_976_648_192,
    "Llama 3 70B": 70_553_706_496,
}


def sizes_of(model: dict) -> dict:
    return {NAMES[key]: value for key, value in model.items() if key in NAMES}


def small(**options) -> dict:
    return plan(**{**SMALL, "tokens": 64, "kept": 32, **options})


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_are_those_of_transformers_own_model(name):
    model = TUTORIAL["MODELS"][name]
    assert TUTORIAL["count"](**model) == PUBLIC[name]
    family = Qwen2Config if "Qwen" in name else LlamaConfig
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(family(**sizes_of(model), tie_word_embeddings=model.get("tied", False)))
    assert sum(each.numel() for each in real.parameters()) == PUBLIC[name]
    told = plan(**model, tokens=1, kept=1, rank=16, weights="bfloat16")
    with torch.device("meta"):
        real = get_peft_model(real, LoraConfig(r=16, target_modules="all-linear"))
    trained = sum(each.numel() for each in real.parameters() if each.requires_grad)
    assert told["gradients"] == 4 * trained and told["weights"] == 2 * PUBLIC[name] + 4 * trained


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("how", ["bias", "tied", "plain"])
def test_what_stays_has_the_bytes_of_real_tensors(weights, rank, how):
    kind = {"bias": {"qkv_bias": True}, "tied": {"tied": True}, "plain": {}}[how]
    family = Qwen2Config if how == "bias" else LlamaConfig
    config = family(**sizes_of(SMALL), tie_word_embeddings=how == "tied")
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, weights))
    reference = sum(each.nbytes for each in model.parameters())
    if rank:
        model, reference = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear")), 0
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    state = [each for one in optimizer.state.values() for key, each in one.items() if key != "step"]
    told = small(**kind, weights=weights, compute=weights, rank=rank)
    assert told["weights"] == sum(each.nbytes for each in model.parameters())
    assert told["gradients"] == sum(each.grad.nbytes for each in trained)
    assert told["optimizer"] == sum(each.nbytes for each in state)
    assert told["reference"] == reference
    assert small(**kind, weights=weights, compute=weights, rank=rank, reference="cached")["reference"] == 0


def test_a_base_in_4_bits_has_the_bytes_that_bitsandbytes_gives_it(tmp_path):
    make_model(**sizes_of(SMALL)).save_pretrained(tmp_path)
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits, dtype=torch.bfloat16)
    scales = [each.quant_state.absmax.nbytes for each in model.parameters() if hasattr(each, "quant_state")]
    base = sum(each.nbytes for each in model.parameters()) + sum(scales)
    told = small(weights="nf4", rank=4)
    assert len(scales) == 7 * SMALL["layers"] and told["weights"] == base + told["gradients"]
    assert told["copies"] == 2 * 64 * 160  # the largest matrix, in bfloat16
    with pytest.raises(ValueError, match="nf4 weights do not train"):
        small(weights="nf4")


def test_of_a_base_in_4_bits_each_device_has_its_share_but_all_of_the_scales():
    matrices, norms = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160), 3 * 128
    root, adapter = 2 * (2 * 400 * 64 + 64), small(rank=4)["gradients"]
    one, four = (small(weights="nf4", rank=4, how="fsdp", devices=each, reference="cached") for each in (1, 4))
    assert four["weights"] == (matrices / 2 + 2 * norms + root + adapter) / 4 + 4 * matrices / 64
    assert one["weights"] == small(weights="nf4", rank=4)["weights"]
    assert four["all_gathered"] == 2 * (matrices / 2 + 2 * norms + root + adapter)  # packed, and no scales
    assert four["exchanged"] == 2 * (matrices / 2 + 2 * norms + adapter) / 3 + root + 2 * adapter / 3
    assert four["reduce_scattered"] == adapter
    in_bfloat16 = small(weights="nf4", rank=4, how="fsdp", devices=4, reference="cached", gathered_in="bfloat16")
    assert in_bfloat16["all_gathered"] == four["all_gathered"] - adapter
    assert [in_bfloat16[part] for part in PARTS[:5]] == [four[part] for part in PARTS[:5]]


KEPT = [  # weights, compute, rank, what to train with
    ("float32", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("float32", "bfloat16", None),
    ("float32", "float32", 16),
    ("bfloat16", "bfloat16", 16),
    ("float32", "bfloat16", 16),
]


def kept(layers: int, weights: str, compute: str, rank: int | None, checkpointing: bool) -> tuple[dict, dict]:
    """(what autograd keeps of a batch, the plan of it): bytes."""
    shape = {**SMALL, "hidden": 128, "intermediate": 344, "layers": layers}
    model = make_model(**sizes_of(shape)).to(getattr(torch, weights)).train()
    attend_by_segments(model)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    row = {"prompt_input_ids": [7] * 96, "chosen_input_ids": [8] * 64, "rejected_input_ids": [9] * 64}
    batch = DataCollatorForPreference(0, "prefix_shared")([row] * 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights != compute):
        found = costs.kept_by_autograd(
            model, lambda batch: concatenated_forward(model, batch), batch, model.get_output_embeddings()
        )
    options = {"weights": weights, "compute": compute, "rank": rank, "checkpointing": checkpointing}
    told = plan(**shape, tokens=found["tokens"], kept=found["kept"], **options)
    if weights != compute and not checkpointing:  # autograd keeps the copies of weights, too; the head's elsewhere
        told["activations"] += told["copies"] - 2 * 400 * 128
    return found, told


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("weights", "compute", "rank"), KEPT)
def test_activations_are_what_autograd_keeps(weights, compute, rank, checkpointing):
    """To 3 %, of four blocks and of one block more."""
    (two, told_two), (four, told_four) = (kept(each, weights, compute, rank, checkpointing) for each in (2, 4))
    block = (four["trunk"] - two["trunk"]) / 2
    assert (told_four["activations"] - told_two["activations"]) / 2 == pytest.approx(block, rel=0.03)
    assert told_four["activations"] == pytest.approx(four["trunk"], rel=0.03)
    assert four["head"] < told_four["passing"] + told_four["copies"]


def test_logits_stay_within_three_budgets():
    model = TUTORIAL["MODELS"]["Llama 3 70B"]
    short, long = (plan(**model, tokens=8, kept=kept, logits_budget=0.25)["passing"] for kept in (100, 100_000))
    assert short == 12 * 128256 * 100 and 0.99 < long / (3 * 0.25 * 2**30) <= 1


def test_flops_are_the_useful_ones_without_attention_and_with_what_is_worked_out_again():
    model = make_model(**sizes_of(SMALL))
    price = costs.prices(model, trains=True)
    step = 64 * price["token"] + 32 * price["kept"]
    assert small(reference="cached")["flops"] == step
    assert small()["flops"] == small(reference="cached", checkpointing=True)["flops"] == step * 4 / 3
    assert small(micro_batches=3)["flops"] == 3 * small()["flops"]
    model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))
    price = costs.prices(model, trains=True)
    of_adapter = 64 * price["token"] + 32 * price["kept"]
    assert small(rank=1, reference="cached")["flops"] == pytest.approx(of_adapter, rel=0.03)


def test_bytes_sent_by_hand():
    """Rings of 4: an all-reduce sends each byte 2·3/4 times, an all-gather and a reduce-scatter 3/4 times."""
    own = 4 * (3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 128) + 2 * 400 * 64 + 64)
    assert small(devices=4)["sent"] == small(devices=4, micro_batches=5)["sent"] == 1.5 * own
    assert small(how="fsdp", devices=4)["sent"] == 0.75 * (3 * own + own)
    assert small(how="fsdp", devices=4, reference="cached")["sent"] == 0.75 * (2 * own + own)
    half = {"how": "fsdp", "devices": 4, "gathered_in": "bfloat16"}  # and summed in float32, whatever is kept
    assert small(**half, micro_batches=2)["sent"] == 0.75 * 2 * (1.5 * own + own)
    assert small(**half, weights="bfloat16")["sent"] == small(**half)["sent"]
    assert small()["sent"] == small(how="fsdp")["sent"] == 0


def test_bytes_exchanged_by_hand():
    """DDP's buckets; of FSDP two blocks and the root, with the gradients of the root and of two blocks, of which one's
    are in the dtype that they are summed in. A live reference adds nothing: its root is not there with the policy's."""
    root = 4 * (2 * 400 * 64 + 64)
    own = small()["weights"]
    block = (own - root) / 3
    assert small(devices=4)["exchanged"] == own and small()["exchanged"] == 0
    assert small(how="fsdp", devices=4)["exchanged"] == 2 * (2 * block + root)
    half = small(how="fsdp", devices=4, gathered_in="bfloat16")
    assert half["exchanged"] == 2 * block / 2 + root / 2 + root / 2 + block / 2 + block
    for options in ({}, {"gathered_in": "bfloat16"}):
        live, cached = (small(how="fsdp", devices=4, reference=each, **options) for each in ("live", "cached"))
        assert live["exchanged"] == cached["exchanged"]
        assert live["reference"] == own / 4 and cached["reference"] == 0
    adapter = small(rank=4)["gradients"] / 3
    assert small(how="fsdp", devices=4, rank=4)["exchanged"] == 2 * (block + adapter) + root + 2 * adapter


models = st.fixed_dictionaries({
    "layers": st.integers(2, 40),
    "hidden": st.sampled_from((128, 256, 1024)),
    "intermediate": st.sampled_from((128, 512, 1536)),
    "heads": st.sampled_from((2, 4)),
    "kv_heads": st.sampled_from((1, 2)),
    "vocabulary": st.sampled_from((256, 32000, 131072)),
    "tied": st.booleans(),
    "qkv_bias": st.booleans(),
    "tokens": st.integers(1, 5000),
    "kept": st.integers(1, 5000),
    "micro_batches": st.integers(1, 8),
    "logits_budget": st.sampled_from((0.1, 4.0)),
})  # fmt: skip
PRECISIONS = [("float32", None), ("bfloat16", None), ("float32", 8), ("bfloat16", 8), ("nf4", 8)]  # weights, rank
options = st.fixed_dictionaries({
    "how": st.sampled_from(("ddp", "fsdp")),
    "precision": st.sampled_from(PRECISIONS),
    "reference": st.sampled_from(("live", "cached")),
    "checkpointing": st.booleans(),
}).map(lambda each: each | dict(zip(("weights", "rank"), each.pop("precision"), strict=True)))  # fmt: skip


@given(models, options, st.integers(1, 200), st.integers(1, 200))
def test_what_stays_never_grows_with_the_devices(model, options, some, more):
    some, more = (plan(**model, **options, devices=each) for each in (min(some, more), max(some, more)))
    for part in ("weights", "gradients", "optimizer"):
        assert some[part] >= more[part] and (options["how"] == "fsdp" or some[part] == more[part])


@given(models, options, st.sampled_from((2, 4, 8, 16, 32)))
def test_twice_the_devices_take_no_more_of_each_and_send_no_less(model, options, devices):
    if options["rank"]:  # an adapter's few rows are evened out: twice the devices gather more of nothing
        options = options | {"rank": None, "weights": "bfloat16"}
    some, more = (plan(**model, **options, devices=each) for each in (devices, 2 * devices))
    assert more["total"] <= some["total"] and more["sent"] >= some["sent"]
    assert (more["total"] < some["total"]) == (options["how"] == "fsdp")
    assert more["flops"] == some["flops"]


@given(models, options, st.integers(1, 64))
def test_each_remedy_helps(model, options, devices):
    def told(**change) -> dict:
        return plan(**(model | options | {"devices": devices} | change))

    live, cached = told(reference="live"), told(reference="cached")
    assert cached["total"] <= live["total"] and cached["sent"] <= live["sent"] and cached["flops"] < live["flops"]
    assert (cached["total"] < live["total"]) == (options["rank"] is None)
    whole, again = told(checkpointing=False), told(checkpointing=True)
    assert again["total"] < whole["total"] and again["flops"] > whole["flops"] and again["sent"] == whole["sent"]
    everything, adapter = told(rank=None, weights="float32", how="ddp"), told(rank=8, how="ddp")
    assert adapter["gradients"] < everything["gradients"] and adapter["sent"] <= everything["sent"]
    few, many = told(logits_budget=0.1), told(logits_budget=1.0)
    assert few["passing"] <= many["passing"]
    once, twice = told(), plan(**(model | {"tokens": 2 * model["tokens"]}), **options, devices=devices)
    assert twice["activations"] == 2 * once["activations"] and twice["sent"] == once["sent"]
    assert all(each["total"] == sum(each[part] for part in PARTS) for each in (live, again, adapter, twice))
    assert min(live[key] for key in live) >= 0


def test_the_table_of_the_rendered_copy_is_what_the_function_gives():
    """Of some cells, worked out here with the changes that they name."""
    copy = (ROOT / "tutorials" / "rendered" / f"{NAME}.md").read_text()
    of_pairs, model = {"tokens": 4096, "kept": 2048}, TUTORIAL["MODELS"]
    for (layout, weights), (devices, cell) in product((("LoRA", "bfloat16"), ("QLoRA", "nf4")), ((8, 0), (64, 1))):
        line = next(line for line in copy.splitlines() if line.strip().startswith(f"Llama 3 70B {layout}, FSDP "))
        options = {**of_pairs, "rank": 16, "weights": weights, "how": "fsdp", "devices": devices}
        before, after = (plan(**model["Llama 3 70B"], **options, checkpointing=each)["total"] for each in (False, True))
        words = f"{before / 2**30:.1f} → {after / 2**30:.1f} c"
        assert words in line and line.index(words) > 40 * cell and before > 70 * 2**30 > after
    line = next(line for line in copy.splitlines() if line.strip().startswith("Qwen2 7B    all weights, DDP "))
    options = {"checkpointing": True, "reference": "cached", "tokens": 1024, "kept": 512}
    for devices in (1, 8, 64):
        assert f"no ({plan(**model['Qwen2 7B'], **options, devices=devices)['total'] / 2**30:.1f})" in line


def measured() -> tuple[dict, dict, tuple]:
    """What the tutorial says that four processes keep and send: {case: (options, bytes)}, the model, what is what."""
    shown = ast.parse(next(each for each in CODE if "MEASURED = {" in each))
    literals = {each.targets[0].id: each.value for each in shown.body if isinstance(each, ast.Assign)}
    cases, model, columns = (ast.literal_eval(literals[each]) for each in ("MEASURED", "measured_model", "COLUMNS"))
    return {name: (options, sizes) for name, (options, *sizes) in cases.items()}, model, columns


def test_the_plan_is_what_four_processes_keep_and_send():
    cases, model, columns = measured()
    for name, (options, sizes) in cases.items():
        usual = {"tokens": 32, "kept": 32, "devices": 4, "compute": "float32", "reference": "cached"}
        told = plan(**model, **usual | options)
        assert [told[column] for column in columns] == sizes, name
    assert len(cases) == 16


@pytest.mark.slow
def test_four_processes_keep_and_send_what_the_tutorial_says():
    script = ROOT / "tests" / "benchmarks" / "plan.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases, _, columns = measured()
    counted = {name: [sizes[column] for column in columns] for name, sizes in ast.literal_eval(done.stdout).items()}
    assert counted == {name: sizes for name, (_, sizes) in cases.items()}


GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is free, at once


@pytest.fixture(scope="module")
def peaks() -> dict[int, dict[str, list[dict[str, int]]]]:
    """What the script says of runs in one process and in four: of each process the peak of each phase."""
    script, found = str(ROOT / "tests" / "benchmarks" / "plan.py"), {}
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **GIVE_BACK}
    for processes in (1, 4):
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else ()), script, "--peaks"]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found[processes] = ast.literal_eval(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "checkpoint"])
def test_each_of_four_processes_keeps_at_most_two_fifths_of_what_one_does(peaks, kind):
    """From the loading by name to the export, for which the first one has the whole model."""
    (one,), four = (peaks[each][kind] for each in (1, 4))
    assert one.keys() == {"loading", "training", "export", *(["checkpoint"] if kind == "checkpoint" else [])}
    most = max(one.values())
    for own in four:
        assert max(own.values()) < 0.4 * most, own


@pytest.mark.slow
def test_a_peak_in_shards_is_as_planned(peaks):
    model = {"layers": 16, "hidden": 512, "intermediate": 1376, "heads": 8, "kv_heads": 4, "vocabulary": 4096}
    of_batch = {"tokens": 34, "kept": 18, "compute": "float32"}
    for processes in (1, 4):
        told = plan(**model, **of_batch, how="fsdp" if processes > 1 else "ddp", devices=processes)["total"]
        for own in peaks[processes]["plain"]:
            assert 0.9 < told / own["training"] < 1.1, (processes, told, own)


PEAKS = {  # of a run of dpo.loop
    "live": ({}, {}),
    "cached": ({"reference": "cached"}, {"precompute_ref_log_probs": True}),
    "checkpointing": ({"checkpointing": True}, {"gradient_checkpointing": True}),
    "LoRA": ({"rank": 8}, {"peft_config": {"r": 8, "target_modules": "all-linear"}}),
    "bfloat16": ({"compute": "bfloat16"}, {"bf16": True}),
    "bfloat16, checkpointing": (
        {"compute": "bfloat16", "checkpointing": True},
        {"bf16": True, "gradient_checkpointing": True},
    ),
}
MIDDLE = {"layers": 6, "hidden": 512, "intermediate": 1376, "heads": 8, "kv_heads": 4, "vocabulary": 12000}


def main(kind: str, output_dir: str) -> None:
    """A run in a process of its own, for the next test: prints its peak and its plan."""
    told, options = PEAKS[kind]
    model = make_model(**sizes_of(MIDDLE), initializer_range=0.02, max_position_embeddings=1024)
    text = {"prompt": " ".join(WORDS * 4), "chosen": " ".join(WORDS[::-1] * 4), "rejected": " ".join(WORDS[1:] * 4)}
    rows = [text | {"prompt": f"{WORDS[i]} {text['prompt']}"} for i in range(16)]
    done = start(Path(output_dir), model, rows, max_steps=2, gradient_accumulation_steps=2, **options)
    row = done.train_rows[0]
    prompt, *completions = (len(row[f"{part}_input_ids"]) for part in ("prompt", "chosen", "rejected"))
    pairs = done.args.per_device_train_batch_size
    of_batch = {"tokens": pairs * (prompt + sum(completions)), "kept": pairs * sum(completions)}
    expected = plan(**MIDDLE, **of_batch, **{"compute": "float32"} | told)
    print(json.dumps({"measured": done.memory["measured"], **expected}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PEAKS)
def test_a_runs_peak_is_as_planned(kind, tmp_path):
    done = run("test_plan", kind, str(tmp_path), cwd=Path(__file__).parent, env=GIVE_BACK)
    told = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 < told["total"] / told["measured"] < 1.1, told


if __name__ == "__main__":
    main(*sys.argv[1:])
