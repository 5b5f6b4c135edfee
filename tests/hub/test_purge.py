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
"""`hf-unlearn audit --purge` over HTTP: what it removes, what it leaves alone, and what an interruption leaves."""

import hashlib
import json
import os
import pty
import subprocess
import sys
import time

import pytest
from hub_store import Repository
from loopback_hub import LoopbackHub
from push_process import PushProcess
from test_audit import (
    BASE,
    LARGE,
    ONE,
    ORIGINAL,
    RELEASE,
    TWO,
    add_base,
    audit,
    open_pull_request,
    push,
    release,
    tag,
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def everywhere(hub: LoopbackHub) -> Repository:
    """The original, large and small, in every place that can be cleaned, and a release at the tip of main."""
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    push(repository, ORIGINAL)
    tag(repository, "v0")
    repository.commit({"model.bin": BASE["pytorch_model.bin"]}, branch="old")
    push(repository, {**ORIGINAL, "README.md": b"# Old"}, "old")
    push(repository, release(), "dev")
    repository.commit({"model.safetensors": BASE[ONE]}, branch="dev")
    push(repository, {**release(), "note.txt": b"of dev"}, "dev")
    open_pull_request(repository, ORIGINAL)
    push(repository, release())
    tag(repository, "v1")
    return repository


def purge(hub: LoopbackHub, run_process: PushProcess, *arguments: object, code: int = 0) -> dict:
    result = audit(hub, run_process, "org/model", "--purge", "--yes", "--json", "-q", *arguments)
    assert result.code == code, result.err
    return json.loads(result.out)


def served(repository: Repository) -> set[str]:
    """SHA-256 of all that a ref leads to, in its past too, and of all that the storage holds."""
    commits = {one.oid for ref in repository.refs for one in repository.history(ref)}
    contents = {sha256(content) for oid in commits for content in repository.read(oid).values()}
    return contents | set(repository.objects)


def test_all_that_can_be_removed(hub, run_process):
    repository = everywhere(hub)
    before, dev = repository.read("main"), repository.read("dev")
    content = purge(hub, run_process)
    assert sha256(BASE[ONE]) not in served(repository)
    # The shard that did not change is part of the release
    assert sha256(BASE[TWO]) in repository.objects
    assert repository.read("main") == before and before[TWO] == BASE[TWO]
    # A branch with a clean tip keeps its tip, a tag with large files in its past only stays
    assert repository.read("dev") == dev and len(list(repository.history("dev"))) == 1
    assert sorted(repository.branches) == ["dev", "main"] and sorted(repository.tags) == ["v1"]
    assert repository.read("v1") == before
    assert content["plan"]["tags"] == ["v0"] and content["plan"]["branches"] == ["old"]
    assert content["plan"]["squashed"] == ["dev"] and content["plan"]["large"] == [sha256(BASE[ONE])]
    assert content["purge"]["remaining"] == [] and content["purge"]["main_kept"] and content["after"]["clean"]
    assert not content["clean"]
    # Nothing is left to do
    state = hub.state()
    hub.requests.clear()
    assert purge(hub, run_process)["clean"] and hub.state() == state and hub.writes() == []


def test_small_files_behind_main(hub, run_process):
    """They go with the history alone; a tag after them would keep it, so it goes as well."""
    add_base(hub)
    repository = hub.add("models", "org/model", ORIGINAL)
    push(repository, release())
    tag(repository, "v1")
    push(repository, {**release(), "note.txt": b"x"})
    before = repository.read("main")
    content = purge(hub, run_process)
    assert repository.read("main") == before and len(list(repository.history("main"))) == 1
    assert repository.tags == {} and content["plan"]["tags"] == ["v1"] and content["plan"]["squashed"] == ["main"]
    assert sha256(BASE[ONE]) not in served(repository)
    assert content["plan"]["removed_from_main"] == 0 and content["purge"]["main_kept"]


def at_main(hub: LoopbackHub) -> Repository:
    """The original at the tip of main, large and small."""
    add_base(hub)
    files = {**ORIGINAL, "README.md": b"# Old"}
    repository = hub.add("models", "org/model", files, lfs=LARGE)
    files["model.safetensors"] = BASE[ONE]
    repository.commit(files, lfs=[TWO, ONE])
    repository.commit({**files, "new.txt": b"x"}, lfs=[TWO, ONE])
    return repository


def test_main_itself_serves_the_original(hub, run_process):
    """All else at its tip stays."""
    repository = at_main(hub)
    content = purge(hub, run_process, "--base", "org/base")
    assert repository.read("main") == {"README.md": b"# Old", "new.txt": b"x"}
    assert served(repository) & {sha256(BASE[ONE]), sha256(BASE[TWO])} == set()
    assert content["plan"]["removed_from_main"] == 1 and content["purge"]["main_kept"]


def test_an_orphan(hub, run_process):
    add_base(hub)
    repository = hub.add("models", "org/model", ORIGINAL, lfs=LARGE)
    push(repository, release())
    repository.squash("refs/heads/main", "anew", "alice")
    assert purge(hub, run_process)["after"]["clean"]
    assert set(repository.objects) == {sha256(content) for content in RELEASE.values()}


def test_a_pull_request_cannot_be_removed(hub, run_process):
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    open_pull_request(repository, ORIGINAL)
    open_pull_request(repository, ORIGINAL, lfs=[])
    result = audit(hub, run_process, "org/model", "--purge", "--yes")
    assert result.code == 1
    assert "Cannot be removed: refs/pr/2, which the Hub lets nobody delete." in result.out
    assert "The Hub lets nobody delete a pull request (#2): ask its support, or move to a new rep" in result.out
    # The large one is gone, from the pull request too
    assert sha256(BASE[ONE]) not in repository.objects and ONE not in repository.read("refs/pr/1")
    # Nothing is tried again that is known to fail, and it still does not count as clean
    hub.requests.clear()
    again = purge(hub, run_process, code=1)
    assert hub.writes() == [] and again["plan"]["stays"] == ["refs/pr/2"] and "purge" not in again
    assert {by["name"] for one in again["found"] for by in one["refs"]} == {"#2"} and len(again["found"]) == 1


def test_what_is_no_original_is_removed_on_request_only(hub, run_process):
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    push(repository, {"model.safetensors": b"in one shard", "training_args.bin": b"pickle"})
    push(repository, release())
    before = repository.read("main")
    state = hub.state()
    result = audit(hub, run_process, "org/model", "--purge", "--yes")
    assert result.code == 1 and hub.state() == state and hub.writes() == []
    assert "Not in this plan: left by a trainer and unknown weights (add --all)." in result.out
    assert purge(hub, run_process, "--all")["after"]["clean"]
    assert set(repository.objects) == {sha256(content) for content in RELEASE.values()}
    assert repository.read("main") == before


def test_what_the_report_at_main_lists_stays(hub, run_process):
    """A leftover by its name, which the release lists: it is for its publisher to remove, by the next release."""
    add_base(hub)
    files = {**RELEASE, "extra.bin": b"listed"}
    repository = hub.add("models", "org/model", release(files), lfs=LARGE)
    state = hub.state()
    content = purge(hub, run_process, "--all", code=1)
    assert (
        hub.state() == state and content["plan"]["large"] == [] and repository.read("main")["extra.bin"] == b"listed"
    )
    assert [one["rule"] for one in content["found"]] == ["history-leftover"]


# ---- Who is asked, and who may ----


def test_nothing_is_removed_without_a_yes(hub, run_process):
    everywhere(hub)
    state = hub.state()
    result = audit(hub, run_process, "org/model", "--purge")
    assert (result.code, hub.state(), hub.writes()) == (2, state, [])
    assert "Error: Nothing was removed: add --yes" in result.err
    assert "  delete tag v0; where its tip is clean, tag main again afterwards" in result.out.splitlines()
    assert "  delete branch old" in result.out.splitlines()
    assert "  delete 1 large file for good, in all commits" in result.out.splitlines()


@pytest.mark.parametrize(("answer", "is_yes"), [("y\n", True), ("\n", False), ("n\n", False), ("\x04", False)])
def test_the_terminal_is_asked(hub, tmp_path, answer, is_yes):
    repository = everywhere(hub)
    state = hub.state()
    token = hub.add_user("alice", organizations={"org": "write"})
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_unlearn.cli.audit", "org/model", "--purge", "-q"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hub.environment(tmp_path, token)},
    )
    os.write(terminal, answer.encode())
    stdout, stderr = process.communicate(timeout=60)
    for descriptor in (terminal, theirs):
        os.close(descriptor)
    # The plan is seen before the question, however quiet the rest is
    assert stderr.index("delete tag v0") < stderr.index("Remove this for good? [y/N]")
    assert (
        (process.returncode == 0) is is_yes is (hub.state() != state) is (sha256(BASE[ONE]) not in served(repository))
    )


