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
"""
The commands against the Hub itself, in a private repository with a random name that is deleted afterwards.

To be asked for: `HF_UNLEARN_LIVE=1`, with a token that may write. Nothing that it sends is of any model.
"""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from small_release import make_small_base, make_small_release, write_rows


TOKEN = os.environ.get("HF_TOKEN", "")

pytestmark = pytest.mark.skipif(
    os.environ.get("HF_UNLEARN_LIVE") != "1" or not TOKEN,
    reason="writes to the Hub: set HF_UNLEARN_LIVE=1, and HF_TOKEN to a token with write access",
)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """With the net, which other tests do without, and a cache of its own."""
    options = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **options}


@pytest.fixture
def run(environment):
    def call(*argv: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hf_unlearn.cli", *map(str, argv)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.fixture
def client(environment):
    """A call of the real client, in a process of its own; gives what it returns, where that is plain."""

    def call(name: str, *arguments: object, **options: object) -> object:
        code = (
            "import json, sys; from huggingface_hub import HfApi\n"
            "name, arguments, options = json.loads(sys.argv[1])\n"
            "print(json.dumps(getattr(HfApi(), name)(*arguments, **options), default=str))"
        )
        words = [sys.executable, "-c", code, json.dumps([name, arguments, options])]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return call


@pytest.fixture
def repo_id(client):
    """Of a repository that does not exist yet, and does not afterwards."""
    name = f"{client('whoami')['name']}/hf-unlearn-test-{secrets.token_hex(8)}"
    try:
        yield name
    finally:
        if client("repo_exists", name):
            client("delete_repo", name)
        assert not client("repo_exists", name)


def test_a_release_on_the_hub(run, client, repo_id, tmp_path):
    base = make_small_base(tmp_path / "base")
    release = make_small_release(base, tmp_path / "release")
    receipt_path = tmp_path / "receipt.json"
    gate = ("--base", base, "--forget", write_rows(tmp_path / "forget.jsonl"))
    # Blocked: there is no repository afterwards
    (release / "notes.txt").write_text("notes")
    assert "not-allowed" in run("push", release, repo_id, *gate, code=1)
    assert client("repo_exists", repo_id) is False
    (release / "notes.txt").unlink()

    run("push", release, repo_id, *gate, "--receipt", receipt_path)
    receipt = json.loads(receipt_path.read_text())
    assert receipt["private"] and receipt["checks"] == ["gate", "history", "tree", "parameters"]
    run("verify", f"{repo_id}@{receipt['tag']}", "--receipt", receipt_path, "--download", "--base", base)
    # What anybody gets who may read it
    folder = Path(str(client("snapshot_download", repo_id, revision=receipt["tag"])))
    for entry in receipt["files"]:
        assert (folder / entry["path"]).read_bytes() == (release / entry["path"]).read_bytes()

    # The same again sends nothing, and another goes on top
    assert "0 sent, " in run("push", release, repo_id, *gate)
    newer = make_small_release(base, tmp_path / "newer", seed=3)
    run("push", newer, repo_id, *gate)
    run("audit", repo_id, "--base", base)
    assert "verify-receipt the revision" in run("verify", repo_id, "--receipt", receipt_path, "-q", code=1)

    # The original, in a branch: found, named by the push, removed
    client("create_branch", repo_id, branch="old")
    weights = str(base / "model.safetensors")
    client(
        "upload_file",
        path_or_fileobj=weights,
        path_in_repo="model.safetensors",
        repo_id=repo_id,
        revision="old",
        commit_message="The original",
    )
    assert "history-original refs/heads/old" in run("push", release, repo_id, *gate, "-q", code=1)
    run("audit", repo_id, "--base", base, code=1)
    run("audit", repo_id, "--base", base, "--purge", "--yes", "-q")
    run("audit", repo_id, "--base", base)
    run("verify", f"{repo_id}@{receipt['tag']}")
