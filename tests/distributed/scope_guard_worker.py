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
Plain Trainers with ScopeGuardCallback in two processes with FSDP2, and with a frozen weight that changes in one shard:

    torchrun --nproc_per_node 2 tests/distributed/scope_guard_worker.py SPEC
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_unlearn.scope import freeze_all_but
from hf_unlearn.trainer_callbacks import ScopeGuardCallback, ScopeViolationError


TRAINED = "model.layers.1.mlp.down_proj.weight"
FROZEN = "model.layers.3.self_attn.q_proj.weight"


class Meddler(TrainerCallback):
    """Changes a frozen weight in the last process's shard."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if args.process_index == 1:
            with torch.no_grad():
                model.get_parameter(FROZEN).to_local()[0, 0] += 1e-3


def execute(spec: dict) -> dict:
    """What each run ended with: `None`, or the message of the violation."""
    rows = [[1, 5, 9, 30]] * 4
    ends = {}
    for name, allowed, others in (
        ("clean", None, []),
        ("meddled", None, [Meddler()]),
        ("meddled elsewhere", [TRAINED.replace(".", r"\.")], [Meddler()]),
        ("allowed", [TRAINED.replace(".", r"\."), FROZEN.replace(".", r"\.")], [Meddler()]),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            spec["model"], dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2)
        )
        freeze_all_but(model, [TRAINED])
        if not isinstance(model.get_parameter(TRAINED), DTensor):
            raise RuntimeError("the weights are not sharded")
        before = model.get_parameter(TRAINED).to_local().clone()
        args = TrainingArguments(
            spec["output"], use_cpu=True, max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True
        )
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        trainer = Trainer(model, args=args, train_dataset=data, callbacks=[*others, ScopeGuardCallback(allowed)])
        try:
            trainer.train()
            ends[name] = None
        except ScopeViolationError as violation:
            ends[name] = str(violation)
        if torch.equal(model.get_parameter(TRAINED).to_local(), before):
            raise RuntimeError("nothing was trained")
    return ends


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    spec = json.loads(Path(sys.argv[1]).read_text())
    rank = torch.distributed.get_rank()
    Path(spec["output"], f"ends{rank}.json").write_text(json.dumps(execute(spec)))
