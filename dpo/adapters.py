"""Adapters of PEFT: found, loaded, added, named."""

import difflib
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers.utils import find_adapter_config_file

from dpo.rows import first_line

# Options of LoRA that leave its start to random numbers and zeros.
STARTS_ANEW = """r lora_alpha lora_dropout target_modules exclude_modules modules_to_save use_rslora bias task_type
layers_to_transform layers_pattern rank_pattern alpha_pattern fan_in_fan_out init_lora_weights peft_type peft_version
base_model_name_or_path revision inference_mode auto_mapping"""


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
    elif is_open:  # PEFT itself takes no choice of its own where experts are single parameters
        peft_config.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
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


def starts_from_base(peft_config) -> bool:
    """Whether an adapter (a peft.PeftConfig, a dict of LoraConfig's arguments, or None) may begin with something worked
    out of the base's weights: PiSSA and its like, DoRA, what is no LoRA."""
    if peft_config is None:
        return False
    config = LoraConfig(**peft_config) if isinstance(peft_config, dict) else peft_config
    if type(config) is not LoraConfig or config.init_lora_weights not in (True, False, "gaussian"):
        return True
    usual, own = LoraConfig().to_dict(), config.to_dict()
    return any(own[name] != usual[name] for name in own.keys() - STARTS_ANEW.split())


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


def drops_out(model: torch.nn.Module) -> bool:
    """Whether an adapter of a model has dropout, which adapters keep."""
    return any("lora_dropout" in name and getattr(module, "p", 0) > 0 for name, module in model.named_modules())


def names_of_linear_layers(model: torch.nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
