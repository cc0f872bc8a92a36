"""What a Hub dataset repository holds, at one commit: `main` is resolved once, and everything after names the commit.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean everywhere.
"""

import random
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prepare.download import BACKOFF, RETRIED, TRIES, Remote
from shards.errors import ConfigError, NetworkError
from shards.hub_access import endpoint, is_offline, token
from shards.manifest import SourceRecord

T = TypeVar("T")


class Repository(NamedTuple):
    """A dataset repository at one commit, and the files of it that were asked for, in the order of their names.

    `licence` is what its card says, or "".
    """

    commit: str
    licence: str
    files: list[SourceRecord]


def resolve(repo: str, revision: str, patterns: tuple[str, ...], optional: tuple[str, ...] = ()) -> Repository:
    """Ask the Hub which commit `revision` is, and which files match `patterns` there, or the `optional` ones. A file's
    digest is the sha256 of its bytes, or the git hash of what is small enough to lie in git itself.

    ConfigError when there is no such repository, revision or file; NetworkError when the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if is_offline():
        raise NetworkError(
            f"{repo}: HF_HUB_OFFLINE is set, and nothing of it was pinned here before",
            "the files to read are not known without asking the Hub once",
            "unset HF_HUB_OFFLINE for the first run",
        )
    api = HfApi(endpoint=endpoint(), token=token() or False)
    info = _asked(repo, revision, lambda: api.dataset_info(repo, revision=revision))
    licence = info.card_data.get("license") if info.card_data else None
    folders = sorted({_folder(pattern) for pattern in patterns})
    found: dict[str, SourceRecord] = {}
    for folder in folders:
        entries = _asked(
            repo,
            revision,
            lambda folder=folder: list(  # type: ignore[misc]
                api.list_repo_tree(repo, folder or None, recursive=True, revision=info.sha, repo_type="dataset")
            ),
        )
        for entry in entries:
            if isinstance(entry, RepoFile) and any(fnmatchcase(entry.path, pattern) for pattern in patterns + optional):
                digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
                found[entry.path] = SourceRecord(name=entry.path, nbytes=entry.size, digest=digest)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ConfigError(
                f"{repo} at {info.sha}: no file matches {pattern}",
                "",
                "check corpus.files and corpus.val_files against the Hub's page",
            )
    return Repository(str(info.sha), str(licence or "")[:100], [found[path] for path in sorted(found)])


def remote(repo: str, commit: str, file: SourceRecord) -> Remote:
    """How to fetch `file`."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo, file.name, repo_type="dataset", revision=commit, endpoint=endpoint())
    secret = token()
    return Remote(url, file.nbytes, file.digest, {"Authorization": f"Bearer {secret}"} if secret else {})


def in_cache(repo: str, commit: str, name: str) -> Path | None:
    """Where the user's own Hub cache has a file, if it does: it is read there and never copied."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard, as far as it names a folder."""
    plain = pattern[: min((pattern.find(mark) for mark in "*?[" if mark in pattern), default=len(pattern))]
    return plain.rpartition("/")[0]


def _asked(repo: str, revision: str, ask: Callable[[], T]) -> T:
    """The Hub's answer, asked for again while its failure may pass."""
    from huggingface_hub import errors

    reason: Exception | None = None
    transport: tuple[Any, ...] = (OSError, errors.HfHubHTTPError.__bases__[0])  # the HTTP library's, whichever it is
    for attempt in range(TRIES):
        try:
            return ask()
        except errors.RevisionNotFoundError as error:
            raise ConfigError(f"{repo}: no revision {revision!r}", "", "check corpus.revision") from error
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
            raise ConfigError(
                f"{endpoint()}: no dataset {repo!r}, no such folder in it, or no right to see it",
                "private and gated datasets need a token",
                "check corpus.repo and corpus.files, and HF_TOKEN",
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            reason = error
            if status and status not in RETRIED:
                break
        except transport as error:
            reason = error
        time.sleep(BACKOFF * 2**attempt * random.uniform(0.5, 1.0))
    raise NetworkError(
        f"{endpoint()}: cannot list {repo}: {str(reason).splitlines()[0]}",
        "nothing was downloaded or changed",
        "check the network and HF_ENDPOINT, then run the same command again",
    ) from reason
