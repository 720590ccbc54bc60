"""A local server that speaks as much of the hub's protocol as its client needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import pytest

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers for the repositories in ``repos``; requests are noted in ``asked``.

    Names that begin with ``gated/`` are gated, unless the request has a token. A file in ``cut`` breaks off in the middle
    that many times.
    """

    kind: Literal["datasets", "models"]
    repos: Mapping[str, Mapping[str, bytes]]
    asked: list[str]
    cut: dict[str, int]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if "/gated/" in path and "Authorization" not in self.headers:
            return self.answer(
                401 if self.kind == "models" else 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask"}
            )
        for name, files in self.repos.items():
            api = f"/api/{self.kind}/{name}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/v1"):
                return self.answer(200, json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode())
            if path.startswith(f"{api}/revision/"):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if path.startswith(f"{api}/tree/{COMMIT}"):
                tree = [
                    {"type": "file", "path": key, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for key, data in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode())
            start = f"{'/datasets' if self.kind == 'datasets' else ''}/{name}/resolve/{COMMIT}/"
            if path.startswith(start) and path.removeprefix(start) in files:
                return self.send(path.removeprefix(start), files[path.removeprefix(start)])
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send(self, name: str, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.cut.get(name, 0):
            self.cut[name] -= 1
            headers["Content-Length"] = str(len(data) - begin)
            self.answer(206 if begin else 200, data[begin : (begin + len(data)) // 2], headers)
            self.close_connection = True
            return
        self.answer(206 if begin else 200, data[begin:], headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def hub(
    kind: Literal["datasets", "models"],
    repos: Mapping[str, Mapping[str, bytes]],
    cache: Path,
    patch: pytest.MonkeyPatch,
    cut: dict[str, int] | None = None,
) -> Iterator[list[str]]:
    """Requests that the stand-in got; the hub's client uses it and the cache given."""
    values: dict[str, Any] = {"kind": kind, "repos": repos, "asked": [], "cut": cut if cut is not None else {}}
    handler = type("Handler", (Hub,), values)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    patch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(cache / "agents.json"))
    try:
        yield values["asked"]
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()
        server.server_close()
