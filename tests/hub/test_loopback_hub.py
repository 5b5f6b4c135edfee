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
"""The loopback Hub, with the real client: what other tests rest on."""

import subprocess
import sys

import pytest
from loopback_hub import LoopbackHub


# Clients freeze their endpoint when they are imported: a process of its own, and all questions in one
CLIENT = """
from huggingface_hub import HfApi, hf_hub_download, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

api = HfApi()
info = api.model_info("org/name")
assert (info.id, info.sha, info.card_data["license"]) == ("org/name", OID, "mit")
assert sorted(sibling.rfilename for sibling in info.siblings) == ["README.md", "a/b.txt", "a/c/d.bin"]
assert [entry.path for entry in api.list_repo_tree("org/name")] == ["a", "README.md"]
assert [entry.path for entry in api.list_repo_tree("org/name", "a")] == ["a/c", "a/b.txt"]
assert [entry.path for entry in api.list_repo_tree("org/name", recursive=True)] == [
    "a", "a/c", "README.md", "a/b.txt", "a/c/d.bin"
]
assert [(entry.path, entry.size) for entry in api.get_paths_info("org/name", ["a/b.txt", "none"])] == [("a/b.txt", 5)]
refs = api.list_repo_refs("org/name", include_pull_requests=True)
assert [ref.ref for ref in [*refs.branches, *refs.pull_requests]] == ["refs/heads/main", "refs/pr/1"]
assert open(hf_hub_download("org/name", "a/b.txt")).read() == "hello"
assert open(hf_hub_download("org/name", "a/b.txt", revision="refs/pr/1")).read() == "other"
assert get_hf_file_metadata(hf_hub_url("org/name", "a/b.txt")).commit_hash == OID
assert not api.file_exists("org/name", "none") and api.file_exists("org/name", "a/c/d.bin")
for call, error in (
    (lambda: api.model_info("org/none"), RepositoryNotFoundError),
    (lambda: api.dataset_info("org/name"), RepositoryNotFoundError),
    (lambda: api.model_info("org/name", revision="none"), RevisionNotFoundError),
    (lambda: hf_hub_download("org/name", "none"), EntryNotFoundError),
    (lambda: list(api.list_repo_tree("org/name", "none")), EntryNotFoundError),
):
    try:
        call()
    except error:
        pass
    else:
        raise AssertionError(error)
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def test_the_real_client_reads_from_it(hub, tmp_path):
    files = {"README.md": b"---\nlicense: mit\n---\n", "a/b.txt": b"hello", "a/c/d.bin": bytes(range(256))}
    repository = hub.add("models", "org/name", files)
    repository.commit({"a/b.txt": b"other"}, branch="refs/pr/1")
    code = CLIENT.replace("OID", repr(repository.branches["main"]))
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "", **hub.environment(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    # Whoever is not signed in does not learn that a repository does not exist
    assert {request.status for request in hub.requests} == {200, 401, 404}


def test_parts_of_a_file(hub):
    import urllib.request

    hub.add("datasets", "org/name", {"rows.bin": bytes(range(100))})
    for wanted, status, content in (
        ("bytes=10-19", 206, bytes(range(10, 20))),
        ("bytes=90-", 206, bytes(range(90, 100))),
    ):
        url = f"{hub.endpoint}/datasets/org/name/resolve/main/rows.bin"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": wanted})) as response:
            assert (response.status, response.read()) == (status, content)
