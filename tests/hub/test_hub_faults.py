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
"""Failures of the loopback Hub: each leaves exactly the old or the new state, and the client hears of it."""

import json
import socket
import time

import pytest
from hub_client import ClientError, HubClient
from huggingface_hub import CommitOperationAdd


CONTENT = bytes(range(256)) * 1000  # 256 000 bytes


def add(name: str = "a", content: bytes = b"ours") -> dict:
    return {"operations": [CommitOperationAdd(name, content)], "commit_message": "a push"}


# What the client does in one request that changes something, and that request
STEPS = [
    ("create_repo", {"repo_id": "org/new", "private": True}, "POST", "/repos/create"),
    ("delete_repo", {}, "DELETE", "/repos/delete"),
    ("move_repo", {"from_id": "org/name", "to_id": "org/moved", "repo_id": None}, "POST", "/repos/move"),
    ("update_repo_settings", {"private": True}, "PUT", "/settings"),
    ("create_commit", add(), "POST", "/commit/main"),
    ("create_commit", {**add(), "create_pr": True}, "POST", "/commit/main"),
    ("delete_file", {"path_in_repo": "a"}, "POST", "/commit/main"),
    ("create_tag", {"tag": "v1"}, "POST", "/tag/main"),
    ("delete_tag", {"tag": "v0"}, "DELETE", "/tag/v0"),
    ("create_branch", {"branch": "new"}, "POST", "/branch/new"),
    ("delete_branch", {"branch": "old"}, "DELETE", "/branch/old"),
    ("super_squash_history", {}, "POST", "/super-squash/main"),
    ("create_pull_request", {"title": "By hand"}, "POST", "/discussions"),
    ("merge_pull_request", {"discussion_num": 1}, "POST", "/discussions/1/merge"),
    ("change_discussion_status", {"discussion_num": 1, "new_status": "closed"}, "POST", "/discussions/1/status"),
    ("permanently_delete_lfs_files", {"lfs_files": "all"}, "POST", "/lfs-files/batch"),
]


def prepare(hub) -> None:
    hub.repositories.clear()
    repository = hub.add("models", "org/name", {"a": b"a", "w.bin": b"weights"}, lfs=["*.bin"])
    repository.commit({"a": b"b", "w.bin": b"weights"}, lfs=["*.bin"])
    repository.refs |= {"refs/heads/old": repository.branches["main"], "refs/tags/v0": repository.branches["main"]}
    repository.open_discussion("A change", "", "guest", pull_request=True).status = "open"
    repository.commit({"a": b"proposed"}, branch="refs/pr/1")


def perform(client, name: str, options: dict) -> None:
    options = {"repo_id": "org/name", **options}
    if options["repo_id"] is None:
        del options["repo_id"]
    if options.get("lfs_files") == "all":
        options["lfs_files"] = client("list_lfs_files", "org/name")
    client(name, **options)


@pytest.mark.parametrize(("name", "options", "method", "path"), STEPS)
def test_a_request_fails(hub, client, name, options, method, path):
    prepare(hub)
    old = hub.state()
    perform(client, name, options)
    new = hub.state()
    assert new != old
    for when, expected in (("before", old), ("after", new)):
        for failure, statuses in ((hub.fail, {503}), (hub.drop, {0})):
            prepare(hub)
            assert hub.state() == old
            failure(method, f"{path}$", when)
            with pytest.raises(ClientError) as caught:
                perform(client, name, options)
            assert caught.value.status in statuses and not hub.faults
            assert hub.state() == expected


def test_a_body_that_breaks_off(hub, client):
    prepare(hub)
    old = hub.state()
    for size in (0, 1, 100, 1000):
        hub.drop("POST", "/commit/main", "during", size=size)
        with pytest.raises(ClientError) as caught:
            client("create_commit", "org/name", **add(content=b"ours" * 1000))
        assert caught.value.status == 0
        assert (hub.state(), hub.faults) == (old, [])
        request = hub.requests[-1]
        assert (request.status, len(request.body)) == (0, size)


@pytest.fixture
def repository(hub, client):
    """A repository with large files in three parts."""
    client("create_repo", "org/name")
    hub.multipart_above = hub.part_size = 100_000
    return hub.repository("org/name")


def push(client) -> None:
    client("create_commit", "org/name", **add("w.bin", CONTENT))


TRANSFER = [
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/_lfs/[^/]+/1$"),
    ("PUT", "/_lfs/[^/]+/2$"),
    ("PUT", "/_lfs/[^/]+/3$"),
    ("POST", "/complete$"),
    ("POST", "/objects/verify"),
]


@pytest.mark.parametrize("times", [1, 6])
@pytest.mark.parametrize(("method", "path"), TRANSFER)
def test_an_upload_fails(hub, client, repository, method, path, times):
    """Once, and the client tries again; or as often as it tries, and main is as before."""
    head = repository.branches["main"]
    for failure in (hub.fail, hub.drop):
        for when in ("before", "after"):
            repository.objects.clear()
            repository.refs["refs/heads/main"] = head
            failure(method, path, when, times=times)
            if times == 1:
                push(client)
                assert repository.read()["w.bin"] == CONTENT
            else:
                with pytest.raises(ClientError):
                    push(client)
                assert repository.branches == {"main": head}
                # All of the file or nothing: stored only once the parts were put together
                stored = (path, when) == ("/complete$", "after") or path == "/objects/verify"
                assert list(repository.objects.values()) == ([CONTENT] if stored else [])
            assert not hub.faults


