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
"""Large files of the loopback Hub with the real client: uploads, what is listed and what is deleted for good."""

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hub_client import ClientError
from huggingface_hub import CommitOperationAdd


CONTENT = bytes(range(256)) * 1000  # 256 000 bytes
SHA = hashlib.sha256(CONTENT).hexdigest()


def push(client, **files):
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return client("create_commit", "org/name", operations, commit_message="a push")


@pytest.fixture
def repository(hub, client):
    client("create_repo", "org/name")
    hub.requests.clear()
    return hub.repository("org/name")


@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize(("part_size", "sizes"), [(None, [256_000]), (100_000, [100_000, 100_000, 56_000])])
def test_upload_and_download(hub, client, repository, tmp_path, part_size, sizes, from_file):
    if part_size is not None:
        hub.multipart_above = hub.part_size = part_size
    path = tmp_path / "w"
    path.write_bytes(CONTENT)
    push(client, **{"w.safetensors": str(path) if from_file else CONTENT, "note.txt": b"small"})
    assert repository.objects == {SHA: CONTENT}
    files = repository.read()
    assert (files["w.safetensors"], files["note.txt"]) == (CONTENT, b"small")
    puts = [request for request in hub.requests if request.method == "PUT"]
    assert [len(request.body) for request in puts] == sizes and b"".join(one.body for one in puts) == CONTENT
    # The storage is another origin: no token got there
    assert all("Authorization" not in request.headers for request in puts)
    # The commit holds the pointer only
    [commit] = [request for request in hub.requests if "/commit/" in request.path]
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert {"path": "w.safetensors", "algo": "sha256", "oid": SHA, "size": 256_000} in [
        line["value"] for line in lines
    ]

    [info] = client("get_paths_info", "org/name", "w.safetensors")
    assert (info.size, info.lfs.sha256, info.lfs.size) == (256_000, SHA, 256_000)
    assert Path(client("hf_hub_download", "org/name", "w.safetensors")).read_bytes() == CONTENT
    siblings = client("model_info", "org/name", files_metadata=True).siblings
    assert {one.rfilename: one.lfs.sha256 for one in siblings if one.lfs} == {"w.safetensors": SHA}


def test_what_is_stored_is_not_sent_again(hub, client, repository):
    push(client, **{"a.bin": CONTENT})
    push(client, **{"b.bin": CONTENT})
    assert len([request for request in hub.requests if request.method == "PUT"]) == 1
    assert repository.read()["b.bin"] == CONTENT
    # Nobody learns what other repositories hold
    client("create_repo", "org/other")
    other = [CommitOperationAdd("a.bin", CONTENT)]
    client("create_commit", "org/other", other, commit_message="a push")
    assert len([request for request in hub.requests if request.method == "PUT"]) == 2


def test_large_by_size(hub, client, repository):
    hub.lfs_threshold = 1000
    push(client, **{"big.txt": b"x" * 1001, "fits.txt": b"x" * 1000, "empty.bin": b""})
    assert set(repository.objects) == {hashlib.sha256(b"x" * 1001).hexdigest()}
    assert {name: len(content) for name, content in repository.read().items() if name != ".gitattributes"} == {
        "big.txt": 1001,
        "fits.txt": 1000,
        "empty.bin": 0,
    }


def test_a_file_that_never_arrived_cannot_be_committed(hub, client, repository):
    before = hub.state()
    # What the client sends is replaced on the way, the last part is lost
    hub.multipart_above = hub.part_size = 100_000

    def lose_the_last_part():
        [upload] = hub.uploads.values()
        del upload.parts[3]

    hub.meanwhile("POST", "/complete", lose_the_last_part)
    with pytest.raises(ClientError, match="The parts are not those that were uploaded"):
        push(client, **{"w.bin": CONTENT})
    assert hub.state() == before
    hub.meanwhile("POST", "/commit/", repository.objects.clear)
    with pytest.raises(ClientError, match="LFS pointer pointed to a file that does not exist"):
        push(client, **{"w.bin": CONTENT})
    assert hub.state() == before


