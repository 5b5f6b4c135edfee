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
"""The gate as a whole: a forget set's texts, put into everything that leaves, are blocked and not repeated."""

import base64
import dataclasses
import html
import json
import os
import random
import re
import shutil
import zlib
from urllib.parse import quote

import pytest
from released import (
    CANARIES,
    CHANGED,
    FORMAT,
    assert_not_repeated,
    edit_json,
    make_base,
    make_release,
    make_rows,
    slug,
)
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from hf_unlearn.cards import check as check_module
from hf_unlearn.cards.check import Allowance, check_release
from hf_unlearn.cards.leaks import LeakScanner
from hf_unlearn.cards.report import write_text
from hf_unlearn.cards.secrets import scan_paths, scan_secrets


ALL = " and ".join(CANARIES[kind] for kind in ("phone", "name", "address", "email", "sentence", "passage"))


@pytest.fixture(scope="module")
def rows(data_dir):
    rows = make_rows(data_dir)
    assert len(rows) == 500
    return rows


@pytest.fixture(scope="module")
def base(tiny_model_path, tmp_path_factory):
    return make_base(tiny_model_path, tmp_path_factory.mktemp("gate") / "base")


@pytest.fixture(scope="module")
def made(base):
    return make_release(base, base.parent / "release")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "release")


@pytest.fixture(scope="module")
def decoder(base):
    return Tokenizer.from_file(str(base / "tokenizer.json")).decode


@pytest.fixture(scope="module")
def scanner(rows, decoder):
    return LeakScanner(rows, token_decoder=decoder)


@pytest.fixture
def check(folder, base, rows, scanner, monkeypatch):
    """`check_release` with base, rows and names. The forget set is hashed once for all tests, not once for each."""

    def check_folder(**options):
        with monkeypatch.context() as patch:
            patch.setattr(check_module, "LeakScanner", lambda *args, **kwargs: scanner)
            options = {"base": base, "rows": rows, "environment": {}} | options
            return check_release(folder, **options)

    return check_folder


@pytest.fixture(scope="module")
def hashes(scanner):
    """Of each canary, the hashes of its matches."""
    found = {kind: {finding.match_sha256 for finding in scanner.scan("x", text)} for kind, text in CANARIES.items()}
    assert all(found.values())
    return found


def test_a_release_passes(folder, base, rows, decoder):
    names = {
        "the repository's name": "org/tiny-unlearned",
        "the commit message": "Forget some people",
        "the tag": "v1",
    }
    result = check_release(folder, base=base, rows=rows, token_decoder=decoder, names=names, environment={})
    assert (result.blocking, result.allowed, result.passed) == ([], [], True)
    assert sorted(result.files) == sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def append(path, text):
    write_text(path, path.read_text() + f"\n{text}\n")


def front_matter(folder, text):
    card = (folder / "README.md").read_text()
    write_text(folder / "README.md", card.replace("tags:\n", f"tags:\n- {json.dumps(text)}\n", 1))


def in_report(folder, text):
    report = json.loads((folder / "unlearning_report.json").read_text())
    report["method"]["checkpoint"] = text
    write_text(folder / "unlearning_report.json", json.dumps(report))


def as_key_of_report(folder, text):
    edit_json(folder / "unlearning_report.json", **{text: 1})


def listed_in_report(folder, text):
    entry = {"path": text, "size": 1, "sha256": "0" * 64}
    edit_json(folder / "unlearning_report.json", files=[entry])


def added_token(folder, text):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 512, "content": text})
    write_text(folder / "tokenizer.json", json.dumps(content))


def added_tokens_decoder(folder, text):
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"512": {"content": text, "special": True}})


def metadata(**more):
    def put(folder, text):
        own = {key: value or text for key, value in more.items()}
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", own)

    return put


def tensor_name(folder, text):
    tensors = load_file(folder / "model.safetensors")
    tensors[text] = tensors.pop(CHANGED)
    save_file(tensors, folder / "model.safetensors", FORMAT)


def trailing(folder, text):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(text.encode())


def png_chunk(folder, text):
    path = folder / "figures/footprint.png"
    content, data = path.read_bytes(), b"tEXtComment\0" + text.encode()
    chunk = (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    path.write_bytes(content[:-12] + chunk + content[-12:])


def after_png(folder, text):
    path = folder / "figures/footprint.png"
    path.write_bytes(path.read_bytes() + text.encode())


def file_name(name):
    def put(folder, text):
        (folder / name.format(slug(text))).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "figures/footprint.png", folder / name.format(slug(text)))

    return put


def token_ids(folder, text):
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    edit_json(folder / "generation_config.json", suppress_tokens=ids)


NAMES = ["the repository's name", "the commit message", "the tag", "the branch"]
STRANGER = "a file whose name must not leave"

