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
"""Who may do what on the loopback Hub, as the real client reports it."""

import hashlib

import pytest
from hub_client import ClientError
from huggingface_hub import CommitOperationAdd


def test_who_asks(hub, client):
    answer = client("whoami")
    assert (answer["name"], [org["name"] for org in answer["orgs"]]) == ("alice", ["org"])
    assert answer["auth"]["accessToken"]["role"] == "write"
    assert client("whoami", token=hub.add_user("bob", "read"))["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(ClientError, match="Invalid user token") as caught:
        client("whoami", token="hf_nobody")
    assert caught.value.status == 401


def refusal(client, name, *arguments, **options) -> tuple[str, int]:
    with pytest.raises(ClientError) as caught:
        client(name, *arguments, **options)
    return caught.value.name, caught.value.status


def test_private_looks_as_if_it_did_not_exist(hub, client):
    hub.add("models", "org/name", {"a": b"a"}, private=True)
    reader = hub.add_user("reader", "read", {"org": "read"})
    stranger = hub.add_user("stranger")
    assert client("model_info", "org/name", token=reader).private
    assert client("file_exists", "org/name", "a", token=reader)
    missing = "RepositoryNotFoundError"
    for name in ("org/name", "org/none"):
        assert refusal(client, "model_info", name, token="") == (missing, 401)
        assert refusal(client, "model_info", name, token=stranger) == (missing, 404)
        assert refusal(client, "auth_check", name, token=stranger) == (missing, 404)
        assert refusal(client, "create_tag", name, tag="v1", token=stranger) == (missing, 404)
        assert not client("repo_exists", name, token=stranger)
    # A token that nobody has is not the same as none
    name, status = refusal(client, "model_info", "org/name", token="hf_nobody")
    assert (name, status) == ("HfHubHTTPError", 401)


def test_the_link_to_a_large_file_is_not_public(hub, client):
    repository = hub.add("models", "org/name", {"w.bin": b"weights"}, private=True, lfs=["*"])
    sha = repository.at("main").files["w.bin"].sha256
    hub.add("models", "alice/other", {"w.bin": b"weights"}, lfs=["*"])
    metadata = client("get_hf_file_metadata", url=f"{hub.endpoint}/org/name/resolve/main/w.bin")
    assert (metadata.etag, metadata.size) == (sha, 7) and metadata.location.startswith(f"{hub.storage}/_cdn/")
    assert refusal(client, "get_hf_file_metadata", url=f"{hub.storage}/_cdn/guessed/{sha}", token="")[1] == 404
    # A token that is sent to the storage has leaked: this is answered with an error
    assert refusal(client, "get_hf_file_metadata", url=metadata.location)[1] == 400


def test_gates(hub, client):
    repository = hub.add("models", "org/name", {"a": b"a", "w.bin": b"w"}, gated="manual", lfs=["*.bin"])
    guest = hub.add_user("guest")
    for token, status in (("", 401), (guest, 403)):
        assert client("model_info", "org/name", token=token).gated == "manual"
        assert client("list_repo_files", "org/name", token=token) == ["a", "w.bin"]
        assert refusal(client, "auth_check", "org/name", token=token) == ("GatedRepoError", status)
        for path in ("a", "w.bin"):
            assert refusal(client, "hf_hub_download", "org/name", path, token=token)[0] == "GatedRepoError"
    client("auth_check", "org/name")
    repository.granted.add("guest")
    client("auth_check", "org/name", token=guest)
    assert client("file_exists", "org/name", "a", token=guest)


WRITES = [
    ("create_commit", [[CommitOperationAdd("b", b"b")]], {"commit_message": "a push"}),
    ("create_commit", [[CommitOperationAdd("w.bin", b"weights")]], {"commit_message": "a push"}),
    ("create_tag", [], {"tag": "v1"}),
    ("delete_tag", [], {"tag": "v0"}),
    ("create_branch", [], {"branch": "b"}),
    ("delete_branch", [], {"branch": "old"}),
    ("super_squash_history", [], {}),
    ("update_repo_settings", [], {"private": True}),
    ("list_lfs_files", [], {}),
    ("delete_repo", [], {}),
    ("merge_pull_request", [1], {}),
    ("auth_check", [], {"write": True}),
]


@pytest.mark.parametrize(("name", "arguments", "options"), WRITES)
def test_who_may_not_write(hub, client, name, arguments, options):
    repository = hub.add("models", "org/name", {"a": b"a"})
    client("create_branch", "org/name", branch="old")
    client("create_tag", "org/name", tag="v0")
    client("create_pull_request", "org/name", title="A change")
    repository.discussions[0].status = "open"
    before = hub.state()
    for token, status in (
        ("", 401),
        (hub.add_user("alice", "read", {"org": "write"}), 403),
        (hub.add_user("reader", "write", {"org": "read"}), 403),
        (hub.add_user("stranger"), 403),
    ):
        assert refusal(client, name, "org/name", *arguments, token=token, **options)[1] == status
    assert hub.state() == before
    client(name, "org/name", *arguments, **options)


def test_whose_namespace(hub, client):
    for token, status in (("", 401), (hub.add_user("alice", "read"), 403), (hub.add_user("stranger"), 403)):
        assert refusal(client, "create_repo", "alice/name", token=token)[1] == status
    assert hub.repositories == {}
    hub.add("models", "alice/name", {})
    assert refusal(client, "move_repo", "alice/name", "stranger/name")[1] == 403
    assert list(hub.repositories) == [("models", "alice/name")]


def test_who_may_send_large_files(hub, client):
    """Whose token may write at all: a stranger proposes weights by a pull request, and writes nothing to main."""
    repository = hub.add("models", "org/name", {".gitattributes": b"*.bin filter=lfs -text\n"})
    operations = [CommitOperationAdd("w.bin", b"weights")]
    options = {"commit_message": "a push", "create_pr": True}
    for token, status in (("", 401), (hub.add_user("stranger", "read"), 403)):
        assert refusal(client, "create_commit", "org/name", operations, **options, token=token)[1] == status
    assert (repository.objects, repository.discussions) == ({}, [])
    stranger = hub.add_user("stranger")
    assert refusal(client, "create_commit", "org/name", operations, commit_message="x", token=stranger)[1] == 403
    operations = [CommitOperationAdd("w.bin", b"weights")]
    assert client("create_commit", "org/name", operations, **options, token=stranger).pr_revision == "refs/pr/1"
    assert repository.read("refs/pr/1")["w.bin"] == b"weights" and "w.bin" not in repository.read()
    assert hashlib.sha256(b"weights").hexdigest().encode() in hub.sent()
