"""The identities of the tables, frozen: with another one, every run and token folder there is would be made again."""

from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from pipeline import config
from prepare.config import CorpusConfig, TokensConfig
from shards.fingerprint import fingerprint, identity, neutral
from train.config import ModelConfig, OptimConfig, TrainConfig

TABLES = {
    TokensConfig: (
        "d991fdea632e0ccabd3420410101f2287d51fd1e75090d1285cb63fbed1e76e4",
        "tokenizer vocab_size val_fraction eot dedup part_tokens",
    ),
    ModelConfig: (
        "c6f07b0042ad2457de56ef1dbdadba6c074aae2f4c55ee20f1e7c448cb6346a4",
        "family n_layer n_head d_model d_ff seq_len dropout tied qkv_bias rope_theta init",
    ),
    OptimConfig: (
        "1e92cc78f53c5c3fe101f5883b53d5188e8844067ccdd15d0266cba7875da63a",
        "name lr embed_lr head_lr norm_lr weight_decay decay beta1 beta2 eps momentum momentum_warmup clip schedule "
        "warmup_steps decay_fraction final_lr",
    ),
    TrainConfig: (
        "d36ecdea32111e33fd83eb31ee4334620d4a28960b14cff35f4d0c3609dae5a6",
        "tokens steps batch_tokens batch_ramp precision seed document_mask order spike_z rollback_after",
    ),
}
PRESETS = {
    "demo": "95559d78bf2ff36c151dd28ee41643b2dd96a1b04549ca6043212f2392d693fd",
    "gpt2": "80b232cabbfab5735abcdad6a1ca41ea8ea64e9f31fd820235a0a2c6006780db",
    "gpt2-book": "fef9177c4023886db03ad0ab754bea8b0a15cf9e2737e076e0e0b18c0bd5d9d0",
    "gpt2-tuned": "265ec8a0a0c143064a42b9f8fc5cfd33fc52b8194cc786695bed3866fd497fbd",
    "overnight": "b2a2d90c4960c660a09f99c39cbe026975cc1511e69297bc4dabb6b3907277cb",
}


def as_before(table: msgspec.Struct) -> msgspec.Struct:
    """The table with every field that was added later at its neutral value."""
    return msgspec.structs.replace(table, **neutral(type(table)))


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_identities_are_frozen(kind: type[msgspec.Struct]) -> None:
    frozen, fields = TABLES[kind]
    found = identity(as_before(kind()))
    assert list(found) == fields.split(), (
        f"{kind.__name__}: a field was added to the identity, or taken from it, so that no run or token folder made "
        "before would be recognised any more. Give a new field the value that does what was done before it existed: "
        'Annotated[..., Meta(extra={"neutral": VALUE})], or NOT_IDENTITY when it cannot change the result; and keep '
        "the old fields. See docs/architecture.md."
    )
    assert fingerprint(found) == frozen, (
        f"{kind.__name__}: the default of a field changed. A run keeps its own value, in run.toml; but a recipe "
        "that leaves the field out now describes another run or token folder. If that is meant, say so in "
        "CHANGELOG.md and write the new fingerprint here."
    )


@pytest.mark.parametrize("name", config.preset_names())
def test_presets_are_frozen(name: str) -> None:
    recipe = config.load(name)[1]
    tables = {table: identity(as_before(getattr(recipe, table))) for table in ("tokens", "model", "optim", "train")}
    assert fingerprint(tables) == PRESETS[name], (
        f"{name}: runs that were begun with this preset are refused by the same command now. If that is meant, say so "
        "in CHANGELOG.md and write the new fingerprint here."
    )


def accepts(kind: object, value: object) -> bool:
    try:
        return bool(msgspec.to_builtins(msgspec.convert(value, kind)) == value)
    except msgspec.ValidationError:
        return False


def misfits(kind: type[msgspec.Struct]) -> list[str]:
    """The fields whose neutral value they cannot hold, or that run.toml, which leaves None out, would not keep."""
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    return [
        name
        for name, value in neutral(kind).items()
        if not accepts(types[name], value) or (value is not None and accepts(types[name], None))
    ]


@pytest.mark.parametrize("kind", [CorpusConfig, *TABLES], ids=lambda kind: kind.__name__)
def test_neutral_values_fit_their_fields(kind: type[msgspec.Struct]) -> None:
    assert not misfits(kind)


def test_neutral_values_that_do_not_fit() -> None:
    class Wrong(msgspec.Struct):
        good: Annotated[int | None, Meta(extra={"neutral": None})] = 3
        word: Annotated[Literal["a", "b"], Meta(extra={"neutral": "c"})] = "a"
        unset: Annotated[int | None, Meta(extra={"neutral": 3})] = None

    assert misfits(Wrong) == ["word", "unset"]
