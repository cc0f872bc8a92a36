"""Causal attention that does not look past the documents in a window, as data/document_ends.py says where they end."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

WIDEST_HEAD = 256  # that flash-attention takes; it also wants a multiple of 8


def _causal() -> Callable[..., Any] | None:
    """varlen_attn that looks back only: torch 2.10 calls it `is_causal`, later ones a window without a right side."""
    if varlen_attn is None:
        return None
    names = inspect.signature(varlen_attn).parameters
    settings = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    return partial(varlen_attn, **settings)


_VARLEN: Any = _causal()


def attended(documents: Tensor, sequences: int, seq_len: int, head_width: int, dropout: float) -> Tensor:
    """What `attend` takes, made once for all layers: `documents` itself where the GPU has variable-length attention
    for the type that autocast computes in, elsewhere the mask, (B, 1, T, T) bool, of what each token looks at."""
    if _has_varlen(documents.device, head_width) and not dropout:
        return documents
    places = torch.arange(sequences * seq_len, dtype=torch.int32, device=documents.device)
    piece = torch.searchsorted(documents, places, right=True).view(sequences, seq_len)
    return (piece[:, None, :, None] == piece[:, None, None, :]).tril()


class Past:
    """The keys and values of the tokens so far, for one layer: (B, H, T, K) each, in memory for `length` tokens."""

    def __init__(self, length: int) -> None:
        self._length, self._count = length, 0
        self._memory: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All of them, those of the newest tokens at the end."""
        if self._memory is None:
            B, H, _, K = k.shape
            self._memory = k.new_empty(B, H, self._length, K), v.new_empty(B, H, self._length, K)
        first, self._count = self._count, self._count + k.shape[2]
        for memory, new in zip(self._memory, (k, v), strict=True):
            memory[:, :, first : self._count] = new
        return self._memory[0][:, :, : self._count], self._memory[1][:, :, : self._count]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Causal attention of q, k and v, (B, H, T, K) each, within `seen`, or without borders.

    One query may come with the keys and values of all tokens before it.
    """
    if seen is None:
        causal = q.shape[2] == k.shape[2]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    if seen.dtype is torch.bool:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)
    B, H, T, _ = v.shape
    # rotary positions left q and k in fp32, and autocast does not know this operator
    flat = [each.transpose(1, 2).flatten(0, 1).to(v.dtype) for each in (q, k, v)]
    return _VARLEN(*flat, seen, seen, T, T).view(B, T, H, -1).transpose(1, 2)  # type: ignore[no-any-return]


def _has_varlen(device: torch.device, head_width: int) -> bool:
    return (
        _VARLEN is not None
        and device.type == "cuda"
        and torch.is_autocast_enabled("cuda")
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and head_width % 8 == 0
        and head_width <= WIDEST_HEAD
    )
