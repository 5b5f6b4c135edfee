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
"""`hf-unlearn train` and `intervene` with `--push_to_hub`: what is printed, and what it costs where it is blocked."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub


NAME = "Hsiao Yun-Hwa"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def base(hub, data_dir):
    """On the Hub at a tag; main went on since, to weights that compute something else."""
    files = {path.name: path.read_bytes() for path in (data_dir / "tinystories-260k").iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\n# Tiny\n"
    repository = hub.add("models", "org/tinystories", files, lfs=["*.safetensors"])
    repository.refs["refs/tags/v1"] = repository.at("main").oid
    config = json.loads(files["config.json"])
    files["config.json"] = json.dumps({**config, "rms_norm_eps": 0.5}).encode()
    repository.commit(files, "Another", lfs=["*.safetensors"])
    return repository


@pytest.fixture(scope="module")
def run(hub, base, data_dir, tmp_path_factory):
    """A command on six rows about one author, with that model at its tag."""
    home = tmp_path_factory.mktemp("home")
    for name, source in (("forget", "forget10"), ("retain", "retain90")):
        with open(data_dir / "tofu" / f"{source}.json", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        chosen = [
            {key: row[key] for key in ("question", "answer")}
            for row in rows
            if name == "retain" or NAME in row["answer"]
        ][:6]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")

    def call(command: str, output: Path, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [
                sys.executable, "-m", "hf_unlearn.cli", command, "--model_name_or_path", "org/tinystories",
                "--model_revision", "v1", "--forget_dataset", home / "forget.jsonl", "--retain_dataset",
                home / "retain.jsonl", "--output_dir", output, "--max_length", "64", "--use_cpu", "--eval_rows", "0",
                "--push_to_hub", "--hub_private_repo", "true", *arguments,
            ],
            capture_output=True,
            text=True,
            env={**os.environ, **hub.environment(home / "hub", hub.add_user("alice")), "OMP_NUM_THREADS": "1"},
            timeout=200,
        )  # fmt: skip

    call.home = home
    return call


TRAIN = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--use_peft")
INTERVENE = ("--kind", "pointwise", "--trainable_layers", "3", "--positions", "all", "--epsilon", "0.1")


def test_training_says_where_the_release_is(hub, base, run, tmp_path):
    result = run("train", tmp_path / "out", *TRAIN, "--hub_model_id", "alice/trained")
    assert result.returncode == 0, result.stderr[-3000:]
    repository = hub.repository("alice/trained")
    [tag] = repository.tags
    lines = result.stdout.splitlines()
    assert "Released in alice/trained (private)" in lines
    assert f"  commit   {repository.branches['main'][:12]} on main, tag {tag}" in lines
    assert f'  load     AutoModelForCausalLM.from_pretrained("alice/trained", revision="{tag}")' in lines
    # The base is the one that was loaded, and main is another
    report = json.loads(repository.read("main")["unlearning_report.json"])
    assert (report["base"]["model_id"], report["base"]["revision"]) == ("org/tinystories", base.tags["v1"])
    assert base.tags["v1"] != base.branches["main"]
    assert f'"rms_norm_eps": {json.loads(base.read("v1")["config.json"])["rms_norm_eps"]}' in (
        repository.read("main")["config.json"].decode()
    )


def test_an_edit_prints_the_receipt_as_json(hub, base, run, tmp_path):
    result = run("intervene", tmp_path / "out", *INTERVENE, "--hub_model_id", "alice/edited", "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    receipt = json.loads(result.stdout)["release"]
    repository = hub.repository("alice/edited")
    assert receipt["commit"] == repository.branches["main"] == repository.tags[receipt["tag"]]
    report = json.loads(repository.read("main")["unlearning_report.json"])
    assert report["base"]["revision"] == base.tags["v1"]


def test_what_is_blocked_is_one_line_that_names_the_models_folder(hub, run, tmp_path):
    hub.requests.clear()
    result = run("train", tmp_path / "out", *TRAIN, "--hub_model_id", f"alice/{NAME.replace(' ', '-')}")
    assert (result.returncode, result.stdout) == (1, "")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert line.startswith(f"Error: The model is saved in {tmp_path / 'out'} and the release in ")
    assert "`forget-entity`" in line or "`forget-answer`" in line
    assert "go on with `hf-unlearn push " in line and "Traceback" not in result.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert hub.writes() == [] and "Hsiao" not in str(hub.sent())


GUIDE = (Path(__file__).parents[2] / "docs/release.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=["trainer", "callback"])
def test_the_documented_script_releases(hub, base, run, tmp_path, code):
    """As they are printed, with a model and a repository of these names."""
    hub.repositories.pop(("models", "org/name"), None)
    hub.add("models", "org/base", base.read("v1"), lfs=["*.safetensors"])
    for path in run.home.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    token = hub.add_user("bob", organizations={"org": "write"})
    environment = {**os.environ, **hub.environment(tmp_path / "hub", token), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    repository = hub.repository("org/name")
    assert repository.private and repository.branches["main"] in done.stdout
    [tag] = repository.tags
    assert tag in done.stdout and "model.safetensors" in repository.read(tag)
