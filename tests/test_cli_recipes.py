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
"""`hf-unlearn recipes`: each recipe is listed for what it is, and what is copied runs as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_unlearn.cli import main
from hf_unlearn.cli.recipes import read_recipes


FOLDER = Path(__file__).parents[1] / "examples" / "recipes"


def test_all_recipes_are_listed(capsys):
    assert main(["recipes", "list", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(entries) == {path.stem for path in FOLDER.glob("*.yaml")}
    for name, entry in entries.items():
        settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert entry["command"] == ("intervene" if "kind" in settings else "train")
        assert entry["model"] == settings.get("model_name_or_path")
        for key in ("kind", "forget_loss", "retain_loss"):
            assert str(settings.get(key, "")) in entry["method"]
        assert entry["source"].startswith("https://huggingface.co/papers/2") and len(entry["about"]) > 20
        assert "https://" not in entry["about"] and "--config" not in entry["about"]


def test_a_word_chooses(capsys):
    assert main(["recipes", "list", "RMU", "zephyr"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert names == sorted(name for name in (path.stem for path in FOLDER.glob("*rmu*zephyr*.yaml")))
    assert main(["recipes", "list", "no such word"]) == 2
    assert capsys.readouterr().err == "Error: No recipe has these words: `hf-unlearn recipes list` lists all.\n"


def test_show_and_copy(capsys, tmp_path, monkeypatch):
    text = (FOLDER / "rmu_zephyr-7b_wmdp.yaml").read_text()
    assert main(["recipes", "show", "rmu_zephyr-7b_wmdp"]) == 0
    assert capsys.readouterr().out == text
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "rmu_zephyr-7b_wmdp.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "rmu_zephyr-7b_wmdp.yaml"
    assert Path("rmu_zephyr-7b_wmdp.yaml").read_text() == text
    Path("mine.yaml").write_text("mine")
    assert main(["recipes", "copy", "rmu_zephyr-7b_wmdp", "mine.yaml"]) == 2
    assert "--force" in capsys.readouterr().err and Path("mine.yaml").read_text() == "mine"
    assert main(["recipes", "copy", "rmu_zephyr-7b_wmdp", "mine.yaml", "--force"]) == 0
    assert Path("mine.yaml").read_text() == text
    assert main(["recipes", "copy", "rmu_zephyr-7b_wmdp", "none/mine.yaml"]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize("name, hint", [("rmu_zephir-7b_wmdp", "`rmu_zephyr-7b_wmdp`"), ("xyzzy", "recipes list")])
def test_a_name_that_is_none(capsys, name, hint):
    for command in ("show", "copy"):
        assert main(["recipes", command, name]) == 2
        error = capsys.readouterr().err
        assert hint in error and error.count("\n") == 1


def test_it_needs_no_torch():
    program = (
        "import sys; from hf_unlearn.cli import main; code = main(['recipes', 'list']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == len(read_recipes()) + 3
