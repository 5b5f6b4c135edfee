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
"""`hf-unlearn card build --base`: the licence of the base is taken over, and none is made up."""

import pytest
import yaml
from released import copy_model, make_release

from hf_unlearn.cards.metadata import parse_card
from hf_unlearn.cards.report import UnlearningReport
from hf_unlearn.cli import main


LICENCE = {"license": "other", "license_name": "my-licence", "license_link": "LICENSE"}


@pytest.fixture
def folders(tiny_model_path, tmp_path):
    """A base with a licence of its own, and a release made from it that names none."""
    base = copy_model(tiny_model_path, tmp_path / "base")
    (base / "README.md").write_text(f"---\n{yaml.safe_dump(LICENCE)}---\n# Base\n")
    (base / "LICENSE").write_bytes(b"Be kind.\r\n")
    return base, make_release(base, tmp_path / "release")


def test_the_licence_of_the_base_is_inherited_with_its_text(folders, capsys):
    base, release = folders
    for path in release.glob("LICENSE*"):
        path.unlink()
    assert main(["check", str(release), "--base", str(base), "-q"]) == 1
    assert "licence-differs" in capsys.readouterr().out
    assert main(["card", "build", str(release), "--base", str(base)]) == 0
    card = (release / "README.md").read_text()
    metadata, body = parse_card(card)
    assert {key: metadata[key] for key in LICENCE} == LICENCE
    assert "Under `my-licence`, the licence of the base model" in body and "(LICENSE)" in body
    assert (release / "LICENSE").read_bytes() == b"Be kind.\r\n"
    capsys.readouterr()
    assert main(["check", str(release), "--base", str(base), "-q"]) == 1  # no forget set was given
    assert capsys.readouterr().out.split() == ["no-forget-set", "the", "folder"]
    # Rendered anew without the base, it stays
    assert main(["card", "build", str(release), "-q"]) == 0
    assert {key: parse_card((release / "README.md").read_text())[0][key] for key in LICENCE} == LICENCE


def test_a_base_without_a_licence_gives_none(tiny_model_path, tmp_path, capsys):
    base = copy_model(tiny_model_path, tmp_path / "base")
    for path in [*base.glob("LICENSE*"), *base.glob("README.md")]:
        path.unlink()
    release = make_release(base, tmp_path / "release", mode="new")
    assert main(["card", "build", str(release), "--base", str(base), "--card_mode", "new"]) == 0
    assert "license" not in parse_card((release / "README.md").read_text())[0]
    assert "the base names no licence and has no licence file" in capsys.readouterr().err
    assert main(["card", "build", str(release), "--base", str(base), "--license", "mit"]) == 0
    assert parse_card((release / "README.md").read_text())[0]["license"] == "mit"


def test_a_missing_footprint_is_measured(folders, capsys):
    """A run without a reference keeps no copy of the weights to compare with."""
    base, release = folders
    path = release / "unlearning_report.json"
    stated = UnlearningReport.load(path)
    report = UnlearningReport.load(path)
    report.footprint = None
    report.save(path)
    rows = release.parent / "forget.jsonl"
    rows.write_text('{"question": "Who wrote it?", "answer": "Perpetua Quill"}\n')
    assert main(["card", "build", str(release), "-q"]) == 0
    check = ["check", str(release), "--base", str(base), "--forget", str(rows), "-q"]
    assert main(check) == 1 and "footprint unlearning_report.json" in capsys.readouterr().out
    assert main(["card", "build", str(release), "--base", str(base), "-q"]) == 0
    assert UnlearningReport.load(path).footprint == stated.footprint
    capsys.readouterr()
    assert main(check) == 0, capsys.readouterr().out


def test_another_licence_than_the_bases_is_refused(folders, capsys):
    base, release = folders
    before = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    assert main(["card", "build", str(release), "--base", str(base), "--license", "mit"]) == 2
    assert "--license is not what the base's card names" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in release.rglob("*") if path.is_file()} == before
    assert main(["card", "build", str(release), "--base", str(base / "none")]) == 2
    assert "--base is not a folder" in capsys.readouterr().err
