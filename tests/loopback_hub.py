"""A hub on 127.0.0.1 that serves folders as repositories, with faults, for the download code of the libraries.

Its requests are those of the public hub: the list of a repository, the tree of a revision, and files with ranges,
ETags and the headers of large files.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 605157884\n"


@dataclass
class LoopbackHub:
    """Folders `root/owner/name`, and what is wrong with some requests.

    Attributes:
        root: The folder of the repositories.
        faults: By a pattern of the path: `status`, `code` and `times`; `cut` or `stall` after bytes; `corrupt`;
            `pointer`; `silent`, which never answers.
        requests: Method, path and range of each request.
    """

    root: Path
    faults: dict[str, dict] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""

    def fault(self, path: str) -> dict:
        for pattern, fault in self.faults.items():
            if re.search(pattern, path) and fault.get("times", 1):
                if "times" in fault:
                    fault["times"] -= 1
                return fault
        return {}

    def gets(self, part: str) -> list[str | None]:
        """Return the ranges of the downloads of a file."""
        return [span for method, path, span in self.requests if method == "GET" and part in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Print nothing."""

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append((self.command, path, self.headers.get("Range")))
        fault = self.server.hub.fault(path)
        if "silent" in fault:
            return pause(fault["silent"])
        if "status" in fault:
            content = fault.get("content", b"{}")
            return self.answer(fault["status"], content, X_Error_Code=fault.get("code", ""))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?", path):
            return self.info(found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            return self.tree(found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            return self.resolve(found[1], found[3], fault)
        return self.answer(404, b"{}")

    do_HEAD = do_GET  # noqa: N815 - of the base class

    def files(self, repository):
        folder = self.server.hub.root / repository
        if not folder.is_dir():
            self.answer(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def info(self, repository):
        if (files := self.files(repository)) is None:
            return
        siblings = [
            {"rfilename": name, "size": path.stat().st_size, "blobId": git_hash(path)}
            | (
                {"lfs": {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 134}}
                if path.suffix in LARGE
                else {}
            )
            for name, path in files.items()
        ]
        described = {"id": repository, "sha": commit(files), "private": False, "tags": [], "siblings": siblings}
        self.answer(200, json.dumps({"_id": "1", "modelId": repository, **described}).encode())

    def tree(self, repository):
        if (files := self.files(repository)) is None:
            return
        entries = []
        for name, path in files.items():
            entries.append({"type": "file", "path": name, "size": path.stat().st_size, "oid": git_hash(path)})
            if path.suffix in LARGE:
                entries[-1] |= large_file(path, "oid")
        self.answer(200, json.dumps(entries).encode())

    def resolve(self, repository, name, fault):
        if (files := self.files(repository)) is None:
            return None
        if name not in files:
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=commit(files))
        path = files[name]
        content = path.read_bytes()
        etag = sha256(path) if path.suffix in LARGE else git_hash(path)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        if path.suffix in LARGE:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if fault.get("corrupt"):
            content = bytes(byte ^ 0x55 for byte in content)
        start = int(re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.send_content(content[start:], fault)
        return None

    def send_content(self, content, fault):
        until = fault.get("cut", fault.get("stall", len(content)))
        self.wfile.write(content[:until])
        self.wfile.flush()
        if "stall" in fault:
            pause(fault.get("seconds", 1))
        if until < len(content):
            self.close_connection = True


def pause(seconds):
    Event().wait(seconds)  # tests may replace `time.sleep`


def large_file(path, key):
    return {"lfs": {key: sha256(path), "size": path.stat().st_size, "pointerSize": 134}}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_hash(path):
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit(files):
    return hashlib.sha1("".join(f"{name} {git_hash(path)}\n" for name, path in files.items()).encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    hub: LoopbackHub

    def handle_error(self, *_):
        """Say nothing of clients that hung up."""


@contextmanager
def serve_hub(root):
    """Serve the folders below `root` until the block ends."""
    hub = LoopbackHub(Path(root))
    with _Server(("127.0.0.1", 0), Handler) as server:
        server.hub = hub
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
