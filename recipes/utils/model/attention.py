"""Document-wise attention for packed rows, from torch itself: each chat of a row attends to itself alone.

sdpa keeps packed chats apart with a mask of N × N for N tokens and computes all N² products. The kernel of
torch.nn.attention.varlen (FlashAttention-2, inside torch) takes the borders of the chats and computes theirs alone.
transformers knows it as `varlen`; what is no packed row (padded batches, generation with a cache) goes through sdpa.
"""

import inspect

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from recipes.utils.model.base import VARLEN

# torch 2.11 groups heads unasked; later ones want to be told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def document_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention as transformers calls it: `query` (batch, heads, tokens, head size), `key` and `value` with the heads
    of the model's key-value groups; returns (batch, tokens, heads, head size) and None for the weights. The borders
    are the collator's `cu_seq_lens_q`, or where `position_ids` do not go on by one."""
    borders, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    rows, positions = query.shape[0], kwargs.get("position_ids")
    if borders is None and attention_mask is None and positions is not None and 1 < query.shape[2] == key.shape[2]:
        first = pad(positions.expand(rows, -1).diff(dim=1) != 1, (1, 0), value=True).flatten()  # of each document
        borders = pad(first.nonzero().flatten(), (0, 1), value=len(first)).to(torch.int32)  # as the kernel wants it
    if borders is None or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        lacks = "attention_dropout, soft cap or sinks; use --model.attn_implementation eager"
        raise ValueError(f"varlen attention has no {lacks}")
    longest = int(borders.diff().max()) if longest is None else longest
    window = kwargs.get("sliding_window")
    window = window if window and window < longest else None
    # A trained embedding makes float32 of what the values' projection, under autocast, has in 16 bit; autocast casts
    # for sdpa and does not know this kernel, which takes one dtype of 16 bit.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    # one row of all tokens: (tokens, heads, head size)
    query, key, value = (states.to(dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    # the memory model calls the kernel too, with tensors that hold nothing
    attend = varlen_kernel if query.is_cuda or isinstance(query, FakeTensor) else attend_by_document
    return attend(query, key, value, borders, longest, scaling, window).unflatten(0, (rows, -1)), None


def varlen_kernel(query, key, value, borders, longest: int, scale, window: int | None):
    """torch's kernel. `window`: how many tokens a token sees, itself included; None for all before it."""
    how = {"scale": scale, "window_size": (window - 1 if window else -1, 0), **GROUPED}
    return varlen_attn(query, key, value, borders, borders, longest, longest, **how)


def attend_by_document(query, key, value, borders, longest, scale, window):
    """The same with sdpa, document after document: what the kernel is held against, and what a CPU trains with."""
    parts = []
    for start, end in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        mask = None
        if window and end - start > window:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - window)
        parts.append(scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True))
    return torch.cat(parts, dim=1).transpose(0, 1)


def _mask(batch_size, q_length, kv_length, *args, attention_mask=None, allow_is_causal_skip=True, **kwargs):
    """None for packed rows, the only ones without a 2-D mask that may not be plainly causal; for others sdpa's mask."""
    if attention_mask is None and not allow_is_causal_skip and 1 < q_length == kv_length:
        return None
    kwargs |= {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip}
    return sdpa_mask(batch_size, q_length, kv_length, *args, **kwargs)


AttentionInterface.register(VARLEN, document_attention)
AttentionMaskInterface.register(VARLEN, _mask)
