"""Where the Hub is, and who may have the user's token: the Hub's own hosts, and another endpoint only when
MILLPOND_TRUST_ENDPOINT=1 says so."""

import os
from urllib.parse import urlsplit

from shards.errors import ConfigError, MillpondError, NetworkError

OWN_HOSTS = ("huggingface.co", "hf.co")


def endpoint() -> str:
    """Where the Hub is."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


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


def refusal(what: str, status: int, sentence: str) -> MillpondError:
    """The error for a 401, 403 or 404 of the Hub, in its own `sentence` where it sent one."""
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
        return NetworkError(
            said, why, "accept the terms on the dataset's page, or set HF_TOKEN to a token that may read it"
        )
    if not token():
        why = "no token was sent; the Hub asks for one for private, gated and missing datasets"
        return NetworkError(said, why, "check corpus.repo, and set HF_TOKEN to a token that may read it")
    why = "the token that was sent (HF_TOKEN, or hf auth login) is expired, revoked or without the right to read it"
    return NetworkError(said, why, "set HF_TOKEN to a valid token, or unset it for a public dataset")
