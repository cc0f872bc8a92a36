"""What a file really is, by its first bytes: a pointer, a web page or another format in the place of data.

A git clone without git-lfs, a download that was answered with a page, a wrong suffix: read as text or as tokens, each
would be trained on.
"""

import re
from typing import NamedTuple

HEAD_BYTES = 1025  # a git-lfs pointer has fewer, so a longer text that only begins as one is no pointer


class Nature(NamedTuple):
    """A kind of file that is known by how it begins."""

    name: str
    what: str
    fix: str


_UTF8_MARK = b"\xef\xbb\xbf"
_POINTER = re.compile(rb"version https://[\w./-]+/spec/v\d+\r?\n(?:[^\n]*\n)*?oid sha256:[0-9a-f]{64}\b")
_PAGE = re.compile(rb"(?:<\?xml[^>]*>\s*)?(?:<!--(?s:.)*?-->\s*)*<(?:!doctype\s+html|html|head)[\s>]", re.IGNORECASE)
_ERROR = re.compile(rb"(?:<\?xml[^>]*>\s*)?<Error>\s*<Code>")  # an object store's answer
_UNPACK = "unpack it, and name the files that are inside"
_CONVERT = "convert it to .txt or .jsonl, and name that"
_RECODE = "iconv -f {} -t UTF-8 FILE > NEW"
_MAGICS = [
    (rb"\x1f\x8b\x08", "gzip", "compressed with gzip", "rename it to end in .gz"),
    (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "bzip2", "compressed with bzip2", "rename it to end in .bz2"),
    (rb"\xfd7zXZ\0", "xz", "compressed with xz", "rename it to end in .xz"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "compressed with zstd", "rename it to end in .zst"),
    (rb"\x04\x22\x4d\x18", "lz4", "compressed with lz4", "decompress it"),
    (rb"PK(?:\x03\x04|\x05\x06)", "zip", "a zip archive (docx, xlsx and epub are ones too)", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "7z", "a 7z archive", _UNPACK),
    (rb"Rar!\x1a\x07", "rar", "a RAR archive", _UNPACK),
    (rb"(?s:.{257})ustar[\0 ]", "tar", "a tar archive", _UNPACK),
    (rb"%PDF-\d", "pdf", "a PDF", "extract its text, for example with pdftotext, and name that"),
    (rb"\{\\rtf\d", "rtf", "an RTF document", _CONVERT),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "ole", "an old Office document (doc, xls)", _CONVERT),
    (rb"PAR1\x15", "parquet", "a parquet file", "rename it to end in .parquet"),
    (rb"ARROW1\0\0", "arrow", "an Arrow file", "rename it to end in .arrow"),
    (rb"\xff\xff\xff\xff(?s:..)\0\0\x10\0\0\0", "arrow", "an Arrow stream", "rename it to end in .arrow"),
    (rb"\x93NUMPY", "numpy", "a numpy array", "rename it to end in .npy, if it holds tokens"),
    (rb"SQLite format 3\0", "sqlite", "an SQLite database", _CONVERT),
    (rb"Obj\x01", "avro", "an Avro file", _CONVERT),
    (rb"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file", _CONVERT),
    (rb"\x89PNG\r\n\x1a\n", "png", "a PNG image", "leave it out"),
    (rb"\xff\xd8\xff[\xe0\xe1\xdb]", "jpeg", "a JPEG image", "leave it out"),
    (rb"\xff\xfe\0\0", "utf-32", "text in UTF-32, not UTF-8", _RECODE.format("UTF-32")),
    (rb"\0\0\xfe\xff", "utf-32", "text in UTF-32, not UTF-8", _RECODE.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "utf-16", "text in UTF-16, not UTF-8", _RECODE.format("UTF-16")),
    (rb"(?s:[^\0]\0){16}", "utf-16", "text in UTF-16, not UTF-8", _RECODE.format("UTF-16LE")),
    (rb"(?s:\0[^\0]){16}", "utf-16", "text in UTF-16, not UTF-8", _RECODE.format("UTF-16BE")),
]
_NATURES = [(re.compile(magic), Nature(name, what, fix)) for magic, name, what, fix in _MAGICS]


def nature_of(head: bytes) -> Nature | None:
    """What a file is whose first HEAD_BYTES (or all, if it has fewer) are `head`; None when nothing gives it away."""
    if len(head) < HEAD_BYTES and _POINTER.match(head):
        return Nature("pointer", "a git-lfs pointer", "fetch the file itself: git lfs pull")
    text = head.removeprefix(_UTF8_MARK).lstrip()
    if _PAGE.match(text):
        return Nature(
            "html", "an HTML page", "if it came in place of a file, download that again; else extract its text"
        )
    if _ERROR.match(text):
        return Nature("error", "a server's error message", "download the file again")
    return next((nature for magic, nature in _NATURES if magic.match(head)), None)
