"""The reason that is given is the reason, and the exit code is its kind's."""

import errno
import os
from pathlib import Path

import pytest

from shards.errors import NetworkError, converted, from_os_error


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
    assert "permission to read it" in from_os_error(denied, Path("a"), "read").fix
    assert "make the folder writable" in from_os_error(denied, Path("a"), "written").fix


def test_an_error_of_a_library_is_named_and_converted() -> None:
    import json

    import requests

    assert converted(kept := NetworkError("gone")) is kept
    assert converted(MemoryError()).exit_code == 3
    assert converted(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b")).exit_code == 2
    assert converted(requests.ConnectTimeout("no answer")).exit_code == 6
    bug = converted(json.JSONDecodeError("Expecting value", "", 0))
    assert bug.exit_code == 1
    assert str(bug).splitlines() == [
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "millpond does not expect this error, which comes from json",
        "hint: run it again with MILLPOND_TRACEBACK=1, and report the bug with what that prints",
    ]
