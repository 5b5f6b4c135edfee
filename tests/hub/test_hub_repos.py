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
"""Repositories of the loopback Hub with the real client: what the server then holds, and what the client then sees."""

import json
import struct
from pathlib import Path

import pytest
from hub_client import ClientError
from huggingface_hub import CommitOperationAdd


def safetensors(**shapes: list[int]) -> bytes:
    """A file of zeros, made by hand."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def test_a_new_repository(hub, client):
    assert client("create_repo", "org/name", private=True) == f"{hub.endpoint}/org/name"
    repository = hub.repository("org/name")
    assert (repository.private, list(repository.read())) == (True, [".gitattributes"])
    info = client("model_info", "org/name")
    assert (info.id, info.private, info.gated, info.sha) == ("org/name", True, False, repository.branches["main"])
    assert [commit.title for commit in client("list_repo_commits", "org/name")] == ["initial commit"]
    assert client("repo_exists", "org/name") and not client("repo_exists", "org/other")

    with pytest.raises(ClientError, match="You already created this model repo") as caught:
        client("create_repo", "org/name")
    assert caught.value.status == 409
    # As on the real one: what was asked for is ignored when it exists
    assert client("create_repo", "org/name", private=False, exist_ok=True).repo_id == "org/name"
    assert client("model_info", "org/name").private
    # A name of another kind is another repository, and without a namespace it is the user's own
    assert client("create_repo", "org/name", repo_type="dataset") == f"{hub.endpoint}/datasets/org/name"
    assert client("create_repo", "mine").repo_id == "alice/mine"
    assert sorted(hub.repositories) == [("datasets", "org/name"), ("models", "alice/mine"), ("models", "org/name")]


def test_settings_move_and_delete(hub, client):
    hub.add("models", "org/name", {"a.txt": b"a"})
    client("update_repo_settings", "org/name", private=True, gated="manual")
    assert (hub.repository("org/name").private, hub.repository("org/name").gated) == (True, "manual")
    client("move_repo", "org/name", "alice/renamed")
    assert list(hub.repositories) == [("models", "alice/renamed")]
    assert client("model_info", "alice/renamed").gated == "manual"
    client("delete_repo", "alice/renamed")
    assert hub.repositories == {}
    with pytest.raises(ClientError, match="RepositoryNotFoundError"):
        client("delete_repo", "alice/renamed")
    client("delete_repo", "alice/renamed", missing_ok=True)


def test_the_list_of_models(hub, client):
    hub.add("models", "org/one", {"README.md": b"---\ntags: [unlearning]\n---\n"})
    hub.add("models", "org/two", {})
    hub.add("models", "alice/private", {}, private=True)
    hub.add("datasets", "org/set", {})

    def names(**options):
        return sorted(model.id for model in client("list_models", **options))

    assert names() == ["alice/private", "org/one", "org/two"]
    assert names(token="") == ["org/one", "org/two"]
    assert names(author="org") == ["org/one", "org/two"]
    assert names(search="TWO") == ["org/two"] and names(filter="unlearning") == ["org/one"]


def test_pages(hub, client):
    repository = hub.add("models", "org/name", {})
    for number in range(5):
        repository.commit({f"{n}.bin": bytes([n]) for n in range(number + 1)}, f"commit {number}", lfs=["*"])
    hub.page_size = 2
    titles = [commit.title for commit in client("list_repo_commits", "org/name")]
    assert titles == [*(f"commit {number}" for number in (4, 3, 2, 1, 0)), "a commit"]
    paths = [f"{number}.bin" for number in range(5)]
    assert [file.path for file in client("list_repo_tree", "org/name")] == paths
    assert [file.filename for file in client("list_lfs_files", "org/name")] == paths
    counts = [sum(end in request.path for request in hub.requests) for end in ("/commits/", "/tree/", "/lfs-files")]
    assert counts == [3, 3, 3]


def test_files_at_each_revision(hub, client, tmp_path):
    repository = hub.add("models", "org/name", {"a/b.txt": b"old", "w.bin": b"old weights"}, lfs=["*.bin"])
    old = repository.branches["main"]
    repository.commit({"a/b.txt": b"new", "w.bin": b"new weights"}, "second", lfs=["*.bin"])
    client("create_tag", "org/name", tag="v0", revision=old)
    repository.commit({"a/b.txt": b"proposed"}, branch="refs/pr/1")
    for revision, texts in (
        ("main", ["new", "new weights"]),
        ("v0", ["old", "old weights"]),
        (old, ["old", "old weights"]),
        (old[:7], ["old", "old weights"]),
        ("refs/pr/1", ["proposed"]),
    ):
        paths = ["a/b.txt", "w.bin"][: len(texts)]
        got = [client("hf_hub_download", "org/name", path, revision=revision) for path in paths]
        assert [Path(path).read_text() for path in got] == texts
    with pytest.raises(ClientError, match="RevisionNotFoundError"):
        client("hf_hub_download", "org/name", "a/b.txt", revision="v1")
    # The bytes of large files came from the storage, and no token went there
    stored = [request for request in hub.requests if request.path.startswith("/_cdn/")]
    assert stored and all("Authorization" not in request.headers for request in stored)

    [folder, weights] = client("list_repo_tree", "org/name", expand=True)
    assert (folder.path, weights.path, weights.size, weights.lfs.sha256) == (
        "a",
        "w.bin",
        11,
        repository.at("main").files["w.bin"].sha256,
    )
    assert weights.last_commit.title == "second"
    with pytest.raises(ClientError, match="EntryNotFoundError"):
        client("list_repo_tree", "org/name", "b")


def test_a_download_that_breaks_off_is_repeated(hub, client):
    content = bytes(range(256)) * 400
    hub.add("models", "org/name", {"w.bin": content}, lfs=["*.bin"])
    hub.drop("GET", "/_cdn/", "during", size=50_000)
    path = client("hf_hub_download", "org/name", "w.bin")
    assert Path(path).read_bytes() == content
    assert not hub.faults
    assert len([request for request in hub.requests if request.path.startswith("/_cdn/")]) == 2


@pytest.mark.parametrize("lfs", [[], ["*.safetensors"]])
def test_headers_of_safetensors(hub, client, lfs):
    one, two = safetensors(a=[3, 4]), safetensors(b=[5, 2], c=[1, 7])
    index = {
        "metadata": {"total_size": 116},
        "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
    }
    hub.add("models", "org/single", {"model.safetensors": two}, lfs=lfs)
    files = {"1.safetensors": one, "2.safetensors": two, "model.safetensors.index.json": json.dumps(index).encode()}
    sharded = hub.add("models", "org/sharded", files, lfs=lfs)
    metadata = client("get_safetensors_metadata", "org/single")
    assert (metadata.sharded, metadata.parameter_count) == (False, {"F32": 17})
    metadata = client("get_safetensors_metadata", "org/sharded", revision=sharded.branches["main"])
    assert (metadata.sharded, metadata.parameter_count) == (True, {"F32": 29})
    assert metadata.files_metadata["1.safetensors"].metadata == {"format": "pt"}


def test_what_the_hub_says_of_a_card(hub, client):
    client("create_repo", "org/name")
    before = hub.state()

    def push(base):
        card = CommitOperationAdd("README.md", f"---\nbase_model: {base}\n---\n# Title\n".encode())
        return client("create_commit", "org/name", [card], commit_message="card")

    for base, message in (('""', '"base_model" is not allowed to be empty'), ("a/b/c", 'with value "a/b/c"')):
        with pytest.raises(ClientError, match="Invalid metadata in README.md") as caught:
            push(base)
        assert message in caught.value.message
    assert hub.state() == before
    push("org/base")
    assert client("model_info", "org/name").card_data.base_model == "org/base"


def test_folders(hub, client, tmp_path):
    client("create_repo", "org/name")
    files = {"README.md": b"---\nlicense: mit\n---\n", "w.safetensors": b"weights", "d/e/f.txt": b"text"}
    for path, content in files.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(content)
    done = client("upload_folder", repo_id="org/name", folder_path=tmp_path / "up", revision="main")
    repository = hub.repository("org/name")
    held = repository.read(done.oid)
    assert {path: held[path] for path in held if path != ".gitattributes"} == files
    assert list(repository.objects.values()) == [b"weights"]
    client("snapshot_download", "org/name", revision=done.oid, local_dir=tmp_path / "down")
    assert {path: (tmp_path / "down" / path).read_bytes() for path in held} == held
