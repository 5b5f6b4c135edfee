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
"""Commits, refs and pull requests of the loopback Hub with the real client."""

import threading
from pathlib import Path

import pytest
from hub_client import ClientError, HubClient
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete


def add(**files: bytes) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in files.items()]


def push(client, operations, **options):
    return client("create_commit", "org/name", operations, commit_message="a push", **options)


def test_what_a_commit_does(hub, client):
    repository = hub.add("models", "org/name", {"a": b"a", "d/b": b"b", "d/c": b"c", "e": b"e", "w": b"w"}, lfs=["w"])
    first = repository.branches["main"]
    operations = [
        *add(new=b"new", a=b"changed"),
        CommitOperationDelete("d/"),
        CommitOperationDelete("e"),
        CommitOperationCopy("w", "copy"),
    ]
    done = push(client, operations, parent_commit=first, commit_description="why")
    assert done.oid == repository.branches["main"] != first
    assert repository.read() == {"new": b"new", "a": b"changed", "w": b"w", "copy": b"w"}
    assert repository.read(first) == {"a": b"a", "d/b": b"b", "d/c": b"c", "e": b"e", "w": b"w"}
    assert client("list_repo_files", "org/name") == ["a", "copy", "new", "w"]
    newest, oldest = client("list_repo_commits", "org/name")
    assert (newest.commit_id, newest.title, newest.message) == (done.oid, "a push", "why")
    assert (newest.authors, oldest.commit_id) == (["alice"], first)


def test_what_has_not_changed_is_not_sent_again(hub, client):
    client("create_repo", "org/name")
    done = push(client, add(**{"a.txt": b"a", "w.bin": b"weights"}))
    hub.requests.clear()
    again = push(client, add(**{"a.txt": b"a", "w.bin": b"weights"}))
    assert again.oid == done.oid
    assert not [request for request in hub.requests if request.method == "PUT" or "/commit/" in request.path]


def test_a_stale_parent_is_refused(hub, client):
    repository = hub.add("models", "org/name", {"a": b"a"})
    stale = repository.branches["main"]
    hub.meanwhile("POST", "/commit/main", lambda: repository.commit({"a": b"theirs"}))
    with pytest.raises(ClientError, match="A commit has happened since") as caught:
        push(client, add(a=b"ours"), parent_commit=stale)
    assert caught.value.status == 412
    assert repository.read() == {"a": b"theirs"} and not hub.faults
    push(client, add(a=b"ours"), parent_commit=repository.branches["main"])
    assert repository.read() == {"a": b"ours"}


def test_of_two_at_once_one_wins(hub, client, tmp_path):
    repository = hub.add("models", "org/name", {"a": b"a"})
    parent = repository.branches["main"]
    # No commit is handled before both have arrived
    together = threading.Barrier(2)
    for _ in range(2):
        hub.meanwhile("POST", "/commit/", lambda: together.wait(timeout=30))
    with HubClient(hub, tmp_path, client.token) as other:
        clients = (client, other)
        for number, one in enumerate(clients):
            content = f"client {number}".encode()
            one.start("create_commit", "org/name", add(a=content), commit_message="race", parent_commit=parent)
        results = []
        for one in clients:
            try:
                results.append(one.wait().oid)
            except ClientError as error:
                results.append(error.status)
    assert not hub.faults and 412 in results
    winner = 1 - results.index(412)
    assert repository.branches["main"] == results[winner]
    assert repository.read() == {"a": f"client {winner}".encode()}
    assert len(list(repository.history("main"))) == 2


def test_a_commit_that_is_not_possible_changes_nothing(hub, client):
    hub.add("models", "org/name", {"a": b"a"})
    before = hub.state()
    with pytest.raises(ClientError, match="EntryNotFoundError.*|A file with this name doesn't exist"):
        push(client, [*add(new=b"new"), CommitOperationDelete("none")])
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        push(client, add(new=b"new"), revision="none")
    with pytest.raises(ClientError, match="RepositoryNotFoundError"):
        client("create_commit", "org/none", add(new=b"new"), commit_message="a push")
    assert hub.state() == before


def test_delete_file_files_and_folder(hub, client):
    repository = hub.add("models", "org/name", {"a": b"a", "b.txt": b"b", "c.txt": b"c", "d/e": b"e", "f": b"f"})
    client("delete_file", "a", "org/name")
    client("delete_folder", "d", "org/name")
    client("delete_files", "org/name", ["*.txt"])
    assert repository.read() == {"f": b"f"}
    assert len(client("list_repo_commits", "org/name")) == 4


