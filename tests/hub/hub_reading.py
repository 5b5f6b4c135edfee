# Copyright 2026 The hf-unlearn authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the loopback Hub answers to those who read: repositories, trees, files, refs and commits."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import yaml
from hub_routing import KIND, PAGE, REPOSITORY, REVISION, Call, Response, as_json, route
from hub_store import DATE, Commit, HubError, Pointer, Repository, git_oid


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    user = call.signed_in()
    return as_json(
        {
            "type": "user",
            "name": user.name,
            "fullname": user.name,
            "orgs": [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.organizations.items()],
            "auth": {"type": "access_token", "accessToken": {"displayName": "loopback", "role": user.role}},
        }
    )


def card_of(commit: Commit) -> dict[str, Any]:
    readme = commit.files.get("README.md", b"")
    metadata = re.match(rb"---\n(.*?\n)---\n", readme, flags=re.DOTALL) if isinstance(readme, bytes) else None
    try:
        return yaml.safe_load(metadata[1]) if metadata else {}
    except yaml.YAMLError:
        return {}


def about(repository: Repository, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
    card = card_of(commit)
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            entry = file_entry(path, file)
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if isinstance(file, Pointer):
                sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.text)}
        siblings.append(sibling)
    return {
        "id": repository.name,
        "author": repository.namespace,
        "sha": commit.oid,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "lastModified": DATE,
        "createdAt": DATE,
        "cardData": card,
        "siblings": siblings,
        "usedStorage": sum(map(len, repository.objects.values())),
    }


@route("GET", rf"{REPOSITORY}(/revision/{REVISION})?")
def info(repository: Repository, call: Call, revision: str = "main") -> Response:
    return as_json(about(repository, repository.at(revision), blobs=call.flag("blobs")))


@route("GET", rf"/api/{KIND}")
def listing(call: Call, kind: str) -> Response:
    """The repositories that whoever asks may see."""
    user = call.user
    author, search = call.option("author"), call.option("search").lower()
    tags = {tag for value in parse_qs(call.query).get("filter", []) for tag in value.split(",")}
    found = [
        about(repository, repository.at("main"))
        for repository in call.hub.repositories.values()
        if repository.kind == kind
        and (not repository.private or (user is not None and user.is_in(repository.namespace)))
        and author in ("", repository.namespace)
        and search in repository.name.lower()
    ]
    return call.page([one for one in found if tags <= set(one["tags"])])


@route("GET", rf"{REPOSITORY}/auth-check(?P<write>/write)?")
def auth_check(repository: Repository, call: Call, write: str = "") -> Response:
    if write:
        call.writer(repository.namespace)
    call.check_gate(repository)
    return as_json({})


# ---- Trees ----


def file_entry(path: str, file: bytes | Pointer) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "oid": git_oid(file)}
    if isinstance(file, Pointer):
        lfs = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.text)}
        return {**entry, "size": file.size, "lfs": lfs}
    return {**entry, "size": len(file)}


def folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}


def folders_of(files: Mapping[str, bytes | Pointer]) -> list[str]:
    return sorted({str(parent) for path in files for parent in Path(path).parents} - {"."})


def last_commit(repository: Repository, revision: str, path: str) -> dict[str, str]:
    """The oldest commit since which `path` is as it is."""
    history = list(repository.history(revision))
    last = history[0]
    for commit in history[1:]:
        if commit.files.get(path) != last.files[path]:
            break
        last = commit
    return {"id": last.oid, "title": last.title, "date": DATE}


