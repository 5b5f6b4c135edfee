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
SFT on refusals, pushed as a checked release by ReleaseCallback. Needs a token (`hf auth login`).

    python examples/callbacks/release_sft.py OWNER/NAME --model MODEL --data ROWS.json
"""

import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from hf_unlearn.trainer_callbacks import ReleaseCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repo_id", help="created, private, where it does not exist")
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--data", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.data, split="train").select(range(8))
    release = ReleaseCallback(args.repo_id, forget=rows, method="refusal-sft", forget_losses={"idk": 1.0})
    trainer = SFTTrainer(
        args.model,
        args=SFTConfig(
            args.output_dir,
            max_steps=4,
            learning_rate=1e-4,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=rows.map(
            lambda row: {"prompt": row["question"], "completion": " I do not know."}, remove_columns=rows.column_names
        ),
        callbacks=[release],
    )
    trainer.train()
    if release.receipt is None:
        raise SystemExit(release.error)
    print(f"Released {args.repo_id} at {release.receipt.tag}, commit {release.receipt.commit}.")


if __name__ == "__main__":
    main()
