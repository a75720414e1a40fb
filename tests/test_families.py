"""Encoder-decoders, mixtures of experts, models that the caller built, and what all of them generate."""

import copy
import json
import math
import sys
from types import SimpleNamespace

import families
import pytest
import safetensors.torch
import torch
import transformers
from conftest import curve, make_model, make_rows, make_tokenizer, run, start, weights
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model

from dpo import attention, chat, checks, sampling, trial
from dpo.collate import DataCollatorForPreference, decoder_start_ids, encoder_decoder_batch
from dpo.config import UserError
from dpo.data import prepare_dataset, truncate_row
from dpo.logprobs import concatenated_forward
from dpo.models import load_model
from dpo.reference import Reference, reference_digest, without_aux_loss
from dpo.sources import load_preferences

ROWS = make_rows(12)
HALVES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
HALVES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "init_std": 0.2}
HALVES |= {"vocab_size": 400, "pad_token_id": 0, "eos_token_id": 2}
T5 = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
T5 |= {"eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.1}
APART = {
    "t5": lambda: transformers.T5Config(**T5),
    "bart": lambda: transformers.BartConfig(**HALVES, decoder_start_token_id=2, bos_token_id=3),
    "marian": lambda: transformers.MarianConfig(**HALVES, decoder_start_token_id=0),
    "bart that begins with BOS": lambda: transformers.BartConfig(**HALVES, decoder_start_token_id=2, bos_token_id=3),
}
TEXT = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": None, "eos_token_id": 2}
MIXTURES = {
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **TEXT, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts_per_tok=2
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
}


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    apart = config.is_encoder_decoder
    kind = transformers.AutoModelForSeq2SeqLM if apart else transformers.AutoModelForCausalLM
    return kind.from_config(config).eval()


def prepared(rows: list[dict], **options):
    return prepare_dataset(load_preferences(rows), make_tokenizer(), **options)


# ----------------------------------------------------------------------------------------------------- encoder-decoders


@pytest.mark.parametrize("family", APART)
def test_an_encoder_decoder_trains_as_its_configuration_says(family, tmp_path):
    """In a batch as alone, by the model's own labels: the prompt and its EOS in the encoder, the completion in the
    decoder, whatever that begins with."""
    model = build(APART[family]())
    model.generation_config.forced_bos_token_id = 3 if "BOS" in family else None
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = {"max_steps": 2, "eval_strategy": "steps", "generate_during_eval": True, "max_new_tokens": 4}
    run_ = start(tmp_path / "run", str(tmp_path / "model"), ROWS, ROWS[:3], **options)
    rows = [run_.train_rows[i] for i in range(len(run_.train_rows))]
    eos, told = 2, make_tokenizer()
    assert rows[0]["prompt_input_ids"] == told(ROWS[0]["prompt"])["input_ids"] + [eos]
    result = concatenated_forward(model, run_.collator(rows))
    forced = [3] if "BOS" in family else []
    for row, *logps in zip(rows, result["chosen_logps"].tolist(), result["rejected_logps"].tolist(), strict=True):
        for which, logp in zip(("chosen", "rejected"), logps, strict=True):
            labels = torch.tensor([forced + row[f"{which}_input_ids"]])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["prompt_input_ids"]]), labels=labels).logits[0]
            by_hand = logits.double().log_softmax(-1).gather(-1, labels.T)[len(forced) :].sum()
            assert float(by_hand) == pytest.approx(logp, abs=1e-4)
    assert curve(run_)[0] == pytest.approx(math.log(2), abs=1e-4) and curve(run_)[1] != pytest.approx(
        math.log(2), abs=1e-5
    )
    again = concatenated_forward(load_model(str(tmp_path / "run")), run_.collator(rows))
    assert torch.allclose(again["chosen_logps"], concatenated_forward(run_.model, run_.collator(rows))["chosen_logps"])
    answers = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(sample["prompt"] and sample["policy"] for sample in answers)
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "run" / "README.md").read_text()
    with pytest.raises(UserError, match="is_encoder_decoder is False, the model's configuration says True"):
        start(tmp_path / "no", copy.deepcopy(model), ROWS, is_encoder_decoder=False)


