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
"""Mutated reports, cards and manifests: findings, or a ValueError of one sentence, and never anything else."""

import copy
import json
import random
import shutil
import time

import pytest
from released import make_base, make_release

from hf_unlearn.cards import check as check_module
from hf_unlearn.cards.check import check_release
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.licence import check_licence
from hf_unlearn.cards.manifest import EditManifest, build_manifest
from hf_unlearn.cards.release import Release, ReleaseFile, check_files, read_release
from hf_unlearn.cards.tensor_files import open_model


NAMES = ("README.md", "unlearning_report.json", "edit_manifest.json")
SECRET = "PerpetuaLochlainn"
ODD = [
    None,
    True,
    -1,
    10**40,
    1e308,
    float("nan"),
    float("inf"),
    "",
    SECRET,
    f"{SECRET}\n{SECRET}",
    "\ud800",
    "\x00",
    "../../etc",
    "x" * 70_000,
    [],
    {},
    [[]],
    {SECRET: SECRET},
    {"": None},
    [None] * 50,
]


@pytest.fixture(scope="module")
def base(tiny_model_path, tmp_path_factory):
    return make_base(tiny_model_path, tmp_path_factory.mktemp("fuzz") / "base")


@pytest.fixture(scope="module")
def made(base):
    folder = make_release(base, base.parent / "release")
    with open_model(base) as before, open_model(folder) as after:
        build_manifest(before, after, base.parent / "manifest")
    shutil.copyfile(base.parent / "manifest/edit_manifest.json", folder / "edit_manifest.json")
    assert check_release(folder, base=base, rows=[{"text": SECRET}], environment={}).passed
    return folder


def nodes(value, found):
    """All containers within a JSON value."""
    if isinstance(value, dict | list) and value:
        found.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            nodes(item, found)
    return found


def mutate_json(content, generator):
    value = json.loads(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        node = generator.choice(nodes(value, []) or [[0]])
        key = generator.choice(list(node)) if isinstance(node, dict) else generator.randrange(len(node))
        action = generator.randrange(4)
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, dict):
            node[generator.choice([SECRET, "", "\ud800", "schema_version", "x.y"])] = node.pop(key)
        else:
            node[key] = copy.deepcopy(generator.choice(ODD))
        if not value:
            break
    return json.dumps(value).encode()


def mutate_bytes(content, generator):
    data = bytearray(content)
    for _ in range(generator.choice([1, 1, 3, 20])):
        # Often at the front, where a card has its metadata
        at = generator.randrange(generator.choice([min(400, len(data)), len(data)]) or 1)
        action = generator.randrange(5)
        if action == 0:
            data[at : at + generator.randrange(1, 40)] = b""
        elif action == 1:
            data[at:at] = generator.randbytes(generator.randrange(1, 9))
        elif action == 2:
            data[at:at] = data[at : at + 200] * generator.randrange(1, 4)
        elif action == 3:
            data[at:at] = generator.choice(PIECES)
        else:
            del data[at:]
            data += b"\n"
    return bytes(data)


PIECES = [
    piece.encode()
    for piece in ("---\n", "\n---\n", "{", "[" * 3000, '"', "\n\t", "!!python/object/apply:os.system [x]\n")
]
PIECES += [
    piece.encode() for piece in ("&a [*a, *a]\n", "? {a: b}\n: c\n", "<<: *x\n", "license: [[]]\n", "tags: {a: 1}\n")
]
PIECES += [
    piece.encode()
    for piece in ("model-index: 7\n", "base_model: 1e999\n", "2020-01-01: no\n", "\ufeff", "\x00", "\x85")
]
PIECES += [
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"```\n",
    b"<!-- hf-unlearn:begin v1 -->\n",
    b"<!--",
    b"](//x",
    b"`" * 500,
    b"[a]: x\n",
]
PIECES += [
    b"model-index:\n- name: x\n  results:\n  - task: 3\n",
    b"a: &b\n  c: *b\n",
    b"%YAML 9.9\n---\n",
    b"0x" + b"f" * 5000,
]


def release_of(made, base, **changed):
    """The small files of a release, one of them changed: what is read of weights is tested elsewhere."""
    release = Release()
    for name in NAMES:
        content = changed.get(name, (made / name).read_bytes())
        release.files[name] = ReleaseFile(name, len(content), content)
    return release


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_mutated_files(made, base, name, count):
    """Through all that parses them, in turn, with the base beside."""
    generator = random.Random(name)
    original = (made / name).read_bytes()
    kinds = set()
    start = time.process_time()
    with read_release(base) as base_release:
        for number in range(count):
            by_value = name.endswith(".json") and number % 2
            content = (mutate_json if by_value else mutate_bytes)(original, generator)
            release = release_of(made, base, **{name: content})
            findings = check_files(release, base_release) + check_licence(release, base_release)
            report, more = check_module._read_report(release)
            findings += more
            if report is not None:
                findings += check_module._check_report(release, report)
            if name == "edit_manifest.json":
                findings += manifest_findings(content)
            for finding in findings:
                assert isinstance(finding, Finding) and "\n" not in finding.message
            kinds |= {finding.rule for finding in findings}
    assert time.process_time() - start < 60
    expected = {"README.md": "card-metadata", "unlearning_report.json": "report", "edit_manifest.json": "manifest"}
    assert expected[name] in kinds


def manifest_findings(content):
    try:
        EditManifest.from_json(content)
    except ValueError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 500
        return [Finding("manifest", "edit_manifest.json", "x")]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_in_the_whole_check(made, base, name, tmp_path):
    """Fewer of them, from the folder to the result; what is quoted of them never has the secret."""
    generator = random.Random(7)
    folder = shutil.copytree(made, tmp_path / "release")
    original = (folder / name).read_bytes()
    for number in range(12):
        mutate = mutate_json if name.endswith(".json") and number % 2 else mutate_bytes
        (folder / name).write_bytes(mutate(original, generator))
        result = check_release(folder, base=base, rows=[{"text": SECRET}], environment={})
        assert SECRET.lower() not in (repr(result) + json.dumps(result.to_dict())).lower()
        assert all("\n" not in finding.message for finding in result.blocking)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_mutated_configs_in_the_whole_check(made, base, name, tmp_path):
    generator = random.Random(8)
    folder = shutil.copytree(made, tmp_path / "release")
    original = (folder / name).read_bytes()
    for number in range(10):
        (folder / name).write_bytes((mutate_json if number % 2 else mutate_bytes)(original, generator))
        try:
            result = check_release(folder, base=base, rows=[{"text": SECRET}], environment={})
        except ValueError as error:
            # `architectures` of another model
            assert "two architectures" in str(error)
            continue
        assert SECRET not in repr(result) and all("\n" not in finding.message for finding in result.blocking)


def test_nesting_and_numbers_without_end(made, base, tmp_path):
    folder = shutil.copytree(made, tmp_path / "release")
    for content in (
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"schema_version": ' + "9" * 6000 + "}",
        '{"schema_version": 1e999}',
    ):
        for name in NAMES[1:]:
            (folder / name).write_text(content)
        result = check_release(folder, base=base, rows=[{"text": SECRET}], environment={})
        assert {"report", "manifest"} <= {finding.rule for finding in result.blocking}
