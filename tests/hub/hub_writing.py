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
"""What the loopback Hub answers to those who write: repositories, commits, branches, tags and squashed histories."""

import base64
import fnmatch
import json
import re
from typing import Any

import yaml
from hub_routing import JSON, NAME, REPOSITORY, REVISION, Call, Response, as_json, route
from hub_store import GIT_ATTRIBUTES, HubError, Pointer, Repository, git_oid, ref_of


# ---- Repositories ----


def named_in(content: dict[str, Any], call: Call) -> tuple[str, str]:
    """Kind and full name of the repository that the body of a request is about."""
    namespace = content.get("organization") or call.signed_in().name
    return f"{content.get('type') or 'model'}s", f"{namespace}/{content['name']}"


@route("POST", "/api/repos/create")
def create(call: Call) -> Response:
    content = call.json()
    kind, name = named_in(content, call)
    namespace = name.partition("/")[0]
    user = call.signed_in()
    if not user.can_write(namespace):
        what = kind.removesuffix("s")
        raise HubError(403, None, f'You don\'t have the rights to create a {what} under the namespace "{namespace}"')
    repository = Repository(kind, name, private=content.get("visibility") == "private")
    url = f"{call.hub.endpoint}/{repository.address}"
    if (kind, name) in call.hub.repositories:
        raise HubError(409, None, f"You already created this {kind.removesuffix('s')} repo", url=url)
    repository.write({".gitattributes": GIT_ATTRIBUTES}, "initial commit", "refs/heads/main", author=user.name)
    call.hub.repositories[kind, name] = repository
    return as_json({"url": url, "name": name})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    kind, name = named_in(call.json(), call)
    call.writer(call.repository(kind, name).namespace)
    del call.hub.repositories[kind, name]
    return as_json({})


@route("POST", "/api/repos/move")
def move(call: Call) -> Response:
    content = call.json()
    kind = f"{content['type']}s"
    repository = call.repository(kind, content["fromRepo"])
    for name in (content["fromRepo"], content["toRepo"]):
        call.writer(name.partition("/")[0])
    if (kind, content["toRepo"]) in call.hub.repositories:
        raise HubError(409, None, "A repository with this name exists already")
    del call.hub.repositories[kind, repository.name]
    repository.name = content["toRepo"]
    call.hub.repositories[kind, repository.name] = repository
    return as_json({})


@route("PUT", rf"{REPOSITORY}/settings", writes=True)
def settings(repository: Repository, call: Call) -> Response:
    content = call.json()
    repository.gated = content.get("gated", repository.gated)
    if "visibility" in content:
        repository.private = content["visibility"] == "private"
    return as_json({"private": repository.private, "gated": repository.gated})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    """Only what can be known here: that the metadata is YAML, and names a base model as the Hub wants it."""
    content = call.json()["content"]
    metadata = re.match(r"---\n(.*?\n)---\n", content, flags=re.DOTALL)
    errors, warnings = [], []
    if metadata is None:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    else:
        try:
            card = yaml.safe_load(metadata[1]) or {}
        except yaml.YAMLError:
            errors.append({"message": "bad indentation or syntax in the yaml metadata"})
        else:
            bases = card.get("base_model", [])
            for base in bases if isinstance(bases, list) else [bases]:
                if base == "":
                    errors.append({"message": '"base_model" is not allowed to be empty'})
                elif not re.fullmatch(NAME.replace("?P<name>", "?:") + r"|[^/]+", str(base)):
                    errors.append({"message": f'"base_model" with value "{base}" is not valid'})
    if call.headers.get("Accept") == "text/plain":
        text = "\n".join(one["message"] for one in errors)
        return Response(400 if errors else 200, {"Content-Type": "text/plain"}, text.encode())
    body = json.dumps({"errors": errors, "warnings": warnings}).encode()
    return Response(400 if errors else 200, JSON, body)


# ---- Commits ----


def is_large(repository: Repository, revision: str, path: str, size: int, threshold: int) -> bool:
    """Whether a file belongs in the large file storage: by its size, or by `.gitattributes` at `revision`."""
    attributes = repository.at(revision).files.get(".gitattributes", b"")
    lines = attributes.decode().splitlines() if isinstance(attributes, bytes) else []
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    names = (path, path.rpartition("/")[2])
    return size > threshold or any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)