def test_the_batch_of_an_encoder_decoder_is_the_document_s():
    rows = [{"prompt_input_ids": [5, 6], "chosen_input_ids": [7, 8, 2], "rejected_input_ids": [9, 2]}]
    rows += [{"prompt_input_ids": [5], "chosen_input_ids": [2], "rejected_input_ids": [9, 9, 2]}]
    batch = DataCollatorForPreference(0, "padded", decoder_start_ids=[1], label_pad_token_id=-7)(rows)
    assert batch["labels"].tolist() == [[7, 8, 2], [2, -7, -7], [9, 2, -7], [9, 9, 2]]
    assert batch["inputs"]["input_ids"].tolist() == [[5, 6], [5, 0]] * 2  # padding at the end: BART counts positions
    assert batch["inputs"]["decoder_input_ids"].tolist() == [[1, 7, 8], [1, 2, 0], [1, 9, 2], [1, 9, 9]]
    assert batch["targets"].tolist() == [7, 8, 2, 2, 9, 2, 9, 9, 2] and batch["lengths"].tolist() == [3, 1, 2, 3]
    assert batch["owner"].tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3] and batch["tokens"].tolist() == [9, 6]
    plain = DataCollatorForPreference(0)(rows)
    assert torch.equal(
        encoder_decoder_batch(plain, [1])["labels"], batch["labels"].masked_fill(batch["labels"] == -7, -100)
    )
    t5 = build(APART["t5"]())  # a plain batch is made ready as the model's configuration wants it
    logps = [concatenated_forward(t5, each)["chosen_logps"] for each in (plain, encoder_decoder_batch(plain, [0]))]
    assert torch.equal(*logps)


def test_options_of_encoder_decoders_reach_it_or_are_refused(tmp_path):
    t5 = build(APART["t5"]())
    assert start(tmp_path / "a", t5, ROWS, max_steps=1, label_pad_token_id=-5).collator.label_pad_token_id == -5
    with pytest.raises(UserError, match="label_pad_token_id does nothing without an encoder-decoder"):
        start(tmp_path / "b", rows=ROWS, label_pad_token_id=-5)
    t5.config.decoder_start_token_id = t5.generation_config.decoder_start_token_id = None
    with pytest.raises(UserError, match="has no decoder_start_token_id"):
        start(tmp_path / "c", t5, ROWS)
    with pytest.raises(UserError, match="rows have up to .* tokens, the model has 5 positions"):
        start(tmp_path / "d", build(transformers.BartConfig(**HALVES | {"max_position_embeddings": 5})), ROWS)


@pytest.mark.parametrize("kind", ["adapter", "cached"])
def test_an_encoder_decoder_has_every_reference(kind, tmp_path):
    options = {"peft_config": {"r": 4}} if kind == "adapter" else {"precompute_ref_log_probs": True}
    options |= {"ref_cache_dir": str(tmp_path / "cache")} if kind == "cached" else {}
    losses = curve(start(tmp_path / "run", build(APART["bart"]()), ROWS, max_steps=2, **options))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] != pytest.approx(math.log(2), abs=1e-5)
    if kind == "cached":
        assert losses == pytest.approx(
            curve(start(tmp_path / "b", build(APART["bart"]()), ROWS, max_steps=2)), abs=1e-6
        )


# -------------------------------------------------------------------------------------------------- mixtures of experts


def balance(router_logits: tuple, mask: torch.Tensor, experts: int, top: int) -> float:
    """The load balance of Fedus et al. 2022, eq. 4, over all layers: experts · Σ_e (share of tokens)·(mean weight)."""
    kept = mask.bool().flatten()
    logits = torch.cat([layer.double()[kept] for layer in router_logits])
    weights = logits.softmax(-1)
    chosen = weights.topk(top, dim=-1).indices
    share = torch.stack([(chosen == e).double().sum(dim=0) / len(logits) for e in range(experts)])
    return float(experts * (share.sum(dim=1) * weights.mean(dim=0)).sum())


