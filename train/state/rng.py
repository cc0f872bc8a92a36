"""The random generators of all ranks, which drop out differently: seeded apart, saved together, each given its own."""

import torch

from train.machine.ranks import World

APART = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it lie far from each other and from small seeds


def seed_apart(world: World, seed: int, step: int) -> None:
    """Seed the generators of this rank for what begins at `step`; rank 0 goes on with the ones it has."""
    if world.rank:
        torch.manual_seed((seed + (world.rank + world.size * step) * APART) % 2**63)


def tensors(world: World, device: torch.device) -> dict[str, torch.Tensor]:
    """The states of all ranks, which all ranks must ask for together: `rng.cpu`, `rng.cpu.1`, … and so `rng.cuda`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {
        _name(kind, rank): found for kind, state in states.items() for rank, found in enumerate(world.gathered(state))
    }


def load_tensors(saved: dict[str, torch.Tensor], world: World, device: torch.device, seed: int, step: int) -> None:
    """Take over, and out of `saved`, what `tensors` gave. A rank that was not there is seeded for `step`."""
    states = {name: saved.pop(name) for name in list(saved) if name.startswith("rng.")}
    if _name("cpu", world.rank) not in states:
        seed_apart(world, seed, step)
        return
    torch.set_rng_state(states[_name("cpu", world.rank)])
    if device.type == "cuda" and (state := states.get(_name("cuda", world.rank))) is not None:
        torch.cuda.set_rng_state(state, device)


def _name(kind: str, rank: int) -> str:
    return f"rng.{kind}.{rank}" if rank else f"rng.{kind}"
