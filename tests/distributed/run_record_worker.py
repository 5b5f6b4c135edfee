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
A plain Trainer with RunRecordCallback, in one process or in two:

    torchrun --nproc_per_node 2 tests/distributed/run_record_worker.py SPEC
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_unlearn.cards import report as schema
from hf_unlearn.trainer_callbacks import RunRecordCallback


def execute(spec: dict) -> None:
    """Trains, and notes which processes wrote a report."""
    args = TrainingArguments(
        spec["output"],
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4 // spec["world_size"],
        learning_rate=1e-3,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
    )
    if args.world_size != spec["world_size"]:
        raise RuntimeError(f"expected {spec['world_size']} processes, got {args.world_size}")
    written = []
    write_text = schema.write_text

    def noted(path: str, text: str) -> None:
        written.append(str(path))
        write_text(path, text)

    schema.write_text = noted
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": spec["rows"], "labels": spec["rows"]}),
        callbacks=[RunRecordCallback()],
    )
    trainer.train()
    Path(spec["output"], f"rank{args.process_index}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    execute(json.loads(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
