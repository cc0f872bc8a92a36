"""The half of the Hub on loopback that takes files: huggingface_hub's create_repo and create_commit, without Xet.

A file's bytes go to the CDN by their sha256, and only if the Hub does not know them; the commit then names them.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from local_hub import Asked, Fault, LocalHub


class Uploads(BaseHTTPRequestHandler):
    """What a handler of the Hub answers when it is asked to take something."""

    if TYPE_CHECKING:
        hub: LocalHub

        def fault(self, where: str) -> Fault | None: ...
        def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None: ...

    def serve_upload(self, path: str, body: bytes) -> bool:
        """Answer a POST that is part of an upload; False when it is none."""
        kind, _, rest = path.removeprefix("/api/datasets/").partition("/commit/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.offer(json.loads(body)["objects"])
        elif path == "/lfs-verify":
            known = json.loads(body)["oid"] in self.hub.objects
            self.reply(200 if known else 404, {})
        elif "/preupload/" in path:
            repo = path.removeprefix("/api/datasets/").partition("/preupload/")[0]
            self.modes(self.newest(repo), json.loads(body)["files"])
        elif rest:
            self.commit(kind, unquote(rest), [json.loads(line) for line in body.splitlines()])
        else:
            return False
        return True

    def newest(self, repo: str) -> dict[str, bytes]:
        return list(self.hub.repos[repo].values())[-1]

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        there = repo in self.hub.repos
        if not there:
            self.hub.commit(repo, {".gitattributes": b"*.bin filter=lfs\n"})
            self.hub.visibility[repo] = asked.get("visibility", "public")
        self.reply(409 if there else 200, {"url": f"{self.hub.url}/datasets/{repo}"})

    def modes(self, files: dict[str, bytes], asked: list[dict[str, Any]]) -> None:
        from local_hub import entry, is_lfs

        found = []
        for file in asked:
            name = file["path"]
            known = entry(name, files[name]) if name in files else {}
            oid = known.get("lfs", known).get("oid")
            mode = "lfs" if is_lfs(name) else "regular"
            found.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": found})

    def offer(self, objects: list[dict[str, Any]]) -> None:
        """Where to put each object; no action for those that are here."""
        answers = []
        for each in objects:
            upload = {"href": f"{self.hub.cdn}/lfs/{each['oid']}"}
            answer = {**each, "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}}
            answers.append(each if each["oid"] in self.hub.objects else answer)
        self.reply(200, {"objects": answers, "transfer": "basic"})

    def receive(self, asked: "Asked") -> None:
        """The bytes of one object; a fault of "upload" refuses them or cuts the connection in the middle."""
        fault = self.fault("upload")
        left = int(self.headers["Content-Length"])
        stop = left // 2 if fault is not None and fault.kind == "cut" else 0
        data = bytearray()
        while left > stop:
            if self.hub.slow:
                threading.Event().wait(self.hub.slow)
            piece = self.rfile.read(min(left - stop, 1 << 16))
            if not piece:
                break
            data += piece
            left -= len(piece)
            asked.received += len(piece)
        if stop or left:
            self.close_connection = True
            return None
        if fault is not None:
            return self.reply(int(fault.kind), {"error": "injected"}, {"Retry-After": fault.retry_after})
        oid = asked.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            return self.reply(400, {"error": "these bytes have another sha256"})
        self.hub.objects[oid] = bytes(data)
        return self.reply(200, None)

    def commit(self, repo: str, revision: str, lines: list[dict[str, Any]]) -> None:
        fault = self.fault("commit")
        if fault is not None:
            return self.reply(int(fault.kind), {"error": "injected"}, {"Retry-After": fault.retry_after})
        if revision != "main":
            return self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = dict(self.newest(repo))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.reply(400, {"error": f"{value['path']}: its bytes were never sent"})
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.commit(repo, files)
        url = f"{self.hub.url}/datasets/{repo}/commit/{sha}"
        return self.reply(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": ""})
