"""Attention for training: `train.visibility`, computed block by block on CPUs and by sparse tiles on CUDA.

The mask itself is in train.py; here it comes in as a bool tensor, or as the function `sees`. Shapes: B rows,
H query heads, K key heads, d head size, L positions of a row, V noisy views, T = (V + 1) L positions of an
input [noisy views ; clean], S keys.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The `attend` of `Qwen2.forward` that makes it the ordinary AR model, without a cache."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`grouped_attention` in plain products, with a bool mask (B or 1, T, S); backward it is fast on CPUs."""
    B, H, T, d = q.shape
    K = k.shape[1]  # query heads of one key head are more rows of the same product
    scores = ((q * d**-0.5).reshape(B, K, -1, d) @ k.transpose(2, 3)).float()
    unseen = ~mask[:, None, None]
    scores = scores.view(B, K, -1, *mask.shape[1:]).masked_fill(unseen, -torch.inf).view_as(scores)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).reshape(B, H, T, d)


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, length: int, block_size: int, views: int
) -> Tensor:
    """Training's mask applied block by block, so that few queries meet a key that they cannot see.

    q (B, H, T, d), k and v (B, K, T, d). mask (B or 1, L, L): what the clean copy sees of itself; a noisy
    query sees the same, with its own block taken from its own view. With n blocks this is about
    (n + 1) / (2 n (V + 1)) of the dense mask's work.
    """
    into_rows = lambda x: x[:, :, :-length].unflatten(2, (views, length)).transpose(1, 2).flatten(0, 1)
    # (B * V, heads, L, d)
    noisy_q, noisy_k, noisy_v = (into_rows(x) if views else None for x in (q, k, v))
    clean_q, clean_k, clean_v = (x[:, :, -length:] for x in (q, k, v))
    noisy, clean = [], []
    for start in range(0, length, block_size):
        own, end = slice(start, start + block_size), start + block_size
        seen = mask[:, own, :end]
        clean.append(plain_attention(clean_q[:, :, own], clean_k[:, :, :end], clean_v[:, :, :end], seen))
        if views:
            earlier = (x[:, :, :start].repeat_interleave(views, dim=0) for x in (clean_k, clean_v))
            own_view = noisy_k[:, :, own], noisy_v[:, :, own]
            keys, values = (torch.cat(parts, dim=2) for parts in zip(earlier, own_view))
            if len(seen) > 1:
                seen = seen.repeat_interleave(views, dim=0)
            noisy.append(plain_attention(noisy_q[:, :, own], keys, values, seen))
    if views:
        noisy = [torch.cat(noisy, dim=2).unflatten(0, (-1, views)).transpose(1, 2).flatten(2, 3)]
    return torch.cat(noisy + clean, dim=2)


# --- FlexAttention ---
# Imported where it runs, since it loads torch's compiler, which takes a second.


def can_compile() -> bool:
    """Whether torch.compile finds what it needs to make CUDA kernels: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").exists()


@cache
def compiled_flex() -> Callable:
    """One kernel per shape; gradients or none, views, and kinds of loss make a dozen shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, tiles) -> Tensor:
    """FlexAttention: tiles of the mask in which nothing is seen are skipped; see `sparse_mask`."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel = compiled_flex() if q.is_cuda else flex_attention  # not compiled it is a dense reference
    return kernel(q.to(v.dtype), k.to(v.dtype), v, block_mask=tiles, enable_gqa=True)


def sparse_mask(sees: Callable, rows: int | None, side: int, device: torch.device):
    """FlexAttention's form of `sees(row, head, query, key)`: which tiles are seen, in part or as a whole.

    rows: None where all rows share it. side: T.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(sees, rows, None, side, side, device=device)