@pytest.mark.parametrize("family", MIXTURES)
def test_the_load_balance_of_a_mixture_of_experts_is_added_to_the_loss(family, tmp_path):
    """By eq. 4, of the policy alone, in training and evaluation; and generation does without it."""
    model = build(MIXTURES[family]())
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "max_steps": 2, "eval_strategy": "steps"}
    options |= {"eval_on_start": True, "generate_during_eval": True, "max_new_tokens": 3}
    run_ = start(tmp_path / "run", copy.deepcopy(model), ROWS, ROWS[:4], **options)
    first, row = run_.rows[:2]
    batch = run_.collator([run_.eval_sets[""][i] for i in range(4)])
    ids, mask = (batch["inputs"][key] for key in ("input_ids", "attention_mask"))
    routed = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    by_hand = balance(routed, mask, 4, model.config.num_experts_per_tok)
    assert first["eval_aux_loss"] == pytest.approx(by_hand, rel=1e-4)
    assert first["eval_loss"] == pytest.approx(math.log(2) + 0.5 * by_hand, rel=1e-4)
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * row["aux_loss"], rel=1e-5)
    plain = start(tmp_path / "plain", copy.deepcopy(model), ROWS, max_steps=2)
    assert "aux_loss" not in plain.rows[0] and curve(plain)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_does_not_work_out_the_load_balance(monkeypatch):
    model = build(MIXTURES["mixtral"]())
    model.config.output_router_logits, asked = True, []
    batch = DataCollatorForPreference(0, "padded")([prepared(ROWS)[0]])
    model.register_forward_hook(lambda *arguments: asked.append(arguments[-1].router_logits))
    Reference(policy=None, ref_model=model)(batch)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    Reference(policy=adapted)(batch)
    assert asked == [None, None] and model.config.output_router_logits
    concatenated_forward(adapted, batch)
    assert asked[-1] is not None


def test_options_of_mixtures_are_refused_where_there_is_none(tmp_path):
    for options, words in (
        ({"output_router_logits": True}, "output_router_logits: LlamaForCausalLM has no load balance"),
        ({"router_aux_loss_coef": 0.1}, "LlamaForCausalLM has no load balance"),
    ):
        with pytest.raises(UserError, match=words):
            start(tmp_path / "a", rows=ROWS, **options)
    with pytest.raises(UserError, match="router_aux_loss_coef does nothing without output_router_logits"):
        start(tmp_path / "b", build(MIXTURES["mixtral"]()), ROWS, router_aux_loss_coef=0.1)


