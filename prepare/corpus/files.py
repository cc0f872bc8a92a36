"""Which files the patterns of a recipe name, by the same rules on this disk and on the Hub.

`*` and `?` stay inside one folder, `**` is any number of folders or none, `[ab]` is one of these characters, and a name
that begins with a dot is found only by a pattern that begins with one. A part of a pattern with brackets that is there
exactly as it is written is taken as that name.
"""

import errno
import fnmatch
import os
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Protocol

from shards.errors import ConfigError, HostError, from_os_error

Inode = tuple[int, int]


class Entry(NamedTuple):
    """One name in a folder."""

    name: str
    is_folder: bool


class Tree(Protocol):
    """Folders and files, by their paths; "" is the folder where relative patterns begin."""

    def entries(self, folder: str) -> list[Entry]:
        """What is in `folder`, sorted by name; nothing when there is no such folder."""

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder; a link that leads nowhere counts."""

    def below(self, folder: str) -> list[str]:
        """`folder` and every folder below it whose name has no leading dot, each once."""


def matching(pattern: str, tree: Tree) -> Iterator[str]:
    """The paths in `tree` that `pattern` names, folders among them. A path may come twice."""
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    yield from _expand(root, parts, tree)


def _expand(folder: str, parts: list[str], tree: Tree) -> Iterator[str]:
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for each in tree.below(folder):
            yield from _expand(each, rest or ["*"], tree)
        return
    path = _joined(folder, first)
    if not _is_pattern(first) or ("[" in first and tree.has(path)):
        if rest or tree.has(path):
            yield from _expand(path, rest, tree)
        return
    for entry in tree.entries(folder):
        hidden = entry.name.startswith(".") and not first.startswith(".")
        if not hidden and fnmatch.fnmatchcase(entry.name, first) and (entry.is_folder or not rest):
            yield from _expand(_joined(folder, entry.name), rest, tree)


def _is_pattern(part: str) -> bool:
    return any(mark in part for mark in "*?[")


def _joined(folder: str, name: str) -> str:
    return f"{folder}{'' if folder in ('', '/') else '/'}{name}"


def fixed_folder(pattern: str) -> str:
    """The folder that a pattern surely stays in: its parts before the first with a wildcard."""
    parts = [part for part in pattern.split("/") if part not in ("", ".")][:-1]
    fixed = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    return "/".join(parts[:fixed])


class ListedTree:
    """A tree of the paths of its files, as the Hub lists them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._folders: dict[str, dict[str, bool]] = {"": {}}
        for path in paths:
            self._add(path, False)

    def _add(self, path: str, is_folder: bool) -> None:
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = {}
            self._add(folder, True)
        self._folders[folder][name] = is_folder

    def entries(self, folder: str) -> list[Entry]:
        """See Tree."""
        return [Entry(*item) for item in sorted(self._folders.get(folder, {}).items())]

    def has(self, path: str) -> bool:
        """See Tree."""
        folder, _, name = path.rpartition("/")
        return name in self._folders.get(folder, {})

    def below(self, folder: str) -> list[str]:
        """See Tree."""
        if folder not in self._folders:
            return []
        inner = [entry.name for entry in self.entries(folder) if entry.is_folder and not entry.name.startswith(".")]
        return [folder, *(found for name in inner for found in self.below(_joined(folder, name)))]


class LocalTree:
    """The folders and files of this machine. Links are followed; HostError where a folder may not be read."""

    def entries(self, folder: str) -> list[Entry]:
        """See Tree."""
        return [Entry(entry.name, _is_folder(entry)) for entry in self._scanned(folder)]

    def has(self, path: str) -> bool:
        """See Tree."""
        return os.path.lexists(path)

    def below(self, folder: str) -> list[str]:
        """See Tree. A folder that links lead to again is found once, where possible by a path without a link."""
        if not Path(folder or ".").is_dir():
            return []
        found: dict[Inode, str] = {}
        linked = [folder]
        while linked:
            waiting = [linked.pop(0)]
            while waiting:
                at = waiting.pop()
                inode = _inode(at or ".")
                if inode in found:
                    continue
                found[inode] = at
                inner = [each for each in self._scanned(at) if _is_folder(each) and not each.name.startswith(".")]
                for each in inner:
                    (linked if each.is_symlink() else waiting).append(_joined(at, each.name))
        return sorted(found.values())

    def _scanned(self, folder: str) -> "list[os.DirEntry[str]]":
        try:
            with os.scandir(folder or ".") as found:
                return sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _unreadable(error, Path(folder or ".")) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _inode(path: str | Path) -> Inode:
    found = Path(path).stat()
    return found.st_dev, found.st_ino


def _unreadable(error: OSError, path: Path) -> HostError:
    if isinstance(error, PermissionError):
        return HostError(
            f"{path}: cannot be read: {error.strerror}",
            "files in it would silently be missing from the corpus",
            "give yourself permission to read it, or leave it out of corpus.files",
        )
    raise from_os_error(error, path, "read") from error


class Found(NamedTuple):
    """The local files that some patterns name, by what they are, and the further paths that lead to one of them."""

    files: dict[Inode, Path]
    again: list[Path]


