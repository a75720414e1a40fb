"""Every causal language model of transformers that can be built small, through the whole of this package: writes
tutorials/families.md (`python tests/families.py`), or prints the named ones only (`python tests/families.py mamba`)."""

import contextlib
import dataclasses
import io
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from ast import literal_eval
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from conftest import ROOT, make_rows, make_tokenizer  # first: it keeps the Hub away, and torch to one core
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ALL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as WITH_IMAGES
from transformers.utils import logging as transformers_logging

from dpo import report
from dpo.attention import attend_as_before, attend_by_segments
from dpo.chat import answer
from dpo.checks import check_answers
from dpo.collate import DataCollatorForPreference
from dpo.config import DPOConfig, UserError
from dpo.data import prepare_dataset
from dpo.distributed import World
from dpo.logprobs import concatenated_forward, forward_kept_positions, token_logps
from dpo.loop import train
from dpo.models import disable_dropout, load_model
from dpo.rows import first_line
from dpo.trial import choose_layout

MOST_PARAMETERS, TOLERANCE = 2e7, 1e-3
FLAT = "prefix_shared", "padding_free"  # in the order of auto
VERDICTS = "exact", "exact in training, refused in chat", "wrong", "broken", "refused"
ABOUT = """# Families of models

*Made by `python tests/families.py`, with {versions}.*

Each causal language model of transformers that can be built small, with random weights, saved in a folder and trained
by its name: {counts}.
Windows, chunks and sparse selections are shorter than the texts, so they matter.

- difference, in nats: log-probabilities of 8 completions of differing length in one padded batch, against a plain
  forward pass of each alone; the larger one of eval and of train mode.
- trained: the loss at step 1, which must be ln 2 = 0.6931, and how many of the parameters two steps moved. Those of
  images, of cross-attention and of what only selects (indexers, experts' biases) have no gradient here.
- reloaded: the log-probabilities of the saved model against those of the trained one.
- chat: those that generating with a cache saw at 8 tokens, against one plain pass over all of them.
- prefix_shared, padding_free: where a run takes the layout, how far it then is in nats a token from plain passes over
  each sequence alone, on other rows, pairs and rankings of up to 64 tokens, alone and in company, in both modes
  (at most {off:.0e}; gradients differ from padded's by at most {gradient:.0e} of them). Else by how much it differed
  from padded when the run began (at least {least:.2g}), or that the model cannot read it: it is refused, and auto is
  padded. Silently wrong would be a layout that is taken and differs by 0.001.

{layouts}.

What is 0.001 or more is bold.
"""
COLUMNS = "model_type", "class", "what is special", "difference", "trained", "reloaded", "chat", *FLAT
HEADER = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|"

