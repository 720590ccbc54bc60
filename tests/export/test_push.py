"""Upload to a stand-in of a hub on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tunesmith.errors import ConfigError
from tunesmith.export.push import push

TOKEN = "hf_secretsecretsecret"


class Hub(BaseHTTPRequestHandler):
    got: dict[str, Any]

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.chunks()
        self.got["tokens"].add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if asked.get("organization") == "closed":
                return self.answer(403, {"error": "you may not write there"})
            self.got["repo"] = asked
            return self.answer(200, {"url": f"http://{self.headers['Host']}/org/name"})
        if self.path.startswith("/api/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.got["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/org/name/commit/1", "commitOid": "1"})
        return self.answer(404, {})

    def do_GET(self) -> None:
        self.answer(404 if "closed" in self.path else 200, {"id": "org/name", "sha": "0" * 40, "siblings": []})

    def chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline() or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        return data

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the hub was given."""
    received: dict[str, Any] = {"files": {}, "tokens": set()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"got": received}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield received
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# it\n")
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_every_file_arrives_in_a_private_repository(got: dict[str, Any], folder: Path, private: bool, capsys: Any) -> None:
    address = push(folder, "org/name", private)
    assert address.endswith("/org/name")
    asked = got["repo"]
    assert asked.get("visibility", "private" if asked.get("private") else "public") == ("private" if private else "public")
    assert got["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert got["tokens"] == {f"Bearer {TOKEN}"}
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err


def test_a_refusal_says_what_to_do_without_the_token(got: dict[str, Any], folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--push: closed/name: the hub did not take it.*hf auth login.*uploaded later"
    ) as caught:
        push(folder, "closed/name", True)
    assert TOKEN not in str(caught.value)
    assert not got["files"]
