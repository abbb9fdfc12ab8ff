"""A hub of this machine: as much of its protocol as a download and an upload speak."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Files = dict[str, bytes]


class Hub:
    """repositories: {"owner/name": {"revision": {"file": content}}}; requests: what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        self.requests: list[str] = []
        self.made: list[dict[str, Any]] = []
        self.url = ""

    @staticmethod
    def commit(files: Files) -> str:
        digest = hashlib.sha1()
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        return digest.hexdigest()

    def revision(self, repository: str, name: str) -> Files | None:
        revisions = self.repositories[repository]
        by_commit = {self.commit(files): files for files in revisions.values()}
        return {**by_commit, **revisions}.get(unquote(name))


class Handler(BaseHTTPRequestHandler):
    """Answers for `hub`, an attribute of its class."""

    hub: Hub

    def log_message(self, format: str, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if found is None:
            found = re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if found is None or found[1] not in hub.repositories:
            return self.refuse("RepoNotFound")
        files = hub.revision(found[1], found[3] or "main")
        if files is None:
            return self.refuse("RevisionNotFound")
        commit = hub.commit(files)
        if found[2] == "tree":
            rows = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            return self.answer(rows)
        if found[2] == "resolve":
            name = unquote(found[4])
            if name not in files:
                return self.refuse("EntryNotFound")
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(files[name], ETag=etag, X_Repo_Commit=commit)
        names = [{"rfilename": name} for name in files]
        return self.answer({"id": found[1], "sha": commit, "siblings": names})

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"POST {path}")
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "Bearer writer" not in str(self.headers["Authorization"]):
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(data)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in hub.repositories:
                return self.answer({"error": "is there", "url": f"{hub.url}/{name}"}, 409)
            hub.made.append(wanted)
            hub.repositories[name] = {"main": {}}
            return self.answer({"url": f"{hub.url}/{name}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path)
        assert found is not None, path
        revisions = hub.repositories[found[1]]
        if found[3] not in revisions:
            return self.refuse("RevisionNotFound")
        if found[2] == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(data)["files"]
            ]
            return self.answer({"files": modes})
        files = dict(revisions[found[3]])
        for line in data.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "deletedFile":
                del files[item["value"]["path"]]
        revisions[found[3]] = files
        commit = hub.commit(files)
        return self.answer(
            {"commitUrl": f"{hub.url}/{found[1]}/commit/{commit}", "commitOid": commit}
        )


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens on a port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
