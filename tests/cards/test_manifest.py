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
import json
import math
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_unlearn.cards.manifest import (
    EDIT_NAME,
    MANIFEST_NAME,
    SIGNATURE_NAME,
    EditManifest,
    build_manifest,
    make_header,
)
from hf_unlearn.cards.rebuild import apply_manifest
from hf_unlearn.cards.signing import UNSIGNED, sign_manifest
from hf_unlearn.cards.tensor_files import open_model


needs_ssh_keygen = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen (OpenSSH) is not installed"
)
TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int8, torch.bool,
]  # fmt: skip


def make(base, new, folder, **options):
    with open_model(base) as first, open_model(new) as second:
        return build_manifest(first, second, folder, **options)


def apply(base, manifest, out, **options):
    with open_model(base) as model:
        return apply_manifest(model, manifest, out, **options)


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


@pytest.fixture
def pair(random_model, tmp_path):
    """A base in one file, and a sharded model with one row, one matrix and an untied head that differ."""
    model = random_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text('{"a":  1}')
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[7] += 1
        model.model.layers[0].self_attn.q_proj.weight[[0, 1, 31]] *= 2
        model.model.layers[1].mlp.down_proj.weight.add_(0.5)
    model.save_pretrained(tmp_path / "new", max_shard_size="50KB")
    return tmp_path / "base", tmp_path / "new"


