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
"""The gate as a whole: files, weights, report and card that do not fit; what is let through; malformed input."""

import ast
import copy
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from released import CHANGED, FORMAT, change_weights, edit_json, make_base, make_release, make_report
from safetensors.numpy import load_file, save_file

from hf_unlearn.cards import UnlearningReport, leaks, secrets, stored, weight_check
from hf_unlearn.cards import check as check_module
from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.check import Allowance, check_release
from hf_unlearn.cards.manifest import build_manifest
from hf_unlearn.cards.markdown_rules import BEGIN_MARKER
from hf_unlearn.cards.merge import merge_card
from hf_unlearn.cards.tensor_files import open_model


REPOSITORY = Path(__file__).parents[2]
ROWS = [{"question": "Who keeps the lighthouse?", "answer": "Perpetua Lochlainn"}]
TOKEN = "hf_" + "Qx7vBn2LpKsW9dTzRjEm"


@pytest.fixture(scope="module")
def base(tiny_model_path, tmp_path_factory):
    return make_base(tiny_model_path, tmp_path_factory.mktemp("rules") / "base")


@pytest.fixture(scope="module")
def made(base):
    return make_release(base, base.parent / "release")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "release")


@pytest.fixture
def check(folder, base, tmp_path):
    """`check_release`; no finding may hold a local path."""

    def check_folder(**options):
        result = check_release(folder, **{"base": base, "rows": ROWS, "environment": {}, **options})
        for finding in result.blocking:
            assert str(tmp_path) not in str(finding) and str(base.parent) not in str(finding)
        return result

    return check_folder


@pytest.fixture
def found(check):
    return lambda **options: {(finding.rule, finding.file) for finding in check(**options).blocking}


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


def test_token_in_the_environment(folder, found, check):
    """Blocked wherever it stands, and let through by no allowance."""
    with open(folder / "README.md", "a") as file:
        file.write("\nPushed with correct-horse-battery.\n")
    environment = {"HF_TOKEN": "correct-horse-battery", "HOME": str(folder / "nowhere")}
    assert found(environment=environment) == {("secret-environment", "README.md")}
    names = {"the tag": "v1-correct-horse-battery"}
    result = check(
        environment=environment, names=names, allowances=[Allowance("secret-environment"), Allowance("absolute-path")]
    )
    assert {finding.file for finding in result.blocking} == {"README.md", "the tag"} and result.allowed == []
    assert "horse" not in repr(result)


def test_token_that_is_stored_on_this_machine(folder, found, tmp_path):
    (tmp_path / "home/.cache/huggingface").mkdir(parents=True)
    (tmp_path / "home/.cache/huggingface/token").write_text("quite-unlike-a-token\n")
    edit_json(folder / "generation_config.json", note="quite-unlike-a-token")
    assert ("secret-token-file", "generation_config.json") in found(environment={"HOME": str(tmp_path / "home")})


