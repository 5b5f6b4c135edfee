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
"""docs/configuration.md is what the dataclasses say, and their docstrings say what their fields do."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import configuration_reference as reference  # noqa: E402 (a tool, and no module of the package)


CLASSES = [cls for cls, _ in reference.CLASSES]


def test_the_page_is_up_to_date():
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_field_is_described_with_its_default(cls):
    options, fields = reference.read_options(cls), reference.own_fields(cls)
    names = [option.name for option in options]
    assert len(names) == len(set(names)) > 2
    page = reference.PATH.read_text(encoding="utf-8")
    for option in options:
        assert (option.default or "None") == reference.default_of(fields[option.name]), option.name
        assert option.text.endswith("."), option.name
        assert f"| `{option.name}` |" in page
    # Those without a description are transformers' own, with another default that the page names
    assert all(f"`{name}` " in page for name in fields.keys() - set(names))


def test_a_change_is_noticed(tmp_path, monkeypatch, capsys):
    page = tmp_path / "configuration.md"
    monkeypatch.setattr(reference, "PATH", page)
    assert reference.main(["--check"]) == 1 and reference.main([]) == 0 and reference.main(["--check"]) == 0
    page.write_text(page.read_text().replace("| `0.0` |", "| `0.1` |", 1))
    capsys.readouterr()
    assert reference.main(["--check"]) == 1
    assert "run python tools/configuration_reference.py" in capsys.readouterr().out
