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
Counts refusals in two processes:

    accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 tests/distributed/refusal_worker.py SPEC
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics.refusal import evaluate_refusals


def execute(spec: dict, output: str) -> None:
    """Writes the evaluation that this process ends with."""
    args = UnlearnConfig(spec["output"], use_cpu=True, max_length=256)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    sets = {name: Dataset.from_list(rows) for name, rows in spec["sets"].items()}
    evaluation = evaluate_refusals(model, tokenizer, sets, args, batch_size=3, max_new_tokens=12)
    Path(output).write_text(json.dumps(asdict(evaluation)))


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    UnlearnConfig(spec["output"], use_cpu=True)  # starts the processes' group, on the CPU
    state = PartialState()
    if state.num_processes != spec["world_size"]:
        raise RuntimeError(f"expected {spec['world_size']} processes, got {state.num_processes}")
    execute(spec, f"{spec['output']}/rank{state.process_index}.json")
    torch.distributed.destroy_process_group()
