"""What the ranks of a test are asked to do. In a module of its own, which a spawned process can import."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from shards.errors import HostError, Interrupted
from train import loop
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.batch import Batch
from train.data.sources import Source
from train.evaluate import Evaluation
from train.job import Job
from train.machine import reducer
from train.machine.ranks import World
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.session import Session
from train.step import Stepper, StepResult

CONFIG = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16)
SEQUENCES = 8  # of a step


def job(tokens: Path, root: Path, *, dropout: float = 0.0, **train: Any) -> Job:
    """40 steps of 8 sequences, on the CPU."""
    root.mkdir(exist_ok=True)
    config = {"steps": 40, "batch_tokens": 256, "log_every": 1, "eval_every": 10, "checkpoint_every": 10}
    config |= {"eval_tokens": 32 * 37, "final_eval_tokens": 32 * 41, "sample_every": 20, "sample_tokens": 4}
    return Job(
        recipe="00" * 32,
        model=ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=32, seq_len=32, dropout=dropout),
        optim=OptimConfig(name="muon", warmup_steps=3),
        train=TrainConfig(**{"device": "cpu", **config, **train}),
        sources=(Source(tokens, 5),),
        checkpoints=root / "checkpoints",
        metrics=root / "metrics.jsonl",
        samples=root / "samples.jsonl",
    )


class Trained(msgspec.Struct):
    """How a rank's part of a run ended."""

    weights: str
    evaluation: Evaluation
    events: list[str]
    micro_batch: int


def train(world: World, job: Job) -> Trained:
    """The whole run, or the rest of it."""
    events: list[str] = []
    session = Session(job, world)
    result = loop.train(session, lambda event: events.append(type(event).__name__))
    return Trained(result.weights_sha256, result.evaluation, events, session.fit.micro_batch)


def stop(world: World, job: Job, rank: int, step: int) -> tuple[int, int]:
    """The run, until `rank` alone gets a SIGTERM in `step`: the exit code and the step at which this rank stopped."""
    session = Session(job, world)
    learn = session.stepper.step

    def signalled(*arguments: Any) -> StepResult:
        if world.rank == rank and session.state.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return learn(*arguments)

    session.stepper.step = signalled  # type: ignore[method-assign]
    try:
        loop.train(session, lambda _: None)
    except Interrupted as error:
        return error.exit_code, session.state.step
    return 0, session.state.step


class Share:
    """A rank's part of `SEQUENCES` fixed sequences a step, `size` at a time, cut as TokenLoader cuts them."""

    def __init__(self, world: World, size: int) -> None:
        self.at, self.size, self.stride = world.rank * size, size, world.size * size
        self.ids = torch.randint(0, 100, (8 * SEQUENCES, 17), generator=torch.Generator().manual_seed(0))

    def next(self) -> Batch:
        rows = self.ids[self.at : self.at + self.size]
        self.at += self.stride
        return Batch(rows[:, :-1], rows[:, 1:])


