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
DPO against known answers, and by RelearningProbeCallback how much a short fine-tuning on other rows brings back.

    python examples/callbacks/relearning_probe_dpo.py --model MODEL --data ROWS.json
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from hf_unlearn.trainer_callbacks import RelearningProbeCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--data", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.data, split="train").select(range(20))
    pairs = [{"prompt": row["question"], "chosen": " I do not know.", "rejected": f" {row['answer']}"} for row in rows]
    probe = RelearningProbeCallback(
        rows.select(range(10)), rows.select(range(10, 20)), every_steps=10, steps=10, learning_rate=3e-3
    )
    trainer = DPOTrainer(
        args.model,
        args=DPOConfig(
            args.output_dir,
            max_steps=20,
            learning_rate=3e-3,
            per_device_train_batch_size=4,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(pairs),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        callbacks=[probe],
    )
    trainer.train()
    trainer.save_model()
    for entry in trainer.state.log_history:
        if "eval_relearning_after" in entry:
            print(
                f"Step {entry['step']}: mean probability of the held-out answers "
                f"{entry['eval_relearning_before']:.2f}, after relearning {entry['eval_relearning_after']:.2f}."
            )


if __name__ == "__main__":
    main()
