"""MFU rests on two numbers: the FLOPs of a token, which torch counts the same, and the peak of exactly this GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.config import ModelConfig
from train.model.gpt import Model
from train.telemetry.flops import FP16_GPUS, GPUS, flops_per_token, gpu_of, measured_peak, peak

CPU = torch.device("cpu")
B, T, V = 2, 32, 128  # a vocabulary that is not padded: the padding is computed too, and is no use


def counted(config: ModelConfig) -> int:
    """FLOPs a token, really forward and backward. Attention by plain products: torch counts no other on a CPU."""
    model = Model(config, V)
    ids = torch.randint(V, (B, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    total, rest = divmod(counter.get_total_flops(), B * T)
    assert rest == 0
    return int(total)


@pytest.mark.parametrize("family", ["gpt2", "modern"])
@pytest.mark.parametrize(("tied", "d_ff"), [(False, 0), (True, 80)])
def test_the_formula_is_what_torch_counts(family: str, tied: bool, d_ff: int) -> None:
    """Exactly: the formula has every matrix product, and the counter knows nothing but products."""
    config = ModelConfig(family=family, n_layer=3, n_head=2, d_model=48, d_ff=d_ff, seq_len=T, tied=tied)
    assert flops_per_token(config, V) == counted(config)


def test_the_real_loss_costs_no_more() -> None:
    """In bf16, where every product of the head is one that the counter knows."""
    config = ModelConfig(n_layer=1, n_head=2, d_model=32, seq_len=T)
    model, ids = Model(config, V), torch.randint(V, (B, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, ids)
        loss.backward()
    assert counter.get_total_flops() == B * T * flops_per_token(config, V)


def test_gpt2_small_and_the_overnight_model() -> None:
    """The figures of the literature: 854 MFLOP, tied or not, SwiGLU of 2,048 or GELU of 3,072."""
    small = ModelConfig(family="gpt2", n_layer=12, n_head=12, d_model=768, seq_len=1024)
    assert flops_per_token(small, 50257) == flops_per_token(ModelConfig(), 50257) == 854_438_400


def test_gpus_that_are_known() -> None:
    known = {
        "NVIDIA GeForce RTX 3090": "RTX 3090",
        "NVIDIA GeForce RTX 3090 Ti": "RTX 3090 TI",
        "NVIDIA GeForce RTX 4070 Ti SUPER": "RTX 4070 TI SUPER",
        "NVIDIA RTX A6000": "RTX A6000",
        "NVIDIA RTX 6000 Ada Generation": "RTX 6000 ADA GENERATION",
        "NVIDIA A100-SXM4-80GB": "A100 SXM4",
        "NVIDIA A100 80GB PCIe": "A100 PCIE",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 NVL": "H100 NVL",
        "NVIDIA GH200 480GB": "GH200",
        "Tesla V100-SXM2-16GB": "V100 SXM2",
    }
    assert {name: gpu_of(name) for name in known} == known
    assert set(known.values()) <= GPUS.keys() | FP16_GPUS.keys()


def test_gpus_that_only_look_known() -> None:
    others = (
        "GeForce RTX 4090 Laptop GPU",
        "GeForce RTX 4090 D",
        "A100-SXM4-40GB MIG 1g.5gb",
        "GeForce GTX 1660 SUPER",
    )
    assert not {gpu_of(f"NVIDIA {name}") for name in others} & (GPUS | FP16_GPUS).keys()


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA GeForce RTX 3090", torch.bfloat16, (71e12, "table")),
        ("NVIDIA GeForce RTX 3090", torch.float16, (71e12, "table")),
        ("NVIDIA GeForce RTX 3090", torch.float32, (1.0, "measured")),  # the table is of the tensor cores
        ("Tesla T4", torch.float16, (65e12, "table")),
        ("Tesla T4", torch.bfloat16, (1.0, "measured")),
        ("NVIDIA GeForce RTX 3090 Laptop GPU", torch.bfloat16, (1.0, "measured")),
    ],
)
def test_the_table_or_a_measurement(
    name: str, precision: torch.dtype, expected: tuple[float, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that says it is CUDA and has this name; nothing is computed on it."""
    monkeypatch.setattr("train.telemetry.flops.device_name", lambda _: name)
    monkeypatch.setattr("train.telemetry.flops.measured_peak", lambda *_: 1.0)
    assert peak(torch.device("cuda"), precision) == expected


def test_the_cpu_is_measured_and_its_generator_left_alone() -> None:
    before = torch.get_rng_state()
    found = peak(CPU, torch.float32)
    assert found.source == "measured" and 1e8 < found.flops < 1e14
    assert measured_peak(CPU, torch.float32) == found.flops  # once a process
    assert torch.equal(torch.get_rng_state(), before)
