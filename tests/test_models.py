"""What a policy is made of: how models and tokenizers are loaded, adapters added, dropout switched off."""

import pytest
import torch
from conftest import make_model, make_rows, make_tokenizer, same, start, weights
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, GPT2Config

from dpo.config import DPOConfig
from dpo.loop import train
from dpo.models import disable_dropout, load_model, load_tokenizer, make_optimizer


def lora(model: torch.nn.Module, **options) -> torch.nn.Module:
    """A model with an adapter that does something: its B is not 0."""
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options))
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return adapter


def test_model_options_reach_from_pretrained(model_dir, tmp_path, monkeypatch):
    calls, tokenizers = [], []
    load, load_its_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained
    known = ("dtype", "revision", "attn_implementation", "trust_remote_code", "attention_dropout")

    def spy(name, **options):
        calls.append((name, {key: options.get(key) for key in known}))
        return load(name, **{key: value for key, value in options.items() if key != "trust_remote_code"})

    def spy_tokenizer(name, **options):
        tokenizers.append(options)
        return load_its_tokenizer(name)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spy_tokenizer)
    reference = tmp_path / "reference"
    make_model(seed=9).save_pretrained(reference)
    options = {"model_name_or_path": str(model_dir), "ref_model_name_or_path": str(reference), "model_revision": "v2"}
    options |= {"dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": True, "max_steps": 1}
    options |= {"model_init_kwargs": {"attention_dropout": 0.1}, "ref_model_init_kwargs": {"attention_dropout": 0.2}}
    args = DPOConfig(output_dir=str(tmp_path / "out"), save_strategy="no", disable_tqdm=True, **options)
    run = train(args=args, train_dataset=make_rows(8))
    common = {"dtype": "bfloat16", "attn_implementation": "eager", "trust_remote_code": True}
    assert calls == [
        (str(model_dir), {**common, "revision": "v2", "attention_dropout": 0.1}),
        (str(reference), {**common, "revision": "main", "attention_dropout": 0.2}),
    ]
    assert tokenizers == [{"revision": "v2", "trust_remote_code": True}]
    assert run.model.dtype == torch.bfloat16 and run.model.config._attn_implementation == "eager"
    assert run.rows[0]["rewards/chosen"] != 0  # another reference


def test_weights_are_float32_unless_asked_otherwise(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16


def test_an_adapter_comes_in_the_revision_that_is_named_with_its_base_and_the_bases_tokenizer(tmp_path, monkeypatch):
    """A cache as the Hub's client keeps it, of a repository of adapters, with two revisions of different bases."""
    repository, made = tmp_path / "models--someone--adapter", {}
    for seed, revision in enumerate(("main", "v2")):
        make_model(seed=seed).save_pretrained(tmp_path / revision)
        make_tokenizer().save_pretrained(tmp_path / revision)
        made[revision] = lora(load_model(str(tmp_path / revision)))
        made[revision].save_pretrained(repository / "snapshots" / f"of-{revision}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"of-{revision}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, adapter in made.items():
        loaded = load_model("someone/adapter", revision=revision)
        assert same(weights(loaded), weights(adapter)) and loaded.active_adapter == "default"
        assert any(parameter.requires_grad for parameter in loaded.parameters())
        snapshot = str(repository / "snapshots" / f"of-{revision}")  # PEFT saves no tokenizer with an adapter
        for where, at in (("someone/adapter", {"revision": revision}), (snapshot, {})):
            assert load_tokenizer(where, **at).eos_token == "<|im_end|>"


def test_a_tokenizer_without_a_padding_token_pads_with_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|im_end|>"
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "<|pad|>"


def test_weight_decay_spares_norms():
    groups = make_optimizer(make_model(), learning_rate=1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"]) and len(groups[1]["params"]) == 5


# ------------------------------------------------------------------------------------------------ adapters and dropout


def test_lora_options_shape_the_adapter(tmp_path):
    options = {"lora_r": 3, "lora_alpha": 12, "lora_dropout": 0.25, "lora_target_modules": ["o_proj"]}
    model = start(tmp_path, use_peft=True, lora_modules_to_save=["lm_head"], max_steps=1, **options).model
    made = model.peft_config["default"]
    assert (made.r, made.lora_alpha, made.lora_dropout, made.target_modules) == (3, 12, 0.25, {"o_proj"})
    trained = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B", "modules_to_save"}
    everywhere = start(tmp_path / "all", use_peft=True, lora_target_modules=["all-linear"], max_steps=1).model
    adapted = {name.split(".")[-4] for name, _ in everywhere.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_seed_draws_the_new_weights_of_an_adapter(tmp_path):
    def new_weights(seed: int, random_numbers_before: int) -> torch.Tensor:
        model = make_model()
        torch.manual_seed(random_numbers_before)
        options = {"use_peft": True, "max_steps": 1, "learning_rate": 0.0, "overwrite_output_dir": True}
        trained = start(tmp_path, model, make_rows(8), seed=seed, **options).model
        return torch.cat([value.flatten() for name, value in trained.named_parameters() if "lora_A" in name])

    assert torch.equal(new_weights(1, 5), new_weights(1, 6))
    assert not torch.equal(new_weights(1, 5), new_weights(2, 5))


GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.3, "attn_pdrop": 0.3}
FALCON = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_dropout": 0.4}


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoModelForCausalLM.from_config(GPT2Config(**GPT2)),
        lambda: AutoModelForCausalLM.from_config(FalconConfig(**FALCON)),
        lambda: make_model(attention_dropout=0.4),
    ],
    ids=["layers", "configuration", "attention"],
)
def test_disable_dropout_leaves_nothing_random(make):
    model, ids = make().train(), torch.arange(1, 9)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_disable_dropout_leaves_an_adapter_its_own(tmp_path, model_dir):
    lora(load_model(str(model_dir)), lora_dropout=0.25).save_pretrained(tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), attention_dropout=0.3)
    disable_dropout(loaded)
    new = start(tmp_path / "out", use_peft=True, lora_dropout=0.25, max_steps=1).model
    for model in (loaded, new):
        dropouts = {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")}
        assert dropouts == {0.25} and model.peft_config["default"].lora_dropout == 0.25
        assert model.get_base_model().model.layers[0].self_attn.attention_dropout == 0