def stepper_of(world: World, variant: str = "") -> Stepper:
    """The same model on every rank, learned in another way where `variant` says so."""
    torch.manual_seed(0)
    model = Model(CONFIG, 100)
    if variant == "unused":
        model.unused = torch.nn.Parameter(torch.ones(7))  # the first whose gradient is waited for
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.checkpoint_activations = variant == "checkpointed"
    if variant == "compiled":  # into one graph, by the backend that is quick to do it
        model.compiled_hidden = torch.compile(model.hidden, backend="aot_eager", fullgraph=True, dynamic=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if variant == "scaled" else None
    optimizers = Optimizers(model, OptimConfig(name="adamw", lr=1e-3, eps=1e-8))
    return Stepper(model, optimizers, 1.0, nullcontext, scaler, world=world)


class Failure(NamedTuple):
    """Memory that runs out on `rank` in its `forward`-th pass, where the gradient of `parameter` is made."""

    rank: int
    forward: int
    parameter: str
    error: Exception

    def prepare(self, model: Model, events: list[str]) -> None:
        """Let it happen."""

        def fail(_gradient: Tensor) -> None:
            if events.count("forward") == self.forward:
                raise self.error

        model.get_parameter(self.parameter).register_hook(fail)


def learn(world: World, size: int, variant: str = "", failures: tuple[Failure, ...] = ()) -> dict[str, Any]:
    """Two steps: their losses and norms, the first one's gradients, the weights at the end."""
    stepper = stepper_of(world, variant)
    model, update = stepper.model, stepper.update
    gradients: list[Tensor] = []
    events = watched(world, model)

    def remembered(mean: Tensor) -> Tensor:
        scale = stepper.scaler.get_scale() if stepper.scaler else 1.0
        gradients.append(flat(model, lambda parameter: parameter.grad) / scale)
        return update(mean)

    stepper.update = remembered  # type: ignore[method-assign]
    for failure in failures:
        if failure.rank == world.rank:
            failure.prepare(model, events)
    loader, results = Share(world, size), []
    for step in range(2):
        stepper.optimizers.schedule(step + 30, 100)
        results.append(stepper.step(loader, SEQUENCES // size // world.size))
    return {
        "losses": [result.loss.item() for result in results],
        "norms": [result.grad_norm.item() for result in results],
        "gradients": gradients[0].numpy(),
        "weights": flat(model, lambda parameter: parameter.data).numpy(),
        "pieces": stepper.pieces,
        "events": events,
    }


def learn_in_buckets(world: World, nbytes: int, *arguments: Any) -> dict[str, Any]:
    """`learn`, with buckets so small that most gradients are larger."""
    before, reducer.BUCKET_NBYTES = reducer.BUCKET_NBYTES, nbytes
    try:
        return learn(world, *arguments)
    finally:
        reducer.BUCKET_NBYTES = before


def watched(world: World, model: Model) -> list[str]:
    """What happens from now on: "forward", "reduce", and "embed" where the last of a pass's gradients is made."""
    events: list[str] = []
    average, whole = world.average, model.loss

    def reduce(tensor: Tensor) -> Callable[[], None]:
        events.append("reduce")
        return average(tensor)

    def loss(*inputs: Tensor | None) -> Tensor:
        events.append("forward")
        return whole(*inputs)

    world.average, model.loss = reduce, loss  # type: ignore[method-assign, assignment]
    model.embed.weight.register_hook(lambda _gradient: events.append("embed"))
    return events


def end_in_the_middle(world: World, answer: Path) -> None:
    """Rank 1 ends while it goes backward through the first block; rank 0 writes down what it hears of that."""
    stepper = stepper_of(world)
    if world.rank == 1:
        stepper.model.embed.weight.register_hook(lambda _gradient: os._exit(1))
    try:
        stepper.step(Share(world, 4))
    except HostError as error:
        answer.write_text(str(error))


def overflow(world: World) -> list[Any]:
    """A gradient of rank 1 overflows: this rank's norm, scale, and whether its weights stayed as they were."""
    stepper = stepper_of(world, "scaled")
    before = flat(stepper.model, lambda parameter: parameter.data).clone()
    if world.rank == 1:
        stepper.model.embed.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), torch.inf))
    norm = stepper.step(Share(world, 4)).grad_norm.item()
    after = flat(stepper.model, lambda parameter: parameter.data)
    return [norm, stepper.counts()["loss_scale"], torch.equal(before, after)]


def flat(model: Model, of: Callable[[torch.nn.Parameter], Tensor | None]) -> Tensor:
    return torch.cat([found.flatten() for p in model.parameters() if (found := of(p)) is not None])


def talk(world: World) -> dict[str, Any]:
    """Each way in which ranks speak to each other."""
    calls: list[int] = []

    def decide() -> list[str]:
        calls.append(world.rank)
        return ["from", str(world.rank)]

    tensors = [torch.full((3, 2), float(world.rank)), torch.full((), 4.0 * world.rank), torch.zeros(5).t()]
    waits = [world.average(tensor) for tensor in tensors]
    for wait in waits:
        wait()
    return {
        "first": world.first(decide, list[str]),
        "calls": calls,
        "most": world.most(7 if world.rank else 0),
        "sum": world.sum(0.1, world.rank),
        "gathered": [found.tolist() for found in world.gather(torch.tensor([world.rank, 9]))],
        "average": [tensor.tolist() for tensor in tensors],
    }
