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
"""What the loopback Hub holds: repositories with their commits, refs, large files and pull requests."""

import fnmatch
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any


DATE = "2026-01-01T00:00:00.000Z"
GIT_ATTRIBUTES = b"".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for suffix in ("bin", "gguf", "h5", "onnx", "parquet", "pickle", "pkl", "pt", "pth", "safetensors", "zip")
)


class HubError(Exception):
    """An answer that the clients turn into an exception of their own, by its code."""

    def __init__(self, status: int, code: str | None, message: str, **more: Any):
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more


@dataclass(frozen=True)
class Pointer:
    """What a commit holds of a large file, whose bytes are in the storage of the repository."""

    sha256: str
    size: int

    @property
    def text(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


def git_oid(file: bytes | Pointer) -> str:
    content = file.text if isinstance(file, Pointer) else file
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """One state of a repository. Files are named by their path, with forward slashes."""

    files: Mapping[str, bytes | Pointer]
    title: str
    description: str = ""
    parent: str | None = None
    author: str = "loopback"

    @cached_property
    def oid(self) -> str:
        digest = hashlib.sha1(f"{self.title}\0{self.description}\0{self.parent}\0{self.author}\0".encode())
        for path, content in sorted(self.files.items()):
            digest.update(f"{path}\0{git_oid(content)}\0".encode())
        return digest.hexdigest()


@dataclass
class Discussion:
    """A discussion or pull request. The commits of a pull request are behind `refs/pr/{number}`."""

    number: int
    title: str
    description: str
    author: str
    is_pull_request: bool
    status: str
    base: str
    merge_commit: str | None = None
    comments: list[str] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass
class Repository:
    """
    A model, data set or space with its history.

    Args:
        kind (`str`): `"models"`, `"datasets"` or `"spaces"`.
        name (`str`): such as `"org/name"`.
        private (`bool`): whether others than those of its namespace get a 404.
        gated (`bool` or `str`): `False`, `"auto"` or `"manual"`; files are then for those in `granted` only.
        commits (`dict[str, Commit]`): oid -> commit, each after its parent; those that no ref reaches stay readable.
        refs (`dict[str, str]`): such as `refs/heads/main`, `refs/tags/v1` or `refs/pr/1` -> oid.
        objects (`dict[str, bytes]`): sha256 -> bytes, of large files.
        pushed (`dict[str, tuple[str, str]]`): sha256 -> path and ref of the first commit with this large file.
    """

    kind: str
    name: str
    private: bool = False
    gated: bool | str = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    pushed: dict[str, tuple[str, str]] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.name.partition("/")[0]

    @property
    def address(self) -> str:
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    @property
    def branches(self) -> dict[str, str]:
        return self.named("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        return self.named("refs/tags/")

    def named(self, prefix: str) -> dict[str, str]:
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}

    # ---- Reading ----

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a ref in full, or an oid of at least 7 characters."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        found = [commit for oid, commit in self.commits.items() if len(revision) >= 7 and oid.startswith(revision)]
        if len(found) != 1:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found[0]

    def read(self, revision: str = "main") -> dict[str, bytes]:
        """Every file that a client can download at `revision`, with the bytes that it gets."""
        files = self.at(revision).files
        contents = {path: self.content(file) for path, file in files.items()}
        return {path: content for path, content in contents.items() if content is not None}

    def content(self, file: bytes | Pointer) -> bytes | None:
        """The bytes of a file, or `None` for a large one that was permanently deleted."""
        return self.objects.get(file.sha256) if isinstance(file, Pointer) else file

    def history(self, revision: str) -> Iterator[Commit]:
        """From the newest to the oldest."""
        commit: Commit | None = self.at(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent is not None else None

    def state(self) -> dict[str, Any]:
        """All of it, to compare with an earlier or later one."""
        return {
            "private": self.private,
            "gated": self.gated,
            "refs": dict(self.refs),
            "commits": set(self.commits),
            "objects": set(self.objects),
            "discussions": [(one.number, one.title, one.status, one.merge_commit) for one in self.discussions],
        }

    # ---- Writing: each is one step ----

    def commit(
        self,
        files: dict[str, bytes],
        title: str = "a commit",
        branch: str = "main",
        lfs: Collection[str] = (),
    ) -> Commit:
        """Adds a commit with `files` as its whole content, and those that match a pattern in `lfs` as large ones."""
        return self.write(self.stored(files, lfs), title, ref_of(branch))

    def stored(self, files: dict[str, bytes], lfs: Collection[str]) -> dict[str, bytes | Pointer]:
        """`files` as a commit holds them."""
        return {
            path: self.store(content) if any(fnmatch.fnmatch(path, pattern) for pattern in lfs) else content
            for path, content in files.items()
        }

    def store(self, content: bytes) -> Pointer:
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return Pointer(sha256, len(content))

    def write(
        self,
        files: Mapping[str, bytes | Pointer],
        title: str,
        ref: str,
        *,
        description: str = "",
        parent: str | None = None,
        author: str = "loopback",
    ) -> Commit:
        """Adds a commit after `parent`, or else after what `ref` names, and moves `ref` to it."""
        commit = Commit(files, title, description, self.refs.get(ref) if parent is None else parent, author)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        for path, file in files.items():
            if isinstance(file, Pointer):
                self.pushed.setdefault(file.sha256, (path, ref))
        return commit

    def squash(self, ref: str, message: str, author: str) -> Commit:
        """One commit without a parent in place of the history of a branch. The old commits stay readable by oid."""
        commit = Commit(self.at(ref).files, message, author=author)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def delete_objects(self, shas: Collection[str], rewrite_history: bool) -> None:
        """Deletes large files for good, and with `rewrite_history` the pointers to them in every commit."""
        for sha in shas:
            self.objects.pop(sha, None)
            self.pushed.pop(sha, None)
        if not rewrite_history:
            return
        renamed: dict[str | None, str | None] = {None: None}
        commits = {}
        for oid, commit in self.commits.items():
            files = {
                path: file
                for path, file in commit.files.items()
                if not (isinstance(file, Pointer) and file.sha256 in shas)
            }
            rewritten = replace(commit, files=files, parent=renamed[commit.parent])
            renamed[oid] = rewritten.oid
            commits[rewritten.oid] = rewritten
        self.commits = commits
        self.refs = {ref: str(renamed[oid]) for ref, oid in self.refs.items()}
        for discussion in self.discussions:
            discussion.base = str(renamed[discussion.base])
            discussion.merge_commit = renamed[discussion.merge_commit]

    def open_discussion(self, title: str, description: str, author: str, *, pull_request: bool) -> Discussion:
        """A pull request is a draft at first, with a ref of its own at the head of main."""
        head = self.refs["refs/heads/main"]
        status = "draft" if pull_request else "open"
        discussion = Discussion(len(self.discussions) + 1, title, description, author, pull_request, status, head)
        self.discussions.append(discussion)
        if pull_request:
            self.refs[discussion.ref] = head
        return discussion


def ref_of(branch: str) -> str:
    """The ref in full of a branch, or of a pull request that is given as `refs/pr/N`."""
    return branch if branch.startswith("refs/") else f"refs/heads/{branch}"


@dataclass(frozen=True)
class User:
    """
    Who a token speaks for.

    Args:
        name (`str`): the user, whose own namespace has the same name.
        role (`str`): of the token, `"read"` or `"write"`.
        organizations (`dict[str, str]`): organization -> role in it, `"read"` or `"write"`.
    """

    name: str
    role: str = "write"
    organizations: Mapping[str, str] = field(default_factory=dict)

    def is_in(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations

    def can_write(self, namespace: str) -> bool:
        return self.role == "write" and (namespace == self.name or self.organizations.get(namespace) == "write")
