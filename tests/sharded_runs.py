"""The runs that test_sharding.py compares: `torchrun sharded_runs.py FOLDER PROCESSES HOW NAME ...` makes several, one
after the other, in one group of processes; without torchrun HOW is alone."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import sys
from pathlib import Path

import torch
import transformers
from conftest import make_model, make_rankings, make_rows, make_tokenizer, start
from peft import LoraConfig, get_peft_model
from test_images import answer, picture, said, see
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import dpo.distributed
from dpo.config import UserError

ROWS, EVAL_ROWS = make_rows(21), make_rows(7, seed=1)  # the last window of 8 has 5
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"]}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": EVAL_ROWS, "per_device_eval_batch_size": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "logging_steps": 3}
KEPT = {
    "full": {},
    "lora": LORA,
    "bco": {"loss_type": "bco_pair"},
    "synced": {**SYNCED, "gradient_checkpointing": True},
}
KEPT |= {"4 bits": {**LORA, "load_in_4bit": True}}
CASES = {
    "full": {"max_grad_norm": 0.5},
    "accumulated": {"gradient_accumulation_steps": 2},
    "tied": {"model": "tied"},
    "whole object": {"model": lambda folder: AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="float32")},
    "rearranged": {"model": "mixtral"},  # its files have the experts otherwise than the model
    "encoder-decoder": {"model": "bart"},
    "partly frozen": {"model": lambda folder: partly_frozen(folder)},
    "rmsprop": {"optim": "rmsprop"},
    "sees": {"model": lambda folder: AutoModelForImageTextToText.from_pretrained(folder / "eyes"), "sees": True},
    "padded": {"layout": "padded"},
    "padding_free": {"layout": "padding_free"},
    "by tokens": {"max_tokens_per_micro_batch": 40},
    "in chunks": {"logits_budget": 1e-5},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "layout": "padded"},
    "lora": LORA,
    "lora, accumulated": {**LORA, "gradient_accumulation_steps": 2},
    "lora and head": {**LORA, "lora_modules_to_save": ["lm_head"]},
    "dora": {**LORA, "use_dora": True},
    "4 bits": {**LORA, "load_in_4bit": True},
    "trained adapter": {"model": "adapter"},
    "trained head": {"model": "with-head"},
    "a name of its own": {**LORA, "lora_modules_to_save": ["lm_head"], "model_adapter_name": "my-own"},
    "in 16 bits": {"bf16": True, "save_strategy": "epoch"},
    "of 16 bits": {"dtype": "bfloat16", "save_strategy": "epoch"},
    "cached": {"precompute_ref_log_probs": True, "ref_cache_dir": "cache"},
    "another": {"ref_model_name_or_path": "other"},
    "none": {"loss_type": "simpo"},
    "synced": SYNCED,
    "synced lora": {**SYNCED, **LORA},
    "sorted": {"loss_type": "aot", "gradient_accumulation_steps": 2},
    "bco": {"loss_type": "bco_pair"},
    "ranked": {"loss_type": "plackett_luce", "rows": make_rankings(21)},
    **{f"saved {name}": {**SAVED, **more} for name, more in KEPT.items()},
    "evaluated": {**EVALUATED, "generate_during_eval": True, "num_samples": 5, "max_new_tokens": 8},
    "evaluated lora": {**LORA, **EVALUATED, "generate_during_eval": True, "num_samples": 5, "max_new_tokens": 8},
}
KEYS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "tokens_seen")


def make_models(folder: Path) -> None:
    """All models of the cases, saved as users have them."""
    tied = make_model(seed=3, tie_word_embeddings=True)
    sizes = {"vocab_size": 400, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "decoder_start_token_id": 2}
    text = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    made = {"llama": make_model(), "other": make_model(seed=2), "tied": tied}
    made["mixtral"] = transformers.MixtralForCausalLM(transformers.MixtralConfig(**text, num_local_experts=4))
    made["bart"] = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **ids))
    for name, model in made.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    common = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    lora = LoraConfig(**common)
    made["bart"].final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))  # a buffer
    made["bart"].save_pretrained(folder / "bart")
    made["llama"].name_or_path = str(folder / "llama")
    get_peft_model(made["llama"], lora).save_pretrained(folder / "adapter")
    lora = LoraConfig(**common, modules_to_save=["lm_head"])
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="float32")
    with_head = get_peft_model(base, lora)
    with torch.no_grad():
        with_head.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    with_head.save_pretrained(folder / "with-head")
    model, processor = see("llava")
    model.save_pretrained(folder / "eyes")
    processor.save_pretrained(folder / "eyes")


def partly_frozen(folder: Path):
    """A model whose embeddings and first block do not train: a reference may share them."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="float32")
    for module in (model.model.embed_tokens, model.model.layers[0]):
        module.requires_grad_(False)
    return model


def rows_with_pictures() -> list[dict]:
    """Of three rows one has a picture: a process's batch may have none."""
    return [
        {
            "images": [picture(i)] * (i % 3 == 0),
            "prompt": said(row["prompt"], int(i % 3 == 0)),
            "chosen": answer(row["chosen"]),
            "rejected": answer(row["rejected"]),
        }
        for i, row in enumerate(ROWS)
    ]


def go(folder: Path, name: str, how: str, processes: int, **more):
    """One run of a case, on so many processes, with a window of 8 pairs; "CASE@RUN" goes on with another run's second
    checkpoint, after step 4 of 6."""
    case, _, run = name.partition("@")
    options = {"model": "llama", "rows": ROWS, "seed": 5, **CASES[case], **more}
    options |= {"resume_from_checkpoint": str(folder / run / "checkpoint-4")} if run else {}
    model = options.pop("model")
    model = str(folder / model) if isinstance(model, str) else model(folder)
    if options.pop("sees", False):
        options |= {"rows": rows_with_pictures(), "processing_class": AutoProcessor.from_pretrained(folder / "eyes")}
    for option in ("ref_model_name_or_path", "ref_cache_dir"):
        options |= {option: str(folder / options[option])} if option in options else {}
    before = int(run.split("-")[1]) if run else processes  # one that goes on has the command line of the one before
    batch = 8 // before // options.get("gradient_accumulation_steps", 1)
    options |= {"per_device_train_batch_size": batch, "use_cpu": True, "overwrite_output_dir": True}
    options |= {"fsdp": "full_shard"} if how == "fsdp" else {}
    return start(
        folder / f"{how}-{processes}-{name}", model, options.pop("rows"), options.pop("eval_rows", None), **options
    )


def told(run) -> list[dict]:
    """What the metrics rows of a run say, but for what the clock decides."""
    keys = (*KEYS, *(f"eval_{key}" for key in KEYS))
    return [{key: row[key] for key in ("step", *keys) if key in row} for row in run.rows]


def main(folder: Path, processes: int, how: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        try:
            left = told(go(folder, name, how, processes))
        except UserError as error:
            left = str(error)
        if dpo.distributed.is_first():
            (folder / f"{how}-{processes}-{name}.json").write_text(json.dumps(left))
    dpo.distributed.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
