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
Measures memorization and multiple choice in two processes:

    accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 tests/distributed/memorization_worker.py SPEC
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
from hf_unlearn.metrics.choices import evaluate_choices
from hf_unlearn.metrics.memorization import evaluate_memorization


def execute(spec: dict, output: str) -> None:
    """Writes the evaluations that this process ends with."""
    args = UnlearnConfig(spec["output"], use_cpu=True, max_length=256)
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])

    def sets(name: str) -> dict[str, Dataset]:
        return {key: Dataset.from_list(rows) for key, rows in spec[name].items()}

    memorization = evaluate_memorization(
        model,
        tokenizer,
        Dataset.from_list(spec["passages"]),
        sets("questions"),
        sets("demonstrations"),
        args,
        batch_size=2,
        max_passage_tokens=24,
        max_answer_tokens=16,
    )
    choices = evaluate_choices(model, tokenizer, sets("choices"), args, batch_size=3)
    Path(output).write_text(json.dumps({"memorization": asdict(memorization), "choices": asdict(choices)}))


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    UnlearnConfig(spec["output"], use_cpu=True)  # starts the processes' group, on the CPU
    state = PartialState()
    if state.num_processes != spec["world_size"]:
        raise RuntimeError(f"expected {spec['world_size']} processes, got {state.num_processes}")
    execute(spec, f"{spec['output']}/rank{state.process_index}.json")
    torch.distributed.destroy_process_group()
