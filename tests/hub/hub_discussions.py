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
"""Discussions and pull requests of the loopback Hub."""

import json
from typing import Any

from hub_routing import REPOSITORY, Call, Response, as_json, route
from hub_store import DATE, Discussion, HubError, Repository


ONE = rf"{REPOSITORY}/discussions/(?P<number>\d+)"


def found(repository: Repository, number: str) -> Discussion:
    if not 1 <= int(number) <= len(repository.discussions):
        raise HubError(404, None, "Discussion not found")
    return repository.discussions[int(number) - 1]


def summary(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.number,
        "title": discussion.title,
        "status": discussion.status,
        "isPullRequest": discussion.is_pull_request,
        "author": {"name": discussion.author},
        "createdAt": DATE,
        "repo": {"name": repository.name, "type": repository.kind.removesuffix("s")},
    }


def event(kind: str, author: str, **data: Any) -> dict[str, Any]:
    return {"id": "e" * 24, "type": kind, "author": {"name": author}, "createdAt": DATE, "data": data}


def comment(author: str, text: str) -> dict[str, Any]:
    return event("comment", author, edited=False, hidden=False, latest={"raw": text})


def conflicts(repository: Repository, discussion: Discussion) -> list[str]:
    """The files that main and the pull request both changed since it was opened, in different ways."""
    base = repository.commits[discussion.base].files
    ours, theirs = repository.at("main").files, repository.at(discussion.ref).files
    return sorted(
        path
        for path in {*base, *ours, *theirs}
        if ours.get(path) != base.get(path) != theirs.get(path) != ours.get(path)
    )


@route("GET", rf"{REPOSITORY}/discussions")
def listing(repository: Repository, call: Call) -> Response:
    kind, status, author = call.option("type"), call.option("status"), call.option("author")
    selected = [
        one
        for one in repository.discussions
        if kind in ("", "all", "pull_request" if one.is_pull_request else "discussion")
        and status in ("", "all", "open" if one.status in ("open", "draft") else "closed")
        and author in ("", one.author)
    ]
    start = int(call.option("p", "0")) * call.hub.page_size
    shown = selected[start : start + call.hub.page_size]
    content = {"count": len(selected), "start": start, "discussions": [summary(repository, one) for one in shown]}
    return as_json(content)


@route("POST", rf"{REPOSITORY}/discussions")
def create(repository: Repository, call: Call) -> Response:
    user, asked = call.signed_in(), call.json()
    if user.role != "write":
        raise HubError(403, None, "You have read access but not the required permissions for this operation")
    opened = repository.open_discussion(
        asked["title"], asked["description"], user.name, pull_request=asked["pullRequest"]
    )
    return as_json({"num": opened.number, "pullRequest": opened.is_pull_request})


@route("GET", ONE)
def details(repository: Repository, call: Call, number: str) -> Response:
    discussion = found(repository, number)
    texts = [discussion.description, *discussion.comments]
    content = {**summary(repository, discussion), "events": [comment(discussion.author, text) for text in texts]}
    if discussion.is_pull_request:
        content["changes"] = {"base": "refs/heads/main", "mergeCommitId": discussion.merge_commit}
        content["filesWithConflicts"] = conflicts(repository, discussion)
        for commit in reversed(list(repository.history(discussion.ref))):
            if commit.oid not in {one.oid for one in repository.history(discussion.base)}:
                content["events"].append(event("commit", commit.author, subject=commit.title, oid=commit.oid))
    return as_json(content)


@route("POST", rf"{ONE}/comment")
def add_comment(repository: Repository, call: Call, number: str) -> Response:
    user, text = call.signed_in(), call.json()["comment"]
    found(repository, number).comments.append(text)
    return as_json({"newMessage": comment(user.name, text)})


@route("POST", rf"{ONE}/status", writes=True)
def status(repository: Repository, call: Call, number: str) -> Response:
    discussion, asked = found(repository, number), call.json()
    if discussion.status == "merged":
        raise HubError(400, None, "A merged pull request cannot change its status")
    discussion.status = asked["status"]
    discussion.comments += [asked["comment"]] if "comment" in asked else []
    return as_json({"newStatus": event("status-change", call.signed_in().name, status=asked["status"])})


@route("POST", rf"{ONE}/merge", writes=True)
def merge(repository: Repository, call: Call, number: str) -> Response:
    """What the pull request changed since it was opened is changed on main, in one commit."""
    discussion = found(repository, number)
    if not discussion.is_pull_request or discussion.status != "open":
        raise HubError(400, None, f"This is no open pull request: {discussion.status}")
    if conflicts(repository, discussion):
        raise HubError(409, None, "The pull request has conflicts with main")
    base = repository.commits[discussion.base].files
    files, theirs = dict(repository.at("main").files), repository.at(discussion.ref).files
    for path in {*base, *theirs}:
        if path not in theirs:
            files.pop(path, None)
        elif theirs[path] != base.get(path):
            files[path] = theirs[path]
    title = f"{discussion.title} (#{discussion.number})"
    merged = repository.write(files, title, "refs/heads/main", author=call.signed_in().name)
    discussion.status, discussion.merge_commit = "merged", merged.oid
    content = json.loads(call.body or b"null") or {}
    discussion.comments += [content["comment"]] if "comment" in content else []
    return as_json({"mergeCommitId": merged.oid})
