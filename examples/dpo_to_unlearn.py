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
`dpo.py` made to forget the rejected answers, and to keep another data set: two names, and one argument.

    python examples/dpo_to_unlearn.py

    -from trl import DPOConfig, DPOTrainer
    +from hf_unlearn import UnlearnConfig, UnlearnTrainer
    -trainer = DPOTrainer(
    +trainer = UnlearnTrainer(
    -    args=DPOConfig("out", num_train_epochs=5, learning_rate=1e-4, use_cpu=not torch.cuda.is_available()),
    +    args=UnlearnConfig("out", num_train_epochs=5, learning_rate=1e-4, use_cpu=not torch.cuda.is_available()),
    +    retain_dataset=load_dataset("json", data_files="retain.jsonl", split="train"),

The default forget loss, NPO, is the half of DPO that reads the rejected answers; `forget_loss="dpo"` prefers the
chosen ones to them, as TRL does. What to keep may have any columns: `text`, `prompt` and `completion`, `messages`.
"""

import torch
from datasets import load_dataset
from peft import LoraConfig

from hf_unlearn import UnlearnConfig, UnlearnTrainer


trainer = UnlearnTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    args=UnlearnConfig("out", num_train_epochs=5, learning_rate=1e-4, use_cpu=not torch.cuda.is_available()),
    train_dataset=load_dataset("json", data_files="preferences.jsonl", split="train"),
    retain_dataset=load_dataset("json", data_files="retain.jsonl", split="train"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
