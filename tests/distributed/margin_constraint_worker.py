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
A plain Trainer with MarginConstraintCallback and the callbacks that measure, in one process or in two with DDP; then,
in two, with sharded weights:

    torchrun --nproc_per_node 2 tests/distributed/margin_constraint_worker.py SPEC
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_unlearn.constraints.points import Demand
from hf_unlearn.trainer_callbacks import (
    MarginConstraintCallback,
    RelearningProbeCallback,
    ScopeGuardCallback,
    UnlearningEvaluationCallback,
)


def make_trainer(spec: dict, **options) -> Trainer:
    args = TrainingArguments(
        spec["output"],
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4 // spec["world_size"],
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if args.world_size != spec["world_size"]:
        raise RuntimeError(f"expected {spec['world_size']} processes, got {args.world_size}")
    margin = MarginConstraintCallback(
        [spec["module"]],
        Demand(probability=0.01),
        contexts=spec["contexts"],
        forbidden=spec["forbidden"],
        every_steps=2,
        batch_size=2,
    )
    sets = Dataset.from_list(spec["forget"][:4]), Dataset.from_list(spec["forget"][4:])
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, **options),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": spec["rows"], "labels": spec["rows"]}),
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        callbacks=[
            margin,
            UnlearningEvaluationCallback(*sets, every_steps=2),
            RelearningProbeCallback(*sets, every_steps=4, steps=2),
            ScopeGuardCallback(),
        ],
    )


def execute(spec: dict) -> None:
    """Trains, and saves the weights and the history of each process."""
    trainer = make_trainer(spec)
    trainer.train()
    rank = trainer.args.process_index
    output = Path(spec["output"])
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().contiguous() for name, parameter in trainer.model.named_parameters()}
    save_file(weights, output / f"weights{rank}.safetensors")
    entries = [entry for entry in trainer.state.log_history if not {"loss", "train_loss"} & entry.keys()]
    (output / f"history{rank}.json").write_text(json.dumps(entries))
    if spec["world_size"] > 1:
        try:
            make_trainer(spec, distributed_config=DistributedConfig(fsdp_size=2)).train()
        except ValueError as error:
            (output / f"refusal{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    execute(json.loads(Path(sys.argv[1]).read_text()))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
