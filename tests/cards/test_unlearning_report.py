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
import copy
import dataclasses
import doctest
import hashlib
import json
import os
import random
import re
import stat
import subprocess
import sys
import types
import typing

import numpy as np
import pytest
import torch

import hf_unlearn.cards.report
from hf_unlearn.cards import FileEntry, UnlearningReport, hash_files, render_model_card


def walk(value, hint=UnlearningReport, keys=()):
    """Yield (keys, type in the schema without its `| None`) of every value but `None`, containers included."""
    if value is None:
        return
    members = [member for member in typing.get_args(hint) if member is not types.NoneType]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(members) == 1:
        hint = members[0]
    yield keys, hint
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        children = [(key, item, hints[key]) for key, item in value.items()]
    elif typing.get_origin(hint) is dict:
        children = [(key, item, typing.get_args(hint)[1]) for key, item in value.items()]
    elif typing.get_origin(hint) is list:
        children = [(index, item, typing.get_args(hint)[0]) for index, item in enumerate(value)]
    else:
        children = []
    for key, item, item_hint in children:
        yield from walk(item, item_hint, (*keys, key))


def dotted(keys):
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def put(target, keys, value):
    """Set a value in nested dicts, lists and dataclasses."""
    for key in keys[:-1]:
        target = getattr(target, key) if dataclasses.is_dataclass(target) else target[key]
    if dataclasses.is_dataclass(target):
        setattr(target, keys[-1], value)
    else:
        target[keys[-1]] = value


def changed(original, keys, value):
    copied = copy.deepcopy(original)
    put(copied, keys, value)
    return copied


def refusal(content):
    with pytest.raises(ValueError) as caught:
        UnlearningReport.from_dict(content)
    return str(caught.value)


# --- round trip


def test_keys_and_round_trip(report, content, tmp_path):
    assert list(report.to_dict()) == (
        "schema_version tool_version base method data footprint metrics attacks verdict certificates environment "
        "files".split()
    )
    assert report.to_dict() == content
    assert UnlearningReport.from_dict(content) == report
    path = tmp_path / "unlearning_report.json"
    report.save(path)
    assert UnlearningReport.load(path) == report
    assert json.loads(path.read_text()) == content


def test_saved_file_is_stable_text_in_schema_order(report, tmp_path):
    path = tmp_path / "unlearning_report.json"
    report.save(path)
    text = path.read_text()
    assert text.startswith('{\n  "schema_version": 1,\n  "tool_version": "0.1.0",\n  "base": {\n    "model_id": ')
    assert text.endswith("\n}\n")
    assert text == report.to_json() == UnlearningReport.load(path).to_json()


def test_empty_parts_round_trip(report):
    report.footprint = None
    report.metrics = type(report.metrics)()
    report.attacks, report.certificates, report.files = [], [], []
    content = report.to_dict()
    assert content["footprint"] is None
    assert content["metrics"] == {"before": {}, "after": {}, "control": {}}
    assert UnlearningReport.from_dict(content) == report


def test_a_measured_model_has_no_method(content):
    report = UnlearningReport.from_dict({**content, "method": None})
    assert report.method is None and report.to_dict()["method"] is None
    assert UnlearningReport.from_dict(json.loads(report.to_json())) == report
    del content["method"]
    assert refusal(content) == "missing key 'method'"


def test_every_set_of_an_evaluation_is_kept(report):
    values = {"probability": 0.5, "probability_ci_low": 0.4, "probability_ci_high": 0.6, "rows": 100}
    report.metrics.after |= {"real_authors": dict(values), "world_facts": dict(values)}
    again = UnlearningReport.from_dict(json.loads(report.to_json()))
    assert list(again.metrics.after) == ["forget", "retain", "real_authors", "world_facts"]
    assert again.metrics.after["world_facts"] == values


def test_save_replaces_in_one_step(report, tmp_path, monkeypatch):
    path = tmp_path / "unlearning_report.json"
    report.save(path)
    before = path.read_bytes()
    report.method.steps = 61
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            report.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    report.save(path)
    assert UnlearningReport.load(path).method.steps == 61
    assert os.listdir(tmp_path) == [path.name]


