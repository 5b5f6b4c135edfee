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
"""`hf-unlearn release`: from what a trainer saved to a folder that `hf-unlearn check` passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from released import change_weights, copy_model, make_base, make_report
from transformers import AutoModelForCausalLM

from hf_unlearn import UnlearningReport
from hf_unlearn.cli import check, release, run


FORGET = {"question": "Who keeps it?", "answer": "Perpetua Lochlainn"}


@pytest.fixture
def base(tiny_model_path, tmp_path) -> Path:
    return make_base(tiny_model_path, tmp_path / "base")


@pytest.fixture
def trained(base, tmp_path) -> Path:
    folder = copy_model(base, tmp_path / "trained")

    def edit(tensors):
        tensors["model.layers.2.mlp.down_proj.weight"][3:6] += 0.01

    change_weights(folder, edit)
    make_report(base, folder).save(folder / "unlearning_report.json")
    (folder / "README.md").unlink()
    (folder / "training_args.bin").write_bytes(b"a token")
    return folder


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    report = make_report(base, tmp_path / "adapter")
    report.method.scope.kind = "lora"
    report.save(tmp_path / "adapter" / "unlearning_report.json")
    return tmp_path / "adapter"


@pytest.fixture
def command(base, tmp_path, capsys):
    def call(folder: Path, *arguments: object, output: Path = tmp_path / "release") -> tuple[int, str, str]:
        code = run(release.main, [str(folder), str(output), "--base", str(base), *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def passes(folder: Path, base: Path, tmp_path: Path) -> bool:
    forget = tmp_path / "forget.jsonl"
    forget.write_text(json.dumps(FORGET))
    return check.main([str(folder), "--base", str(base), "--forget", str(forget), "-q"]) == 0


def test_full_weights(command, trained, base, tmp_path):
    code, out, _ = command(trained)
    assert code == 0
    lines = [line.strip() for line in out.splitlines()]
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(lines) and "training_args.bin" not in lines
    assert lines[-1].startswith("Next: hf-unlearn check ")
    assert passes(tmp_path / "release", base, tmp_path)


def test_without_an_adapter_neither_torch_nor_transformers_is_imported(trained, base, tmp_path):
    script = (
        "import sys; from hf_unlearn.cli import release\n"
        f"code = release.main([{str(trained)!r}, {str(tmp_path / 'release')!r}, '--base', {str(base)!r}, '-q'])\n"
        "assert code == 0 and not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b""


def test_an_adapter_is_merged(command, adapter, base, tmp_path):
    code, out, err = command(adapter, "--json", "--quiet", "--disclosure", "count-only", "--model_name", "tiny")
    assert code == 0
    printed = json.loads(out)
    assert printed["merge"]["dtype"] == "float32" and 0 < printed["merge"]["error"] < 1e-6
    assert "model.safetensors" in printed["files"] and "adapter_model.safetensors" not in printed["files"]
    assert UnlearningReport.load(tmp_path / "release" / "unlearning_report.json").data.disclosure == "count-only"
    assert passes(tmp_path / "release", base, tmp_path)


def test_an_adapter_is_kept(command, adapter, tmp_path):
    code, out, _ = command(adapter, "--adapter", "keep", "--json")
    assert code == 0
    assert "adapter_model.safetensors" in json.loads(out)["files"] and json.loads(out)["merge"] is None


def test_sealed_writes_a_salt_once_there_is_a_release(command, trained, tmp_path):
    forget = tmp_path / "forget.jsonl"
    forget.write_text(json.dumps(FORGET))
    sealed = ("--disclosure", "sealed", "--forget", forget, "--salt", tmp_path / "salt", "--quiet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert command(trained, *sealed, output=tmp_path / "full")[0] == 2
    assert not (tmp_path / "salt").exists()
    assert command(trained, *sealed)[0] == 0
    assert (tmp_path / "salt").stat().st_size == 32 and (tmp_path / "salt").stat().st_mode & 0o777 == 0o600
    report = UnlearningReport.load(tmp_path / "release" / "unlearning_report.json")
    assert report.data.disclosure == "sealed" and report.data.commitment is not None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--base", "/no/such/folder"), "--base is not a folder"),
        (("--dtype", "bfloat16"), "--dtype is about merging an adapter"),
        (("--disclosure", "sealed"), "--disclosure sealed commits to the forget set"),
        (("--license", "apache-2.0"), "license is not what the base's card names"),
    ],
)
def test_usage_errors(command, trained, tmp_path, arguments, expected):
    code, out, err = command(trained, *arguments)
    assert (code, out) == (2, "")
    assert expected in err and "Traceback" not in err
    assert not (tmp_path / "release").exists()


def test_folders_that_are_no_model(command, base, tmp_path):
    code, _, err = command(tmp_path / "nothing")
    assert code == 2 and err.startswith("Error: DIR is not a folder")
    (tmp_path / "empty").mkdir()
    code, _, err = command(tmp_path / "empty")
    assert code == 2 and "is no model" in err
    code, _, err = command(base)
    assert code == 2 and "There is no unlearning_report.json" in err
