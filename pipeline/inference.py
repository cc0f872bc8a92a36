"""What can be asked of a run once it has a checkpoint: its validation loss, and text."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pipeline import config
from pipeline.home import kept_tokenizer, pins, receipt, runs
from pipeline.home.layout import Layout, RunPaths
from shards.errors import DiskError, HostError
from shards.fingerprint import fingerprint
from train.config import DeviceName

if TYPE_CHECKING:
    from train.sample import Sampling

logger = logging.getLogger(__name__)


def evaluate(
    layout: Layout, run: RunPaths, tokens: int, *, checkpoint: str = "newest", device: DeviceName | None = None
) -> dict[str, Any]:
    """The chosen checkpoint's loss on the first `tokens` of validation, 0 for all, as evaluation.json.

    `device` is the run's own, train.device, if none is given. RefusedError when the run's tokens are not here.
    """
    from train.data.sources import OpenSources
    from train.evaluate import measure
    from train.machine.device import autocast, pick_device, resolve_precision
    from train.micro_batch import best_fit
    from train.trained import load_trained

    pinned = pins.pinned(run)
    wanted = runs.job(layout, run, config.load_run(run.recipe), pinned)
    runs.require_tokens(layout, run, pinned, "evaluate")
    layout.keep_compiled()
    place = pick_device(device or wanted.train.device)
    precision = resolve_precision(wanted.train, place)
    sources = OpenSources(wanted.sources, wanted.model.seq_len)
    for shard in (shard for folder in sources.folders for shard in folder.shards("val")):
        shard.check_tokens()
    tokenizer = sources.tokenizer_record
    trained = load_trained(wanted, tokenizer, place, checkpoint=checkpoint)
    kept_tokenizer.add(layout, run, pinned)
    began = time.perf_counter()
    fit = best_fit(wanted.model, wanted.optim, wanted.train, tokenizer.vocab_size, place, wanted.fits)
    found = measure(
        sources,
        trained.model,
        tokens,
        fit.eval_batch,
        lambda: autocast(place, precision),
        document_mask=wanted.train.document_mask,
    )
    result: dict[str, Any] = {
        "run": run.root.name,
        "step": trained.step,
        "token_folder": ", ".join(source.folder.name for source in wanted.sources),
        "seq_len": wanted.model.seq_len,
        **found.row(),
    }
    asked = {key: result[key] for key in ("run", "step", "token_folder", "val_tokens")}
    try:
        receipt.write(run.evaluation, "evaluate", fingerprint(asked), result, time.perf_counter() - began)
    except (DiskError, HostError) as error:
        logger.warning("%s", error)  # the answer itself is not lost: a run on a disk of somebody else's may be asked
    return result


def sample(
    layout: Layout,
    run: RunPaths,
    prompt: str,
    tokens: int,
    sampling: "Sampling",
    *,
    seed: int = 0,
    count: int = 1,
    stop: Sequence[str] = (),
    checkpoint: str = "newest",
    device: DeviceName | None = None,
) -> list[Iterator[str]]:
    """What the chosen checkpoint says after `prompt`, piece by piece, `count` times with seeds from `seed` on.

    `device` is the run's own if none is given.

    The run's own tokenizer is enough: its tokens may be elsewhere.
    """
    from train.machine.device import pick_device
    from train.sample import stream
    from train.trained import load_trained

    pinned = pins.pinned(run)
    wanted = runs.job(layout, run, config.load_run(run.recipe), pinned)
    place = pick_device(device or wanted.train.device)
    kept = kept_tokenizer.load(layout, run, pinned)
    trained = load_trained(wanted, kept.record, place, checkpoint=checkpoint)
    kept_tokenizer.add(layout, run, pinned)
    seeds = range(seed, seed + count)
    return [stream(trained.model, kept.tokenizer, prompt, tokens, sampling, seed=each, stop=stop) for each in seeds]
