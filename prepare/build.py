"""Parts to sealed shards, shards to a token folder. What comes out does not depend on how many processes there are or
on who finishes first.

A part is sealed when its record is in `.parts/`; the manifest, written last, gathers the records.
"""

import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait

import msgspec

from prepare.config import Executor
from prepare.corpus.corpus import Corpus
from prepare.part_builder import Advance, Builder, FolderSpec, shard_paths
from prepare.parts import Part, plan_parts
from prepare.pool import open_pool
from shards.atomic import make_folder, publish_bytes, sha256_of, sweep
from shards.errors import CorruptError, RefusedError
from shards.manifest import Manifest, PartRecord, decode
from shards.sharing.card import CARD, card


def tokenize(
    spec: FolderSpec, corpus: Corpus, max_tokens: int, workers: int, advance: Advance, *, executor: Executor = "local"
) -> Manifest:
    """Seal parts until the folder has `max_tokens` (0: all of them), then publish and return its manifest.

    Sealed parts are kept from run to run, and published ones for ever. `advance(tokens)` reports progress. The folder
    gets the shortest row of parts that holds enough, whatever was sealed beyond it, so growing in steps or at
    once ends the same. RefusedError when there are no documents, CorruptError when a file changed while it was read.
    """
    _check_tokenizer(spec)
    make_folder(spec.folder / ".parts")
    sweep(spec.folder)
    sweep(spec.folder / ".parts")
    sealed = _sealed_before(spec)
    for source in sorted({source for record in sealed.values() for source in record.sources}):
        if _is_sealed(source, sealed):
            corpus.release(source)
    parts = plan_parts(corpus, spec.manifest.part_tokens, sealed, spec.manifest.plan or None)
    hasher = Builder(spec, advance) if spec.manifest.dedup else None
    running: dict[Future[PartRecord], Part] = {}
    with open_pool(spec, workers, executor=executor, advance=advance) as pool:
        while True:
            while len(running) < pool.depth:
                estimates = {part.index: part.estimated_tokens * (part.split != "val") for part in running.values()}
                if _holds(spec.manifest, sealed, estimates, max_tokens) or not (part := next(parts, None)):
                    break
                if hasher:
                    hasher.write_hashes(part)  # here and in order: a part may be built when all before it are hashed
                running[pool.submit(part)] = part
            if not running:
                break
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            pool.poll()
            for future in finished:
                part = running.pop(future)
                sealed[part.index] = future.result()
                for source in sealed[part.index].sources:
                    if _is_sealed(source, sealed):
                        _confirm(spec, corpus, source)
                        corpus.release(source)
    return _publish(spec, corpus, list(_prefix(spec.manifest, sealed, max_tokens)))


def _check_tokenizer(spec: FolderSpec) -> None:
    """CorruptError unless the folder's tokenizer is its manifest's: more parts made with another mean other things."""
    record = spec.manifest.tokenizer
    for name, sha256 in (("tokenizer.tiktoken", record.ranks_sha256), ("tokenizer.json", record.json_sha256)):
        found = sha256_of(spec.folder / name)
        if found != sha256:
            raise CorruptError(
                f"{spec.folder / name}: sha256 is {found}, the manifest says {sha256}",
                "with another tokenizer every token means something else",
                "millpond tokenize CONFIG --force",
            )


def _sealed_before(spec: FolderSpec) -> dict[int, PartRecord]:
    """The published parts, and those that a run before this one sealed and did not live to publish."""
    sealed = dict(enumerate(spec.manifest.parts))
    for path in (spec.folder / ".parts").glob("*.json"):
        index = int(path.stem)
        record = decode(path.read_bytes(), PartRecord, path)
        sizes = {path.name: path.stat().st_size for path in shard_paths(spec.folder, index) if path.exists()}
        if sizes == {shard.file: shard.nbytes for shard in record.shards}:
            sealed.setdefault(index, record)
    return sealed


def _is_sealed(source: int, sealed: dict[int, PartRecord]) -> bool:
    """Whether all parts of a source file are sealed: from its first byte or row group to its last."""
    records = [(index, record) for index, record in sorted(sealed.items()) if source in record.sources]
    (first_index, first), (last_index, last) = records[0], records[-1]
    return first.first == 0 and last.ends_source and last_index - first_index + 1 == len(records)


def _confirm(spec: FolderSpec, corpus: Corpus, source: int) -> None:
    """CorruptError, and nothing sealed is kept, unless the file is what it was when it was hashed."""
    try:
        corpus.confirm(source)
    except CorruptError:
        shutil.rmtree(spec.folder / ".parts")
        raise


def _publish(spec: FolderSpec, corpus: Corpus, chosen: list[PartRecord]) -> Manifest:
    """Make the folder what `chosen` says, and nothing else."""
    manifest = msgspec.structs.replace(spec.manifest, parts=chosen)
    if not any(manifest.tokens(split) for split in ("train", "val")):
        counts = manifest.counts
        dropped = ", ".join(f"{count:,} ({reason})" for reason, count in counts.dropped.items())
        raise RefusedError(
            f"corpus {manifest.corpus.name}: no document in its files",
            f"they have {counts.rows:,} rows, dropped were: {dropped or 'none'}",
            "name other files",
        )
    for source in sorted({source for record in chosen[len(spec.manifest.parts) :] for source in record.sources}):
        _confirm(spec, corpus, source)
    _write_card(spec, manifest)
    manifest.write(spec.folder)
    kept = {name for name, _ in manifest.files()}
    for path in (*spec.folder.glob("train-*"), *spec.folder.glob("val-*")):
        if path.name not in kept:  # sealed beyond what was asked for, or half of a part that a kill cut short
            path.unlink()
    shutil.rmtree(spec.folder / ".parts")
    return manifest


def _write_card(spec: FolderSpec, manifest: Manifest) -> None:
    """README.md, unless somebody wrote into the one that is there."""
    path, name = spec.folder / CARD, spec.folder.name
    if not path.exists() or path.read_text("utf-8") in (card(spec.manifest, name), card(manifest, name)):
        publish_bytes(path, card(manifest, name).encode())


def _prefix(manifest: Manifest, sealed: dict[int, PartRecord], max_tokens: int) -> Iterator[PartRecord]:
    """The parts from the first on without a gap, until they hold enough, and all that were published."""
    tokens = index = 0
    while index in sealed and (index < len(manifest.parts) or not max_tokens or tokens < max_tokens):
        yield sealed[index]
        tokens += manifest.counted(sealed[index])
        index += 1


def _holds(manifest: Manifest, sealed: dict[int, PartRecord], running: dict[int, int], max_tokens: int) -> bool:
    """Whether the parts from the first on without a gap hold `max_tokens`, those `running` by their estimates."""
    tokens = index = 0
    while max_tokens and tokens < max_tokens and (index in sealed or index in running):
        tokens += manifest.counted(sealed[index]) if index in sealed else running[index]
        index += 1
    return bool(max_tokens) and tokens >= max_tokens
