"""The rules of the house, each one enforced."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("shards", "prepare", "train", "pipeline")
MAY_IMPORT = {
    "shards": {"shards"},
    "prepare": {"shards", "prepare"},
    "train": {"shards", "train"},
    "pipeline": {"shards", "prepare", "train", "pipeline"},
}
MAIN = "from pipeline.cli.main import main"
GROUND_FLOOR = {"numpy", "msgspec", "xxhash"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """The top-level names a file imports; `everywhere` also inside functions and TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package: str) -> None:
    for path in sources(package):
        house = imports(path, everywhere=True) & set(PACKAGES)
        assert house <= MAY_IMPORT[package], path


def test_the_ground_floor_needs_three_libraries() -> None:
    for path in sources("shards"):
        foreign = imports(path, everywhere=False) - set(sys.stdlib_module_names) - {"shards"}
        assert foreign <= GROUND_FLOOR, path


def below(package: str) -> dict[str, set[str]]:
    """The files and folders of a package, and which others of it each imports."""
    found: dict[str, set[str]] = {}
    for path in sources(package):
        unit = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
                names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                found.setdefault(unit, set()).update(set(names) - {unit})
    return found


def test_inside_train_imports_point_down_only() -> None:
    arrows = below("train")
    assert {wing: arrows[wing] for wing in ("data", "model", "optim", "machine", "telemetry")} == {
        "data": {"config"},
        "model": {"config"},
        "optim": {"config", "schedule", "model"},
        "machine": {"config", "model"},
        "telemetry": {"config", "data", "machine"},
    }
    assert arrows["state"] <= {"config", "schedule", "data", "model", "optim", "machine", "telemetry"}
    assert not [unit for unit, others in arrows.items() if "loop" in others]


def modules_imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_no_imports_go_in_a_circle(package: str) -> None:
    """Neither between the folders of a package nor between its files."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): modules_imported(path) for path in sources(package)
    }
    for arrows in (below(package), files):
        while arrows:
            free = {unit for unit, others in arrows.items() if not others & (arrows.keys() - {unit})}
            assert free, f"{package}: in a circle: {arrows}"
            arrows = {unit: others for unit, others in arrows.items() if unit not in free}


def test_every_folder_is_small_enough_to_hold_in_the_head() -> None:
    folders = [path for package in PACKAGES for path in (ROOT / package, *(ROOT / package).rglob("*")) if path.is_dir()]
    assert not {str(path): count for path in folders if (count := len(list(path.glob("*.py")))) > 14}


@pytest.mark.parametrize("name", ["data/order", "schedule", "config"])
def test_pure_functions_of_the_step_need_no_torch(name: str) -> None:
    assert "torch" not in imports(ROOT / "train" / f"{name}.py", everywhere=True)


def test_no_file_is_over_400_lines() -> None:
    files = [path for package in (*PACKAGES, "tests") for path in sources(package)]
    assert not {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 400}


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import shards", ["torch", "pyarrow", "datasets", "click", "rich", "tiktoken"]),
        (
            "from pipeline.cli.main import main; main(['--help'], standalone_mode=False)",
            ["torch", "pyarrow", "datasets"],
        ),
        (
            "from pipeline.cli.main import main; main(['status'], standalone_mode=False)",
            ["torch", "pyarrow", "datasets"],
        ),
        (
            "from pipeline.cli.main import main; main(['doctor'], standalone_mode=False)",
            ["torch", "pyarrow", "datasets"],
        ),
        ("import prepare.build", ["torch", "datasets"]),
        ("import train.config, train.data.order", ["torch", "pyarrow"]),
    ],
)
def test_nothing_heavy_is_loaded_that_is_not_used(statement: str, unwanted: list[str]) -> None:
    code = f"import sys\n{statement}\nsys.exit(' '.join(m for m in {unwanted} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_one_file_publishes() -> None:
    pattern = re.compile(r"os\.(replace|rename)\(|\.rename\(|os\.fsync\(")
    found = {path.name for package in PACKAGES for path in sources(package) if pattern.search(path.read_text())}
    assert found == {"atomic.py", "metrics.py"}  # metrics.jsonl is appended to, and made durable before a checkpoint


def test_nothing_is_pickled_or_evaluated() -> None:
    pattern = re.compile(r"\b(import pickle|pickle\.|torch\.load|torch\.save|eval\(|exec\()")
    for package in PACKAGES:
        for path in sources(package):
            assert not pattern.search(path.read_text().replace(".eval()", "")), path


def test_the_public_names_are_sorted_and_there() -> None:
    shards = importlib.import_module("shards")
    assert list(shards.__all__) == sorted(shards.__all__, key=lambda name: (not name[0].isupper(), name))
    assert all(hasattr(shards, name) for name in shards.__all__)


def test_no_word_of_the_house_is_empty() -> None:
    for package in PACKAGES:
        for path in sources(package):
            assert not {"utils", "common", "helpers", "manager"} & set(path.stem.split("_")), path
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} does not say what it is for"


UNWANTED = (  # and what is said instead
    r"\bto mend\b|\bmends?\b",  # fix, repair
    r"\bgo(es|ing)? on (?!the|a)\b|\bto go on\b",  # resume, continue
    r"\bstands?\b(?! for| in\b)",  # is
    r"\blies?\b",  # is
    r"\banew\b",  # again
    r"\bno numbers?\b|\bnot a number any more\b",  # non-finite
    r"\b(that|this) is said\b",  # logs a warning
    r"\b(the|a|one|several|whatever the|NVIDIA) cards?\b",  # GPU
    r"\bnobody\b",
    r"\bto and fro\b|\bhandful\b|\bshoulder\b|\bunder violence\b",
    r"\bwhat it has\b",  # its contents
    r"\b(is|are|each|already) whole\b|\bwhole checkpoints?\b",  # valid, complete
)


def test_unwanted_words_are_nowhere() -> None:
    """In strings, docstrings, comments and Markdown.

    Not in card.py: the card of a folder that exists is recognised by its text.
    """
    pattern = re.compile("|".join(UNWANTED), re.IGNORECASE)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "shards" / "FORMAT.md", ROOT / "Makefile"]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in [*pages, *(path for package in PACKAGES for path in sources(package) if path.name != "card.py")]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found, "\n".join(found)


def test_the_reference_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "reference.py"))["page"]
    assert (ROOT / "docs" / "reference.md").read_text("utf-8") == page(), "run make reference"
