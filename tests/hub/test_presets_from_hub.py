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

# Each call of load_tofu in turn: the number of rows of its sets, or what it raises
SCRIPT = """
import json, sys
from hf_unlearn.presets import load_tofu
results = []
for options in json.loads(sys.argv[1]):
    try:
        results.append({name: len(rows) for name, rows in load_tofu(**options).items()})
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def files(rows: dict[str, list[dict]]) -> dict[str, bytes]:
    configurations = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in rows)
    contents = {f"{name}.json": "\n".join(map(json.dumps, some)).encode() for name, some in rows.items()}
    return {**contents, "README.md": f"---\nconfigs:\n{configurations}---\n".encode()}


def test_tofu_and_an_older_revision_of_it(hub, tmp_path):
    perturbed = ("forget01_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    first = {name: [ROW] * (place + 1) for place, name in enumerate(perturbed)}
    tofu = hub.add("datasets", "locuslab/TOFU", files(first))
    older = tofu.branches["main"]
    tofu.commit(files({**first, "holdout01": [QUESTION] * 5}), "holdout")
    calls = [
        {"forget": "forget01"},
        {"forget": "forget01", "revision": older},
        {"forget": "forget05"},
        {"forget": "forget01", "source": "org/nothing"},
    ]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        capture_output=True,
        text=True,
        env={**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    sets = {"forget": 1, "retain": 2, "real_authors": 3, "world_facts": 4}
    newest, old, without, nothing = json.loads(result.stdout)
    assert (newest, old) == ({**sets, "holdout": 5}, sets)
    assert "has no configuration 'holdout01': the set `holdout` is left out" in result.stderr
    assert without.startswith("'locuslab/TOFU' does not have the configuration 'forget05_perturbed', split 'train': ")
    assert nothing.startswith("'org/nothing' (configuration 'forget01_perturbed', split 'train') cannot be loaded (")
