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
import copy
import dataclasses

import pytest

from hf_unlearn.cards import (
    AttackResult,
    BaseModel,
    Certificate,
    CurvePoint,
    Data,
    DataSummary,
    Environment,
    FileEntry,
    Footprint,
    LossTerm,
    Method,
    Metrics,
    ModuleFootprint,
    Rule,
    Scope,
    UnlearningReport,
    Verdict,
)


# Every field filled, nothing null, every list and dict non-empty: what a test walks over is all there is.
REPORT = UnlearningReport(
    tool_version="0.1.0",
    base=BaseModel("org/tiny_model", "5f3a2b1", "LlamaForCausalLM", "llama", 936448, "float32"),
    method=Method(
        name="npo+kl",
        forget_losses=[LossTerm("npo", 1.0)],
        retain_losses=[LossTerm("kl", 2.5)],
        scope=Scope("lora", ["q_proj", "v_proj"], "5-7", 12288, 8),
        reference="adapter_disabled",
        settings={
            "beta": 0.1,
            "learning_rate": 2e-5,
            "per_device_train_batch_size": 4,
            "optim": "adamw_torch",
            "bf16": False,
            "x": None,
        },
        seed=7,
        steps=60,
    ),
    data=Data(DataSummary(rows=40, tokens=1203), DataSummary(rows=360, tokens=10877)),
    footprint=Footprint(
        changed_parameters=12288,
        total_parameters=936448,
        relative_norm=0.0123456,
        max_abs=0.05,
        modules=[ModuleFootprint("model.layers.5.mlp.down_proj.weight", 0.031, 0.05, 12288, 16384)],
    ),
    metrics=Metrics(
        before={"forget": {"probability": 0.912, "rows": 40.0}, "retain": {"probability": 0.88, "rows": 360.0}},
        after={"forget": {"probability": 0.01234, "rows": 40.0}, "retain": {"probability": 0.871, "rows": 360.0}},
        control={"forget": {"probability": 0.0112, "rows": 40.0}},
    ),
    attacks=[
        AttackResult(
            name="relearn",
            budget={"preset": "small", "steps": 100, "learning_rate": 2e-4},
            recovered=0.431,
            control="a model that never saw the facts",
            score_before=0.0123,
            score_after=0.4,
            score_original_attacked=0.91,
            score_control_attacked=0.01,
            utility_after=0.85,
            reason="best of two learning rates",
            seed=3,
            trials=8,
            tried={"learning_rate": [2e-4, 1e-3], "method": ["full", "lora"]},
            axis="step",
            curve=[CurvePoint(50, 0.2, 0.91, 0.01), CurvePoint(100, 0.4, 0.9, 0.02)],
            seconds=12.5,
        )
    ],
    verdict=Verdict(
        outcome="comes_back",
        rules=[Rule("recovered.relearn", 0.2, 0.431, False), Rule("kept.probability", 0.9, 0.99, True)],
        missing=["relearn at two learning rates"],
        not_run=["gcg"],
        thresholds_sha256="ef" * 32,
    ),
    certificates=[Certificate("argmax_radius", {"radius": 0.31, "tokens": 12}, "void if the head is trained again")],
    environment=Environment("3.11.9", "Linux", {"torch": "2.13.0"}, "cpu", 1, 83.21),
    files=[FileEntry("adapter_model.safetensors", 1234567, "ab" * 32), FileEntry("config.json", 612, "cd" * 32)],
)


@pytest.fixture
def report():
    return copy.deepcopy(REPORT)


@pytest.fixture
def content():
    return dataclasses.asdict(REPORT)
