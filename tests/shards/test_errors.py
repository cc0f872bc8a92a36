"""The reason that is given is the reason, and the exit code is its kind's."""

import errno
import os
from pathlib import Path

import pytest

from shards.errors import from_os_error


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        (["EACCES", "EPERM", "EROFS", "EMFILE", "ENFILE", "ENOMEM", "EBUSY", "EINVAL"], 3),
        (["ENOSPC", "EDQUOT", "EFBIG", "EIO", "ESTALE"], 5),
        (["ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG"], 2),
        (["ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "EHOSTUNREACH", "EPIPE"], 6),
        (["ELOOP"], 4),
    ],
)
@pytest.mark.parametrize("doing", ["read", "written"])
def test_each_reason_has_its_kind(numbers: list[str], code: int, doing: str) -> None:
    for name in numbers:
        number = getattr(errno, name)
        error = from_os_error(OSError(number, os.strerror(number)), Path("a/b"), doing)
        assert error.exit_code == code, name
        assert str(error).startswith("a/b: ")
        if name != "ELOOP":
            assert f"cannot be {doing}: {os.strerror(number)}" in str(error)
            assert ("disk may be failing" in str(error)) == (name in ("EIO", "ESTALE")), name


def test_the_advice_for_reading_is_not_that_for_writing() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")
    assert "the right to read it" in from_os_error(denied, Path("a"), "read").fix
    assert "make the folder writable" in from_os_error(denied, Path("a"), "written").fix