# What a small model has, by the names that configurations have for it. Windows and chunks are shorter than the texts.
SIZES = """
64 hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim input_embedding_size
64 output_embedding_size backbone_hidden_size out_hidden_size hidden_size_global pronunciation_embed_dim shape_embed_dim
96 intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dim_ff feed_forward_size dff
96 dense_intermediate_size intermediate_size_mlp d_inner
32 moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
32 moe_shared_expert_intermediate_size prefix_dense_intermediate_size shared_experts_intermediate_size
32 index_n_heads indexer_n_heads
16 head_dim swa_head_dim d_head attention_head_dim dim_head qk_nope_head_dim v_head_dim index_head_dim indexer_head_dim
16 linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_size mamba_d_head mamba_head_dim q_lora_rank
16 kv_lora_rank o_lora_rank hidden_size_per_layer_input pronunciation_vocab_size shape_vocab_size
8 qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank chunk_size
8 sliding_window sliding_window_size attention_window_size window_size attention_chunk_size mamba_chunk_size index_topk
8 num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads n_mamba_heads
8 local_attn_chunk_length lsh_attn_chunk_length laurel_rank hc_lowrank
4 num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers
4 num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads depth
4 num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_blocks
4 linear_num_heads linear_num_value_heads
2 num_key_value_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok top_k_experts moe_topk n_group
2 linear_num_key_heads eos_token_id max_window_layers
1 n_shared_experts topk_group num_shared_experts mamba_n_groups n_groups first_k_dense_replace bos_token_id
256 max_position_embeddings n_positions max_seq_len n_ctx
400 vocab_size unpadded_vocab_size vocab_size_per_layer_input
0 pad_token_id
0.2 initializer_range
0.5 lm_head_multiplier
4.0 logits_scaling
True is_decoder use_sliding_window
None forced_eos_token_id
"""
SIZES = {name: literal_eval(line.split()[0]) for line in SIZES.strip().splitlines() for name in line.split()[1:]}
# What some of them want otherwise; and, with a word more, variants.
OWN = """
bailing_hybrid: {layer_group_size: 2}
bamba: {attn_layer_indices: [1, 3]}
bert encoder: {is_decoder: false}
blt: {encoder_hash_byte_group_vocab: 50}
cohere_compass_text:
  {rope_parameters: {full_attention: {rope_type: default, rope_theta: 10000.0, mrope_section: [4, 2, 2]}}}
dbrx: {attn_config: {rope_theta: 10000.0, kv_n_heads: 2, clip_qkv: 8}, ffn_config: {ffn_hidden_size: 32, moe_top_k: 2}}
deepseek_v4: {num_key_value_heads: 1, o_groups: 2,
              compress_rates: {compressed_sparse_attention: 2, heavily_compressed_attention: 4}}
dory: {n_input_layers: 1, n_output_layers: 1}
falcon alibi: {alibi: true}
falcon_h1: {mamba_d_ssm: 128}
gemma3: {vision_config: {model_type: siglip_vision_model, hidden_size: 8, intermediate_size: 8, num_hidden_layers: 2,
                         num_attention_heads: 2, image_size: 32, patch_size: 8}, mm_tokens_per_image: 4}
gemma3_text: {layer_types: &windows [sliding_attention, full_attention, sliding_attention, full_attention]}
gemma3n_text: {layer_types: *windows, num_kv_shared_layers: 2}
gemma4_text: {layer_types: *windows, num_kv_shared_layers: 2}
gemma4_text experts: {layer_types: *windows, enable_moe_block: true}
gpt_neo: {attention_types: [[[global, local], 2]]}
granitemoehybrid: {layer_types: &mixed [linear_attention, full_attention, linear_attention, full_attention]}
jamba: {attn_layer_period: 2, attn_layer_offset: 1, expert_layer_period: 2, expert_layer_offset: 0}
kimi_linear: {layer_types: *mixed}
kolibri1: {layer_types: *windows}
lfm2: {layer_types: &convolved [conv, full_attention, conv, full_attention], block_multiple_of: 16}
lfm2_moe: {layer_types: *convolved}
llama4_text long: { attention_chunk_size: 8192, floor_scale: 256, no_rope_layers: [0, 1, 0, 1]}
longcat_flash: {zero_expert_num: 2, head_dim: 8}
mamba2: {num_heads: 8, head_dim: 16}
mixtral jitter: {router_jitter_noise: 0.01}
qwen4_exp_text: {indexer_kv_heads: 1, indexer_budget: 8, indexer_compress_ratio: 2}
reformer: {axial_pos_shape: [16, 16], axial_pos_embds_dim: [32, 32], attn_layers: [local, lsh, local, lsh]}
xlm causal: {causal: true}
xlstm: {hidden_size: 128, embedding_dim: 128}
xmod: {default_language: en_XX}
zamba: {num_key_value_heads: 4, attention_head_dim: null, layers_block_type: &hybrid [linear_attention, hybrid,
                                                                                     linear_attention, hybrid]}
zamba2: {num_key_value_heads: 4, layers_block_type: *hybrid}
zaya: {num_experts_per_tok: 1}
"""
OWN = yaml.safe_load(OWN)


def small(kind: str):
    """The configuration of a small model of a kind (a model_type, perhaps with a word more)."""
    cls = CONFIG_MAPPING[kind.split()[0]]

    def sizes(cls, own: dict) -> dict:
        names = [field.name for field in dataclasses.fields(cls)]
        latent = {"num_key_value_heads": 4} if "kv_lora_rank" in names else {}
        return {name: SIZES[name] for name in names if name in SIZES} | latent | own

    nested = {}
    for name, part in getattr(cls, "sub_configs", {}).items():
        if dataclasses.is_dataclass(part) and kind not in ("moshi", "dots3_note"):
            nested[name] = sizes(part, OWN.get(part.model_type, {}))
    return cls(**{**nested, **sizes(cls, OWN.get(kind, {}))})


