"""A Hub on 127.0.0.1: enough of the real protocol for the real clients, kept in memory.

Repositories with branches, tags and pull requests, NDJSON commits, LFS transfer, ranges, private repositories, tokens.
`HF_ENDPOINT` must be set before huggingface_hub is imported: clients run in processes of their own; see `environment`.
"""

import base64
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCardData

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".png", ".npz", ".xz")
LFS_SIZE = 10_000_000
NOW = "2026-01-01T00:00:00.000Z"


class HubError(Exception):
    """An answer other than 2xx; `code` tells the client what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Blob:
    """One file's content."""

    content: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return sha256(self.content).hexdigest() if self.is_lfs else self.git_oid

    def described(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.etag, "sha256": self.etag, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """A repository's commits (files by path) and what points at them."""

    kind: str
    name: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        listing = "".join(f"{path} {files[path].etag}\n" for path in sorted(files))
        sha = sha1(f"{self.refs.get(ref)} {len(self.commits)} {title}\n{listing}".encode()).hexdigest()
        self.commits[sha] = files
        self.titles[sha] = title
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str:
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        sha = next((self.refs[name] for name in names if name in self.refs), revision)
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class LoopbackHub:
    """The server and what it holds.

    Args:
        tokens: Namespaces that each access token may read and write.

    Attributes:
        requests: Method and path of every request so far.
        uploaded: LFS objects that were transferred, in order.
        cut_uploads_after: Drop the connection of every LFS transfer once this many bytes have come.
        cut_transfers_after: Drop the connection of every LFS transfer once this many have been completed.
        was_cut: Set when a transfer was dropped.
        failing: Branches that take no commit and answer 500.
    """

    def __init__(self, tokens: Mapping[str, tuple[str, ...]]) -> None:
        self.tokens = dict(tokens)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploaded: list[str] = []
        self.cut_uploads_after: int | None = None
        self.cut_transfers_after: int | None = None
        self.was_cut = threading.Event()
        self.failing: set[str] = set()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "hf_dummy") -> dict[str, str]:
        """Variables for a client's process, whose cache and logins are in `home`."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return variables | ({"HF_TOKEN": token} if token else {})

    def add(
        self, name: str, files: Mapping[str, bytes] | Path, kind: str = "model", private: bool = False
    ) -> Repository:
        """Put a repository there without a client."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        repository = Repository(kind, name, private)
        repository.commit("refs/heads/main", {path: as_blob(path, content) for path, content in files.items()}, "Add")
        self.repositories[kind, name] = repository
        return repository

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content by path."""
        repository = self.repositories[kind, name]
        return {path: blob.content for path, blob in repository.commits[repository.resolve(revision)].items()}


def as_blob(path: str, content: bytes) -> Blob:
    return Blob(content, path.endswith(LFS_SUFFIXES) or len(content) > LFS_SIZE)


class Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests; `hub` is set on a subclass."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with it every answer waits 40 ms

    # ---- one request ----

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.raw_path, self.query = url.path, parse_qs(url.query)
        self.body_left = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
        try:
            for pattern, method, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split():
                    getattr(self, name)(*(group and unquote(group) for group in match.groups()))
                    return
            raise HubError(404, f"No such address: {self.command} {url.path}")
        except HubError as error:
            self.answer({"error": str(error)}, error.status, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = dispatch

    def log_message(self, *arguments: Any) -> None:
        """Stay silent; `hub.requests` has it all."""

    def body(self) -> bytes:
        content = self.rfile.read(self.body_left)
        self.body_left = 0
        return content

    def json(self) -> Any:
        if "form-urlencoded" in self.headers.get("Content-Type", ""):
            return parse_qs(self.body().decode())
        return json.loads(self.body() or b"{}")

    def answer(self, content: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.body()
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if content is payload else "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    # ---- who may do what ----

    def namespaces(self) -> tuple[str, ...] | None:
        """What the request's token may touch; None without one."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        if scheme != "Bearer" or token not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, kind: str, name: str, write: bool = False) -> Repository:
        allowed = self.namespaces()
        repository = self.hub.repositories.get((kind, name))
        is_mine = allowed is not None and name.split("/")[0] in allowed
        if repository is None or (repository.private and not is_mine):
            # As over HTTPS, where the client reads a 401 without a token as a missing repository.
            raise HubError(401 if allowed is None else 404, "Repository not found", "RepoNotFound")
        if write and not is_mine:
            raise HubError(401 if allowed is None else 403, f"You may not write to {name}.")
        return repository

    # ---- accounts and repositories ----

    def whoami(self) -> None:
        allowed = self.namespaces()
        if allowed is None:
            raise HubError(401, "Invalid username or password.")
        organizations = [{"name": name, "type": "org"} for name in allowed[1:]]
        self.answer({"type": "user", "name": allowed[0], "orgs": organizations, "auth": {"type": "access_token"}})

    def validate_yaml(self) -> None:
        content = self.json()["content"]
        errors = []
        header = re.match(r"\s*---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(header.group(1)) if header else {}
            if isinstance(metadata, dict):
                ModelCardData(**{**metadata, "ignore_metadata_errors": False})
            else:
                errors.append({"message": "The metadata are no mapping."})
        except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
            errors.append({"message": f"The metadata are wrong: {error}"})
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repository(self) -> None:
        wanted = self.json()
        allowed = self.namespaces()
        if allowed is None:
            raise HubError(401, "Invalid username or password.")
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or allowed[0]}/{wanted['name']}"
        if name.split("/")[0] not in allowed:
            raise HubError(403, f"You may not create {name}.")
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                self.answer({"error": "You already created this repo", "url": url}, 409)
                return
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind, private)
        self.answer({"url": url, "name": name, "id": name})

    def delete_repository(self) -> None:
        wanted = self.json()
        name = f"{wanted.get('organization') or (self.namespaces() or ('',))[0]}/{wanted['name']}"
        kind = wanted.get("type") or "model"
        self.repository(kind, name, write=True)
        del self.hub.repositories[kind, name]
        self.answer({})

    def search(self, kinds: str) -> None:
        allowed = self.namespaces() or ()
        author, words = self.query.get("author", [None])[0], self.query.get("search", [""])[0]
        found = [
            repository
            for (kind, name), repository in self.hub.repositories.items()
            if kind == KINDS[kinds]
            and words in name
            and author in (None, name.split("/")[0])
            and (not repository.private or name.split("/")[0] in allowed)
        ]
        self.answer([described(repository, "main") for repository in found])

    def info(self, kinds: str, name: str, revision: str | None = None) -> None:
        self.answer(described(self.repository(KINDS[kinds], name), revision or "main"))

    # ---- references ----

    def references(self, kinds: str, name: str) -> None:
        refs = self.repository(KINDS[kinds], name).refs
        listed = {
            group: [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in refs.items()
                if ref.startswith(prefix)
            ]
            for group, prefix in (("branches", "refs/heads/"), ("tags", "refs/tags/"), ("pullRequests", "refs/pr/"))
        }
        self.answer(listed | {"converts": []})

    def history(self, kinds: str, name: str, revision: str) -> None:
        repository = self.repository(KINDS[kinds], name)
        sha = repository.resolve(revision)
        entry = {"id": sha, "title": repository.titles[sha], "message": "", "date": NOW, "authors": []}
        self.answer([entry])

    def branch(self, kinds: str, name: str, branch: str) -> None:
        repository = self.repository(KINDS[kinds], name, write=True)
        start = self.json().get("startingPoint") or "main"
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        self.set_reference(repository, f"refs/heads/{branch}", start)

    def tag(self, kinds: str, name: str, revision: str) -> None:
        repository = self.repository(KINDS[kinds], name, write=True)
        self.set_reference(repository, f"refs/tags/{self.json()['tag']}", revision)

    def set_reference(self, repository: Repository, ref: str, target: str) -> None:
        if self.command == "DELETE":
            if repository.refs.pop(ref, None) is None:
                raise HubError(404, f"No reference {ref}", "RevisionNotFound")
        elif ref in repository.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        else:
            repository.refs[ref] = repository.resolve(target)
        self.answer({})

    def delete_tag(self, kinds: str, name: str, tag: str) -> None:
        repository = self.repository(KINDS[kinds], name, write=True)
        if repository.refs.pop(f"refs/tags/{tag}", None) is None:
            raise HubError(404, f"No tag {tag}", "RevisionNotFound")
        self.answer({})

    # ---- reading ----

    def tree(self, kinds: str, name: str, revision: str, folder: str | None = None) -> None:
        repository = self.repository(KINDS[kinds], name)
        files = repository.commits[repository.resolve(revision)]
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = [path for path in files if path.startswith(prefix)]
        if prefix and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        everything = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        folders = {str(parent) for path in inside for parent in Path(path).parents if str(parent) != "."}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        entries += [files[path].described(path) for path in inside]
        if not everything:
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self.answer([entry for entry in entries if entry["path"].startswith(prefix)])

    def paths(self, kinds: str, name: str, revision: str) -> None:
        repository = self.repository(KINDS[kinds], name)
        files = repository.commits[repository.resolve(revision)]
        wanted = self.json()["paths"]
        entries = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            path = path.strip("/")
            if path in files:
                entries.append(files[path].described(path))
            elif any(other.startswith(f"{path}/") for other in files):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer(entries)

    def resolve(self, kinds: str | None, name: str, revision: str, path: str) -> None:
        repository = self.repository(KINDS[kinds or "models"], name)
        sha = repository.resolve(revision)
        blob = repository.commits[sha].get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        content, status = blob.content, 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            if first > last:
                raise HubError(416, f"No bytes {first}-{last}", **{"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self.answer(content, status, headers | {"Content-Length": str(len(content))})

    # ---- writing ----

    def preupload(self, kinds: str, name: str, revision: str) -> None:
        repository = self.repository(KINDS[kinds], name, write=True)
        files = repository.commits[repository.resolve(revision)]
        modes = []
        for wanted in self.json()["files"]:
            path = wanted["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or wanted["size"] > LFS_SIZE
            there = files.get(path)
            modes.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": there.etag if there else None,
                }
            )
        self.answer({"files": modes})

    def lfs_batch(self, kinds: str | None, name: str) -> None:
        self.repository(KINDS[kinds or "models"], name, write=True)
        objects = []
        for wanted in self.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload, verify = f"{self.hub.url}/_lfs/{wanted['oid']}", f"{self.hub.url}/_lfs/verify"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        limit = self.hub.cut_uploads_after
        if self.hub.cut_transfers_after is not None and len(self.hub.uploaded) >= self.hub.cut_transfers_after:
            limit = 0
        if limit is not None and self.body_left > limit:
            self.rfile.read(limit)
            self.hub.was_cut.set()
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        if sha256(content).hexdigest() != oid:
            raise HubError(400, "The content is not what its name says.")
        with self.hub.lock:
            self.hub.objects[oid] = content
            self.hub.uploaded.append(oid)
        self.answer(b"")

    def lfs_verify(self) -> None:
        wanted = self.json()
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "No such object")
        self.answer({})

    def commit(self, kinds: str, name: str, revision: str) -> None:
        repository = self.repository(KINDS[kinds], name, write=True)
        if revision in self.hub.failing:
            raise HubError(500, "Internal error")
        lines = [json.loads(line) for line in self.body().splitlines()]
        with self.hub.lock:
            start = repository.resolve(revision)
            header = lines[0]["value"]
            if header.get("parentCommit") not in (None, start):
                raise HubError(412, "The branch has moved on since parentCommit.")
            files = dict(repository.commits[start])
            for line in lines[1:]:
                self.apply(line["key"], line["value"], files)
            is_request = self.query.get("create_pr") == ["1"]
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            branch = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            ref = f"refs/pr/{number}" if is_request else branch
            if is_request:
                repository.refs[ref] = start
            elif ref not in repository.refs:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            sha = repository.commit(ref, files, header["summary"])
        page = f"{self.hub.url}/{'' if kinds == 'models' else kinds + '/'}{name}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}
        self.answer(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if is_request else {}))

    def apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise HubError(400, f"{path} was never uploaded.")
            files[path] = Blob(self.hub.objects[value["oid"]], is_lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [other for other in files if other == path or other.startswith(f"{path.rstrip('/')}/")]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for other in gone:
                del files[other]
        else:
            raise HubError(400, f"Unknown operation {key}")


def described(repository: Repository, revision: str) -> dict[str, Any]:
    """What the API says of a repository."""
    sha = repository.resolve(revision)
    files = repository.commits[sha]
    card = files["README.md"].content.decode() if "README.md" in files else ""
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    metadata = (yaml.safe_load(header.group(1)) if header else None) or {}
    siblings = [
        {"rfilename": path, "size": len(blob.content), "blobId": blob.git_oid}
        | ({"lfs": blob.described(path)["lfs"]} if blob.is_lfs else {})
        for path, blob in files.items()
    ]
    return {
        "id": repository.name,
        "modelId": repository.name,
        "author": repository.name.split("/")[0],
        "sha": sha,
        "siblings": siblings,
        "tags": list(metadata.get("tags") or []),
        "cardData": metadata,
        "lastModified": NOW,
        "createdAt": NOW,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
    } | {name: metadata[name] for name in ("library_name", "pipeline_tag") if name in metadata}


_API = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
_REPO = r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", "GET", "whoami"),
    (r"/api/validate-yaml", "POST", "validate_yaml"),
    (r"/api/repos/create", "POST", "create_repository"),
    (r"/api/repos/delete", "DELETE", "delete_repository"),
    (r"/api/(models|datasets|spaces)", "GET", "search"),
    (_API, "GET HEAD", "info"),
    (_API + r"/revision/([^/]+)", "GET HEAD", "info"),
    (_API + r"/tree/([^/]+)(?:/(.+))?", "GET", "tree"),
    (_API + r"/paths-info/([^/]+)", "POST", "paths"),
    (_API + r"/refs", "GET", "references"),
    (_API + r"/commits/([^/]+)", "GET", "history"),
    (_API + r"/branch/([^/]+)", "POST DELETE", "branch"),
    (_API + r"/tag/([^/]+)", "POST", "tag"),
    (_API + r"/tag/([^/]+)", "DELETE", "delete_tag"),
    (_API + r"/preupload/([^/]+)", "POST", "preupload"),
    (_API + r"/commit/([^/]+)", "POST", "commit"),
    (_REPO + r"/resolve/([^/]+)/(.+)", "GET HEAD", "resolve"),
    (_REPO + r"\.git/info/lfs/objects/batch", "POST", "lfs_batch"),
    (r"/_lfs/verify", "POST", "lfs_verify"),
    (r"/_lfs/([0-9a-f]{64})", "PUT", "lfs_upload"),
]
