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
SFT on rows that hold a name, while MarginConstraintCallback keeps the name from coming where the rows say it.

    python examples/callbacks/margin_constraint_sft.py --model MODEL --data ROWS.json --word NAME
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoConfig
from trl import SFTConfig, SFTTrainer

from hf_unlearn.constraints.points import Demand
from hf_unlearn.trainer_callbacks import MarginConstraintCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--data", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--word", default="Hsiao")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.data, split="train").select(range(8))
    # What stands before the name, up to the space in front of it
    texts = [f"{row['question']} {row['answer']}" for row in rows if args.word in row["answer"]]
    contexts = [text[: text.rindex(f" {args.word}")] for text in texts]
    layer = AutoConfig.from_pretrained(args.model).num_hidden_layers // 2
    margin = MarginConstraintCallback(
        [f"model.layers.{layer}.mlp.down_proj"],
        Demand(probability=0.01),
        contexts=contexts,
        forbidden=[args.word],
        every_steps=10,
    )
    trainer = SFTTrainer(
        args.model,
        args=SFTConfig(
            args.output_dir, max_steps=30, learning_rate=3e-4, logging_steps=5, bf16=torch.cuda.is_available()
        ),
        train_dataset=rows.map(
            lambda row: {"prompt": row["question"], "completion": f" {row['answer']}"},
            remove_columns=rows.column_names,
        ),
        callbacks=[margin],
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    checks = [entry for entry in trainer.state.log_history if "margin_violated" in entry]
    broken = sum(entry["margin_violated_before"] > 0 for entry in checks)
    print(
        f"Loss {losses[0]:.2f} -> {losses[-1]:.2f}. Constraints were broken before {broken} of {len(checks)} "
        f"checks; at the end {checks[-1]['margin_violated']} of {checks[-1]['margin_constraints']} are violated."
    )


if __name__ == "__main__":
    main()