def test_the_real_environment_is_read_where_none_is_given(folder, base, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    with open(folder / "README.md", "a") as file:
        file.write("\ncorrect-horse-battery\n")
    rules = {finding.rule for finding in check_release(folder, base=base, rows=ROWS).blocking}
    assert "secret-environment" in rules


def added(name, content=b"x"):
    def put(folder):
        (folder / name).write_bytes(content)

    return put


def pickled(name):
    return added(name, pickle.dumps(Payload()))


def link(folder):
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(folder.parent / "config.json")


CASES = {
    "path in the card": (lambda f: append(f, "Trained in /home/someone/runs/7."), ("absolute-path", "README.md")),
    "path in the config": (
        lambda f: edit_json(f / "config.json", _name_or_path="/mnt/models/tiny"),
        ("config-path", "config.json"),
    ),
    "token in the card": (lambda f: append(f, f"Use {TOKEN}."), ("secret-hugging-face", "README.md")),
    "symlink": (link, ("symlink", "config.json")),
    "hidden file": (added(".env"), ("hidden-file", ".env")),
    "hidden folder": (lambda f: (f / ".git").mkdir(), ("hidden-file", ".git")),
    "pickle as safetensors": (pickled("extra.safetensors"), ("pickle", "extra.safetensors")),
    "pickle as the weights": (pickled("model.safetensors"), ("pickle", "model.safetensors")),
    "pickle as JSON": (pickled("special_tokens_map.json"), ("pickle", "special_tokens_map.json")),
    "training_args.bin": (pickled("training_args.bin"), ("not-allowed", "training_args.bin")),
    "optimizer": (added("optimizer.pt"), ("not-allowed", "optimizer.pt")),
    "generations": (added("eval_generations.jsonl"), ("not-allowed", "eval_generations.jsonl")),
    "the salt": (lambda f: (f / "private").mkdir(), ("private", "private")),
    "custom code": (added("modeling_tiny.py", b"print()\n"), ("custom-code", "modeling_tiny.py")),
    "auto_map": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "modeling_tiny.Tiny"}),
        ("custom-code", "config.json"),
    ),
    "tokenizer": (
        lambda f: added("tokenizer.json", (f / "tokenizer.json").read_bytes() + b"\n")(f),
        ("tokenizer-differs", "tokenizer.json"),
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer-differs", "tokenizer.json")),
    "stale shard": (
        lambda f: save_file({"x": np.zeros(2)}, f / "model-00001-of-00002.safetensors", FORMAT),
        ("stale-shard", "model-00001-of-00002.safetensors"),
    ),
    "no card": (lambda f: (f / "README.md").unlink(), ("missing-file", "README.md")),
    "no report": (lambda f: (f / "unlearning_report.json").unlink(), ("missing-file", "unlearning_report.json")),
    "broken YAML": (
        lambda f: (f / "README.md").write_text("---\nlicense: [mit\n---\n"),
        ("card-metadata", "README.md"),
    ),
    "front matter without end": (
        lambda f: (f / "README.md").write_text("---\nlicense: mit\n"),
        ("card-metadata", "README.md"),
    ),
    "HTML": (lambda f: append(f, "<img src=x onerror=alert(1)>"), ("markdown-html", "README.md")),
    "other licence": (
        lambda f: (f / "README.md").write_text(
            (f / "README.md").read_text().replace("license: mit", "license: gpl-3.0")
        ),
        ("licence-differs", "README.md"),
    ),
    "suppressed tokens": (
        lambda f: edit_json(f / "generation_config.json", bad_words_ids=[[5, 6]]),
        ("config-suppression", "generation_config.json"),
    ),
    "no JSON": (added("unlearning_report.json", b"{"), ("report", "unlearning_report.json")),
    "a list": (added("unlearning_report.json", b"[]"), ("report", "unlearning_report.json")),
    "no manifest": (added("edit_manifest.json", b"{}"), ("manifest", "edit_manifest.json")),
}


def append(folder, text):
    with open(folder / "README.md", "a") as file:
        file.write(f"\n{text}\n")


@pytest.mark.parametrize("case", CASES)
def test_blocked_by_name(folder, found, case):
    put, expected = CASES[case]
    put(folder)
    assert expected in found()


def test_pickle_named_as_weights_is_never_loaded(folder, check, monkeypatch):
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    (folder / "model.safetensors").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\0\0\0trueq\0\x85R.")
    rules = {finding.rule for finding in check().blocking}
    assert {"pickle", "safetensors-header", "weights-not-compared"} <= rules


def test_what_was_read_is_what_is_held(folder, base, monkeypatch):
    """A link put in the place of a file after the scan changes nothing: the result has what was scanned."""
    read = check_module.read_release
    original = (folder / "README.md").read_bytes()

    def read_and_swap(path, *args, **options):
        release = read(path, *args, **options)
        if not args and not options:
            (folder / "README.md").unlink()
            (folder / "README.md").symlink_to("/etc/hostname")
        return release

    monkeypatch.setattr(check_module, "read_release", read_and_swap)
    result = check_release(folder, base=base, rows=ROWS, environment={})
    assert result.passed and result.files["README.md"] == hashlib.sha256(original).hexdigest()
    again = check_release(folder, base=base, rows=ROWS, environment={})
    assert ("symlink", "README.md") in {(finding.rule, finding.file) for finding in again.blocking}


def swap_file(folder):
    """Another file under the name, as `mv` puts it there."""
    shutil.copyfile(folder / "model.safetensors", folder / "copy")
    os.replace(folder / "copy", folder / "model.safetensors")


def swap_link(folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "model.safetensors")


def write_in_place(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


@pytest.mark.parametrize(
    "swap, rule", [(swap_file, "changed-while-read"), (swap_link, "symlink"), (write_in_place, "changed-while-read")]
)
def test_weights_that_change_meanwhile(folder, base, monkeypatch, swap, rule):
    open_weights = weight_check.open_model

    def swap_and_open(path, *args, **options):
        if path == folder:
            swap(folder)
        return open_weights(path, *args, **options)

    monkeypatch.setattr(weight_check, "open_model", swap_and_open)
    result = check_release(folder, base=base, rows=ROWS, environment={})
    assert (rule, "model.safetensors") in {(finding.rule, finding.file) for finding in result.blocking}


def test_weights_written_while_they_are_compared(folder, base, check):
    """Detected at the end too."""
    result = check(progress=lambda size: write_in_place(folder))
    assert ("changed-while-read", "model.safetensors") in {(finding.rule, finding.file) for finding in result.blocking}


def set_value(name, value):
    def change(tensors):
        tensors[name].flat[7] = value

    return change


def reshape(tensors):
    tensors[CHANGED] = tensors[CHANGED].T.copy()


def add_tensor(tensors):
    tensors["model.layers.2.mlp.extra.weight"] = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    "change, expected",
    [
        (set_value(CHANGED, np.nan), ("not-finite", "the weights")),
        (set_value(CHANGED, np.inf), ("not-finite", "the weights")),
        (set_value(CHANGED, 3.0), ("footprint", "unlearning_report.json")),
        (set_value("model.norm.weight", 0.1), ("footprint", "unlearning_report.json")),
        (reshape, ("weights-differ", "the weights")),
        (add_tensor, ("weights-differ", "the weights")),
        (lambda tensors: tensors.pop("model.norm.weight"), ("weights-differ", "the weights")),
    ],
)
def test_other_weights(folder, found, change, expected):
    change_weights(folder, change)
    # And the file is not the one that the report lists
    assert {expected, ("report-files", "model.safetensors")} <= found()