def test_verify_finds_what_is_missing(hub, client, repository):
    hub.meanwhile("POST", "/objects/verify", repository.objects.clear)
    with pytest.raises(ClientError, match="The storage holds no such file of this size"):
        push(client, **{"w.bin": CONTENT})


def send(method: str, url: str, body: bytes, **headers: str) -> tuple[int, dict]:
    """Without a client, which would do it right."""
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize("parts", [False, True])
def test_only_the_announced_content_is_stored(hub, client, repository, parts):
    if parts:
        hub.multipart_above = hub.part_size = 200_000
    token = {"Authorization": f"Bearer {client.token}"}
    asked = json.dumps({"objects": [{"oid": SHA, "size": len(CONTENT)}]}).encode()
    status, answer = send("POST", f"{hub.endpoint}/org/name.git/info/lfs/objects/batch", asked, **token)
    assert (status, answer["transfer"]) == (200, "multipart" if parts else "basic")
    upload = answer["objects"][0]["actions"]["upload"]
    for content, expected in ((CONTENT[:-1] + b"x", 400), (CONTENT[:-1], 400), (CONTENT, 200)):
        pieces = {"1": content[:200_000], "2": content[200_000:]}
        addresses = {upload["header"][number]: piece for number, piece in pieces.items()} if parts else {}
        for address, piece in addresses.items():
            assert send("PUT", address, piece)[0] == 200
        etags = [f'"{hashlib.md5(piece).hexdigest()}"' for piece in pieces.values()]
        named = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, start=1)]
        done = json.dumps({"oid": SHA, "parts": named}).encode()
        method, body = ("POST", done) if parts else ("PUT", content)
        if not parts:
            assert send("PUT", upload["href"], CONTENT, **token)[0] == 400, "a token got to the storage"
        assert send(method, upload["href"], body)[0] == expected
        assert repository.objects == ({SHA: CONTENT} if expected == 200 else {})


def originals(repository):
    """The history of a repository that once held the original weights."""
    repository.commit({"w.bin": b"original", "README.md": b"one"}, "original", lfs=["*.bin"])
    repository.refs["refs/tags/v0"] = repository.branches["main"]
    repository.commit({"w.bin": b"proposed"}, "a pull request", "refs/pr/1", lfs=["*.bin"])
    repository.commit({"w.bin": b"sanitized", "README.md": b"two"}, "sanitized", lfs=["*.bin"])


def test_permanent_deletion(hub, client, repository):
    originals(repository)
    old = repository.tags["v0"]
    listed = client("list_lfs_files", "org/name")
    assert [(file.filename, file.ref, file.size) for file in listed] == [
        ("w.bin", "refs/heads/main", 8),
        ("w.bin", "refs/pr/1", 8),
        ("w.bin", "refs/heads/main", 9),
    ]
    assert listed[0].file_oid == hashlib.sha256(b"original").hexdigest()
    client("permanently_delete_lfs_files", "org/name", listed[:2])
    assert list(repository.objects.values()) == [b"sanitized"]
    # No ref serves it any more, and the rest of the history is as before
    assert repository.read("v0") == {"README.md": b"one"} and repository.read("refs/pr/1") == {}
    assert repository.read() == {"w.bin": b"sanitized", "README.md": b"two"}
    titles = [commit.title for commit in client("list_repo_commits", "org/name")]
    assert titles == ["sanitized", "original", "initial commit"]
    assert [file.size for file in client("list_lfs_files", "org/name")] == [9]
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        client("model_info", "org/name", revision=old)
    with pytest.raises(ClientError, match="EntryNotFoundError"):
        client("hf_hub_download", "org/name", "w.bin", revision="v0")


def test_permanent_deletion_that_keeps_the_pointers(hub, client, repository):
    originals(repository)
    old = repository.tags["v0"]
    listed = client("list_lfs_files", "org/name")
    client("permanently_delete_lfs_files", "org/name", listed[:1], rewrite_history=False)
    assert repository.tags["v0"] == old and repository.read("v0") == {"README.md": b"one"}
    assert client("list_repo_files", "org/name", revision="v0") == ["README.md", "w.bin"]
    with pytest.raises(ClientError):
        client("hf_hub_download", "org/name", "w.bin", revision="v0")
