"""A Hub on loopback that speaks what huggingface_hub asks: listings, pinned commits, redirects to a CDN on another
origin, ranges. Faults are injected into the next so many answers of one kind; every request is written down."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from hub_uploads import Uploads

STALL_SECONDS = 1.0


@dataclass
class Fault:
    """What goes wrong in the next `times` answers of `where`; -1 is for ever.

    `where`: "api", "resolve", "cdn", and of an upload "upload" (the bytes) or "commit". `path`: how that of the request
    ends.
    """

    kind: str
    times: int
    where: str = "cdn"
    retry_after: str = "0"
    path: str = ""

    def take(self, where: str, path: str) -> bool:
        if where != self.where or not path.endswith(self.path) or self.times == 0:
            return False
        self.times -= 1
        return True


@dataclass
class Asked:
    """One request: which server, method, path, Range, Authorization, and the bytes of file it was answered with or
    brought."""

    where: str
    method: str
    path: str
    range: str
    authorization: str
    sent: int = 0
    received: int = 0


@dataclass
class LocalHub:
    """Repositories by name: commits by hash, newest last, each a dictionary of path to bytes."""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    log: list[Asked] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)  # what was uploaded, by sha256
    visibility: dict[str, str] = field(default_factory=dict)  # of the repositories that an upload made
    page_size: int = 3
    xet: bool = False  # files are offered through Xet as well
    slow: float = 0.0  # seconds before each 64 KiB of body

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Add a commit whose files are exactly `files`; it becomes main."""
        commits = self.repos.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits[sha] = files
        return sha

    def __enter__(self) -> Self:
        self._servers = []
        for where in ("hub", "cdn"):
            handler = type("Handler", (_Handler,), {"hub": self, "where": where})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._servers[1].server_port}"

    def sent(self) -> int:
        """Bytes of file bodies that left the CDN."""
        return sum(asked.sent for asked in self.log if asked.where == "cdn")

    def received(self) -> int:
        """Bytes of file bodies that came to the CDN."""
        return sum(asked.received for asked in self.log)


