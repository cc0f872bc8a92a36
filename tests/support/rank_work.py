"""What the ranks of a test are asked to do. In a module of its own, which a spawned process can import."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from shards.errors import Interrupted
from train import world as train_world
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.evaluate import Evaluation
from train.job import Job
from train.loader import Batch
from train.loop import Trainer
from train.model import Model
from train.optim import Optimizers
from train.sources import Source
from train.step import Stepper, StepResult
from train.world import World

CONFIG = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16)
SEQUENCES = 8  # of a step


def job(tokens: Path, root: Path, *, dropout: float = 0.0, **train: Any) -> Job:
    """40 steps of 8 sequences."""
    root.mkdir(exist_ok=True)
    config = {"steps": 40, "batch_tokens": 256, "log_every": 1, "eval_every": 10, "checkpoint_every": 10, **train}
    return Job(
        recipe="00" * 32,
        model=ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=32, seq_len=32, dropout=dropout),
        optim=OptimConfig(name="muon", warmup_steps=3),
        train=TrainConfig(eval_tokens=32 * 37, final_eval_tokens=32 * 41, sample_every=20, sample_tokens=4, **config),
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
    trainer = Trainer(job, lambda kind, _: events.append(kind), world)
    result = trainer.run()
    return Trained(result.weights_sha256, result.evaluation, events, trainer.micro_batch)


def stop(world: World, job: Job, rank: int, step: int) -> tuple[int, int]:
    """The run, until `rank` alone gets a SIGTERM in `step`: the exit code and the step at which this rank stopped."""
    trainer = Trainer(job, lambda *_: None, world)
    learn = trainer.stepper.step

    def signalled(*arguments: Any) -> StepResult:
        if world.rank == rank and trainer.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return learn(*arguments)

    trainer.stepper.step = signalled  # type: ignore[method-assign]
    try:
        trainer.run()
    except Interrupted as error:
        return error.exit_code, trainer.step
    return 0, trainer.step


class Share:
    """A rank's part of `SEQUENCES` fixed sequences a step, `size` at a time, cut as TokenLoader cuts them."""

    def __init__(self, world: World, size: int) -> None:
        self.at, self.size, self.stride = world.rank * size, size, world.size * size
        self.ids = torch.randint(0, 100, (8 * SEQUENCES, 17), generator=torch.Generator().manual_seed(0))

    def next(self) -> Batch:
        rows = self.ids[self.at : self.at + self.size]
        self.at += self.stride
        return Batch(rows[:, :-1], rows[:, 1:])


def stepper_of(world: World, scaler: torch.amp.GradScaler | None = None) -> Stepper:
    """The same model on every rank."""
    torch.manual_seed(0)
    model = Model(CONFIG, 100)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    optimizers = Optimizers(model, OptimConfig(name="adamw", lr=1e-3, eps=1e-8))
    return Stepper(model, optimizers, 1.0, nullcontext, scaler, world=world)


def learn(world: World, size: int, out_of_memory_on: int = -1) -> dict[str, Any]:
    """Two steps: their losses and norms, the first one's gradients, the weights at the end."""
    stepper = stepper_of(world)
    model, update, whole = stepper.model, stepper.update, stepper.model.loss
    gradients: list[Tensor] = []

    def remembered(mean: Tensor) -> Tensor:
        gradients.append(flat(model, lambda parameter: parameter.grad))
        return update(mean)

    def loss(inputs: Tensor, *rest: Any) -> Tensor:
        found = whole(inputs, *rest)
        if world.rank == out_of_memory_on and len(inputs) == size:
            found.backward()  # what a pass that breaks off leaves behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    stepper.update, model.loss = remembered, loss  # type: ignore[method-assign]
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
    }


def learn_in_buckets(world: World, size: int, nbytes: int) -> dict[str, Any]:
    """`learn`, with buckets so small that most gradients are larger."""
    before, train_world.BUCKET_NBYTES = train_world.BUCKET_NBYTES, nbytes
    try:
        return learn(world, size)
    finally:
        train_world.BUCKET_NBYTES = before


def overflow(world: World) -> list[Any]:
    """A gradient of rank 1 overflows: this rank's norm, scale, and whether its weights stayed as they were."""
    stepper = stepper_of(world, torch.amp.GradScaler("cpu", init_scale=1024.0))
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
    world.average(tensors)
    return {
        "first": world.first(decide, list[str]),
        "calls": calls,
        "most": world.most(7 if world.rank else 0),
        "sum": world.sum(0.1, world.rank),
        "gathered": [found.tolist() for found in world.gathered(torch.tensor([world.rank, 9]))],
        "average": [tensor.tolist() for tensor in tensors],
    }
