"""Small models of all four forms, and a vocabulary of their own, for what is exported."""

import torch
from harness import stdlib_texts

from prepare.text.documents import clean
from prepare.tokens import vocabulary
from shards import Tokenizer
from train.config import ModelConfig
from train.model.gpt import Model

SIZES = {"n_layer": 3, "n_head": 4, "d_model": 64, "seq_len": 96}
FORMS = {
    "gpt2": ModelConfig(family="gpt2", **SIZES),
    "gpt2-book": ModelConfig(family="gpt2", tied=False, qkv_bias=False, **SIZES),
    "modern": ModelConfig(family="modern", rope_theta=50_000.0, **SIZES),
    "modern-tied": ModelConfig(family="modern", tied=True, d_ff=80, **SIZES),
}


def small_tokenizer() -> Tokenizer:
    return vocabulary.train_bpe([clean((stdlib_texts(),))], 500)


def randomised(form: str, vocab_size: int) -> Model:
    """Weights far from their zeros and ones, so that none of them can be missed."""
    torch.manual_seed(0)
    model = Model(FORMS[form], vocab_size).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model
