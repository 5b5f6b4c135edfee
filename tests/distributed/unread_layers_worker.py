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
"""
One process of `test_two_processes`: `unread_layers_worker.py MODEL ROWS WAITS OUTPUT`. Trains with RMU, evaluates and
saves after each step, and writes what came out.
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_unlearn.unread_layers
from hf_unlearn import UnlearnConfig, UnlearnTrainer


def main(model_path: str, rows_path: str, waits: str, output: str) -> None:
    hf_unlearn.unread_layers.host_is_elsewhere = lambda device: waits == "True"
    with open(rows_path, encoding="utf-8") as file:
        sets = {name: Dataset.from_list(rows) for name, rows in json.load(file).items()}
    trainer = UnlearnTrainer(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        args=UnlearnConfig(
            output,
            use_cpu=True,
            bf16=False,
            forget_loss=["rmu"],
            retain_loss=["hidden_mse"],
            hidden_layer=2,
            trainable_layers="1-2",
            trainable_modules=["mlp.down_proj"],
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=48,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=sets["forget"],
        retain_dataset=sets["retain"],
        eval_dataset={"retain": sets["retain"]},
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )
    assert (trainer.unread_layers is not None) == (waits == "True")
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        logs = [(entry.get("loss"), entry.get("eval_retain_loss")) for entry in trainer.state.log_history]
        with open(f"{output}.json", "w", encoding="utf-8") as file:
            json.dump({"logs": logs, "processes": trainer.args.world_size}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
