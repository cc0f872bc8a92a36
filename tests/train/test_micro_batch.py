"""The micro-batch finder tries what it says, chooses the smallest that is good enough, and remembers."""

from collections.abc import Callable
from pathlib import Path

import finder_work
import msgspec
import pytest
import torch

from train.config import ModelConfig, OptimConfig, TrainConfig
from train.micro_batch import Failed, Fit, best_fit, choose, estimated_micro_batch, in_child, search

MODEL = ModelConfig(n_layer=1, n_head=2, d_model=32, seq_len=32)
TRAIN = TrainConfig(steps=1, batch_tokens=32 * 12)
CPU = torch.device("cpu")


def test_the_smallest_size_within_two_percent() -> None:
    assert choose({4: 90.0, 8: 98.1, 16: 100.0}) == 8
    assert choose({4: 90.0, 8: 97.9, 16: 100.0}) == 16
    assert choose({4: 5.0}) == 4


@pytest.mark.parametrize(
    ("start", "fits", "peak", "tried"),
    [
        (1, 99, 8, [1, 2, 4, 8, 16, 32, 1]),  # until the rate falls by more than 2 %; then the first again
        (4, 99, 99, [4, 8, 16, 32, 4]),  # up to the whole batch
        (5, 8, 99, [4, 8, 16, 4]),  # until the memory runs out
        (32, 2, 99, [32, 16, 8, 4, 2]),  # too large from the start
        (32, 0, 99, [32, 16, 8, 4, 2, 1]),  # nothing fits
    ],
)
def test_what_is_tried(start: int, fits: int, peak: int, tried: list[int]) -> None:
    asked = []

    def rate(size: int) -> float | None:
        asked.append(size)
        return None if size > fits else 1000.0 - abs(size - peak)

    found = search([1, 2, 4, 8, 16, 32, 64], start, rate) if peak == 8 else search([1, 2, 4, 8, 16, 32], start, rate)
    assert asked == tried
    assert set(found) == {size for size in tried if size <= fits}


def test_the_first_size_is_timed_again() -> None:
    """It meets a GPU that is still cold: its first rate is too low."""
    rates = iter([50.0, 80.0, 70.0, 81.0])
    assert search([1, 2, 4], 1, lambda _: next(rates)) == {1: 81.0, 2: 80.0, 4: 70.0}


def test_real_steps_in_a_process_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """On the CPU, without a limit: the path is the one a GPU takes."""
    caplog.set_level("INFO", "train.micro_batch")
    before = torch.get_rng_state()
    fit = in_child(finder_work.measure_briefly, MODEL, OptimConfig(), TRAIN, 100, "cpu", 3)
    assert isinstance(fit, Fit)
    assert fit.micro_batch in fit.rates and 12 % fit.micro_batch == 0
    assert fit.eval_batch in fit.eval_rates
    assert next(iter(fit.rates)) == 2  # of 1, 2, 4, 12: the last that is at most 3
    assert min(*fit.rates.values(), *fit.eval_rates.values()) > 0
    assert torch.equal(torch.get_rng_state(), before)
    said = [record.getMessage() for record in caplog.records]
    assert sum("training with 2 sequences at once: " in line and "tok/s" in line for line in said) >= 1
    assert any("evaluation with" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (finder_work.raises, "ValueError: Expected a torch.device with a specified index"),
        (finder_work.out_of_memory, "OutOfMemoryError: CUDA out of memory"),
        (finder_work.imports, "ModuleNotFoundError: No module named 'no_such_module'"),
        (finder_work.leaves_a_child, "ended with exit code -9"),
        (finder_work.answers_nonsense, "no valid answer"),
        (finder_work.segfaults, "ended with exit code -11"),
        (finder_work.hangs, "no answer for 3 s"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_child_that_fails_says_why(work: Callable[..., Fit | Failed], reason: str) -> None:
    found = in_child(work, patience=3.0 if work is finder_work.hangs else 60.0)
    assert isinstance(found, Failed)
    assert reason in found.reason


@pytest.mark.slow
def test_the_child_leaves_stdout_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """It is the command's answer: evaluate --json is read by programs."""
    assert in_child(finder_work.prints) == Fit(micro_batch=4, eval_batch=4)
    out, err = capfd.readouterr()
    assert out == ""
    assert "a word of a library" in err and "and of its C code" in err


@pytest.fixture
def said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU that answers what best_fit asks, on a machine without one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    return torch.device("cuda", 0)


@pytest.mark.slow
def test_a_child_that_fails_ends_in_the_estimate(
    said_to_be_there: torch.device, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The child finds no GPU, really, and cannot even begin."""
    fit = best_fit(MODEL, OptimConfig(), TRAIN, 100, said_to_be_there, tmp_path / "fits.json")
    assert fit == Fit(micro_batch=12, eval_batch=12)
    assert "could not be measured: " in caplog.text and "estimated instead: 12 sequences" in caplog.text
    assert not list(tmp_path.iterdir())


def test_what_was_found_is_remembered_for_the_same_case(
    said_to_be_there: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, answers = tmp_path / "home" / "fits.json", [Fit(micro_batch=4, eval_batch=8, rates={4: 1.0})] * 4

    def find(train: TrainConfig = TRAIN, vocab_size: int = 100) -> int:
        best_fit(MODEL, OptimConfig(), train, vocab_size, said_to_be_there, cache)
        return len(answers)

    monkeypatch.setattr("train.micro_batch.in_child", lambda *_: answers.pop())
    assert [find(), find(), find(vocab_size=200), find(), find(vocab_size=200)] == [3, 3, 2, 2, 2]
    assert find(msgspec.structs.replace(TRAIN, document_mask=True)) == 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 << 30, 24 << 30))  # another process has come
    assert find() == 0
    known = cache.read_bytes()
    for damaged in (b"not JSON", b'[{"\xff": 1}]', known.replace(b'"micro_batch": 4', b'"micro_batch": 0'),
                    known.replace(b'"micro_batch": 4', b'"micro_batch": 5')):  # fmt: skip
        cache.write_bytes(damaged)
        answers.append(Fit(micro_batch=4, eval_batch=8))
        assert find() == 0, damaged


def test_an_answer_that_cannot_be_kept_is_used(
    said_to_be_there: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In somebody else's home, which can be read."""
    (tmp_path / "home").write_text("no folder")
    found = Fit(micro_batch=4, eval_batch=8)
    monkeypatch.setattr("train.micro_batch.in_child", lambda *_: found)
    assert best_fit(MODEL, OptimConfig(), TRAIN, 100, said_to_be_there, tmp_path / "home" / "fits.json") == found
    assert "will be measured again next time" in caplog.text


def test_the_cpu_is_estimated_and_what_is_asked_is_kept(tmp_path: Path) -> None:
    cache = tmp_path / "fits.json"
    assert best_fit(MODEL, OptimConfig(), TRAIN, 100, CPU, cache) == Fit(micro_batch=12, eval_batch=12)
    asked = msgspec.structs.replace(TRAIN, micro_batch=3)
    assert best_fit(MODEL, OptimConfig(), asked, 100, CPU, cache) == Fit(micro_batch=3, eval_batch=12)
    assert not list(tmp_path.iterdir())


def test_a_batch_of_any_size_is_divided_quickly() -> None:
    found = estimated_micro_batch(2**35, 1000, MODEL, 512, CPU, torch.float32)
    assert found >= 1 and 2**35 % found == 0
    assert estimated_micro_batch(7, 1000, MODEL, 512, CPU, torch.float32) == 7