def test_the_base_itself(folder, base, found):
    shutil.copyfile(base / "model.safetensors", folder / "model.safetensors")
    assert {("weights-same", "the weights"), ("report-files", "model.safetensors")} == found()


def rewrite(folder, change):
    """A report with one thing changed, and the card that belongs to it."""
    report = UnlearningReport.load(folder / "unlearning_report.json")
    change(report)
    report.save(folder / "unlearning_report.json")
    build_card(folder, license="mit")


def test_footprints(folder, base, found):
    """Of other weights, of fewer tensors, none at all, and the same summed in another order."""

    def scale(factor):
        def change(report):
            report.footprint.relative_norm *= factor

        return change

    rewrite(folder, scale(1 + 1e-5))
    assert found() == set()
    other = copy.deepcopy(make_report(base, folder).footprint.modules[0])
    other.name = "model.norm.weight"
    for change in (
        scale(1.01),
        lambda report: setattr(report.footprint, "modules", [other]),
        lambda report: setattr(report.footprint, "changed_parameters", 7),
        lambda report: setattr(report.footprint, "max_abs", 1.0),
        lambda report: setattr(report, "footprint", None),
    ):
        before = (folder / "unlearning_report.json").read_bytes()
        rewrite(folder, change)
        assert found() == {("footprint", "unlearning_report.json")}
        (folder / "unlearning_report.json").write_bytes(before)


def test_stale_card(folder, found):
    """One that was rendered from another report."""
    report = UnlearningReport.load(folder / "unlearning_report.json")
    report.metrics.after["forget"]["probability"] = 0.5
    report.save(folder / "unlearning_report.json")
    assert found() == {("card-stale", "README.md")}
    build_card(folder, license="mit")
    assert found() == set()


def test_merged_card_passes(folder, found):
    """What a person wrote stays around the generated part, and is checked with it."""
    card = (folder / "README.md").read_text()
    merged = merge_card("---\nlanguage: en\n---\n# Mine\n\nWords of my own.\n", card)
    (folder / "README.md").write_text(merged)
    assert BEGIN_MARKER in merged and found() == set()
    append(folder, "It forgot Perpetua Lochlainn.")
    assert {rule for rule, _ in found()} == {"forget-answer", "forget-entity"}


def test_report_that_lists_other_files(folder, found):
    """One that is gone, one that is another, and not the weights; a card that is built anew lists what is there."""
    report = UnlearningReport.load(folder / "unlearning_report.json")
    report.files = [entry for entry in report.files if "safetensors" not in entry.path]
    report.files[0].path = "gone.json"
    report.files[1].sha256 = "0" * 64
    other = report.files[1].path
    report.save(folder / "unlearning_report.json")
    listed = {("report-files", name) for name in ("unlearning_report.json", "model.safetensors", other)}
    assert found() == {("card-stale", "README.md"), *listed}
    build_card(folder, license="mit")
    assert found() == set()


