"""What a step costs: FLOPs against another count, memory against what the process took, the files of a profile."""

import gzip
import json
import random
from pathlib import Path

import families
import pytest
import torch
from conftest import WORDS, make_model, make_rankings, make_rows, make_tokenizer, run, start, weights
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from dpo import costs
from dpo.attention import attend_by_segments
from dpo.collate import DataCollatorForPreference
from dpo.config import UserError
from dpo.data import prepare_dataset
from dpo.logprobs import concatenated_forward

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4}


def batch_of(rows: list[dict], *, ranked: bool = False) -> tuple[list[dict], dict]:
    """(the tokenised rows, their batch with shared prompts)."""
    made = list(prepare_dataset({"rows": Dataset.from_list(rows)}, make_tokenizer(), ranked=ranked))
    return made, DataCollatorForPreference(0, "prefix_shared")(made)


def flops_of(batch: dict, prices: dict) -> float:
    return float(costs.useful_flops(batch["lengths"], batch["tokens"], batch["unique_tokens"], **prices).sum())


def counted(step) -> dict[str, int]:
    """PyTorch's own count of the FLOPs of matrix products, by operator; attention's are those of bmm."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("lora", (False, True))
def test_flops_are_those_that_pytorch_counts(lora):
    model = make_model(**SIZES)
    attend_by_segments(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    rows, batch = batch_of(make_rows(4))
    step = counted(lambda: concatenated_forward(model, batch)["chosen_logps"].sum().backward())
    price = costs.prices(model, trains=True)
    matrices = flops_of(batch, price | {"pairs": {}})
    own = sum(flops for name, flops in step.items() if "bmm" not in name)
    # An adapter's step has no gradient for what goes into the first layer, which this counts: 1/18 of half of it.
    assert own <= matrices < own * (1.03 if lora else 1 + 1e-9)
    if lora:
        assert matrices < 0.72 * flops_of(batch, costs.prices(make_model(**SIZES), trains=True) | {"pairs": {}})

    # PyTorch's attention works out all cells of a segment's rectangle, of which those above the diagonal are no use.
    cells = useful = 0
    for row in rows:
        P, *completions = (len(row[f"{part}_input_ids"]) for part in ("prompt", "chosen", "rejected"))
        cells += (P + completions[0]) ** 2 + sum(
            C * (P + C) for C in completions[1:]
        )  # the prompt goes with the chosen
        useful += P * (P + 1) // 2 + sum(P * C + C * (C + 1) // 2 for C in completions)
    of_pairs = flops_of(batch, {"token": 0.0, "kept": 0.0, "pairs": price["pairs"]})
    attention = sum(step.values()) - own
    assert attention == pytest.approx(of_pairs * cells / useful, rel=0.03 if lora else 1e-9)  # nor for its keys

    forward = counted(lambda: torch.no_grad()(concatenated_forward)(model, batch))
    own = sum(flops for name, flops in forward.items() if "bmm" not in name)
    assert flops_of(batch, costs.prices(model, trains=False) | {"pairs": {}}) == pytest.approx(own, rel=1e-9)


@pytest.mark.parametrize("window", (None, 1, 4, 9, 30))
def test_pairs_of_queries_and_keys_of_rankings_are_those_of_a_mask(window):
    rows, batch = batch_of(make_rankings(6), ranked=True)
    counts = []
    for row in rows:
        P = len(row["prompt_input_ids"])
        for number, ids in enumerate((row["chosen_input_ids"], *row["rejected_input_ids"])):
            position = torch.arange(P + len(ids))
            distance = position[:, None] - position
            is_seen = (distance >= 0) & (distance < (window or 10**6))
            counts.append(int(is_seen[0 if number == 0 else P :].sum()))
    assert flops_of(batch, {"token": 0.0, "kept": 0.0, "pairs": {window: 1.0}}) == sum(counts)


def test_prices_of_experts_of_windows_and_of_a_second_adapter():
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    price = costs.prices(MixtralForCausalLM(MixtralConfig(**config, sliding_window=7)), trains=False)
    attention, router, expert = 16 * (16 + 8 + 8 + 16), 16 * 8, 3 * 16 * 24
    assert price == {"token": 2 * 2 * (attention + router + 2 * expert), "kept": 2 * 50 * 16, "pairs": {7: 2 * 4 * 16}}

    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    before = costs.prices(model, trains=True)
    assert before["kept"] == 6 * 400 * 48  # the copy that trains, once
    model.add_adapter("reference", LoraConfig(r=4, target_modules=["q_proj"]))
    assert costs.prices(model, trains=True) == before

    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    for other in (seq2seq, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no decoder"):
            costs.prices(other, trains=True)


def test_rows_that_stand_in_are_not_counted():
    _, batch = batch_of(make_rows(3))
    price, sums = costs.prices(make_model(), trains=True), dict.fromkeys(("unique_tokens", "best_seconds"), 0.0)
    batch["index"] = torch.tensor([0, 1, 2])
    costs.count(sums, [batch, {**batch, "index": torch.tensor([-1, -1, -1])}], [price, price], rate=1e9)
    assert sums["unique_tokens"] == batch["unique_tokens"].sum()
    assert sums["best_seconds"] == pytest.approx(2 * flops_of(batch, price) / 1e9)


def test_metrics_tell_utilisation_and_unique_tokens(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    done = start(tmp_path / "a", measure_utilisation=True)
    assert all(1e-4 < row["utilisation"] < 1 for row in done.rows[1:])
    assert "matrix products: " in caplog.text
    shares = [row["unique_tokens_per_second"] / row["tokens_per_second"] for row in done.rows]
    assert all(0.5 < share < 1 for share in shares)
    assert len(done.prices) == 2  # of policy and reference
    # Twice the rate is half the share; without a live reference a quarter less.
    monkeypatch.setattr("dpo.costs.matrix_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr("dpo.loop.time.perf_counter", iter(range(10**6)).__next__)
    live = start(tmp_path / "b", measure_utilisation=True).rows[-1]["utilisation"]
    monkeypatch.setattr("dpo.costs.matrix_rate", lambda device, dtype: 2e12)
    assert start(tmp_path / "c", measure_utilisation=True).rows[-1]["utilisation"] == pytest.approx(live / 2)
    alone = start(tmp_path / "d", measure_utilisation=True, reference_free=True).rows[-1]["utilisation"]
    assert alone == pytest.approx(live / 2 * 3 / 4)
    assert "utilisation" not in start(tmp_path / "e").rows[-1]
    monkeypatch.setattr("dpo.costs.prices", lambda model, trains: costs.share_of_experts(model.config))
    assert "utilisation" not in start(tmp_path / "f", measure_utilisation=True).rows[-1]
    assert "utilisation is left out: its configuration does not say how many experts" in caplog.text


def test_a_profile_holds_forward_and_backward_of_three_steps(tmp_path):
    done = start(tmp_path / "a", profile=True, per_device_train_batch_size=4)  # of 6 steps
    with gzip.open(tmp_path / "a" / "profile" / "trace-rank0.json.gz") as file:
        events = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert {"aten::mm", "aten::_log_softmax", "MmBackward0", "LogSoftmaxBackward0"} <= set(events)
    assert sorted({name for name in events if "AdamW.step" in name}) and events.count("Optimizer.step#AdamW.step") == 3
    assert "aten::mm" in (tmp_path / "a" / "profile" / "operators-rank0.txt").read_text()
    assert all(row["tokens_per_second"] > 0 for row in done.rows)

    again = start(tmp_path / "a", max_steps=1, overwrite_output_dir=True)
    assert not (again.output_dir / "profile").exists()  # the earlier run's
    with pytest.raises(UserError, match="profile begins at step 3 of a start, 2 are left"):
        start(tmp_path / "b", profile=True, max_steps=2)
    with pytest.raises(UserError, match="profile begins"):
        start(tmp_path / "a", profile=True, max_steps=2, overwrite_output_dir=True)
    assert (tmp_path / "a" / "model.safetensors").exists()  # what is refused deletes nothing
    (tmp_path / "c" / "profile").mkdir(parents=True)
    with pytest.raises(UserError, match="is in the way of profile, and no run wrote it"):
        start(tmp_path / "c", profile=True)


def test_a_profile_spans_epochs_and_begins_anew_where_a_run_goes_on(tmp_path):
    options = {"profile": True, "rows": make_rows(8), "num_train_epochs": 6, "save_strategy": "steps", "save_steps": 3}
    first = start(tmp_path, **options)  # a step an epoch
    trace = tmp_path / "profile" / "trace-rank0.json.gz"
    assert gzip.decompress(trace.read_bytes()).count(b"Optimizer.step#AdamW.step") == 3
    trace.unlink()
    second = start(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-3"), **options)
    assert gzip.decompress(trace.read_bytes()).count(b"Optimizer.step#AdamW.step") == 1  # the sixth, its third
    assert all(
        torch.equal(a, b) for a, b in zip(*(weights(each.model).values() for each in (first, second)), strict=True)
    )


def test_the_parts_of_memory_that_can_be_told_are_exact(tmp_path):
    for name in ("adamw_torch", "sgd", "rmsprop"):
        done = start(tmp_path / name, optim=name, max_steps=1)
        held = sum(p.nbytes for p in done.model.parameters())
        state = [v for each in done.optimizer.state.values() for v in each.values()]
        assert done.memory["gradients"] == done.memory["reference"] == held
        assert done.memory["weights"] == pytest.approx(held, rel=1e-2)  # and rotary's few
        assert done.memory["optimizer"] == pytest.approx(sum(map(torch.Tensor.numel, state)) * 4, rel=1e-2, abs=1)
    adapter = start(tmp_path / "lora", peft_config={"r": 4}, max_steps=1)
    assert adapter.memory["reference"] == 0 and adapter.memory["gradients"] < held / 10


def test_a_run_does_not_depend_on_what_cannot_be_told(tmp_path, monkeypatch, caplog):
    """Here an optimizer that another like it cannot be made of, and a family without attention."""
    caplog.set_level("INFO")

    class Own(torch.optim.AdamW):
        def __init__(self, model):
            super().__init__(model.parameters(), lr=1e-3)

    model = make_model()
    done = start(tmp_path / "a", model, max_steps=1, optimizers=(Own(model), None))
    assert not done.memory and "memory: not predicted, " in caplog.text
    start(tmp_path / "b", families.build("mamba"), max_steps=1, measure_utilisation=True)
    assert "utilisation is left out: it has no attention" in caplog.text


def test_memory_goes_on_linearly_to_the_largest_batch():
    assert costs.line(1, 10, 3, 14, at=10) == 28 and costs.line(3, 14, 3, 14, at=6) == 28


SHAPES = {  # options of a model of six layers, and of a run
    "full": ({}, {"layout": "padded"}),
    "shared": ({}, {"layout": "prefix_shared"}),
    "checkpointing": ({}, {"layout": "padded", "gradient_checkpointing": True}),
    "lora": ({}, {"peft_config": {"r": 8, "target_modules": "all-linear"}}),
    "vocabulary": ({"vocab_size": 20000}, {"layout": "prefix_shared"}),
    "weights": ({"hidden_size": 768}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}),
}


def main(shape: str, output_dir: str) -> None:
    """A run in a process of its own, for the next test: prints its memory."""
    config, options = SHAPES[shape]
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 1024}
    model = make_model(**{**sizes, "initializer_range": 0.02, **config})
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(most // 2, most)))

    rows = [{"prompt": words(120), "chosen": words(120), "rejected": words(120)} for _ in range(16)]
    print(json.dumps(start(Path(output_dir), model, rows, max_steps=2, **options).memory))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_as_predicted(shape, tmp_path):
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is free, at once
    done = run("test_costs", shape, str(tmp_path), cwd=Path(__file__).parent, env=give_back)
    memory = json.loads(done.stdout.splitlines()[-1])
    assert 0.8 < memory["peak"] / memory["measured"] < 1.25, memory


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