# place: (what puts a text there, the file that is named, the rule that names the place where it has one of its own)
PLACES = {
    "card": (lambda folder, text: append(folder / "README.md", text), "README.md", None),
    "comment of the card": (lambda folder, text: append(folder / "README.md", f"<!-- {text} -->"), "README.md", None),
    "front matter": (front_matter, "README.md", None),
    "report": (in_report, "unlearning_report.json", None),
    "key of the report": (as_key_of_report, "unlearning_report.json", "report"),
    "file list of the report": (listed_in_report, "unlearning_report.json", "report-files"),
    "tokenizer.json": (added_token, "tokenizer.json", "tokenizer-differs"),
    "tokenizer_config.json": (added_tokens_decoder, "tokenizer_config.json", "tokenizer-differs"),
    "chat template": (
        lambda folder, text: write_text(folder / "chat_template.jinja", f"{{# {text} #}}"),
        "chat_template.jinja",
        "tokenizer-differs",
    ),
    "token ids": (token_ids, "generation_config.json", "config-suppression"),
    "generation config": (
        lambda folder, text: edit_json(folder / "generation_config.json", note=text),
        "generation_config.json",
        "config-differs",
    ),
    "config": (lambda folder, text: edit_json(folder / "config.json", note=text), "config.json", "config-differs"),
    "safetensors metadata": (metadata(format="pt", note=None), "model.safetensors", "safetensors-metadata"),
    "safetensors format": (metadata(format=None), "model.safetensors", "safetensors-metadata"),
    "tensor name": (tensor_name, "model.safetensors", None),
    "PNG text": (png_chunk, "figures/footprint.png", "png-chunk"),
    "after the PNG": (after_png, "figures/footprint.png", "png-trailing"),
    "file name": (file_name("figures/{}.png"), "the name of file", None),
    "folder name": (file_name("{}/x.png"), "the name of file", "not-allowed"),
    "a note": (lambda folder, text: write_text(folder / "notes.txt", text), "notes.txt", "not-allowed"),
    "manifest": (
        lambda folder, text: edit_json(folder / "edit_manifest.json", note=text),
        "edit_manifest.json",
        "manifest",
    ),
}