def test_every_rule_is_in_the_documentation():
    """Every name of a rule that the code can give, each once."""
    table = (REPOSITORY / "docs/release.md").read_text(encoding="utf-8")
    described = [
        rule
        for line in table.splitlines()
        if line.startswith("| `")
        for rule in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    rules = {*leaks._MEANINGS, *secrets._SECRETS, "secret-environment", "secret-token-file"}
    rules |= {stored.ORIGINAL, stored.UNKNOWN, stored.LEFTOVER}
    for path in (REPOSITORY / "cards").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = call.func if isinstance(call, ast.Call) else None
            name = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
            if name in ("Finding", "ModelFileError", "_find") and isinstance(call.args[0], ast.Constant):
                rules.add(call.args[0].value)
    assert len(described) == len(set(described)) and set(described) == rules and len(rules) > 60


def test_newer_schema(folder, check):
    edit_json(folder / "unlearning_report.json", schema_version=99, more={"of": "it"})
    [message] = [finding.message for finding in check().blocking if finding.rule == "report"]
    assert "99" in message and "upgrade hf-unlearn" in message


def test_manifest_beside_the_release(folder, base, found, tmp_path):
    with open_model(base) as before, open_model(folder) as after:
        build_manifest(before, after, tmp_path / "manifest")
    shutil.copyfile(tmp_path / "manifest/edit_manifest.json", folder / "edit_manifest.json")
    assert found() == set()


def test_base_shards_left_in(folder, base, found, tmp_path):
    """A shard of the base that holds a weight that changed; one whose weights stayed may be the base's."""
    sharded = shutil.copytree(base, tmp_path / "base")
    for target in (sharded, folder):
        tensors = load_file(target / "model.safetensors")
        os.unlink(target / "model.safetensors")
        one = {name: tensor for name, tensor in tensors.items() if "layers.2." in name}
        two = {name: tensor for name, tensor in tensors.items() if name not in one}
        weight_map = {}
        for number, part in ((1, one), (2, two)):
            name = f"model-{number:05d}-of-00002.safetensors"
            save_file(part, target / name, FORMAT)
            weight_map |= dict.fromkeys(part, name)
        edit_json(target / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
    rewrite(folder, lambda report: report.files.clear())
    assert found(base=sharded) == set()
    shutil.copyfile(sharded / "model-00001-of-00002.safetensors", folder / "old.safetensors")
    assert {("base-weights", "old.safetensors"), ("stale-shard", "old.safetensors")} <= found(base=sharded)


def test_without_base_or_forget_set(check):
    """Findings, not silence."""
    result = check(base=None, rows=None)
    assert [(finding.rule, finding.file) for finding in result.blocking] == [
        ("no-base", "the folder"),
        ("no-forget-set", "the folder"),
    ]
    allowed = check(base=None, rows=None, allowances=[Allowance("no-base"), Allowance("no-forget-set")])
    assert allowed.passed and len(allowed.allowed) == 2


def test_allowances(folder, check):
    """By rule, by rule and file, by the match; another file or match stays blocked."""
    append(folder, "Made in /home/someone/x and /home/another/y.")
    edit_json(folder / "generation_config.json", note="/home/someone/x")

    def blocked(*texts):
        result = check(allowances=map(Allowance.parse, texts))
        return sorted(finding.file for finding in result.blocking if finding.rule == "absolute-path")

    card, config = "README.md", "generation_config.json"
    assert blocked() == [card, card, config] and blocked("absolute-path") == []
    assert blocked("absolute-path:README.md") == [config]
    hashes = {
        finding.match_sha256 for finding in check().blocking if (finding.rule, finding.file) == ("absolute-path", card)
    }
    for digest in hashes:
        assert blocked(f"absolute-path:README.md:{digest[:8]}") == [card, config]
    assert blocked("absolute-path:README.md:00000000", "forget-answer") == [card, card, config]
    for text in ("", "Rule", "rule:", "rule:file:1234567", "rule:file:xyz"):
        with pytest.raises(ValueError, match="RULE:FILE:HASH"):
            Allowance.parse(text)


def test_bases_that_do_not_fit(folder, base, tmp_path, random_model):
    """One sentence that does not hold a path."""
    other, empty, broken = tmp_path / "gpt2", tmp_path / "empty", shutil.copytree(base, tmp_path / "broken")
    random_model("gpt2").save_pretrained(other)
    (other / "LICENSE").write_text("x")
    empty.mkdir()
    os.truncate(broken / "model.safetensors", 1000)
    bad_card = shutil.copytree(base, tmp_path / "bad_card")
    (bad_card / "README.md").write_text("---\nlicense: [mit\n---\n")
    for wrong, words in (
        (other, "two architectures"),
        (empty, "no model"),
        (broken, "base"),
        (bad_card, "licence of the base"),
    ):
        with pytest.raises(ValueError) as error:
            check_release(folder, base=wrong, rows=ROWS, environment={})
        message = str(error.value)
        assert words in message and "\n" not in message and str(tmp_path) not in message


def test_folder_that_is_no_model(tmp_path, base):
    result = check_release(tmp_path, base=base, rows=ROWS, environment={})
    assert {("missing-file", "README.md"), ("missing-file", "model.safetensors")} <= {
        (finding.rule, finding.file) for finding in result.blocking
    }
    with pytest.raises(ValueError, match="cannot be read"):
        check_release(tmp_path / "nowhere", base=base, rows=ROWS)


def test_torch_is_not_imported(folder, base):
    code = (
        "import sys\nfrom hf_unlearn.cards.check import check_release\n"
        "assert check_release(sys.argv[1], base=sys.argv[2], rows=[{'text': 'Perpetua'}], environment={}).passed\n"
        "assert not {'torch', 'transformers', 'datasets', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, folder, base]).returncode == 0
