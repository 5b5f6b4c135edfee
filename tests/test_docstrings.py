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
"""The examples in docstrings are run as written."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest


def modules_with_examples():
    """
    Every importable module of the package whose text has an example. Modules are imported, not read from paths:
    `cards` and `trainer_callbacks` are installed under other names than their folders'.
    """
    names = ["hf_unlearn", "hf_unlearn.cards", "hf_unlearn.trainer_callbacks"]
    for package in list(names):
        module = importlib.import_module(package)
        names += [info.name for info in pkgutil.walk_packages(module.__path__, f"{package}.")]
    files = {name: Path(importlib.import_module(name).__file__) for name in names}
    return [name for name, file in files.items() if ">>> " in file.read_text(encoding="utf-8")]


MODULES = modules_with_examples()


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


def test_examples_are_found():
    expected = {
        "hf_unlearn.losses.forget",
        "hf_unlearn.losses.retain",
        "hf_unlearn.scope",
        "hf_unlearn.pairing",
        "hf_unlearn.cards.report",
        "hf_unlearn.cards.card",
    }
    assert expected <= set(MODULES)
