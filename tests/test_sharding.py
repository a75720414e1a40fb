"""Many processes: a run is the same in one, in two and four, with copies of the model in each or in shards."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sharded_runs
import torch
from conftest import ROOT, make_model, make_rows, start
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig, VBLoRAConfig, VeraConfig
from safetensors.torch import load_file
from sharded_runs import CASES, KEPT, LORA, SYNCED
from test_images import see
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from dpo import checkpoint
from dpo.adapters import add_adapter, starts_from_base
from dpo.config import DPOConfig, UserError
from dpo.distributed import World, setup
from dpo.models import load_empty, load_model
from dpo.prepare import Run, pairs_per_step
from dpo.sharding import as_if_in_memory, blocks_of, shard, whole

FOUR = ["full", "tied", "rearranged", "sees", "padding_free", "lora", "4 bits", "cached", "synced", "bco", "ranked"]
FOUR += ["evaluated", "evaluated lora"]
COMMON = [name for name in CASES if not name.startswith("saved")]


def runs_of(folder: Path, processes: int, how: str, names: list[str]) -> None:
    """Makes runs of `sharded_runs`, by torchrun, one after the other."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, ROOT / "tests" / "sharded_runs.py", folder, str(processes), how, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def left(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def assert_alike(rows: list[dict], expected: list[dict], *, tolerance: float = 1e-5) -> None:
    assert [row.keys() for row in rows] == [row.keys() for row in expected] and rows
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, and what each case says that one process runs alone."""
    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    sharded_runs.make_models(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    for name in CASES:
        sharded_runs.main(folder, 1, "alone", [name])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_in_shards_is_that_of_one_process(alone, processes):
    names = COMMON if processes == 2 else FOUR
    runs_of(alone, processes, "fsdp", names)
    for name in names:
        tolerance = 5e-2 if "16 bits" in name else 1e-5
        rows = left(alone, f"fsdp-{processes}-{name}")
        assert_alike(rows, left(alone, f"alone-1-{name}"), tolerance=tolerance)
        if "16 bits" in name:  # gathered in bfloat16, which is not what one process computes, but tried in float32
            assert rows[0]["rewards/chosen"] == 0 and rows != left(alone, f"alone-1-{name}")
            layout = torch.load(next((alone / f"fsdp-{processes}-{name}").glob("checkpoint-*")) / "state.pt")
            assert layout["same_run"]["layout"] == "prefix_shared"
    for name in ("evaluated", "evaluated lora"):  # the same answers, in the same order
        answers = [(alone / f"{how}-{name}" / "samples.jsonl").read_text() for how in ("alone-1", f"fsdp-{processes}")]
        assert answers[0] == answers[1] and answers[0].count("\n") == 10


@pytest.mark.slow
def test_what_a_run_in_shards_leaves_is_an_ordinary_model(alone):
    runs_of(alone, 2, "fsdp", ["full", "tied", "rearranged", "lora and head", "encoder-decoder"])
    for name in ("full", "tied", "rearranged", "lora and head", "encoder-decoder"):
        one, two = alone / f"alone-1-{name}", alone / f"fsdp-2-{name}"
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
        file = "adapter_model.safetensors" if "lora" in name else "model.safetensors"
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        for key in sorted(a):
            if not key.endswith("k_proj.bias"):  # the softmax leaves it no gradient but rounding, which Adam blows up
                assert torch.allclose(a[key], b[key], atol=2e-5), (name, key)
        if "lora" not in name:
            assert (one / "config.json").read_text() == (two / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(alone / "fsdp-2-full")


@pytest.mark.slow
def test_a_checkpoint_serves_any_number_of_processes_and_both_layouts(alone):
    """Saved in shards by two, by two with copies, and by one; each goes on in all the other ways."""
    ways = {"fsdp-2": ["alone-1", "fsdp-2", "ddp-2", "fsdp-4"], "ddp-2": ["fsdp-2", "ddp-2"], "alone-1": ["fsdp-2"]}
    for how in ("fsdp", "ddp"):
        runs_of(alone, 2, how, [f"saved {name}" for name in KEPT])
    going_on = {}
    for source, targets in ways.items():
        for target in targets:
            going_on.setdefault(target, []).extend(f"saved {name}@{source}-saved {name}" for name in KEPT)
    for target, names in going_on.items():
        how, processes = target.split("-")
        if how == "alone":
            sharded_runs.main(alone, 1, "alone", names)
        else:
            runs_of(alone, int(processes), how, names)
        for name in names:
            source, rows = name.partition("@")[2], left(alone, f"{target}-{name}")
            expected = left(alone, source)
            file = next((alone / source).glob("*model.safetensors")).name
            weights, own = load_file(alone / source / file), load_file(alone / f"{target}-{name}" / file)
            if source.startswith(target):
                assert rows == expected and all(torch.equal(own[key], weights[key]) for key in weights), name
            else:
                assert_alike(rows, expected)
                assert all(torch.allclose(own[key], weights[key], atol=2e-5) for key in weights), name


# ------------------------------------------------------------------------------------------- in a world of one process


@pytest.fixture
def one_process():
    """A group of one process, which in shards holds all of them."""
    setup(use_cpu=True, shards=True)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("more", [{}, LORA, SYNCED], ids=["full", "lora", "synced"])
def test_one_process_in_shards_is_one_process(more, folder, tmp_path, one_process):
    options = {"save_strategy": "steps", "save_steps": 3, "rows": make_rows(24), **more}
    plain = start(tmp_path / "plain", str(folder / "llama"), **options)
    shards = start(tmp_path / "shards", str(folder / "llama"), fsdp="full_shard", **options)
    for ours, row in zip(shards.rows, plain.rows, strict=True):
        rates = ("tokens_per_second", "unique_tokens_per_second")
        expected = {key: value for key, value in row.items() if key not in rates}
        assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-6, rel=1e-6)
    again = start(tmp_path / "shards", str(folder / "llama"), resume_from_checkpoint="true", **options)  # and unsharded
    assert again.rows == shards.rows
    saved = (load_file(next((tmp_path / name).glob("*model.safetensors"))) for name in ("plain", "shards"))
    a, b = saved
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_model_comes_into_shards_from_its_files_without_being_held(folder, one_process, monkeypatch):
    """Each parameter is on no device until its rows are read; an adapter begins with the numbers it would have had."""
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    for name in ("llama", "tied"):
        expected = load_model(str(folder / name))
        torch.manual_seed(7)
        expected = add_adapter(expected, lora).state_dict()
        model = load_empty(str(folder / name))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())
        torch.manual_seed(7)
        with as_if_in_memory(model):
            adapted = add_adapter(model, lora)
        base = [p for key, p in adapted.named_parameters() if "lora_" not in key and "modules_to_save" not in key]
        assert base and all(parameter.is_meta and not parameter.requires_grad for parameter in base)
        found = {key: whole(value) for key, value in shard(adapted, torch.device("cpu")).state_dict().items()}
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert load_empty(str(folder / "mixtral")) is None  # whose files have each expert apart
    adapted = load_empty(str(folder / "adapter"))
    expected = load_model(str(folder / "adapter")).state_dict()
    found = {key: whole(value) for key, value in shard(adapted, torch.device("cpu")).state_dict().items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("config", "is_from_base"),
    [
        (None, False),
        ({"r": 8}, False),
        ({"init_lora_weights": "gaussian"}, False),
        ({"init_lora_weights": "pissa"}, True),
        ({"use_dora": True}, True),
        (LoraConfig(), False),
        (LoraConfig(trainable_token_indices=[1, 2]), True),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, False),
        (LoraConfig(init_lora_weights="olora"), True),
        (IA3Config(), True),
    ],
)
def test_an_adapter_that_begins_with_the_bases_weights_needs_them(config, is_from_base):
    assert starts_from_base(config) == is_from_base


def test_a_model_without_values_is_refused(folder, one_process):
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match="of the model has no values, and no file has them"):
        shard(model, torch.device("cpu"))
    model = load_empty(str(folder / "llama"))
    del model.places_of_weights["model.norm.weight"]
    with pytest.raises(ValueError, match="model.norm.weight of the model has no values"):
        shard(model, torch.device("cpu"))


def test_blocks_are_what_the_model_says_or_the_option(one_process):
    model, names = make_model(), ["LlamaMLP", "LlamaAttention"]
    assert blocks_of(model) == list(model.model.layers) and len(blocks_of(model, names)) == 4
    with pytest.raises(ValueError, match="no module of the model is a LlamaBlock: name one of .*LlamaDecoderLayer"):
        blocks_of(model, ["LlamaDecoderLayer", "LlamaBlock"])
    with pytest.raises(ValueError, match="fsdp_transformer_layer_cls_to_wrap: the model does not say"):
        blocks_of(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match="no module of the model is a Qwen2VLVisionBlock"):
        blocks_of(see("qwen2_vl")[0], ["Qwen2VLVisionBlock"])
    model, _ = see("qwen2_vl")
    assert {type(block).__name__ for block in blocks_of(model)} == {"Qwen2VLDecoderLayer"}  # its eyes stay together


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp16": True}, "fp16 scales the gradients of whole models"),
        ({"optim": "adamw_8bit"}, "optim adamw_8bit needs whole matrices"),
        ({"optim": "adafactor"}, "optim adafactor needs whole matrices"),
        ({"ddp_find_unused_parameters": True}, "ddp_find_unused_parameters is of DDP"),
        ({"fsdp_offload": True}, "fsdp_offload does nothing on a CPU"),
        ({"fsdp_transformer_layer_cls_to_wrap": ["Block"]}, "no module of the model is a Block"),
    ],
)
def test_what_cannot_be_in_shards_is_refused(options, words, tmp_path, one_process):
    with pytest.raises(UserError, match=words):
        start(tmp_path, use_cpu=True, fsdp="full_shard", **options)


def test_the_option_may_be_written_as_transformers_has_it():
    assert DPOConfig(fsdp="full_shard auto_wrap").fsdp == "full_shard"
    config = DPOConfig(fsdp="full_shard offload")
    assert (config.fsdp, config.fsdp_offload) == ("full_shard", True)
    for fsdp in ("shard_grad_op", "full_shard hybrid"):
        with pytest.raises(UserError, match=f"fsdp is '{fsdp}': choose one of full_shard"):
            DPOConfig(fsdp=fsdp)


def test_the_option_says_which_blocks_are_gathered_at_a_time(folder, tmp_path, one_process):
    run = start(
        tmp_path, str(folder / "llama"), max_steps=1, fsdp="full_shard", fsdp_transformer_layer_cls_to_wrap="LlamaMLP"
    )
    gathered = {type(module).__name__ for module in run.model.modules() if isinstance(module, FSDPModule)}
    assert gathered == {"FSDPLlamaMLP", "FSDPLlamaForCausalLM"}


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    """The writing of checkpoint-2 is held up until step 3 has been taken."""
    options = {"rows": make_rows(24), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    options |= {"per_device_train_batch_size": 4}
    start(tmp_path / "at once", **options)
    monkeypatch.setattr("dpo.checkpoint.AT_ONCE", 0)
    goes_on, write, waited = threading.Event(), checkpoint.write_model, []

    def held_up(*arguments, **options):
        waited.append(goes_on.wait(timeout=60))
        write(*arguments, **options)

    def let_go(row):
        if row["step"] == 3:
            assert not (tmp_path / "late" / "checkpoint-2").exists()
            goes_on.set()

    monkeypatch.setattr("dpo.checkpoint.write_model", held_up)
    start(tmp_path / "late", callbacks=[let_go], **options)
    assert waited[0] and checkpoint.checkpoints(tmp_path / "late").keys() == {2, 4}
    for step in (2, 4):
        a, b = (load_file(tmp_path / name / f"checkpoint-{step}" / "model.safetensors") for name in ("at once", "late"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    monkeypatch.setattr("dpo.checkpoint.write_model", write)
    shutil.rmtree(tmp_path / "late" / "checkpoint-4")
    again = start(tmp_path / "late", resume_from_checkpoint="true", **options)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("at once", "late"))
    assert again.rows[-1]["step"] == 4 and all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_of_shards_is_a_copy_in_one_process_too(folder, tmp_path, one_process, monkeypatch):
    monkeypatch.setattr("dpo.checkpoint.AT_ONCE", 0)
    goes_on, write = threading.Event(), checkpoint.write_model
    monkeypatch.setattr(
        "dpo.checkpoint.write_model", lambda *own, **how: (goes_on.wait(timeout=60), write(*own, **how))
    )
    steps = {"rows": make_rows(24), "save_strategy": "steps", "save_steps": 2, "max_steps": 3, "fsdp": "full_shard"}
    start(tmp_path / "late", str(folder / "llama"), callbacks=[lambda row: row["step"] == 3 and goes_on.set()], **steps)
    start(tmp_path / "two", str(folder / "llama"), **steps | {"max_steps": 2, "lr_scheduler_type": "constant"})
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("late", "late/checkpoint-2"))
    assert not all(torch.equal(a[key], b[key]) for key in a)


def test_a_parameter_that_never_had_a_gradient_does_not_keep_a_run_from_going_on(tmp_path):
    class Idle(torch.nn.Module):
        """A language model, and a layer that nothing reads."""

        def __init__(self):
            super().__init__()
            self.inner, self.idle = make_model(), torch.nn.Linear(3, 3)

        def forward(self, **inputs):
            return self.inner(**inputs)

    options = {"save_strategy": "steps", "save_steps": 2, "rows": make_rows(24)}
    whole = start(tmp_path, Idle(), **options)
    shutil.rmtree(tmp_path / "checkpoint-3")
    again = start(tmp_path, Idle(), resume_from_checkpoint="true", **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert len(again.optimizer.state) == len(list(again.model.parameters())) - 2


@pytest.mark.parametrize("kind", [VeraConfig, VBLoRAConfig, IA3Config, LoHaConfig, OFTConfig, AdaLoraConfig])
def test_adapters_of_all_kinds_are_saved_and_go_on(kind, tmp_path):
    own = {
        AdaLoraConfig: {"total_step": 10},
        VeraConfig: {"r": 4},
        VBLoRAConfig: {"num_vectors": 8, "vector_length": 4},
    }
    own |= {OFTConfig: {"oft_block_size": 4}, IA3Config: {"feedforward_modules": []}}
    config = kind(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **own.get(kind, {}))
    options = {"save_strategy": "steps", "save_steps": 2, "rows": make_rows(24), "seed": 3}
    make_model().save_pretrained(tmp_path / "base")
    whole = start(tmp_path / "run", str(tmp_path / "base"), peft_config=config, **options)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    again = start(
        tmp_path / "run", str(tmp_path / "base"), peft_config=config, resume_from_checkpoint="true", **options
    )
    assert again.rows[-1]["loss"] == whole.rows[-1]["loss"]
    left = load_model(str(tmp_path / "run"))
    trained = {key for key, p in again.model.named_parameters() if p.requires_grad}
    assert trained and all(torch.equal(left.state_dict()[key], again.model.state_dict()[key]) for key in trained)


def test_the_best_model_has_its_buffers_again(tmp_path):
    class Counting(torch.nn.Module):
        """A language model that counts its forward passes in training, as normalisations do."""

        def __init__(self):
            super().__init__()
            self.inner = make_model()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, **inputs):
            self.passes += self.training
            return self.inner(**inputs)

    values = iter([1.0, 3.0, 2.0])
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_rows": make_rows(3), "save_strategy": "steps"}
    options |= {"save_steps": 1, "max_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "score"}
    options |= {"compute_metrics": lambda _: {"score": next(values)}}
    run = start(tmp_path, Counting(), rows=make_rows(24), **options)
    second, last = (load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")["passes"] for step in (2, 3))
    assert run.model.passes == second < last


def test_the_best_of_a_checkpoint_stays_until_a_newer_one_is_there(tmp_path, monkeypatch):
    """The best is of step 2; step 6 is better, but what would keep it cannot be written."""
    monkeypatch.setattr("dpo.checkpoint.AT_ONCE", 0)
    write = checkpoint.write_model

    def fails(directory, *own, **how):
        if "checkpoint-6" in str(directory):
            raise OSError("no space left")
        write(directory, *own, **how)

    monkeypatch.setattr("dpo.checkpoint.write_model", fails)
    values = iter([3.0, 1.0, 9.0])
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": make_rows(3), "save_strategy": "steps"}
    options |= {"save_steps": 2, "max_steps": 6, "save_total_limit": 1, "load_best_model_at_end": True}
    options |= {"compute_metrics": lambda _: {"score": next(values)}, "metric_for_best_model": "score"}
    with pytest.raises(UserError, match="checkpoint-6 could not be written: no space left"):
        start(tmp_path, rows=make_rows(48), greater_is_better=True, **options)
    assert {2, 4} <= checkpoint.checkpoints(tmp_path).keys()


def test_a_run_that_goes_on_keeps_the_pairs_of_a_step(tmp_path):
    """Begun by two processes of 4 pairs each, it goes on in one, and once more."""
    state = {"processes": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "pairs_per_step": 8}
    for before, processes, expected in (
        (state, 2, 8),
        (state, 1, 8),
        ({**state, "processes": 1}, 1, 8),  # what the run in one has saved
        ({**state, "processes": 1}, 2, 8),
        ({**state, "per_device_train_batch_size": 2, "pairs_per_step": 4}, 2, 8),  # another run, which is refused
    ):
        torch.save({"same_run": before}, tmp_path / "state.pt")
        args = DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=4)
        run = Run(args, World(0, processes, torch.device("cpu")), tmp_path)
        assert pairs_per_step(run, tmp_path) == expected
    assert pairs_per_step(run, None) == 8
