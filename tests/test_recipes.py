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
"""Every shipped recipe parses, says where its settings come from, and trains on a trained tiny model."""

import json
from importlib.resources import files

import pytest
from transformers import AutoConfig

from hf_unlearn import UnlearningReport
from hf_unlearn.cli import main
from hf_unlearn.cli.train import make_parser


RECIPES = sorted(
    entry.name.removesuffix(".yaml") for entry in files("hf_unlearn.recipes").iterdir() if "yaml" in entry.name
)

# What a model of five layers cannot have of a recipe for a large one
SMALL = {
    "rmu_zephyr-7b_wmdp": ["--hidden_layer", "2", "--trainable_layers", "0-2"],
}


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_names_its_source(name, tmp_path):
    data, args, model, _ = make_parser().parse(["--config", name, "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert model.model_name_or_path and data.retain_dataset
    text = (files("hf_unlearn.recipes") / f"{name}.yaml").read_text()
    assert "https://huggingface.co/papers/" in text
    assert "ublished" in text
    assert args.forget_loss[0] in name or name.startswith("graddiff")


def test_rmu_recipe_has_the_published_settings(tmp_path):
    _, args, _, _ = make_parser().parse(["--config", "rmu_zephyr-7b_wmdp", "--output_dir", str(tmp_path)])
    assert (args.hidden_layer, args.steering_coefficient, args.retain_loss_weights) == (7, 6.5, [1200.0])
    assert (args.trainable_layers, args.trainable_modules) == ("5-7", ["mlp.down_proj"])
    assert (args.learning_rate, args.max_steps, args.adam_epsilon, args.max_grad_norm) == (5e-5, 500, 1e-6, 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name, tiny_model_path, tofu_rows, tmp_path, capfd):
    assert AutoConfig.from_pretrained(tiny_model_path).num_hidden_layers == 5
    for kind, rows in (("forget", tofu_rows("forget01")[:8]), ("retain", tofu_rows("retain90")[:8])):
        lines = [json.dumps({**row, "topic": "ab"[index % 2]}) for index, row in enumerate(rows)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    arguments = {
        "--config": name,
        "--model_name_or_path": tiny_model_path,
        "--forget_dataset": tmp_path / "forget.jsonl",
        "--retain_dataset": tmp_path / "retain.jsonl",
        "--output_dir": tmp_path / "out",
        "--use_cpu": "true",
        "--max_steps": "2",
        "--gradient_accumulation_steps": "1",
        "--max_length": "64",
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    assert main(["train", *words, *SMALL.get(name, [])]) == 0, capfd.readouterr().err
    assert UnlearningReport.load(tmp_path / "out" / "unlearning_report.json").method.steps == 2