def may_commit(repository: Repository, call: Call, revision: str) -> str:
    """Who commits: who may write, or to a pull request of their own anybody with a token that may."""
    user = call.signed_in()
    own = any(one.is_pull_request and (one.ref, one.author) == (revision, user.name) for one in repository.discussions)
    if not call.flag("create_pr") and not own:
        return call.writer(repository.namespace).name
    if user.role != "write":
        raise HubError(403, None, "You have read access but not the required permissions for this operation")
    return user.name


@route("POST", rf"{REPOSITORY}/preupload/{REVISION}")
def preupload(repository: Repository, call: Call, revision: str) -> Response:
    may_commit(repository, call, revision)
    content = call.json()
    present = repository.at(revision).files
    ignored = [line for line in content.get("gitIgnore", "").split("\n") if line and not line.startswith("#")]
    answers = []
    for file in content["files"]:
        path = file["path"]
        large = is_large(repository, revision, path, file["size"], call.hub.lfs_threshold)
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
        }
        if path in present:
            old = present[path]
            answer["oid"] = old.sha256 if isinstance(old, Pointer) else git_oid(old)
        answers.append(answer)
    return as_json({"files": answers})


def changed(repository: Repository, files: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """`files` after the operations of a commit."""
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in repository.objects:
                raise HubError(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Pointer(value["oid"], len(repository.objects[value["oid"]]))
        elif key in ("deletedFile", "deletedFolder"):
            gone = [one for one in files if one == path or (key == "deletedFolder" and one.startswith(path))]
            if not gone:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            for one in gone:
                del files[one]
        else:
            raise HubError(400, None, f"Invalid operation: {key}")
    return files


@route("POST", rf"{REPOSITORY}/commit/{REVISION}")
def commit(repository: Repository, call: Call, revision: str) -> Response:
    author = may_commit(repository, call, revision)
    ref = ref_of(revision)
    if ref not in repository.refs:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    header, *operations = (json.loads(line) for line in call.body.splitlines())
    header = header["value"]
    head = repository.at(ref)
    if header.get("parentCommit", head.oid) != head.oid:
        raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
    # Nothing is changed until all operations are known to be possible
    files = changed(repository, dict(head.files), operations)
    answer = {"success": True}
    if call.flag("create_pr"):
        opened = repository.open_discussion(header["summary"], header["description"], author, pull_request=True)
        opened.base, opened.status = head.oid, "open"
        ref = opened.ref
        answer["pullRequestUrl"] = f"{call.hub.endpoint}/{repository.address}/discussions/{opened.number}"
    added = repository.write(
        files, header["summary"], ref, description=header["description"], parent=head.oid, author=author
    )
    url = f"{call.hub.endpoint}/{repository.address}/commit/{added.oid}"
    return as_json({**answer, "commitOid": added.oid, "commitUrl": url})


@route("POST", rf"{REPOSITORY}/super-squash/{REVISION}", writes=True)
def super_squash(repository: Repository, call: Call, revision: str) -> Response:
    ref = ref_of(revision)
    if revision not in repository.branches:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    repository.squash(ref, call.json()["message"], call.signed_in().name)
    return as_json({})


# ---- Branches and tags ----


@route("POST", rf"{REPOSITORY}/branch/(?P<branch>[^/]+)", writes=True)
def create_branch(repository: Repository, call: Call, branch: str) -> Response:
    start = repository.at(call.json().get("startingPoint", "main"))
    if branch in repository.branches:
        raise HubError(409, None, f"Reference already exists: refs/heads/{branch}")
    repository.refs[f"refs/heads/{branch}"] = start.oid
    return as_json({})


@route("DELETE", rf"{REPOSITORY}/branch/(?P<branch>[^/]+)", writes=True)
def delete_branch(repository: Repository, call: Call, branch: str) -> Response:
    if branch == "main":
        raise HubError(403, None, "The branch main cannot be deleted")
    if branch not in repository.branches:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
    del repository.refs[f"refs/heads/{branch}"]
    return as_json({})


@route("POST", rf"{REPOSITORY}/tag/{REVISION}", writes=True)
def create_tag(repository: Repository, call: Call, revision: str) -> Response:
    tagged, tag = repository.at(revision), call.json()["tag"]
    if tag in repository.tags:
        raise HubError(409, None, f"Tag reference exists already: refs/tags/{tag}")
    repository.refs[f"refs/tags/{tag}"] = tagged.oid
    return as_json({})


@route("DELETE", rf"{REPOSITORY}/tag/(?P<tag>[^/]+)", writes=True)
def delete_tag(repository: Repository, call: Call, tag: str) -> Response:
    if tag not in repository.tags:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {tag}")
    del repository.refs[f"refs/tags/{tag}"]
    return as_json({})
