"""A dataset on the Hub as people write it: OWNER/NAME, or what they copied from the address bar."""

import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from shards.errors import ConfigError
from shards.sharing.hub_access import OWN_HOSTS, endpoint

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?"
REPO = re.compile(rf"(?!.*(?:--|\.\.))(?:{_NAME}/)?{_NAME}")  # old datasets have no owner; the Hub's own rules
_PAGES = ("tree", "blob", "resolve", "raw", "viewer", "discussions", "commits", "commit", "settings", "embed")
_OF_A_REVISION = ("tree", "blob", "resolve", "raw")
_OTHERS = ("models", "spaces", "buckets", "papers", "collections", "docs")


class RepoAddress(NamedTuple):
    """A repository, and the revision, folder or file in it that were named as well, or ""."""

    repo: str
    revision: str
    path: str
    is_file: bool


def parse_repo(given: str) -> RepoAddress:
    """What `given`, a recipe's corpus.repo, names. ConfigError when it is no dataset."""
    text = given.strip().removeprefix("git@").replace("hf.co:", "hf.co/", 1).removesuffix(".git")
    if text.partition("/")[0] in _hosts():
        text = f"https://{text}"
    scheme, _, rest = text.partition("://")
    if not rest:
        parts, is_url = text.split("/"), False
    elif scheme == "hf":
        parts, is_url = rest.split("/"), False
        if parts[0] != "datasets":
            raise _no_dataset(given, "names a model or a Space: a dataset's begins with hf://datasets/")
    elif scheme in ("http", "https"):
        url = urlsplit(text)
        if url.hostname not in _hosts():
            raise _no_dataset(given, f"is not on the Hub, which is {endpoint()} (HF_ENDPOINT)")
        parts, is_url = url.path.strip("/").removeprefix("api/").split("/"), True
        if parts[0] != "datasets":
            raise _no_dataset(given, "is the page of a model or a Space: a dataset's has /datasets/ in it")
    else:
        raise _no_dataset(given, f"begins with {scheme}://")
    parts = [unquote(part) for part in parts if part]
    if len(parts) > 1 and parts[0] == "datasets":
        parts = parts[1:]
    elif not is_url and len(parts) > 2 and parts[0] in _OTHERS:
        raise _no_dataset(given, f"names something else than a dataset: {parts[0]}")
    owner = 1 if len(parts) < 2 or (is_url and parts[1] in _PAGES) else 2
    name, _, revision = "/".join(parts[:owner]).partition("@")
    inside = parts[owner:]
    if revision == "refs" and inside[:1] in (["convert"], ["pr"]):  # such a revision has slashes in it
        revision, inside = "/".join((revision, *inside[:2])), inside[2:]
    if inside and inside[0] in _PAGES and (is_url or inside[0] in _OF_A_REVISION):
        page, inside = inside[0], inside[1:]
        if page in _OF_A_REVISION and inside:
            revision, inside = inside[0], inside[1:]
        else:
            inside = []
        is_file = page != "tree"
    else:
        is_file = "." in (inside[-1] if inside else "")
    if not REPO.fullmatch(name):
        raise _no_dataset(given, "is not the name of a dataset")
    return RepoAddress(name, revision, "/".join(inside), bool(inside) and is_file)


def _hosts() -> set[str]:
    return {*OWN_HOSTS, f"www.{OWN_HOSTS[0]}", urlsplit(endpoint()).hostname or OWN_HOSTS[0]}


def _no_dataset(given: str, reason: str) -> ConfigError:
    return ConfigError(
        f"corpus.repo is {given!r}, which {reason}",
        "corpus.repo must be OWNER/NAME, for example HuggingFaceFW/fineweb",
        "--set corpus.repo=OWNER/NAME",
    )