def test_what_a_family_cannot_do_is_refused_by_its_name(tmp_path):
    """Experts with room for so many tokens of a batch, and layers that are noisy in training."""

    class Crowded(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            return output if len(options["input_ids"]) == 2 else SimpleNamespace(logits=output.logits * 0.9)

    class Other(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            return SimpleNamespace(logits=output.logits * (0.9 if self.training else 1))

    class Broken(transformers.LlamaForCausalLM):
        def forward(self, *arguments, **options):
            raise IndexError("deep down")

    for kind, words in (
        (Crowded, "Crowded gives a completion other log-probabilities beside other rows than alone"),
        (Other, "Other gives other log-probabilities in training than in evaluation, without dropout"),
        (Broken, "Broken cannot read the rows: deep down"),
    ):
        with pytest.raises(UserError, match=words):
            start(tmp_path / kind.__name__, kind(make_model().config), ROWS)


# ------------------------------------------------------------------------------------------- models that callers built


class Own(torch.nn.Module):
    """A causal model that is no transformers model: it takes ids alone, and gives logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = torch.nn.Embedding(400, 32)
        self.body, self.head = torch.nn.GRU(32, 64, batch_first=True), torch.nn.Linear(64, 400)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.body(self.embeddings(input_ids))[0]))


def test_a_plain_module_with_logits_trains_and_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1, "learning_rate": 1e-2}
    whole = start(tmp_path / "a", Own(), ROWS, **options, eval_rows=ROWS[:3], eval_strategy="epoch")
    assert curve(whole)[0] == pytest.approx(math.log(2), abs=1e-6) and curve(whole)[-1] < 0.69
    saved = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights(whole.model).items())
    assert "weights of a module of its author's own" in (tmp_path / "a" / "README.md").read_text()
    resumed = {"resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-1"), "eval_rows": ROWS[:3]}
    again = start(tmp_path / "b", Own(), ROWS, **options, **resumed, eval_strategy="epoch")
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(again.model).items())
    words = "Own cannot generate: "
    with pytest.raises(UserError, match=words):
        start(tmp_path / "c", Own(), ROWS, ROWS[:3], eval_strategy="epoch", generate_during_eval=True)
    with pytest.raises(UserError, match="gradient_checkpointing: a Own has none"):
        start(tmp_path / "d", Own(), ROWS, gradient_checkpointing=True)


class Wrapped(torch.nn.Module):
    """What another library may put around a model: it hands on ids and mask alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("wrap", [Wrapped, torch.nn.DataParallel, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_a_wrapped_model_trains_as_the_model_in_it(wrap, tmp_path):
    options = {"backend": "eager"} if wrap is torch.compile else {}
    plain = curve(start(tmp_path / "plain", rows=ROWS, max_steps=3))
    assert curve(start(tmp_path / "run", wrap(make_model(), **options), ROWS, max_steps=3)) == pytest.approx(
        plain, abs=1e-5
    )


def test_a_model_whose_forward_another_library_replaced_trains_with_a_reference_of_its_own(tmp_path):
    model, calls = make_model(), []
    original = model.forward

    def faster(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    model.forward = faster
    plain = curve(start(tmp_path / "plain", rows=ROWS, max_steps=2))
    assert curve(start(tmp_path / "run", model, ROWS, max_steps=2, ref_model=make_model())) == pytest.approx(
        plain, abs=1e-6
    )
    assert calls


def test_a_processor_that_the_caller_changed_is_the_one_that_is_used_and_saved(tmp_path):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    rows = make_rows(4, conversational=True)
    run_ = start(tmp_path / "run", rows=rows, processing_class=tokenizer, max_steps=1)
    assert tokenizer.decode(run_.train_rows[0]["prompt_input_ids"]).startswith("user: ")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert saved.chat_template == tokenizer.chat_template


# -------------------------------------------------------------------------------------------------------- flat layouts

# Windows, soft-capping, sinks, latent attention with heads of two sizes, learned positions, shared keys and values.
TAKEN = "llama mistral gemma2 gemma3_text gemma3n_text gpt_oss qwen2_moe cohere2 deepseek_v3 opt".split()
LEFT = {  # kinds whose flat layouts are refused, and why
    "mamba": "cannot read it",
    "bloom": "cannot read it",
    "lfm2": "differs from padded by",
    "qwen3_next": "differs from padded by",
    "bart": "differs from padded by",
    "llama4_text": "differs from padded by",
    "llama4_text long": "differs from padded by",  # counts the tokens of a row: seen beside as many as a batch can have
    "inkling_text": "attention over segments has no position_bias",
}


@pytest.mark.parametrize("kind", [*TAKEN, *LEFT])
def test_a_flat_layout_is_exact_or_refused(kind):
    """Exact on other rows than it is chosen by, pairs and rankings, alone and in company; and so are its gradients."""
    rows = prepared(make_rows(8, seed=1, conversational=True))
    for layout, found in families.measure_layouts(families.build(kind), rows).items():
        assert not families.is_silently_wrong(found)
        if kind in LEFT:
            assert found["refused"].startswith(layout) and LEFT[kind] in found["refused"]
        else:
            assert found["off"] < 5e-5 and found["gradient"] < 1e-3 and found["changed"] == 0


@pytest.mark.parametrize("kind", ["llama", "mamba", "lfm2"])
def test_auto_takes_what_is_exact_and_says_why_not(kind, tmp_path):
    model = families.build(kind)
    run_ = start(tmp_path / "run", copy.deepcopy(model), ROWS, max_steps=2)
    assert run_.layout.startswith("prefix_shared (as padded to " if kind == "llama" else "padded (prefix_shared")
    assert kind == "llama" or "; padding_free" in run_.layout
    plain = start(tmp_path / "plain", copy.deepcopy(model), ROWS, max_steps=2, layout="padded")
    assert plain.layout == "padded" and curve(run_) == pytest.approx(curve(plain), abs=1e-5)
    for layout in families.FLAT if kind != "llama" else ():
        with pytest.raises(UserError, match=rf"^{layout}.* {LEFT[kind]}.*: leave out layout {layout}, auto takes one"):
            start(tmp_path / "no", copy.deepcopy(model), ROWS, layout=layout)


def test_a_window_that_only_rows_of_the_evaluation_exceed_counts(tmp_path):
    """In this family a layer's window is in the mask alone."""
    model = families.build("llama4_text")
    model.config.attention_chunk_size = 24
    long = [{**row, "chosen": row["chosen"] + " now" * 24} for row in ROWS[:3]]
    run_ = start(tmp_path / "a", copy.deepcopy(model), ROWS, max_steps=1)
    assert max(run_.train_rows["length"]) <= 24 and run_.layout.startswith("prefix_shared")
    run_ = start(tmp_path / "b", copy.deepcopy(model), ROWS, long, max_steps=1, eval_strategy="steps")
    assert run_.layout.startswith("padded (prefix_shared differs")


def test_a_budget_of_tokens_may_put_a_whole_step_into_one_pass(tmp_path):
    """This family counts a row's tokens: what one row alone has is exact, what sixteen have is not."""
    model = families.build("llama4_text")
    model.config.attention_chunk_size = 4096
    for layer in model.modules():
        if hasattr(layer, "floor_scale"):
            layer.floor_scale, layer.attn_scale = 200, 1.0
    rows, options = make_rows(32, seed=1), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    assert start(tmp_path / "a", copy.deepcopy(model), rows, max_steps=1, **options).layout.startswith("prefix_shared")
    run_ = start(tmp_path / "b", model, rows, max_steps=1, max_tokens_per_micro_batch=10**5, **options)
    assert run_.layout.startswith("padded (prefix_shared differs")


def test_layouts_are_tried_where_a_leak_would_be_largest():
    """On rows of each set, the shortest once more with a prompt of one token, whose neighbour is another sequence."""
    sets = [prepared(make_rows(9, seed=seed)) for seed in (1, 2)]
    cut, *rows = trial.rows_for_layouts(sets)
    lengths = [row["length"] for row in rows]
    assert len(rows) == 6 and lengths == sorted(lengths) and len(cut["prompt_input_ids"]) == 1
    assert all(most(each["length"]) in lengths for each in sets for most in (min, max))


def test_a_family_that_counts_positions_itself_is_refused_before_a_long_row_is_tried():
    """On a GPU a position that its table lacks would end the process."""
    read, model = [], families.build("bart")
    model.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True)
    found = families.measure_layouts(model, prepared(make_rows(8, seed=1)))
    assert all("differs from padded by" in each["refused"] for each in found.values())
    flat = [tokens for rows, tokens in read if rows == 1]
    assert len(flat) == 4 and max(flat) < 32


REFUSED = {  # what keeps a Llama from the flat layouts: (a model, options, the reason)
    "dropout": (lambda: make_model(attention_dropout=0.1), {"disable_dropout": False}, "segments has no dropout"),
    "load balance": (lambda: build(MIXTURES["mixtral"]()), {"output_router_logits": True}, "load balance"),
    "reference": (make_model, {"ref_model": lambda: families.build("mamba")}, "MambaForCausalLM cannot read it"),
    "prefix": (
        lambda: get_peft_model(make_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        {},
        "PeftModelForCausalLM cannot read it",
    ),
    "no transformers": (lambda: Own(), {}, "it is no model of transformers"),
    "wrapped": (lambda: Wrapped(make_model()), {}, "unexpected keyword argument 'position_ids'"),
    "encoder-decoder": (lambda: build(APART["t5"]()), {}, "an encoder-decoder reads prompts and completions apart"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_for_flat_layouts_is_trained_padded(why, tmp_path):
    model, options, words = REFUSED[why]
    options = {name: value() if name == "ref_model" else value for name, value in options.items()}
    run_ = start(tmp_path / "a", model(), ROWS, max_steps=1, **options)
    assert (
        run_.layout.startswith(("padded (prefix_shared:", "padded (padding_free, prefix_shared:"))
        and words in run_.layout
    )
    with pytest.raises(UserError, match=f"^padding_free.*: .*{words}"):
        start(tmp_path / "b", model(), ROWS, max_steps=1, layout="padding_free", **options)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_model_that_reads_flat_rows_does_all_else_as_before(kind):
    """It generates, reads padded batches and saves as it did, and so does another with the same configuration; a layer
    that its caller subclassed finds its eager attention."""

    class Mine(transformers.models.llama.modeling_llama.LlamaAttention):
        pass

    model = make_model(attn_implementation=kind)
    other = transformers.LlamaForCausalLM(model.config).eval()
    model.model.layers[0].self_attn.__class__ = Mine
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask, outputs = (ids > 0).long(), []
    for change in (
        lambda _: None,
        attention.attend_by_segments,
        attention.attend_by_segments,
        attention.attend_as_before,
    ):
        change(model)
        told = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        made = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **told)
        with torch.no_grad():
            logits = [each(input_ids=ids.flip(1), attention_mask=mask.flip(1)).logits for each in (model, other)]
        outputs.append([*made.logits, *logits])
        assert "segments" not in str(model.config.to_dict()) and "segments" not in model.config.to_json_string()
    assert model.config._attn_implementation == kind
    for output in outputs[1:]:
        assert all(torch.equal(*pair) for pair in zip(outputs[0], output, strict=True))


def test_a_flat_layout_must_leave_padded_batches_alone(monkeypatch, tmp_path):
    """Here a layer's eager attention is not the one of that name beside it: sampling would go through the other."""

    class Mine(transformers.models.llama.modeling_llama.LlamaAttention):
        __module__ = "elsewhere"

    other = SimpleNamespace(eager_attention_forward=lambda _, query, *__, **___: (query.transpose(1, 2), None))
    monkeypatch.setitem(sys.modules, "elsewhere", other)
    model = make_model(attn_implementation="eager")
    model.model.layers[0].self_attn.__class__ = Mine
    run_ = start(tmp_path, model, ROWS, max_steps=1)
    assert run_.layout.startswith("padded (prefix_shared differs") and model.config._attn_implementation == "eager"


def test_a_try_leaves_the_model_as_it_was():
    """In 16 bits, tied, with zeros and a parametrisation: every bit, and how products are rounded."""
    model = make_model(tie_word_embeddings=True)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    model = model.bfloat16().train()
    before, torch_wide = weights(model), torch.get_float32_matmul_precision()
    rows = [prepared(ROWS)[i] for i in range(3)]
    try:
        torch.set_float32_matmul_precision("medium")
        how = {"company": rows[:1], "trains": True, "is_quiet": True}
        assert checks.layout_error(model, rows, DataCollatorForPreference(0, "padded"), "prefix_shared", **how) < 1e-5
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(torch_wide)
    after = weights(model)
    assert model.training and all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(value.dtype == torch.bfloat16 for value in after.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("kind", ["llama", "rwkv", "bart", "adapter", "4 bits"])
def test_answers_beside_each_other_are_those_of_each_alone(kind, tmp_path):
    """Whatever a family does with padding: some ignore the mask, and are asked one by one."""
    if kind == "rwkv":
        config = transformers.RwkvConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
        model = build(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    elif kind == "4 bits":
        pytest.importorskip("bitsandbytes")
        make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    else:
        model = build(APART["bart"]()) if kind == "bart" else make_model()
    more = {"peft_config": {"r": 4}} if kind == "adapter" else {}
    more |= {"load_in_4bit": True, "use_peft": True, "processing_class": None} if kind == "4 bits" else {}
    rows = [{**row, "prompt": row["prompt"] * (1 + i)} for i, row in enumerate(make_rows(5, seed=3))]
    options = {"eval_strategy": "steps", "generate_during_eval": True, "num_samples": 5, "max_new_tokens": 3}
    run_ = start(tmp_path / "run", model, ROWS, rows, max_steps=1, **options, **more)
    assert run_.answers_alone == (kind == "rwkv")
    collator = DataCollatorForPreference(0, "padded", decoder_start_ids=[2] if kind == "bart" else None)
    own = [run_.eval_sets[""][i] for i in range(5)]
    one = [checks.generation_error(run_.model, [row], collator) for row in own]
    assert max(one) < 1e-3
    assert (checks.generation_error(run_.model, own, collator) > 0.01) == (kind == "rwkv")
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 5


def test_a_cache_that_forgets_is_noticed(tmp_path, monkeypatch):
    """A family that generates by other logits than it trains is refused by its name, before training and in chat."""
    model = transformers.RobertaForCausalLM(
        transformers.RobertaConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            is_decoder=True, pad_token_id=1, initializer_range=0.5, max_position_embeddings=64,
        )
    )  # fmt: skip
    options = {"eval_strategy": "steps", "generate_during_eval": True}
    with pytest.raises(UserError, match="RobertaForCausalLM generates by other logits than it tra"):
        start(tmp_path / "run", model, ROWS, ROWS[:3], max_steps=1, **options)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="RobertaForCausalLM generates by other logits"):
        chat.main(["--model_name_or_path", str(tmp_path / "model"), "--prompt", "a"])
    assert start(tmp_path / "trains", model, ROWS, max_steps=1).rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_answers_go_to_trackers_as_tables(tmp_path, monkeypatch):
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"eval_strategy": "steps", "generate_during_eval": True, "num_samples": 2, "max_new_tokens": 3}
    sent = []
    fake = SimpleNamespace(init=lambda **_: None, Table=lambda columns, data: (columns, data))
    fake.log = lambda row, step: sent.append((step, row["samples"])) if "samples" in row else None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start(tmp_path, rows=ROWS, eval_rows=ROWS[:3], max_steps=1, report_to=["tensorboard", "wandb"], **options)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sent == [(1, (["prompt", "reference", "policy"], [list(sample.values()) for sample in samples]))]
    events = event_file.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (table,) = events.Tensors("samples/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.startswith("| prompt | reference | policy |\n| --- | --- | --- |\n") and text.count("\n") == 3


def test_two_models_answer_side_by_side(model_dir, tmp_path, monkeypatch, capsys):
    """Each goes on with a conversation of its own; one that is not there is refused in a line."""
    monkeypatch.setattr(chat, "check_answers", lambda *_: None)
    asked = []

    def answer(model, processor, messages, sampling, **_):
        asked.append([message["content"] for message in messages])
        return f"answer {len(asked)} " + "word " * 12

    monkeypatch.setattr(chat, "answer", answer)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: SimpleNamespace(columns=43))
    questions = iter(["one", "two", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    other = tmp_path / "another"
    make_model(1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    chat.main(["--model_name_or_path", str(model_dir), "--compare", str(other)])
    assert [len(messages) for messages in asked] == [1, 1, 3, 3]
    assert asked[2][1].startswith("answer 1 ") and asked[3][1].startswith("answer 2 ")
    lines = [line for line in capsys.readouterr().out.splitlines() if " │ " in line]
    assert all(line.index(" │ ") == 20 and len(line) <= 43 for line in lines) and len(lines) >= 8
    with pytest.raises(SystemExit, match="cannot load the model"):
        chat.main(["--model_name_or_path", str(model_dir), "--compare", "./nowhere", "--prompt", "a"])
    with pytest.raises(SystemExit, match="--image is for a model that sees"):
        chat.main(["--model_name_or_path", str(model_dir), "--prompt", "a", "--image", "a.png"])


@pytest.mark.slow
def test_two_processes_share_the_prompts_and_give_the_same_answers(tmp_path, model_dir):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(7))))
    answers = {}
    for processes in (0, 2):
        files = ["--model_name_or_path", str(model_dir), "--dataset_name", str(tmp_path / "rows.jsonl")]
        options = (
            "--max_steps 1 --eval_strategy steps --generate_during_eval --num_samples 7 --max_new_tokens 5 --use_cpu"
        )
        batch = "--per_device_eval_batch_size 2 --eval_dataset_name".split() + [str(tmp_path / "rows.jsonl")]
        out = tmp_path / str(processes)
        learning = "--learning_rate 0 --save_strategy no --output_dir".split() + [str(out)]
        run("dpo.loop", *files, *options.split(), *batch, *learning, processes=processes)
        answers[processes] = (out / "samples.jsonl").read_text()
    assert answers[0] == answers[2] and len(answers[0].splitlines()) == 7


def test_an_adapter_s_reference_answers_as_the_base(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    assert isinstance(model, PeftModel)
    rows = [prepared(ROWS)[i] for i in range(3)]
    (sample, *_), options = sampling.answers_to(model, rows, make_tokenizer(), reference=Reference(model)), {}
    base = sampling.answers_to(make_model(), rows, make_tokenizer(), **options)
    assert sample["reference"] == base[0]["policy"] != sample["policy"]


def test_chat_of_an_encoder_decoder_shows_all_that_it_says(capsys):
    model, tokenizer = build(APART["bart"]()), make_tokenizer(None)
    text, how = "the sky is very blue today", {"do_sample": False, "max_new_tokens": 6}
    said = chat.answer(model, tokenizer, [{"role": "user", "content": text}], how)
    prompt = torch.tensor([tokenizer(text)["input_ids"] + [2]])  # and EOS, as it was trained
    ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **how, pad_token_id=0)[0]
    assert said == tokenizer.decode(ids, skip_special_tokens=True) and said
    assert capsys.readouterr().out.strip() == said.strip()


def test_a_mixture_whose_configuration_asks_for_its_balance_keeps_it_beside_another_factor(tmp_path):
    model = build(MIXTURES["mixtral"]())
    model.config.output_router_logits = True
    row = start(tmp_path, model, ROWS, max_steps=1, router_aux_loss_coef=0.5).rows[0]
    assert row["loss"] == pytest.approx(math.log(2) + 0.5 * row["aux_loss"], rel=1e-5)


def test_a_decoder_begins_as_generation_begins_it():
    model = build(APART["bart"]())
    model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = 5, 2
    assert decoder_start_ids(model) == [2]
    model.generation_config.decoder_start_token_id = None
    assert decoder_start_ids(model) == [5]


def test_a_plain_batch_begins_where_the_configuration_says():
    bart = build(APART["bart"]())
    bart.generation_config.forced_bos_token_id = 3
    plain = DataCollatorForPreference(0)(
        [{"prompt_input_ids": [5], "chosen_input_ids": [7, 2], "rejected_input_ids": [8, 2]}]
    )
    logps = [concatenated_forward(bart, each)["chosen_logps"] for each in (plain, encoder_decoder_batch(plain, [2, 3]))]
    assert torch.equal(*logps)


def test_rows_of_one_length_do_not_hide_a_model_that_ignores_its_mask(tmp_path):
    """Whether answers may be asked together is judged by the prompts that will be asked."""

    class Careless(transformers.LlamaForCausalLM):
        def forward(self, *arguments, attention_mask=None, **options):
            return super().forward(*arguments, **options)

    even = [{"prompt": "the sky is", "chosen": " blue" * n, "rejected": " green"} for n in (1, 2, 3, 4)]
    uneven = [{**row, "prompt": row["prompt"] * n} for n, row in enumerate(even, start=1)]
    options = {"eval_strategy": "steps", "generate_during_eval": True, "num_samples": 4, "max_new_tokens": 2}
    model = Careless(make_model().config)
    assert start(tmp_path / "a", model, even, uneven, max_steps=1, **options).answers_alone


def test_policy_and_reference_are_of_a_kind(tmp_path):
    for policy, reference in ((build(APART["t5"]()), make_model()), (make_model(), build(APART["t5"]()))):
        with pytest.raises(UserError, match="of policy and reference one is an encoder-decoder"):
            start(tmp_path / "run", policy, ROWS, ref_model=reference)


def test_a_family_without_a_load_balance_is_told_so(tmp_path):
    """DeepSeek's configuration has the option, its model nothing to answer it with."""
    sizes = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes |= {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    model = build(transformers.DeepseekV3Config(**{**TEXT, **sizes}))
    with pytest.raises(UserError, match="output_router_logits: DeepseekV3ForCausalLM (works out|has) no load balance"):
        start(tmp_path / "a", copy.deepcopy(model), ROWS, output_router_logits=True)
    losses = curve(start(tmp_path / "b", model, ROWS, max_steps=2))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] != pytest.approx(math.log(2), abs=1e-5)


def test_a_mixture_trains_an_adapter_by_default(tmp_path):
    run_ = start(tmp_path, build(MIXTURES["mixtral"]()), ROWS, max_steps=2, peft_config={"r": 4})
    assert curve(run_)[0] == pytest.approx(math.log(2), abs=1e-6) and curve(run_)[1] != curve(run_)[0]


def test_the_balance_of_a_language_model_within_is_left_out_of_the_reference():
    inner, model = SimpleNamespace(output_router_logits=True), torch.nn.Module()
    model.config = SimpleNamespace(get_text_config=lambda: inner)
    with without_aux_loss(model):
        assert not inner.output_router_logits
    assert inner.output_router_logits


def test_the_end_of_an_encoder_s_prompt_stays_when_it_is_cut():
    ids = {"prompt_input_ids": [3, 5, 6, 7, 2], "chosen_input_ids": [8], "rejected_input_ids": [9]}
    limits = {"bos_token_id": 3, "eos_token_id": 2, "max_prompt_length": 4}
    for mode, left in (("keep_start", [3, 5, 6, 2]), ("keep_end", [3, 6, 7, 2])):
        assert truncate_row(ids, **limits, truncation_mode=mode)["prompt_input_ids"] == left


class Delegating(Wrapped):
    """A wrapper that lends out whatever the model in it has."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def test_a_wrapper_that_lends_everything_goes_on_and_keeps_its_best(tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    start(tmp_path / "a", Delegating(make_model()), ROWS, ROWS[:4], num_train_epochs=2, **options)
    resumed = {"resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-2")}
    again = start(tmp_path / "b", Delegating(make_model()), ROWS, ROWS[:4], num_train_epochs=2, **options, **resumed)
    saved, trained = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors"), weights(again.model)
    assert saved.keys() == trained.keys() and all(torch.equal(saved[name], trained[name]) for name in saved)


def test_a_cache_tells_plain_modules_by_what_they_hold(tmp_path):
    class Scaled(Own):
        scale = 1.0

        def forward(self, input_ids):
            return SimpleNamespace(logits=super().forward(input_ids).logits * self.scale)

    digests = set()
    for scale in (1.0, 5.0, 5.0):
        model = Scaled()
        model.scale = scale
        digests.add(reference_digest(Reference(policy=None, ref_model=model), read=""))
    assert len(digests) == 2
