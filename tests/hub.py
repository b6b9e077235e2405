"""A Hub on the loopback interface: the part of its API that publishing and downloading use.

`loopback_hub` starts one and points huggingface_hub at it, in this process and in those that it
starts (HF_ENDPOINT); nothing else is reached, and HF_HOME is an empty folder. Large files go by
basic LFS, because xet needs servers of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

TOKEN = "hf_" + "loopback" * 5
"""The only token that the loopback Hub takes."""

_LARGE = (".safetensors", ".png", ".whl", ".bin")
_OID = "0" * 40


@dataclass
class Repo:
    id: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


class LoopbackHub(ThreadingHTTPServer):
    """What a Hub has and was asked.

    Attributes:
        url: the endpoint.
        repos: by id.
        store: large files by sha256, uploaded but not necessarily committed.
        requests: (method, path) of all, in order.
        puts: sha256 of the large files that arrived whole, each time that they did.
        accept: if set, how many more uploads of large files are taken; the connections of others
            are cut in the middle.
        stall: with this, those hang in the middle instead, and `stalled` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.puts: list[str] = []
        self.accept: int | None = None
        self.stall = False
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients are killed here on purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT":
            self._put(path, length)
            return
        body = self.rfile.read(length)
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST" and not may_write:
            self._error(401, "Unauthorized")
            return
        for method, pattern, function in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                with self.server.lock:
                    self._call(function, found.groupdict(), body, may_write)
                return
        self._error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _route  # noqa: N815

    def _call(self, function: Any, given: dict[str, str], body: bytes, may_write: bool) -> None:
        if "id" in given:
            repo = self.server.repos.get(given.pop("id"))
            if repo is None or (repo.private and not may_write):
                self._error(404 if may_write else 401, "RepoNotFound")
                return
            function(self, repo, body, **given)
        else:
            function(self, body, **given)

    def whoami(self, _: bytes) -> None:
        self._answer(200, {"name": "me", "type": "user", "orgs": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            self._answer(409, answer)
            return
        self.server.repos[name] = Repo(name, asked.get("visibility") == "private")
        self._answer(200, answer)

    def validate(self, body: bytes) -> None:
        _, head, _ = json.loads(body)["content"].split("---\n", 2)
        assert isinstance(yaml.safe_load(head), dict)
        self._answer(200, {"errors": [], "warnings": []})

    def info(self, repo: Repo, _: bytes) -> None:
        siblings = [{"rfilename": path} for path in repo.files]
        self._answer(
            200, {"id": repo.id, "sha": _OID, "private": repo.private, "siblings": siblings}
        )

    def tree(self, repo: Repo, _: bytes) -> None:
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            for path, data in repo.files.items()
        ]
        self._answer(200, found)

    def preupload(self, repo: Repo, body: bytes) -> None:
        def oid(path: str) -> str | None:
            data = repo.files.get(path)
            if data is None:
                return None
            return hashlib.sha256(data).hexdigest() if path.endswith(_LARGE) else _blob(data)

        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid(file["path"]),
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, repo: Repo, body: bytes) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.store:
                href = f"{self.server.url}/storage/{item['oid']}"
                item["actions"] = {"upload": {"href": href}}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, path: str, length: int) -> None:
        hub, oid = self.server, path.rpartition("/")[2]
        with hub.lock:
            refused = hub.accept == 0
            if hub.accept:
                hub.accept -= 1
        if refused:
            self.rfile.read(length // 2)
            if hub.stall:
                hub.stalled.set()
                hub.closing.wait()
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(length)
        if len(data) < length or hashlib.sha256(data).hexdigest() != oid:
            self._error(400, "BadContent")
            return
        with hub.lock:
            hub.store[oid] = data
            hub.puts.append(oid)
        self._answer(200, {})

    def commit(self, repo: Repo, body: bytes) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
        repo.files |= files
        repo.commits += 1
        answer = {"commitUrl": f"{self.server.url}/{repo.id}/commit/{_OID}", "commitOid": _OID}
        self._answer(200, {**answer, "pullRequestUrl": None})

    def resolve(self, repo: Repo, _: bytes, path: str) -> None:
        if (data := repo.files.get(path)) is None:
            self._error(404, "EntryNotFound")
            return
        self._answer(200, data, ETag=f'"{_blob(data)}"', X_Repo_Commit=_OID)


_ID = r"(?P<id>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_ID}/preupload/main", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/main", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("GET", rf"/api/models/{_ID}(/revision/(main|{_OID}))?", _Handler.info),
    ("GET", rf"/api/models/{_ID}/tree/(main|{_OID})", _Handler.tree),
    ("GET HEAD", rf"/{_ID}/resolve/(main|{_OID})/(?P<path>.+)", _Handler.resolve),
]


def _blob(data: bytes) -> str:
    """git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def loopback_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    # read when huggingface_hub was imported
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf_home/hub"))
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield hub
    hub.closing.set()
    hub.shutdown()
    hub.server_close()
