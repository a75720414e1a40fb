"""Loads the policy and its tokenizer, adds a LoRA adapter, switches dropout off, makes the optimizer."""

import json
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file, has_file

from dpo.data import first_line


def load_model(name: str, *, dtype: str = "float32", revision: str = "main", **kwargs) -> torch.nn.Module:
    """A causal language model by Hub name or directory; one that holds a PEFT adapter gives the base model with that
    adapter, trainable.

    Args: dtype, of the weights (AdamW's updates at a learning rate of 1e-6 are too small for bfloat16's 8 bits);
    revision, of name on the Hub; kwargs, of from_pretrained (None values are left out).
    Raises: ValueError in one line if there is no such model.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    base = adapter_base(name, revision)
    try:
        if base is None:
            return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **kwargs)
        return PeftModel.from_pretrained(model, name, is_trainable=True, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot load the model {str(base or name)!r}: {first_line(error)}") from error


def adapter_base(name: str, revision: str = "main") -> str | None:
    """The base model of a Hub name or directory that holds a PEFT adapter; None for any other name."""
    try:
        path = find_adapter_config_file(name, revision=revision)
    except OSError:  # no directory, and no name that the Hub could have
        return None
    return json.loads(Path(path).read_text())["base_model_name_or_path"] if path else None


def load_tokenizer(name: str, *, revision: str = "main", trust_remote_code: bool = False):
    """The tokenizer of a model; where it has no padding token, its EOS serves as one (masks tell them apart)."""
    base = adapter_base(name, revision)
    if base and not has_file(name, "tokenizer_config.json", revision=revision):
        name, revision = base, "main"  # PEFT itself saves an adapter without its tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot load the tokenizer of {str(name)!r}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_positions(model: torch.nn.Module, sets: list) -> None:
    """Refuses tokenised rows that are longer than a model with an embedding for each position (GPT-2, OPT) can read."""
    config = getattr(model, "config", None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
    tables = [m for name, m in model.named_modules() if re.search(r"wpe$|position", name.rpartition(".")[2])]
    if limit is None or not any(isinstance(m, torch.nn.Embedding) and m.num_embeddings >= limit for m in tables):
        return
    longest = max(max(rows["length"][:]) for rows in sets)
    if longest > limit:
        raise ValueError(f"rows have up to {longest} tokens, the model has {limit} positions: set max_length {limit}")


def add_adapter(model: torch.nn.Module, peft_config) -> torch.nn.Module:
    """Wraps a model so that only the adapter of peft_config (a peft.PeftConfig, or a dict of LoraConfig's) trains."""
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already, which trains on: leave out use_peft and peft_config")
    peft_config = LoraConfig(task_type="CAUSAL_LM", **peft_config) if isinstance(peft_config, dict) else peft_config
    if peft_config.is_prompt_learning:
        raise ValueError("prompt learning puts tokens before the text, which moves the completion: use LoRA")
    return get_peft_model(model, peft_config)


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

    Args: name, adamw_torch (the fused kernel where there is one), adamw_8bit and paged_adamw_8bit (bitsandbytes),
    rmsprop (what the DPO paper used) or sgd; betas and eps are Adam's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if name in ("rmsprop", "sgd"):
        return {"rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}[name](groups, lr=learning_rate)
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ValueError(f"optim {name} needs bitsandbytes: pip install bitsandbytes") from error
    adamw = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[name]
    return adamw(groups, lr=learning_rate, betas=betas, eps=eps)
