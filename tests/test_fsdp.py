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
"""FSDP2 on two CPU processes trains what one process trains, with every kind of reference that it supports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors import safe_open


pytestmark = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8"), reason="transformers loads models into FSDP2 with torch >= 2.8"
)

WORKER = Path(__file__).parent / "distributed" / "engines_worker.py"

SELECTED = {"trainable_layers": "1-2", "trainable_modules": ["mlp.down_proj"]}
NPO = {"forget_loss": ["npo"], "retain_loss": ["kl", "nll"], "learning_rate": 0.02}
RMU = {"forget_loss": ["rmu"], "retain_loss": ["hidden_mse"], "hidden_layer": 2, "learning_rate": 1.0}

RUNS = {
    "rmu, truncated, swapped": {"settings": {**RMU, **SELECTED}},
    "npo, swapped": {"settings": {**NPO, **SELECTED}},
    "npo, second sharded model": {"settings": {**NPO, **SELECTED}, "separate_reference": True},
    "npo, sam, global and averaging": {
        "settings": {
            **SELECTED,
            "forget_loss": ["npo"],
            "retain_loss": ["nll"],
            "learning_rate": 0.005,
            "sharpness": "sam",
            "gradient_conflict": "global",
            "weight_averaging_start": 2,
            "weight_averaging_every": 1,
        }
    },
    # Three sets of rows in one forward, and the reference's logits against the trained head
    "dpo and undial, swapped": {
        "settings": {
            **SELECTED,
            "forget_loss": ["dpo", "undial"],
            "retain_loss": ["logprob_mse"],
            "learning_rate": 0.02,
        }
    },
    # bf16 parameters and fp32 gradients: two runs on two processes, compared with each other
    "npo, swapped, mixed precision": {"settings": {**NPO, **SELECTED}, "mixed_precision": True},
    "npo, second sharded model, mixed precision": {
        "settings": {**NPO, **SELECTED},
        "mixed_precision": True,
        "separate_reference": True,
    },
    # Weights, step and scale of the invariance table: both factors move, and the trajectory is not chaotic
    "npo, lora": {
        "settings": {
            "forget_loss_weights": [0.03],
            "retain_loss": ["kl"],
            "retain_loss_weights": [0.003],
            "learning_rate": 590.0,
        },
        "lora": True,
    },
    # The final norm is sharded with the head in a group that stays gathered: a swap would not reach the forward.
    "npo, norm": {"settings": {**NPO, "trainable_modules": ["model.norm"]}, "refused": True},
    "npo, adversary": {"settings": {**NPO, **SELECTED, "latent_adversary_layers": "1"}, "refused": True},
}


REFUSED = [name for name, run in RUNS.items() if run.get("refused")]


def specification(folder: Path, data_dir: Path, engine: str | None) -> Path:
    folder.mkdir()
    options = ("separate_reference", "lora", "mixed_precision", "probe", "far_retain", "quantized", "saves")
    runs = [{"name": name, **dict.fromkeys(options, False), **run} for name, run in RUNS.items()]
    if engine is None:
        runs = [run for run in runs if run["name"] not in REFUSED and not run["mixed_precision"]]
    for run in runs:
        run.pop("refused", None)
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"runs": runs, "data": str(data_dir), "output": str(folder), "engine": engine}))
    return spec


@pytest.fixture(scope="module")
def folders(data_dir, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fsdp")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun)):
        spec = specification(root / name, data_dir, "FSDP2 at loading" if name == "two" else None)
        result = subprocess.run(
            [*launcher, str(WORKER), str(spec)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert result.returncode == 0, result.stderr[-4000:]
    return {"one": root / "one", "two": root / "two"}


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.mark.parametrize("name", [name for name in RUNS if name not in REFUSED and "mixed precision" not in name])
def test_sharded_training_equals_one_process(folders, name):
    expected, expected_record = load(folders["one"] / name)
    actual, actual_record = load(folders["two"] / name)
    ends = [key for key in expected if key.startswith("end/")]
    assert ends
    for end in ends:
        start = expected[end.replace("end/", "start/")]
        moved = (expected[end] - start).norm()
        assert moved > 0.01 * start.norm(), end
        assert (actual[end] - expected[end]).norm() <= 1e-5 * moved, end
    for mine, theirs in zip(json.loads(actual_record["log"]), json.loads(expected_record["log"]), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    # The footprint is that of the whole tensors: norms add up over shards, the largest change does not
    norm, largest, changed = json.loads(actual_record["footprint"])
    assert [norm, largest] == pytest.approx(json.loads(expected_record["footprint"])[:2], rel=1e-5)
    assert changed == pytest.approx(json.loads(expected_record["footprint"])[2], rel=1e-3)


@pytest.mark.parametrize("precision", ["", ", mixed precision"])
def test_swapped_reference_equals_a_second_model(folders, precision):
    mine, my_record = load(folders["two"] / f"npo, swapped{precision}")
    separate, separate_record = load(folders["two"] / f"npo, second sharded model{precision}")
    my_log, separate_log = json.loads(my_record["log"]), json.loads(separate_record["log"])
    assert separate_log[-1]["forget/log_ratio"] < -5  # policy and reference differ: equality below says something
    assert [entry["loss"] for entry in my_log] == [entry["loss"] for entry in separate_log]
    for name in separate:
        assert torch.equal(mine[name], separate[name]), name


def test_swap_outside_the_layers_is_refused(folders):
    message = (folders["two"] / "npo, norm.error").read_text()
    assert message == (
        "A reference swapped in, with weights outside the decoder layers trained is not supported with FSDP2 at "
        "loading: norm, embedding and head are sharded in groups that stay gathered, which a swap would not reach. "
        "Train decoder layers only (trainable_layers), use a fresh peft_config, or pass ref_model."
    )


def test_latent_adversary_on_a_sharded_model_is_refused(folders):
    message = (folders["two"] / "npo, adversary.error").read_text()
    assert message.startswith("latent_adversary_layers is not supported with FSDP2 at loading: ")
