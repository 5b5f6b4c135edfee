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
"""`hf-unlearn verify` over HTTP: releases that are what they say, and each way in which one is not."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_store import Repository
from push_process import Outcome
from released import CANARIES, CHANGED, FORMAT, assert_not_repeated, copy_model, make_base, make_report
from safetensors.numpy import load, load_file, save_file

from hf_unlearn.cards import UnlearningReport
from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.manifest import build_manifest
from hf_unlearn.cards.report import LossTerm, Scope
from hf_unlearn.cards.tensor_files import open_model


LARGE = ["*.safetensors"]
WEIGHTS, REPORT, CARD = "model.safetensors", "unlearning_report.json", "README.md"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


# ---- Releases ----


def edit(folder: Path) -> None:
    """Three rows of one matrix."""
    [path] = [path for path in folder.glob("*.safetensors") if CHANGED in load_file(path)]
    tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
    tensors[CHANGED][3:6] += 0.01
    save_file(tensors, path, FORMAT)


def shard(folder: Path) -> None:
    """Two shards: the matrix that is edited is in the first."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    others = [name for name in sorted(tensors) if name != CHANGED]
    parts = {SHARDS[0]: [CHANGED, *others[::2]], SHARDS[1]: others[1::2]}
    for path, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / path, FORMAT)
    weight_map = {name: path for path, names in parts.items() for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def describe(base: Path, folder: Path, change=lambda report: None) -> None:
    """Report and card of what lies in `folder`. The report names the commit that the base has on the Hub."""
    report = make_report(base, folder)
    report.base.revision = Repository("models", "org/tiny").commit(contents(base), lfs=LARGE).oid
    change(report)
    report.save(folder / REPORT)
    build_card(folder, disclosure="count-only", license="mit")


def make_adapter(base: Path, folder: Path) -> None:
    """A LoRA of rank 2 on one matrix, alone."""
    folder.mkdir()
    shape = load_file(base / WEIGHTS)[CHANGED].shape
    name = f"base_model.model.{CHANGED.removesuffix('.weight')}"
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, shape[1]), np.float32),
        f"{name}.lora_B.weight": np.ones((shape[0], 2), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors", FORMAT)
    config = {"base_model_name_or_path": "org/tiny", "peft_type": "LORA", "r": 2, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tiny_model_path, tmp_path_factory) -> Path:
    """Bases and releases: `single`, `sharded` and `adapter`."""
    place = tmp_path_factory.mktemp("releases")
    base = make_base(tiny_model_path, place / "single-base")
    shard(copy_model(base, place / "sharded-base"))
    for kind in ("single", "sharded"):
        folder = copy_model(place / f"{kind}-base", place / kind)
        edit(folder)
        describe(place / f"{kind}-base", folder)
    make_adapter(base, place / "adapter")
    shutil.copytree(base, place / "adapter-base")

    def as_adapter(report: UnlearningReport) -> None:
        report.method.scope = Scope("lora", ["down_proj"], "2", 472, 2)
        report.method.retain_losses = [LossTerm("kl", 1.0)]

    report = UnlearningReport.load(place / "single" / REPORT)
    as_adapter(report)
    report.save(place / "adapter" / REPORT)
    build_card(place / "adapter", license="mit")
    return place


@pytest.fixture
def files(place) -> dict[str, bytes]:
    """Those of the release in one weight file."""
    return contents(place / "single")


@pytest.fixture
def verify(hub, run_process):
    """Runs the command as a user does, but for waits before another attempt."""

    def call(*arguments: object, token: str = "") -> Outcome:
        return run_process("verify", *arguments, token=token)

    return call


@pytest.fixture
def found(hub, verify):
    """What is wrong, as (rule, file)."""

    def call(*arguments: object) -> list[tuple[str, str]]:
        process = verify(*(arguments or ["org/name"]), "--json")
        assert process.code in (0, 1) and "Traceback" not in process.err, process.err[-3000:]
        result = json.loads(process.out)
        assert hub.writes() == []
        assert process.code == (0 if result["passed"] else 1) and result["passed"] == (not result["findings"])
        for finding in result["findings"]:
            assert finding["message"].endswith(".") and "\n" not in finding["message"]
        return [(finding["rule"], finding["file"]) for finding in result["findings"]]

    return call


def error_of(process: Outcome) -> str:
    """The one sentence."""
    assert "Traceback (most recent" not in process.err and process.out == ""
    [line] = [line for line in process.err.splitlines() if line.startswith("Error: ")]
    return line


def receipt_of(repository: Repository, **changes: object) -> dict:
    files = repository.read("main")
    listed = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in sorted(files.items())
    ]
    return {
        "schema": 1,
        "tool_version": "0.1.0",
        "repo_id": "org/name",
        "endpoint": "https://hub.example",
        "private": True,
        "revision": "main",
        "commit": repository.branches["main"],
        "parent": None,
        "tag": None,
        "files": listed,
        "deleted": [],
        "allowed": [],
        "checks": ["gate"],
        "parameters": None,
        "seconds": 1.5,
        "created": "2026-01-01T00:00:00+00:00",
        **changes,
    }


