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
KTO of one matrix, and ScopeGuardCallback's proof that no other tensor changed by a bit.

    python examples/callbacks/scope_guard_kto.py --model MODEL --data ROWS.json
"""

import argparse
import re

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

from hf_unlearn.scope import freeze_all_but
from hf_unlearn.trainer_callbacks import ScopeGuardCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--data", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    name = f"model.layers.{model.config.num_hidden_layers // 2}.mlp.down_proj.weight"
    freeze_all_but(model, [name])
    rows = load_dataset("json", data_files=args.data, split="train").select(range(8))
    unwanted = [{"prompt": row["question"], "completion": f" {row['answer']}", "label": False} for row in rows]
    wanted = [{"prompt": row["question"], "completion": " I do not know.", "label": True} for row in rows]
    trainer = KTOTrainer(
        model,
        args=KTOConfig(
            args.output_dir,
            max_steps=4,
            learning_rate=1e-4,
            per_device_train_batch_size=4,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(unwanted + wanted),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[ScopeGuardCallback(allowed=[re.escape(name)])],
    )
    trainer.train()  # raises a ScopeViolationError where another tensor changed
    trainer.save_model()
    print(f"{len(model.state_dict()) - 1} tensors are bit-identical to what they were; {name} was trained.")


if __name__ == "__main__":
    main()
