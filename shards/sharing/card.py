"""The README.md of a token folder, which is a dataset card on the Hub: a pure function of the manifest."""

import json
import re

from shards.header import token_bytes
from shards.manifest import Manifest

CARD = "README.md"
_SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
_SIZES += [(10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B")]


def card(manifest: Manifest, name: str) -> str:
    """The dataset card of the token folder `name`, in Markdown behind YAML that the Hub reads."""
    return "\n".join(
        [_front_matter(manifest, name), f"# {plain(name)}\n", _source(manifest), _counts(manifest), _use(manifest)]
    )


def _front_matter(manifest: Manifest, name: str) -> str:
    """No `configs`: the Hub's viewer reads tables, and these are none."""
    documents = sum(shard.documents for shard in (*manifest.shards("train"), *manifest.shards("val")))
    licence = manifest.corpus.details.get("licence", "")
    lines = ["---"]
    if re.fullmatch(r"[a-z0-9.-]+", licence):
        lines.append(f"license: {licence}")
    elif licence:  # not one of the Hub's own names, which it would refuse
        lines += ["license: other", f"license_name: {json.dumps(plain(licence))}"]
    lines += [
        f"pretty_name: {json.dumps(plain(name))}",
        "size_categories:",
        f"- {next((label for limit, label in _SIZES if documents < limit), '100B<n<1T')}",
        "task_categories:",
        "- text-generation",
        "tags:",
        "- millpond",
        "- llm.c",
        "viewer: false",
        "---",
    ]
    return "\n".join(lines) + "\n"


def _source(manifest: Manifest) -> str:
    """Where the text comes from, to the commit, and how it became tokens."""
    corpus, tokenizer = manifest.corpus, manifest.tokenizer
    repo, commit = (plain(corpus.details.get(key, "")) for key in ("repo", "commit"))
    origin = f"`{plain(corpus.name)}` ({plain(corpus.kind)})"
    if repo and commit:
        origin = f"[{repo}](https://huggingface.co/datasets/{repo}/tree/{commit}) at commit `{commit}`"
    stands = f"stands {manifest.placement} each document" if manifest.placement else "stands where it stood there"
    split = f"""a document is validation when the xxh3-64 of its UTF-8 is below {manifest.val_fraction:g} * 2^64.
  The text alone decides, so the same text is validation in every corpus that is split like this."""
    if any(source.split for source in manifest.sources):
        split = "as the source files were given, some of them for validation."
    cleaned = [f"rows that meet `{plain(text)}`" for text in manifest.filters]
    cleaned += ["the first of equal documents"] * manifest.dedup
    cleaned += ["what is not in another folder's validation"] * (manifest.forbidden is not None)
    kept = f"\n- **Kept**: only {', '.join(cleaned)}." if cleaned else ""
    return f"""Token shards for training language models, made by millpond from {origin}.
Source files: {len(manifest.sources):,}; column or field: `{plain(corpus.text_column)}`. `manifest.json` has the sha256
of every file, there and here.

- **Tokenizer**: {plain(tokenizer.name)}, {tokenizer.vocab_size:,} tokens; it lies in this folder.
  End-of-text is {tokenizer.eot} and {stands}.
- **Split**: {split}{kept}
- **Fingerprint**: `{manifest.fingerprint}`
"""


def _counts(manifest: Manifest) -> str:
    """What is here, and what of the source is not."""
    counts = manifest.counts
    rows = ["| | train | val |", "|---|---|---|"]
    for label, field in (("tokens", "tokens"), ("documents", "documents"), ("bytes on disk", "nbytes")):
        train, val = (sum(getattr(shard, field) for shard in manifest.shards(split)) for split in ("train", "val"))
        rows.append(f"| {label} | {train:,} | {val:,} |")
    tokens = manifest.tokens("train") + manifest.tokens("val")
    per_token = f"{counts.text_bytes / tokens:.3f}" if tokens else "no"
    parts = "part" if len(manifest.parts) == 1 else "parts"
    whole = "the whole corpus" if manifest.complete else "the beginning of the corpus"
    table = "\n".join(rows)
    dropped = ", ".join(f"{count:,} ({plain(reason)})" for reason, count in counts.dropped.items())
    return f"""{table}

{counts.text_bytes:,} bytes of text, {per_token} bytes per token, in {len(manifest.parts):,} {parts}: {whole}.
Of {counts.rows:,} rows, dropped were: {dropped or "none"}. {counts.repaired:,} had invalid Unicode, which was replaced.
"""


def _use(manifest: Manifest) -> str:
    width = f"<u{token_bytes(manifest.tokenizer.vocab_size)}"
    return f"""## Use

`millpond shards pull URL` fetches it, compares every byte with the manifest, and `millpond train` uses it as it is.
The shards are llm.c's, 1,024 bytes of header and then the tokens: its readers and modded-nanogpt's read them too.
In numpy:

```python
import numpy as np

tokens = np.memmap("train-00000.bin", "{width}", "r", offset=1024)
documents = np.load("train-00000.docs.npy")  # start: offset of its first token; hash: xxh3-64 of its text
```
"""


def plain(text: str) -> str:
    """A stranger's words on one line, with nothing that Markdown or HTML would act upon."""
    return "".join(mark for mark in " ".join(text.split()) if mark not in "`<>[]()|")
