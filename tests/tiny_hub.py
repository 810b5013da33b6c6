"""A hub on loopback: one repository, served as huggingface_hub asks for it, that can be spoilt."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

from huggingface_hub import constants, file_download
from huggingface_hub.utils.sha import git_hash

SHA = "5" * 40


class Hub(ThreadingHTTPServer):
    """Files of a folder as ``org/tiny``.

    ``sent`` counts the bytes of each file that were sent beside headers, ``cut`` says after how
    many of a file the connection ends, and ``down`` that no weight is sent any more.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.sent, self.cut, self.down = folder, Counter(), {}, False
        self.spoilt = set()
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        self.listed = {str(p.relative_to(folder)): self.entry(p) for p in files}

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no error of the hub."""

    def entry(self, file: Path) -> dict:
        """What a hub says of a file."""
        data = file.read_bytes()
        entry = {"rfilename": file.name, "size": len(data), "blobId": git_hash(data)}
        if file.suffix in (".safetensors", ".gguf"):
            entry["lfs"] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "size": len(data),
                "pointerSize": 130,
            }
        return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/api/models/org/tiny"):
            tree = [
                {"type": "file", "path": name, "oid": e["blobId"], "size": e["size"]}
                | ({"lfs": {**e["lfs"], "oid": e["lfs"]["sha256"]}} if "lfs" in e else {})
                for name, e in self.server.listed.items()
            ]
            info = {"id": "org/tiny", "sha": SHA, "siblings": list(self.server.listed.values())}
            return self.answer(200, json.dumps(tree if "/tree/" in path else info).encode())
        found = re.fullmatch(r"/org/tiny/resolve/[^/]+/(.+)", path)
        if not found or found[1] not in self.server.listed:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return self.file(found[1])

    def file(self, name: str) -> None:
        entry, data = self.server.listed[name], (self.server.folder / name).read_bytes()
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), asked[2]) if asked else (0, "")
        whole, data = len(data), data[first : int(last) + 1 if last else None]
        if asked:
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{whole}"
        weights = name.endswith((".safetensors", ".gguf")) and not last and self.command == "GET"
        if weights and self.server.down:
            return self.close()
        if name in self.server.spoilt and weights:
            data = data[:-1] + bytes([data[-1] ^ 1])
        most = self.server.cut.pop(name, len(data)) if weights else len(data)
        self.answer(206 if asked else 200, data, headers, most)
        if weights:
            self.server.sent[name] += min(most, len(data))
        if most < len(data):
            self.close()
        return None

    def close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, data: bytes, headers: dict | None = None, most: int = -1) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data if most < 0 else data[:most])
            self.wfile.flush()


@contextmanager
def served(folder: Path, cache: Path, monkeypatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own, with an empty cache here."""
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
    here, plain = f"http://127.0.0.1:{hub.server_port}", constants.HUGGINGFACE_CO_URL_TEMPLATE
    template = here + plain.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a cut may cost, else 10 MB
    at_once = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
    monkeypatch.setattr(file_download, "time", at_once)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
