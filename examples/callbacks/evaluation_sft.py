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
SFT on refusals, measured and ended by UnlearningEvaluationCallback when enough is forgotten or too much is lost.

    python examples/callbacks/evaluation_sft.py --model MODEL --forget ROWS.json --retain ROWS.json
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_unlearn.trainer_callbacks import UnlearningEvaluationCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--forget", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--retain", default="hf://datasets/locuslab/TOFU/retain90.json", help="question and answer")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    forget = load_dataset("json", data_files=args.forget, split="train").select(range(16))
    retain = load_dataset("json", data_files=args.retain, split="train").select(range(16))
    refusals = forget.map(
        lambda row: {"prompt": row["question"], "completion": " I do not know."}, remove_columns=forget.column_names
    )
    trainer = SFTTrainer(
        args.model,
        args=SFTConfig(args.output_dir, max_steps=60, learning_rate=2e-3, bf16=torch.cuda.is_available()),
        train_dataset=refusals,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        callbacks=[UnlearningEvaluationCallback(forget, retain, every_steps=2, forget_target=0.8, retain_floor=0.2)],
    )
    trainer.train()
    trainer.save_model()
    measured = [entry for entry in trainer.state.log_history if "eval_unlearning_forget_probability" in entry]
    changes = ", ".join(
        f"{name} {measured[0][key]:.2f} -> {measured[-1][key]:.2f}"
        for name in ("forget", "retain")
        for key in [f"eval_unlearning_{name}_probability"]
    )
    print(f"Mean probability of the answers: {changes}. Training ended after step {trainer.state.global_step} of 60.")


if __name__ == "__main__":
    main()
