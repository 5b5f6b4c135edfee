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
`sft.py` made to forget what it was trained on, and to keep another data set: two names, and one argument.

    python examples/sft_to_unlearn.py

    -from trl import SFTConfig, SFTTrainer
    +from hf_unlearn import UnlearnConfig, UnlearnTrainer
    -trainer = SFTTrainer(
    +trainer = UnlearnTrainer(
    -    args=SFTConfig("out", num_train_epochs=5, learning_rate=2e-4, use_cpu=not torch.cuda.is_available()),
    +    args=UnlearnConfig("out", num_train_epochs=5, learning_rate=2e-4, use_cpu=not torch.cuda.is_available()),
    +    retain_dataset=load_dataset("muse-bench/MUSE-News", "raw", split="retain1"),
"""

import torch
from datasets import load_dataset
from peft import LoraConfig

from hf_unlearn import UnlearnConfig, UnlearnTrainer


trainer = UnlearnTrainer(
    model="muse-bench/MUSE-News_target",
    args=UnlearnConfig("out", num_train_epochs=5, learning_rate=2e-4, use_cpu=not torch.cuda.is_available()),
    train_dataset=load_dataset("muse-bench/MUSE-News", "raw", split="forget"),
    retain_dataset=load_dataset("muse-bench/MUSE-News", "raw", split="retain1"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