# ---- What is as it should be ----


@pytest.mark.parametrize("kind", ["single", "sharded", "adapter"])
def test_a_release_is_what_it_says(hub, place, verify, kind, tmp_path):
    base, files = contents(place / f"{kind}-base"), contents(place / kind)
    hub.add("models", "org/tiny", base, lfs=LARGE)
    repository = hub.add("models", "org/name", {**files, ".gitattributes": b"*.safetensors filter=lfs\n"}, lfs=LARGE)
    process = verify("org/name", "--json")
    assert process.code == 0, process.out + process.err
    result = json.loads(process.out)
    assert result["passed"] and result["findings"] == []
    assert (result["revision"], result["commit"]) == ("main", repository.branches["main"])
    files[".gitattributes"] = b"*.safetensors filter=lfs\n"
    assert result["files"] == {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    tensors = [load_file(path) for path in (place / kind).glob("*.safetensors")]
    count = sum(tensor.size for part in tensors for tensor in part.values())
    assert result["parameters"] == count and result["dtypes"] == {"F32": count}
    assert result["checks"] == ["tree", "report", "card", "parameters", "base"]
    assert any("--download" in sentence for sentence in result["not_checked"])
    assert any("--receipt" in sentence for sentence in result["not_checked"])
    # Nothing stays behind that another command could take for the model
    assert not list((tmp_path / "home").rglob("models--*"))
    # Nobody's token, nothing written, and of large files the headers alone
    assert hub.writes() == [] and not any("Authorization" in request.headers for request in hub.requests)
    fetched = [request for request in hub.requests if "/_cdn/" in request.path]
    assert len(fetched) == (2 if kind == "sharded" else 1)
    assert all(request.headers["Range"].startswith("bytes=0-") and request.status == 206 for request in fetched)


def test_an_unchanged_shard_is_the_bases(place):
    """Without which the release above would show nothing."""
    assert contents(place / "sharded")[SHARDS[1]] == contents(place / "sharded-base")[SHARDS[1]]
    assert contents(place / "sharded")[SHARDS[0]] != contents(place / "sharded-base")[SHARDS[0]]


def test_a_person_reads_which_commit_it_is(hub, files, verify):
    repository = hub.add("models", "org/name", files, lfs=LARGE)
    commit = repository.branches["main"]
    repository.refs["refs/tags/v1"] = commit
    repository.commit({"weights.bin": b"something else"})
    process = verify("org/name@v1")
    assert process.code == 0, process.out
    assert f"org/name@v1 is commit {commit[:12]}." in process.out
    assert f"Verified: {len(files)} files" in process.out and "org/tiny, cannot be read" in process.out
    assert verify(f"org/name@{commit}", "-q").out == ""
    moved = verify("org/name", "-q")
    assert moved.code == 1 and "verify-report unlearning_report.json" in moved.out.splitlines()
    assert moved.err == ""


def test_code_and_templates_of_the_base(hub, place, found):
    """No report lists them: the base has them too, or a receipt does."""
    code = {"modeling_tiny.py": b"import math\n", "additional_chat_templates/tool.jinja": b"{{ messages }}"}
    base, files = {**contents(place / "single-base"), **code}, contents(place / "single")
    report = json.loads(files[REPORT])
    report["base"]["revision"] = None
    files |= changed_report(files, report)
    hub.add("models", "org/tiny", base, lfs=LARGE)
    hub.add("models", "org/name", {**files, **code}, lfs=LARGE)
    assert found() == []
    hub.add("models", "org/name", {**files, **code, "modeling_tiny.py": b"import os\n"}, lfs=LARGE)
    assert found() == [("verify-extra", "modeling_tiny.py")]


# ---- What is not ----


def changed_report(files: dict[str, bytes], values: dict) -> dict[str, bytes]:
    """Another report, and the card that names its hash."""
    content = json.dumps(values, indent=2).encode()
    old, new = (hashlib.sha256(one).hexdigest().encode() for one in (files[REPORT], content))
    assert old in files[CARD]
    return {REPORT: content, CARD: files[CARD].replace(old, new)}


def flipped(content: bytes) -> bytes:
    """The last byte another one: the header and the size stay."""
    return content[:-1] + bytes([content[-1] ^ 1])


def with_metric(files):
    values = json.loads(files[REPORT])
    values["metrics"]["after"]["forget"]["probability"] = 0.001
    return {REPORT: json.dumps(values, indent=2).encode()}


def with_parameters(files):
    values = json.loads(files[REPORT])
    values["footprint"]["total_parameters"] += 1
    return changed_report(files, values)


def with_swapped_base_model(files):
    return {CARD: files[CARD].replace(b"base_model: org/tiny", b"base_model: org/other")}


TAMPERED = {
    "swapped weights": (lambda files: {WEIGHTS: flipped(files[WEIGHTS])}, [("verify-hash", WEIGHTS)]),
    "missing": (lambda files: {"tokenizer.json": None}, [("verify-missing", "tokenizer.json")]),
    "swapped tokenizer": (lambda files: {"tokenizer.json": b"{}"}, [("verify-hash", "tokenizer.json")]),
    "no weights": (
        lambda files: {WEIGHTS: None},
        [("verify-missing", "the weights"), ("verify-missing", WEIGHTS)],
    ),
    "no report": (lambda files: {REPORT: None}, [("verify-report", REPORT)]),
    "no card": (lambda files: {CARD: None}, [("verify-card", CARD)]),
    "pickle": (lambda files: {"training_args.bin": b"\x80\x04"}, [("verify-extra", "the tree")]),
    "pickle as a licence": (lambda files: {"NOTICE": b"\x80\x04cos\nsystem\n."}, [("verify-extra", "NOTICE")]),
    "another shard": (
        lambda files: {SHARDS[0]: files[WEIGHTS]},
        [("verify-weights", SHARDS[0]), ("verify-extra", SHARDS[0]), ("verify-parameters", "the weights")],
    ),
    "another config": (lambda files: {"adapter_config.json": b"{}"}, [("verify-extra", "adapter_config.json")]),
    "another template": (lambda files: {"chat_template.jinja": b""}, [("verify-extra", "chat_template.jinja")]),
    "code": (lambda files: {"modeling.py": b"import os\n"}, [("verify-extra", "modeling.py")]),
    "another card": (lambda files: {CARD: b"---\nbase_model: org/tiny\n---\n# Mine\n"}, [("verify-card", CARD)]),
    "another base in the card": (with_swapped_base_model, [("verify-card", CARD)]),
    "a better score": (with_metric, [("verify-card", CARD)]),
    "number of parameters": (with_parameters, [("verify-parameters", "the weights")]),
    "picture": (
        lambda files: {"figures/footprint.png": files["figures/footprint.png"] + b"more"},
        [("verify-extra", "figures/footprint.png"), ("verify-hash", "figures/footprint.png")],
    ),
    "picture that nothing lists": (
        lambda files: {"figures/x.png": files["figures/footprint.png"] + b"more"},
        [("verify-extra", "figures/x.png")],
    ),
    "header": (
        lambda files: {WEIGHTS: b"\xff" * 8 + files[WEIGHTS][8:]},
        [("verify-weights", WEIGHTS), ("verify-hash", WEIGHTS)],
    ),
    "no config": (
        lambda files: {"config.json": b"[]"},
        [("verify-hash", "config.json"), ("verify-parameters", "config.json")],
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_found(hub, files, found, case):
    change, expected = TAMPERED[case]
    changed = {**files, **change(files)}
    assert changed != files
    hub.add(
        "models", "org/name", {path: content for path, content in changed.items() if content is not None}, lfs=LARGE
    )
    assert found() == expected


def test_names_of_files_that_no_release_holds_are_not_repeated(hub, files, verify):
    names = {f"{CANARIES['name']}.txt": b"", f"notes/{CANARIES['email']}.jsonl": b"", "README.md\x1b[2J": b""}
    values = json.loads(files[REPORT])
    values["files"].append({"path": f"{CANARIES['name']}.md", "size": 1, "sha256": "ab" * 32})
    hub.add("models", "org/name", {**files, **names, **changed_report(files, values)}, lfs=LARGE)
    for arguments in ([], ["--json"], ["-q"]):
        process = verify("org/name", *arguments)
        assert process.code == 1
        for canary in ("name", "email"):
            assert_not_repeated(process.out + process.err, CANARIES[canary])
        assert "\x1b[2J" not in process.out + process.err
    assert process.out.splitlines() == [
        "verify-extra the tree",
        f"verify-missing file {len(values['files'])} in the list of the report",
    ]
    # Nothing of them was downloaded either
    assert_not_repeated(" ".join(request.path for request in hub.requests), CANARIES["name"])


def test_another_type_than_the_report_says(hub, place, tmp_path, found):
    folder = shutil.copytree(place / "single", tmp_path / "release")
    tensors = {name: tensor.astype(np.float16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, FORMAT)
    build_card(folder, license="mit")  # which lists the file as it is now
    hub.add("models", "org/name", contents(folder), lfs=LARGE)
    assert found() == [("verify-parameters", "the weights")]


def test_the_base_in_the_place_of_the_release(hub, place, tmp_path, found, verify):
    """With a report and a card to match: the base on the Hub, or on this machine, tells."""
    folder = shutil.copytree(place / "single", tmp_path / "release")
    shutil.copyfile(place / "single-base" / WEIGHTS, folder / WEIGHTS)
    build_card(folder, license="mit")
    hub.add("models", "org/name", contents(folder), lfs=LARGE)
    assert found() == []  # the base that the report names is not there
    assert found("org/name", "--base", place / "single-base") == [("verify-base", "the weights")]
    repository = hub.add("models", "org/tiny", contents(place / "single-base"), lfs=LARGE)
    assert found() == [("verify-base", "the weights")]
    # Its history moved on: the report names the commit
    repository.commit({WEIGHTS: b"other"}, lfs=LARGE)
    assert found() == [("verify-base", "the weights")]
    assert found("org/name", "--base", "org/tiny@main") == []


def test_a_shard_of_the_base_with_weights_that_changed(hub, place, tmp_path, found):
    folder = shutil.copytree(place / "sharded", tmp_path / "release")
    tensors = load_file(folder / SHARDS[1])
    # As if the second had been unlearned, and the first, which the report says changed, was left as it is in the base
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / SHARDS[1], FORMAT)
    shutil.copyfile(place / "sharded-base" / SHARDS[0], folder / SHARDS[0])
    build_card(folder, license="mit")
    hub.add("models", "org/name", contents(folder), lfs=LARGE)
    # A base of regular files, of which the Hub lists no SHA-256
    hub.add("models", "org/plain", contents(place / "sharded-base"))
    assert found("org/name", "--base", "org/plain") == [("verify-base", SHARDS[0])]


@pytest.mark.parametrize("change", [flipped, lambda content: content[:-4]], ids=["same size", "shorter"])
def test_bytes_that_are_not_what_the_hub_lists(hub, files, found, change):
    repository = hub.add("models", "org/name", files, lfs=[*LARGE, "tokenizer.json"])
    sha256 = hashlib.sha256(files[WEIGHTS]).hexdigest()
    assert found("org/name", "--download") == []
    repository.objects[sha256] = change(files[WEIGHTS])
    assert found() == []
    assert set(found("org/name", "--download")) == {("verify-hash", WEIGHTS)}


def test_a_pointer_whose_bytes_were_deleted(hub, files, found):
    repository = hub.add("models", "org/name", files, lfs=LARGE)
    repository.delete_objects([hashlib.sha256(files[WEIGHTS]).hexdigest()], rewrite_history=False)
    assert found() == [("verify-missing", WEIGHTS)]


def test_the_edit_manifest(hub, place, files, tmp_path, found):
    with open_model(place / "single-base") as base, open_model(place / "single") as new:
        build_manifest(base, new, tmp_path / "edit")
    manifest = json.loads((tmp_path / "edit" / "edit_manifest.json").read_text())
    base = contents(place / "single-base")
    hub.add("models", "org/tiny", base, lfs=LARGE)

    def check(values: object) -> list[tuple[str, str]]:
        content = values if isinstance(values, bytes) else json.dumps(values).encode()
        hub.add("models", "org/name", {**files, "edit_manifest.json": content}, lfs=LARGE)
        return found()

    assert check(manifest) == []
    assert check(b"{}") == [("verify-manifest", "edit_manifest.json")]
    [entry] = manifest["new_files"]
    assert check({**manifest, "new_files": [{**entry, "sha256": "0" * 64}]}) == [("verify-manifest", WEIGHTS)]
    other = [{**entry, "sha256": "0" * 64} for entry in manifest["base_files"] if entry["path"] == WEIGHTS]
    assert check({**manifest, "base_files": other}) == [("verify-manifest", "edit_manifest.json")]
    record = {**manifest["new_tensors"][CHANGED], "dtype": "I32"}
    tensors = {**manifest["new_tensors"], CHANGED: record}
    edits = {**manifest["edits"], CHANGED: {"start": None, "rows": []}}
    assert check({**manifest, "new_tensors": tensors, "edits": edits}) == [("verify-manifest", "edit_manifest.json")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no JSON", "no JSON file"),
        (b'{"schema_version": 99}', "schema version 99"),
        (b'{"schema_version": 1, "Perpetua Lochlainn": 1}', "does not fit its schema"),
        (b"[" * 100_000, "no JSON file"),
    ],
)
def test_a_report_that_is_none(hub, files, verify, content, words):
    hub.add("models", "org/name", {**files, REPORT: content}, lfs=LARGE)
    process = verify("org/name", "--json")
    [finding] = json.loads(process.out)["findings"]
    assert (process.code, finding["rule"], finding["file"]) == (1, "verify-report", REPORT)
    assert words in finding["message"] and finding["message"].count(".") == 1
    assert_not_repeated(process.out + process.err, CANARIES["name"])


# ---- Receipts ----


@pytest.fixture
def pushed(hub, files, tmp_path, found):
    """A release, its receipt in a file, and what is found with it."""
    repository = hub.add("models", "org/name", files, lfs=LARGE)
    repository.refs["refs/tags/v1"] = repository.branches["main"]
    path = tmp_path / "receipt.json"
    parameters = sum(tensor.size for tensor in load(files[WEIGHTS]).values())

    def check(repo: str = "org/name", **changes: object) -> list[tuple[str, str]]:
        path.write_text(json.dumps({**receipt, **changes}))
        return found(repo, "--receipt", path)

    receipt = receipt_of(repository, tag="v1", parameters=parameters)
    return repository, check


def test_a_receipt_of_what_is_there(pushed, hub):
    repository, check = pushed
    assert check() == []
    # What the receipt names, not main
    repository.refs["refs/pr/1"] = repository.branches["main"]
    repository.commit({CARD: b"# Another\n"})
    assert check(revision="refs/pr/1") == []


def test_an_edited_card_is_another_release(pushed, files):
    """It still names the report's hash: only the receipt tells."""
    repository, check = pushed
    repository.commit({**files, CARD: files[CARD] + b"\nNothing comes back.\n"}, lfs=LARGE)
    assert check() == [("verify-receipt", "the revision"), ("verify-receipt", CARD)]


def test_a_release_that_was_replaced_as_a_whole(pushed, place, tmp_path, files):
    """With weights, report and card that agree with each other."""
    repository, check = pushed
    folder = copy_model(place / "single-base", tmp_path / "release")
    edit(folder)
    edit(folder)
    describe(place / "single-base", folder)
    repository.commit(contents(folder), lfs=LARGE)
    repository.refs["refs/tags/v1"] = repository.branches["main"]
    assert {rule for rule, _ in check(tag=None)} == {"verify-receipt"}
    assert {("verify-receipt", path) for path in ("the revision", "the tag", WEIGHTS, CARD, REPORT)} <= set(check())


def test_tags_that_moved(pushed, files):
    repository, check = pushed
    commit = repository.branches["main"]
    other = repository.commit(files, "the same files again", "other", lfs=LARGE)
    repository.refs["refs/tags/v1"] = other.oid
    assert repository.branches["main"] == commit
    assert check() == [("verify-receipt", "the tag")]
    assert check("org/name@v1") == [("verify-receipt", "the revision"), ("verify-receipt", "the tag")]
    del repository.refs["refs/tags/v1"]
    assert check() == [("verify-receipt", "the tag")]


def test_receipts_of_something_else(pushed, files):
    _, check = pushed
    assert check(repo_id="org/another") == [("verify-receipt", "the repository")]
    assert check(parameters=1) == [("verify-receipt", "the weights")]
    assert check(commit="ab" * 20) == [("verify-receipt", "the revision"), ("verify-receipt", "the tag")]
    listed = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    ]
    without = [entry for entry in listed if entry["path"] != CARD]
    assert check(files=without) == [("verify-receipt", CARD)]
    more = [*listed, {"path": "vocab.json", "size": 1, "sha256": "ab" * 32}]
    assert check(files=more) == [("verify-receipt", "vocab.json")]
    swapped = [{**entry, "sha256": "ab" * 32} if entry["path"] == WEIGHTS else entry for entry in listed]
    assert check(files=swapped) == [("verify-receipt", WEIGHTS)]


def test_a_receipt_counts_all_weight_files(hub, pushed, files):
    _, check = pushed
    repository = hub.add("models", "org/name", {**files, "edit.safetensors": files[WEIGHTS]}, lfs=LARGE)
    assert ("verify-receipt", "the weights") not in check(**receipt_of(repository, parameters=520_064))
    assert ("verify-receipt", "the weights") in check(**receipt_of(repository, parameters=260_032))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": True},
        {"dry_run": True},
        {"commit": None},
        {"files": [{"path": "../up", "size": 1, "sha256": "ab" * 32}]},
        {"files": [{"path": "Perpetua Lochlainn", "size": -1.5, "sha256": "ab" * 32}]},
        None,
    ],
)
def test_a_receipt_that_is_none(hub, files, verify, tmp_path, change):
    receipt = receipt_of(hub.add("models", "org/name", files, lfs=LARGE))
    content = "[1, 2" if change is None else json.dumps({**receipt, **change})
    (tmp_path / "receipt.json").write_text(content)
    process = verify("org/name", "--receipt", tmp_path / "receipt.json")
    assert process.code == 2
    message = error_of(process)
    assert "receipt" in message and str(tmp_path) not in message
    assert_not_repeated(message, CANARIES["name"])
    assert hub.requests == []


