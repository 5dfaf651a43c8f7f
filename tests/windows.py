"""Single passes for tests: windows of blocks in a cache, and plain forward passes without one."""

import torch
import torch.nn.functional as F

import fastdllm
from fastdllm import Decoding, attention_bias, attention_mask, block_causal, grouped_attention


def run_window(model, tokens, starts, cache, block_size):
    """Hidden states (B, T, D) of tokens (B, T), window i from position `starts[i]` in row i of the cache."""
    width = tokens.shape[1]
    sees = [[block_causal(i, block_size) for i in range(start, start + width)] for start in starts]
    return run_sees(model, tokens, starts, cache, sees)


def run_sees(model, tokens, starts, cache, sees, decoding=None, has_masks=False):
    """The same for windows whose tokens see what `sees` says, a list of `Sees` for each row."""
    width, device = tokens.shape[1], tokens.device
    seen = fastdllm.round_up(max(starts) + width, fastdllm.KEY_STEP)
    write, read = fastdllm.cache_places([*range(len(starts))], starts, width, seen, device)
    sees, decoding = torch.tensor(sees, device=device), decoding or Decoding()
    return fastdllm.window_pass(model, cache, tokens, sees, write, read, decoding, has_masks)


def masked_forward(model, ids, mask):
    """Hidden states (1, T, D) of ids (T) without a cache, with a mask (T, T) bool."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    bias = attention_bias(mask[None], groups, model.weight.dtype)
    attend = lambda layer, *qkv: grouped_attention(*qkv, bias)
    return model(torch.tensor([ids]), torch.arange(len(ids))[None], attend)


def block_causal_mask(queries, keys, block_size):
    """The mask (queries, keys) of the last `queries` of `keys` positions."""
    sees = [block_causal(i, block_size) for i in range(keys - queries, keys)]
    return attention_mask(torch.tensor([sees]), keys)[0]


def block_forward(model, ids, block_size):
    return masked_forward(model, ids, block_causal_mask(len(ids), len(ids), block_size))


def causal_attend(layer, q, k, v):
    """torch's own causal kernel, as the `attend` of a forward pass."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def prompt_of(rng, length, top=280):
    return [rng.randrange(top) for _ in range(length)]


def decoding_of(case, **changes):
    """The `Decoding` of a golden case."""
    names = ["block_size", "sub_block_size", "threshold", "cache", "max_new_tokens", "stop_token_ids"]
    return Decoding(**{name: case[name] for name in names if name in case} | changes)
