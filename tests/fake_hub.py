# Copyright 2026 The fedlpp_hf team. Licensed under the Apache License, Version 2.0.
"""A Hub on loopback: the calls that huggingface_hub makes to upload and download models, and failures on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKENS = {"writer": True, "reader": False}  # a token, and whether it may write
NAMESPACE = "owner"


@dataclass
class Blob:
    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def describe(self, path: str) -> dict:
        found = {"type": "file", "path": path, "rfilename": path, "size": len(self.data), "oid": self.git_oid}
        found["blobId"] = self.git_oid
        if self.is_lfs:
            found["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data), "pointerSize": 130}
            found["xetHash"] = self.sha256
        return found


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        content = json.dumps([branch, len(self.commits), sorted((path, blob.git_oid) for path, blob in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Hub(ThreadingHTTPServer):
    """The server. `requests`: (method, path, bytes received), `ranges`: (path, the range asked for), `failures`: see [`fail`]."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.ranges: list[tuple[str, str]] = []
        self.failures: list[list] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add_repo(self, name: str, files: dict[str, bytes], private: bool = True) -> Repo:
        repo = self.repos[name] = Repo(private)
        repo.commit("main", {path: Blob(data, path.endswith(".safetensors")) for path, data in files.items()})
        return repo

    def fail(self, method: str, pattern: str, how: int | str, times: int = 1, after: int = 0) -> None:
        """Answer the next requests that match, but for the first `after`, with a status, or with "drop".

        That cuts the connection: of a GET in the middle of the answer, of others before anything is done.
        """
        self.failures.append([method, re.compile(pattern), how, times, after])

    def files(self, name: str, branch: str = "main") -> dict[str, Blob]:
        repo = self.repos[name]
        return repo.commits[repo.branches[branch]]

    def handle_error(self, request, client_address) -> None:
        pass  # clients hang up on purpose


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    _cut = False
    disable_nagle_algorithm = True  # or every answer waits 40 ms for an acknowledgement

    def log_message(self, *arguments) -> None:
        pass

    def _handle(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        with self.server.lock:
            self.server.requests.append((self.command, path, len(body)))
            for failure in self.server.failures:
                if failure[0] != self.command or not failure[1].search(path) or not failure[3]:
                    continue
                if failure[4]:
                    failure[4] -= 1
                    continue
                failure[3] -= 1
                if failure[2] != "drop":
                    return self._send(int(failure[2]), json.dumps({"error": "as the test wants"}).encode())
                self._cut = self.close_connection = True
                if self.command != "GET":
                    return None
            try:
                self._route(path, parse_qs(parts.query), body)
            except _Refused as refused:
                headers = {"X-Error-Code": refused.code} if refused.code else {}
                self._send(refused.status, json.dumps({"error": str(refused)}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self._cut else data)

    def _json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _check_write(self) -> None:
        if self._token() not in TOKENS:
            raise _Refused(401, "Invalid username or password.")
        if not TOKENS[self._token() or ""]:
            raise _Refused(403, "You don't have the rights to write here.")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._token() not in TOKENS):
            raise _Refused(401 if self._token() is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path == "/api/whoami-v2":
            self._check_write()
            return self._json({"name": NAMESPACE, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w[\w-]*)(?:/(.+))?", path):
            name, call, rest = found.groups()
            return getattr(self, "_" + call.replace("-", "_"))(self._repo(name), name, rest or "main", query, body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            return self._revision(self._repo(found[1]), found[1], "main", query, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(self._repo(found[1]), found[1], json.loads(body))
        if found := re.fullmatch(r"/lfs/([^/]+/[^/]+)/(\w+)", path):
            return self._lfs_put(self.server.repos[found[1]], found[2], body)
        if found := re.fullmatch(r"/lfs-verify/([^/]+/[^/]+)", path):
            return self._lfs_verify(self.server.repos[found[1]], json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(found[1]), found[2], found[3])
        raise _Refused(404, f"no such call: {self.command} {path}")

    def _validate(self, card: str) -> None:
        found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        licence = (yaml.safe_load(found[1]) if found else {}).get("license", "other")
        errors = [] if re.fullmatch("[a-z0-9.-]+", licence) else [{"message": '"license" must be one of [...]'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self, options: dict) -> None:
        self._check_write()
        name = f"{options.get('organization') or NAMESPACE}/{options['name']}"
        if not name.startswith(NAMESPACE + "/"):
            raise _Refused(403, "You don't have the rights to create a model under this namespace.")
        if name in self.server.repos:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}, 409
            )
        private = options.get("visibility", "private" if options.get("private") else "public") == "private"
        self.server.add_repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        return self._json({"url": f"{self.server.url}/{name}"})

    def _revision(self, repo: Repo, name: str, revision: str, query: dict, body: bytes) -> None:
        sha, files = self._files(repo, revision)
        siblings = [blob.describe(path) for path, blob in sorted(files.items())]
        self._json(
            {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def _tree(self, repo: Repo, name: str, revision: str, query: dict, body: bytes) -> None:
        _, files = self._files(repo, revision.split("/")[0])
        self._json([blob.describe(path) for path, blob in sorted(files.items())])

    def _paths_info(self, repo: Repo, name: str, revision: str, query: dict, body: bytes) -> None:
        _, files = self._files(repo, revision)
        fields = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        self._json([files[path].describe(path) for path in fields["paths"] if path in files])

    def _branch(self, repo: Repo, name: str, revision: str, query: dict, body: bytes) -> None:
        self._check_write()
        repo.branches[revision] = repo.branches["main"]
        self._json({}, 201)

    def _preupload(self, repo: Repo, name: str, revision: str, query: dict, body: bytes) -> None:
        self._check_write()
        _, files = self._files(repo, revision)
        answers = []
        for file in json.loads(body)["files"]:
            is_lfs = file["path"].endswith(".safetensors") or file["size"] > 1_000_000
            blob = files.get(file["path"])
            oid = None if blob is None else blob.sha256 if blob.is_lfs else blob.git_oid
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _lfs_batch(self, repo: Repo, name: str, request: dict) -> None:
        self._check_write()
        objects = []
        for item in request["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.objects and not any(
                blob.sha256 == item["oid"] for files in repo.commits.values() for blob in files.values()
            ):
                answer["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{name}/{item['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs-verify/{name}"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, repo: Repo, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the bytes are not those that were announced")
        repo.objects[oid] = body
        self._send(200, b"")

    def _lfs_verify(self, repo: Repo, request: dict) -> None:
        if len(repo.objects.get(request["oid"], b"")) != request["size"]:
            raise _Refused(404, "the object did not arrive")
        self._json({})

    def _lfs_files(self, repo: Repo, name: str, rest: str, query: dict, body: bytes) -> None:
        self._check_write()
        request = json.loads(body)
        target = self.server.repos[request["target"].get("repo") or request["target"]["name"]]
        blobs = [blob for files in repo.commits.values() for blob in files.values()]
        for file in request["files"]:
            target.objects[file["sha256"]] = next(blob.data for blob in blobs if blob.sha256 == file["sha256"])
        self._json({"success": True, "failed": []})

    def _commit(self, repo: Repo, name: str, revision: str, query: dict, body: bytes) -> None:
        self._check_write()
        sha, files = self._files(repo, revision)
        files = dict(files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", sha) != sha:
                raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                known = {b.sha256: b.data for old in repo.commits.values() for b in old.values()} | repo.objects
                if value["oid"] not in known:
                    raise _Refused(400, f"Your push was rejected because an LFS object is missing: {value['path']}")
                files[value["path"]] = Blob(known[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        branch = revision
        answer = {"success": True}
        if query.get("create_pr"):
            branch = f"refs/pr/{len(repo.branches)}"
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{len(repo.branches)}"
        new = repo.commit(branch, files)
        self._json(answer | {"commitOid": new, "commitUrl": f"{self.server.url}/{name}/commit/{new}"})

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        sha, files = self._files(repo, revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        etag = blob.sha256 if blob.is_lfs else blob.git_oid
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(blob.data))}
        headers["Content-Type"] = "application/octet-stream"
        data, status = blob.data, 200
        if self.headers.get("Range"):
            self.server.ranges.append((path, self.headers["Range"]))
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(data))
        self._send(status, data, headers)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """A Hub in a thread of this process."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
