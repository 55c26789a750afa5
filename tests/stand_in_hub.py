"""A stand-in for the hub on loopback: what huggingface_hub asks of it to write a repository and to read it again.

It keeps repositories in memory: files by name, weights by their SHA-256 as git-lfs does. `failures` and `readonly` make
it behave as the hub does on a bad day.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

HEAVY = (".safetensors", ".gguf", ".bin")


@dataclass
class Repo:
    """One repository: its files, and the messages of its commits."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((len(self.commits), sorted(self.files))).encode()).hexdigest()


@dataclass
class Hub:
    """What the server knows, and what it was asked.

    readonly: repositories that the token may read alone. failures: how often each kind of request still fails.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    role: str = "write"
    readonly: set[str] = field(default_factory=set)
    failures: dict[str, int] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    validated: list[str] = field(default_factory=list)

    def count(self, start: str) -> int:
        return sum(request.startswith(start) for request in self.asked)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        path = unquote(self.path.partition("?")[0])
        self.hub.asked.append(f"{self.command} {path}")
        for kind, left in self.hub.failures.items():
            if left and f"{self.command} {path}".startswith(kind):
                self.hub.failures[kind] -= 1
                return self._reply({"error": "overloaded"}, 520)
        if path.startswith("/store/") or path == "/api/validate-yaml":
            return self._plain(path)
        token = self.headers.get("Authorization", "")
        if token != "Bearer hf_good":
            return self._reply({"error": "Invalid username or password."}, 401)
        return self._known(path)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _chunks(self) -> bytes:
        made = b""
        while size := int(self.rfile.readline(), 16):
            made += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return made

    def _plain(self, path: str) -> None:
        if path.startswith("/store/"):
            assert hashlib.sha256(self.body).hexdigest() == path.removeprefix("/store/")
            self.hub.stored[path.removeprefix("/store/")] = self.body
            return self._reply({})
        self.hub.validated.append(json.loads(self.body)["content"])
        return self._reply({"errors": [], "warnings": []})

    def _known(self, path: str) -> None:
        if path == "/api/whoami-v2":
            token = {"role": self.hub.role, "displayName": "mine"}
            return self._reply({"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": token}})
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(self.body))
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._api(f"{owner}/{name}", rest)
        owner, name, _, _, *rest = path.strip("/").split("/")
        found = self.hub.repos[f"{owner}/{name}"]
        return self._bytes(found.files["/".join(rest)], {"X-Repo-Commit": found.sha})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name.partition("/")[0] not in ("me", "lab"):
            return self._reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        if name in self.hub.repos:
            return self._reply({"error": "You already created this model repo", "url": self._url(name)}, 409)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._reply({"url": self._url(name), "name": name})

    def _url(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def _api(self, name: str, rest: list[str]) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["auth-check"]:
            refused = rest[1:] == ["write"] and name in self.hub.readonly
            return self._reply({"error": "no"} if refused else {}, 403 if refused else 200)
        if rest[:1] == ["preupload"]:
            asked = json.loads(self.body)["files"]
            made = [{"path": f["path"], "shouldIgnore": False, "uploadMode": _mode(f["path"])} for f in asked]
            return self._reply({"files": made})
        if rest[:1] == ["commit"]:
            return self._commit(repo, name)
        siblings = [{"rfilename": file} for file in sorted(repo.files)]
        return self._reply({"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            known = each["oid"] in self.hub.stored
            action = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/store/{each['oid']}"}}}
            objects.append(each | action)
        self._reply({"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, name: str) -> None:
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repo.commits.append(value["summary"])
            elif entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                del repo.files[value["path"]]
        self._reply({"success": True, "commitOid": repo.sha, "commitUrl": f"{self._url(name)}/commit/{repo.sha}"})

    def _reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def _bytes(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Content-Length": str(len(content))}
        for key, value in (headers | etag).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(name: str) -> str:
    return "lfs" if name.endswith(HEAVY) else "regular"


@contextmanager
def served() -> Iterator[Hub]:
    """A hub at an address of its own, for as long as it is wanted."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