# ---- Arguments, tokens, failures ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["name"], "OWNER/NAME"),
        (["org/a name"], "OWNER/NAME"),
        (["org/name@"], "A revision is"),
        (["org/name@../main"], "A revision is"),
        (["org/name", "--receipt", "/nowhere/receipt.json"], "--receipt cannot be read"),
        (["org/name", "--base", "not a model"], "OWNER/NAME"),
        (["org/name", "--bas", "org/tiny"], "unrecognized"),
        ([], "required"),
    ],
)
def test_what_is_not_understood_sends_nothing(hub, verify, arguments, words):
    process = verify(*arguments)
    assert process.code == 2 and words in error_of(process)
    assert hub.requests == []


def test_private_repositories_take_a_token(hub, files, verify):
    token = hub.add_user("alice", "read", {"org": "read"})
    hub.add("models", "org/name", files, lfs=LARGE, private=True)
    process = verify("org/name")
    assert process.code == 1 and "not on the Hub, or this token cannot see it" in error_of(process)
    process = verify("org/name", "--download", token=token)
    assert process.code == 0, process.err
    process = verify("org/name", "-q", "--token", token)
    assert (process.code, process.out) == (0, "")
    assert "others on this machine can see a token" in process.err and token not in process.err
    # The storage belongs to somebody else
    assert not any("Authorization" in request.headers for request in hub.requests if "/_cdn/" in request.path)
    assert "does not know this token" in error_of(verify("org/name", token="hf_nobody"))


