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
Memory and reads of comparing two sharded models on disk.

    python benchmarks/model_diff.py --json benchmarks/results/model_diff_cpu.json

A pair of bf16 models is written with NumPy into a temporary folder, which is removed afterwards. Comparing them,
making the edit manifest and applying it each run in a process of their own. What is counted stands in
`benchmarks/README.md`.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_processor, describe_versions

from hf_unlearn.cards.diff import diff_models
from hf_unlearn.cards.manifest import build_manifest, make_header
from hf_unlearn.cards.rebuild import apply_manifest
from hf_unlearn.cards.tensor_files import INDEX_NAME, open_model


SHARDS = 4
ROW = 4096  # columns of every matrix
MEMORY_BOUND = 300 * 2**20
# Every CHANGED-th matrix differs: in one row, in all of them, in one, ...
CHANGED = 8
STEPS = ("diff", "manifest", "apply")


def write_pair(folder: Path, size: int, matrices: int, seed: int) -> None:
    """
    Two models of `size` bytes with the same names and shards, `base` and `new`.

    Args:
        folder (`Path`): where their folders go.
        size (`int`): bytes of all tensors of one of them.
        matrices (`int`): number of tensors.
        seed (`int`): seed of the weights.
    """
    rows = size // (2 * ROW * matrices)
    names = [f"model.layers.{number:03d}.weight" for number in range(matrices)]
    generator = np.random.default_rng(seed)
    weight_map = {name: _shard(number * SHARDS // matrices) for number, name in enumerate(names)}
    for model in ("base", "new"):
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        (folder / model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for shard in range(SHARDS):
        own = [number for number, name in enumerate(names) if weight_map[name] == _shard(shard)]
        header = make_header([(names[number], "BF16", (rows, ROW)) for number in own], "pt")
        files = [open(folder / model / _shard(shard), "wb") for model in ("base", "new")]
        for file in files:
            file.write(len(header).to_bytes(8, "little") + header)
        for number in own:
            weight = (generator.standard_normal((rows, ROW), np.float32) * 0.02).view(np.uint32) >> 16
            weight = weight.astype("<u2")
            files[0].write(weight)
            if number % CHANGED == 0:
                weight[rows // 2 if number % (2 * CHANGED) == 0 else slice(None)] ^= 1  # the last bit of the mantissa
            files[1].write(weight)
        for file in files:
            file.close()


def _shard(number: int) -> str:
    return f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"


def run_step(step: str, folder: Path) -> dict[str, Any]:
    """One step in this process: what it read, how long it took, and the most memory that the process ever held."""
    before, start = _bytes_read_by_process(), time.perf_counter()
    result: dict[str, Any] = {"step": step}
    with open_model(folder / "base") as base, open_model(folder / "new") as new:
        if step == "diff":
            difference = diff_models(base, new)
            result["changed_parameters"] = difference.footprint().changed_parameters
            result["changed_tensors"] = len(difference.moved)
        elif step == "manifest":
            manifest, _ = build_manifest(base, new, folder / "manifest")
            result["edit_bytes"] = manifest.edit_file.size
        else:
            apply_manifest(base, folder / "manifest", folder / "out")
        result.update(
            bytes_of_both_models=base.size + new.size,
            bytes_read=base.bytes_read + new.bytes_read,
            bytes_read_by_process=_bytes_read_by_process() - before,
            seconds=time.perf_counter() - start,
            peak_bytes=_peak_memory(),
            torch_imported="torch" in sys.modules,
        )
    return result


def _peak_memory() -> int:
    """
    The most memory that this process held. On Linux not from `getrusage`, whose maximum goes on from that of the
    process that started this one.
    """
    path = Path("/proc/self/status")
    if path.is_file():
        return int(path.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on macOS


def _bytes_read_by_process() -> int:
    """What the kernel says this process has read; 0 where it does not say."""
    path = Path("/proc/self/io")
    if not path.is_file():
        return 0
    return int(path.read_text().split("rchar:")[1].split()[0])


def measure(size: int, matrices: int, seed: int, work_dir: str | None = None) -> list[dict[str, Any]]:
    """All steps on a pair of models that is made for it and removed, each step in a process of its own."""
    results = []
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        folder = Path(name)
        write_pair(folder, size, matrices, seed)
        for step in STEPS:
            command = [sys.executable, os.path.abspath(__file__), "--step", step, "--folder", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            results.append(json.loads(output))
        for path in (folder / "new").glob("*.safetensors"):
            with open(path, "rb") as expected, open(folder / "out" / path.name, "rb") as made:
                while block := expected.read(2**20):
                    if block != made.read(2**20):
                        raise RuntimeError(f"{path.name} was not rebuilt bit for bit")
                if made.read(1):
                    raise RuntimeError(f"{path.name} was rebuilt with more bytes")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_mib", type=int, default=1024, help="MiB of one model.")
    parser.add_argument("--matrices", type=int, default=64, help="Tensors of one model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", help="Where the models are written; three times their size has to be free.")
    parser.add_argument("--json", help="Write all numbers to this file.")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(run_step(args.step, args.folder)))
        return 0
    results = measure(args.size_mib * 2**20, args.matrices, args.seed, args.work_dir)
    print(f"{'step':<10}{'peak MiB':>10}{'read / size':>13}{'seconds':>9}")
    for result in results:
        ratio = result["bytes_read"] / result["bytes_of_both_models"]
        print(f"{result['step']:<10}{result['peak_bytes'] / 2**20:>10.1f}{ratio:>13.3f}{result['seconds']:>9.2f}")
    if args.json:
        content = {
            "command": " ".join(["python", "benchmarks/model_diff.py", *sys.argv[1:]]),
            "machine": {**describe_processor(), "platform": platform.system()},
            "versions": describe_versions("numpy", "hf-unlearn"),
            "model_bytes": math.floor(results[0]["bytes_of_both_models"] / 2),
            "shards": SHARDS,
            "matrices": args.matrices,
            "results": results,
        }
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(any(result["peak_bytes"] > MEMORY_BOUND for result in results))


if __name__ == "__main__":
    sys.exit(main())
