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
What comes back of invented people who were forgotten in five ways: the whole `small` battery of attacks on each.

    python benchmarks/what_comes_back.py --work_dir /tmp/what_comes_back \
        --json benchmarks/results/what_comes_back_cpu.json --figure docs/images/what_comes_back.png

Each method makes a model forget 8 of 40 people and stops where it keeps 95 % of the retain probability (the edit is
made once, and keeps what it keeps); then `hf-unlearn robustness-report` measures and attacks it. The original and the
twin that never saw the 8 are attacked once per seed: the five share a cache. An interrupted run continues. What was
found stands in `docs/what_comes_back.md`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


from what_holds import BEFORE, METHODS, NUM_FORGET_PEOPLE, RETAIN_ONLY, Case, Method, unlearn  # isort: skip

import torch
from compare_losses import Folders
from datasets import Dataset
from machine import describe_versions
from measuring import describe_machine
from transformers import PreTrainedModel
from what_holds_attacks import answer_probabilities

from hf_unlearn import InterventionConfig, InterventionTrainer


SEEDS = (0, 1, 2)

# Chosen with seed 5, which is none of those that are reported
_GA = {"forget_loss": ["ga"], "retain_loss": ["kl"], "retain_loss_weights": [5.0]}
EDIT = {"kind": "pointwise", "trainable_layers": "0", "probability": 0.01}
TRAINED = {
    "ga": Method({**_GA, "learning_rate": 1e-4, "max_steps": 120}),
    "npo": METHODS["npo"],
    "rmu": METHODS["rmu"],
    "npo + sam": METHODS["npo + sam"],
}
NAMES = ("ga", "npo", "rmu", "edit", "npo + sam")


