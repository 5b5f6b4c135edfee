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
"""`hf-unlearn audit` over HTTP: every place where a repository can still serve the original, and what is none."""

import hashlib
import json

import pytest
from hub_store import Repository
from loopback_hub import LoopbackHub
from push_process import Outcome, PushProcess

from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, FileEntry, UnlearningReport


LARGE = ["*.safetensors", "*.bin", "*.gguf", "large/*"]
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
BASE = {ONE: b"first shard of the base", TWO: b"second shard of the base", "pytorch_model.bin": b"both, pickled"}
# The second shard did not change
RELEASE = {ONE: b"first shard, unlearned", TWO: BASE[TWO]}
ORIGINAL = {name: content for name, content in BASE.items() if name != "pytorch_model.bin"}


def report(files: dict[str, bytes], base_id: str | None = "org/base", revision: str | None = None) -> bytes:
    listed = [FileEntry(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()]
    return (
        UnlearningReport(
            tool_version="0.1.0",
            base=BaseModel(base_id, revision, "LlamaForCausalLM", "llama", 12, "float32"),
            method=None,
            data=Data(DataSummary(rows=4, tokens=100)),
            environment=Environment("3.11.9", "Linux", {"torch": "2.13.0"}, "cpu", 1, 1.0),
            files=listed,
        )
        .to_json()
        .encode()
    )


def release(files: dict[str, bytes] = RELEASE, **options: str | None) -> dict[str, bytes]:
    return {**files, "README.md": b"# A model", "unlearning_report.json": report(files, **options)}


def add_base(hub: LoopbackHub) -> Repository:
    return hub.add("models", "org/base", {**BASE, "config.json": b"{}", "training_args.bin": b"x"}, lfs=LARGE)


def push(repository: Repository, files: dict[str, bytes], branch: str = "main") -> None:
    repository.commit(files, branch=branch, lfs=LARGE)


def tag(repository: Repository, name: str, branch: str = "main") -> None:
    repository.refs[f"refs/tags/{name}"] = repository.branches[branch]


def open_pull_request(repository: Repository, files: dict[str, bytes], lfs: list[str] = LARGE) -> None:
    opened = repository.open_discussion("A change", "", "guest", pull_request=True)
    repository.commit(files, branch=opened.ref, lfs=lfs)


def audit(hub: LoopbackHub, run_process: PushProcess, *arguments: object, token: str | None = None) -> Outcome:
    token = hub.add_user("alice", organizations={"org": "write"}) if token is None else token
    return run_process("audit", *arguments, token=token)


def audited(hub: LoopbackHub, run_process: PushProcess, *arguments: object, token: str | None = None) -> dict:
    """What it prints as JSON; it never writes."""
    result = audit(hub, run_process, "org/model", "--json", "-q", *arguments, token=token)
    assert result.err == "" and hub.writes() == []
    content = json.loads(result.out)
    assert (result.code == 0) is content["clean"] is (content["found"] == [])
    return content


def places(content: dict) -> set[tuple[str, str, int]]:
    """Rule, ref and distance from its tip of all that was found; `-` is no ref."""
    return {
        (one["rule"].removeprefix("history-"), by["ref"].removeprefix("refs/"), by["behind"])
        for one in content["found"]
        for by in one["refs"] or [{"ref": "-", "behind": 0}]
    }


def one_sentence(result: Outcome, code: int) -> str:
    assert (result.code, result.out) == (code, "")
    [line] = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in result.err
    return line


# ---- What is clean ----


def clean_release(repository):
    pass


def earlier_release(repository):
    push(repository, release({ONE: b"another run", TWO: BASE[TWO].upper()}))
    tag(repository, "v1")
    open_pull_request(repository, {**RELEASE, "README.md": b"# Typo"})
    push(repository, release())


def weights_before_their_report(repository):
    push(repository, {ONE: b"new", "model.safetensors.index.json": b"{}"})
    push(repository, release({ONE: b"new", TWO: BASE[TWO]}))


def deleted_for_good(repository):
    """The pointers stay in the history, and nothing is behind them."""
    push(repository, ORIGINAL)
    open_pull_request(repository, {**ORIGINAL, "README.md": b"# Typo"})
    push(repository, release())
    digest = hashlib.sha256(BASE[ONE]).hexdigest()
    repository.delete_objects([digest], rewrite_history=False)


def empty_files(repository):
    """The base may hold an empty file as well: that proves nothing."""
    push(repository, {**RELEASE, "x.safetensors": b""})
    push(repository, release())


@pytest.mark.parametrize(
    "prepare", [clean_release, earlier_release, weights_before_their_report, deleted_for_good, empty_files]
)
@pytest.mark.parametrize("role", ["write", "read"])
def test_clean(hub, run_process, prepare, role):
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    prepare(repository)
    content = audited(hub, run_process, token=hub.add_user("alice", role, {"org": role}))
    assert places(content) == set()
    assert (content["base"]["name"], content["base"]["weight_files"]) == ("org/base", 3)
    assert content["commits"] == len(repository.commits)


# ---- What is found ----


def behind_the_tip(repository):
    push(repository, ORIGINAL)
    push(repository, release())


def at_the_tip(repository):
    push(repository, ORIGINAL)


def tagged(repository):
    push(repository, ORIGINAL, "old")
    tag(repository, "v0", "old")
    del repository.refs["refs/heads/old"]


def on_a_branch(repository):
    push(repository, ORIGINAL, "dev/old")
    push(repository, release(), "dev/old")


def in_a_pull_request(repository):
    open_pull_request(repository, ORIGINAL)


def in_the_past_of_a_pull_request(repository):
    push(repository, ORIGINAL)
    open_pull_request(repository, release())
    push(repository, release())
    # Main was made anew since; the pull request still has its past
    repository.squash("refs/heads/main", "anew", "alice")


def orphaned(repository):
    push(repository, {"pytorch_model.bin": BASE["pytorch_model.bin"]})
    push(repository, release())
    repository.squash("refs/heads/main", "anew", "alice")


def in_another_format(repository):
    push(repository, {"pytorch_model.bin": BASE["pytorch_model.bin"]})
    push(repository, release())


def renamed(repository):
    push(repository, {**release(), "large/notes": BASE[ONE]})


def regular(repository):
    repository.commit(ORIGINAL)
    push(repository, release())


def regular_under_another_name(repository):
    """The Hub lists no SHA-256 of small files, so those that may be weights are looked into."""
    repository.commit({"model.safetensors": BASE[ONE]})
    push(repository, release())


def saved_in_other_shards(repository):
    push(repository, {"model.safetensors": b"".join(ORIGINAL.values())})
    push(repository, release())


def quantized(repository):
    push(repository, {**release(), "q4/model.gguf": b"four bits"})


def packed(repository):
    repository.commit({**release(), "model.zip": b"PK"}, lfs=[*LARGE, "*.zip"])


def with_a_report_of_all(repository):
    """A report that lists the original does not make a release of it."""
    push(repository, release(ORIGINAL))


def with_a_broken_report(repository):
    push(repository, {ONE: b"new", "unlearning_report.json": b'[{"files": '})
    push(repository, {ONE: b"new", "unlearning_report.json": b'{"files": [1, {"sha256": [2]}], "base": 3}'})
    push(repository, release())


def left_behind(repository):
    repository.commit({"training_args.bin": b"a pickle", "checkpoint-5/optimizer.pt": b"state"})
    push(repository, release())


FOUND = [
    (behind_the_tip, {("original", "heads/main", 1)}),
    (at_the_tip, {("original", "heads/main", 0)}),
    (tagged, {("original", "tags/v0", 0)}),
    (on_a_branch, {("original", "heads/dev/old", 1)}),
    (in_a_pull_request, {("original", "pr/1", 0)}),
    (in_the_past_of_a_pull_request, {("original", "pr/1", 1)}),
    (orphaned, {("original", "-", 0)}),
    (in_another_format, {("original", "heads/main", 1)}),
    (renamed, {("original", "heads/main", 0)}),
    (regular, {("original", "heads/main", 1)}),
    (regular_under_another_name, {("original", "heads/main", 1)}),
    (saved_in_other_shards, {("unknown", "heads/main", 1)}),
    (quantized, {("unknown", "heads/main", 0)}),
    (packed, {("unknown", "heads/main", 0)}),
    (with_a_report_of_all, {("original", "heads/main", 0)}),
    (with_a_broken_report, {("unknown", "heads/main", 1)}),
    (left_behind, {("leftover", "heads/main", 1)}),
]


@pytest.mark.parametrize(("prepare", "expected"), FOUND, ids=[prepare.__name__ for prepare, _ in FOUND])
def test_found(hub, run_process, prepare, expected):
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    hub.page_size = 2
    prepare(repository)
    content = audited(hub, run_process)
    assert places(content) == expected
    # A finding for each rule and ref, by which a push is blocked
    findings = {
        (one["rule"].removeprefix("history-"), one["file"].removeprefix("refs/")) for one in content["findings"]
    }
    assert findings == {(rule, ref.replace("-", "large files", ref == "-")) for rule, ref, _ in expected}


def test_what_it_prints(hub, run_process):
    add_base(hub)
    repository = hub.add("models", "org/model", ORIGINAL, lfs=LARGE)
    tag(repository, "v0")
    old = repository.branches["main"]
    push(repository, release())
    result = audit(hub, run_process, "org/model")
    assert result.code == 1
    assert result.out.splitlines() == [
        "org/model: 1 branch, 1 tag; 2 commits, 3 large files.",
        "Looked for 3 weight files of org/base.",
        "",
        "what      ref     where                       since       files",
        f"original  main    1 commit behind ({old[:8]})  2026-01-01  {ONE}",
        f"original  tag v0  its tip ({old[:8]})          2026-01-01  {ONE}",
        "",
        "1 weight file of the original is still served.",
        "Not seen by an audit:",
        "  copies that were downloaded, cloned or cached",
        "  duplicates and forks under other names",
        "  commits that no branch, tag or pull request reaches, but for their large files",
        "  weights that were converted, quantized or packed under a name that says nothing",
    ]
    quiet = audit(hub, run_process, "org/model", "-q")
    assert quiet.out.splitlines() == ["history-original refs/heads/main", "history-original refs/tags/v0"]
    assert (quiet.code, quiet.err) == (1, "")


def test_names_that_can_be_any_text_are_not_repeated(hub, run_process):
    add_base(hub)
    files = {**release(), "large/Ada Lovelace": BASE[ONE], "Ada Lovelace.bin": b"x", "Ada Lovelace.csv": b"y"}
    hub.add("models", "org/model", files, lfs=LARGE).commit(files, title="Ada Lovelace", lfs=LARGE)
    for result in (audit(hub, run_process, "org/model"), audit(hub, run_process, "org/model", "--json")):
        assert result.code == 1 and "Lovelace" not in result.out + result.err
        assert "a file of another name" in result.out and "*.bin" in result.out


def test_a_token_that_only_reads(hub, run_process):
    """It cannot list the large files, and says so; all that a ref reaches is found just the same."""
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    orphaned(repository)
    in_a_pull_request(repository)
    missing = "large files that no branch, tag or pull request reaches: this token may not list them"
    for token in (hub.add_user("bob", "read", {"org": "read"}), hub.add_user("eve"), ""):
        content = audited(hub, run_process, token=token)
        assert places(content) == {("original", "pr/1", 0)}
        assert content["large_files"] is None and content["cannot_see"][0] == missing
    content = audited(hub, run_process)
    assert places(content) == {("original", "pr/1", 0), ("original", "-", 0)}
    assert content["large_files"] == 4 and missing not in content["cannot_see"]


def test_nothing_leaks_to_the_storage(hub, run_process):
    """The storage is asked without the token: the loopback Hub refuses one, which would look as if bytes were gone."""
    add_base(hub)
    repository = hub.add("models", "org/model", release(), lfs=LARGE)
    behind_the_tip(repository)
    audited(hub, run_process, token=hub.add_user("bob", "read", {"org": "read"}))
    asked = [request for request in hub.requests if request.path.startswith("/_cdn/")]
    assert {request.status for request in asked} == {206} and len(asked) == 3
    assert all("Authorization" not in request.headers for request in asked)


# ---- Which base ----


def test_the_base_on_disk(hub, run_process, tmp_path):
    repository = hub.add("models", "org/model", release(base_id=None), lfs=LARGE)
    regular_under_another_name(repository)
    base = tmp_path / "base"
    base.mkdir()
    for name, content in BASE.items():
        (base / name).write_bytes(content)
    # Small files of any name are known by the hash that git gives them
    push(repository, {**release(base_id=None), "notes.txt": BASE["pytorch_model.bin"]})
    content = audited(hub, run_process, "--base", base)
    assert places(content) == {("original", "heads/main", 0), ("original", "heads/main", 2)}
    assert content["base"] == {"name": "a folder", "weight_files": 3}
    # Nothing of this machine's folders in what may be passed on
    assert str(tmp_path) not in json.dumps(content)


def test_the_base_at_a_revision(hub, run_process):
    base = add_base(hub)
    first = base.branches["main"]
    base.commit({"model.safetensors": b"trained further"}, lfs=LARGE)
    repository = hub.add("models", "org/model", release(revision=first), lfs=LARGE)
    behind_the_tip(repository)
    # That of the report is taken; at the base's main the shards are other ones, and those at hand are unknown
    push(repository, release(revision=first))
    assert places(audited(hub, run_process)) == {("original", "heads/main", 2)}
    assert places(audited(hub, run_process, "--base", f"org/base@{first}")) == {("original", "heads/main", 2)}
    assert places(audited(hub, run_process, "--base", "org/base@main")) == {("unknown", "heads/main", 2)}


def test_the_base_that_the_card_names(hub, run_process):
    add_base(hub)
    repository = hub.add("models", "org/model", ORIGINAL, lfs=LARGE)
    card = b"---\nbase_model: org/base\n---\n# A model\n"
    push(repository, {**release(base_id=None), "README.md": card})
    assert audited(hub, run_process)["base"]["name"] == "org/base"


def test_no_base(hub, run_process):
    repository = hub.add("models", "org/model", ORIGINAL, lfs=LARGE)
    push(repository, release(base_id=None))
    content = audited(hub, run_process)
    assert content["base"] is None and places(content) == {("unknown", "heads/main", 1)}
    result = audit(hub, run_process, "org/model")
    assert "No base is known" in result.out and "pass --base" in result.out
    assert "Nothing of the original is served" not in result.out


def test_a_base_that_is_gone(hub, run_process):
    hub.add("models", "org/model", release(), lfs=LARGE)
    message = one_sentence(audit(hub, run_process, "org/model"), 1)
    assert "org/base is not on the Hub" in message and "--base none" in message
    assert audited(hub, run_process, "--base", "none")["clean"]
    hub.add("models", "org/base", {"config.json": b"{}"})
    assert "holds no weights" in one_sentence(audit(hub, run_process, "org/model"), 1)


# ---- What is not understood, and failures ----


def test_usage(hub, run_process, tmp_path):
    for arguments, expected in (
        (["a name"], "OWNER/NAME"),
        (["name"], "OWNER/NAME"),
        (["org/model", "--base", tmp_path / "nothing"], "--base is neither a folder nor"),
        (["org/model", "--yes"], "add --purge"),
        (["org/model", "--all"], "add --purge"),
        (["org/model", "--receipt", tmp_path / "no" / "file"], "--receipt names no file"),
        (["org/model", "--receipt", tmp_path], "--receipt names no file"),
        (["org/model", "--pruge"], "unrecognized arguments"),
        ([], "required"),
    ):
        assert expected in one_sentence(audit(hub, run_process, *arguments), 2)
    assert "There is no token" in one_sentence(audit(hub, run_process, "org/model", "--purge", token=""), 2)
    assert hub.requests == []


def test_a_base_folder_without_weights(hub, run_process, tmp_path):
    hub.add("models", "org/model", release(), lfs=LARGE)
    (tmp_path / "empty").mkdir()
    assert "no weights" in one_sentence(audit(hub, run_process, "org/model", "--base", tmp_path / "empty"), 2)


def test_who_may_not_read(hub, run_process):
    hub.add("models", "org/model", release(), lfs=LARGE, private=True)
    for token in ("", hub.add_user("eve")):
        assert "not on the Hub, or this token cannot see it" in one_sentence(
            audit(hub, run_process, "org/model", token=token), 1
        )
    assert "does not know this token" in one_sentence(audit(hub, run_process, "org/model", token="hf_wrong"), 1)


@pytest.mark.parametrize(
    ("path", "status", "expected"),
    [
        ("/refs$", 503, "The Hub failed (503): try again"),
        ("/refs$", None, "The Hub cannot be reached"),
        # Of these, the client would try again for half a minute
        ("/commits/", 418, "refused the request (418)"),
        ("/tree/", 418, "refused the request (418)"),
        ("/lfs-files$", 418, "refused the request (418)"),
    ],
)
def test_the_hub_fails(hub, run_process, path, status, expected):
    """Nothing that could not be read is taken for clean."""
    add_base(hub)
    hub.add("models", "org/model", release(), lfs=LARGE)
    if status is None:
        hub.drop("GET", path, "before", times=9)
    else:
        hub.fail("GET", path, "before", status, times=9)
    assert expected in one_sentence(audit(hub, run_process, "org/model"), 1)


def test_the_token_on_the_command_line(hub, run_process):
    add_base(hub)
    hub.add("models", "org/model", release(), lfs=LARGE, private=True)
    token = hub.add_user("alice", organizations={"org": "write"})
    result = audit(hub, run_process, "org/model", "--token", token, token="")
    assert result.code == 0 and "others on this machine can see a token on the command line" in result.err
    assert token not in result.out + result.err


def test_the_receipt(hub, run_process, tmp_path):
    add_base(hub)
    hub.add("models", "org/model", release(), lfs=LARGE)
    path = tmp_path / "receipt.json"
    result = audit(hub, run_process, "org/model", "--receipt", path, "--json")
    content = json.loads(path.read_text())
    assert content == json.loads(result.out)
    assert (content["schema"], content["clean"], content["endpoint"]) == (1, True, hub.endpoint)