def test_a_refused_report_leaves_the_file_alone(report, tmp_path):
    path = tmp_path / "unlearning_report.json"
    report.save(path)
    before = path.read_bytes()
    report.footprint.max_abs = float("nan")
    with pytest.raises(ValueError, match=r"^footprint\.max_abs: expected a finite number, got nan$"):
        report.save(path)
    assert path.read_bytes() == before


def test_saved_file_is_as_readable_as_any_new_file(report, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    report.save(tmp_path / "report.json")
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# --- numbers


def test_every_float_field_refuses_what_is_not_finite(report, content):
    floats = [keys for keys, hint in walk(content) if hint is float]
    # The sample fills every float field of the schema, or this loop would prove nothing.
    assert {keys[-1] for keys in floats} == {
        *("weight", "relative_norm", "max_abs", "probability", "rows", "recovered", "score_before", "score_after"),
        *("score_original_attacked", "score_control_attacked", "utility_after", "train_seconds"),
        *("at", "unlearned", "original", "control", "seconds", "bound", "measured"),
    }
    assert len(floats) == 36
    for keys in floats:
        for value in (float("nan"), float("inf"), float("-inf"), torch.tensor(float("nan")), np.float32("inf")):
            message = f"{dotted(keys)}: expected a finite number, got {float(value)}"
            assert refusal(changed(content, keys, value)) == message
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                changed(report, keys, value).to_dict()


def test_every_float_field_takes_scalars_and_nothing_else(report, content):
    for keys in [keys for keys, hint in walk(content) if hint is float]:
        for value in (torch.tensor(0.5), torch.tensor([0.5]), np.float64(0.5), np.float32(0.5)):
            got = changed(report, keys, value).to_dict()
            for key in keys:
                got = got[key]
            assert type(got) is float and got == 0.5
        for value in ("0.5", True, [0.5], {}, torch.tensor([0.5, 0.5]), 1j):
            expected = f"{dotted(keys)}: expected a number, got {type(value).__name__}"
            assert refusal(changed(content, keys, value)) == expected
    assert refusal(changed(content, ("footprint", "max_abs"), 10**400)) == (
        "footprint.max_abs: expected a number, got int"
    )
    assert refusal(changed(content, ("footprint", "max_abs"), None)) == (
        "footprint.max_abs: expected a number, got NoneType"
    )


def test_every_int_field_refuses_floats_and_bools(report, content):
    ints = [keys for keys, hint in walk(content) if hint is int]
    assert {keys[-1] for keys in ints} == {
        *("schema_version", "parameters", "trainable_parameters", "rank", "seed", "steps", "rows", "tokens", "size"),
        *("changed_parameters", "total_parameters", "processes", "trials"),
    }
    for keys in ints:
        for value, kind in ((1.0, "an integer"), ("1", "an integer"), ([], "an integer"), (True, "a number")):
            expected = f"{dotted(keys)}: expected {kind}, got {type(value).__name__}"
            assert refusal(changed(content, keys, value)) == expected
    assert refusal(changed(content, ("method", "seed"), 2**63)) == "method.seed: expected an integer of 64 bits"
    assert changed(report, ("method", "seed"), np.int64(3)).to_dict()["method"]["seed"] == 3


def test_settings_keep_the_type_of_each_value(report):
    report.method.settings |= {"radius": torch.tensor(0.25), "scale": np.float32(0.5), "ignore_index": -100}
    settings = report.to_dict()["method"]["settings"]
    assert settings == {
        **{"beta": 0.1, "learning_rate": 2e-5, "per_device_train_batch_size": 4},
        **{"optim": "adamw_torch", "bf16": False, "x": None},
        **{"radius": 0.25, "scale": 0.5, "ignore_index": -100},
    }
    assert [type(value) for value in settings.values()] == [
        *(float, float, int, str, bool, type(None)),
        *(float, float, int),
    ]
    report.method.settings["beta"] = float("nan")
    with pytest.raises(ValueError, match=r"^method\.settings\.beta: expected a finite number, got nan$"):
        report.to_dict()


# --- refusals


def test_every_missing_key_is_named(content):
    objects = [keys for keys, hint in walk(content) if dataclasses.is_dataclass(hint)]
    for keys, _ in walk(content):
        # Keys of free-form dicts, such as the settings, may be missing.
        if keys and keys[:-1] in objects:
            copied = copy.deepcopy(content)
            parent = copied
            for key in keys[:-1]:
                parent = parent[key]
            del parent[keys[-1]]
            assert refusal(copied) == f"missing key {dotted(keys)!r}"


def test_every_unknown_key_is_named(content):
    objects = [keys for keys, hint in walk(content) if dataclasses.is_dataclass(hint)]
    assert len(objects) == 22
    for keys in objects:
        assert refusal(changed(content, (*keys, "text"), "x")) == f"unknown key {dotted((*keys, 'text'))!r}"


def test_an_unknown_attribute_is_no_way_round_the_schema(report):
    report.data.forget.examples = ["a row"]
    with pytest.raises(ValueError, match=r"^unknown key 'data\.forget\.examples'$"):
        report.to_dict()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("base",), [], "base: expected an object, got list"),
        (("base",), None, "base: expected an object, got NoneType"),
        (("files",), {}, "files: expected a list, got dict"),
        (("metrics", "after"), [], "metrics.after: expected an object, got list"),
        (("base", "architecture"), 3, "base.architecture: expected one line of printable text, got int"),
        (("base", "architecture"), "a\nb", "base.architecture: expected one line of printable text, got str"),
        (("base", "dtype"), "\ud800", "base.dtype: expected one line of printable text, got str"),
        (("environment", "device"), "a\u202eb", "environment.device: expected one line of printable text, got str"),
        (("method", "scope", "kind"), "head", "method.scope.kind: expected 'lora' or 'peft' or 'selected' or 'full'"),
        (
            ("method", "reference"),
            "frozen",
            "method.reference: expected 'adapter_disabled' or 'initial_weights' or 'separate_model'",
        ),
        (
            ("data", "disclosure"),
            "secret",
            "data.disclosure: expected 'public' or 'category' or 'count-only' or 'sealed'",
        ),
        (
            ("metrics", "after", "authors"),
            {},
            "a key of metrics.after: expected 'forget' or 'retain' or 'real_authors' or 'world_facts' "
            "or 'harmful' or 'harmless' or 'harness'",
        ),
        (
            ("metrics", "after", "forget", "Who wrote it?"),
            1.0,
            "a key of metrics.after.forget: expected a plain name (letters, digits, _ . @ + -)",
        ),
        (("method", "settings", "layers"), [1], "method.settings.layers: expected a number, got list"),
        (("schema_version",), 0, "schema_version: expected 1 to 1, got 0"),
        (
            ("schema_version",),
            2,
            "this report has schema version 2; this hf-unlearn reads up to 1: upgrade hf-unlearn",
        ),
    ],
)
def test_refusals_say_where_and_what(content, keys, value, message):
    assert refusal(changed(content, keys, value)) == message


