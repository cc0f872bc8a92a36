"""What a file really is, from its first bytes: what often comes in the place of data is known by name."""

HEAD_BYTES = 512

_MAGIC = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive (or docx, xlsx, epub)",
    b"\x1f\x8b": "compressed with gzip",
    **{b"BZh%d1AY&SY" % level: "compressed with bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xff\xfe": "text in UTF-16, not UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8",
}
_FIXES = {
    "a git-lfs pointer": "fetch the file itself: git lfs pull",
    "an HTML page": "download the file again and look at what its address answers; text is extracted from pages first",
    "text in UTF-16, not UTF-8": "convert it: iconv -f UTF-16 -t UTF-8",
}


def page_or_pointer(head: bytes) -> str:
    """What comes instead of any file, tokens too: "a git-lfs pointer", "an HTML page"; else ""."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:9].lower()
    return "an HTML page" if start.startswith((b"<!doctype", b"<html")) else ""


def stranger(head: bytes) -> str:
    """What a file that begins with `head` is, when that is no text; else ""."""
    return page_or_pointer(head) or next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def fix_of(what: str) -> str:
    """What to do about `what`, an answer of stranger()."""
    return _FIXES.get(what, "give it the suffix that says what it is, or convert it")
