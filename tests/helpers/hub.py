"""A local stand-in for the Hub: the endpoints that the client uses to make, fill and read a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

TOKEN = "hf_stand_in"
_LFS = (".safetensors", "tokenizer.json")


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return self.commits[-1][0] if self.commits else "0" * 40

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}

    def commit(self, files: dict[str, bytes]) -> None:
        digests = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in files.items())
        self.commits.append((hashlib.sha1(json.dumps([len(self.commits), digests]).encode()).hexdigest(), files))


@dataclass
class Hub:
    """The stand-in's state, and what tests set and read of it.

    Attributes:
        url: Address to use as ``HF_ENDPOINT``.
        repositories: By name.
        blobs: Large files by their SHA-256: uploaded, and not yet part of a commit.
        uploads: Names of the large files in the order they were uploaded.
        refuse_uploads_after: Number of further large files that are taken before the storage is full; None for any.
        requests: Method and path of every request.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    refuse_uploads_after: int | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def publish(self, name: str, folder: Path) -> None:
        """Put a folder into a repository, as somebody else has done before."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories.setdefault(name, Repository()).commit(files)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def talk_to(hub: Hub, patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let the real client of this process talk to a stand-in, as a process with ``HF_ENDPOINT`` does."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))


class RefusalError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, handle in _ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    return handle(self, **match.groupdict())
            raise RefusalError(404, message=f"no endpoint {self.command} {path}")
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, message="Invalid username or password.")

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None:
            raise RefusalError(404, "RepoNotFound", "Repository not found")
        if repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusalError(401, "RepoNotFound", "Repository not found")
        return repository

    def create(self) -> None:
        self._check_token()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repositories:
            self._send(409, json.dumps({"error": "You already created this model repo", **url}).encode())
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=bool(private))
            self._json(url)

    def validate(self) -> None:
        """Check the metadata of a card as the Hub does, as far as it says how."""
        _, head, _ = json.loads(self.body)["content"].split("---\n", 2)
        data, errors = yaml.safe_load(head), []
        if not isinstance(data.get("license"), str):
            errors.append('"license" must be a string')
        if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
            errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
        for result in (data.get("model-index") or [{"results": []}])[0]["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys():
                errors.append('"model-index[0].results[0]" is incomplete')
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        self._send(400 if errors else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def preupload(self, name: str) -> None:
        self._check_token()
        self._repository(name)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [
            {"path": p, "uploadMode": "lfs" if p.endswith(_LFS) else "regular", "shouldIgnore": False} for p in paths
        ]
        self._json({"files": modes})

    def batch(self, name: str) -> None:
        self._check_token()
        objects = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.blobs else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.hub.refuse_uploads_after is not None:
            if self.hub.refuse_uploads_after == 0:
                raise RefusalError(507, message="Insufficient storage")
            self.hub.refuse_uploads_after -= 1
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, message="The content does not have this SHA-256")
        self.hub.blobs[oid] = self.body
        self.hub.uploads.append(oid)
        self._send(200, b"")

    def commit(self, name: str) -> None:
        self._check_token()
        repository = self._repository(name)
        files = dict(repository.files)
        for line in map(json.loads, self.body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commit(files)
        url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        _, files = self._at(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        sha = repository.sha if revision == "main" else revision
        self._json({"id": name, "modelId": name, "sha": sha, "private": repository.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        _, files = self._at(self._repository(name), revision)
        self._json(
            [{"type": "file", "path": path, "size": len(content), "oid": "0" * 40} for path, content in files.items()]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        sha, files = self._at(self._repository(name), revision)
        if path not in files:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha256(files[path]).hexdigest()
        self._send(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})

    def _at(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return repository.sha, repository.files
        for sha, files in repository.commits:
            if sha == revision:
                return sha, files
        raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


_NAME = r"(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("POST", rf"/api/models/{_NAME}/commit/main", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
"""Method, path and handler of each endpoint; the first that fits answers."""
