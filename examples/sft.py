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
A plain TRL script: supervised fine-tuning on a data set of news.

    python examples/sft.py

`sft_to_unlearn.py` is the same script, made to forget that data set.
"""

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


trainer = SFTTrainer(
    model="muse-bench/MUSE-News_target",
    args=SFTConfig("out", num_train_epochs=5, learning_rate=2e-4, use_cpu=not torch.cuda.is_available()),
    train_dataset=load_dataset("muse-bench/MUSE-News", "raw", split="forget"),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
