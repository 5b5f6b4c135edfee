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
"""`hf-unlearn check` and `hf-unlearn card build`, as they are called: exit codes, streams, and the release flow."""

import importlib
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
from released import CANARIES, assert_not_repeated, edit_json, make_base, make_release, make_report, make_rows
from tokenizers import Tokenizer

from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.disclosure import LEVELS, load_salt, verify_commitment
from hf_unlearn.cli import run


@pytest.fixture(scope="module")
def place(tiny_model_path, data_dir, tmp_path_factory):
    """A folder with a base, a release that passes, and the forget set as files."""
    place = tmp_path_factory.mktemp("cli")
    base = make_base(tiny_model_path, place / "base")
    make_release(base, place / "release")
    write_rows(place / "forget.jsonl", make_rows(data_dir))
    write_rows(place / "few.jsonl", [{"answer": text} for text in CANARIES.values()])
    return place


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(place, tmp_path):
    return shutil.copytree(place / "release", tmp_path / "release")


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs a command as the console script does: exit code, stdout, stderr."""
    for name in [name for name in os.environ if name.endswith(("TOKEN", "KEY", "SECRET", "PASSWORD"))]:
        monkeypatch.delenv(name)

    def call_command(name, *arguments):
        capsys.readouterr()
        code = run(importlib.import_module(f"hf_unlearn.cli.{name}").main, list(map(str, arguments)))
        return (code, *capsys.readouterr())

    return call_command


def test_passes(place, folder, call):
    options = ("--base", place / "base", "--forget", place / "forget.jsonl", "--repo_id", "org/tiny-unlearned")
    more = ("--message", "Forget some people", "--tag", "v1", "--branch", "main")
    code, out, err = call("check", folder, *options, *more)
    count = sum(path.is_file() for path in folder.rglob("*"))
    assert (code, out) == (0, f"Passed: {count} files may leave.\n") and "Checking the weights" in err
    code, out, err = call("check", folder, *options, "-q")
    assert (code, out, err) == (0, "", "")
    code, out, err = call("check", folder, *options, "--json", "-q")
    content = json.loads(out)
    assert (code, err, content["passed"], content["blocking"], content["allowed"]) == (0, "", True, [], [])
    assert len(content["files"]) == count


def test_blocked(place, folder, call):
    """Everything is said once, by file and rule, on stdout; the way out names the first finding."""
    with open(folder / "README.md", "a") as file:
        file.write(f"\nIt was {CANARIES['name']} in /home/someone/x.\n")
    options = ("--base", place / "base", "--forget", place / "few.jsonl")
    code, out, err = call("check", folder, *options)
    assert code == 1 and "README.md: absolute-path" in out and "README.md: forget-answer" in out
    assert "3 findings: nothing may leave." in out and "--allow '" in out
    code, out, err = call("check", folder, *options, "-q")
    assert (code, err) == (1, "")
    assert sorted(out.splitlines()) == [
        "absolute-path README.md",
        "forget-answer README.md",
        "forget-entity README.md",
    ]
    code, out, err = call("check", folder, *options, "--json", "-q")
    findings = json.loads(out)["blocking"]
    assert code == 1 and {finding["file"] for finding in findings} == {"README.md"}
    allow = [
        option
        for finding in findings
        for option in ("--allow", f"{finding['rule']}:README.md:{finding['match_sha256'][:8]}")
    ]
    code, out, err = call("check", folder, *options, *allow)
    assert code == 0 and out.startswith("Let through:\n") and "Passed: " in out
    code, out, err = call("check", folder, *options, *allow[2:])
    assert code == 1


def test_the_printed_allowance_is_one_that_works(place, folder, call):
    """Taken from stdout as often as it takes."""
    with open(folder / "README.md", "a") as file:
        file.write(f"\nIt was {CANARIES['name']} in /home/someone/x.\n")
    options, allow = ("--base", place / "base", "--forget", place / "few.jsonl"), []
    for _ in range(4):
        code, out, _ = call("check", folder, *options, *allow)
        if code == 0:
            break
        allow += ["--allow", out.splitlines()[-1].split("'")[1]]
    assert code == 0 and len(allow) == 6


@pytest.mark.parametrize("output", [(), ("--json",), ("-q",)])
@pytest.mark.parametrize("kind", CANARIES)
def test_no_canary_is_printed(place, folder, call, kind, output):
    """In the names that are arguments, in files, in the names of files, and as token ids."""
    text = CANARIES[kind]
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    edit_json(folder / "generation_config.json", suppress_tokens=ids)
    edit_json(folder / "unlearning_report.json", **{text: text})
    (folder / f"{text}.txt").write_text(text)
    (folder / f".{text}").write_text(text)
    names = ("--repo_id", f"org/{text.replace(' ', '-')}", "--message", text, "--tag", text, "--branch", text)
    code, out, err = call("check", folder, "--base", place / "base", "--forget", place / "few.jsonl", *names, *output)
    assert code == 1
    for words in ("the repository's name", "the commit message", "the tag", "the branch", "unlearning_report.json"):
        assert words in out
    assert "forget-token-ids" in out and "generation_config.json" in out
    assert_not_repeated(out + err, text)


def test_without_base_or_forget_set(folder, call):
    code, out, _ = call("check", folder, "-q")
    assert code == 1 and out.splitlines() == ["no-base the folder", "no-forget-set the folder"]
    code, out, _ = call("check", folder, "--allow", "no-base", "--allow", "no-forget-set")
    assert code == 0


def test_entities(place, folder, call, tmp_path):
    with open(folder / "README.md", "a") as file:
        file.write("\nBy Quorline Vastergaard.\n")
    (tmp_path / "names.txt").write_text("\nQuorline Vastergaard\n")
    options = ("--base", place / "base", "--forget", place / "few.jsonl", "-q")
    assert call("check", folder, *options)[0] == 0
    code, out, _ = call("check", folder, *options, "--entities", tmp_path / "names.txt")
    assert (code, out) == (1, "forget-entity README.md\n")


def test_usage(place, folder, call, tmp_path, random_model):
    """One sentence on stderr, exit code 2, nothing on stdout."""
    random_model("gpt2").save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2/LICENSE").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "labels.jsonl").write_text('{"label": 0.5}\n')
    (tmp_path / "binary").write_bytes(b"\xff")
    base = place / "base"
    cases = {
        (): "DIR",
        (tmp_path / "nowhere",): "DIR is not a folder",
        (place / "few.jsonl",): "DIR is not a folder",
        (folder, "--base", tmp_path / "nowhere"): "--base is not a folder",
        (folder, "--base", "org/name"): "`hf download` it first",
        (folder, "--base", tmp_path / "empty"): "no model",
        (folder, "--base", tmp_path / "gpt2"): "two architectures",
        (folder, "--base", base, "--forget", tmp_path / "x.jsonl"): "does not exist",
        (folder, "--base", base, "--forget", tmp_path / "empty.jsonl"): "is empty",
        (folder, "--base", base, "--forget", tmp_path / "labels.jsonl"): "holds no text",
        (folder, "--base", base, "--entities", tmp_path / "x"): "--entities cannot be read",
        (folder, "--base", base, "--entities", tmp_path / "binary"): "--entities cannot be read",
        (folder, "--allow", "No Rule"): "RULE:FILE:HASH",
        (folder, "--jsn"): "--jsn",
    }
    for arguments, sentence in cases.items():
        code, out, err = call("check", *arguments, "-q")
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1, (arguments, err)


def test_folder_that_is_no_release(call, place, tmp_path):
    """Findings, of which each says what is missing."""
    code, out, _ = call("check", tmp_path, "--base", place / "base", "--forget", place / "few.jsonl", "-q")
    assert code == 1 and {"missing-file README.md", "missing-file model.safetensors"} <= set(out.splitlines())


@pytest.mark.parametrize("level", LEVELS)
def test_cards_of_all_levels_pass(place, call, tmp_path, level):
    """Built by the command from a report at the level `public`, and checked by the command."""
    folder = make_release(place / "base", tmp_path / "release", "public")
    sealed = ("--forget", place / "few.jsonl", "--salt", tmp_path / "salt") if level == "sealed" else ()
    code, out, err = call("card", "build", folder, "--disclosure", level, "--license", "mit", *sealed, "--json", "-q")
    files = json.loads(out)["files"]
    assert (code, err) == (0, "") and files[:2] == ["unlearning_report.json", "README.md"]
    code, out, _ = call("check", folder, "--base", place / "base", "--forget", place / "forget.jsonl", "-q")
    assert (code, out) == (0, "")
    card = (folder / "README.md").read_text()
    assert f"`{level}`" in card
    assert ("org/people" in card) == (level == "public")
    assert ("biography" in card) == (level in ("public", "category"))
    assert ("12,345" in card) == (level != "sealed")
    if level == "sealed":
        report = json.loads((folder / "unlearning_report.json").read_text())
        rows = [{"answer": text} for text in CANARIES.values()]
        assert verify_commitment(rows, load_salt(tmp_path / "salt"), report["data"]["commitment"])
        assert stat.S_IMODE(os.stat(tmp_path / "salt").st_mode) == 0o600
        # Once sealed, nothing is said again
        code, out, err = call("card", "build", folder, "--disclosure", "count-only")
        assert (code, out) == (2, "") and "says more than it holds" in err


def test_card_usage(place, folder, call, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "kept").write_text("x")
    few = place / "few.jsonl"
    sealed = ("--disclosure", "sealed", "--forget", few, "--salt")
    cases = {
        (): "COMMAND",
        ("build",): "DIR",
        ("build", tmp_path / "nowhere"): "DIR is not a folder",
        ("build", tmp_path / "empty"): "no unlearning_report.json",
        ("build", folder, "--disclosure", "secret"): "invalid choice",
        ("build", folder, "--disclosure", "public"): "says more than it holds",
        ("build", folder, "--disclosure", "sealed"): "give --forget and --salt",
        ("build", folder, "--disclosure", "sealed", "--forget", few): "give --forget and --salt",
        ("build", folder, "--forget", few): "give --forget and --salt",
        ("build", folder, "--salt", tmp_path / "salt"): "give --forget and --salt",
        ("build", folder, *sealed, folder / "salt"): "must not lie in the folder",
        ("build", folder, *sealed, tmp_path / "kept"): "exists already",
        ("build", folder, *sealed, tmp_path / "nowhere" / "salt"): "The salt cannot be written (No such file",
        ("build", tmp_path / "empty", *sealed, tmp_path / "salt"): "no unlearning_report.json",
    }
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for arguments, sentence in cases.items():
        code, out, err = call("card", *arguments, *(["-q"] if arguments else []))
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1, (arguments, err)
        assert str(tmp_path) not in err
    # Nothing was written: no card, and no salt that would be in the way of the next try
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "salt").exists() and (tmp_path / "kept").read_text() == "x"


def test_release_flow(place, folder, call, tmp_path):
    """Card, check, diff with a manifest, apply: what is rebuilt from base and manifest passes as the release does."""
    base, forget = place / "base", place / "few.jsonl"
    for path in (folder / "README.md", folder / "unlearning_report.json"):
        path.unlink()
    shutil.rmtree(folder / "figures")
    make_report(base, folder).save(folder / "unlearning_report.json")
    assert call("card", "build", folder, "--disclosure", "category", "--license", "mit", "-q") == (0, "", "")
    assert call("check", folder, "--base", base, "--forget", forget, "-q") == (0, "", "")
    code, out, _ = call("diff", base, folder, "-q", "--manifest", tmp_path / "manifest")
    assert code == 0 and "integrity only, no author" in out
    assert call("apply", base, tmp_path / "manifest", tmp_path / "out", "-q")[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    for name in ("unlearning_report.json", "README.md"):
        shutil.copyfile(folder / name, tmp_path / "out" / name)
    shutil.copytree(folder / "figures", tmp_path / "out/figures")
    shutil.copyfile(tmp_path / "manifest/edit_manifest.json", tmp_path / "out/edit_manifest.json")
    assert call("check", tmp_path / "out", "--base", base, "--forget", forget, "-q") == (0, "", "")


def test_commands_run_without_torch(place, tmp_path):
    """Not even to read the forget set, to decode token ids or to draw the pictures."""
    folder = shutil.copytree(place / "release", tmp_path / "release")
    code = (
        "import sys\nfrom hf_unlearn.cli import main\n"
        "base, folder, forget, place = sys.argv[1:]\n"
        "assert main(['card', 'build', folder, '--license', 'mit', '-q']) == 0\n"
        "assert main(['check', folder, '--base', base, '--forget', forget, '-q']) == 0\n"
        "assert main(['diff', base, folder, '-q', '--manifest', place + '/manifest']) == 0\n"
        "assert main(['apply', base, place + '/manifest', place + '/out', '-q']) == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'trl'} & set(sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("TOKEN", "KEY"))}
    arguments = (place / "base", folder, place / "few.jsonl", tmp_path)
    assert subprocess.run([sys.executable, "-c", code, *arguments], env=environment).returncode == 0


def test_builder_and_command_write_the_same(place, folder, call):
    build_card(folder, license="mit")
    before = (folder / "README.md").read_bytes()
    assert call("card", "build", folder, "--license", "mit", "-q") == (0, "", "")
    assert (folder / "README.md").read_bytes() == before