def test_a_token_that_may_not_write(hub, run_process):
    everywhere(hub)
    state = hub.state()
    for token in (hub.add_user("bob", "read", {"org": "read"}), hub.add_user("eve")):
        result = audit(hub, run_process, "org/model", "--purge", "--yes", "-q", token=token)
        assert result.code == 1 and "This token may not do that in org/model" in result.err
    assert hub.state() == state and hub.writes() == []


def test_main_moves_meanwhile(hub, run_process):
    """What was looked at is not what would be removed from: nothing is."""
    repository = everywhere(hub)
    hub.meanwhile("GET", "/auth-check/write$", lambda: push(repository, {**release(), "note.txt": b"new"}))
    result = audit(hub, run_process, "org/model", "--purge", "--yes", "-q")
    assert result.code == 1 and "main of org/model has changed meanwhile" in result.err
    assert hub.writes() == [] and sha256(BASE[ONE]) in served(repository)


# ---- Failures ----

WRITES = [
    (everywhere, "DELETE", "/tag/v0$"),
    (everywhere, "DELETE", "/branch/old$"),
    (everywhere, "POST", "/super-squash/dev$"),
    (everywhere, "POST", "/lfs-files/batch$"),
    (at_main, "POST", "/commit/main$"),
    (at_main, "POST", "/super-squash/main$"),
]
PURGE = ["org/model", "--base", "org/base", "--purge", "--yes", "-q"]