@pytest.mark.parametrize("size", [0, 1, 50_000])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_breaks_off(hub, client, repository, part, size):
    head = repository.branches["main"]
    hub.drop("PUT", f"/_lfs/[^/]+/{part}$", "during", size=size, times=6)
    with pytest.raises(ClientError):
        push(client)
    assert (repository.branches, repository.objects, hub.faults) == ({"main": head}, {}, [])
    parts = [len(request.body) for request in hub.requests if request.method == "PUT"]
    assert parts == [100_000] * (part - 1) + [size] * 6
    # Once only: the client sends this part again
    hub.drop("PUT", f"/_lfs/[^/]+/{part}$", "during", size=size)
    push(client)
    assert repository.read()["w.bin"] == CONTENT and not hub.faults


def test_a_file_in_one_part_breaks_off(hub, client, repository):
    hub.multipart_above = 1_000_000
    hub.drop("PUT", "/_lfs/", "during", size=200_000, times=6)
    with pytest.raises(ClientError):
        push(client)
    assert repository.objects == {}
    hub.drop("PUT", "/_lfs/", "after")
    push(client)
    assert repository.read()["w.bin"] == CONTENT and not hub.faults


def test_a_client_that_is_killed(hub, client, tmp_path):
    prepare(hub)
    old = hub.state()
    for place, (method, path) in enumerate([("POST", "/preupload/"), ("POST", "/commit/")]):
        with HubClient(hub, tmp_path / str(place), client.token) as other:
            hub.meanwhile(method, path, other.kill)
            other.start("create_commit", "org/name", **add())
            with pytest.raises((EOFError, ConnectionError)):
                other.wait()
        deadline = time.monotonic() + 10
        while not (hub.requests and path in hub.requests[-1].path) and time.monotonic() < deadline:
            time.sleep(0.01)
        # What arrived in full takes effect, though nobody waits for the answer
        assert path in hub.requests[-1].path and hub.requests[-1].status == 200
        assert (hub.state() == old) is (path == "/preupload/")
    assert hub.repository("org/name").read()["a"] == b"ours"


def test_half_a_commit_is_none(hub, client):
    """A commit is one operation per line: the first lines alone would be a valid one."""
    prepare(hub)
    old = hub.state()
    lines = [{"key": "header", "value": {"summary": "half", "description": ""}}]
    lines += [{"key": "deletedFile", "value": {"path": path}} for path in ("a", "w.bin")]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    head = f"POST /api/models/org/name/commit/main HTTP/1.1\r\nAuthorization: Bearer {client.token}\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    address = ("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))
    for sent in (whole[: whole.rindex(b'{"key"')], whole):
        with socket.create_connection(address) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            try:
                answer = connection.recv(100)
            except ConnectionResetError:
                answer = b""
        assert (answer[:12] == b"HTTP/1.1 200") is (hub.state() != old) is (sent == whole)


def test_errors_of_every_type(hub, client):
    prepare(hub)
    for status, code, name in (
        (404, "RepoNotFound", "RepositoryNotFoundError"),
        (404, "RevisionNotFound", "RevisionNotFoundError"),
        (404, "EntryNotFound", "RemoteEntryNotFoundError"),
        (403, "GatedRepo", "GatedRepoError"),
        (400, None, "BadRequestError"),
        (409, None, "HfHubHTTPError"),
        (429, None, "HfHubHTTPError"),
    ):
        hub.fail("POST", "/commit/main", "before", status, code)
        with pytest.raises(ClientError, match="fails before the effect") as caught:
            client("create_commit", "org/name", **add())
        assert (caught.value.name, caught.value.status) == (name, status)


def test_which_requests_fail(hub, client):
    prepare(hub)
    hub.fail("GET", "^/api/models/org/name$", "before", 500, skip=1, times=2)
    statuses = []
    for _ in range(4):
        try:
            client("model_info", "org/name")
            statuses.append(200)
        except ClientError as error:
            statuses.append(error.status)
    assert statuses == [200, 500, 500, 200] == [request.status for request in hub.requests]


def test_the_log_has_all_that_was_sent(hub, client):
    prepare(hub)
    hub.drop("POST", "/commit/main", "before")
    with pytest.raises(ClientError):
        client("create_commit", "org/name", **{**add(content=b"x"), "commit_message": "a canary in the message"})
    assert b"a canary in the message" in hub.sent() and b"another canary" not in hub.sent()
    assert [(request.method, request.status) for request in hub.writes()] == [("POST", 200), ("POST", 0)]
    hub.requests.clear()
    client("model_info", "org/name")
    assert hub.writes() == []