def test_a_newer_schema_is_refused_before_its_new_keys(content):
    assert refusal({**content, "schema_version": 2, "carbon": 1.0}).startswith("this report has schema version 2; ")


@pytest.mark.parametrize("value", [[], "text", None, 3])
def test_a_report_is_an_object(value):
    assert refusal(value) == f"the report: expected an object, got {type(value).__name__}"


@pytest.mark.parametrize(
    "model_id",
    ["/models/llama", "./llama", "../llama", "~/llama", "a/b/c", "C:\\llama", "org/", "/", "", "a b", "a/..b"],
)
def test_a_base_model_is_a_hub_id(content, model_id):
    assert refusal(changed(content, ("base", "model_id"), model_id)) == (
        "base.model_id: expected a Hub id such as 'org/name', never a path"
    )


@pytest.mark.parametrize("model_id", ["gpt2", "org/name", "HuggingFaceH4/zephyr-7b-beta", "a_b/c.d-1", None])
def test_hub_ids_are_taken(content, model_id):
    assert UnlearningReport.from_dict(changed(content, ("base", "model_id"), model_id)).base.model_id == model_id


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a", "a/../b", "a/..", "./a", "a/./b", "..", ".", "", "a\\b", "C:a", "a//b", "a/"]
)
def test_files_are_relative(content, path, tmp_path):
    message = "expected a relative path with forward slashes and without '..'"
    assert refusal(changed(content, ("files", 0, "path"), path)) == f"files[0].path: {message}"
    with pytest.raises(ValueError, match=re.escape(message)):
        hash_files(tmp_path, [path])


