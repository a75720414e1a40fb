"""Loads the policy and its tokenizer, adds a LoRA adapter, switches dropout off, makes the optimizer."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data import first_line


def load_model(name: str, *, dtype: str = "float32", **kwargs) -> torch.nn.Module:
    """A causal language model by Hub name or directory; a directory that holds a PEFT adapter gives the base model with
    that adapter, trainable.

    Args: dtype, of the weights. The default keeps them in float32: AdamW's updates at a learning rate of 1e-6 are too
    small for bfloat16's 8 bits. kwargs, of from_pretrained (None values are left out).
    Raises: ValueError in one line if there is no such model.
    """
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    base = adapter_base(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(base or name, dtype=dtype, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot load the model {str(base or name)!r}: {first_line(error)}") from error
    return PeftModel.from_pretrained(model, name, is_trainable=True) if base else model


def adapter_base(name: str) -> str | None:
    """The base model of a directory that holds a PEFT adapter; None for any other name."""
    path = Path(name) / "adapter_config.json"
    return json.loads(path.read_text())["base_model_name_or_path"] if path.exists() else None


def load_tokenizer(name: str, **kwargs):
    """The tokenizer of a model; where it has no padding token, its EOS serves as one (masks tell them apart)."""
    if adapter_base(name) and not (Path(name) / "tokenizer_config.json").exists():
        name = adapter_base(name)  # PEFT itself saves an adapter without its tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, **{key: value for key, value in kwargs.items() if value is not None}
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot load the tokenizer of {str(name)!r}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    for path, module in model.named_modules():
        if "lora_dropout" in path:
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def make_optimizer(
    model: torch.nn.Module,
    *,
    name: str = "adamw_torch",
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """An optimizer over the parameters that train; biases and norms, all of one dimension, do not decay.

    Args: name, adamw_torch (the fused kernel where there is one), adamw_8bit and paged_adamw_8bit (bitsandbytes),
    rmsprop (what the DPO paper used) or sgd; betas and eps are Adam's.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=learning_rate)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ValueError(f"optim {name} needs bitsandbytes: pip install bitsandbytes") from error
    adamw = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}[name]
    return adamw(groups, lr=learning_rate, betas=betas, eps=eps)
