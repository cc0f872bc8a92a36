"""The random generators of all ranks, which drop out differently: seeded apart, saved together, each given its own."""

import torch

from train.machine.ranks import World

APART = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it are far from each other and from small seeds


class Generators:
    """The generators of this rank and, when they are saved, of all; a rank that was not there is seeded for `step`."""

    def __init__(self, world: World, device: torch.device, seed: int, step: int = 0) -> None:
        self._world, self._device, self._seed, self._step = world, device, seed, step

    def seed_apart(self) -> None:
        """Seed the generators of this rank; rank 0 keeps the ones it has."""
        if self._world.rank:
            torch.manual_seed((self._seed + (self._world.rank + self._world.size * self._step) * APART) % 2**63)

    def state(self) -> dict[str, torch.Tensor]:
        """See checkpoint.Stateful: `cpu`, `cpu.1`, ... and so `cuda`. All ranks must ask for it together."""
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return {
            _name(kind, rank): found
            for kind, state in states.items()
            for rank, found in enumerate(self._world.gather(state))
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """See checkpoint.Stateful."""
        if _name("cpu", self._world.rank) not in state:
            self.seed_apart()
            return
        torch.set_rng_state(state[_name("cpu", self._world.rank)])
        if self._device.type == "cuda" and (cuda := state.get(_name("cuda", self._world.rank))) is not None:
            torch.cuda.set_rng_state(cuda, self._device)


def _name(kind: str, rank: int) -> str:
    return f"{kind}.{rank}" if rank else kind