def special(model) -> str:
    """What is special about a model, in a few words: of its configuration, its parameters and its modules."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    parts = " ".join(f"{name} {type(part).__name__}" for name, part in model.named_modules()).lower()
    parameters = " ".join(name for name, _ in model.named_parameters())

    def has(*options: str) -> bool:
        values = [getattr(config, option, None) for option in options]
        return any(value is True or value not in (None, False, 1) for value in values)

    words = {
        "mixture of experts": "expert" in parts,
        "state space": "mamba" in parts,
        "recurrent": "time_decay" in parameters or "mlstm" in parts,
        "latent attention": has("kv_lora_rank"),
        "sparse attention": "indexer" in parts or "hash" in parts or "lsh" in parts,
        "sinks": "sink" in parameters,
        "sliding window": not hasattr(config, "layer_types") and has("sliding_window"),
        "ALiBi": config.model_type in ("bloom", "mpt") or has("alibi"),
        "learned positions": re.search(r"wpe|embed_positions|position_embeddings|position_embedding ", parts),
        "soft-capping": has("final_logit_softcapping", "attn_logit_softcapping", "output_logit_soft_cap"),
        "logit scale": has("logit_scale", "logits_scaling", "lm_head_multiplier"),
        "cross-attention unused": "encoder_attn" in parts,
        "with images": "vision" in parts,
    }
    words = [word for word, is_so in words.items() if is_so] + sorted(layer.replace("_", " ") for layer in layers)
    return ", ".join(words) or "dense"


def build(kind: str):
    """A small random model of a kind (with its eyes), whose weights are neither even nor zero."""
    config = small(kind)
    auto = AutoModelForImageTextToText if type(config) in WITH_IMAGES else AutoModelForCausalLM
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise OverflowError(f"{count / 1e6:.0f}M parameters at the least")
    torch.manual_seed(0)
    model = auto.from_config(small(kind))
    with torch.no_grad():
        for parameter in model.parameters():  # none is as small, or as even, as a fresh model's
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            if parameter.ndim < 2 or spread == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif spread < 0.2:
                parameter.mul_(0.2 / spread)
    return model


def make(kind: str, folder: Path) -> None:
    """Leaves a model of a kind and its tokenizer in a folder, as users have them."""
    build(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def far(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values - expected).detach().abs().max())


@torch.no_grad()
def logps(model, batch: dict) -> torch.Tensor:
    result = concatenated_forward(model, batch)
    return torch.cat([result["chosen_logps"], result["rejected_logps"]]).double()


@torch.no_grad()
def logps_by_hand(model, rows: list[dict]) -> torch.Tensor:
    """The same, each sequence alone and without padding."""
    sums = []
    for which in ("chosen_input_ids", "rejected_input_ids"):
        for row in rows:
            prompt, completion = row["prompt_input_ids"], row[which]
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
            logps = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
            sums.append(logps[range(len(completion)), completion].sum())
    return torch.stack(sums)


def other_rows() -> list[list[dict]]:
    """Batches for the flat layouts, other than what they are chosen by: many pairs in company, of which the longest are
    far longer than any window and the shortest shorter; rankings; and a row alone."""
    generator = torch.Generator().manual_seed(7)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return torch.randint(3, 400, (length,), generator=generator).tolist()

    def rows(count: int, prompt: int, completion: int, rejected: int = 0) -> list[dict]:
        own = [{"prompt_input_ids": ids(1, prompt), "chosen_input_ids": ids(1, completion)} for _ in range(count)]
        return [
            row | {"rejected_input_ids": [ids(1, completion) for _ in range(rejected)] or ids(1, completion)}
            for row in own
        ]

    return [rows(8, 40, 24) + rows(4, 3, 3), rows(3, 12, 12, rejected=2), rows(1, 12, 12)]


def scored(model, rows: list[dict], layout: str) -> torch.Tensor:
    """(M,) log-probabilities of all completions' tokens, by sequence, the chosen ones first."""
    batch = DataCollatorForPreference(0, layout)(rows)
    return token_logps(forward_kept_positions(model, batch["inputs"])[1], batch["targets"])


@torch.no_grad()
def logps_of_tokens(model, rows: list[dict]) -> torch.Tensor:
    """The same, each sequence alone, in a plain forward pass."""
    several = [row["rejected_input_ids"] for row in rows]
    several = [each if isinstance(each[0], list) else [each] for each in several]
    completions = [[row["chosen_input_ids"] for row in rows], *zip(*several, strict=True)]
    logps = []
    for row, completion in ((row, each) for rank in completions for row, each in zip(rows, rank, strict=True)):
        prompt = row["prompt_input_ids"]
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.double().log_softmax(-1)[range(len(completion)), completion])
    return torch.cat(logps)


