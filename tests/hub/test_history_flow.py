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
From a repository that serves the original to one that serves a release: push refuses, audit finds, purge removes, and
push says when it is enough. All three commands have to agree on what is served, and where.
"""

import hashlib
import json
from pathlib import Path

import pytest
from hub_store import GIT_ATTRIBUTES, Repository
from small_release import make_small_base, make_small_release


LARGE = ["*.safetensors", "*.bin"]
BIN = b"the same weights in another format"
ATTRIBUTES = {".gitattributes": GIT_ATTRIBUTES}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def is_original(content: bytes, base: Path) -> bool:
    return content == BIN or content in contents(base).values()


@pytest.fixture
def base_on_hub(hub, base) -> Repository:
    """What the report names: it has a format that the folder does not have."""
    repository = hub.add("models", "org/tiny", {**contents(base), "pytorch_model.bin": BIN}, lfs=LARGE)
    repository.refs["refs/tags/5f3a2b1"] = repository.at("main").oid
    return repository


@pytest.fixture
def resharded(tmp_path) -> dict[str, bytes]:
    """The tensors of the base in two files, whose hashes nobody knows."""
    files = contents(make_small_base(tmp_path / "resharded", shards=2))
    return {path: content for path, content in files.items() if path != "README.md"}


@pytest.fixture
def used(hub, base, base_on_hub, resharded) -> Repository:
    """A repository to which a trainer pushed the original in every way, all of it as large files."""
    original = {**ATTRIBUTES, **contents(base)}
    card = {**ATTRIBUTES, "README.md": b"# Mine\n"}
    repository = hub.add("models", "org/name", card, private=True)
    repository.commit(original, "Upload", lfs=LARGE)
    repository.refs["refs/tags/v0"] = repository.refs["refs/heads/old"] = repository.at("main").oid
    repository.commit({**card, "pytorch_model.bin": BIN}, "As a pickle", branch="pickle", lfs=LARGE)
    repository.commit({**card, **resharded}, "In two files", branch="shards", lfs=LARGE)
    request = repository.open_discussion("The model", "", "guest", pull_request=True)
    repository.commit({**original, "README.md": b"# By a guest\n"}, branch=request.ref, lfs=LARGE)
    lost = {**card, "consolidated.safetensors": contents(base)["model.safetensors"] + b" "}
    repository.commit(lost, "Sent to the wrong place", branch="lost", lfs=LARGE)
    del repository.refs["refs/heads/lost"]
    repository.commit(card, "Clean up", lfs=LARGE)
    return repository


@pytest.fixture
def audit(run_process, token):
    def run(repo_id="org/name", *argv, **options) -> tuple[int, dict]:
        outcome = run_process("audit", repo_id, "--json", "-q", *argv, **{"token": token, **options})
        assert "Error" not in outcome.err, outcome.err
        return outcome.code, json.loads(outcome.out)

    return run


def findings(content: dict) -> set[tuple[str, str]]:
    """Rule and ref of what `push --json` was blocked by, or `audit --json` found."""
    entries = content["blocking"] if "blocking" in content else content["findings"]
    return {(one["rule"].removeprefix("history-"), one["file"].removeprefix("refs/")) for one in entries}


SERVED = {
    ("original", "heads/main"),  # in its past
    ("original", "heads/old"),
    ("original", "heads/pickle"),
    ("original", "tags/v0"),
    ("original", "pr/1"),
    ("unknown", "heads/shards"),
    ("unknown", "large files"),  # that no ref reaches
}


def test_from_a_used_repository_to_a_release(hub, push, run_process, release, base, used, audit, token, tmp_path):
    # Refused, in every mode, and each ref is named
    state = hub.state()
    hub.requests.clear()
    for argv in ((), ("--dry-run",), ("--pr",), ("--card-mode", "new")):
        outcome = push(release, "org/name", *argv, "--json")
        assert outcome.code == 1, outcome.err
        assert findings(json.loads(outcome.out)) == SERVED
    outcome = push(release)
    assert outcome.code == 1 and outcome.out.startswith("Blocked:")
    for _, ref in SERVED:
        assert f"{ref}: history-" in outcome.out, ref
    # The audit is told the base, as no report in the repository names it; without it nothing is known for original
    code, found = audit("org/name", "--base", "org/tiny")
    assert code == 1 and findings(found) == SERVED
    code, found = audit()
    assert code == 1 and {rule for rule, _ in findings(found)} == {"unknown"}
    assert {ref for _, ref in findings(found)} == {ref for _, ref in SERVED}
    # Asking removes nothing
    outcome = run_process("audit", "org/name", "--base", "org/tiny", "--purge", token=token)
    assert outcome.code == 2 and "--yes" in outcome.err
    assert hub.state() == state and hub.writes() == []

    # What is known to be the original goes, also out of the pull request, as it is large files
    code, result = audit("org/name", "--base", "org/tiny", "--purge", "--yes")
    left = {one for one in SERVED if one[0] == "unknown"}
    assert code == 1 and findings(result["after"]) == left and result["purge"]["remaining"] == []
    assert not any(is_original(content, base) for content in used.objects.values())
    outcome = push(release, "org/name", "--json")
    assert outcome.code == 1 and findings(json.loads(outcome.out)) == left
    # What may be the original goes on request
    code, result = audit("org/name", "--base", "org/tiny", "--purge", "--all", "--yes")
    assert code == 0 and result["after"]["clean"] and used.objects == {}
    assert set(used.branches) == {"main"} and used.tags == {}

    receipt = tmp_path / "receipt.json"
    outcome = push(release, "org/name", "--receipt", receipt)
    assert outcome.code == 0, outcome.out + outcome.err
    card = used.read("main")["README.md"].decode()
    assert card.endswith("# Mine\n")
    hub.requests.clear()
    assert audit()[0] == 0  # main's report names the base by now
    outcome = run_process("verify", "org/name", "--receipt", receipt, "--download", token=token)
    assert outcome.code == 0, outcome.out
    assert hub.writes() == []


def test_a_pull_request_that_stays(hub, push, release, base, base_on_hub, audit, tmp_path):
    """Files that are no large ones are in the commit itself, and nobody deletes the ref of a pull request."""
    repository = hub.add("models", "org/name", ATTRIBUTES, private=True)
    request = repository.open_discussion("The model", "", "guest", pull_request=True)
    repository.commit({**ATTRIBUTES, **contents(base)}, branch=request.ref)
    repository.refs["refs/tags/v0"] = repository.at("refs/pr/1").oid
    outcome = push(release, "org/name", "--json")
    assert findings(json.loads(outcome.out)) == {("original", "pr/1"), ("original", "tags/v0")}
    code, result = audit("org/name", "--base", base, "--purge", "--yes")
    assert code == 1 and result["plan"]["stays"] == ["refs/pr/1"]
    assert findings(result["after"]) == {("original", "pr/1")} and repository.tags == {}

    hub.requests.clear()
    outcome = push(release)
    assert outcome.code == 1 and "refs/pr/1: history-original" in outcome.out
    assert "the Hub deletes no pull request: use a new repository" in " ".join(outcome.out.split())
    assert hub.writes() == []
    # Which works at once
    outcome = push(release, "org/fresh")
    assert outcome.code == 0 and audit("org/fresh")[0] == 0
    # The publisher may decide otherwise, by name, and it is written down
    assert push(release, "org/name", "--allow", "history-original:refs/pr/2").code == 1
    outcome = push(release, "org/name", "--json", "--allow", "history-original:refs/pr/1")
    assert outcome.code == 0, outcome.out
    receipt = json.loads(outcome.out)
    assert [(one["rule"], one["file"]) for one in receipt["allowed"]] == [("history-original", "refs/pr/1")]
    assert audit()[0] == 1  # what was let through is still served
    # Nothing else is: the original at the tip of a branch, since then
    repository.refs["refs/heads/again"] = repository.refs["refs/pr/1"]
    newer = make_small_release(base, tmp_path / "newer", seed=3)
    outcome = push(newer, "org/name", "--json", "--allow", "history-original:refs/pr/1")
    assert outcome.code == 1 and findings(json.loads(outcome.out)) == {("original", "heads/again")}
    assert push(newer, "org/name", "--allow", "history-original").code == 0


@pytest.mark.parametrize("is_large", [True, False])
def test_the_original_at_the_tip_of_main(hub, push, release, base, base_on_hub, audit, is_large):
    """As `push_to_hub` of a trainer leaves it: a release over it would keep it one commit behind."""
    lfs = LARGE if is_large else []
    repository = hub.add("models", "org/name", {**ATTRIBUTES, **contents(base)}, private=True, lfs=lfs)
    outcome = push(release)
    assert outcome.code == 1 and "its tip, serves 1 weight file of the original" in " ".join(outcome.out.split())
    assert "`hf-unlearn audit org/name --purge`" in " ".join(outcome.out.split())
    code, result = audit("org/name", "--base", base, "--purge", "--yes")
    assert code == 0 and result["purge"]["main_kept"]
    assert repository.read("main").keys() == {".gitattributes", "README.md", "config.json"}
    assert push(release).code == 0
    reachable = [commit for ref in repository.refs for commit in repository.history(ref)]
    served = [repository.content(file) for commit in reachable for file in commit.files.values()]
    weights = (base / "model.safetensors").read_bytes()
    assert weights not in served and (release / "model.safetensors").read_bytes() in served
    assert audit()[0] == 0


def test_releases_one_after_the_other(hub, push, release, base, base_on_hub, audit, tmp_path):
    """An earlier release is none of the original, whoever else pushes the original to a tag meanwhile."""
    assert push(release).code == 0
    newer = make_small_release(base, tmp_path / "newer", seed=3)
    assert push(newer).code == 0 and audit()[0] == 0
    repository = hub.repository("org/name")
    assert len(repository.tags) == 2
    repository.commit({**ATTRIBUTES, **contents(base)}, branch="mine", lfs=LARGE)
    repository.refs["refs/tags/mine"] = repository.refs.pop("refs/heads/mine")
    last = make_small_release(base, tmp_path / "last", seed=5)
    hub.requests.clear()
    outcome = push(last, "org/name", "--json")
    assert findings(json.loads(outcome.out)) == {("original", "tags/mine")} and hub.writes() == []
    before = repository.read("main")
    code, _ = audit("org/name", "--purge", "--yes")  # main's report names the base
    assert code == 0 and repository.read("main") == before and len(repository.tags) == 2
    assert push(last).code == 0
    stored = {hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest() for one in (release, newer, last)}
    served = {hashlib.sha256(repository.read(tag)["model.safetensors"]).hexdigest() for tag in repository.tags}
    assert served == stored


def test_what_was_let_through_is_verified_by_its_receipt(hub, push, run_process, release, token, tmp_path):
    """A file that no release holds: only the receipt says that its publisher sent it, and with which content."""
    name = "A summer diary.txt"
    (release / name).write_text("Nothing that anybody has to forget.\n")
    assert push(release).code == 1
    receipt = tmp_path / "receipt.json"
    outcome = push(release, "org/name", "--receipt", receipt, "--allow", f"not-allowed:{name}")
    assert outcome.code == 0, outcome.out

    def verify(*argv) -> tuple[int, dict]:
        outcome = run_process("verify", "org/name", "--json", *argv, token=token)
        assert "diary" not in outcome.out + outcome.err
        return outcome.code, json.loads(outcome.out)

    code, result = verify("--receipt", receipt)
    assert code == 0 and "1 file that the receipt says was let through" in " ".join(result["not_checked"])
    code, result = verify()
    assert code == 1 and [(one["rule"], one["file"]) for one in result["findings"]] == [("verify-extra", "the tree")]
    repository = hub.repository("org/name")
    for changed in (b"Something else.\n", None):
        files = {**repository.at("main").files, name: changed}
        repository.write({path: file for path, file in files.items() if file is not None}, "Edit", "refs/heads/main")
        code, result = verify("--receipt", receipt)
        rules = {(one["rule"], one["file"].split(" ")[0]) for one in result["findings"]}
        assert code == 1 and ("verify-receipt", "file") in rules and not any("extra" in rule for rule, _ in rules)
