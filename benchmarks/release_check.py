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
Memory and reads of checking a sharded release of 1 GiB before it leaves.

    python benchmarks/release_check.py --json benchmarks/results/release_check_cpu.json

A pair of bf16 models is written with NumPy into a temporary folder, with report and card, and removed afterwards. The
check runs in a process of its own, with a forget set of 500 rows. What is counted stands in `benchmarks/README.md`.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe_processor, describe_versions
from model_diff import MEMORY_BOUND, SHARDS, _bytes_read_by_process, _peak_memory, write_pair

from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, LossTerm, Method, Scope, UnlearningReport
from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.check import check_release
from hf_unlearn.cards.diff import diff_models
from hf_unlearn.cards.tensor_files import open_model


def make_release(folder: Path) -> None:
    """Report and card for the model in `folder / "new"`, made from the one in `folder / "base"`."""
    (folder / "base" / "LICENSE").write_text("A licence.\n", encoding="utf-8")
    (folder / "new" / "LICENSE").write_text("A licence.\n", encoding="utf-8")
    with open_model(folder / "base") as base, open_model(folder / "new") as new:
        footprint = diff_models(base, new).footprint()
    report = UnlearningReport(
        tool_version=version("hf-unlearn"),
        base=BaseModel("org/name", None, "LlamaForCausalLM", "llama", footprint.total_parameters, "bfloat16"),
        method=Method(
            name="npo",
            forget_losses=[LossTerm("npo", 1.0)],
            retain_losses=[],
            scope=Scope("full", [], None, footprint.total_parameters, None),
            reference="initial_weights",
            settings={"beta": 0.1},
            seed=0,
            steps=60,
        ),
        data=Data(DataSummary(rows=500, tokens=None)),
        footprint=footprint,
        environment=Environment(platform.python_version(), platform.system(), {}, "cpu", 1, None),
    )
    report.save(folder / "new" / "unlearning_report.json")
    build_card(folder / "new")


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Questions and answers of made-up words, and telephone numbers: as much text as a forget set of people has."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(4, 9))) for _ in range(3000)]
    return [
        {
            "question": " ".join(generator.choices(words, k=10)),
            "answer": " ".join([*generator.choices(words, k=20), str(generator.randrange(10**9, 10**10))]),
        }
        for _ in range(count)
    ]


def run_check(folder: Path, rows: int, seed: int) -> dict[str, Any]:
    """The check in this process: what it read, how long it took, and the most memory that the process ever held."""
    weights = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    compared = 0

    def count(size: int) -> None:
        nonlocal compared
        compared += size

    before, start = _bytes_read_by_process(), time.perf_counter()
    result = check_release(
        folder / "new", base=folder / "base", rows=make_rows(rows, seed), environment={}, progress=count
    )
    return {
        "findings": [f"{finding.rule} {finding.file}" for finding in result.blocking],
        "files": len(result.files),
        "bytes_of_both_models": weights,
        "bytes_compared": compared,
        "bytes_read_by_process": _bytes_read_by_process() - before,
        "seconds": time.perf_counter() - start,
        "peak_bytes": _peak_memory(),
        "torch_imported": "torch" in sys.modules,
    }


def measure(size: int, matrices: int, rows: int, seed: int, work_dir: str | None = None) -> dict[str, Any]:
    """The check of a pair of models that is made for it and removed."""
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        write_pair(Path(name), size, matrices, seed)
        make_release(Path(name))
        command = [sys.executable, os.path.abspath(__file__), "--folder", name, "--rows", str(rows)]
        output = subprocess.run([*command, "--seed", str(seed)], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size_mib", type=int, default=1024, help="MiB of one model.")
    parser.add_argument("--matrices", type=int, default=64, help="Tensors of one model.")
    parser.add_argument("--rows", type=int, default=500, help="Rows of the forget set.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", help="Where the models are written; twice their size has to be free.")
    parser.add_argument("--json", help="Write all numbers to this file.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(run_check(args.folder, args.rows, args.seed)))
        return 0
    result = measure(args.size_mib * 2**20, args.matrices, args.rows, args.seed, args.work_dir)
    ratio = result["bytes_read_by_process"] / result["bytes_of_both_models"]
    print(f"peak {result['peak_bytes'] / 2**20:.1f} MiB, read / size {ratio:.4f}, {result['seconds']:.2f} s")
    print("\n".join(result["findings"]) or "nothing blocks")
    if args.json:
        content = {
            "command": " ".join(["python", "benchmarks/release_check.py", *sys.argv[1:]]),
            "machine": {**describe_processor(), "platform": platform.system()},
            "versions": describe_versions("numpy", "hf-unlearn"),
            "shards": SHARDS,
            "matrices": args.matrices,
            "rows": args.rows,
            "result": result,
        }
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return int(result["peak_bytes"] > MEMORY_BOUND or bool(result["findings"]))


if __name__ == "__main__":
    sys.exit(main())