def gradient(model, rows: list[dict], layout: str) -> dict[str, torch.Tensor]:
    """Of a sum of log-probabilities, each with a weight of its own."""
    model.zero_grad()
    logps = scored(model, rows, layout)
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def measure_layouts(model, train_rows: Dataset) -> dict[str, dict]:
    """Of both flat layouts: what a run would say of it, asked for by name; and whether that is so, by other means, on
    other rows, alone and in company, in evaluation and training mode, and of gradients."""
    disable_dropout(model)
    batches, found = other_rows(), {layout: {} for layout in FLAT}
    before = scored(model.eval(), batches[0], "padded").detach()
    for layout, row in found.items():
        args = DPOConfig(layout=layout, per_device_train_batch_size=len(batches[0]))
        world = World(rank=0, size=1, device=torch.device("cpu"))
        run = SimpleNamespace(
            args=args, model=model, reference=SimpleNamespace(ref_model=None), world=world, eval_sets={}
        )
        run.train_rows, run.collator = train_rows, DataCollatorForPreference(0, "padded")
        try:
            row["error"] = float(re.search(r"as padded to (\S+) nats", choose_layout(run))[1])
        except UserError as error:
            row["refused"] = first_line(error).split(": leave out layout")[0]
        attend_as_before(model)
    if any("error" in row for row in found.values()):
        by_hand = [logps_of_tokens(model.eval(), rows) for rows in batches]
        expected = gradient(model, batches[0], "padded")
        attend_by_segments(model)
        for layout in (layout for layout, row in found.items() if "error" in row):
            off = [
                far(scored(model.train(mode), rows, layout).double(), each)
                for rows, each in zip(batches, by_hand, strict=True)
                for mode in (False, True)
            ]
            own = gradient(model, batches[0], layout)
            largest = max(float(each.abs().max()) for each in expected.values())
            change = [
                far(own[name], each) / max(float(each.abs().max()), 1e-3 * largest) for name, each in expected.items()
            ]
            found[layout] |= {"off": max(off), "gradient": max(change) if own.keys() == expected.keys() else math.inf}
    changed = far(scored(model.eval(), batches[0], "padded"), before)
    return {layout: row | {"changed": changed} for layout, row in found.items()}