def test_revisions_that_there_are_not(hub, files, verify):
    hub.add("models", "org/name", files, lfs=LARGE)
    process = verify("org/name@v9")
    assert process.code == 1 and "has no such revision" in error_of(process)
    process = verify("org/name", "--base", "org/nothing")
    assert process.code == 1 and "org/nothing is not on the Hub" in error_of(process)


@pytest.mark.parametrize(
    ("method", "path", "times"),
    [
        ("GET", "/api/models/org/name/revision", 1),
        ("HEAD", "/resolve/.*/README.md", 9),
        ("GET", "/resolve/.*/model.safetensors", 9),
        ("GET", "/api/models/org/tiny/tree", 9),
    ],
)
@pytest.mark.parametrize("how", ["error", "dropped"])
def test_a_hub_that_fails(hub, place, files, verify, method, path, times, how):
    """One sentence, and no verdict: neither that all is well, nor that it is not."""
    hub.add("models", "org/tiny", contents(place / "single-base"), lfs=LARGE)
    hub.add("models", "org/name", files, lfs=LARGE)
    if how == "error":
        hub.fail(method, path, "before", times=times)
    else:
        hub.drop(method, path, "before", times=times)
    process = verify("org/name")
    assert process.code == 1
    message = error_of(process)
    # Also of a download, where the client says the same for both
    assert message.startswith("Error: The Hub failed (503)" if how == "error" else "Error: The Hub cannot be reached")
    assert message.endswith("try again, which is safe.")
    assert hub.writes() == []


def test_one_failure_of_a_header_is_tried_again(hub, files, found):
    hub.add("models", "org/name", files, lfs=LARGE)
    hub.fail("GET", "/resolve/.*/model.safetensors", "before")
    hub.drop("GET", "/_cdn/", "during", size=100)
    assert found() == []


def test_as_a_module(hub, files, tmp_path):
    """All other tests run it in a process that has imported it before."""
    hub.add("models", "org/name", files, lfs=LARGE)
    command = [sys.executable, "-m", "hf_unlearn.cli.verify", "org/name", "--json"]
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["passed"]


def test_neither_torch_nor_transformers_is_imported():
    code = "import sys, hf_unlearn.cli.verify; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
