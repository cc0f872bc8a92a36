"""What a Hub dataset repository holds, at one commit: `main` is resolved once, and everything after names the commit.

HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they mean everywhere.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prepare.corpus.download import Remote
from shards.errors import ConfigError, NetworkError
from shards.manifest import SourceRecord
from shards.sharing.hub_access import bound_waiting, endpoint, is_offline, refusal, timeout_seconds, token
from shards.sharing.retry import PASSING, Retries, reason_of

T = TypeVar("T")


class Repository(NamedTuple):
    """Some folders of a dataset repository at one commit: every file by its path. `licence` is what its card says, or
    "". A file's digest is the sha256 of its bytes, or the git hash of what is small enough to be in git itself.
    """

    commit: str
    licence: str
    files: dict[str, SourceRecord]


def listing(repo: str, revision: str, folders: Iterable[str]) -> Repository:
    """Ask the Hub which commit `revision` is, and which files are in `folders` there and below.

    A folder that is not there has no files. ConfigError when there is no such repository or revision; NetworkError when
    the Hub does not answer, or refuses to.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    if is_offline():
        raise NetworkError(
            f"{repo}: HF_HUB_OFFLINE is set, and nothing of it was pinned here before",
            "the files to read are not known without asking the Hub once",
            "unset HF_HUB_OFFLINE for the first run",
        )
    bound_waiting(timeout_seconds())
    api = HfApi(endpoint=endpoint(), token=token() or False)
    info = _asked(repo, revision, lambda: api.dataset_info(repo, revision=revision, timeout=timeout_seconds()))
    licence = info.card_data.get("license") if info.card_data else None
    files: dict[str, SourceRecord] = {}
    for folder in sorted(folders):

        def ask(folder: str = folder) -> list[Any]:
            try:
                return list(
                    api.list_repo_tree(repo, folder or None, recursive=True, revision=info.sha, repo_type="dataset")
                )
            except EntryNotFoundError:
                return []

        for entry in _asked(repo, revision, ask):
            if isinstance(entry, RepoFile):
                digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
                files[entry.path] = SourceRecord(name=entry.path, nbytes=entry.size, digest=digest)
    return Repository(str(info.sha), str(licence or "")[:100], files)


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


def _asked(repo: str, revision: str, ask: Callable[[], T]) -> T:
    """The Hub's answer, asked for again while its failure may pass."""
    from huggingface_hub import errors

    retries = Retries(f"{endpoint()}: cannot list {repo}")
    transport: tuple[Any, ...] = (OSError, errors.HfHubHTTPError.__bases__[0])  # the HTTP library's, whichever it is
    while True:
        try:
            return ask()
        except errors.RevisionNotFoundError as error:
            raise ConfigError(f"{repo}: no revision {revision!r}", "", "check corpus.revision") from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403, 404):
                page = f"{endpoint()}/datasets/{repo}"
                raise refusal(f"{endpoint()}: dataset {repo}", status, error.server_message or "", page) from error
            if status and status not in PASSING:
                raise NetworkError(
                    f"{endpoint()}: cannot list {repo}: {reason_of(error)}",
                    "asking again would give the same answer; nothing was downloaded or changed",
                    f"look at {endpoint()}/datasets/{repo} in a browser",
                ) from error
            retries.wait(error, reason_of(error))
        except transport as error:
            retries.wait(error, reason_of(error))
        except UnicodeEncodeError as error:  # of the request's headers
            raise ConfigError(
                "HF_TOKEN has a character that no token has, perhaps a typographic quote",
                "the Hub cannot be asked with it",
                "set HF_TOKEN again, or unset it for a public dataset",
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise NetworkError(
                f"{endpoint()}: the answer about {repo} is not the Hub's ({type(error).__name__})",
                "a login page, a proxy or another server answers in its place; nothing was downloaded or changed",
                "look at the address in a browser, and check HF_ENDPOINT and the proxy",
            ) from error
