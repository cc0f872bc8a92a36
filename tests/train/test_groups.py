"""Who is learned by what, at which rate, when."""

import pytest
import torch

from train.config import ModelConfig, OptimConfig
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.schedule import momentum

SIZES = {"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": 16}


def names_of(model: Model, optimizer: torch.optim.Optimizer, **wanted: float) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]
        for group in optimizer.param_groups
        if all(group[key] == value for key, value in wanted.items())
        for parameter in group["params"]
    }


def test_adamw_decays_matrices_and_nothing_else() -> None:
    model = Model(ModelConfig(family="gpt2", tied=False, **SIZES), 100)
    (adamw,) = Optimizers(model, OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1)).optimizers
    decayed, kept = names_of(model, adamw, weight_decay=0.1), names_of(model, adamw, weight_decay=0.0)
    assert decayed | kept == {name for name, _ in model.named_parameters()}
    assert decayed == {
        n for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith(("embed", "positions"))
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_everything_decays_when_it_is_asked_to(name: str) -> None:
    model = Model(ModelConfig(family="gpt2", tied=False, **SIZES), 100)
    each = Optimizers(model, OptimConfig(name=name, weight_decay=0.1, decay="all")).optimizers
    decayed = set.union(*(names_of(model, optimizer, weight_decay=0.1) for optimizer in each))
    assert decayed == {name for name, _ in model.named_parameters()}


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = Model(ModelConfig(family="modern", **SIZES), 100)
    config = OptimConfig(name="muon")
    adamw, muon = Optimizers(model, config).optimizers
    assert names_of(model, muon) == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    assert names_of(model, adamw, lr=config.embed_lr) == {"embed.weight"}
    assert names_of(model, adamw, lr=config.head_lr) == {"head.weight"}
    assert names_of(model, adamw) | names_of(model, muon) == {name for name, _ in model.named_parameters()}
    assert not names_of(model, adamw) & names_of(model, muon)


def test_momentum_rises() -> None:
    config = OptimConfig()
    assert momentum(config, 0) == 0.85
    assert momentum(config, 150) == pytest.approx(0.9)
    assert momentum(config, 300) == momentum(config, 10_000) == 0.95


def test_schedule_sets_every_group() -> None:
    model = Model(ModelConfig(**SIZES), 100)
    config = OptimConfig(warmup_steps=9)
    optimizers = Optimizers(model, config)
    assert optimizers.schedule(4, 100) == pytest.approx(config.lr / 2)
    adamw, muon = optimizers.optimizers
    assert muon.param_groups[0]["momentum"] == momentum(config, 4)
    rates = sorted(group["lr"] for group in adamw.param_groups)
    assert rates == pytest.approx(sorted([config.embed_lr / 2, config.head_lr / 2, config.norm_lr / 2]))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_survives_its_tensors(name: str) -> None:
    def build() -> tuple[Model, Optimizers]:
        torch.manual_seed(0)
        model = Model(ModelConfig(**SIZES), 100)
        return model, Optimizers(model, OptimConfig(name=name, lr=0.01))

    def learn(model: Model, optimizers: Optimizers, steps: range) -> None:
        for step in steps:
            ids = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(step))
            optimizers.schedule(step, 20)
            model.loss(ids[:, :-1], ids[:, 1:]).backward()
            optimizers.step()

    straight, optimizers = build()
    learn(straight, optimizers, range(10))
    first, before = build()
    learn(first, before, range(5))
    second, after = build()
    second.load_state_dict(first.state_dict())
    after.load_state({key: value.clone() for key, value in before.state().items()})
    learn(second, after, range(5, 10))
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
