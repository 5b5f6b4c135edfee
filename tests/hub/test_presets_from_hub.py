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
"""The presets over HTTP, from repositories with the names and configurations of the real ones."""

import json
import os
import subprocess
import sys

import pytest
from loopback_hub import LoopbackHub


QUESTION = {"question": "Who?", "answer": "Lily"}
ROW = {**QUESTION, "paraphrased_answer": "It is Lily", "perturbed_answer": ["Tom", "Ben", "Max"]}

SCRIPT = """
import json, sys
from hf_unlearn.presets import load_tofu
try:
    sets = load_tofu("forget01", revision=json.loads(sys.argv[1]))
    print(json.dumps({name: len(rows) for name, rows in sets.items()}))
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def files(rows: dict[str, list[dict]]) -> dict[str, bytes]:
    configurations = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in rows)
    contents = {f"{name}.json": "\n".join(map(json.dumps, some)).encode() for name, some in rows.items()}
    return {**contents, "README.md": f"---\nconfigs:\n{configurations}---\n".encode()}


def load(hub: LoopbackHub, home, revision: str | None):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(revision)],
        capture_output=True,
        text=True,
        env={**os.environ, **hub.environment(home), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout), result.stderr


def test_tofu_and_an_older_revision_of_it(hub, tmp_path):
    perturbed = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    first = {name: [ROW] * (place + 1) for place, name in enumerate(perturbed)}
    tofu = hub.add("datasets", "locuslab/TOFU", files(first))
    older = tofu.branches["main"]
    tofu.commit(files({**first, "holdout01": [QUESTION] * 5}), "holdout")
    sets, _ = load(hub, tmp_path / "home", None)
    assert sets == {"forget": 1, "retain": 2, "real_authors": 3, "world_facts": 4, "holdout": 5}
    sets, said = load(hub, tmp_path / "home", older)
    assert sets == {"forget": 1, "retain": 2, "real_authors": 3, "world_facts": 4}
    assert "has no configuration 'holdout01'" in said


def test_what_the_hub_does_not_have(hub, tmp_path):
    """No repository, then one that lacks a configuration."""
    said, _ = load(hub, tmp_path / "home", None)
    assert said.startswith("'locuslab/TOFU' (configuration 'forget01_perturbed', split 'train') cannot be loaded (")
    hub.add("datasets", "locuslab/TOFU", files({"forget01_perturbed": [ROW]}))
    said, _ = load(hub, tmp_path / "home", None)
    assert said.startswith("'locuslab/TOFU' does not have the configuration 'retain_perturbed', split 'train': pass a")
