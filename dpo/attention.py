"""Attention over the segments of a flat row, for any model that asks transformers' AttentionInterface for attention.

A flat row holds many sequences one after the other, (1, U) tokens, none of them padding. Its mask says in a few numbers
what a dense one would in U² cells: int64 (1, 1, N, 3), of each of N segments how many tokens it has, and what it sees
before itself: of which other segment, the first how many tokens. Inside itself attention is causal.
`attend_by_segments(model)` teaches this to a model; whether its family then computes what it should says
`checks.layout_error`.
"""

import functools
import sys

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "segments_else_"  # of the registered names: what follows is the attention of all other batches
KNOWN = "s_aux", "position_ids"  # of the tensors that an attention function may be given


def attend_by_segments(model: torch.nn.Module) -> None:
    """Lets a model of transformers read flat rows. Other batches reach the attention that it had, as before.

    Raises: ValueError if it is no model of transformers.
    """
    if not (configs := _text_configs(model)):
        raise ValueError("its attention cannot be set, it is no model of transformers")
    for config in configs:
        kind = (config._attn_implementation or "eager").removeprefix(PREFIX)
        AttentionInterface.register(PREFIX + kind, functools.partial(attend, otherwise=kind))
        if kind in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(PREFIX + kind, ALL_MASK_ATTENTION_FUNCTIONS[kind])
        config._attn_implementation = PREFIX + kind


def attend_as_before(model: torch.nn.Module) -> None:
    """Takes back what `attend_by_segments` did."""
    for config in _text_configs(model):
        config._attn_implementation = (config._attn_implementation or "eager").removeprefix(PREFIX)


def _text_configs(model: torch.nn.Module) -> list[PreTrainedConfig]:
    """The configurations of the language model inside a model, which its layers hold; a model that sees has others."""
    held = [config for m in model.modules() if isinstance(config := getattr(m, "config", None), PreTrainedConfig)]
    kind = type(held[0].get_text_config()) if held else None
    return list({id(config): config for config in held if type(config) is kind}.values())


def is_segments(name: str, mask: torch.Tensor | None) -> bool:
    """Whether an input of that name says of a flat row which segments it has."""
    return name == "attention_mask" and mask is not None and mask.ndim == 4 and mask.dtype == torch.int64


def attend(module, query, key, value, attention_mask, *, otherwise: str, scaling=None, dropout=0.0, **kwargs):
    """An attention function as transformers calls it.

    Args: query (B, H, U, D), key and value (B, H_kv, U, D); attention_mask, of segments as above, or whatever the
    attention `otherwise` takes; kwargs, among them sliding_window, softcap and s_aux (sinks).
    Returns: ((B, U, H, D), None).
    """
    if not is_segments("attention_mask", attention_mask):
        files = [sys.modules[kind.__module__] for kind in type(module).__mro__]
        eager = next((f for file in files if (f := getattr(file, "eager_attention_forward", None))), None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(otherwise, eager)
        return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise ValueError("attention over segments has no dropout: set disable_dropout")
    if others := [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in KNOWN]:
        raise ValueError(f"attention over segments has no {others[0]}")  # which may be zero so far
    segments = tuple(map(tuple, attention_mask[0, 0].tolist()))
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if softcap is None and sinks is None and fits_varlen(query, value):
        return attend_varlen(query, key, value, segments, scale=scaling, window=window), None
    lengths = [length for length, _, _ in segments]
    queries, keys, values = (each.split(lengths, dim=2) for each in (query, key, value))  # whose backward is one cat
    outputs = []
    for q, k, v, (_, other, seen) in zip(queries, keys, values, segments, strict=True):
        if seen:
            k, v = (torch.cat([own[other][:, :, :seen], each], dim=2) for own, each in ((keys, k), (values, v)))
        outputs.append(attend_segment(q, k, v, scale=scaling, window=window, softcap=softcap, sinks=sinks))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def attend_segment(query, key, value, *, scale=None, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """Causal attention of the last queries of a sequence to all of it.

    Args: query (1, H, Q, D); key, value (1, H_kv, K, D), Q ≤ K; window, how many keys each query sees at most, itself
    included; softcap, c·tanh(score/c) in place of scores (Gemma 2); sinks (H,), logits that take part in each softmax
    and carry nothing (gpt-oss). Returns: (1, H, Q, D).
    """
    Q, K, grouped = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    plain = softcap is None and sinks is None
    if plain and Q == K and (window is None or window >= K):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = causal_mask(Q, K, window, query.dtype, query.device)
    if plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    if grouped:
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(1, -1, Q, 1)], dim=-1)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))[..., :K].to(value.dtype) @ value


def causal_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(Q, K) 0 where the last queries of a sequence see its keys, −∞ elsewhere: a corner of a square one."""
    size = 1 << (keys - 1).bit_length()
    return _square_mask(size, window, dtype, device)[keys - queries : keys, :keys]


@functools.lru_cache(maxsize=4)  # for all segments and layers of a few batches
def _square_mask(size: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    distance = torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)
    is_seen = (distance >= 0) & (distance < (window or size))
    return torch.zeros(size, size, dtype=dtype, device=device).masked_fill(~is_seen, -torch.inf)


def fits_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's FlashAttention takes heads like these, on this machine."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    width, is_new = query.shape[-1], torch.cuda.get_device_capability(query.device) >= (8, 0)
    return is_new and width == value.shape[-1] and width % 8 == 0 and width <= 256


def attend_varlen(query, key, value, segments: tuple, *, scale: float | None, window: int | None) -> torch.Tensor:
    """The same for all segments at once, on a GPU, by torch's FlashAttention for sequences of differing length, in
    float16 or bfloat16: what a segment sees of another is gathered before it. Returns: (1, U, H, D)."""
    from torch.nn.attention.varlen import varlen_attn  # older builds of torch have none

    index, starts_q, starts_k, most_q, most_k = varlen_index(segments, query.device)
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (U, H, D)
    if index is not None:
        key, value = key[index], value[index]
    sizes = {"window_size": (-1 if window is None else window - 1, 0), "enable_gqa": query.shape[1] != key.shape[1]}
    return varlen_attn(query, key, value, starts_q, starts_k, most_q, most_k, scale=scale, **sizes)[None]


@functools.lru_cache(maxsize=4)
def varlen_index(segments: tuple, device: torch.device) -> tuple:
    """(where the keys of all segments are gathered from, or None if each sees itself only; (N + 1,) int32 where the
    queries and the keys of each begin; the most queries and keys that one has)."""
    lengths = [length for length, _, _ in segments]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    keys = [length + seen for length, _, seen in segments]

    def there(values: torch.Tensor) -> torch.Tensor:  # from pinned memory: nobody waits
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values

    index = None
    if any(seen for _, _, seen in segments):
        whole = torch.arange(int(starts[-1]))
        seen = [whole[starts[other] : starts[other] + count] for _, other, count in segments]
        own = whole.split(lengths)
        index = there(torch.cat([part for both in zip(seen, own, strict=True) for part in both]))
    starts_k = torch.tensor([0, *keys]).cumsum(0)
    return index, there(starts.int()), there(starts_k.int()), max(lengths), max(keys)
