"""The same parts as tasks on a Ray cluster: the same bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import complains, tree

from shards.errors import CorruptError, HostError

ray = pytest.importorskip("ray", reason="needs ray, which the dev extra installs")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # ray leaves its log files open
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two cores on this machine, as one that RAY_ADDRESS names would be found."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def test_ray_makes_the_same_bytes(cluster: None, prepare: Callable[..., Path], corpus_file: Path) -> None:
    options = {"tokens__part_tokens": 20_000, "tokens__dedup": True}
    here = prepare(corpus_file, home="here", **options)
    there = prepare(corpus_file, home="there", tokens__executor="ray", **options)
    assert there.name == here.name
    assert tree(there) == tree(here)


def test_what_goes_wrong_on_the_cluster_is_said_here(
    cluster: None, prepare: Callable[..., Path], corpus_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus_file.read_text() + "not json\n")
    with complains(CorruptError, "broken.jsonl", "JSON"):
        prepare(broken, tokens__executor="ray")


def test_without_ray(prepare: Callable[..., Path], corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(HostError, match="Ray is not installed"):
        prepare(corpus_file, tokens__executor="ray")
