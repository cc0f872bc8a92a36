"""One line a log step, at most 80 columns, whatever the numbers."""

from pathlib import Path

import pytest
from harness import states

from pipeline.terminal import Terminal
from shards.numbers import thousands
from train.events import Ended, Evaluated, Logged, Saved, Started

START = Started(
    family="modern",
    parameters=162_151_680,
    device="NVIDIA GeForce RTX 3090",
    precision="bfloat16",
    steps=19073,
    step=0,
    batch_tokens=262_144,
    last_batch_tokens=262_144,
    processes=1,
    micro_batch=16,
    accumulation=16,
    seq_len=1024,
    epoch_tokens=9_999_999_999,
    flops_per_token=854_438_400,
    peak_flops=71e12,
    peak_source="table",
)
LOG = {
    "step": 19073,
    "loss": 10.8249,
    "lr": 2.5e-2,
    "grad_norm": 1234.56,
    "tok_per_s": 463_123.4,
    "mfu_percent": 55.21,
    "stall_percent": 0.0123,
}
LEFT = 123 * 3600 + 59  # seconds
ENERGY = {"watts": 349.7, "energy_kwh": 4.3512, "cost": 1.3054}
EVAL = {"step": 250, "val_loss": 10.8249, "val_bpb": 3.28, "val_tokens": 1_048_576}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    found = capsys.readouterr().err.splitlines()
    assert max(map(len, found)) <= 80
    return found


def test_a_row_has_what_a_person_needs(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.training(Logged({**LOG, **ENERGY}, 19073, LEFT))
    header, row = lines(capsys)
    assert header.split() == ["step", "loss", "lr", "grad", "tok/s", "MFU", "stall", "watts", "left"]
    assert row.split() == [
        *("19073/19073", "10.8249", "2.5e-2", "1234.56", "463k", "55.2%", "0.01%", "350", "123:00:59")
    ]
    assert len(header) == len(row)


def test_no_card_no_watts(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.training(Logged(LOG, 19073, LEFT))
    assert "watts" not in lines(capsys)[0]


def test_the_header_comes_again_after_what_stood_between(
    terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = Logged(LOG, 19073, LEFT)
    for event in (logged, logged, Saved(1, Path("x")), logged):
        terminal.training(event)
    terminal.training(Evaluated(EVAL))
    terminal.training(Logged(LOG, 19073, LEFT))
    found = ["header" if "tok/s" in line else line.split()[0] for line in lines(capsys)]
    assert found == ["header", *["19073/19073"] * 3, "250", "header", "19073/19073"]


def test_an_evaluation_says_over_how_many_tokens(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.training(Evaluated(EVAL))
    terminal.training(Evaluated({**EVAL, "val_tokens": 10_485_760}))
    loss = "      250  validation 10.8249 nats/token, 3.2800 bits/byte"
    assert lines(capsys) == [f"{loss} (1.0M tokens)", f"{loss} (10.5M tokens)"]


def test_the_scale_of_mfu_is_said_at_the_start(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.training(START)
    states("\n".join(lines(capsys)), "854 MFLOP per token", "peak 71.0 TFLOP/s (table)")


def test_a_ramp_says_where_it_leads(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.training(START)
    terminal.training(START._replace(last_batch_tokens=524_288))
    assert [line.strip() for line in lines(capsys) if "growing" in line] == ["growing to 524,288 tokens a step"]


def test_the_end_sums_up(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"hours": 11.09, "tok_per_s": 50_093.4, "memory_gb": 21.43}
    terminal.training(Ended(7629, 1_999_896_576, 0, summary))
    terminal.training(Ended(7629, 1_999_896_576, 3, {**summary, **ENERGY}))
    assert lines(capsys) == [
        "trained   2.0B tokens in 11:05:24, 50.1k tok/s, 21.4 GB",
        "trained   2.0B tokens in 11:05:24, 50.1k tok/s, 21.4 GB; 4.35 kWh, cost 1.31",
        "          3 graphs compiled",
    ]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, ("0.0", "")),
        (99.94, ("99.9", "")),
        (99.96, ("100", "")),
        (999.4, ("999", "")),
        (999.6, ("1.0", "k")),
        (854.4e6, ("854", "M")),
        (2.25e15, ("2250", "T")),
    ],
)
def test_numbers_in_three_digits(number: float, expected: tuple[str, str]) -> None:
    assert thousands(number) == expected
