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
"""`hf-unlearn push` over HTTP: what gets to the Hub, what never does, and what the publisher is told."""

import hashlib
import json
import re
import shutil

import pytest
from hub_store import GIT_ATTRIBUTES
from released import CANARIES, assert_not_repeated, edit_json, slug
from small_release import make_small_base, make_small_release

from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.report import UnlearningReport


def contents(folder) -> dict[str, bytes]:
    """All files of a release."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def released(hub, name="org/name", revision="main") -> dict[str, bytes]:
    """What a client can download, without what the Hub itself put there."""
    files = hub.repository(name).read(revision)
    assert files.pop(".gitattributes") == GIT_ATTRIBUTES
    return files


def titles(hub, name="org/name", revision="main") -> list[str]:
    return [commit.title for commit in hub.repository(name).history(revision)]


def test_a_new_repository(hub, push, release, tmp_path):
    receipt_path = tmp_path / "receipt.json"
    outcome = push(release, "org/name", "--receipt", receipt_path, "--json")
    assert outcome.code == 0, outcome.err
    repository = hub.repository("org/name")
    assert repository.private and released(hub) == contents(release)
    assert titles(hub) == ["Release an unlearned model", "initial commit"]
    receipt = json.loads(receipt_path.read_text())
    assert receipt == json.loads(outcome.out)
    assert repository.tags == {receipt["tag"]: receipt["commit"]} and repository.branches == {
        "main": receipt["commit"]
    }
    assert receipt["parent"] == repository.at("main").parent
    assert {entry["path"]: entry["sha256"] for entry in receipt["files"]} == {
        path: hashlib.sha256(content).hexdigest() for path, content in contents(release).items()
    }
    assert receipt["checks"] == ["gate", "history", "tree", "parameters"]
    assert receipt["parameters"] == 32 * 16 * 2 + 16 * 48 + 16
    assert (receipt["repo_id"], receipt["private"], receipt["revision"]) == ("org/name", True, "main")
    # The token is in no receipt and no message, and never goes to the storage
    assert "hf_alice" not in receipt_path.read_text() + outcome.out + outcome.err
    assert not any("Authorization" in one.headers for one in hub.requests if one.path.startswith("/_"))


def test_a_repository_of_ones_own(hub, push, release):
    assert push(release, "alice/name").code == 0
    assert released(hub, "alice/name") == contents(release)


def test_a_second_push_of_the_same_sends_nothing(hub, push, release):
    assert push(release).code == 0
    state = hub.state()
    hub.requests.clear()
    outcome = push(release)
    assert outcome.code == 0 and "0 sent, " in outcome.out
    assert hub.state() == state and hub.writes() == []


def test_a_second_release_replaces_the_first(hub, push, base, release, tmp_path):
    assert push(release).code == 0
    newer = make_small_release(base, tmp_path / "newer", seed=3)
    (newer / "figures").mkdir(exist_ok=True)
    first = hub.repository("org/name").at("main").oid
    outcome = push(newer, "org/name", "--tag", "v2", "--message", "Forget more", "--json")
    assert outcome.code == 0, outcome.err
    assert released(hub) == contents(newer) and released(hub, revision=first) == contents(release)
    assert titles(hub) == ["Forget more", "Release an unlearned model", "initial commit"]
    assert len(hub.repository("org/name").tags) == 2
    receipt = json.loads(outcome.out)
    assert receipt["parent"] == first and "model.safetensors" in receipt["sent"]
    assert "config.json" in receipt["unchanged"]
    # What did not change is not sent again
    commit = next(one for one in reversed(hub.requests) if "/commit/" in one.path and one.method == "POST")
    assert b'"config.json"' not in commit.body and b'"README.md"' in commit.body


def test_files_of_the_repository_that_are_none_of_the_release_go(hub, push, release):
    old = {".gitattributes": GIT_ATTRIBUTES, "notes.txt": b"notes", "figures/old.png": b"x", "README.md": b"# Mine\n"}
    hub.add("models", "org/name", old, private=True)
    outcome = push(release, "org/name", "--dry-run")
    assert outcome.code == 0 and hub.writes() == []
    assert "  - figures/old.png\n  - notes.txt\n" in outcome.out
    outcome = push(release, "org/name", "--json")
    assert json.loads(outcome.out)["deleted"] == ["figures/old.png", "notes.txt"]
    assert released(hub).keys() == contents(release).keys()


# ---- The card ----

MINE = "---\nlanguage: de\nlicense: mit\ntags:\n- mine\n---\n# My model\n\nWritten by me.\n"


def test_the_card_keeps_what_a_person_wrote(hub, push, base, release, tmp_path):
    hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES, "README.md": MINE.encode()}, private=True)
    assert push(release).code == 0
    card = released(hub)["README.md"].decode()
    assert card.endswith("\n\n# My model\n\nWritten by me.\n") and "language: de\n" in card and "- mine\n" in card
    generated = (release / "README.md").read_text()
    block = generated[generated.index("<!-- hf-unlearn:begin") :].rstrip("\n")
    assert block in card and "base_model: org/tiny" in card
    # Edited on its page, and released once more
    repository = hub.repository("org/name")
    edited = {**repository.at("main").files, "README.md": card.replace("Written by me.", "Rewritten.").encode()}
    repository.write(edited, "Edit", "refs/heads/main")
    newer = make_small_release(base, tmp_path / "newer", seed=3)
    assert push(newer).code == 0
    second = released(hub)["README.md"].decode()
    assert second.endswith("\n\n# My model\n\nRewritten.\n") and block not in second
    assert hashlib.sha256((newer / "unlearning_report.json").read_bytes()).hexdigest() in second
    hub.requests.clear()
    assert push(newer).code == 0 and hub.writes() == []


def test_what_a_person_wrote_here_and_there(hub, push, release):
    card = (release / "README.md").read_text()
    (release / "README.md").write_text(card + "\n## Notes\n\nWritten here.\n")
    assert push(release).code == 0 and released(hub)["README.md"].decode().endswith("Written here.\n")
    repository = hub.repository("org/name")
    there = released(hub)["README.md"].replace(b"Written here.", b"Written there.")
    repository.write({**repository.at("main").files, "README.md": there}, "Edit", "refs/heads/main")
    hub.requests.clear()
    outcome = push(release)
    assert outcome.code == 2 and "--card-mode" in outcome.err and hub.writes() == []
    assert push(release, "org/name", "--card-mode", "keep").code == 0
    assert ["/tag/" in one.path for one in hub.writes()] == [True]  # of a tree that had none yet
    assert push(release, "org/name", "--card-mode", "new").code == 0
    assert released(hub) == contents(release)
    # These files had a tag before, on another commit
    assert len(repository.tags) == 3 and sum(tag.endswith("-2") for tag in repository.tags) == 1


def test_a_card_of_its_own_pull_request(hub, push, base, release, tmp_path):
    assert push(release).code == 0
    old = released(hub)["README.md"]
    newer = make_small_release(base, tmp_path / "newer", seed=3)
    for _ in range(2):  # the second finds both there
        outcome = push(newer, "org/name", "--card-mode", "pr")
        assert outcome.code == 0, outcome.err
        assert released(hub) == {**contents(newer), "README.md": old}
        assert released(hub, revision="refs/pr/1") == contents(newer)
        assert len(hub.repository("org/name").discussions) == 1


def test_the_merged_card_is_scanned(hub, push, release):
    """What a person wrote there is sent again: it passes the same rules."""
    text = f"# Mine\n\nWritten for {CANARIES['name']}.\n"
    hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES, "README.md": text.encode()}, private=True)
    outcome = push(release)
    assert outcome.code == 1 and "README.md: forget-answer" in outcome.out and hub.writes() == []
    assert_not_repeated(outcome.out + outcome.err, CANARIES["name"])


def test_a_malformed_card(hub, push, release):
    text = "---\nlanguage: [de\n---\n# Mine\n"
    hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES, "README.md": text.encode()}, private=True)
    outcome = push(release)
    assert outcome.code == 2 and "repair" in outcome.err and hub.writes() == []
    assert push(release, "org/name", "--repair-card").code == 0
    assert released(hub)["README.md"].endswith(b"# Mine\n")
    hub.add("models", "org/two", {".gitattributes": GIT_ATTRIBUTES, "README.md": b"\xff\xfe"}, private=True)
    outcome = push(release, "org/two")
    assert outcome.code == 2 and "UTF-8" in outcome.err
    assert push(release, "org/two", "--card-mode", "new").code == 0


def test_a_card_that_cannot_be_read_is_not_replaced(hub, push, release):
    hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES, "README.md": MINE.encode()}, private=True)
    for status, times in ((500, 10), (403, 2)):
        hub.fail("GET", "/resolve/", "before", status, times=times)
        hub.fail("HEAD", "/resolve/", "before", status, times=times)
        hub.requests.clear()
        outcome = push(release)
        hub.faults.clear()
        assert outcome.code == 1 and hub.writes() == [], outcome
        assert outcome.err.count("Error: ") == 1 and "Traceback" not in outcome.err


def test_another_level_of_disclosure(hub, push, base, tmp_path):
    release = make_small_release(base, tmp_path / "public", level="public")
    # A picture that the card of this level does not have, such as one of an earlier report
    (release / "figures").mkdir(exist_ok=True)
    shutil.copyfile(release / "figures" / "footprint.png", release / "figures" / "attacks.png")
    before = contents(release)
    assert "org/people" in before["README.md"].decode()
    outcome = push(release, "org/name", "--disclosure", "count-only")
    assert outcome.code == 0, outcome.out + outcome.err
    there = released(hub)
    assert b"org/people" not in hub.sent() and contents(release) == before
    report = UnlearningReport.from_dict(json.loads(there["unlearning_report.json"]))
    assert report.data.disclosure == "count-only"
    assert hashlib.sha256(there["unlearning_report.json"]).hexdigest().encode() in there["README.md"]
    # As `card build` renders it
    build_card(release, disclosure="count-only", license="mit", model_name="name", mode="new")
    assert contents(release) == there
    assert push(release, "org/two", "--disclosure", "public").code == 2


# ---- Visibility ----


def test_public_comes_last(hub, push, release):
    outcome = push(release, "org/name", "--public")
    assert outcome.code == 0 and "(public)" in outcome.out and not hub.repository("org/name").private
    writes = [(one.method, one.path) for one in hub.writes()]
    assert writes[0] == ("POST", "/api/repos/create") and writes[-1] == ("PUT", "/api/models/org/name/settings")
    assert b'"private"' in hub.writes()[0].body
    assert "/tag/" in writes[-2][1]


def test_a_public_target_needs_the_word(hub, push, release):
    for argv in ((), ("--private",)):
        hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES})
        hub.requests.clear()
        outcome = push(release, "org/name", *argv)
        assert outcome.code == 2 and "--public" in outcome.err and hub.writes() == []
    assert push(release, "org/name", "--public").code == 0
    assert push(release, "org/name", "--public", "--private").code == 2


def test_a_private_repository_with_other_things_is_not_made_public(hub, push, release):
    repository = hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES}, private=True)
    repository.commit({".gitattributes": GIT_ATTRIBUTES, "diary.txt": b"Dear diary"})
    repository.commit({".gitattributes": GIT_ATTRIBUTES})
    hub.requests.clear()
    outcome = push(release, "org/name", "--public")
    assert outcome.code == 2 and "holds more than this release" in outcome.err and hub.writes() == []
    assert push(release).code == 0 and repository.private


# ---- Pull requests and tags ----


def test_a_pull_request(hub, push, release, token):
    hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES, "README.md": b"# Old\n"}, private=True)
    main = hub.repository("org/name").at("main").oid
    outcome = push(release, "org/name", "--pr", "--json")
    assert outcome.code == 0, outcome.err
    receipt = json.loads(outcome.out)
    assert (receipt["revision"], receipt["tag"], receipt["parent"]) == ("refs/pr/1", None, main)
    repository = hub.repository("org/name")
    assert repository.at("main").oid == main and repository.tags == {}
    assert released(hub, revision="refs/pr/1").keys() == contents(release).keys()
    outcome = push(release, "org/name", "--pr", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["commit"] == receipt["commit"]
    assert len(repository.discussions) == 1


def test_a_pull_request_in_a_repository_of_others(hub, push, release):
    """Nobody needs write access for that."""
    hub.add_user("bob")
    hub.add("models", "bob/name", {".gitattributes": GIT_ATTRIBUTES})
    outcome = push(release, "bob/name", "--pr", "--public")
    assert outcome.code == 0, outcome.err
    assert released(hub, "bob/name", "refs/pr/1") == contents(release)
    assert push(release, "bob/other", "--pr").code == 1  # which does not exist
    assert push(release, "org/other", "--pr").code == 2


def test_a_tag_that_is_taken(hub, push, release):
    repository = hub.add("models", "org/name", {".gitattributes": GIT_ATTRIBUTES}, private=True)
    repository.refs["refs/tags/v1"] = repository.at("main").oid
    state = hub.state()
    hub.requests.clear()
    outcome = push(release, "org/name", "--tag", "v1")
    assert outcome.code == 2 and "--tag" in outcome.err
    assert hub.state() == state and hub.writes() == []
    assert push(release, "org/name", "--tag", "v2").code == 0 and set(repository.tags) == {"v1", "v2"}


# ---- What the gate blocks ----

PLACES = {
    "card": lambda folder, text: (folder / "README.md").write_text(
        (folder / "README.md").read_text() + f"\nFor {text}.\n"
    ),
    "report": lambda folder, text: edit_json(folder / "unlearning_report.json", note=text),
    "config": lambda folder, text: edit_json(folder / "config.json", note=text),
    "file name": lambda folder, text: (folder / f"{slug(text)}.py").write_text("pass\n"),
    "another file": lambda folder, text: (folder / "data.jsonl").write_text(json.dumps({"answer": text})),
    "hidden file": lambda folder, text: (folder / ".notes").write_text(text),
    "pickle": lambda folder, text: (folder / "training_args.bin").write_bytes(b"\x80\x04" + text.encode()),
}
ARGUMENTS = {
    "message": lambda text: ("org/name", "--message", f"Forget {text}"),
    "tag": lambda text: ("org/name", "--tag", slug(text)),
    "repository": lambda text: (f"org/{slug(text)}",),
}


@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_asked_where_a_file_is_blocked(hub, push, release, place):
    for kind in ("name", "phone", "sentence"):
        folder = release.parent / kind
        shutil.copytree(release, folder)
        PLACES[place](folder, CANARIES[kind])
        outcome = push(folder)
        assert outcome.code == 1 and outcome.out.startswith("Blocked:"), outcome
        assert hub.requests == []
        assert_not_repeated(outcome.out + outcome.err, CANARIES[kind])


@pytest.mark.parametrize("place", ARGUMENTS)
def test_nothing_is_asked_where_a_name_is_blocked(hub, push, release, place):
    for kind in ("name", "phone"):
        outcome = push(release, *ARGUMENTS[place](CANARIES[kind]))
        assert outcome.code == 1 and hub.requests == []
        assert_not_repeated(outcome.out + outcome.err, CANARIES[kind])


def test_what_is_let_through_is_in_the_receipt(hub, push, release):
    (release / "figures").mkdir(exist_ok=True)
    (release / "README.md").write_text((release / "README.md").read_text() + f"\nFor {CANARIES['name']}.\n")
    outcome = push(release, "org/name", "--json")
    blocked = json.loads(outcome.out)
    assert outcome.code == 1 and not blocked["passed"]
    allow = [
        word
        for finding in blocked["blocking"]
        for word in ("--allow", f"{finding['rule']}:{finding['file']}:{finding['match_sha256'][:8]}")
    ]
    assert hub.requests == []
    outcome = push(release, "org/name", "--json", *allow)
    assert outcome.code == 0, outcome.out
    receipt = json.loads(outcome.out)
    assert [one["rule"] for one in receipt["allowed"]] == [one["rule"] for one in blocked["blocking"]]
    assert_not_repeated(outcome.out + outcome.err, CANARIES["name"])


def test_a_secret_of_this_machine(hub, push, release):
    (release / "README.md").write_text((release / "README.md").read_text() + "\nUse swordfish-7731-pelican.\n")
    outcome = push(release, environment={"SERVICE_API_KEY": "swordfish-7731-pelican"})
    assert outcome.code == 1 and "secret-environment" in outcome.out and hub.requests == []
    assert push(release).code == 0


# ---- Bad input ----


def test_bad_input(hub, push, release, tmp_path):
    reader = hub.add_user("carol", role="read")
    hub.add_user("bob")
    hub.add("models", "bob/public", {".gitattributes": GIT_ATTRIBUTES})
    hub.add("models", "bob/private", {".gitattributes": GIT_ATTRIBUTES}, private=True)
    state = hub.state()
    cases = [
        ({"repo_id": "a name"}, 2, "OWNER/NAME"),
        ({"repo_id": "name"}, 2, "OWNER/NAME"),
        ({"repo_id": "org/a--name"}, 2, "OWNER/NAME"),
        ({"repo_id": "../name"}, 2, "OWNER/NAME"),
        ({"token": ""}, 2, "hf auth login"),
        ({"token": "hf_nobody"}, 1, "does not know this token"),
        ({"token": reader}, 1, "may not create it"),
        ({"repo_id": "bob/new"}, 1, "may not create it"),
        ({"repo_id": "bob/private"}, 1, "may not create it"),
        ({"repo_id": "bob/public", "argv": ["--public"]}, 1, "may not do that"),
        ({"argv": ["--receipt", release / "receipt.json"]}, 2, "outside"),
        ({"argv": ["--receipt", tmp_path / "none" / "receipt.json"]}, 2, "--receipt"),
        ({"argv": ["--pr", "--tag", "v1"]}, 2, "no tag"),
        ({"argv": ["--allow", "not a rule"]}, 2, "RULE"),
        ({"argv": ["--card-mode", "other"]}, 2, "--help"),
        ({"folder": tmp_path / "none"}, 2, "DIR"),
    ]
    for case, code, words in cases:
        arguments = {"folder": release, "repo_id": "org/name", **case}
        argv = arguments.pop("argv", [])
        outcome = push(arguments.pop("folder"), arguments.pop("repo_id"), *argv, **arguments)
        message = outcome.err[outcome.err.index("Error: ") :].splitlines()[0]
        assert (outcome.code, outcome.out) == (code, "") and words in message, (case, outcome)
        assert message.count(". ") == 0 or "--help" in message, message
        assert "Traceback" not in outcome.err and hub.writes() == [], case
    assert hub.state() == state


def test_a_token_on_the_command_line(hub, push, release, token):
    outcome = push(release, "org/name", "--token", token, token="")
    assert outcome.code == 0 and outcome.err.count("Warning: ") == 1
    assert token not in outcome.err + outcome.out


def test_a_dry_run(hub, push, release):
    outcome = push(release, "org/name", "--dry-run")
    assert outcome.code == 0 and outcome.out.startswith("Nothing was sent. org/name (new, private) would get:")
    assert all(f"  + {path}\n" in outcome.out for path in contents(release))
    outcome = push(release, "org/name", "--dry-run", "--json", token="")
    receipt = json.loads(outcome.out)
    assert receipt["dry_run"] and receipt["commit"] is None and receipt["checks"] == ["gate"]
    assert hub.writes() == [] and hub.repositories == {}
    (release / "notes.txt").write_text("notes")
    assert push(release, "org/name", "--dry-run").code == 1


def test_shards(hub, push, tmp_path):
    base = make_small_base(tmp_path / "sharded", shards=3)
    release = make_small_release(base, tmp_path / "of shards")
    outcome = push(release, base=base)
    assert outcome.code == 0, outcome.out + outcome.err
    assert released(hub) == contents(release)
    assert len(re.findall(r"/_lfs/", " ".join(one.path for one in hub.requests))) == 3


def test_a_gitignore_of_the_repository(hub, push, release):
    """The Hub leaves files out of a commit that it names: main would hold half a release."""
    files = {".gitattributes": GIT_ATTRIBUTES, ".gitignore": b"*.safetensors\n"}
    hub.add("models", "org/name", files, private=True)
    outcome = push(release)
    assert outcome.code == 2 and ".gitignore" in outcome.err and hub.writes() == []
