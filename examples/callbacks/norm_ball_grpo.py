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
GRPO against repeating the words of an answer, within a ball around the weights that NormBallCallback keeps.

    python examples/callbacks/norm_ball_grpo.py --model MODEL --data ROWS.json
"""

import argparse
import re

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from hf_unlearn.trainer_callbacks import NormBallCallback


RADIUS = 0.001


def new_words(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """The share of a completion's words that the answer to be forgotten does not have."""
    rewards = []
    for completion, text in zip(completions, answer, strict=True):
        words = re.findall(r"\w+", completion.lower())
        known = set(re.findall(r"\w+", text.lower()))
        rewards.append(sum(word not in known for word in words) / max(len(words), 1))
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--data", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.data, split="train").select(range(16))
    ball = NormBallCallback(RADIUS, relative=True)
    trainer = GRPOTrainer(
        args.model,
        reward_funcs=new_words,
        args=GRPOConfig(
            args.output_dir,
            max_steps=4,
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=16,
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows.rename_column("question", "prompt"),
        callbacks=[ball],
    )
    start = torch.stack([parameter.detach().float().norm() for parameter in trainer.model.parameters()]).norm().item()
    trainer.train()
    trainer.save_model()
    print(f"The weights moved by {ball.distances['all'] / start:.2e} of their norm; {RADIUS:.2e} was allowed.")


if __name__ == "__main__":
    main()
