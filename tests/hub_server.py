"""A Hugging Face hub on this machine, for as much of it as is used: repositories, revisions, files, tokens, commits.

The endpoints and headers are those that huggingface_hub reads (hf_api.py, file_download.py, utils/_http.py), and for
commits those that it writes to (_commit_api.py, lfs.py).
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

TOKEN = "hf_secretOfTheTests"
"""What gated repositories ask for, and whoever writes."""

SMALL = 1000
"""The largest file in bytes that is sent with a commit, and not by LFS before it."""


@dataclass
class Repository:
    """What is at each commit, and which commit each branch is at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch, and return it."""
        content = [branch, *(f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Hub:
    """The hub's state, and what it was asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By kind and name: `models/org/name`."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    tokens: set[str | None] = field(default_factory=set)
    """What it was shown."""
    breaks: bool = False
    """Whether a file of weights ends after its half, with its connection."""
    seconds: float = 0
    """How long a file takes to begin."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """The files that LFS holds, by their sha256."""
    refused: str = ""
    """The end of a path to which nothing can be written."""

    def add(self, name: str, files: dict[str, bytes], **settings: bool) -> str:
        """Add a repository with one commit, and return that."""
        self.repositories[name] = Repository(**settings)
        return self.repositories[name].commit(files)

    def count(self, method: str, path: str) -> int:
        return sum(asked == method and found.endswith(path) for asked, found in self.requests)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def serve() -> Iterator[Hub]:
    """Serve a hub until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path))
            token = self.headers.get("Authorization")
            hub.tokens.add(token)
            api = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/(.+))?", path)
            file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            name = api[1] if api else f"{(file[1] if file else None) or 'models/'}{file[2]}" if file else ""
            repository = hub.repositories.get(name)
            if repository is None:
                self.answer(401, {"X-Error-Code": "RepoNotFound"})
                return
            revision = (api[2] if api else file[3] if file else None) or "main"
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
                return
            files = repository.commits[commit]
            if api:
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                info = {"id": name, "sha": commit, "siblings": siblings}
                info["gated"] = "manual" if repository.is_gated else False
                info["private"] = repository.is_private
                self.answer(200, {}, json.dumps(info).encode())
            elif repository.is_gated and token != f"Bearer {TOKEN}":
                self.answer(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            elif file and file[4] in files:
                self.send(files[file[4]], commit)
            else:
                self.answer(404, {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path))
            token = self.headers.get("Authorization")
            hub.tokens.add(token)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if token != f"Bearer {TOKEN}" and "/lfs/" not in path:  # where LFS stores files is a secret address
                self.answer(403 if token else 401, {})
                return
            if hub.refused and path.endswith(hub.refused):
                self.answer(503, {})
                return
            repository = re.fullmatch(
                r"/(?:api/(?:models/)?)?([^/]+/[^/.]+)(/preupload/main|/commit/main|[.]git/.+)", path
            )
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"models/{asked['organization']}/{asked['name']}"
                address = name.replace("models", hub.url, 1)
                if name in hub.repositories:
                    self.reply({"error": "You already created this model repo", "url": address}, 409)
                    return
                hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
                hub.repositories[name].is_private = asked.get("visibility") == "private"
                self.reply({"url": address})
            elif path == "/api/validate-yaml":
                self.check_card(json.loads(body)["content"])
            elif repository is None or f"models/{repository[1]}" not in hub.repositories:
                self.answer(404, {"X-Error-Code": "RepoNotFound"})
            else:
                self.write(repository[1], repository[2], body)

        def do_PUT(self) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path))
            data = self.rfile.read(int(self.headers["Content-Length"]))
            oid = path.rpartition("/")[2]
            if (hub.refused and path.startswith(hub.refused)) or hashlib.sha256(data).hexdigest() != oid:
                self.answer(400, {})
                return
            hub.stored[oid] = data
            self.answer(200, {})

        def check_card(self, text: str) -> None:
            """Refuse a card as the hub does: metadata that is no mapping, or names a folder as the base model."""
            found = re.match(r"---\n(.*?)---\n", text, flags=re.DOTALL)
            metadata = yaml.safe_load(found[1]) if found else None
            base = metadata.get("base_model", "none") if isinstance(metadata, dict) else ""
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
                self.reply({"errors": [{"message": "not valid"}], "warnings": []}, 400)
                return
            self.reply({"errors": [], "warnings": []})

        def write(self, name: str, what: str, body: bytes) -> None:
            repository = hub.repositories[f"models/{name}"]
            if what.startswith("/preupload"):
                modes = {
                    file["path"]: "lfs" if file["size"] > SMALL else "regular" for file in json.loads(body)["files"]
                }
                files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
                self.reply({"files": files})
            elif what.startswith(".git"):
                objects = json.loads(body)["objects"]
                for each in objects:
                    if each["oid"] not in hub.stored:
                        each["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}
                self.reply({"transfer": "basic", "objects": objects})
            else:
                head, *lines = [json.loads(line) for line in body.splitlines()]
                if head["value"].get("parentCommit") != repository.branches["main"]:
                    self.reply({"error": "The branch has moved"}, 412)
                    return
                files = dict(repository.commits[repository.branches["main"]])
                for line in lines:
                    value = line["value"]
                    data = base64.b64decode(value["content"]) if line["key"] == "file" else hub.stored[value["oid"]]
                    files[value["path"]] = data
                commit = repository.commit(files)
                self.reply({"commitOid": commit, "commitUrl": f"{hub.url}/{name}/commit/{commit}"})

        def reply(self, content: dict[str, object], status: int = 200) -> None:
            self.answer(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

        def send(self, data: bytes, commit: str) -> None:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            if self.command == "GET":
                time.sleep(hub.seconds)
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            if hub.breaks and self.command == "GET" and self.path.endswith(".safetensors"):
                self.answer(206 if start else 200, headers, data[start:], most=max(0, len(data) // 2 - start))
                self.close_connection = True
            else:
                self.answer(206 if start else 200, headers, data[start:])

        def answer(self, status: int, headers: dict[str, str], body: bytes = b"", most: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:most])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
