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
Asks a cache in two processes:

    accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 tests/distributed/cache_worker.py SPEC
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics.cache import ScoreCache


def execute(folder: Path) -> dict:
    """The values that this process ends with, and how often it computed one."""
    calls = 0

    def compute() -> list[float]:
        nonlocal calls
        calls += 1
        # All processes meet here: one that computes alone waits for ever
        torch.distributed.barrier()
        return [7.0]

    cache = ScoreCache(folder)
    keys = ({"known": "to the first"}, {"known": "to the second"}, {"known": "to none"}, {"known": "to none"})
    return {"values": [cache.get(key, compute) for key in keys], "calls": calls}


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    UnlearnConfig(spec["output"], use_cpu=True)  # starts the processes' group, on the CPU
    state = PartialState()
    if state.num_processes != spec["world_size"]:
        raise RuntimeError(f"expected {spec['world_size']} processes, got {state.num_processes}")
    output = Path(spec["output"])
    result = execute(output / f"rank{state.process_index}")
    (output / f"rank{state.process_index}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