def expanded(repository: Repository, revision: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    scan = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return [
        {**entry, "lastCommit": last_commit(repository, revision, entry["path"]), "securityFileStatus": scan}
        if entry["type"] == "file"
        else entry
        for entry in entries
    ]


@route("GET", rf"{REPOSITORY}/tree/{REVISION}(/(?P<folder>.*))?")
def tree(repository: Repository, call: Call, revision: str, folder: str = "") -> Response:
    files = repository.at(revision).files
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    if prefix and not any(path.startswith(prefix) for path in files):
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
    entries = [folder_entry(path) for path in folders_of(files)]
    entries += [file_entry(path, file) for path, file in sorted(files.items())]
    below = [entry for entry in entries if entry["path"].startswith(prefix)]
    recursive = call.flag("recursive")
    shown = [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]
    return call.page(expanded(repository, revision, shown) if call.flag("expand") else shown)


@route("POST", rf"{REPOSITORY}/paths-info/{REVISION}")
def paths_info(repository: Repository, call: Call, revision: str) -> Response:
    files = repository.at(revision).files
    if call.headers.get("Content-Type", "").startswith("application/json"):
        asked = json.loads(call.body)
        paths, expand = asked["paths"], bool(asked.get("expand"))
    else:
        form = parse_qs(call.body.decode())
        paths, expand = form["paths"], form.get("expand", [""])[0].lower() == "true"
    folders = folders_of(files)
    entries = [
        file_entry(path, files[path]) if path in files else folder_entry(path)
        for path in paths
        if path in files or path in folders
    ]
    return as_json(expanded(repository, revision, entries) if expand else entries)


# ---- History ----


@route("GET", rf"{REPOSITORY}/refs")
def refs(repository: Repository, call: Call) -> Response:
    def listed(prefix: str) -> list[dict[str, str]]:
        named = repository.named(prefix).items()
        return [{"name": name, "ref": f"{prefix}{name}", "targetCommit": oid} for name, oid in named]

    found: dict[str, Any] = {"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []}
    if call.flag("include_prs"):
        found["pullRequests"] = listed("refs/pr/")
    return as_json(found)


@route("GET", rf"{REPOSITORY}/commits/{REVISION}")
def commits(repository: Repository, call: Call, revision: str) -> Response:
    return call.page(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "date": DATE,
                "authors": [{"user": commit.author}],
            }
            for commit in repository.history(revision)
        ]
    )


# ---- Files ----


def part(content: bytes, headers: dict[str, str], wanted: str) -> Response:
    """All of a file, or the range of it that the header `Range` asks for."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if match is None:
        return Response(200, headers, content)
    first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
    if first >= len(content):
        return Response(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Response(206, headers, content[first : last + 1])


@route("GET", rf"{PAGE}/resolve/{REVISION}/(?P<path>.+)")
def resolve(repository: Repository, call: Call, revision: str, path: str) -> Response:
    call.check_gate(repository)
    commit = repository.at(revision)
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        # With the commit, by which the client remembers that there is no such file
        raise HubError(404, "EntryNotFound", "Entry not found", headers=headers)
    file = commit.files[path]
    if isinstance(file, bytes):
        return part(file, {**headers, "ETag": f'"{git_oid(file)}"'}, call.headers.get("Range", ""))
    headers |= {
        "Location": call.hub.link(repository, file.sha256),
        "X-Linked-ETag": f'"{file.sha256}"',
        "X-Linked-Size": str(file.size),
        "ETag": f'"{git_oid(file)}"',
    }
    return Response(302, headers, b"")


@route("GET", "/_cdn/(?P<link>[^/]+)/(?P<sha>[0-9a-f]{64})")
def from_storage(call: Call, link: str, sha: str) -> Response:
    """A large file, for whoever was given the link to it."""
    check_no_token(call)
    repository = call.hub.links.get((link, sha))
    if repository is None or sha not in repository.objects:
        raise HubError(404, None, f"The storage holds no {quote(sha)}")
    content = repository.objects[sha]
    return part(content, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, call.headers.get("Range", ""))


def check_no_token(call: Call) -> None:
    """The storage is another company's: a token that gets there has leaked."""
    if "Authorization" in call.headers:
        raise HubError(400, None, "Only one auth mechanism allowed: the storage must not get a token")
