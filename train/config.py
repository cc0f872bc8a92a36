"""The [model], [optim] and [train] tables of a recipe. Defaults live here and nowhere else."""

from typing import Annotated, Any, Literal, assert_never

import msgspec
from msgspec import Meta

from shards.errors import ConfigError
from shards.fingerprint import NOT_IDENTITY, neutral

Size = Annotated[int, Meta(ge=1, le=2**20)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=100)]
Tokens = Annotated[int, Meta(ge=0, le=2**50)]
BatchTokens = Annotated[int, Meta(ge=1, le=2**40)]
Cadence = Annotated[int, Meta(ge=0, le=2**40, extra=NOT_IDENTITY)]


TrackerName = Literal["tensorboard", "wandb", "trackio"]
DeviceName = Literal["auto", "cpu", "cuda"]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder-only transformer. `gpt2` is GPT-2's form, `modern` is exactly Qwen3's; see model/gpt.py."""

    family: Literal["gpt2", "modern"] = "modern"  # GPT-2's form, or Qwen3's
    n_layer: Size = 12  # blocks
    n_head: Size = 6  # attention heads, of d_model / n_head each
    d_model: Size = 768  # the width of the residual stream
    d_ff: Annotated[int, Meta(ge=0, le=2**20)] = (
        0  # 0: 4 d_model for gpt2; 8/3 d_model, to a multiple of 64, for modern
    )
    seq_len: Annotated[int, Meta(ge=2, le=2**20)] = 1024  # tokens of context
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # in training
    tied: bool | None = None  # one table for embedding and head; unset: tied for gpt2, untied for modern
    qkv_bias: bool | None = None  # unset: biased for gpt2; modern has none
    rope_theta: Annotated[float, Meta(gt=0, le=1e9)] = 10_000.0  # modern only: base of the rotary frequencies
    init: Literal["family", "torch"] = "family"  # torch: what nn.Linear and nn.Embedding draw by themselves
    residual: Annotated[Literal["fp32", "bf16"], Meta(extra={"neutral": "fp32"})] = "fp32"  # bf16: where autocast is

    @property
    def is_gpt2(self) -> bool:
        """Whether the model has GPT-2's form, and not Qwen3's."""
        match self.family:
            case "gpt2":
                return True
            case "modern":
                return False
            case _:
                assert_never(self.family)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding table."""
        return self.is_gpt2 if self.tied is None else self.tied

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.is_gpt2 if self.qkv_bias is None else self.qkv_bias

    @property
    def ff_width(self) -> int:
        """The width of the feed-forward layers."""
        if self.d_ff:
            return self.d_ff
        return 4 * self.d_model if self.is_gpt2 else -(-8 * self.d_model // (3 * 64)) * 64

    @property
    def block_weights(self) -> int:
        """How many weights the matrices of one block have: what its arithmetic is counted by."""
        return 4 * self.d_model**2 + (2 if self.is_gpt2 else 3) * self.d_model * self.ff_width


class OptimConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimizer and its schedule. With `muon`, `lr` is for the matrices of the blocks and AdamW takes the rest."""

    name: Literal["muon", "adamw"] = "muon"  # muon: for the matrices of the blocks
    lr: Rate = 0.025  # peak learning rate
    embed_lr: Rate = 0.05  # muon only, as the two below
    head_lr: Rate = 0.004  # of the head, where it is not the embedding
    norm_lr: Rate = 0.015  # of norm gains and biases
    weight_decay: Fraction = 0.05  # decoupled
    decay: Literal["matrices", "all"] = "matrices"  # all: embeddings, biases and norm gains too
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.8  # AdamW's, as the two below
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Meta(gt=0, le=1)] = 1e-10
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.95  # muon only; rises from 0.85 over `momentum_warmup` steps
    momentum_warmup: Annotated[int, Meta(ge=0, le=2**40)] = 300  # steps
    clip: Rate = 1.0  # of the global gradient norm; 0 = off
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"  # of the learning rate after warm-up
    warmup_steps: Annotated[int, Meta(ge=0, le=2**40)] = 20  # in which the rate rises from 0
    decay_fraction: Fraction = 0.7  # linear and wsd: the last part of the run, in which the rate falls
    final_lr: Fraction = 0.0  # of the peak, at the last step
    schedule_rule: Annotated[Literal[1, 2], Meta(extra={"neutral": 1})] = 2  # 1: that of runs begun before it was added


class EarlierLength(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a run was to be, in tokens or in steps, until it was made longer after `until` steps."""

    tokens: Tokens = 0
    steps: Annotated[int, Meta(ge=0, le=2**40)] = 0
    until: Annotated[int, Meta(ge=1, le=2**40)]


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long, in what steps, and what is written on the way."""

    tokens: Tokens = 0  # or steps
    steps: Annotated[int, Meta(ge=0, le=2**40)] = 0
    earlier: Annotated[
        tuple[EarlierLength, ...], Meta(extra={"neutral": ()})
    ] = ()  # what `millpond resume` made longer
    batch_tokens: BatchTokens = 262_144  # of one step, on all GPUs together
    batch_ramp: tuple[BatchTokens, ...] = ()  # smaller batches before it, each for an equal part of the run
    micro_batch: Annotated[int, Meta(ge=0, le=2**20, extra=NOT_IDENTITY)] = 0  # sequences at once; 0 = what fits
    device: Annotated[DeviceName, Meta(extra=NOT_IDENTITY)] = "auto"  # auto = a GPU if the machine has one
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or fp16 on CUDA, fp32 elsewhere
    compile: Annotated[Literal["auto", "on", "off"], Meta(extra=NOT_IDENTITY)] = "auto"  # auto = on for CUDA
    checkpoint_activations: Annotated[bool, Meta(extra=NOT_IDENTITY)] = False  # less memory, a third more time
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 1337  # of weights, order and dropout
    document_mask: bool = False  # attention never looks past the beginning of a token's own document
    order: Literal["shuffled", "sequential"] = "shuffled"  # of the windows; sequential is for debugging
    spike_z: Annotated[float, Meta(ge=0, le=1e6)] = 9.0  # skip a loss or gradient so many deviations up; 0 = off
    rollback_after: Annotated[int, Meta(ge=0, le=2**40)] = 10  # steps skipped in a row; 0 = never
    eval_every: Cadence = 250  # steps; 0 = only at the start and the end
    eval_tokens: Annotated[int, Meta(ge=1, le=2**50, extra=NOT_IDENTITY)] = 1_048_576  # each time, always the first
    final_eval_tokens: Annotated[int, Meta(ge=1, le=2**50, extra=NOT_IDENTITY)] = 10_485_760  # after the last step too
    sample_every: Cadence = 500  # steps; 0 = only at the end
    sample_tokens: Annotated[int, Meta(ge=1, le=2**20, extra=NOT_IDENTITY)] = 64  # of each sample
    prompts: Annotated[tuple[str, ...], Meta(extra=NOT_IDENTITY)] = ("The", "In this paper we")  # one sample each
    checkpoint_every: Cadence = 250  # 0 = only at the end
    keep_checkpoints: Annotated[int, Meta(ge=1, le=2**20, extra=NOT_IDENTITY)] = 2  # the newest, and the best
    log_every: Annotated[int, Meta(ge=1, le=2**40, extra=NOT_IDENTITY)] = 10  # steps
    trackers: Annotated[tuple[TrackerName, ...], Meta(extra=NOT_IDENTITY)] = ()  # that show metrics.jsonl's rows too
    kwh_price: Annotated[float, Meta(ge=0, le=1e9, extra=NOT_IDENTITY)] = 0.0  # of one kWh; 0 = no cost is shown


def neutral_tables() -> dict[str, dict[str, Any]]:
    """The fields of the three tables that were added later, each with what the program did before it existed."""
    return {"model": neutral(ModelConfig), "optim": neutral(OptimConfig), "train": neutral(TrainConfig)}


def require_consistent(model: ModelConfig, train: TrainConfig) -> None:
    """ConfigError when the numbers of the two tables do not fit together."""
    _require_even_heads(model)
    sizes = (*train.batch_ramp, train.batch_tokens)
    _require_whole_batches(sizes, model, train)
    if max(sizes) > train.batch_tokens:
        raise ConfigError(
            f"train.batch_ramp is {', '.join(map(str, train.batch_ramp))}, train.batch_tokens {train.batch_tokens}",
            "a ramp is of smaller batches that come before it",
            f"--set train.batch_tokens={max(sizes)}, or a smaller train.batch_ramp",
        )
    lengths: list[EarlierLength | TrainConfig] = [*train.earlier, train]
    for length in lengths:
        if bool(length.tokens) == bool(length.steps):
            raise ConfigError(
                f"train.tokens is {length.tokens} and train.steps is {length.steps}",
                "one of them says how long",
                "set one, and the other to 0",
            )


def _require_even_heads(model: ModelConfig) -> None:
    of = model.n_head * (1 if model.is_gpt2 else 2)  # rotary positions turn pairs
    if model.d_model % of:
        kind = "an even" if of > model.n_head else "a whole"
        raise ConfigError(
            f"model.d_model is {model.d_model}, model.n_head {model.n_head}",
            f"each head's width, the one divided by the other, is {kind} number",
            f"--set model.d_model={-(-model.d_model // of) * of}",
        )


def _require_whole_batches(sizes: tuple[int, ...], model: ModelConfig, train: TrainConfig) -> None:
    for size in sizes:
        sequences, rest = divmod(size, model.seq_len)
        name = "batch_tokens" if size == train.batch_tokens else "batch_ramp"
        if rest:
            raise ConfigError(
                f"train.{name} is {size}, not a multiple of model.seq_len, {model.seq_len}",
                "a step is a whole number of windows",
                f"--set train.{name}={max(1, sequences) * model.seq_len}",
            )
        if train.micro_batch and sequences % train.micro_batch:
            raise ConfigError(
                f"train.micro_batch is {train.micro_batch}, a step has {sequences} sequences",
                "the batch must be the same on every GPU",
                f"choose a divisor of {sequences}, or 0 to have it chosen",
            )
