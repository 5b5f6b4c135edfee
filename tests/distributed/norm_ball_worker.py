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
A plain Trainer with NormBallCallback, in one process, in two with DDP, or in two with FSDP2:

    torchrun --nproc_per_node 2 tests/distributed/norm_ball_worker.py SPEC
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_unlearn.trainer_callbacks import NormBallCallback


def execute(spec: dict) -> None:
    """Trains, and saves the weights and the distances."""
    output = Path(spec["output"])
    args = TrainingArguments(
        str(output),
        use_cpu=True,
        max_steps=spec["steps"],
        per_device_train_batch_size=4 // spec["world_size"],
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    ball = NormBallCallback(**spec["ball"])
    rows = spec["rows"]
    options = {"distributed_config": DistributedConfig(fsdp_size=2)} if spec["fsdp"] else {}
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32, **options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or "layers.0" in name)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        callbacks=[ball],
    )
    trainer.train()
    weights = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    sharded = any(isinstance(tensor, DTensor) for tensor in weights.values())
    if sharded != spec["fsdp"]:
        raise RuntimeError("the weights are not sharded as was asked for")
    weights = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()
        for name, tensor in weights.items()
    }
    distances = ball.distances
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        save_file(weights, output / "weights.safetensors")
        (output / "distances.json").write_text(json.dumps(distances))


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["fsdp"]:
        torch.distributed.init_process_group("gloo")
    execute(spec)
