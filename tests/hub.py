"""A hub on the loopback interface, and a cache as the hub's client leaves it; each has only what the client needs.

Written from the hub's API rather than from the code that uses the client, so the client itself is tested too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.original import Kind, write_original
from tests.tiny import edit_json

OLD, NEW = "a" * 40, "b" * 40
# For each id, its folders by revision, newest last.
Repositories = Mapping[str, Mapping[str, Path]]


def write_lora(folder: Path) -> dict[str, Path]:
    """Writes a LoRA that names its base and tower by hub id; returns the folders of all three by id."""
    original = write_original(folder, Kind(layout="lora"))
    assert original.base is not None
    edit_json(original.folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path="owner/base"))
    edit_json(original.folder / "config.json", lambda c: c.update(mm_vision_tower="openai/tower"))
    return {"owner/lora": original.folder, "owner/base": original.base, "openai/tower": folder / "tower"}


def fill_cache(cache: Path, repo_id: str, folders: Mapping[str, Path]) -> None:
    """Writes a snapshot folder for each revision, and a `main` reference to the newest."""
    root = cache / f"models--{repo_id.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    for revision, folder in folders.items():
        shutil.copytree(folder, root / "snapshots" / revision)
        (root / "refs" / "main").write_text(revision)


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, url: str | None = None) -> None:
    """Points this process's client at a cache and a hub; without a `url` the client is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", url is None)
    if url is not None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@contextlib.contextmanager
def hub_of(repositories: Repositories) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Hub(ThreadingHTTPServer):
    """Serves repositories. `asked` lists the requests it has received."""

    def __init__(self, repositories: Repositories) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def sent(self) -> list[str]:
        """Names of the files that were downloaded."""
        return sorted(path.rsplit("/", 1)[1] for path in self.asked if re.match("GET .*/resolve/", path))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(\w+))?", path):
            self.tell(match[1], match[3] or "main", is_tree=match[2] == "tree")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self.send(*match.groups())
        else:
            self.answer(b"", 404)

    def tell(self, repo_id: str, revision: str, *, is_tree: bool) -> None:
        """Sends the list of a revision's files, in the format of either endpoint."""
        if (found := self.find(repo_id, revision)) is None:
            return
        files = [(file.name, file.stat().st_size, digest(file)) for file in sorted(found[1].iterdir())]
        tree = [{"type": "file", "path": name, "size": size, "oid": oid} for name, size, oid in files]
        siblings = [{"rfilename": name, "size": size, "blobId": oid} for name, size, oid in files]
        body: Any = tree if is_tree else {"id": repo_id, "sha": found[0], "siblings": siblings}
        self.answer(json.dumps(body).encode(), **{"content-type": "application/json"})

    def send(self, repo_id: str, revision: str, name: str) -> None:
        if found := self.find(repo_id, revision):
            file = found[1] / name
            self.answer(file.read_bytes(), etag=f'"{digest(file)}"', **{"x-repo-commit": found[0]})

    def find(self, repo_id: str, revision: str) -> tuple[str, Path] | None:
        folders = self.server.repositories.get(repo_id, {})
        revision = list(folders)[-1] if folders and revision == "main" else revision
        if revision in folders:
            return revision, folders[revision]
        self.answer(b"", 404, **{"x-error-code": "RevisionNotFound" if folders else "RepoNotFound"})
        return None

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