def test_the_model_comes_back_bit_for_bit(pair, tmp_path):
    """Weights, shards and index are NEW's; what else a model has is the base's, but for the head that is untied."""
    base, new = pair
    manifest, _ = make(base, new, tmp_path / "manifest", settings={"beta": 0.1, "optim": "adamw_torch"})
    assert len(manifest.new_files) > 2
    assert {name: (edit.start, edit.rows) for name, edit in manifest.edits.items()} == {
        "lm_head.weight": ("model.embed_tokens.weight", [[7, 8]]),
        "model.layers.0.self_attn.q_proj.weight": ("model.layers.0.self_attn.q_proj.weight", [[0, 2], [31, 32]]),
        "model.layers.1.mlp.down_proj.weight": (None, []),
    }
    with np.errstate(all="raise"):
        assert apply(base, tmp_path / "manifest", tmp_path / "out") == UNSIGNED
    assert weights(tmp_path / "out") == weights(new)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a":  1}'
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (new, tmp_path / "out")]
    tokens = torch.arange(10)[None]
    assert torch.equal(*(model(tokens).logits for model in models))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type(dtype, tmp_path):
    """Rows, scalars, empty tensors, a new shape, a new type, NaN payloads: the same bytes."""
    bits = torch.randint(0, 256, (40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if dtype == torch.bool:
        bits &= 1
    base = {"rows": bits.view(dtype), "scalar": bits[0, :8].view(dtype)[0].clone(), "empty": torch.zeros(0, 3)}
    base |= {"shape": torch.zeros(4), "type": torch.zeros(3), "gone": torch.zeros(2)}
    changed = bits.clone()
    changed[[3, 4, 20]] ^= 1
    new = {"rows": changed.view(dtype), "scalar": changed[3, :8].view(dtype)[0].clone(), "empty": torch.zeros(0, 3)}
    new |= {"shape": torch.zeros(2, 2), "type": torch.zeros(3, dtype=torch.int16), "added": torch.zeros(5)}
    for name, tensors in (("base", base), ("new", new)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"} if name == "new" else None)
    manifest, _ = make(tmp_path / "base", tmp_path / "new", tmp_path / "manifest")
    assert manifest.edits["rows"].rows == [[3, 5], [20, 21]]
    apply(tmp_path / "base", tmp_path / "manifest", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "new")


def test_edit_larger_than_what_is_held(tmp_path):
    generator = np.random.default_rng(0)
    before = torch.from_numpy(generator.standard_normal((3000, 1000)).astype(np.float32))
    after = before.clone()
    after[1000:2100] += 1
    after[2999, 999] += 1
    for name, weight in (("base", before), ("new", after)):
        (tmp_path / name).mkdir()
        save_file({"weight": weight}, tmp_path / name / "model.safetensors")
    manifest, _ = make(tmp_path / "base", tmp_path / "new", tmp_path / "manifest")
    assert manifest.edits["weight"].rows == [[1000, 2100], [2999, 3000]]
    assert manifest.edit_file.size == pytest.approx(1101 * 4000, rel=0.01)
    apply(tmp_path / "base", tmp_path / "manifest", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "new")


def test_models_that_are_the_same(pair, tmp_path):
    base, _ = pair
    manifest, _ = make(base, base, tmp_path / "manifest")
    assert manifest.edits == {} and manifest.edit_file is None
    assert not (tmp_path / "manifest" / EDIT_NAME).exists()
    apply(base, tmp_path / "manifest", tmp_path / "out")
    assert weights(tmp_path / "out") == weights(base)


def test_wrong_base_wrong_edit_wrong_companion(pair, tmp_path):
    """Nothing is left behind, not even half of it."""
    base, new = pair
    make(base, new, tmp_path / "manifest")

    def refuses(sentence, base=base):
        with pytest.raises(ValueError, match=sentence) as error:
            apply(base, tmp_path / "manifest", tmp_path / "out")
        assert str(tmp_path) not in str(error.value)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))

    refuses("BASE is not the model", new)
    shutil.copytree(base, tmp_path / "other")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(content)
    refuses("BASE is not the model", tmp_path / "other")
    shutil.copy(base / "model.safetensors", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text("{}")
    refuses("tokenizer.json of BASE", tmp_path / "other")
    content = bytearray((tmp_path / "manifest" / EDIT_NAME).read_bytes())
    content[-1] ^= 1
    (tmp_path / "manifest" / EDIT_NAME).write_bytes(content)
    refuses("edit.safetensors is not the file")
    (tmp_path / "manifest" / EDIT_NAME).unlink()
    refuses("edit.safetensors is missing")


def test_a_manifest_that_names_another_result(pair, tmp_path):
    """Hashes of the new model that base and edit do not give: found after writing, before the folder has its name."""
    base, new = pair
    manifest, _ = make(base, new, tmp_path / "manifest")
    path = tmp_path / "manifest" / MANIFEST_NAME
    content = json.loads(path.read_text())
    for key, value in (("sha256", "0" * 64), ("path", "renamed.safetensors")):
        forged = copy.deepcopy(content)
        forged["new_files"][0][key] = value
        path.write_text(json.dumps(forged))
        if key == "path":  # another name alone is no other result
            apply(base, tmp_path / "manifest", tmp_path / "out")
            continue
        with pytest.raises(ValueError, match="not to be trusted"):
            apply(base, tmp_path / "manifest", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    forged = copy.deepcopy(content)
    forged["new_tensors"]["lm_head.weight"]["sha256"] = "0" * 64
    path.write_text(json.dumps(forged))
    with pytest.raises(ValueError, match="not to be trusted"):
        apply(base, tmp_path / "manifest", tmp_path / "out2")


def test_what_a_manifest_cannot_be_made_of(pair, tmp_path):
    base, new = pair
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        make(base, new, tmp_path / "there")
    with pytest.raises(ValueError, match="does not exist"):
        make(base, new, tmp_path / "no" / "where")
    (tmp_path / "odd").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "odd" / "model.safetensors", {"format": "pt", "note": "Bruce Wayne"})
    with pytest.raises(ValueError, match="save the model again") as error:
        make(base, tmp_path / "odd", tmp_path / "manifest")
    assert "Wayne" not in str(error.value) and not (tmp_path / "manifest").exists()
    with pytest.raises(ValueError, match="setting"):
        make(base, new, tmp_path / "manifest", settings={"note": "Bruce Wayne lives here"})
    with pytest.raises(ValueError, match="data_commitment"):
        make(base, new, tmp_path / "manifest", data_commitment="Bruce Wayne")
    assert not (tmp_path / "manifest").exists() and not list(tmp_path.glob(".*.tmp"))


def test_newer_schema(pair, tmp_path):
    base, new = pair
    manifest, _ = make(base, new, tmp_path / "manifest", data_commitment="ab" * 32)
    assert EditManifest.from_json(manifest.to_json().encode()) == manifest
    newer = dataclasses.replace(manifest, schema_version=2)
    with pytest.raises(ValueError, match="schema version 2.*upgrade"):
        EditManifest.from_json(newer.to_json().encode())


def test_edits_that_do_not_fit(pair, tmp_path):
    """Rows out of order, twice or outside, and a tensor that is left as it is but is another one in the base."""
    base, new = pair
    manifest, _ = make(base, new, tmp_path / "manifest")
    good = json.loads(manifest.to_json())
    name = "model.layers.0.self_attn.q_proj.weight"
    for rows in ([[0, 2], [1, 3]], [[3, 4], [0, 2]], [[0, 33]], [[2, 2]], [[-1, 1]], [[0, 1, 2]]):
        content = copy.deepcopy(good)
        content["edits"][name]["rows"] = rows
        with pytest.raises(ValueError, match="does not fit its tensor"):
            EditManifest.from_json(json.dumps(content).encode())
    content = copy.deepcopy(good)
    del content["edits"][name]
    with pytest.raises(ValueError, match="another one in the base"):
        EditManifest.from_json(json.dumps(content).encode())


def test_a_small_manifest_does_not_fill_a_disk(pair, tmp_path):
    """Copies of one tensor of the base under many names, and sizes that no file has."""
    base, new = pair
    make(base, new, tmp_path / "manifest")
    content = json.loads((tmp_path / "manifest" / MANIFEST_NAME).read_text())
    record = content["new_tensors"]["model.norm.weight"]
    file = next(file for file in content["new_files"] if "model.norm.weight" in file["tensors"])
    for number in range(100):
        content["new_tensors"][f"copy.{number}"] = record
        content["edits"][f"copy.{number}"] = {"start": "model.norm.weight", "rows": []}
        file["tensors"].append(f"copy.{number}")
    records = content["new_tensors"]
    described = [(name, records[name]["dtype"], records[name]["shape"]) for name in file["tensors"]]
    file["size"] = 8 + len(make_header(described, "pt")) + 4 * sum(math.prod(shape) for *_, shape in described)
    with pytest.raises(ValueError, match="copies more than one tensor"):
        EditManifest.from_json(json.dumps(content).encode())


def test_scattered_rows_do_not_blow_up_the_manifest(tmp_path):
    """Every other row of many tensors: stored whole where a list of the runs would be too long."""
    for name, step in (("base", 0.0), ("new", 1.0)):
        tensors = {f"w{number}": torch.zeros(30_000, 20) for number in range(8)}
        for tensor in tensors.values():
            tensor[::2] += step
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    manifest, difference = make(tmp_path / "base", tmp_path / "new", tmp_path / "manifest")
    assert all(len(tensor.change.row_ranges) == 15_000 for tensor in difference.tensors)
    assert all(edit.start is None for edit in manifest.edits.values())
    assert (tmp_path / "manifest" / MANIFEST_NAME).stat().st_size < 20_000


def faults(content, generator):
    """One fault in the values of a manifest: a key gone or added, a value of another type, size or sign."""
    spots = []

    def walk(value):
        if isinstance(value, (dict, list)):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            spots.extend((value, key) for key in keys)
            for key in keys:
                walk(value[key])

    walk(content)
    holder, key = generator.choice(spots)
    kind = generator.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder["x" * generator.randint(1, 5)] = holder[key]
    else:
        holder[key] = generator.choice(
            [None, True, -1, 2**70, 1e300, "", "../x", "a" * 64, [], {}, [[0, 10**12]], [[5, 1]], "F64", {"a": "b"}]
        )
    return content


def test_a_thousand_broken_manifests(pair, tmp_path):
    """Either a sentence, or a model with all the hashes that the manifest names: never half a folder."""
    base, new = pair
    make(base, new, tmp_path / "manifest")
    path = tmp_path / "manifest" / MANIFEST_NAME
    good = path.read_text()
    generator = random.Random(0)
    refused = 0
    for number in range(1000):
        if number % 3:
            path.write_text(json.dumps(faults(json.loads(good), generator)))
        else:
            broken = bytearray(good.encode())
            for _ in range(generator.randint(1, 3)):
                broken[generator.randrange(len(broken))] = generator.randrange(256)
            path.write_bytes(broken)
        try:
            apply(base, tmp_path / "manifest", tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 300
            assert not (tmp_path / "out").exists()
    assert refused > 800 and not list(tmp_path.glob(".*.tmp"))


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "x", "-f", path], check=True)
    public = (tmp_path / "key.pub").read_text().rsplit(" ", 1)[0]
    (tmp_path / "allowed").write_text(f"someone@example.org {public}\n")
    return path


@needs_ssh_keygen
def test_signature(pair, key, tmp_path):
    """Of this identity, of these bytes, for this purpose; and unsigned is not the same as verified."""
    base, new = pair
    folder = tmp_path / "manifest"
    make(base, new, folder)
    options = {"allowed_signers": tmp_path / "allowed", "identity": "someone@example.org"}
    with pytest.raises(ValueError, match="not signed"):
        apply(base, folder, tmp_path / "out", **options)
    sign_manifest(folder, key)
    assert apply(base, folder, tmp_path / "signed", **options) == "signed by someone@example.org"
    assert apply(base, folder, tmp_path / "unverified") == "integrity only, no author"
    for other in ("else@example.org", "-Oprint-pubkey"):
        with pytest.raises(ValueError, match="not a valid one"):
            apply(base, folder, tmp_path / "out", **{**options, "identity": other})
    content = (folder / MANIFEST_NAME).read_text()
    (folder / MANIFEST_NAME).write_text(content + "\n")
    with pytest.raises(ValueError, match="not a valid one"):
        apply(base, folder, tmp_path / "out", **options)
    (folder / MANIFEST_NAME).write_text(content)
    for_mail = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-f", key, "-n", "email"], input=content.encode(), capture_output=True, check=True
    ).stdout
    (folder / SIGNATURE_NAME).write_bytes(for_mail)
    with pytest.raises(ValueError, match="not a valid one"):
        apply(base, folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_no_ssh_keygen(pair, tmp_path, monkeypatch):
    base, new = pair
    make(base, new, tmp_path / "manifest")
    (tmp_path / "key").write_text("no key")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="ssh-keygen is not installed"):
        sign_manifest(tmp_path / "manifest", tmp_path / "key")
