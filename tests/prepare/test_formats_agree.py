"""The same rows give the same documents and tokens, whatever the format, its compression and the number of workers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import PACK, ROWS, TEXTUAL, Table, documents, written

from shards import TokenFolder
from shards.manifest import Split

SPLITS: tuple[Split, ...] = ("train", "val")

cells = st.one_of(
    st.none(),
    st.sampled_from(
        ["", "null", "NaN", "1984", "1e5", "true", "a,b", "tab\there", 'a "q" b', '"', "two\nlines", "\r\n", " x "]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(cells, min_size=1, max_size=6))
def test_every_format_gives_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None]
) -> None:
    """A csv or tsv file has no null: its empty fields are null, and both are dropped."""
    folder = tmp_path_factory.mktemp("table")
    table: Table = {"n": list(range(len(texts))), "text": [*texts]}
    expected = [text for text in texts if text]
    for name, write in ROWS.items():
        found, counts = documents(written(folder, name, write(table)))
        assert (name, found, counts.rows) == (name, expected, len(texts))
        if name in TEXTUAL:
            for suffix, pack in PACK.items():
                assert documents(written(folder, name + suffix, pack(write(table))))[0] == expected, name + suffix


@pytest.mark.slow
def test_every_format_gives_the_same_tokens_with_any_number_of_workers(
    prepare: Callable[..., Path], tmp_path: Path
) -> None:
    texts = [f'text {i}, "quoted",\twith\nlines, 漢字 and {i * i}. ' * 3 for i in range(60)]
    table: Table = {"n": list(range(60)), "text": [None if i % 9 == 0 else text for i, text in enumerate(texts)]}
    packed = {f"{name}{suffix}": (name, suffix) for name, suffix in zip(TEXTUAL, PACK, strict=False)}
    files = [written(tmp_path, name, write(table)) for name, write in ROWS.items()]
    files += [written(tmp_path, name, PACK[suffix](ROWS[plain](table))) for name, (plain, suffix) in packed.items()]
    streams = {}
    for path in files:
        folder = TokenFolder(prepare(path, home=f"home-{path.name}", tokens__val_fraction=0.2))
        streams[path.name] = [folder.stream(split).window(0, len(folder.stream(split))).tolist() for split in SPLITS]
    first = streams.pop(files[0].name)
    assert len(first[0]) > 1000 and len(first[1]) > 100
    assert all(stream == first for stream in streams.values())
    homes = [prepare(*files, home=f"{n}", tokens__workers=n, tokens__part_tokens=4000) for n in (1, 2)]
    assert tree(homes[0]) == tree(homes[1])
    assert len(TokenFolder(homes[0]).manifest.parts) > 3
