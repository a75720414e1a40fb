"""Loads the policy and its tokenizer or processor, adds a LoRA adapter, switches dropout off, makes the optimizer."""

import difflib
import hashlib
import importlib.util
import json
import logging
import math
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import find_adapter_config_file, has_file

from dpo.conversations import tokenizer_of
from dpo.distributed import unwrap
from dpo.logprobs import concatenated_forward, forward_kept_positions
from dpo.rows import first_line

logger = logging.getLogger("dpo")


def class_of(config) -> type:
    """The class that loads what a configuration describes: a model that sees, an encoder-decoder, or a causal one."""
    own = getattr(config, "auto_map", None) or {}  # of a model that brings its own code
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in own:
        return AutoModelForImageTextToText
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM


def read_config(name: str, *, revision: str = "main", trust_remote_code: bool = False):
    """The configuration of a model, or of an adapter's base, by Hub name or directory; None where there is none that
    can be read: loading the model will say why."""
    base = adapter_base(name, revision)
    try:
        where = {"revision": revision} if base is None else {}
        return AutoConfig.from_pretrained(base or name, trust_remote_code=trust_remote_code, **where)
    except Exception:  # what is in somebody's folder may fail anywhere
        return None


def load_model(
    name: str, *, dtype: str = "float32", revision: str = "main", adapter_name: str | None = None, **kwargs
) -> torch.nn.Module:
    """A language model, one that sees or an encoder-decoder, too, by Hub name or directory; one that holds a PEFT
    adapter gives the base model with that adapter, trainable.

    Args: dtype, of the weights (AdamW's updates at a learning rate of 1e-6 are too small for bfloat16's 8 bits);
    revision, of name on the Hub; adapter_name, what the adapter is called in the model; kwargs, of from_pretrained
    (None values are left out).
    Raises: ValueError in one line if there is no such model, or its files lack weights that would then be random.
    """
    kwargs = {"dtype": dtype, **{key: value for key, value in kwargs.items() if value is not None}}
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what does not fit is told below
    base = adapter_base(name, revision)
    try:
        kwargs["revision"] = revision
        if base is not None:
            kwargs["revision"] = PeftConfig.from_pretrained(name, revision=revision).revision or "main"
        of_config = ("revision", "trust_remote_code", "gguf_file", "subfolder", "token")
        config = AutoConfig.from_pretrained(base or name, **{key: kwargs[key] for key in of_config if key in kwargs})
        model, info = class_of(config).from_pretrained(base or name, **kwargs)
        wrong = {**info, "mismatched_keys": [key for key, *_ in info["mismatched_keys"]]}
        if base is not None:
            model, wrong = add_saved_adapter(model, name, revision, adapter_name or "default")
    except Exception as error:  # what is in somebody's folder may fail anywhere, a file cut short deep in a library
        raise ValueError(f"cannot load the model {str(name)!r}: {first_line(error)}") from error
    for kind in ("missing_keys", "mismatched_keys"):
        if keys := sorted(wrong[kind]):
            unused = sorted(wrong["unexpected_keys"])[:1]
            instead = f", but {unused[0]}, which the model has not" if unused else ""
            keys = f"{keys[0]} and {len(keys) - 1} more" if len(keys) > 1 else keys[0]
            raise ValueError(f"the files of the model {str(name)!r} lack weights that fit: {keys}{instead}")
    if more := sorted(key for key in wrong["unexpected_keys"] if re.search(r"(layers|h|blocks)\.\d+\.", key)):
        raise ValueError(f"the files of the model {str(name)!r} hold layers that its config.json has not: {more[0]}")
    if broken := not_finite(model):
        raise ValueError(f"the model {str(name)!r} is broken: the weights of {broken} are not all finite")
    return keep_differentiable(model)