@pytest.fixture(scope="module")
def undisturbed(hub_and_client, run_process) -> dict:
    """The states that a purge leaves in which nothing fails."""
    hub, _ = hub_and_client
    states = {}
    for prepare in (everywhere, at_main):
        hub.reset()
        repository = prepare(hub)
        assert audit(hub, run_process, *PURGE).code == 0
        states[prepare] = repository.state()
    return states


def check_finished(repository: Repository, undisturbed: dict) -> None:
    """As if nothing had failed; of commits that no ref reaches there may be others."""
    state = repository.state()
    del state["commits"]
    assert state == {key: value for key, value in undisturbed.items() if key != "commits"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("prepare", "method", "path"), WRITES)
def test_a_second_run_finishes(undisturbed, hub, prepare, method, path, when, run_process):
    for failure in (hub.fail, hub.drop):
        hub.repositories.clear()
        repository = prepare(hub)
        before = repository.read("main")
        failure(method, path, when)
        result = audit(hub, run_process, *PURGE)
        assert result.code == 1 and not hub.faults and "Traceback" not in result.err
        assert "try again, which is safe." in result.err
        assert prepare is at_main or repository.read("main") == before
        assert audit(hub, run_process, *PURGE).code == 0
        check_finished(repository, undisturbed[prepare])


def test_a_run_that_is_killed(undisturbed, hub, tmp_path, run_process):
    """At each request that changes something: it takes effect, and nobody hears of it."""
    token = hub.add_user("alice", organizations={"org": "write"})
    for prepare, method, path in WRITES:
        hub.repositories.clear()
        hub.requests.clear()
        repository = prepare(hub)
        before = repository.read("main")
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_unlearn.cli.audit", *PURGE],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **hub.environment(tmp_path, token)},
        )
        hub.meanwhile(method, path, process.kill)
        assert process.wait(60) == -9
        deadline = time.monotonic() + 10
        while not (hub.writes() and path.rstrip("$") in hub.writes()[-1].path) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert prepare is at_main or repository.read("main") == before
        assert audit(hub, run_process, *PURGE).code == 0
        check_finished(repository, undisturbed[prepare])
