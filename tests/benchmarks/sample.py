"""Tokens a second of sampling, against reading the whole context again for each token, in one run.

    python -P tests/benchmarks/sample.py [--tokens 512] [--rounds 3] [--layers 6] [--width 384] [--device cpu]

The other is nanoGPT's generate() in our own words, which is how it is done without the keys and values of the tokens
before. Random weights, GPT-2's vocabulary, a context of 1,024, no end-of-text; rounds alternate, medians are shown.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from prepare.tokens import vocabulary
from train.config import ModelConfig
from train.model.gpt import Model
from train.sample import Sampling, pick, stream

PROMPT = "In this paper we"
SAMPLING = Sampling(temperature=0)


def again(model: Model, ids: list[int], tokens: int) -> None:
    generator, device = torch.Generator(), next(model.parameters()).device
    with torch.no_grad():
        for _ in range(tokens):
            context = torch.tensor([ids[-model.config.seq_len :]], device=device)
            ids.append(pick(model(context)[0, -1].float().cpu(), SAMPLING, ids, generator))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("rounds", 3), ("layers", 6), ("width", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    tokenizer = vocabulary.gpt2()
    config = ModelConfig(n_layer=asked.layers, n_head=asked.width // 64, d_model=asked.width, seq_len=1024)
    model = Model(config, tokenizer.vocab_size).to(asked.device).eval()
    prompt = [tokenizer.eot, *tokenizer.encode(PROMPT)]
    ours, theirs = [], []
    for _ in range(asked.rounds):
        theirs.append(seconds(lambda: again(model, list(prompt), asked.tokens)))
        ours.append(seconds(lambda: list(stream(model, tokenizer, PROMPT, asked.tokens, SAMPLING))))
    rates = {"keys and values kept": ours, "whole context again": theirs}
    for name, times in rates.items():
        print(f"{name:<22} {asked.tokens / statistics.median(times):8.1f} tok/s, {model.parameter_count() / 1e6:.0f} M")
    print(f"{'ratio':<22} {statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):8.1f}x")


if __name__ == "__main__":
    main()