def test_branches_and_tags(hub, client):
    repository = hub.add("models", "org/name", {"a": b"a"})
    first = repository.branches["main"]
    push(client, add(a=b"b"))
    second = repository.branches["main"]
    client("create_branch", "org/name", branch="old", revision=first)
    client("create_branch", "org/name", branch="work/new")
    client("create_tag", "org/name", tag="v1", tag_message="first", revision=first)
    push(client, add(a=b"c"), revision="work/new")
    refs = client("list_repo_refs", "org/name")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": second,
        "old": first,
        "work/new": repository.branches["work/new"],
    }
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1", "refs/tags/v1", first)]
    assert [repository.read(name)["a"] for name in ("main", "old", "work/new", "v1")] == [b"b", b"a", b"c", b"a"]

    before = hub.state()
    for name, option in (("create_tag", {"tag": "v1"}), ("create_branch", {"branch": "old"})):
        with pytest.raises(ClientError) as caught:
            client(name, "org/name", **option)
        assert caught.value.status == 409
        client(name, "org/name", **option, exist_ok=True)
    for name, option in (
        ("create_tag", {"tag": "v2", "revision": "none"}),
        ("create_branch", {"branch": "b", "revision": "none"}),
        ("delete_tag", {"tag": "v2"}),
        ("delete_branch", {"branch": "none"}),
    ):
        with pytest.raises(ClientError, match="RevisionNotFoundError"):
            client(name, "org/name", **option)
    with pytest.raises(ClientError, match="403"):
        client("delete_branch", "org/name", branch="main")
    assert hub.state() == before
    client("delete_tag", "org/name", tag="v1")
    client("delete_branch", "org/name", branch="work/new")
    assert (repository.tags, set(repository.branches)) == ({}, {"main", "old"})


def test_squash_leaves_what_other_refs_serve(hub, client):
    repository = hub.add("models", "org/name", {"w": b"original"}, lfs=["w"])
    original = repository.branches["main"]
    client("create_tag", "org/name", tag="v0")
    repository.commit({"w": b"sanitized"}, lfs=["w"])
    client("super_squash_history", "org/name", commit_message="squashed")
    assert [commit.title for commit in client("list_repo_commits", "org/name")] == ["squashed"]
    assert repository.read() == {"w": b"sanitized"}
    # Still there, by tag, by oid and in the storage
    assert repository.read("v0") == repository.read(original) == {"w": b"original"}
    assert {file.size for file in client("list_lfs_files", "org/name")} == {len(b"original"), len(b"sanitized")}
    client("delete_tag", "org/name", tag="v0")
    assert Path(client("hf_hub_download", "org/name", "w", revision=original)).read_text() == "original"
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        client("super_squash_history", "org/name", branch="none")


def test_pull_requests(hub, client):
    repository = hub.add("models", "org/name", {"a": b"a", "b": b"b"})
    main = repository.branches["main"]
    guest = hub.add_user("guest")
    opened = push(client, [*add(a=b"A"), CommitOperationDelete("b")], create_pr=True, token=guest)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    assert repository.branches["main"] == main and repository.read("refs/pr/1") == {"a": b"A"}
    draft = client("create_pull_request", "org/name", title="By hand", token=guest)
    assert (draft.num, draft.status, draft.is_pull_request) == (2, "draft", True)
    assert client("create_discussion", "org/name", title="A question").status == "open"
    push(client, add(a=b"conflict"), revision="refs/pr/2", token=guest)
    with pytest.raises(ClientError, match="403"):
        push(client, add(a=b"not theirs"), revision="refs/pr/2", token=hub.add_user("stranger"))
    refs = client("list_repo_refs", "org/name", include_pull_requests=True).pull_requests
    assert {ref.ref: ref.target_commit for ref in refs} == {
        ref: repository.refs[ref] for ref in ("refs/pr/1", "refs/pr/2")
    }
    listed = client("get_repo_discussions", "org/name", discussion_type="pull_request")
    assert [(one.num, one.author) for one in listed] == [(1, "guest"), (2, "guest")]

    repository.commit({"a": b"a", "b": b"b", "c": b"c"}, "meanwhile on main")
    client("merge_pull_request", "org/name", 1)
    assert repository.read() == {"a": b"A", "c": b"c"}
    details = client("get_discussion_details", "org/name", 1)
    assert (details.status, details.merge_commit_oid) == ("merged", repository.branches["main"])
    # The other one changes the same file. Neither ref goes away
    client("change_discussion_status", "org/name", 2, "open")
    assert client("get_discussion_details", "org/name", 2).conflicting_files == ["a"]
    before = hub.state()
    with pytest.raises(ClientError, match="409"):
        client("merge_pull_request", "org/name", 2)
    with pytest.raises(ClientError, match="403"):
        client("merge_pull_request", "org/name", 2, token=guest)
    assert hub.state() == before
    assert client("change_discussion_status", "org/name", 2, "closed").new_status == "closed"
    assert repository.read("refs/pr/2")["a"] == b"conflict"
