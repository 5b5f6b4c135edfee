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
import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_unlearn.cli import run


@pytest.fixture
def models(small_model_path, tmp_path):
    """A trained model, and the same in shards with one matrix and one row changed."""
    model = AutoModelForCausalLM.from_pretrained(small_model_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.model.layers[2].mlp.down_proj.weight
        weight += 1e-3 * torch.randn(weight.shape, generator=generator)
        model.model.layers[0].self_attn.q_proj.weight[3] = 0
    model.save_pretrained(tmp_path / "new", max_shard_size="1MB")
    return small_model_path, str(tmp_path / "new")


@pytest.fixture
def call(capsys):
    """Runs a command as the console script does: exit code, stdout, stderr."""

    def call_command(name, *arguments):
        capsys.readouterr()  # bars of what was saved before
        code = run(importlib.import_module(f"hf_unlearn.cli.{name}").main, list(map(str, arguments)))
        return (code, *capsys.readouterr())

    return call_command


def test_table(models, call):
    code, out, err = call("diff", *models)
    lines = out.splitlines()
    assert code == 0 and "Comparing" in err
    assert lines[0].split() == ["changed", "tensor", "‖Δ‖/‖W‖", "max", "|Δ|", "changed", "of"]
    # The one that moved furthest comes first
    assert lines[1].split()[::3] == ["model.layers.0.self_attn.q_proj.weight", "128"]
    assert lines[2].split()[::3] == ["model.layers.2.mlp.down_proj.weight", "45,056"]
    before, after = (load_file_of(folder, "model.layers.0.self_attn.q_proj.weight") for folder in models)
    assert float(lines[1].split()[1]) == pytest.approx(((after - before).norm() / before.norm()).item(), rel=5e-3)
    assert lines[4] == "2 of 47 tensors changed, 45 identical bit for bit."
    assert lines[5].startswith("45,184 of 936,448 parameters changed (4.83%); ‖Δ‖/‖W‖ ")


def load_file_of(folder, name):
    for path in os.listdir(folder):
        if path.endswith(".safetensors"):
            tensors = load_file(os.path.join(folder, path))
            if name in tensors:
                return tensors[name]
    raise KeyError(name)


def test_quiet_json_and_same(models, call):
    base, new = models
    code, out, err = call("diff", base, new, "-q")
    assert (code, err) == (0, "") and len(out.splitlines()) == 2
    code, out, err = call("diff", base, new, "--json", "-q")
    content = json.loads(out)
    assert (code, err, content["same"], content["changed_parameters"]) == (0, "", False, 45184)
    assert len(content["tensors"]) == 47 and len(content["new_files"]) > 2
    code, out, _ = call("diff", base, base, "-q")
    assert code == 0 and out.startswith("The models are the same, bit for bit.\n")


def test_adapter(models, call, tmp_path):
    base, _ = models
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    code, out, _ = call("diff", base, tmp_path / "adapter")
    assert code == 0 and "5 of 47 tensors changed, 42 not touched by the adapter." in out
    code, out, _ = call("diff", tmp_path / "adapter")
    assert code == 0 and out.splitlines()[-1] == "10 tensors, 2,560 parameters."
    assert out.count("base_model.model.model.layers.") == 10


def test_manifest_and_apply(models, call, tmp_path):
    base, new = models
    commitment = "ab" * 32
    code, out, err = call("diff", base, new, "--manifest", tmp_path / "manifest", "--data-commitment", commitment)
    assert code == 0 and "not signed: integrity only, no author" in out
    content = json.loads((tmp_path / "manifest" / "edit_manifest.json").read_text())
    assert content["data_commitment"] == commitment and str(tmp_path) not in json.dumps(content)
    code, out, err = call("apply", base, tmp_path / "manifest", tmp_path / "out")
    assert code == 0 and "integrity only, no author" in out and "Applying" in err
    for name in os.listdir(new):
        if "safetensors" in name:
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    outputs = [
        AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]) for folder in (new, tmp_path / "out")
    ]
    assert torch.equal(*(output.logits for output in outputs))
    code, out, err = call("apply", base, tmp_path / "manifest", tmp_path / "out2", "--json", "-q")
    assert (code, err) == (0, "") and json.loads(out)["author"] is None
    code, out, err = call("apply", new, tmp_path / "manifest", tmp_path / "out3")
    assert (code, out) == (1, "") and "BASE is not the model" in err
    assert not (tmp_path / "out3").exists()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen (OpenSSH) is not installed")