@pytest.mark.parametrize(
    "path", ["model.safetensors", "figures/a b.png", "a..b/.c", "..a", "model-00001-of-00002.bin"]
)
def test_relative_paths_are_taken(content, path):
    assert UnlearningReport.from_dict(changed(content, ("files", 0, "path"), path)).files[0].path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "report.json: not a JSON file"),
        (b"{", "report.json: not a JSON file"),
        (b"\xff\xfe\x00", "report.json: not a JSON file"),
        (b"[" * 100_000, "report.json: not a JSON file"),
        (b"[" + b"9" * 5000 + b"]", "report.json: not a JSON file"),
        (b"[]", "report.json: the report: expected an object, got list"),
        (b"{}", "report.json: missing key 'schema_version'"),
        (
            b'{"schema_version": 2}',
            "report.json: this report has schema version 2; this hf-unlearn reads up to 1: upgrade hf-unlearn",
        ),
    ],
)
def test_load_names_the_file(tmp_path, text, message):
    (tmp_path / "report.json").write_bytes(text)
    with pytest.raises(ValueError) as caught:
        UnlearningReport.load(tmp_path / "report.json")
    assert str(caught.value) == message


def test_load_refuses_nan_in_json(content, tmp_path):
    content["metrics"]["after"]["forget"]["probability"] = float("nan")
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"^report\.json: metrics\.after\.forget\.probability: expected a finite number, got nan$"
    ):
        UnlearningReport.load(tmp_path / "report.json")


JUNK = (
    *(None, True, False, 0, -1, 3, 2**70, 10**400, 0.5, -1.0, 1e308, 1e-320, float("nan"), float("inf")),
    *(
        "",
        "x",
        "two\nlines",
        "`|<b>$*_",
        "\ud800",
        "../x",
        "ä" * 300,
        b"x",
        [],
        [None],
        {},
        {"a": {}},
        {"two\nlines": 1},
    ),
)


@pytest.mark.parametrize("seed", range(1000))
def test_a_mutated_report_is_read_or_refused_in_one_line(content, seed):
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 2)):
        keys = rng.choice([keys for keys, _ in _places(content) if keys])
        parent = content
        for key in keys[:-1]:
            parent = parent[key]
        action = rng.choice(["replace", "replace", "delete", "add"])
        if action == "replace":
            # Half of the time with a value of the same type, so that many mutations are read and rendered.
            alike = [junk for junk in JUNK if type(junk) is type(parent[keys[-1]])]
            parent[keys[-1]] = rng.choice(alike if alike and rng.random() < 0.5 else JUNK)
        elif action == "delete":
            del parent[keys[-1]]
        elif isinstance(parent, dict):
            parent[rng.choice(["extra", "rows", "two\nlines", "a|b", "", 3])] = rng.choice(JUNK)
        else:
            parent.append(rng.choice(JUNK))
    try:
        report = UnlearningReport.from_dict(content)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
    else:
        assert UnlearningReport.from_dict(json.loads(report.to_json())) == report
        assert render_model_card(report).startswith("---\nlibrary_name: ")


def _places(value, keys=()):
    yield keys, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*keys, key))


# --- files and imports


def test_hash_files(tmp_path):
    (tmp_path / "figures").mkdir()
    large = b"0123456789abcdef" * 200_000
    (tmp_path / "model.safetensors").write_bytes(large)
    (tmp_path / "figures" / "a.png").write_bytes(b"")
    assert hash_files(tmp_path, ["model.safetensors", "figures/a.png"]) == [
        FileEntry("model.safetensors", 3_200_000, hashlib.sha256(large).hexdigest()),
        FileEntry("figures/a.png", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ]
    with pytest.raises(FileNotFoundError):
        hash_files(tmp_path, ["missing"])


IMPORTS = """
import sys
import hf_unlearn.cards
heavy = {"torch", "numpy", "transformers", "peft", "huggingface_hub", "jinja2", "yaml"}
print(sorted(heavy & set(sys.modules)))
card = hf_unlearn.cards.render_model_card(hf_unlearn.cards.UnlearningReport.load(sys.argv[1]))
print(len(card) > 1000, sorted(heavy & set(sys.modules)))
"""


def test_cards_never_import_torch(report, tmp_path):
    report.save(tmp_path / "report.json")
    command = [sys.executable, "-c", IMPORTS, str(tmp_path / "report.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\nTrue ['jinja2', 'yaml']\n"


def test_examples_run():
    results = doctest.testmod(hf_unlearn.cards.report)
    assert results.attempted > 0 and results.failed == 0
