"""Every error millpond raises on purpose, and the exit code each one ends the command with.

MillpondError
├── RefusedError    1   what is asked contradicts what is already there
├── ConfigError     2   a config, an option or an argument is wrong
├── HostError       3   this machine cannot do it: permissions, a missing package
├── CorruptError    4   bytes are not what they must be
├── DiskError       5   full, over quota, failing
├── NetworkError    6   the other side did not deliver
├── OutOfTime      75   --max-hours are over, after a checkpoint
└── Interrupted   130/143   stopped by a signal, after a checkpoint
"""

import errno
import signal
from pathlib import Path

TRACEBACK = "MILLPOND_TRACEBACK"  # set, unexpected errors show where they came from
_NETWORK_LIBRARIES = ("huggingface_hub", "requests", "urllib3", "httpx", "httpcore", "aiohttp", "botocore")
RESUME = "rerun the same command to resume"


class MillpondError(Exception):
    """What is wrong (path, offset, got, expected), why it matters, and the command that fixes it."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)  # positional, so that it survives the trip from a worker process
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.fix and f"hint: {self.fix}") if part)


class RefusedError(MillpondError):
    """What is asked contradicts what is already on disk."""


class ConfigError(MillpondError):
    """A config, an option or an argument is wrong."""

    exit_code = 2


class HostError(MillpondError):
    """This machine cannot do what is asked."""

    exit_code = 3


class CorruptError(MillpondError):
    """Bytes on disk are not what their header, manifest or hash says."""

    exit_code = 4


class DiskError(MillpondError):
    """The disk is full, over quota or failing."""

    exit_code = 5


class NetworkError(MillpondError):
    """The other side did not deliver."""

    exit_code = 6


class OutOfTime(MillpondError):
    """The time given is up, and everything worth keeping was saved. 75 is EX_TEMPFAIL: try again later."""

    exit_code = 75

    def __init__(self, saved: str) -> None:
        super().__init__(f"time is up: {saved}", RESUME)


class Interrupted(MillpondError):
    """A signal ended the work after everything worth keeping was saved."""

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(f"{signal.Signals(signum).name}: {saved}", RESUME)
        self.exit_code = 128 + signum


_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_NETWORK = {errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH}
_NETWORK |= {errno.ENETUNREACH, errno.ENETDOWN, errno.EPIPE}
_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def from_os_error(error: OSError, path: Path, doing: str) -> MillpondError:
    """The typed error for an OSError met while `doing` something to `path`: "read", "written", "made", ..."""
    what, number = f"{path}: cannot be {doing}: {error.strerror or error}", error.errno
    if number in _PERMISSION and doing in ("read", "opened", "mapped"):
        return HostError(what, "nothing was changed", "give yourself permission to read it, or run as its owner")
    if number in _PERMISSION:
        return HostError(
            what, "nothing was changed", "make the folder writable, or choose another place with --home DIR"
        )
    if number in _SPACE:
        return DiskError(
            what,
            "nothing half-written was published; what was finished before is kept",
            "free some space and run the same command again, or choose another disk with --home DIR",
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return HostError(what, "", "raise the limit, for example with ulimit -n 65536")
    if number == errno.ENOMEM:
        return HostError(what, "", "close other programs, use fewer workers, or a machine with more memory")
    if number == errno.ENAMETOOLONG:
        return ConfigError(what, "", "choose a shorter name")
    if number == errno.ELOOP:
        return CorruptError(f"{path}: is a link, and links are not followed in a token folder")
    if number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return ConfigError(what, "", "check the path")
    if number in _NETWORK:
        return NetworkError(what, "the other side did not answer", "check the network, then run the same command again")
    if number in (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV):
        return DiskError(what, "the disk may be failing, or is no longer there", "check it, then run again")
    return HostError(what, "", "look at what the message says of this machine, then run again")


def converted(error: Exception) -> MillpondError:
    """What an unexpected exception is to the user: ours as it is, the machine's and the network's by their
    own reasons, and all others named, with how to report them."""
    if isinstance(error, MillpondError):
        return error
    first = str(error).strip().splitlines() or [""]
    what = f"{type(error).__name__}: {first[0]}" if first[0] else type(error).__name__
    if isinstance(error, MemoryError):
        return HostError(
            what, "memory ran out", "close other programs, use fewer workers, or a machine with more memory"
        )
    library = type(error).__module__.partition(".")[0]
    if library in _NETWORK_LIBRARIES:
        return NetworkError(what, f"it comes from {library}", "check the network, then run the same command again")
    if isinstance(error, OSError) and error.errno:
        return from_os_error(error, Path(error.filename or "a file"), "used")
    why = "millpond does not expect this error" + (f", which comes from {library}" if library != "builtins" else "")
    return MillpondError(what, why, f"run it again with {TRACEBACK}=1, and report the bug with what that prints")