def test_signed_manifest(models, call, tmp_path):
    base, new = models
    key, allowed = tmp_path / "key", tmp_path / "allowed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "x", "-f", key], check=True)
    allowed.write_text(f"someone@example.org {(tmp_path / 'key.pub').read_text()}")
    code, out, _ = call("diff", base, new, "-q", "--manifest", tmp_path / "manifest", "--sign", key)
    assert code == 0 and "Manifest written, signed;" in out
    options = ("--verify-signature", allowed, "--identity")
    code, out, _ = call("apply", base, tmp_path / "manifest", tmp_path / "out", *options, "someone@example.org")
    assert code == 0 and "(signed by someone@example.org)" in out
    code, _, err = call("apply", base, tmp_path / "manifest", tmp_path / "out2", *options, "else@example.org")
    assert code == 1 and "not a valid one" in err and not (tmp_path / "out2").exists()


def test_usage(models, call, tmp_path):
    """One sentence, exit code 2, and nothing on stdout."""
    base, new = models
    (tmp_path / "file").write_text("x")
    cases = {
        ("diff", "roneneldan/TinyStories-1M", new): "`hf download` it first",
        ("diff", base, tmp_path / "nowhere"): "NEW is not a folder",
        ("diff", base, tmp_path / "file"): "NEW is not a folder",
        ("diff",): "BASE",
        ("diff", base, new, "--sign", "key"): "add --manifest",
        ("diff", base, new, "--manifest", tmp_path / "x", "--sign", tmp_path / "key"): "key to sign with",
        ("diff", base, "--manifest", tmp_path / "x"): "two models",
        ("diff", base, new, "--manifest", tmp_path / "x", "--data_commitment", "secret"): "64 hexadecimal",
        ("diff", base, new, "--jsn"): "--jsn",
        ("apply", base, tmp_path): "OUT",
        ("apply", base, tmp_path / "file", tmp_path / "out"): "MANIFEST_FOLDER is not a folder",
        ("apply", base, tmp_path, new): "OUT exists already",
        ("apply", base, tmp_path, tmp_path / "out", "--identity", "x"): "needs both",
    }
    for arguments, sentence in cases.items():
        code, out, err = call(*arguments)
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1, arguments


def test_other_architecture(models, call, random_model, tmp_path):
    random_model("gpt2").save_pretrained(tmp_path / "gpt2")
    code, out, err = call("diff", models[0], tmp_path / "gpt2")
    assert (code, out) == (2, "") and "two architectures" in err and err.count("\n") == 1


def test_broken_files(models, call, tmp_path):
    """Exit code 1, one sentence that names the file, and no traceback."""
    base, new = models
    (tmp_path / "empty").mkdir()
    code, out, err = call("diff", base, tmp_path / "empty")
    assert (code, out) == (1, "") and "is no model" in err
    path = os.path.join(new, "model-00002-of-00004.safetensors")
    os.truncate(path, os.path.getsize(path) - 1)
    code, out, err = call("diff", base, new)
    assert (code, out) == (1, "") and "model-00002-of-00004.safetensors is shorter" in err and new not in err
    (tmp_path / "manifest").mkdir()
    code, out, err = call("apply", base, tmp_path / "manifest", tmp_path / "out")
    assert (code, out) == (1, "") and "has no edit_manifest.json" in err


def test_both_run_without_torch(models, tmp_path):
    code = (
        "import sys\nfrom hf_unlearn.cli import run\nfrom hf_unlearn.cli import diff, apply\n"
        "base, new, folder = sys.argv[1:]\n"
        "assert run(diff.main, [base, new, '-q', '--manifest', folder + '/manifest']) == 0\n"
        "assert run(apply.main, [base, folder + '/manifest', folder + '/out', '-q']) == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *models, tmp_path], stdout=subprocess.DEVNULL)
    assert result.returncode == 0
