"""Where the Hub is, and who may have the user's token: the Hub's own hosts, and another endpoint only when
MILLPOND_TRUST_ENDPOINT=1 says so."""

import os
from urllib.parse import urlsplit

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