@torch.no_grad()
def check_reading(model: torch.nn.Module, alone: dict, together: dict, *, is_quiet: bool) -> None:
    """Refuses a model that would be trained on something else than log π(y|x), by what it says of a row.

    Its positions must not see later ones (those of BERT, loaded as if it were a decoder, do: it would read the answer):
    with another last token the logits before it stay the same, but for noise, which the same row again shows, and which
    is somebody else's to refuse. And in float32 a row must have the same log-probabilities alone and beside another
    (not so where a batch's tokens compete for the room of an expert), and in training mode those of evaluation.

    Args: alone, a ready batch of one row; together, of that row and another; is_quiet, whether no dropout is left.
    """
    kind, was_training, inputs = type(unwrap(model)).__name__, model.training, alone["inputs"]
    keep, decoder = inputs["logits_to_keep"], "decoder_input_ids" in inputs
    key = "decoder_input_ids" if decoder else "input_ids"
    ids = inputs[key]
    rows = torch.arange(len(ids), device=ids.device)
    # The position of each sequence's last input: of a decoder's it predicts the last target, else it is that target.
    last = keep.shape[1] - 1 - keep.flip(1).long().argmax(dim=1) + (0 if decoder else 1)
    keep = keep.index_put((rows, last), torch.tensor(True, device=keep.device))
    changed = ids.index_put((rows, last), torch.where(ids[rows, last] == 1, 2, 1))
    both = [{**inputs, "logits_to_keep": keep, key: each} for each in (ids, changed)]
    try:
        model.eval()
        first, again, other = (forward_kept_positions(model, each)[1] for each in (both[0], both[0], both[1]))
        by_itself, beside = (concatenated_forward(model, batch)["chosen_logps"][0] for batch in (alone, together))
        if is_quiet:
            with torch.random.fork_rng():
                trained = concatenated_forward(model.train(), alone)["chosen_logps"][0]
    except Exception as error:  # of one of many families' own ways to fail
        raise ValueError(f"{kind} cannot read the rows: {first_line(error)}") from error
    finally:
        model.train(was_training)
    row, position = keep.nonzero().T
    is_earlier = position < last[row]
    earlier = (first - other)[is_earlier].abs().max() if is_earlier.any() else 0
    now, noise = (first - other)[~is_earlier].abs().max(), (first - again).abs().max()
    share = 0.1 if getattr(model, "is_quantized", False) else 1e-3  # 8 bits are rounded by what a batch has
    if earlier > share * now + 10 * noise:
        raise ValueError(f"{kind} sees later tokens, it is no causal language model: take one that generates text")
    if any(p.dtype != torch.float32 for p in model.parameters()) or torch.is_autocast_enabled(ids.device.type) or noise:
        return
    if torch.get_float32_matmul_precision() != "highest":
        return
    tolerance = 1e-3 * abs(by_itself) + 1e-3
    if abs(by_itself - beside) > tolerance:
        nats = f"{float(by_itself):.4f} and {float(beside):.4f} nats"
        raise ValueError(f"{kind} gives a completion other log-probabilities beside other rows than alone ({nats})")
    if is_quiet and abs(by_itself - trained) > tolerance:
        nats = f"{float(trained):.4f} and {float(by_itself):.4f} nats"
        raise ValueError(
            f"{kind} gives other log-probabilities in training than in evaluation, without dropout ({nats})"
        )


def not_finite(model: torch.nn.Module) -> str | None:
    """The first parameter that holds an infinity or a NaN, by its name."""
    named = model.named_parameters()
    return next((name for name, p in named if p.is_floating_point() and not torch.isfinite(p).all()), None)


def add_saved_adapter(
    model: torch.nn.Module, name: str, revision: str, adapter_name: str
) -> tuple[PeftModel, dict[str, list[str]]]:
    """(base model with the adapter of a directory or Hub name, trainable; the keys of the two that do not fit)."""
    check_adapter_name(model, adapter_name)
    saved = load_peft_weights(name, device="cpu", **({} if Path(name).is_dir() else {"revision": revision}))
    embeddings = [value for key, value in saved.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if embeddings and len(embeddings[0]) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(embeddings[0]))  # as it was when the adapter was trained
    model = PeftModel.from_pretrained(model, name, adapter_name, is_trainable=True, revision=revision)
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False).keys()
    return model, {
        "missing_keys": sorted(wanted - saved.keys()),
        "mismatched_keys": [],
        "unexpected_keys": sorted(key for key in saved.keys() - wanted if "lora_" in key),
    }


def adapter_base(name: str, revision: str = "main") -> str | None:
    """The base model of a Hub name or directory that holds a PEFT adapter; None for any other name."""
    try:
        path = find_adapter_config_file(name, revision=revision)
    except OSError:  # no directory, and no name that the Hub could have
        return None
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8"))["base_model_name_or_path"] if path else None
        if path and not isinstance(base, str):
            raise TypeError(f"base_model_name_or_path is {base!r}")
        return base
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} names no base model: {first_line(error)}") from error


