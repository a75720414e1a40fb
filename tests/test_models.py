"""What a policy is made of: how models and tokenizers are loaded, adapters added, dropout switched off."""

import json
import os

import pytest
import torch
import transformers
from conftest import make_model, make_rows, make_tokenizer, same, start, weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, GPT2Config, TrainerCallback

from dpo.config import DPOConfig, UserError
from dpo.loop import train
from dpo.models import disable_dropout, load_model, load_processor, make_optimizer


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
    assert run.model.dtype == torch.bfloat16
    assert run.model.config._attn_implementation == "segments_else_eager"  # of batches that are no flat rows
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
            assert load_processor(where, **at).eos_token == "<|im_end|>"


def test_a_tokenizer_without_a_padding_token_pads_with_eos(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_processor(str(tmp_path)).pad_token == "<|im_end|>"
    make_tokenizer().save_pretrained(tmp_path)
    assert load_processor(str(tmp_path)).pad_token == "<|pad|>"


def test_weight_decay_spares_norms():
    groups = make_optimizer(make_model(), learning_rate=1e-3, weight_decay=0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"]) and len(groups[1]["params"]) == 5


# ------------------------------------------------------------------------------------------------- adapters and dropout


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


# --------------------------------------------------------------------------------------------------- folders gone wrong


def of_weights(change):
    """Changes the weights of a model folder."""

    def apply(folder):
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return apply


def of_config(**changes):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        config.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config | changes))

    return apply


def with_nan(weights):
    weights["lm_head.weight"][3, 4] = float("nan")
    return weights


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
BROKEN = {
    "compiled": (of_weights(lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}), "lack .* but _orig_mod.lm_head"),
    "wrapped": (of_weights(lambda w: {f"module.{k}": v for k, v in w.items()}), "lack weights .* but module.lm_"),
    "one missing": (of_weights(lambda w: {k: v for k, v in w.items() if "1.mlp.up" not in k}), "layers.1.mlp.up_proj"),
    "more layers": (of_config(num_hidden_layers=3), "lack weights that fit: model.layers.2"),
    "other shapes": (of_config(intermediate_size=64), "lack weights that fit: model.layers.0.mlp"),
    "not finite": (of_weights(with_nan), "is broken: the weights of lm_head.weight are not all finite"),
    "cut": (lambda folder: os.truncate(folder / "model.safetensors", 1000), "cannot load the model"),
    "pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "cannot load the model"),
    "no config": (lambda folder: (folder / "config.json").write_text("{"), "cannot load the model"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("garbage"), "names no base model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_folder_that_is_not_whole_is_refused_in_one_line(name, tmp_path):
    make_model().save_pretrained(tmp_path)
    change, words = BROKEN[name]
    change(tmp_path)
    with pytest.raises(ValueError, match=words) as refused:
        load_model(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("missing", ["weights", "all but one"])
def test_an_adapter_without_all_of_its_weights_is_refused(missing, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    get_peft_model(load_model(str(tmp_path / "base")), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    assert isinstance(load_model(str(tmp_path)), PeftModel)
    save_file({f"x.{k}": v for k, v in saved.items()} if missing == "weights" else dict([saved.popitem()]), path)
    with pytest.raises(ValueError, match="lack weights that fit: .*lora_"):
        load_model(str(tmp_path))


def test_an_adapter_of_a_resized_vocabulary_is_loaded_as_it_was_trained(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = load_model(str(tmp_path / "base"))
    model.resize_token_embeddings(410)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    loaded, ids = load_model(str(tmp_path)), torch.tensor([[1, 409, 5]])
    assert torch.equal(loaded(ids).logits, adapted.eval()(ids).logits)


def test_rows_with_ids_that_the_model_has_not_are_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(100)])
    rows = [{"prompt": "the sky", "chosen": " <99>", "rejected": " green"}]
    model = make_model(vocab_size=len(tokenizer) - 1)
    with pytest.raises(
        ValueError, match=f"gives the id {len(tokenizer) - 1}, the model knows {len(tokenizer) - 1} tok"
    ):
        train(model, args=DPOConfig(output_dir=str(tmp_path)), train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(ValueError, match="gives the id 100000, the model knows 400 tokens"):
        start(tmp_path, padding_value=100_000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_config": {"target_modules": ["q_proj", "vproj"]}}, "target_modules 'vproj' is no module .* v_proj"),
        ({"peft_config": {"modules_to_save": ["head"]}}, "modules_to_save 'head' is no module of the model: it has"),
        ({"peft_config": {"rank": 3}}, "peft_config: .*unexpected keyword argument 'rank'"),
        ({"fp16": True, "model": make_model().half()}, "fp16 needs float32 weights, .* is in float16"),
        ({"model": make_model().requires_grad_(False)}, "no parameter that trains"),
        ({"callbacks": [TrainerCallback()]}, "callbacks are functions of a metrics row, not TrainerCallback"),
        ({"eval_rows": make_rows(2)}, "eval_dataset does nothing without an eval_strategy"),
        ({"ddp_backend": "gloo"}, "ddp_backend does nothing in a single process"),
        ({"torch_compile": True, "torch_compile_backend": "fast"}, "torch_compile_backend 'fast': choose one of"),
        ({"torch_compile": True, "torch_compile_mode": "fast"}, "torch_compile_mode 'fast': choose one of default"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"reentrant": 1}}, "has 'reentrant', which"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_type linear with .*unexpected keyword argument 'foo'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr with .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay with .*num_decay_steps"),
        ({"ref_model_init_kwargs": {"a": 1}}, "ref_model_init_kwargs does nothing without a reference"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(options, words, tmp_path):
    with pytest.raises(UserError, match=words):
        start(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_forward_that_would_tie_the_reference_to_the_policy_is_refused(tmp_path):
    model = make_model()
    original = model.forward
    model.forward = lambda **inputs: original(**inputs)
    with pytest.raises(UserError, match="the forward of LlamaForCausalLM was replaced"):
        start(tmp_path, model=model)
    start(tmp_path, model=model, ref_model=make_model(), max_steps=1)  # a reference of its own is none of the policy's


def test_settings_for_generation_that_cannot_be_saved_do_not_cost_the_trained_weights(tmp_path):
    model = make_model()
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, False
    start(tmp_path, model=model, max_steps=1)
    assert (tmp_path / "model.safetensors").exists()


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, intermediate_size=32))
    with pytest.raises(UserError, match="BertLMHeadModel sees later tokens, it is no causal language model"):
        start(tmp_path / "a", model=bert)
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, intermediate_size=32, is_decoder=True))
    start(tmp_path / "b", model=decoder, max_steps=1)


def test_weights_of_an_object_that_are_not_finite_are_named(tmp_path):
    model = make_model()
    model.lm_head.weight.data[3, 4] = float("nan")
    with pytest.raises(UserError, match="the model is broken: the weights of lm_head.weight are not all finite"):
        start(tmp_path, model=model)
