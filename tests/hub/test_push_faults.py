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
Every way in which a push can break off: main holds the old files or the new ones, and the next push finishes.

The requests of an undisturbed push are the list of what can fail, so that one that is added is tested as well.
"""

import copy
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hub_store import GIT_ATTRIBUTES
from small_release import make_small_release
from test_push import contents, released


NAME = "org/name"


@pytest.fixture
def newer(base, tmp_path) -> Path:
    """Another release of the same base, that was pushed before."""
    return make_small_release(base, tmp_path / "older", seed=3)


def requests_of(hub) -> list[tuple[str, str, int]]:
    """Method and a pattern of the path of each request, and how many like it came before."""
    found, seen = [], Counter()
    for request in hub.requests:
        path = re.sub(r"[0-9a-f]{16,64}", "[0-9a-f]+", request.path)
        found.append((request.method, f"^{path}$", seen[request.method, path]))
        seen[request.method, path] += 1
    return found


class Watch:
    """What may be seen of a repository while a push is under way and after it, whatever happens."""

    def __init__(self, hub, old: dict[str, bytes] | None, new: dict[str, bytes]):
        self.hub, self.old, self.new = hub, old, new
        self.commits = 0 if old is None else len(list(hub.repository(NAME).history("main")))

    def check(self) -> None:
        if ("models", NAME) not in self.hub.repositories:
            assert self.old is None
            return
        repository = self.hub.repository(NAME)
        assert repository.private
        assert released(self.hub) in ([{}, self.new] if self.old is None else [self.old, self.new])
        for tag in repository.tags:
            assert released(self.hub, revision=tag) in (self.old, self.new)

    def check_finished(self) -> None:
        repository = self.hub.repository(NAME)
        assert released(self.hub) == self.new
        assert len(list(repository.history("main"))) == (self.commits or 1) + 1, "a duplicate commit"
        assert repository.at("main").oid in repository.tags.values() and repository.private
        assert len(repository.tags) == (1 if self.old is None else 2)


@pytest.fixture
def prepare(hub, push, release, newer):
    """Gives a function: a Hub without the repository, or with one that holds an earlier release, and what to watch."""
    saved = {}

    def prepare(existing: bool) -> Watch:
        hub.repositories.clear()
        if existing:
            if not saved:
                assert push(newer).code == 0
                saved.update(copy.deepcopy(hub.repositories))
            hub.repositories.update(copy.deepcopy(saved))
        hub.requests.clear()
        return Watch(hub, contents(newer) if existing else None, contents(release))

    return prepare


def check_message(outcome) -> None:
    assert outcome.code in (0, 1), outcome
    assert "Traceback" not in outcome.err and outcome.err.count("Error: ") == outcome.code


@pytest.mark.parametrize(
    "existing, when, questions",
    [
        pytest.param(False, "before", "all", marks=pytest.mark.slow),
        pytest.param(False, "after", "all", marks=pytest.mark.slow),
        pytest.param(True, "after", "all", marks=pytest.mark.slow),
        (True, "after", "a third"),
    ],
)
def test_every_request_fails(hub, push, release, prepare, when, existing, questions):
    """Once, as a gateway does, and from then on, as an outage does; before and after it took effect."""
    prepare(existing)
    assert push(release).code == 0
    requests = requests_of(hub)
    assert len(requests) > 15 and any("/commit/" in path for _, path, _ in requests)
    failed = Counter()
    for number, (method, path, skip) in enumerate(requests):
        if questions == "a third" and method == "GET" and number % 3:
            continue
        watch = prepare(existing)
        # An outage of a question is the same before and after
        times = 1 if number % 2 and method == "GET" else 1000
        hub.fail(method, path, when, (500, 502, 503, 504)[number % 4], skip=skip, times=times)
        outcome = push(release)
        failed[bool(outcome.code)] += 1
        hub.faults.clear()
        check_message(outcome)
        watch.check()
        if not outcome.code:
            watch.check_finished()
        assert push(release).code == 0, (method, path)
        watch.check_finished()
    assert failed[True] > 5 and failed[False] > 1


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_connections_are_dropped_at_what_writes(hub, push, release, prepare, when):
    prepare(False)
    assert push(release).code == 0
    for method, path, skip in [one for one in requests_of(hub) if one[0] != "GET"]:
        for times in (1, 1000):
            watch = prepare(False)
            hub.drop(method, path, when, skip=skip, times=times)
            outcome = push(release)
            hub.faults.clear()
            check_message(outcome)
            watch.check()
            assert push(release).code == 0
            watch.check_finished()


def test_each_part_of_a_large_file_breaks_off(hub, push, release, prepare):
    hub.multipart_above, hub.part_size = 3_000, 3_000
    watch = prepare(True)
    assert push(release).code == 0
    parts = [one for one in requests_of(hub) if one[0] == "PUT"]
    size = (release / "model.safetensors").stat().st_size
    assert len(parts) == -(-size // 3_000) > 2
    for part in range(1, len(parts) + 1):
        for when, times in (("during", 1), ("during", 1000), ("before", 1), ("after", 1)):
            watch = prepare(True)
            hub.drop("PUT", rf"^/_lfs/[0-9a-f]+/{part}$", when, size=700, times=times)
            outcome = push(release)
            hub.faults.clear()
            check_message(outcome)
            watch.check()
            assert outcome.code == (times > 1), (part, when, outcome)
    assert push(release).code == 0
    watch.check_finished()


def test_the_reply_to_the_commit_is_lost(hub, push, release, prepare):
    """The dangerous one: it happened, and the publisher never heard of it."""
    for existing in (False, True):
        watch = prepare(existing)
        hub.drop("POST", f"/api/models/{NAME}/commit/main", "after")
        outcome = push(release)
        assert outcome.code == 0, outcome.err
        watch.check_finished()
        commits = [one for one in hub.requests if one.method == "POST" and "/commit/" in one.path]
        assert len(commits) == 1


def test_somebody_commits_meanwhile(hub, push, release, prepare, newer):
    """A race: the Hub refuses with 412, main is read again, and what was written there meanwhile is merged."""
    watch = prepare(True)

    def edit():
        repository = hub.repository(NAME)
        files = dict(repository.at("main").files)
        files["README.md"] = files["README.md"] + b"\n## Meanwhile\n"
        repository.write(files, "Edit", "refs/heads/main")

    hub.meanwhile("POST", f"/api/models/{NAME}/commit/main", edit)
    outcome = push(release)
    assert outcome.code == 0, outcome.err
    statuses = [one.status for one in hub.requests if one.method == "POST" and "/commit/" in one.path]
    assert statuses == [412, 200]
    there = released(hub)
    assert there.pop("README.md").endswith(b"\n## Meanwhile\n")
    assert there == {path: content for path, content in watch.new.items() if path != "README.md"}
    # Whoever never stops wins
    state = released(hub)
    for _ in range(5):
        hub.meanwhile("POST", f"/api/models/{NAME}/commit/main", edit)
    outcome = push(newer)
    assert outcome.code == 1 and "412" in outcome.err
    assert {**released(hub), "README.md": b""} == {**state, "README.md": b""}
    hub.faults.clear()
    assert push(newer).code == 0


def test_somebody_puts_what_is_blocked_into_the_card_meanwhile(hub, push, release, prepare, newer):
    prepare(True)

    def edit():
        repository = hub.repository(NAME)
        files = dict(repository.at("main").files)
        files["README.md"] = files["README.md"] + b"\nFor Perpetua Lochlainn.\n"
        repository.write(files, "Edit", "refs/heads/main")

    hub.meanwhile("POST", f"/api/models/{NAME}/commit/main", edit)
    outcome = push(release)
    assert outcome.code == 1 and "README.md: forget-answer" in outcome.out
    assert released(hub)["model.safetensors"] == contents(newer)["model.safetensors"]


def test_somebody_creates_the_repository_meanwhile(hub, push, release, prepare):
    for private in (True, False):
        prepare(False)
        hub.meanwhile(
            "POST",
            "/api/repos/create",
            lambda private=private: hub.add("models", NAME, {".gitattributes": GIT_ATTRIBUTES}, private=private),
        )
        outcome = push(release)
        if private:
            assert outcome.code == 0 and released(hub) == contents(release)
        else:
            assert outcome.code == 2 and "--public" in outcome.err and released(hub) == {}


def test_the_tag_is_taken_meanwhile(hub, push, release, prepare):
    for other in (False, True):
        prepare(True)

        def tag(other=other):
            repository = hub.repository(NAME)
            commit = repository.at("main")
            repository.refs["refs/tags/v1"] = commit.parent if other else commit.oid

        hub.meanwhile("POST", "/tag/", tag)
        outcome = push(release, NAME, "--tag", "v1")
        assert released(hub) == contents(release)
        if other:
            assert outcome.code == 1 and "somebody took its tag" in outcome.err
            assert push(release, NAME, "--tag", "v2").code == 0
        else:
            assert outcome.code == 0


def test_a_tree_that_is_not_what_was_sent(hub, push, release, prepare):
    """It gets no tag, and the publisher is told."""
    prepare(True)
    assert push(release, NAME, "--dry-run").code == 0
    asked = sum("/tree/" in one.path for one in hub.requests)

    def tamper():
        commit = hub.repository(NAME).at("main")
        object.__setattr__(commit, "files", {**commit.files, "config.json": b"{}"})

    tags = dict(hub.repository(NAME).tags)
    hub.meanwhile("GET", "/tree/", tamper)
    hub.faults[-1].skip = asked
    outcome = push(release)
    assert outcome.code == 1 and "does not hold what was sent (1 files differ" in outcome.err, outcome
    assert hub.repository(NAME).tags == tags


def test_weights_that_are_written_to_while_they_are_sent(hub, push, release, prepare):
    """After the check and before the commit: what is sent is what was checked, or nothing."""
    watch = prepare(True)

    def write():
        with open(release / "model.safetensors", "r+b") as file:
            file.seek(-4, 2)
            file.write(b"\0\0\0\0")

    codes = []
    for method, path in (("GET", f"/api/models/{NAME}$"), ("POST", "/preupload/"), ("POST", "/objects/batch")):
        saved = (release / "model.safetensors").read_bytes()
        hub.meanwhile(method, path, write)
        outcome = push(release)
        # Those that were read before are sent as they were checked
        assert (released(hub) == watch.new) is (outcome.code == 0), (path, outcome)
        assert outcome.code == 0 or (outcome.code in (1, 2) and released(hub) == watch.old), (path, outcome)
        (release / "model.safetensors").write_bytes(saved)
        codes.append(outcome.code)
    assert codes[0] == 2 and push(release).code == 0
    watch.check_finished()


def test_a_file_swapped_in_after_the_scan(hub, push, release, prepare):
    watch = prepare(True)

    def swap():
        for name in ("README.md", "model.safetensors"):
            (release / name).unlink()
            (release / name).write_bytes(b"what must not leave")

    hub.meanwhile("GET", f"/api/models/{NAME}$", swap)
    assert push(release).code == 0
    assert b"what must not leave" not in hub.sent()
    watch.check_finished()


def test_a_full_disk(hub, push, release, prepare, tmp_path):
    """The client writes what it reads of the card to a temporary file. Nothing has been written there by then."""
    watch = prepare(True)
    assert len(watch.old["README.md"]) > 3_000
    outcome = push(release, file_size=3_000)
    assert outcome.code == 1 and "make room" in outcome.err and "Traceback" not in outcome.err, outcome
    assert hub.writes() == [] and released(hub) == watch.old
    # A receipt that cannot be written is printed: the release is there
    folder = tmp_path / "receipts"
    folder.mkdir()
    hub.meanwhile("POST", "/tag/", lambda: folder.rmdir())
    outcome = push(release, NAME, "--receipt", folder / "receipt.json")
    assert outcome.code == 1 and "receipt cannot be written" in outcome.err and '"commit"' in outcome.out
    watch.check_finished()


@pytest.mark.slow
def test_it_is_killed(hub, push, release, prepare, run_process, base, token, tmp_path):
    """SIGKILL 50 times, at random moments: half of them at a new repository, half at one with a release."""
    words = ("push", release, NAME, "--base", base, "--forget", tmp_path / "forget.jsonl")
    generator, outcomes, longest = random.Random(0), Counter(), 0.0
    for number in range(50):
        watch = prepare(number % 2 == 1)
        asked = threading.Event()
        # Before it asks for the first time, it has sent nothing
        hub.meanwhile("GET", f"/api/models/{NAME}$", asked.set)
        child = run_process.start(*words, token=token)
        assert asked.wait(60)
        begun = time.monotonic()
        outcome = run_process.wait(longest * generator.random()) if number else run_process.wait()
        longest = max(longest, time.monotonic() - begun) if number == 0 else longest
        if outcome is None:
            run_process.kill(child)
            outcome = run_process.wait()
        outcomes["killed" if outcome.code < 0 else "done", bool(hub.writes())] += 1
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline:  # a request that arrived in full takes effect
            watch.check()
        finished = push(release)
        assert finished.code == 0, finished
        watch.check_finished()
    assert outcomes["killed", True] >= 10 and outcomes["killed", False] >= 3, outcomes


def test_it_is_killed_at_each_request(hub, push, release, prepare, run_process, base, token, tmp_path):
    """The same, at the very moment in which the Hub handles each request that writes."""
    words = ("push", release, NAME, "--base", base, "--forget", tmp_path / "forget.jsonl")
    prepare(False)
    assert push(release).code == 0
    for method, path, skip in [one for one in requests_of(hub) if one[0] != "GET"]:
        watch = prepare(False)
        pids = []
        hub.meanwhile(method, path, lambda pids=pids: run_process.kill(pids[0]))
        hub.faults[-1].skip = skip
        pids.append(run_process.start(*words, token=token))
        assert run_process.wait().code == -9
        watch.check()
        assert push(release).code == 0
        watch.check_finished()
