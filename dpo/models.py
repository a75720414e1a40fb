"""Loads the policy, its configuration and its tokenizer or processor, switches dropout off, makes the optimizer."""

import hashlib
import importlib.util
import json
import logging
import re
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, has_file

from dpo.adapters import adapter_base, add_saved_adapter, starts_from_base
from dpo.conversations import tokenizer_of
from dpo.distributed import unwrap
from dpo.rows import first_line
from dpo.sharding import as_if_in_memory, find_weights, local, whole

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


def load_empty(
    name: str,
    *,
    dtype: str = "float32",
    revision: str = "main",
    trust_remote_code: bool = False,
    adapter_name: str | None = None,
    attn_implementation: str | None = None,
) -> torch.nn.Module | None:
    """`load_model` for a model that no process is to hold whole: parameters have no memory until `sharding.shard` has
    laid them out and read each process's rows from the files; those of an adapter do. None where the files do not have
    the weights as the model does (a family that rearranges them, GGUF, 4 or 8 bits): it is loaded whole then."""
    try:
        base, where = adapter_base(name, revision), {"revision": revision}
        if base is not None:
            where["revision"] = PeftConfig.from_pretrained(name, revision=revision).revision or "main"
        config = AutoConfig.from_pretrained(base or name, trust_remote_code=trust_remote_code, **where)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with init_empty_weights(include_buffers=False):
            how = {"attn_implementation": attn_implementation} if attn_implementation else {}
            how["dtype"] = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
            model = class_of(config).from_config(config, trust_remote_code=trust_remote_code, **how)
        model.tie_weights()  # each got a parameter of its own above
        places = find_weights(model, weight_files(base or name, **where))
        if places is None:
            return None
        if model.can_generate():
            with suppress(OSError):  # without a file of its own it has what its configuration says
                model.generation_config = GenerationConfig.from_pretrained(base or name, **where)
        model.places_of_weights = places
        if base is not None:
            config = PeftConfig.from_pretrained(name, revision=revision)
            if starts_from_base(config) or getattr(config, "modules_to_save", None):
                return None
            with as_if_in_memory(model):
                model, wrong = add_saved_adapter(model, name, revision, adapter_name or "default")
            if any(wrong.values()):
                return None
        return model.eval()
    except Exception as error:  # loading it whole will say what is wrong
        logger.debug("%s is loaded whole: %s", name, first_line(error))
        return None


def weight_files(name: str, *, revision: str) -> list[Path]:
    """The safetensors files of a model, by Hub name or directory. Raises: OSError if it has none."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [Path(cached_file(name, SAFE_WEIGHTS_NAME, revision=revision))]
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(cached_file(name, each, revision=revision)) for each in names]


def not_finite(model: torch.nn.Module) -> str | None:
    """The first parameter that holds an infinity or a NaN, in this process's share of it, by its name."""
    named = ((name, local(p)) for name, p in model.named_parameters() if p.is_floating_point() and not p.is_meta)
    return next((name for name, values in named if not torch.isfinite(values).all()), None)


def fingerprint(model: torch.nn.Module) -> str:
    """A few digits that tell a model's weights from others: a hash of their names, their starts and their sums."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = whole(parameter.detach()).flatten().contiguous()
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


def skeleton(name: str, **kwargs) -> torch.nn.Module | None:
    """A model as its config.json describes it, on no device: what modules it has is known long before it is loaded.
    None where that cannot be told; kwargs, of AutoConfig.from_pretrained."""
    try:
        config = AutoConfig.from_pretrained(name, **kwargs)
        with torch.device("meta"):
            return class_of(config).from_config(config, trust_remote_code=kwargs.get("trust_remote_code", False))
    except Exception:  # loading will say what is wrong
        return None


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


def freeze_what_is_not_saved(model: torch.nn.Module) -> None:
    """Parameters that save_pretrained leaves out (Marian's sinusoids) do not train: what is saved would be another."""
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in left_out):
            parameter.requires_grad_(False)


def disable_dropout(model: torch.nn.Module) -> None:
    """Sets every dropout probability of a model to 0: nn.Dropout's, and the numbers that attention layers and
    configurations hold. Dropout noise on one side of log π/π_ref would be noise in the reward. Adapters keep theirs."""
    modules = [module for path, module in model.named_modules() if "lora_dropout" not in path]
    for module in modules:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for holder in [*modules, *(m.config for m in modules if hasattr(getattr(m, "config", None), "__dict__"))]:
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