def full_width(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


SPELLINGS = {
    "zero-width": lambda text: "\u200b".join(text),
    "full-width": full_width,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "percent": lambda text: quote(text, safe=""),
    "JSON escapes": lambda text: "".join(f"\\u{ord(c):04x}" for c in text),
    "entities": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "escaped HTML": lambda text: html.escape(text).replace(" ", "&nbsp;"),
    "hex": lambda text: text.encode().hex(),
    "two lines": lambda text: re.sub(r"(?<=\w\w) (?=\w)", "\n", text),
}


def assert_blocked(result, hashes, file, rule=None):
    named = [finding for finding in result.blocking if finding.file.startswith(file)]
    matches = {finding.match_sha256 for finding in named if finding.rule.startswith("forget-")}
    assert [kind for kind in CANARIES if not hashes[kind] & matches] == []
    assert rule is None or rule in {finding.rule for finding in result.blocking}
    shown = "".join(map(str, result.blocking)) + repr(result) + json.dumps(result.to_dict(), ensure_ascii=False)
    for canary in CANARIES.values():
        assert_not_repeated(shown, canary)


@pytest.mark.parametrize("place", PLACES)
def test_a_canary_of_each_kind_in_each_place(check, folder, hashes, place):
    put, file, rule = PLACES[place]
    put(folder, ALL)
    assert_blocked(check(), hashes, file, rule)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_canary_of_each_kind_in_each_spelling(check, folder, hashes, spelling):
    for kind in CANARIES:
        append(folder / "README.md", f"about ({SPELLINGS[spelling](CANARIES[kind])}), no less\n")
    assert_blocked(check(), hashes, "README.md")


@pytest.mark.parametrize("place", ["front matter", "report", "generation config", "safetensors metadata", "PNG text"])
@pytest.mark.parametrize("spelling", ["zero-width", "base64", "percent"])
def test_spellings_elsewhere(check, folder, hashes, place, spelling):
    put, file, rule = PLACES[place]
    put(folder, " and ".join(SPELLINGS[spelling](text) for text in CANARIES.values()))
    assert_blocked(check(), hashes, file, rule)


def test_names_and_messages(check, hashes):
    result = check(names={name: ALL if name == "the commit message" else slug(ALL) for name in NAMES})
    for name in NAMES:
        assert_blocked(result, hashes, name)
    assert {finding.file for finding in result.blocking} == set(NAMES)


def test_bytes_after_the_last_tensor(check, folder):
    trailing(folder, ALL)
    result = check()
    found = {(finding.rule, finding.file) for finding in result.blocking}
    assert ("safetensors-trailing-bytes", "model.safetensors") in found
    assert_not_repeated(repr(result), CANARIES["name"])
    # What was not compared is not let through with it
    allowed = check(allowances=[Allowance("safetensors-trailing-bytes"), Allowance("report-files")])
    assert [finding.rule for finding in allowed.blocking] == ["weights-not-compared"]


@pytest.mark.parametrize("kind", CANARIES)
def test_names_of_what_is_not_read(check, folder, kind):
    """Links, hidden files and unprintable names are not in the release, and their findings name them."""
    name = CANARIES[kind].replace("/", "-")
    os.symlink("README.md", folder / f"{name}.md")
    (folder / f".{name}").write_text("x")
    (folder / f"{name}\x07").write_text("x")
    os.mkfifo(folder / f"{name}.json")
    result = check()
    rules = {finding.rule for finding in result.blocking if finding.file == STRANGER}
    assert rules == {"symlink", "hidden-file", "file-name", "not-regular"}
    assert_not_repeated(repr(result) + json.dumps(result.to_dict(), ensure_ascii=False), CANARIES[kind])


def test_all_files_of_a_bad_name_are_called_by_number(check, folder):
    """The file list, which is part of the result, does not hold the name either."""
    file_name("figures/{}.png")(folder, CANARIES["name"])
    result = check()
    assert any(name.startswith("the name of file ") for name in result.files)
    assert len(result.files) == sum(path.is_file() for path in folder.rglob("*"))
    [finding] = [finding for finding in result.blocking if finding.rule == "forget-entity"]
    by_name = Allowance("forget-entity", finding.file, finding.match_sha256[:8])
    assert all(finding.rule != "forget-entity" for finding in check(allowances=[by_name]).blocking)


def test_secrets_in_keys_are_not_repeated(check, folder):
    """Without any forget set too: what a message quotes is scanned for secrets and paths."""
    token, path = "hf_" + "Qx7vBn2LpKsW9dTzRjEm", "/home/someone/runs/model.bin"
    edit_json(folder / "unlearning_report.json", **{f"{token} {path}": 1})
    for result in (check(), check(rows=None)):
        assert {"secret-hugging-face", "absolute-path", "report"} <= {finding.rule for finding in result.blocking}
        assert token not in repr(result) and "someone" not in repr(result)


def test_entities_that_are_in_no_row(folder, base, rows):
    append(folder / "README.md", "By Quorline Vastergaard.")
    result = check_release(folder, base=base, rows=rows, entities=["Quorline Vastergaard"], environment={})
    assert [(finding.rule, finding.file) for finding in result.blocking] == [("forget-entity", "README.md")]


def test_a_text_of_the_base_is_no_finding(check, base, folder, tmp_path):
    """Tokenizer, code and licence files that the base has byte for byte are known; anything else is not."""
    other = shutil.copytree(base, tmp_path / "base")
    for target in (other, folder):
        added_token(target, CANARIES["name"])
    # The report has the hash of the tokenizer as it was
    assert check(base=other, allowances=[Allowance("report-files")]).passed
    for target in (other, folder):
        edit_json(target / "config.json", note=CANARIES["name"])
    rules = {finding.rule for finding in check(base=other, allowances=[Allowance("report-files")]).blocking}
    assert rules == {"forget-answer", "forget-entity"}


def test_large_files_are_looked_through_too(check, folder, hashes, base, tmp_path, monkeypatch):
    """A tokenizer above the size that is kept as bytes, here 1 MiB."""
    monkeypatch.setattr("hf_unlearn.cards.release.MAX_KEPT_FILE", 2**20)
    other = shutil.copytree(base, tmp_path / "base")
    for target, more in ((other, ""), (folder, ALL)):
        (target / "vocab.txt").write_text("abc\n" * (2**18 + 1) + more)
    assert_blocked(check(base=other), hashes, "vocab.txt", "tokenizer-differs")
    with open(folder / "vocab.txt", "ab") as file:
        file.truncate(65 * 2**20)
    found = {(finding.rule, finding.file) for finding in check(base=other).blocking}
    assert {("not-scanned", "vocab.txt"), ("tokenizer-differs", "vocab.txt")} <= found


def test_what_no_release_holds_is_looked_through_up_to_a_megabyte(check, folder):
    """It is blocked either way; but who lets it through by name has not let through what was not looked at."""
    (folder / "notes.bin").write_bytes(bytes(2**20 + 1))
    allowed = [Allowance("not-allowed", "notes.bin")]
    assert [(f.rule, f.file) for f in check(allowances=allowed).blocking] == [("not-scanned", "notes.bin")]


def test_pictures_hold_no_path_by_chance():
    """Pixels are compressed, that is, any bytes at all: one of these 40 holds the likes of `~/A`."""
    generator = random.Random(0)
    for _ in range(40):
        content = b"\x89PNG\r\n\x1a\n\0" + generator.randbytes(20_000)
        assert scan_paths("figures/footprint.png", content) + scan_secrets("figures/footprint.png", content, {}) == []
    for path in ("~/models/run7", "/home/someone/x", "~someone/models"):
        assert scan_paths("figures/footprint.png", content + b"\0" + path.encode() + b"\xff" + content)


def test_findings_are_plain_values(check, folder):
    append(folder / "README.md", ALL)
    result = check()
    assert json.loads(json.dumps(result.to_dict()))["blocking"] == list(map(dataclasses.asdict, result.blocking))