def fingerprint(model: torch.nn.Module) -> str:
    """A few digits that tell a model's weights from others: a hash of their names, their starts and their sums."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten().contiguous()
        parts = values.view(torch.uint8).split(1 << 24)  # the sum makes 8 bytes of each
        total = sum(int(part.sum(dtype=torch.int64)) for part in parts)  # of all bytes: exact in any order
        start = values[:256].cpu().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tuple(parameter.shape)} {total}".encode() + start)
    return digest.hexdigest()[:16]


def load_processor(name: str, *, revision: str = "main", trust_remote_code: bool = False):
    """What prepares a model's inputs: its tokenizer, or of a model that sees its processor. Where there is no padding
    token, the EOS serves as one (masks tell them apart)."""
    config = read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    sees = config is not None and class_of(config) is AutoModelForImageTextToText
    base = adapter_base(name, revision)
    if base and not has_file(name, "tokenizer_config.json", revision=revision):
        name, revision = base, "main"  # PEFT itself saves an adapter without its tokenizer
    try:
        processor, where = None, {"revision": revision, "trust_remote_code": trust_remote_code}
        if sees:
            try:
                processor = AutoProcessor.from_pretrained(name, **where)
            except Exception as error:
                why = first_line(error)
                logger.warning("%s: no processor can be loaded, rows may not have pictures: %s", name, why)
        processor = processor or AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:  # as above
        raise ValueError(f"cannot load the tokenizer of {str(name)!r}: {first_line(error)}") from error
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    return processor


def check_rows_fit(model: torch.nn.Module, *, largest: int, longest: int) -> None:
    """Refuses rows whose largest token id the model has not, or that are longer than a model with an embedding for each
    position (GPT-2, OPT) can read."""
    try:
        vocabulary = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):  # a model of another make
        vocabulary = math.inf
    if largest >= vocabulary:
        how = "take the model's own tokenizer, or resize_token_embeddings before the training"
        raise ValueError(f"the tokenizer gives the id {largest}, the model knows {vocabulary} tokens: {how}")
    config = getattr(model, "config", None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
    tables = [m for name, m in model.named_modules() if re.search(r"wpe$|position", name.rpartition(".")[2])]
    if limit is None or not any(isinstance(m, torch.nn.Embedding) and m.num_embeddings >= limit for m in tables):
        return
    if longest > limit:
        raise ValueError(f"rows have up to {longest} tokens, the model has {limit} positions: set max_length {limit}")


def skeleton(name: str, **kwargs) -> torch.nn.Module | None:
    """A model as its config.json describes it, on no device: what modules it has is known long before it is loaded.
    None where that cannot be told; kwargs, of AutoConfig.from_pretrained."""
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
        with torch.device("meta"):
            return class_of(config).from_config(config, trust_remote_code=kwargs.get("trust_remote_code", False))
    except Exception:  # loading will say what is wrong
        return None


def check_adapter(model: torch.nn.Module, peft_config) -> PeftConfig:
    """peft_config (a peft.PeftConfig, or a dict of LoraConfig's arguments) as a PeftConfig that fits a model: where it
    names no modules, and PEFT has no choice of its own for the family, all linear layers are adapted."""
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already, which trains on: leave out use_peft and peft_config")
    try:
        reads_apart = getattr(model.config, "is_encoder_decoder", False) if hasattr(model, "config") else False
        task = "SEQ_2_SEQ_LM" if reads_apart else "CAUSAL_LM"
        peft_config = LoraConfig(task_type=task, **peft_config) if isinstance(peft_config, dict) else peft_config
    except TypeError as error:
        raise ValueError(f"peft_config: {first_line(error)}") from error
    kind = getattr(getattr(model, "config", None), "model_type", None)
    is_open = [getattr(peft_config, name, "none") for name in ("target_modules", "target_parameters")] == [None, None]
    if is_open and kind not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        peft_config.target_modules = "all-linear"
    if peft_config.is_prompt_learning:
        raise ValueError("prompt learning puts tokens before the text, which moves the completion: use LoRA")
    for option in ("target_modules", "modules_to_save"):
        names = getattr(peft_config, option, None)
        present = {part for name, _ in model.named_modules() for part in (name, name.rpartition(".")[2])}
        for name in names if isinstance(names, list | set | tuple) else ():
            if name not in present and not any(module.endswith(f".{name}") for module in present):
                close = difflib.get_close_matches(name, present, n=3) or sorted(names_of_linear_layers(model))
                raise ValueError(f"{option} {name!r} is no module of the model: it has {', '.join(close)}")
    return peft_config


def add_adapter(
    model: torch.nn.Module, peft_config, adapter_name: str | None = None, revision: str | None = None
) -> torch.nn.Module:
    """Wraps a model, of this revision on the Hub, so that only the adapter of peft_config trains."""
    peft_config = check_adapter(model, peft_config)
    check_adapter_name(model, adapter_name)
    try:
        return get_peft_model(model, peft_config, adapter_name or "default", revision=revision)
    except Exception as error:  # PEFT and bitsandbytes have their own ways to say that something cannot be
        raise ValueError(f"the adapter cannot be added: {first_line(error)}") from error


def check_adapter_name(model: torch.nn.Module, name: str | None) -> None:
    """Refuses a name of an adapter that is part of a module's: a parameter's name would not tell which one it is of."""
    if any(name in path.split(".") for path, _ in model.named_modules()):
        raise ValueError(f"an adapter cannot be called {name!r}, a module of the model is: choose another name")


def adapter_key(name: str | None) -> str | None:
    """A name of an adapter as PEFT can have it: it keeps adapters in a torch.nn.ModuleDict, where the names of methods
    (train, the one in the document's own example) are taken."""
    return f"{name}_" if name is not None and hasattr(torch.nn.ModuleDict(), name) else name


def pick_adapter(model: torch.nn.Module, name: str, ref_name: str | None) -> None:
    """Lets the named one of a PEFT model's adapters train, beside that of the reference."""
    names = list(getattr(model, "peft_config", {}))
    for option, wanted in (("model_adapter_name", name), ("ref_adapter_name", ref_name)):
        if wanted is not None and wanted not in names:
            raise ValueError(f"{option} {wanted!r} is no adapter of the model: it has {', '.join(names) or 'none'}")
    if name == ref_name:
        raise ValueError(f"ref_adapter_name {ref_name!r} is the adapter that trains: load it once more, and name that")
    if name != model.active_adapter:
        model.set_adapter(name)
    for path, parameter in model.named_parameters():
        if ref_name in path.split("."):
            parameter.requires_grad = False


def quantization(*, load_in_4bit: bool, load_in_8bit: bool, quant_type: str, nested: bool, dtype: str) -> dict:
    """from_pretrained's arguments that keep a model's weights in 4 or 8 bits; computes in dtype. Source: QLoRA,
    Dettmers et al. 2023 (arXiv 2305.14314): 4-bit NormalFloat, and quantised constants where nested."""
    if not (load_in_4bit or load_in_8bit):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes")
    four = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": nested}
    four |= {"bnb_4bit_compute_dtype": torch.float32 if dtype == "auto" else dtype}
    bits = {"load_in_4bit": True, **four} if load_in_4bit else {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**bits)}


def keep_differentiable(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with 4-bit layers that have a gradient. On CPUs with AVX-512 bfloat16 bitsandbytes packs their weights
    at the first forward pass in eval mode, for a kernel that rounds and has none, and never unpacks them for
    training: all below the last such layer would silently stop to learn. Raises: ValueError if that has happened."""
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(f"{name} of the model is packed for inference, it cannot train: load the model anew")
            module.support_avx512bf16_for_cpu = False
    return model


def names_of_linear_layers(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def freeze_what_is_not_saved(model: torch.nn.Module) -> None:
    """Parameters that save_pretrained leaves out (Marian's sinusoids) do not train: what is saved would be another."""
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in left_out):
            parameter.requires_grad_(False)


def check_trainable(model: torch.nn.Module, *, fp16: bool) -> None:
    """Refuses a policy that cannot be trained, or not be saved afterwards."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("the model has no parameter that trains: load its adapter with is_trainable=True")
    if isinstance(model, PeftModel) and getattr(model.peft_config[model.active_adapter], "lora_alpha", 1) == 0:
        raise ValueError("lora_alpha of the model's adapter is 0: it would change nothing")
    if getattr(model, "is_quantized", False) and not isinstance(model, PeftModel):
        raise ValueError("a model in 4 or 8 bits can only train an adapter: add use_peft or peft_config")
    half = [name for name, parameter in trained.items() if parameter.dtype == torch.float16]
    if fp16 and half:
        raise ValueError(f"fp16 needs float32 weights, {half[0]} is in float16: load the model with dtype float32")
    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            settings.validate(strict=True)
    except ValueError as error:
        if settings.do_sample:
            raise ValueError(
                f"the model's generation_config cannot be saved: {' '.join(str(error).split())}"
            ) from error
        settings.do_sample = True  # a temperature without sampling: what its author meant, and what can be saved
        check_trainable(model, fp16=fp16)


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout probability of a model to 0: nn.Dropout's, and the numbers that attention layers and
    configurations hold. Dropout noise on one side of log π/π_ref would be noise in the reward. Adapters keep theirs."""
    modules = [module for path, module in model.named_modules() if "lora_dropout" not in path]
    for module in modules:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for holder in [*modules, *(module.config for module in modules if getattr(module, "config", None) is not None)]:
        for name in [name for name, value in vars(holder).items() if "drop" in name and isinstance(value, float)]:
            setattr(holder, name, 0.0)


def make_optimizer(
    model: torch.nn.Module, *, name="adamw_torch", learning_rate: float, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train; biases and norms, all of one dimension, do not decay.

    Args: name, adamw_torch or adamw_torch_fused (the fused kernel), adamw_8bit or adamw_bnb_8bit, paged_adamw_8bit and
    paged_adamw_32bit (bitsandbytes), rmsprop (what the DPO paper used), adafactor or sgd; betas and eps are Adam's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    others = {"rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD, "adafactor": torch.optim.Adafactor}
    if name in others:
        return others[name](groups, lr=learning_rate)
    if name in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ValueError(f"optim {name} needs bitsandbytes: pip install bitsandbytes") from error
    kinds = {"adamw_8bit": bnb.optim.AdamW8bit, "adamw_bnb_8bit": bnb.optim.AdamW8bit}
    kinds |= {"paged_adamw_8bit": bnb.optim.PagedAdamW8bit, "paged_adamw_32bit": bnb.optim.PagedAdamW32bit}
    return kinds[name](groups, lr=learning_rate, betas=betas, eps=eps)


def decoder_start_ids(model: torch.nn.Module) -> list[int]:
    """What the decoder of an encoder-decoder begins with before it says something of its own: its start token, and the
    one that generation forces upon it, where there is one (a language, or BOS)."""
    holders = [getattr(model, name, None) for name in ("generation_config", "config")]

    def first(key: str) -> int | None:
        return next((value for each in holders if (value := getattr(each, key, None)) is not None), None)

    if (start := first("decoder_start_token_id")) is None:
        raise ValueError("the model's configuration has no decoder_start_token_id, its decoder cannot begin: set it")
    forced = first("forced_bos_token_id")
    return [start] if forced is None else [start, forced]


def set_router(model: torch.nn.Module, *, output_router_logits: bool, router_aux_loss_coef: float | None) -> None:
    """Lets a mixture of experts work out its load balance, and sets that loss's factor, in its configuration."""
    holders = [config for config in _configs(model) if hasattr(config, "output_router_logits")]
    if not holders:
        kind = type(unwrap(model)).__name__
        raise ValueError(f"output_router_logits: {kind} has no load balance to work out: leave it out")
    for config in holders:
        config.output_router_logits = config.output_router_logits or output_router_logits
        if router_aux_loss_coef is not None:
            config.router_aux_loss_coef = router_aux_loss_coef
    if router_aux_loss_coef is not None and not any(config.output_router_logits for config in holders):
        raise ValueError("router_aux_loss_coef does nothing without output_router_logits: add that, or leave it out")


def router_coefficient(model: torch.nn.Module) -> float:
    """The factor of a mixture of experts' load balance, as its configuration has it."""
    names = ("router_aux_loss_coef", "aux_loss_coef")
    own = [value for config in _configs(model) for name in names if (value := getattr(config, name, None)) is not None]
    return own[-1] if own else 0.001


def _configs(model: torch.nn.Module) -> list:
    """A model's configuration, and that of the language model in it, which may be the same."""
    config = getattr(unwrap(model), "config", None)
    return [config, config.get_text_config()] if hasattr(config, "get_text_config") else []
