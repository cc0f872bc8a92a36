"""What others train with, in our own words: a GPT-2 of torch's modules, and the same by hand, as a tutorial has it."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config import ModelConfig


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig, by_hand: bool) -> None:
        super().__init__()
        width = config.d_model
        self.heads, self.by_hand = config.n_head, by_hand
        self.norm1, self.norm2 = (HandNorm(width) if by_hand else nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if by_hand:
            self.register_buffer("mask", torch.triu(torch.ones(config.seq_len, config.seq_len), diagonal=1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.by_hand:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[: q.shape[2], : q.shape[2]], -torch.inf)
        return torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(B, T, D))
        hidden = self.up(self.norm2(x))
        if self.by_hand:
            inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * torch.pow(hidden, 3))
            return x + self.down(0.5 * hidden * (1 + torch.tanh(inner)))
        return x + self.down(F.gelu(hidden, approximate="tanh"))


class HandNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class Plain(nn.Module):
    def __init__(self, config: ModelConfig, vocab_size: int, by_hand: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model)
        self.blocks = nn.Sequential(*(PlainBlock(config, by_hand) for _ in range(config.n_layer)))
        self.norm = HandNorm(config.d_model) if by_hand else nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)
        nn.init.normal_(self.tokens.weight, 0.0, 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def plain_step(
    model: Plain, next_batch: Callable[[], tuple[Tensor, Tensor]], accumulation: int, autocast: Callable[[], object]
) -> Callable[[], Tensor]:
    """One step of the usual script: torch's own AdamW as it comes, cross-entropy of whole logits.

    By hand, it also scales the loss as fp16 needs, and asks for each micro-batch's loss.
    """
    by_hand = isinstance(model.norm, HandNorm)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(device.type, enabled=by_hand and device.type == "cuda")

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(accumulation):
            inputs, targets = next_batch()
            with autocast():
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / accumulation
            scaler.scale(loss).backward()
            if by_hand:
                loss.item()
        if not by_hand:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach() * accumulation

    return step