def make_model(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Makes a model forget and saves it, with what that took; what is there already is left as it is."""
    record_path = folder / "made.json"
    if record_path.is_file():
        return json.loads(record_path.read_text())
    if name == "edit":
        model, record = edit(case)
    else:
        retain = case.examples(case.retain_sample)
        before = statistics.fmean(answer_probabilities(case.load(BEFORE), retain))
        model, record = unlearn(case, TRAINED[name], before, 0.0, None)
        record.pop("retain_path")
    model.save_pretrained(folder)
    case.tokenizer.save_pretrained(folder)
    record_path.write_text(json.dumps(record))
    return record


def edit(case: Case) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The point-wise edit."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InterventionTrainer(
            case.load(BEFORE),
            args=InterventionConfig(folder, **EDIT, seed=case.seed, report_to="none", disable_tqdm=True, use_cpu=True),
            train_dataset=Dataset.from_list(case.forget),
            retain_dataset=Dataset.from_list(case.retain),
            processing_class=case.tokenizer,
        )
        trainer.train()
    return trainer.model, {"settings": EDIT, "seconds": round(time.process_time() - start, 2)}


def attack(name: str, case: Case, work_dir: Path) -> dict[str, Any]:
    """What `hf-unlearn robustness-report` says of a model, and how long the command took."""
    model, output = work_dir / "models" / f"{name}-{case.seed}", work_dir / "reports" / f"{name}-{case.seed}"
    made = make_model(name, case, model)
    result_path = output / "result.json"
    if not result_path.is_file():
        rows = {"forget": case.forget, "retain": case.retain_sample}
        for key, own in rows.items():
            path = work_dir / f"{key}-{case.seed}.jsonl"
            path.write_text("".join(f"{json.dumps(row)}\n" for row in own), encoding="utf-8")
        start = time.perf_counter()
        command = [
            *(sys.executable, "-m", "hf_unlearn.cli", "robustness-report", str(model), "--use_cpu", "--json"),
            *("--original", case.model_folder(BEFORE), "--control", case.model_folder(RETAIN_ONLY)),
            *(word for key in rows for word in (f"--{key}", str(work_dir / f"{key}-{case.seed}.jsonl"))),
            *("--seeds", str(case.seed), "--max_new_tokens", "16", "--batch_size", "64"),
            *("--output_dir", str(output), "--cache_dir", str(work_dir / "cache")),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        result = {key: json.loads(done.stdout)[key] for key in ("verdict", "metrics", "attacks")}
        result["command_seconds"] = round(time.perf_counter() - start, 1)
        result_path.write_text(json.dumps(result))
    return {"method": name, "seed": case.seed, **made, **json.loads(result_path.read_text())}


# ---- What is shown ----


def format_table(runs: list[dict[str, Any]]) -> str:
    """One row per attack, one column per method: the mean over seeds, and the lowest and highest."""
    names = [name for name in NAMES if any(run["method"] == name for run in runs)]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for label, value in {**_ROWS, **{attack: _recovered(attack) for attack in _attacks(runs)}}.items():
        cells = [_cell([value(run) for run in runs if run["method"] == name]) for name in names]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    verdicts = [", ".join(f"{run['verdict']['outcome']}" for run in runs if run["method"] == name) for name in names]
    return "\n".join([*lines, f"| verdict | {' | '.join(verdicts)} |"])


def _metric(stage: str, name: str, metric: str) -> Any:
    return lambda run: run["metrics"][stage][name][metric]


_ROWS = {
    "*probability, forget*": _metric("after", "forget", "probability"),
    "*probability, retain*": _metric("after", "retain", "probability"),
    "*repetition, forget*": _metric("after", "forget", "repetition"),
}


def _attacks(runs: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(attack["name"] for run in runs for attack in run["attacks"]))


def _recovered(name: str) -> Any:
    return lambda run: next((attack["recovered"] for attack in run["attacks"] if attack["name"] == name), None)


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.fmean(known):.2f} ({min(known):.2f}–{max(known):.2f})"


def rounded(value: Any) -> Any:
    """Six digits of each number: what is stored is read by people and their tools."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def draw(runs: list[dict[str, Any]], path: str) -> None:
    """Left, what each attack brings back of each method; right, relearning step by step. Means over seeds."""
    from matplotlib.figure import Figure

    names = [name for name in NAMES if any(run["method"] == name for run in runs)]
    attacks = [name for name in _attacks(runs) if any(_recovered(name)(run) is not None for run in runs)]
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    values = [
        [[run for run in runs if run["method"] == name and _recovered(attack)(run) is not None] for name in names]
        for attack in attacks
    ]
    means = [
        [statistics.fmean(_recovered(attack)(run) for run in own) if own else float("nan") for own in row]
        for attack, row in zip(attacks, values, strict=True)
    ]
    image = left.imshow(
        [[min(max(mean, 0), 1) for mean in row] for row in means], vmin=0, vmax=1, cmap="YlOrRd", aspect="auto"
    )
    for row, own in enumerate(means):
        for column, mean in enumerate(own):
            left.text(
                column,
                row,
                "–" if mean != mean else f"{mean:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if mean > 0.6 else "black",
            )
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(attacks)), attacks, fontsize=8)
    left.tick_params(length=0)
    left.set_title("recovered share, 0: as the twin, 1: as the original", fontsize=9)
    figure.colorbar(image, ax=left, shrink=0.8)
    markers = dict(zip(NAMES, "osD^v", strict=True))
    for name in names:
        curves = [
            next(attack["curve"] for attack in run["attacks"] if attack["name"] == "relearn")
            for run in runs
            if run["method"] == name
        ]
        steps = [point["at"] for point in curves[0]]
        right.plot(
            steps,
            [statistics.fmean(curve[place]["unlearned"] for curve in curves) for place in range(len(steps))],
            marker=markers[name],
            label=name,
        )
        twin = [statistics.fmean(curve[place]["control"] for curve in curves) for place in range(len(steps))]
    right.plot(steps, twin, "k:", label="never saw them")
    right.set_xlabel("steps of relearning other rows")
    right.set_ylabel("probability of forget rows not relearned, best of two rates")
    right.set_ylim(0, 1)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", required=True, help="models, reports and cache; an interrupted run continues")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--json", help="results")
    parser.add_argument("--figure", help="picture")
    args = parser.parse_args()
    work_dir = Path(args.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in args.seeds:
        case = Case("people", seed, Folders(None, work_dir))
        for name in args.methods:
            print(f"{name}, seed {seed}", file=sys.stderr)
            runs.append(attack(name, case, work_dir))
    print(format_table(runs))
    if args.json:
        content = {
            "command": f"python benchmarks/what_comes_back.py --seeds {' '.join(map(str, args.seeds))}",
            "forget_people": NUM_FORGET_PEOPLE,
            "threads": torch.get_num_threads(),
            "machine": describe_machine("cpu"),
            "versions": describe_versions("torch", "transformers", "peft", "nanogcg", "hf-unlearn"),
            "runs": runs,
        }
        Path(args.json).write_text(json.dumps(rounded(content), separators=(",", ":")) + "\n", encoding="utf-8")
    if args.figure:
        draw(runs, args.figure)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
