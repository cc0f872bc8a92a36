"""GPT-2 and its modern successor in one page of torch.

`gpt2`: learned positions, LayerNorm, GELU (Radford et al. 2019); the weights OpenAI published fit. `modern`: exactly
Qwen3's form, so that whatever runs Qwen3 runs it: RoPE, RMSNorm, per-head query and key norms, SwiGLU, no biases.

Shapes: B sequences, T tokens, D d_model, H heads, K = D / H, F ff_width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from train.config import ModelConfig
from train.model.attention import Past, attend, attended
from train.model.loss import linear_cross_entropy

VOCAB_MULTIPLE = 64  # tensor cores want it; the rows past the vocabulary are never seen, nor counted


class RMSNorm(nn.RMSNorm):
    """torch's, computed in fp32 whatever the input's type: what autocast does on CUDA, and not on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) fp32."""
        return super().forward(x.float())


def norm(config: ModelConfig, width: int) -> nn.Module:
    """The family's normalisation over the last dimension."""
    return nn.LayerNorm(width, eps=1e-5) if config.is_gpt2 else RMSNorm(width, eps=1e-6)


def _autocasts_to_bf16(x: Tensor) -> bool:
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16


class Attention(nn.Module):
    """Causal self-attention. q, k and v are separate matrices: Muon orthogonalises each for itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gpt2 = config.is_gpt2
        self.n_head, self.dropout = config.n_head, config.dropout
        self.q = nn.Linear(config.d_model, config.d_model, bias=config.has_qkv_bias)
        self.k = nn.Linear(config.d_model, config.d_model, bias=config.has_qkv_bias)
        self.v = nn.Linear(config.d_model, config.d_model, bias=config.has_qkv_bias)
        self.o = nn.Linear(config.d_model, config.d_model, bias=gpt2)
        head_width = config.d_model // config.n_head
        self.q_norm = nn.Identity() if gpt2 else norm(config, head_width)
        self.k_norm = nn.Identity() if gpt2 else norm(config, head_width)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, seen: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). `seen` is what attention.attended made, or None; `past` has the tokens before."""
        B, T, D = x.shape
        q, k, v = (each.view(B, T, self.n_head, -1) for each in self._projected(x))  # (B, T, H, K)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # the layout that attention wants, without a copy
        if past is not None:
            k, v = past.append(k, v)
        y = attend(q, k, v, seen, self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of (B, T, D), each (B, T, D), as one matrix product."""
        each = self.q, self.k, self.v
        weight = torch.cat([linear.weight for linear in each])
        bias = None if self.q.bias is None else torch.cat([linear.bias for linear in each])
        return F.linear(x, weight, bias).chunk(3, dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), the first half of each head paired with the second, as Qwen and Llama do.

    x is (B, T, H, K); cos and sin are (T, 1, K / 2).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FeedForward(nn.Module):
    """GELU (tanh form) for gpt2, SwiGLU (Shazeer 2020) for modern."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        gpt2 = config.is_gpt2
        self.gate = None if gpt2 else nn.Linear(config.d_model, config.ff_width, bias=False)
        self.up = nn.Linear(config.d_model, config.ff_width, bias=gpt2)
        self.down = nn.Linear(config.ff_width, config.d_model, bias=gpt2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden = F.gelu(self.up(x), approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Norm, attention, norm, feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config, config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = norm(config, config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, seen: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, seen, past))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Token ids to next-token logits. `generator` seeds the initial weights."""

    rope_cos: Tensor
    rope_sin: Tensor
    checkpoint_activations = False  # keep only what enters each block, and compute the rest again in the backward pass
    compiled_hidden: Callable[..., Tensor] | None = None  # hidden() and the loss's softmax_(), where compile_model
    compiled_softmax: Callable[..., Tensor] | None = None  # has compiled them: for what is called in few shapes

    def __init__(self, config: ModelConfig, vocab_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        assert config.d_model % config.n_head == 0
        self.config, self.vocab_size = config, vocab_size
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embed = nn.Embedding(padded, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model) if config.is_gpt2 else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = norm(config, config.d_model)
        self.head = None if config.is_tied else nn.Linear(config.d_model, padded, bias=False)
        if not config.is_gpt2:
            width = config.d_model // config.n_head
            rates = config.rope_theta ** (-torch.arange(0, width, 2).float() / width)
            angles = torch.arange(config.seq_len).float()[:, None] * rates  # (T, K / 2)
            self.register_buffer("rope_cos", angles.cos(), persistent=False)
            self.register_buffer("rope_sin", angles.sin(), persistent=False)
        match config.init:
            case "family":
                self._initialise(generator)
            case "torch":
                self._initialise_as_torch(generator)
            case _:
                assert_never(config.init)

    def hidden(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D): what the head reads. `seen` is what attention.attended made, or None."""
        assert self.config.seq_len >= ids.shape[1]
        x, rope = self._embedded(ids, 0)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, seen, use_reentrant=False)
            else:
                x = block(x, rope, seen)
        return self.norm(x)  # type: ignore[no-any-return]

    def next_logits(self, ids: Tensor, first: int, pasts: list[Past]) -> Tensor:
        """(B, T) int64, the tokens at `first` and after it -> (B, V) logits of what follows them.

        `pasts`, one for each block, has the `first` tokens before; either there are none of them, or T is 1.
        """
        x, rope = self._embedded(ids, first)
        for block, past in zip(self.blocks, pasts, strict=True):
            x = block(x, rope, None, past)
        return F.linear(self.norm(x[:, -1]), self._table)[..., : self.vocab_size]

    def _embedded(self, ids: Tensor, first: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What enters the blocks, (B, T, D), and the rotations of its positions, which begin at `first`."""
        places = slice(first, first + ids.shape[1])
        x = self.embed(ids)
        rope = None
        if self.positions is None:
            rope = self.rope_cos[places, None].type_as(x), self.rope_sin[places, None].type_as(x)
        else:
            x = x + self.positions.weight[places]
        match self.config.residual:
            case "fp32":
                pass
            case "bf16":
                x = x.to(torch.bfloat16) if _autocasts_to_bf16(x) else x  # fp16 has not the range for it
            case _:
                assert_never(self.config.residual)
        return self.dropout(x), rope

    def forward(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, V) logits. `documents` (data/document_ends.py): none looks into another."""
        return F.linear(self.hidden(ids, self._seen(ids, documents)), self._table)[..., : self.vocab_size]

    def loss(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T) and (B, T) int64 -> () fp32: the mean cross-entropy in nats. `documents` as in forward."""
        hidden = (self.compiled_hidden or self.hidden)(inputs, self._seen(inputs, documents))
        flat = hidden.flatten(0, 1), self._table, targets.flatten()
        return linear_cross_entropy(*flat, self.vocab_size, self.compiled_softmax)

    def _seen(self, ids: Tensor, documents: Tensor | None) -> Tensor | None:
        """Not compiled: a compiled function cannot ask what the GPU supports."""
        if documents is None:
            return None
        dropout = self.config.dropout if self.training else 0.0
        sequences, seq_len = ids.shape
        return attended(documents, sequences, seq_len, self.config.d_model // self.config.n_head, dropout)

    @property
    def _table(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def parameter_count(self) -> int:
        """Parameters, without the rows that only pad the vocabulary: the number that papers publish."""
        padding = (self.embed.num_embeddings - self.vocab_size) * self.config.d_model
        tables = 1 if self.head is None else 2
        return sum(parameter.numel() for parameter in self.parameters()) - tables * padding

    def _initialise(self, generator: torch.Generator | None) -> None:
        """gpt2 as its paper says, 0.02, and less by sqrt(2 layers) where a block adds to the stream; modern blocks add
        nothing at first. Every model begins within 0.1 of a guess's loss: a modern head is zero, GPT-2's has at most
        0.3 / sqrt(D) (0.02 would begin 0.15 above at D = 768), and a modern model whose head is its embedding has
        at most 6 / D, or it would begin by predicting the token it sees."""
        gpt2 = self.config.is_gpt2
        table = min(0.02, 0.3 / math.sqrt(self.config.d_model) if gpt2 else 6 / self.config.d_model)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("attention.o.weight", "feed_forward.down.weight")):
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if gpt2 else 0.0
                nn.init.normal_(parameter, 0.0, std, generator)
            elif name == "head.weight":
                nn.init.normal_(parameter, 0.0, table if gpt2 else 0.0, generator)
            elif name == "embed.weight":
                nn.init.normal_(parameter, 0.0, table if gpt2 or self.head is None else 1.0, generator)
            elif parameter.dim() == 2:
                std = 0.02 if gpt2 else 0.5 / math.sqrt(self.config.d_model)
                nn.init.normal_(parameter, 0.0, std, generator)

    def _initialise_as_torch(self, generator: torch.Generator | None) -> None:
        """What torch's modules draw by themselves, which most scripts leave as it is."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 1.0, generator)
            elif isinstance(module, nn.Linear):
                for parameter in module.parameters():
                    bound = 1 / math.sqrt(module.in_features)
                    nn.init.uniform_(parameter, -bound, bound, generator)