class _Handler(Uploads):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client's acknowledgement
    hub: LocalHub
    where: str

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_PUT = do_GET

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, body: bytes = b"") -> None:
        url = urlsplit(self.path)
        asked = Asked(
            self.where,
            self.command,
            unquote(url.path),
            self.headers.get("Range", ""),
            self.headers.get("Authorization", ""),
        )
        self.hub.log.append(asked)
        if self.command == "PUT":
            self.receive(asked)
        elif self.command == "POST" and self.serve_upload(unquote(url.path), body):
            pass
        elif self.where == "cdn":
            self.serve_bytes(asked)
        elif url.path.startswith("/api/datasets/"):
            self.serve_api(
                unquote(url.path.removeprefix("/api/datasets/")), parse_qs(url.query), parse_qs(body.decode())
            )
        elif url.path.startswith("/datasets/"):
            self.serve_resolve(unquote(url.path.removeprefix("/datasets/")))
        else:
            self.reply(404, {"error": "no such route"})

    def fault(self, where: str) -> Fault | None:
        path = unquote(urlsplit(self.path).path)
        return next((fault for fault in self.hub.faults if fault.take(where, path)), None)

    def serve_api(self, path: str, query: dict[str, list[str]], form: dict[str, list[str]]) -> None:
        fault = self.fault("api")
        if fault is not None:
            return self.reply(int(fault.kind), {"error": "injected"}, {"Retry-After": fault.retry_after})
        parts = path.split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        commits = self.hub.repos.get(repo)
        if commits is None:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        sha = self.commit_of(commits, rest[1] if len(rest) > 1 else "main")
        if sha is None:
            return self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = commits[sha]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in sorted(files)]
            info = {
                "_id": "0",
                "id": repo,
                "sha": sha,
                "private": False,
                "gated": False,
                "tags": [],
                "siblings": siblings,
            }
            return self.reply(200, {**info, "lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0})
        if rest[0] == "paths-info":
            return self.reply(200, [entry(name, files[name]) for name in form.get("paths", []) if name in files])
        folder = "/".join(rest[2:])
        names = [name for name in sorted(files) if not folder or name.startswith(folder + "/")]
        if not names:
            return self.reply(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
        start = int(query.get("cursor", ["0"])[0])
        page = names[start : start + self.hub.page_size]
        headers = {}
        if start + self.hub.page_size < len(names):
            plain = self.path.partition("?")[0]
            headers["Link"] = f'<{self.hub.url}{plain}?recursive=true&cursor={start + self.hub.page_size}>; rel="next"'
        return self.reply(200, [entry(name, files[name]) for name in page], headers)

    def commit_of(self, commits: dict[str, Any], revision: str) -> str | None:
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None

    def serve_resolve(self, path: str) -> None:
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        fault = self.fault("resolve")
        if fault is not None and fault.kind == "redirect-loop":
            return self.reply(302, None, {"Location": self.hub.url + self.path})
        if fault is not None:
            return self.reply(int(fault.kind), {"error": "injected"}, {"Retry-After": fault.retry_after})
        commits = self.hub.repos.get(repo, {})
        sha = self.commit_of(commits, revision)
        if sha is None or name not in commits[sha]:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = commits[sha][name]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{digest_of(data)}"'}
        if not is_lfs(name):
            return self.reply(200, data, headers)
        if self.hub.xet:
            link = f'<{self.hub.url}/api/datasets/{repo}/xet-read-token/{sha}>; rel="xet-auth"'
            headers |= {"X-Xet-Hash": digest_of(data), "Link": link}
        headers |= {"X-Linked-Etag": f'"{digest_of(data)}"', "X-Linked-Size": str(len(data))}
        return self.reply(302, None, {**headers, "Location": f"{self.hub.cdn}/{repo}/{sha}/{name}"})

    def serve_bytes(self, asked: Asked) -> None:
        org, name, sha, path = asked.path.lstrip("/").split("/", 3)
        data = self.hub.repos[f"{org}/{name}"][sha][path]
        first, last, status = 0, len(data) - 1, 200
        fault = self.fault("cdn")
        kind = fault.kind if fault else ""
        if asked.range and kind != "ignore-range":
            start, _, stop = asked.range.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(stop or last), last), 206
            if first > last:
                return self.reply(416, None, {"Content-Range": f"bytes */{len(data)}"})
        body = data[first : last + 1]
        if kind.isdigit():
            return self.reply(int(kind), {"error": "injected"}, {"Retry-After": fault.retry_after} if fault else {})
        if kind == "html":
            return self.reply(200, b"<html>please log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if kind == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if kind == "length":
            return self.reply(200, data + b"more", {})
        headers = {"Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(status, body, headers, asked, kind)
        return None

    def reply(
        self,
        status: int,
        body: Any,
        headers: dict[str, str] | None = None,
        asked: Asked | None = None,
        kind: str = "",
    ) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        named = {"Content-Type": "application/octet-stream" if isinstance(body, bytes) else "application/json"}
        for name, value in {**named, **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = (len(data) + 1) // 2 if kind == "cut" else 0
        try:
            for at in range(0, len(data), 1 << 16):
                if kind in ("cut", "stall") and at >= half:
                    break
                piece = data[at : at + (1 << 16)]
                if kind in ("cut", "stall"):
                    piece = piece[: half - at]
                if self.hub.slow:
                    threading.Event().wait(self.hub.slow)
                self.wfile.write(piece)
                if asked is not None:
                    asked.sent += len(piece)
            if kind == "stall":
                self.wfile.flush()
                threading.Event().wait(STALL_SECONDS)
            if kind in ("cut", "stall"):
                self.close_connection = True
                self.connection.close()
        except OSError:
            self.close_connection = True


def is_lfs(name: str) -> bool:
    return not name.endswith((".md", ".json"))


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": name, "oid": blob, "size": len(data)}
    if is_lfs(name):
        found["lfs"] = {"oid": digest_of(data), "size": len(data), "pointerSize": 134}
    return found
