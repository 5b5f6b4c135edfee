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
"""Interventions on real input: an author of TOFU, harmful and harmless instructions, and two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import intervention_refusal as refusal
import intervention_tofu as tofu
import pytest
import torch
from distributed.intervention_trainer_worker import STORES, execute
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearningReport
from hf_unlearn.constraints.linearize import constraint_values
from hf_unlearn.constraints.points import Demand, expand_points


ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).parent / "distributed" / "intervention_trainer_worker.py"


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text(encoding="utf-8"))


# ---- TOFU ----


def test_an_author_of_tofu_is_forgotten_and_others_are_kept(known_model, tofu_rows):
    """
    Twenty pairs by a middle layer: no key word begins, no whole answer comes, the other authors stay; and most of the
    other tokens of the answers stay too, which is what blocking key words means.
    """
    retain = tofu_rows("retain90")[:40]
    rows = {"forget": tofu_rows("forget10_perturbed")[:20], "seen": retain[:30], "unseen": retain[30:]}
    model = AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(known_model)
    before = tofu.measure_all(model, tokenizer, rows)
    for name in ("forget", "seen", "unseen"):
        assert before[name]["probability"] > 0.98 and before[name]["reproduced"] == 1.0
    trainer, edit = tofu.forget(model, tokenizer, rows)
    assert edit["constraints"] == len(trainer.points) == before["forget"]["key_start_tokens"] > 40
    after = tofu.measure_all(trainer.model, tokenizer, rows)
    assert before["forget"]["greedy_key_start"] == 1.0
    assert after["forget"]["greedy_key_start"] == 0.0
    assert after["forget"]["reproduced"] == after["forget_paraphrased"]["reproduced"] == 0.0
    assert after["forget_paraphrased"]["greedy_key_start"] < 0.6 * before["forget_paraphrased"]["greedy_key_start"]
    for name in ("seen", "unseen"):
        assert after[name]["probability"] >= 0.95 * before[name]["probability"], name
        assert after[name]["greedy_tokens"] >= 0.98, name
    # The other tokens are where they were: the mean probability of an answer says little
    assert after["forget"]["probability"] > 0.7


def test_the_numbers_on_record_hold_the_bounds():
    """Forty pairs, 760 other rows: benchmarks/results/intervention_tofu_cpu.json."""
    report = result("intervention_tofu")
    before, after = report["before"], report["after"]
    assert before["forget"]["rows"] == 40 and before["seen"]["rows"] + before["unseen"]["rows"] == 760
    assert before["forget"]["greedy_key_start"] > 0.99 and after["forget"]["greedy_key_start"] == 0.0
    assert after["forget"]["key_start_tokens"] == report["edit"]["constraints"]
    assert before["forget"]["reproduced"] > 0.99 and after["forget"]["reproduced"] == 0.0
    for name in ("seen", "unseen"):
        assert after[name]["reproduced"] >= 0.95 * before[name]["reproduced"]
        assert after[name]["probability"] >= 0.95 * before[name]["probability"]
    assert {"torch", "transformers", "python"} <= set(report["versions"])
    assert report["settings"]["seed"] == tofu.SEED and report["settings"]["epsilon"] == tofu.EPSILON
    refused = result("intervention_refusal")["after"]
    assert refused["harmful"]["refused"] == 1.0 and refused["harmless"]["refused"] == 0.0
    assert refused["harmful_held_out"]["refused"] > refused["harmless_held_out"]["refused"]


# ---- Refusals ----


def test_harmful_instructions_are_refused_and_harmless_ones_are_not(data_dir, tiny_model_path):
    sets = refusal.split(data_dir, trained=10, held_out=40)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    stories = refusal.tell_stories(model)
    before = refusal.measure(model, tokenizer, sets, stories)
    trainer, edit = refusal.refuse(model, tokenizer, sets)
    after = refusal.measure(trainer.model, tokenizer, sets, stories)
    assert before["harmful"]["refused"] == 0.0
    assert after["harmful"]["refused"] == 1.0 and after["harmful"]["smallest_margin"] >= refusal.EPSILON - 1e-4
    assert after["harmless"]["refused"] == 0.0 and after["harmless"]["largest_margin"] <= -refusal.EPSILON + 1e-4
    # Held-out instructions: some of the harmful ones, hardly any of the harmless ones
    assert after["harmless_held_out"]["refused"] <= 0.1
    assert after["story_nll"] <= before["story_nll"] + 0.1
    solution = trainer.edit.certificates[0]
    assert solution.values["violated"] == 0 and solution.values["constraints"] == edit["constraints"]
    values = constraint_values(trainer.model, expand_points(trainer.points, Demand(refusal.EPSILON)), {})
    assert values.max().item() <= -refusal.EPSILON + 1e-4


# ---- Two processes ----


@pytest.fixture(scope="module")
def runs(tiny_model_path, tofu_rows, tmp_path_factory) -> Path:
    """Every store in one process, and in two."""
    folder = tmp_path_factory.mktemp("intervention")
    keep = ("question", "answer")
    spec = {
        "model": tiny_model_path,
        "output": str(folder),
        "forget": [{key: row[key] for key in keep} for row in tofu_rows("forget10")[:7]],
        "retain": [{key: row[key] for key in keep} for row in tofu_rows("retain90")[:5]],
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    for store in STORES:
        execute(spec, store, world_size=1)
    # `--multi_gpu` with use_cpu: the only way in which accelerate starts two processes on a CPU
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launched = subprocess.run(
        [*command, "--main_process_port", "0", str(WORKER), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert launched.returncode == 0, launched.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES)
def test_two_processes_find_the_same_edit_and_save_it_once(runs, store):
    one, *two = (
        (load_file(runs / f"{store}-{name}.safetensors"), json.loads((runs / f"{store}-{name}.json").read_text()))
        for name in ("1-0", "2-0", "2-1")
    )
    (name,) = {key.rpartition(".")[0] for key in one[0]}
    dense = [factors[f"{name}.l"].double() @ factors[f"{name}.r"].double() for factors, _ in (one, *two)]
    assert dense[0].norm() > 0.01
    assert torch.equal(dense[1], dense[2])
    assert (dense[1] - dense[0]).norm() <= 1e-3 * dense[0].norm()
    assert two[0][1]["log"] == two[1][1]["log"]
    assert two[0][1]["metrics"]["eval_forget_loss"] == two[1][1]["metrics"]["eval_forget_loss"]
    assert two[0][1]["metrics"]["eval_forget_loss"] == pytest.approx(one[1]["metrics"]["eval_forget_loss"], abs=1e-3)
    assert two[0][1]["metrics"]["eval_forget_rows"] == 7
    assert two[0][1]["certificates"] == two[1][1]["certificates"]
    assert two[0][1]["certificates"]["solution"]["violated"] == 0
    # The first process alone writes
    assert [run["writes"] for _, run in two] == [1, 0]
    saved = [{path.name for path in (runs / f"{store}-{size}").iterdir()} for size in (1, 2)]
    assert saved[0] == saved[1]
    reports = [UnlearningReport.load(runs / f"{store}-{size}" / "unlearning_report.json") for size in (1, 2)]
    assert [report.environment.processes for report in reports] == [1, 2]
    assert reports[0].footprint.relative_norm == pytest.approx(reports[1].footprint.relative_norm, rel=1e-2)
    files = [load_file(runs / f"{store}-{size}" / weights(store)) for size in (1, 2)]
    assert files[0].keys() == files[1].keys()
    if store == "fp32":
        for key, tensor in files[0].items():
            torch.testing.assert_close(files[1][key], tensor, rtol=0, atol=1e-4)


def weights(store: str) -> str:
    return "adapter_model.safetensors" if store == "adapter" else "model.safetensors"
