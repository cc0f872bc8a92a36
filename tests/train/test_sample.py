"""Sampling: with the keys and values kept, the same text as without; and each way of choosing the next token."""

from collections.abc import Iterator

import pytest
import torch
from exported import FORMS, randomised, small_tokenizer
from harness import complains

from shards import RefusedError, Tokenizer
from train.model.attention import Past
from train.model.gpt import Model
from train.sample import Sampling, generate, pick, stream

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_those_of_the_whole_context(form: str, tokenizer: Tokenizer) -> None:
    model = randomised(form, tokenizer.vocab_size)
    ids = torch.randint(tokenizer.vocab_size, (2, 40))
    pasts = [Past(40) for _ in model.blocks]
    with torch.no_grad():
        expected = model(ids)
        assert (model.next_logits(ids[:, :25], 0, pasts) - expected[:, 24]).abs().max() < 1e-5
        for at in range(25, 40):
            assert (model.next_logits(ids[:, at : at + 1], at, pasts) - expected[:, at]).abs().max() < 1e-5


def slowly(model: Model, tokenizer: Tokenizer, prompt: str, tokens: int, seed: int, sampling: Sampling) -> str:
    """What generate gives, by reading the whole context for each token."""
    ids, generator = [tokenizer.eot, *tokenizer.encode(prompt)], torch.Generator().manual_seed(seed)
    made: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.seq_len :]]))[0, -1].float()
        ids.append(pick(logits, sampling, ids, generator))
        if ids[-1] == tokenizer.eot:
            break
        made.append(ids[-1])
    return prompt + tokenizer.decode(made)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_text_as_without_what_is_kept(form: str, tokenizer: Tokenizer) -> None:
    """Also past the end of the context, of 96 tokens, where the window moves."""
    model = randomised(form, tokenizer.vocab_size)
    for seed, sampling in ((0, GREEDY), (1, Sampling()), (2, Sampling(1.0, 0, 0.9, 0.01, 1.3))):
        expected = slowly(model, tokenizer, "Return the", 120, seed, sampling)
        assert generate(model, tokenizer, "Return the", 120, sampling, seed=seed) == expected


def test_pieces_are_complete_characters(tokenizer: Tokenizer) -> None:
    text = "é日本👍🏽é"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # several tokens a character
    model = Spoken(tokenizer, ids)
    pieces = list(stream(model, tokenizer, "x", 99, GREEDY))  # type: ignore[arg-type]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces) and len(pieces) > 3
    cut = Spoken(tokenizer, ids[:-1])
    assert "".join(stream(cut, tokenizer, "x", 99, GREEDY)).endswith("\ufffd")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "one two three"),
        (("two",), "one "),
        (("o th", "three"), "one tw"),
        (("wo x", "e t"), "on"),
        (("zzz",), "one two three"),
    ],
)
def test_it_ends_before_a_stop_string(tokenizer: Tokenizer, stop: tuple[str, ...], expected: str) -> None:
    model = Spoken(tokenizer, tokenizer.encode("one two three"))
    assert "".join(stream(model, tokenizer, "x", 99, GREEDY, stop=stop)) == expected  # type: ignore[arg-type]


def chosen(sampling: Sampling, logits: list[float], before: tuple[int, ...] = ()) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {pick(torch.tensor(logits), sampling, before, generator) for _ in range(300)}


def test_what_may_be_chosen() -> None:
    chances = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    assert chosen(Sampling(1.0, 0), chances) == {0, 1, 2, 3}
    assert chosen(Sampling(1.0, 2), chances) == {0, 1}
    assert chosen(Sampling(1.0, 0, top_p=0.5), chances) == {0}
    assert chosen(Sampling(1.0, 0, top_p=0.51), chances) == {0, 1}
    assert chosen(Sampling(1.0, 0, min_p=0.3), chances) == {0, 1, 2}
    assert chosen(Sampling(0.0, 0), chances) == {0}
    assert chosen(Sampling(0.0, 0, repetition_penalty=10.0), [2.0, 1.0, -1.0], (0,)) == {1}
    assert chosen(Sampling(0.0, 0, repetition_penalty=10.0), [-1.0, -2.0, -3.0], (0,)) == {1}
    with complains(RefusedError, "not finite"):
        chosen(GREEDY, [float("nan"), 0.0])


class Spoken:
    """A model that says one text, and then end-of-text."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        self._left, self._size = [*ids, tokenizer.eot], tokenizer.vocab_size
        self.config, self.blocks, self.training = FORMS["modern"], (), False

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def next_logits(self, *_: object) -> torch.Tensor:
        logits = torch.zeros(1, self._size)
        logits[0, self._left.pop(0)] = 1.0
        return logits
