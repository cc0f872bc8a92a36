"""A model as a folder that transformers loads with its own classes, GPT2LMHeadModel and Qwen3ForCausalLM.

Every file is written here: what save_pretrained writes differs between versions of transformers, and some of them
refuse what others wrote (measured with 4.57 and 5.24, Nov 2026).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from shards.tokenizer import EOT_TEXT, Tokenizer
from train.config import ModelConfig
from train.model.gpt import Model

DtypeName = Literal["f32", "bf16", "f16"]
DTYPES: dict[DtypeName, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def write(model: Model, tokenizer: Tokenizer, dtype: torch.dtype, folder: Path) -> None:
    """Write the model, its weights in `dtype`, and its tokenizer into `folder`, which exists."""
    config = model.config
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in weights(model)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})  # transformers asks for the metadata
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    form = _gpt2_config(config) if config.is_gpt2 else _qwen3_config(config)
    torch_dtype = _NAMES[dtype]  # transformers 4 and 5 have a name each for it
    _write_json(
        folder / "config.json",
        {
            **form,
            **ends,
            "vocab_size": tokenizer.vocab_size,
            "tie_word_embeddings": config.is_tied,
            "dtype": torch_dtype,
            "torch_dtype": torch_dtype,
        },
    )
    _write_json(folder / "generation_config.json", {**ends, "do_sample": True, "temperature": 0.8, "top_k": 50})
    _write_tokenizer(tokenizer, config.seq_len, folder)


def weights(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the name it has in transformers, without the rows that only pad the vocabulary."""
    state = model.state_dict()
    yield from _gpt2_weights(state, model) if model.config.is_gpt2 else _qwen3_weights(state, model)
    if not model.config.is_tied:
        yield "lm_head.weight", state["head.weight"][: model.vocab_size]


def _gpt2_weights(state: dict[str, Tensor], model: Model) -> Iterator[tuple[str, Tensor]]:
    """GPT-2's matrices are stored as (inputs, outputs), and q, k and v as one; it has no form without their biases."""
    yield "transformer.wte.weight", state["embed.weight"][: model.vocab_size]
    yield "transformer.wpe.weight", state["positions.weight"]
    layers = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2"}
    layers |= {"attention.o": "attn.c_proj", "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
    none = torch.zeros(model.config.d_model)
    for i in range(model.config.n_layer):
        ours, theirs = f"blocks.{i}", f"transformer.h.{i}"
        qkv = [f"{ours}.attention.{part}" for part in "qkv"]
        yield f"{theirs}.attn.c_attn.weight", torch.cat([state[f"{name}.weight"] for name in qkv]).T
        yield f"{theirs}.attn.c_attn.bias", torch.cat([state.get(f"{name}.bias", none) for name in qkv])
        for name, its in layers.items():
            weight = state[f"{ours}.{name}.weight"]
            yield f"{theirs}.{its}.weight", weight.T if weight.dim() == 2 else weight
            yield f"{theirs}.{its}.bias", state[f"{ours}.{name}.bias"]
    yield "transformer.ln_f.weight", state["norm.weight"]
    yield "transformer.ln_f.bias", state["norm.bias"]


def _qwen3_weights(state: dict[str, Tensor], model: Model) -> Iterator[tuple[str, Tensor]]:
    yield "model.embed_tokens.weight", state["embed.weight"][: model.vocab_size]
    layers = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    layers |= {f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    layers |= {f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
    layers |= {f"feed_forward.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    for i in range(model.config.n_layer):
        for name, its in layers.items():
            yield f"model.layers.{i}.{its}.weight", state[f"blocks.{i}.{name}.weight"]
    yield "model.norm.weight", state["norm.weight"]


def _gpt2_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": config.seq_len,
        "n_ctx": config.seq_len,  # transformers 5 writes it no more, and llama.cpp's converter still reads it
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.ff_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }


def _qwen3_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "max_position_embeddings": config.seq_len,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.d_model // config.n_head,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_theta,  # transformers 4 reads this one, and silently takes 10,000 without it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and 5 this one
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "use_sliding_window": False,
    }


def _write_tokenizer(tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    """End-of-text is a special token here: transformers must know what to leave out of a text."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    whole = json.loads(tokenizer.to_json())
    whole["added_tokens"] = [{"id": tokenizer.eot, "content": EOT_TEXT, **flags}]
    _write_json(folder / "tokenizer.json", whole)
    _write_json(
        folder / "tokenizer_config.json",
        {
            # the one class that transformers 4 and 5 both have, and the one that adds no normalisation
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(tokenizer.eot): {"content": EOT_TEXT, **flags}},
            "bos_token": EOT_TEXT,
            "eos_token": EOT_TEXT,
            "unk_token": EOT_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": seq_len,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
