"""A hub on this machine that speaks the protocols of Hugging Face and ModelScope, with faults to order.

What it answers is checked in ``test_download.py`` with huggingface_hub's own client. As on Hugging Face, small text
files come from the hub itself and large ones by a redirect to a server of content, which wants no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Faults:
    """What goes wrong.

    Attributes:
        cuts: path → how many more bytes each next answer gives before the connection ends; none left: all.
        corrupt: path → how many more answers have a wrong byte in the middle.
        ignores_ranges: answers whole files whatever range is asked for.
        statuses: path or repository → status to answer with.
        lost: paths that the listing holds and the hub has not.
        silent: closes every connection without a word.
        keeps_checksums: ModelScope's listing has none.
    """

    cuts: dict[str, list[int]] = field(default_factory=dict)
    corrupt: Counter[str] = field(default_factory=Counter)
    ignores_ranges: bool = False
    statuses: dict[str, int] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    silent: bool = False
    keeps_checksums: bool = False


@dataclass
class Request:
    """One request that came in. ``range`` is the header, ``sent`` the number of body bytes that left."""

    path: str
    range: str
    token: str
    is_content: bool
    sent: int = 0


class HubServer:
    """Both hubs under one address, and a server of content under another.

    Attributes:
        repositories: repository → path → content.
        gate: (chunk number) → None, called while a file is sent; tests wait in it.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.faults = Faults()
        self.requests: list[Request] = []
        self.token = ""
        self.gate = lambda count: None
        self.lock = threading.Lock()
        self._hub = self._serve(is_content=False)
        self._content = self._serve(is_content=True)
        self.endpoint = f"http://127.0.0.1:{self._hub.server_port}"
        self.content_endpoint = f"http://127.0.0.1:{self._content.server_port}"

    def _serve(self, *, is_content: bool) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "is_content": is_content})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()
        return server

    def close(self) -> None:
        for server in (self._hub, self._content):
            server.shutdown()
            server.server_close()

    def count_sent(self, path: str) -> int:
        """Counts the bytes of a file that have left."""
        with self.lock:
            return sum(request.sent for request in self.requests if request.path == path)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    is_content: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        if self.hub.faults.silent:
            self.close_connection = True
            return
        url = urlsplit(self.path)  # a proxy gets whole addresses
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.is_content:
            repository, _, file = path.removeprefix("/").partition("//")
            self.send_file(repository, file)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            self.list_hugging_face(found[1], found[2] or "", query)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self.list_modelscope(found[1], query)
        elif found := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            if self.admit(found[1], query["FilePath"]):
                self.send_file(found[1], query["FilePath"])
        else:
            self.refuse(404, "EntryNotFound", "nothing is here")

    # Hugging Face

    def list_hugging_face(self, repository: str, what: str, query: dict[str, str]) -> None:
        if not self.admit(repository):
            return
        files = self.hub.repositories[repository]
        if what.startswith("/tree"):
            entries = []
            for path, content in files.items():
                large = {"lfs": {"oid": get_sha256(content), "size": len(content), "pointerSize": 134}}
                entry = {"type": "file", "oid": get_git_id(content), "size": len(content), "path": path}
                entries.append({**entry, **(large if is_large(path) else {})})
            self.send_json(entries)
            return
        siblings = []
        for path, content in files.items():
            entry = {"rfilename": path}
            if query.get("blobs"):
                entry |= {"size": len(content), "blobId": get_git_id(content)}
                if is_large(path):
                    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{get_sha256(content)}\n"
                    entry |= {"blobId": get_git_id(pointer.encode())}
                    entry |= {"lfs": {"sha256": get_sha256(content), "size": len(content), "pointerSize": 134}}
            siblings.append(entry)
        self.send_json({"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "siblings": siblings})

    def resolve(self, repository: str, revision: str, path: str) -> None:
        if not self.admit(repository, path):
            return
        if revision not in (COMMIT, "main"):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = self.hub.repositories[repository][path]
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not is_large(path):
            return self.send_file(repository, path, {**headers, "ETag": f'"{get_git_id(content)}"'})
        place = f"{self.hub.content_endpoint}/{repository}//{quote(path)}?signature=abc"
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{get_sha256(content)}"'}
        self.send_body(302, b"Found. Redirecting", {**headers, **linked, "Location": place})

    # ModelScope

    def list_modelscope(self, repository: str, query: dict[str, str]) -> None:
        if not self.admit(repository):
            return
        assert query == {"Revision": "master", "Recursive": "True"}, query
        files = [{"Name": "unet", "Path": "unet", "Type": "tree", "Size": 0, "Sha256": "", "Revision": COMMIT}]
        for path, content in self.hub.repositories[repository].items():
            entry = {"Name": path.rpartition("/")[2], "Path": path, "Type": "blob", "Size": len(content)}
            checksum = None if self.hub.faults.keeps_checksums else get_sha256(content)
            files.append({**entry, "Sha256": checksum, "Revision": COMMIT, "IsLFS": is_large(path)})
        self.send_json({"Code": 200, "Data": {"Files": files}, "Message": "success", "RequestId": "1", "Success": True})

    # Both

    def admit(self, repository: str, path: str = "") -> bool:
        """Answers with an error where there is one to give."""
        faults = self.hub.faults
        status = faults.statuses.get(path or repository) or faults.statuses.get(repository)
        files = self.hub.repositories.get(repository)
        is_known = self.get_token() == self.hub.token
        if status:
            self.refuse(status, {401: "RepoNotFound", 403: "GatedRepo"}.get(status, ""), f"as ordered: {status}")
        elif self.hub.token and not is_known:
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif files is None:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif path and (path not in files or path in faults.lost):
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            return True
        return False

    def get_token(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.path.startswith("/api/v1/"):
            assert self.headers.get("Cookie", "").removeprefix("m_session_id=") == token
        return token

    def refuse(self, status: int, code: str, message: str) -> None:
        if self.path.startswith("/api/v1/"):
            answer = {"Code": 10010205001, "Message": message, "RequestId": "1", "Success": False}
            self.send_json(answer, status)
        else:
            self.send_json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def send_json(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_body(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_file(self, repository: str, path: str, headers: dict[str, str] | None = None) -> None:
        content = self.hub.repositories[repository][path]
        faults = self.hub.faults
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and not faults.ignores_ranges else 0
        end = min(int(wanted[2]) + 1 if wanted and wanted[2] else len(content), len(content))
        if start >= len(content) > 0:
            return self.send_body(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        body = content[start:end]
        with self.hub.lock:
            if faults.corrupt[path] > 0 and self.command == "GET":
                faults.corrupt[path] -= 1
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            cuts = faults.cuts.get(path)
            cut = cuts.pop(0) if cuts and self.command == "GET" else None
        headers = {"Content-Type": "application/octet-stream", **(headers or {})}
        if start or (wanted and not faults.ignores_ranges):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send_body(206 if "Content-Range" in headers else 200, body, headers, path=path, cut=cut)

    def send_body(
        self, status: int, body: bytes, headers: dict[str, str], *, path: str = "", cut: int | None = None
    ) -> None:
        token = self.headers.get("Authorization") or self.headers.get("Cookie") or ""
        request = Request(path, self.headers.get("Range", ""), token, self.is_content)
        with self.hub.lock:
            self.hub.requests.append(request)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut is not None:
            body, self.close_connection = body[:cut], True
        for count, at in enumerate(range(0, len(body) if self.command == "GET" else 0, 2**14)):
            if path:
                self.hub.gate(count)
            piece = body[at : at + 2**14]
            request.sent += len(piece)  # before it leaves: the other side may be done with it at once
            try:
                self.wfile.write(piece)
            except OSError:  # the other side has gone
                request.sent -= len(piece)
                self.close_connection = True
                return


def is_large(path: str) -> bool:
    """Tells whether Hugging Face would keep a file in its large file storage."""
    return not path.endswith((".json", ".md", ".txt"))


def get_sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def get_git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