def local_files(patterns: tuple[str, ...], field: str, kind_of: Callable[[str], str]) -> Found:
    """The files that `patterns` of the recipe's `field` name. A file is its device and inode, however it is spelled.

    `kind_of` says what a file of some name is read as, "" for what cannot be read: for the hint when it is a folder.
    ConfigError for a pattern that names no file; HostError for what may not be read.
    """
    by_inode: dict[Inode, dict[Path, None]] = {}
    for pattern in patterns:
        require_pattern(pattern, field)
        spelled = _at_home(pattern, field) if pattern.startswith("~") else pattern
        none = True
        for path in map(_absolute, dict.fromkeys(matching(spelled, LocalTree()))):
            if inode := _file_inode(path):
                by_inode.setdefault(inode, {})[path] = None
                none = False
        if none:
            raise _no_match(pattern, field, spelled, kind_of)
    files = {
        inode: min(paths, key=_preference) if len(paths) > 1 else next(iter(paths)) for inode, paths in by_inode.items()
    }
    again = [path for inode, paths in by_inode.items() for path in paths if path != files[inode]]
    return Found(files, sorted(again))


def require_pattern(pattern: str, field: str) -> None:
    """ConfigError for what can name no file."""
    if not pattern.strip() or not pattern.isprintable():
        raise ConfigError(f"{field}: {pattern!r} names no file", "", "give a path, with wildcards or without")


def _at_home(pattern: str, field: str) -> str:
    try:
        return str(Path(pattern).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{field}: {pattern}: there is no such user here", "", "give the path in full") from error


def _absolute(path: str) -> Path:
    """The path as it is named, without `..`: what a link leads to may have no suffix."""
    absolute = Path(path).absolute()
    if ".." not in absolute.parts:
        return absolute
    up = len(absolute.parts) - absolute.parts[::-1].index("..")
    return Path(os.path.realpath(Path(*absolute.parts[:up])), *absolute.parts[up:])


def _preference(path: Path) -> tuple[bool, int, str]:
    """A file that has several paths is called by one without a link, then by a short one."""
    return os.path.realpath(path) != str(path), len(path.parts), str(path)


def _file_inode(path: Path) -> Inode | None:
    """What the file at `path` is; None when it is not a file."""
    if not str(path).isprintable():
        raise ConfigError(f"{str(path)!r}: a file name that cannot be printed", "", "rename it")
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: is a link that leads nowhere", "", "fix or remove it") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path}: is a link that leads in a circle", "", "fix or remove it") from error
        raise _unreadable(error, path) from error
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _no_match(pattern: str, field: str, spelled: str, kind_of: Callable[[str], str]) -> ConfigError:
    looked = "" if Path(spelled).is_absolute() else f" (looked from {Path.cwd()})"
    if Path(spelled).is_dir():
        return folder_named(field, pattern, instead(spelled.rstrip("/"), LocalTree(), kind_of))
    if Path(spelled).exists():
        return ConfigError(f"{field}: {pattern} is not a regular file", "it is read more than once", "copy it into one")
    folder, _, name = spelled.rpartition("/")
    near = get_close_matches(name, [entry.name for entry in LocalTree().entries(folder)], n=1)
    hint = f"did you mean {_joined(folder, near[0])}" if near else "check the path"
    return ConfigError(f"{field}: no file matches {pattern!r}{looked}", "", hint)


def folder_named(field: str, pattern: str, patterns: list[str]) -> ConfigError:
    """The error for a pattern that is the name of a folder; `patterns` name the files in it."""
    if not patterns:
        return ConfigError(f"{field}: {pattern} is a folder without files that can be read", "", "check the path")
    quoted = ", ".join(f'"{each}"' for each in patterns)
    return ConfigError(f"{field}: {pattern} is a folder, and files are named by a pattern", "", f"use {quoted}")


def instead(folder: str, tree: Tree, kind_of: Callable[[str], str]) -> list[str]:
    """Patterns that name the readable files in `folder`, those of the most frequent kind first."""
    for inner in (folder, f"{folder}/**"):
        names = (path.rpartition("/")[2] for path in matching(f"{inner}/*", tree))
        kinds = Counter(name[name.rindex(kind) :] for name in names if (kind := kind_of(name)))
        if kinds:
            return [f"{inner}/*{suffix}" for suffix, _ in kinds.most_common()]
    return []


def listed_files(
    patterns: tuple[str, ...], field: str, files: Collection[str], where: str, kind_of: Callable[[str], str]
) -> set[str]:
    """Those of `files`, paths in a repository, that `patterns` of the recipe's `field` name, with Megatron's index of
    each of its files of tokens. ConfigError for a pattern that names none; `where` is the repository's name.
    """
    tree, found = ListedTree(files), set[str]()
    for pattern in patterns:
        require_pattern(pattern, field)
        spelled = pattern.strip("/")
        named = {path for path in matching(spelled, tree) if path in files}
        if not named and tree.entries(spelled):
            raise folder_named(field, pattern, instead(spelled, tree, kind_of))
        if not named:
            near = [path for path in files if kind_of(path)][:3]
            there = f"; there are {', '.join(near)}" if near else ""
            raise ConfigError(f"{where}: no file matches {pattern}{there}", "", f"check {field} against the Hub's page")
        found |= named
    indexes = {path.removesuffix(".bin") + ".idx" for path in found if path.endswith(".bin")}
    return found | {index for index in indexes if index in files}
