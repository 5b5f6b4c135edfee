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
A plain Trainer whose run RunRecordCallback writes down: a report and a model card.

    python examples/callbacks/run_record_trainer.py --model MODEL --forget ROWS.json --retain ROWS.json
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_unlearn import UnlearningReport
from hf_unlearn.trainer_callbacks import RunRecordCallback


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="open-unlearning/tofu_Llama-3.2-1B-Instruct_full")
    parser.add_argument("--forget", default="hf://datasets/locuslab/TOFU/forget10.json", help="question and answer")
    parser.add_argument("--retain", default="hf://datasets/locuslab/TOFU/retain90.json", help="question and answer")
    parser.add_argument("--output_dir", default="out")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def tokenized(texts: list[str]) -> Dataset:
        return Dataset.from_dict({"input_ids": tokenizer(texts, truncation=True, max_length=64)["input_ids"]})

    forget = load_dataset("json", data_files=args.forget, split="train").select(range(8))
    retain = load_dataset("json", data_files=args.retain, split="train").select(range(8))
    sets = {
        "forget": tokenized([f"{row['question']} {row['answer']}" for row in forget]),
        "retain": tokenized([f"{row['question']} {row['answer']}" for row in retain]),
    }
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=TrainingArguments(
            args.output_dir, max_steps=8, learning_rate=1e-4, eval_on_start=True, eval_strategy="steps", eval_steps=8
        ),
        train_dataset=tokenized([f"{row['question']} I do not know." for row in forget]),
        eval_dataset=sets,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[RunRecordCallback(method="refusal-sft", forget_losses={"idk": 1.0})],
    )
    trainer.train()
    trainer.save_model()
    report = UnlearningReport.load(f"{args.output_dir}/unlearning_report.json")
    before, after = (values["forget"]["loss"] for values in (report.metrics.before, report.metrics.after))
    print(
        f"On record: {report.method.steps} steps, the weights moved by {report.footprint.relative_norm:.2e} of their "
        f"norm, loss on the forget set {before:.2f} -> {after:.2f}."
    )


if __name__ == "__main__":
    main()
