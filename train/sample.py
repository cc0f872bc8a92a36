"""Text from a model, for a person to look at."""

import torch
from torch import Tensor

from shards.errors import RefusedError
from shards.tokenizer import Tokenizer
from train.model.gpt import Model

MIN_TEMPERATURE = 1e-3  # below, dividing by it says no more than which token is the most likely


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    *,
    seed: int = 0,
    temperature: float = 0.8,
    top_k: int = 50,
) -> str:
    """`prompt` and up to `tokens` more; ends early at end-of-text.

    Its own generator, so that sampling in the middle of a run does not change the run. `temperature` 0 takes the most
    likely token each time. RefusedError when a logit is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.eot, *tokenizer.encode(prompt)]
    training = model.training
    model.eval()
    for _ in range(tokens):
        context = torch.tensor([ids[-model.config.seq_len :]], device=device)
        token = _pick(model(context)[0, -1].float().cpu(), temperature, top_k, generator)
        if token == tokenizer.eot:
            break
        ids.append(token)
    model.train(training)
    return tokenizer.decode(ids[1:])


def _pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if not logits.isfinite().all():
        raise RefusedError("the model's logits are not finite", "it has diverged", "train it again at a lower rate")
    if not temperature >= MIN_TEMPERATURE:
        return int(logits.argmax())
    values, choices = logits.topk(min(top_k, len(logits)))
    chances = torch.softmax(values / temperature, dim=0)
    return int(choices[torch.multinomial(chances, 1, generator=generator)])
