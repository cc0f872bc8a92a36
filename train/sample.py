"""Text from a model, one token after another: for a person to look at, and for a server to send."""

import codecs
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shards.errors import RefusedError
from shards.tokenizer import Tokenizer
from train.model.attention import Past
from train.model.gpt import Model

MIN_TEMPERATURE = 1e-3  # below, dividing by it says no more than which token is the most likely


class Sampling(NamedTuple):
    """How the next token is chosen. Each field's neutral value leaves the model's probabilities as they are.

    `temperature` 0 takes the most likely token; `top_k` keeps so many of the most likely ones (0: all), `top_p` the
    fewest that have this probability together (1: all; Holtzman et al. 2020), `min_p` those with at least this part of
    the most likely one's (0: all; Nguyen et al. 2024). `repetition_penalty` divides the logits of tokens that came
    before (1: no; Keskar et al. 2019).
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


DEFAULT = Sampling()


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    sampling: Sampling = DEFAULT,
    *,
    seed: int = 0,
) -> str:
    """`prompt` and up to `tokens` more; ends early at end-of-text. See `stream`."""
    return prompt + "".join(stream(model, tokenizer, prompt, tokens, sampling, seed=seed))


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    sampling: Sampling = DEFAULT,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The continuation of `prompt` by up to `tokens`, in pieces of complete characters, as it is made.

    Ends early at end-of-text, and before the first of the strings `stop`. Its own generator, so that sampling in the
    middle of a run does not change the run. RefusedError when a logit is not finite.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""  # what may be the beginning of a stop string
    for token in _ids(model, [tokenizer.eot, *tokenizer.encode(prompt)], tokens, sampling, seed):
        if token == tokenizer.eot:
            break
        held += decoder.decode(tokenizer.tokens[token])
        if found := [at for word in stop if (at := held.find(word)) >= 0]:
            yield held[: min(found)]
            return
        ready = len(held) - _beginning(held, stop)
        if ready:
            yield held[:ready]
            held = held[ready:]
    if held := held + decoder.decode(b"", final=True):
        yield held


@torch.no_grad()
def _ids(model: Model, ids: list[int], tokens: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """Up to `tokens` ids that follow `ids`.

    The keys and values of the tokens before are kept while all fit into the model's context. Beyond it, positions move
    with every token, and the last window is read again each time.
    """
    device, seq_len = next(model.parameters()).device, model.config.seq_len
    generator = torch.Generator().manual_seed(seed)
    pasts = [Past(min(seq_len, len(ids) + tokens)) for _ in model.blocks]
    done = 0  # tokens that are in pasts
    for _ in range(tokens):
        training = model.training
        model.eval()
        if len(ids) <= seq_len:
            logits = model.next_logits(torch.tensor([ids[done:]], device=device), done, pasts)[0]
            done = len(ids)
        else:
            logits = model(torch.tensor([ids[-seq_len:]], device=device))[0, -1]
        model.train(training)
        ids.append(pick(logits.float().cpu(), sampling, ids, generator))
        yield ids[-1]


def pick(logits: Tensor, sampling: Sampling, before: Sequence[int], generator: torch.Generator) -> int:
    """One token by `logits`, (V,), after the tokens `before`. RefusedError when a logit is not finite."""
    if not logits.isfinite().all():
        raise RefusedError("the model's logits are not finite", "it has diverged", "train it again at a lower rate")
    if sampling.repetition_penalty != 1:
        came = torch.tensor(sorted(set(before)))
        values = logits[came]
        logits = logits.clone()
        logits[came] = torch.where(
            values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty
        )
    if not sampling.temperature >= MIN_TEMPERATURE:
        return int(logits.argmax())
    values, choices = logits.topk(min(sampling.top_k or len(logits), len(logits)))
    chances = torch.softmax(values / sampling.temperature, dim=0)  # the most likely first
    if sampling.top_p < 1:
        chances = torch.where(chances.cumsum(0) - chances < sampling.top_p, chances, 0.0)
    if sampling.min_p > 0:
        chances = torch.where(chances >= sampling.min_p * chances[0], chances, 0.0)
    return int(choices[torch.multinomial(chances, 1, generator=generator)])


def _beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
