"""The card is the same for the same manifest, and what a stranger named does not become markup."""

from pathlib import Path

import msgspec
from huggingface_hub import DatasetCard

from shards import Manifest
from shards.sharing.card import card


def test_the_card_is_what_the_hub_reads(tiny_folder: Path) -> None:
    manifest = Manifest.read(tiny_folder)
    text = card(manifest, "tiny")
    assert text == card(manifest, "tiny")
    assert DatasetCard(text).data.to_dict()["pretty_name"] == "tiny"
    assert f"{manifest.tokens('train'):,} | {manifest.tokens('val'):,}" in text
    corpus = msgspec.structs.replace(
        manifest.corpus, details={"repo": "org/web", "commit": "0123abcd", "licence": "odc-by"}
    )
    text = card(msgspec.structs.replace(manifest, corpus=corpus), 'a"b\n---\nlicense: mit')
    data = DatasetCard(text).data.to_dict()
    assert data["license"] == "odc-by"
    assert data["pretty_name"] == 'a"b --- license: mit'
    assert "[org/web](https://huggingface.co/datasets/org/web/tree/0123abcd) at commit `0123abcd`" in text