@torch.no_grad()
def generated(model, tokenizer, messages: list[dict]) -> tuple[float, bool]:
    """Of an answer of 8 tokens to a conversation, each the likeliest: (how far the log-probabilities that `generate`
    saw, one token at a time, are from those of one pass over all; whether `answer` says just that text)."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    sampling = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    told = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    result, start = model.generate(**inputs, **sampling, **told), inputs["input_ids"].shape[1]
    at_once = model(input_ids=result.sequences, use_cache=False).logits[:, start - 1 : -1]
    difference = torch.stack(result.logits, 1).log_softmax(-1) - at_once.log_softmax(-1)
    text = tokenizer.decode(result.sequences[0, start:], skip_special_tokens=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return float(difference.abs().max()), answer(model, tokenizer, messages, sampling) == text


def measure(kind: str, folder: Path, row: dict) -> None:
    """Fills in the row of a kind."""
    try:
        make(kind, folder / "model")
    except Exception as error:
        row["untried"] = f"{type(error).__name__}: {first_line(error)}"
        return
    rows = list(prepare_dataset({"rows": Dataset.from_list(make_rows(4))}, make_tokenizer()))
    batch = DataCollatorForPreference(pad_token_id=0, layout="padded")(rows)
    try:
        loaded = load_model(str(folder / "model")).eval()
        row |= {"class": type(loaded).__name__, "special": special(loaded)}
        before = {name: p.clone() for name, p in loaded.named_parameters()}
        expected = logps_by_hand(loaded, rows)
        row["difference"] = far(logps(loaded, batch), expected)
        disable_dropout(loaded.train())
        row["difference"] = max(row["difference"], far(logps(loaded, batch), expected))
    except Exception as error:
        row["error"] = error

    options = {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    args = DPOConfig(output_dir=str(folder / "out"), per_device_train_batch_size=12, **options)
    run = train(str(folder / "model"), args=args, train_dataset=make_rows(12, seed=1, conversational=True))
    if "error" in row:
        return
    row["layouts"] = measure_layouts(load_model(str(folder / "model")), run.train_rows)
    exact = [layout for layout, found in row["layouts"].items() if "error" in found]
    row["layout"] = run.layout.split()[0]
    assert row["layout"] == (exact or ["padded"])[0], (run.layout, row["layouts"])
    row["loss"] = run.rows[0]["loss"]
    row["moved"] = sum(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    row["parameters"] = len(before)
    reloaded = load_model(str(folder / "out")).eval()
    row["reloaded"] = far(logps(reloaded, batch), logps(run.model.eval(), batch))
    messages = [{"role": "user", "content": "the sky is very blue today"}]
    try:
        check_answers(reloaded, make_tokenizer())
        row["generated"], row["answers"] = generated(reloaded, make_tokenizer(), messages)
    except ValueError as error:
        row["speechless"] = first_line(error)


def number(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    return f"{value:.0e}" if value < TOLERANCE else f"**{value:.2g}**"


def is_silently_wrong(found: dict) -> bool:
    """Whether a layout that a run takes gives something else than padded; and the model afterwards, in padded."""
    return "error" in found and max(found["off"], found["changed"], 0.1 * found["gradient"]) >= TOLERANCE


def layout_in_words(found: dict) -> str:
    if "error" in found:
        wrong = is_silently_wrong(found)
        return f"**silently wrong: {found['off']:.2g}, {found['gradient']:.2g}**" if wrong else number(found["off"])
    by = re.search(r"differs from padded by (\S+)", found["refused"])
    return f"differs by {by[1]}" if by else "cannot"


def verdict(row: dict) -> str:
    """What became of a kind: untried, refused (in chat), broken (a traceback), wrong, or exact."""
    if "untried" in row or "error" in row:
        return "untried" if "untried" in row else "refused" if isinstance(row["error"], UserError) else "broken"
    off = row["difference"], row["reloaded"], row.get("generated", 0), abs(row["loss"] - math.log(2))
    off += tuple(math.inf for layout in row["layouts"].values() if is_silently_wrong(layout))
    if not (all(value < TOLERANCE for value in off) and row["moved"] and row.get("answers", True)):
        return "wrong"
    return "exact in training, refused in chat" if "speechless" in row else "exact"


def cells(kind: str, row: dict) -> list[str]:
    trained = f"{row['loss']:.4f}, {row['moved']} of {row['parameters']}" if "loss" in row else ""
    if "error" in row:
        line = re.sub(r"/\S*/(model|out)\b", r"\1", first_line(row["error"]))
        chat = f"refused: {line}" if verdict(row) == "refused" else f"**{type(row['error']).__name__}**: {line}"
    elif "speechless" in row:
        chat = f"refused: {row['speechless']}"
    else:
        chat = number(row["generated"]) + ("" if row["answers"] else ", **another text**")
    found = [f"`{kind.split()[0]}`{kind.removeprefix(kind.split()[0])}", row.get("class", ""), row.get("special", "")]
    layouts = [layout_in_words(row["layouts"][layout]) if "layouts" in row else "" for layout in FLAT]
    own = [number(row.get("difference")), trained, number(row.get("reloaded")), chat.replace("|", "\\|")]
    return [*found, *own, *layouts]


def of_layouts(rows: dict[str, dict]) -> dict:
    """What the page says of all families' layouts together."""
    tried = [(layout, found) for row in rows.values() for layout, found in row.get("layouts", {}).items()]
    exact = [found for _, found in tried if "error" in found]
    differ = [float(by[1]) for _, found in tried if (by := re.search(r"by (\S+) nats", found.get("refused", "")))]
    words = []
    for layout in FLAT:
        own = [found for name, found in tried if name == layout]
        taken, wrong = sum("error" in found for found in own), sum(map(is_silently_wrong, own))
        words.append(f"{layout}: {taken - wrong} exact, {len(own) - taken} refused, {wrong} silently wrong")
    most = {key: max((found[key] for found in exact), default=0.0) for key in ("off", "gradient")}
    return {**most, "least": min(differ, default=math.nan), "layouts": "; ".join(words)}


def page(rows: dict[str, dict]) -> str:
    verdicts = {kind: verdict(row) for kind, row in rows.items()}
    counted = Counter(verdicts.values())
    counts = ", ".join(f"{counted[name]} {name}" for name in VERDICTS if counted[name])
    lines = [f"| {' | '.join(cells(kind, row))} |" for kind, row in rows.items() if verdicts[kind] != "untried"]
    untried = "; ".join(f"{kind} ({row['untried']})" for kind, row in rows.items() if verdicts[kind] == "untried")
    versions = f"torch {torch.__version__}, transformers {__version__}"
    about = ABOUT.format(counts=counts, versions=versions, **of_layouts(rows))
    return "\n".join([about, HEADER, *lines, "", f"Not tried: {untried}.", ""])


def main(kinds: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity(50)
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.disable(logging.ERROR)
    report.plot_rewards = lambda rows, path: None
    rows = {}
    for kind in kinds or sorted({*ALL, *OWN}):
        rows[kind], started = {}, time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                measure(kind, Path(folder), rows[kind])
            except Exception as error:  # told in the table
                rows[kind]["error"] = error
        what = rows[kind].get("untried") or " | ".join(cells(kind, rows[kind])[1:])
        print(f"{verdict(rows[kind]):8s} {kind} ({time.perf_counter() - started:.1f} s): {what}", flush=True)
    print(of_layouts(rows))
    if not kinds:
        (ROOT / "tutorials" / "families.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
