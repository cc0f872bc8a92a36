"""Where the Hub is, and who may have the user's token: the Hub's own hosts, and another endpoint only when
MILLPOND_TRUST_ENDPOINT=1 says so."""

import os
from urllib.parse import urlsplit

from shards.errors import ConfigError, MillpondError, NetworkError

OWN_HOSTS = ("huggingface.co", "hf.co")


def endpoint() -> str:
    """Where the Hub is. ConfigError when HF_ENDPOINT is no address."""
    given = os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co"
    if urlsplit(given).scheme not in ("http", "https") or not urlsplit(given).hostname:
        raise ConfigError(
            f"HF_ENDPOINT is {given!r}, which is not the address of a server",
            "datasets are asked for there",
            f"set it to https://{given.rpartition('/')[2] or 'HOST'}, or unset it",
        )
    return given.rstrip("/")


def timeout_seconds() -> float:
    """How long to wait for a connection, and for each next byte."""
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "10"))


def bound_waiting(seconds: float) -> None:
    """From now on a request of huggingface_hub fails when nothing comes for so long; by itself it waits for ever."""
    from huggingface_hub import get_session, set_client_factory

    kind, hooks = type(get_session()), get_session().event_hooks
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def token() -> str | None:
    """The user's token, if the endpoint may have it."""
    from huggingface_hub import get_token

    host = urlsplit(endpoint()).hostname or ""
    own = host in OWN_HOSTS or host.endswith(tuple(f".{name}" for name in OWN_HOSTS))
    return get_token() if own or os.environ.get("MILLPOND_TRUST_ENDPOINT") == "1" else None


def is_kept_back() -> bool:
    """Whether there is a token that the endpoint may not have."""
    from huggingface_hub import get_token

    return token() is None and get_token() is not None


def refusal(what: str, status: int, sentence: str, page: str) -> MillpondError:
    """The error for a 401, 403 or 404 of the Hub, in its own `sentence` where it sent one. `page`: the dataset's."""
    said = f"{what}: the Hub answers {status}{f': {sentence.strip()}' if sentence.strip() else ''}"
    if status == 404:
        return ConfigError(
            said,
            "it answers the same for what is private when the token may not see it",
            "check corpus.repo and corpus.files; for a private dataset set HF_TOKEN to a token that may read it",
        )
    if not token() and is_kept_back():
        return NetworkError(
            said,
            f"a token is set and was not sent: {endpoint()} is not the Hub's own address",
            "set MILLPOND_TRUST_ENDPOINT=1 if that address may have the token",
        )
    if status == 403 and token():
        why = "the token has no right to read it, or the dataset's terms are not accepted"
        return NetworkError(said, why, f"accept the terms at {page}, or set HF_TOKEN to a token that may read it")
    if not token():
        why = "no token was sent; the Hub asks for one for private, gated and missing datasets"
        return NetworkError(said, why, f"look at {page}, and set HF_TOKEN to a token that may read it")
    why = "the token that was sent (HF_TOKEN, or hf auth login) is expired, revoked or without permission to read it"
    return NetworkError(said, why, "set HF_TOKEN to a valid token, or unset it for a public dataset")
