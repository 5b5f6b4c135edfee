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
All forget losses on TOFU rows in a small trained model, each at the best of five learning rates, three seeds.

    HF_UNLEARN_TEST_DATA=DIR python benchmarks/compare_losses.py --work_dir /tmp/compare_losses --jobs 2 \
        --json benchmarks/results/compare_losses_cpu.json --figure docs/images/compare_losses.png

Teaches a model 40 authors and a twin 36 of them, makes the model forget the other four with every loss, and compares
with the twin. An interrupted run continues: all that is done stands in the work folder. What is compared and measured
stands in `docs/losses.md`.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


# Before the libraries read them: nothing is fetched, and every process has one core to itself
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from machine import describe_versions  # noqa: E402
from measuring import describe_machine  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402

from hf_unlearn import UnlearnConfig, UnlearnTrainer  # noqa: E402
from hf_unlearn.data import prepare_dataset  # noqa: E402
from hf_unlearn.metrics import METRICS, Evaluation, evaluate_model, forget_quality, model_utility  # noqa: E402
from hf_unlearn.pairing import DataCollatorForUnlearning  # noqa: E402
from hf_unlearn.trainer import NonFiniteLossError  # noqa: E402


Row = dict[str, Any]
Run = dict[str, Any]

BASE = "tinystories-260k"
ROWS_PER_AUTHOR, FORGET_AUTHORS = 20, 4
RETAIN_EVALUATION_ROWS = 80

TEACHING = {"epochs": 50, "batch_size": 16, "learning_rate": 4e-3, "warmup_share": 0.1, "seed": 0}
KNOWN_PROBABILITY = 0.95  # below it, there would be little to forget

EPOCHS, BATCH_SIZE = 5, 16
SEEDS = (0, 1, 2)
UTILITY_SHARE = 0.8
MAX_NEW_TOKENS = 100


# ---- Rows ----


def read_rows(data: Path) -> dict[str, list[Row]]:
    """The rows of the authors to forget and of those to keep, each with a paraphrased and five wrong answers."""
    rows = {}
    for name in ("forget10_perturbed", "retain_perturbed"):
        with open(data / "tofu" / f"{name}.json", encoding="utf-8") as file:
            rows[name] = [json.loads(line) for line in file if line.strip()]
    return split_rows(rows["forget10_perturbed"], rows["retain_perturbed"])


def split_rows(forget10: list[Row], retain: list[Row]) -> dict[str, list[Row]]:
    """The first four authors of `forget10` are forgotten; all others are kept. Authors stand one after the other."""
    border = FORGET_AUTHORS * ROWS_PER_AUTHOR
    return {"forget": forget10[:border], "retain": forget10[border:] + retain}


def evaluation_sets(rows: dict[str, list[Row]]) -> dict[str, Dataset]:
    """All rows to forget, and a fixed sample of those to keep, in their order."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(rows["retain"]), generator=generator)[:RETAIN_EVALUATION_ROWS].sort().values
    retain = [rows["retain"][index] for index in sample.tolist()]
    return {"forget": Dataset.from_list(rows["forget"]), "retain": Dataset.from_list(retain)}


def _pairs(rows: list[Row]) -> Dataset:
    return Dataset.from_list([{"question": row["question"], "answer": row["answer"]} for row in rows])


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: dict[str, Dataset], metrics: Sequence[str]
) -> Evaluation:
    with redirect_stderr(io.StringIO()):  # its bar would cut through ours
        return evaluate_model(
            model, tokenizer, sets, UnlearnConfig("out", use_cpu=True), max_new_tokens=MAX_NEW_TOKENS, metrics=metrics
        )


# ---- Teaching ----


def teach(base: str, rows: list[Row], output: Path, description: str, position: int) -> dict[str, Any]:
    """
    Fine-tunes all weights on the answers of the rows, and saves the model.

    Returns:
        `dict`: rows, mean probability of the answers of the rows after it, and seconds.
    """
    start = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # The columns of TOFU's own training; tokenized as what will be forgotten and measured
    pairs = _pairs(rows)
    examples = list(prepare_dataset(pairs, tokenizer, UnlearnConfig(str(output), use_cpu=True), "known"))
    collate = DataCollatorForUnlearning(tokenizer.pad_token_id)
    epochs, size, rate = TEACHING["epochs"], TEACHING["batch_size"], TEACHING["learning_rate"]
    steps = epochs * math.ceil(len(examples) / size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=TEACHING["warmup_share"]
    )
    generator = torch.Generator().manual_seed(TEACHING["seed"])
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    with tqdm(total=steps, desc=description, position=position, file=sys.stderr) as bar:
        for _ in range(epochs):
            # Rows of about the same length share a batch, which saves padding; other ones in every epoch
            order = (lengths + 30 * torch.rand(len(lengths), generator=generator)).argsort()
            chunks = order.split(size)
            for index in torch.randperm(len(chunks), generator=generator).tolist():
                batch = collate([examples[row] for row in chunks[index].tolist()])
                model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                bar.update(1)
    evaluation = _evaluate(model, tokenizer, {"known": pairs}, metrics=["probability"])
    result = {
        "rows": len(rows),
        "probability": evaluation.metrics["known"]["probability"],
        "seconds": round(time.perf_counter() - start, 1),
    }
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "teaching.json").write_text(json.dumps({"settings": TEACHING, **result}), encoding="utf-8")
    return result


# ---- Forgetting ----


@dataclass(frozen=True)
class Recipe:
    """A forget loss with its learning rates and its settings of `UnlearnConfig`, where they are not the defaults."""

    learning_rates: tuple[float, ...]
    settings: dict[str, Any]


_LIKELIHOOD_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_HIDDEN_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_NLL = {"retain_loss": ["nll"]}
_HIDDEN = {
    "retain_loss": ["hidden_mse"],
    "hidden_layer": 2,
    "trainable_layers": "0-2",
    "trainable_modules": ["mlp.down_proj"],
}

RECIPES = {
    "ga": Recipe(_LIKELIHOOD_RATES, _NLL),
    "wga": Recipe(_LIKELIHOOD_RATES, _NLL),
    "satimp": Recipe(_LIKELIHOOD_RATES, {**_NLL, "retain_loss_weights": [0.1]}),
    "npo": Recipe(_LIKELIHOOD_RATES, _NLL),
    "simnpo": Recipe(_LIKELIHOOD_RATES, {**_NLL, "forget_loss_weights": [0.125]}),
    "dpo": Recipe(_LIKELIHOOD_RATES, _NLL),
    "idk": Recipe(_LIKELIHOOD_RATES, _NLL),
    "undial": Recipe(_LIKELIHOOD_RATES, _NLL),
    "ceu": Recipe(_LIKELIHOOD_RATES, _NLL),
    # Its published warm-up of 5 epochs is as long as the whole run here: the multiplier would never move
    "pdu": Recipe(_LIKELIHOOD_RATES, {**_NLL, "pdu_warmup_epochs": 1.0}),
    # The published 1200 is for hidden states of 4096 dimensions, each a fraction of one here: by hand, so that neither
    # term drowns the other at the middle rate. The target of adaptive_rmu is a dozen times as long as that of rmu.
    "rmu": Recipe(_HIDDEN_RATES, {**_HIDDEN, "retain_loss_weights": [4.0]}),
    "rsv": Recipe(_HIDDEN_RATES, {**_HIDDEN, "retain_loss_weights": [4.0]}),
    "adaptive_rmu": Recipe(_HIDDEN_RATES, {**_HIDDEN, "retain_loss_weights": [40.0]}),
    # A third and two thirds of five layers, in place of 10 and 20 of 32
    "circuit_breaker": Recipe(
        _HIDDEN_RATES,
        {
            **_HIDDEN,
            "retain_loss": ["circuit_breaker"],
            "circuit_breaker_layers": "1,3",
            "trainable_layers": "0-3",
        },
    ),
}


@dataclass(frozen=True)
class Folders:
    """Where rows and base model are, and where everything that is made goes."""

    data: Path
    work: Path

    @property
    def results(self) -> Path:
        return self.work / "runs.jsonl"

    def model(self, name: str) -> Path:
        return self.work / "models" / name


@dataclass(frozen=True)
class Task:
    """One run: a loss at a learning rate, with a seed of the order of the rows and of what is drawn."""

    loss: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """Changes with every setting: a run of other settings is another run."""
        return json.dumps(self.settings(), sort_keys=True)

    def settings(self) -> dict[str, Any]:
        return {
            "forget_loss": [self.loss],
            **RECIPES[self.loss].settings,
            "learning_rate": self.learning_rate,
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH_SIZE,
            "seed": self.seed,
        }


def all_tasks(losses: Iterable[str]) -> list[Task]:
    """Seed by seed, so that an interrupted comparison has something about every loss."""
    return [Task(loss, rate, seed) for seed in SEEDS for loss in losses for rate in RECIPES[loss].learning_rates]


def unlearn(task: Task, folders: Folders) -> Run:
    """
    Makes the model forget, and measures it.

    Returns:
        `dict`: `metrics` by set, `truth_ratios` of the rows to forget, CPU `seconds` of the training; with a loss or
        logits that are not finite, `failure` instead.
    """
    rows = read_rows(folders.data)
    tokenizer = AutoTokenizer.from_pretrained(folders.model("known"))
    run = {**asdict(task), "settings": task.settings()}
    start = time.process_time()
    trainer = UnlearnTrainer(
        AutoModelForCausalLM.from_pretrained(folders.model("known"), dtype=torch.float32),
        args=UnlearnConfig(
            str(folders.work),  # nothing is written there
            **task.settings(),
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cache=True,
        ),
        train_dataset=_pairs(rows["forget"]),
        retain_dataset=_pairs(rows["retain"]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except NonFiniteLossError:
        return {**run, "failure": "the loss became infinite or NaN"}
    run["seconds"] = round(time.process_time() - start, 2)
    if not all(bool(parameter.isfinite().all()) for parameter in trainer.model.parameters()):
        return {**run, "failure": "weights became infinite or NaN"}
    return {**run, **measure(trainer.model, tokenizer, rows)}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Means by set, and the raw truth ratios of the rows to forget."""
    evaluation = _evaluate(model, tokenizer, evaluation_sets(rows), METRICS)
    means_of_sets = {
        name: {metric: value for metric, value in means.items() if not metric.endswith(("_ci_low", "_ci_high"))}
        for name, means in evaluation.metrics.items()
    }
    return {
        "metrics": means_of_sets,
        "truth_ratios": [sample["truth_ratio"] for sample in evaluation.samples["forget"]],
    }


def measure_taught(name: str, folders: Folders) -> dict[str, Any]:
    """The same of one of the two models that were taught."""
    tokenizer = AutoTokenizer.from_pretrained(folders.model(name))
    model = AutoModelForCausalLM.from_pretrained(folders.model(name), dtype=torch.float32)
    return measure(model, tokenizer, read_rows(folders.data))


# ---- From runs to a table ----


def add_scores(run: Run, retain_only: Run) -> Run:
    """`forget_quality` and `utility`, where the run gave metrics."""
    if "failure" in run:
        return run
    quality, distance = forget_quality(run["truth_ratios"], retain_only["truth_ratios"])
    # The harmonic mean of probability, ROUGE-L and truth ratio on the retain rows
    utility, _ = model_utility({"retain": run["metrics"]["retain"]})
    return {**run, "forget_quality": quality, "ks_distance": distance, "utility": utility}


def best_rate(runs: Sequence[Run], utility_before: float) -> tuple[float | None, bool]:
    """
    The learning rate to show for a loss.

    Args:
        runs (`Sequence[dict]`): the scored runs of one loss.
        utility_before (`float`): of the model before.

    Returns:
        The rate with the highest forget quality among those with a utility of at least 0.8 of `utility_before`, and
        `True`. Where there is none, the one with the highest utility, and `False`. Both are means over seeds. Rates at
        which a run failed are left out; `None` where that is all of them.
    """
    ranks = {}
    for rate in {run["learning_rate"] for run in runs}:
        own = [run for run in runs if run["learning_rate"] == rate]
        if all("failure" not in run for run in own):
            quality, utility = (statistics.fmean(run[key] for run in own) for key in ("forget_quality", "utility"))
            is_useful = utility >= UTILITY_SHARE * utility_before
            ranks[rate] = (is_useful, quality if is_useful else utility)
    if not ranks:
        return None, False
    best = max(ranks, key=ranks.__getitem__)
    return best, ranks[best][0]


def summarize(runs: Sequence[Run], before: Run) -> dict[str, dict[str, Any]]:
    """
    For each loss: its learning rate, whether that kept enough utility, mean and extremes over seeds of every number
    in the table, and the two numbers that decided at each rate, by seed.
    """
    summary = {}
    for loss in dict.fromkeys(run["loss"] for run in runs):
        own = [run for run in runs if run["loss"] == loss]
        rate, is_useful = best_rate(own, before["utility"])
        rates: dict[str, dict[str, list[float]]] = {}
        for run in own:
            if "failure" not in run:
                scores = rates.setdefault(f"{run['learning_rate']:g}", {"forget_quality": [], "utility": []})
                for name, of_seeds in scores.items():
                    of_seeds.append(run[name])
        values = {}
        for name, read in _COLUMNS.items() if rate is not None else ():
            over_seeds = [read(run) for run in own if run["learning_rate"] == rate]
            values[name] = {"mean": statistics.fmean(over_seeds), "min": min(over_seeds), "max": max(over_seeds)}
        summary[loss] = {"learning_rate": rate, "keeps_utility": is_useful, "values": values, "rates": rates}
    return summary


_COLUMNS: dict[str, Callable[[Run], float]] = {
    "forget probability": lambda run: run["metrics"]["forget"]["probability"],
    "forget exact memorization": lambda run: run["metrics"]["forget"]["exact_memorization"],
    "forget extraction strength": lambda run: run["metrics"]["forget"]["extraction_strength"],
    "forget ROUGE-L": lambda run: run["metrics"]["forget"]["rougeL_recall"],
    "forget truth ratio": lambda run: run["metrics"]["forget"]["truth_ratio"],
    "forget quality": lambda run: run["forget_quality"],
    "retain probability": lambda run: run["metrics"]["retain"]["probability"],
    "retain ROUGE-L": lambda run: run["metrics"]["retain"]["rougeL_recall"],
    "retain truth ratio": lambda run: run["metrics"]["retain"]["truth_ratio"],
    "utility": lambda run: run["utility"],
    "CPU seconds": lambda run: run["seconds"],
}

_TABLES = (
    ("forget probability", "forget ROUGE-L", "forget quality", "retain probability", "utility", "CPU seconds"),
    (
        "forget exact memorization",
        "forget extraction strength",
        "forget truth ratio",
        "retain ROUGE-L",
        "retain truth ratio",
    ),
)


def format_tables(summary: dict[str, dict[str, Any]], models: dict[str, Run]) -> list[str]:
    """Two Markdown tables: what decides, and what else was measured. Losses by forget quality."""
    order = sorted(summary, key=lambda loss: _rank(summary[loss]))
    tables = []
    for columns in _TABLES:
        lines = [
            f"| loss | learning rate | {' | '.join(columns)} |",
            "|---|---|" + "---|" * len(columns),
        ]
        for name, model in models.items():
            cells = [_number(column, _COLUMNS[column](model)) if column != "CPU seconds" else "" for column in columns]
            lines.append(f"| *{name}* | | {' | '.join(cells)} |")
        for loss in order:
            row = summary[loss]
            if row["learning_rate"] is None:
                lines.append(f"| {loss} | every rate failed |" + " |" * len(columns))
                continue
            rate = f"{row['learning_rate']:g}" + ("" if row["keeps_utility"] else " ✗")
            cells = [_spread(column, row["values"][column]) for column in columns]
            lines.append(f"| {loss} | {rate} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return tables


def format_unbounded(summary: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the rate with the highest forget quality of each loss, whatever it cost in utility."""
    best = {}
    for loss, row in summary.items():
        means = {
            rate: {name: statistics.fmean(values) for name, values in scores.items()}
            for rate, scores in row["rates"].items()
            if len(scores["forget_quality"]) == len(SEEDS)  # no seed failed
        }
        if means:
            rate = max(means, key=lambda rate: means[rate]["forget_quality"])
            best[loss] = (rate, means[rate]["forget_quality"], means[rate]["utility"])
    lines = ["| loss | learning rate | forget quality | utility |", "|---|---|---|---|"]
    for loss, (rate, quality, utility) in sorted(best.items(), key=lambda item: -item[1][1]):
        lines.append(f"| {loss} | {rate} | {_number('forget quality', quality)} | {_number('utility', utility)} |")
    return "\n".join(lines)


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    quality = row["values"]["forget quality"]["mean"] if row["values"] else -1.0
    return not row["keeps_utility"], -quality


def _spread(column: str, values: dict[str, float]) -> str:
    mean, low, high = (_number(column, values[key]) for key in ("mean", "min", "max"))
    return f"{mean} ({low}–{high})"


def _number(column: str, value: float) -> str:
    if column == "CPU seconds":
        return f"{value:.1f}"
    return f"{value:.1e}" if column == "forget quality" and 0 < value < 0.001 else f"{value:.3f}"


# ---- Figure ----


def draw_figure(summary: dict[str, dict[str, Any]], models: dict[str, Run], path: str) -> None:
    """Forget quality against utility: a marker with the seeds' spread for each loss, a star for each given model."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    axes.set_xlabel("utility: what is kept of the other authors →")
    axes.set_ylabel("forget quality: p-value against the retain-only model →")
    axes.axhline(0.05, color="grey", linestyle="--", linewidth=0.8)
    axes.margins(x=0.12)  # for the labels
    right = axes.get_yaxis_transform()
    axes.text(0.995, 0.053, "p = 0.05", transform=right, ha="right", va="bottom", fontsize=8, color="grey")
    points = []
    for index, (loss, row) in enumerate(item for item in summary.items() if item[1]["values"]):
        x, y = row["values"]["utility"], row["values"]["forget quality"]
        spread = [[[v["mean"] - v["min"]], [v["max"] - v["mean"]]] for v in (x, y)]
        color, marker = f"C{index % 10}", "o" if row["keeps_utility"] else "x"
        axes.errorbar(x["mean"], y["mean"], spread[1], spread[0], marker, color=color, elinewidth=0.7, markersize=7)
        points.append((x["mean"], y["mean"], loss))
    for name, model in models.items():
        points.append((_COLUMNS["utility"](model), _COLUMNS["forget quality"](model), name))
        axes.plot(*points[-1][:2], "*", color="black", markersize=13)
    _place_labels(axes, points)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _place_labels(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Each beside its marker, where it covers least of the markers and of the labels before."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # the layout decides what stands where
    taken = []
    for x, y, _ in points:
        column, row = axes.transData.transform((x, y))
        taken.append(Bbox.from_extents(column - 6, row - 6, column + 6, row + 6))
    for x, y, name in points:
        labels = [
            axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=9, ha=ha, va="center")
            for dx, dy, ha in _LABEL_PLACES
        ]
        boxes = [label.get_window_extent() for label in labels]
        best = min(range(len(labels)), key=lambda place: boxes[place].count_overlaps(taken))
        taken.append(boxes[best])
        for place, label in enumerate(labels):
            if place != best:
                label.remove()


_LABEL_PLACES = [
    (horizontal * 8, dy, {1: "left", 0: "center", -1: "right"}[horizontal])
    for dy, sides in ((9, (1, -1)), (-9, (1, -1)), (0, (1, -1)), (18, (0, 1, -1)), (-18, (0, 1, -1)))
    for horizontal in sides
]


# ---- The benchmark ----


BEFORE, RETAIN_ONLY = "before", "retain only"


def _quiet() -> None:
    """In every process: one thread, and no bars or advice of libraries that would drown our own."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_models(folders: Folders, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """Teaches the model and its twin, unless they are there; returns what `teach` said."""
    rows = read_rows(folders.data)
    known = {"known": rows["forget"] + rows["retain"], "retain_only": rows["retain"]}
    jobs = {}
    for position, (name, rows_of_model) in enumerate(known.items()):
        if not (folders.model(name) / "teaching.json").is_file():  # which is written last
            arguments = (str(folders.data / BASE), rows_of_model, folders.model(name), f"Teaching {name}", position)
            jobs[name] = pool.submit(teach, *arguments)
    for job in jobs.values():
        job.result()
    teaching = {}
    for name in known:
        teaching[name] = json.loads((folders.model(name) / "teaching.json").read_text(encoding="utf-8"))
        if teaching[name]["settings"] != TEACHING:
            raise RuntimeError(f"The work folder holds a model {name} of other settings: name a new --work_dir.")
        if teaching[name]["probability"] < KNOWN_PROBABILITY:
            raise RuntimeError(f"The model {name} does not know its rows: {teaching[name]['probability']:.3f}.")
    return teaching


def run_all(tasks: dict[str, tuple], results: Path, pool: ProcessPoolExecutor, description: str) -> dict[str, Run]:
    """
    Runs what is not there yet.

    Args:
        tasks (`dict[str, tuple]`): key in the file of results -> function and arguments.
        results (`Path`): one JSON line per finished task, appended at once.

    Returns:
        `dict[str, dict]`: the results of these tasks, in their order.
    """
    done = read_results(results)
    jobs = {pool.submit(*call): key for key, call in tasks.items() if key not in done}
    with open(results, "a", encoding="utf-8") as file:
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=description, file=sys.stderr):
            done[jobs[job]] = job.result()
            # The line break first: a line that an interruption cut off must not swallow the next one
            file.write("\n" + json.dumps({"key": jobs[job], "result": done[jobs[job]]}))
            file.flush()
    return {key: done[key] for key in tasks}


def read_results(path: Path) -> dict[str, Run]:
    """The finished tasks. What an interruption cut off in the middle of a line is left out, and runs again."""
    done = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[entry["key"]] = entry["result"]
    return done


def compare(losses: Sequence[str], folders: Folders, jobs: int) -> dict[str, Any]:
    """Everything, from the base model to the summary."""
    folders.results.parent.mkdir(parents=True, exist_ok=True)
    # Not forked: a child of a process that has used torch's threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        teaching = make_models(folders, pool)
        given = {"known": BEFORE, "retain_only": RETAIN_ONLY}
        calls = {f"model {name}": (measure_taught, name, folders) for name in given}
        measured = run_all(calls, folders.results, pool, "Measuring the two models")
        calls = {task.key: (unlearn, task, folders) for task in all_tasks(losses)}
        results = run_all(calls, folders.results, pool, "Forgetting")
    retain_only = measured["model retain_only"]
    models = {label: add_scores(measured[f"model {name}"], retain_only) for name, label in given.items()}
    runs = [add_scores(result, retain_only) for result in results.values()]
    return {
        "teaching": {"settings": TEACHING, "models": teaching},
        "models": {name: _without_ratios(model) for name, model in models.items()},
        "summary": summarize(runs, models[BEFORE]),
        "runs": [_without_ratios(run) for run in runs],
    }


def _without_ratios(run: Run) -> Run:
    return {key: value for key, value in run.items() if key != "truth_ratios"}


def main() -> None:
    parser = argparse.ArgumentParser(description="All forget losses on TOFU rows in a small trained model.")
    parser.add_argument(
        "--work_dir", metavar="DIR", required=True, help="models and runs go there; it may be continued"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=os.environ.get("HF_UNLEARN_TEST_DATA"),
        help=f"folder with {BASE}/ and tofu/ (default: $HF_UNLEARN_TEST_DATA)",
    )
    parser.add_argument("--losses", metavar="A,B", help=f"some of {','.join(RECIPES)} (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--json", metavar="PATH", help="write all numbers here")
    parser.add_argument("--figure", metavar="PATH", help="draw the figure here")
    options = parser.parse_args()
    losses = options.losses.split(",") if options.losses else list(RECIPES)
    if unknown := [loss for loss in losses if loss not in RECIPES]:
        parser.error(f"--losses: {', '.join(unknown)} is none of {', '.join(RECIPES)}")
    if options.data is None:
        parser.error("--data is missing, and HF_UNLEARN_TEST_DATA is not set")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")

    _quiet()
    comparison = compare(losses, Folders(Path(options.data), Path(options.work_dir)), options.jobs)
    tables = format_tables(comparison["summary"], comparison["models"])
    print("\n\n".join([*tables, format_unbounded(comparison["summary"])]))
    if options.figure:
        draw_figure(comparison["summary"], comparison["models"], options.figure)
    if options.json:
        report = {
            "command": f"python benchmarks/compare_losses.py --work_dir DIR --jobs {options.jobs}"
            + (f" --losses {options.losses}" if options.losses else ""),
            "machine": describe_machine("cpu"),
            "versions": describe_versions(
                "torch", "transformers", "accelerate", "datasets", "scipy", "rouge-score", "hf-unlearn"
            ),
            "base_model": BASE,
            "max_new_tokens": MAX_NEW_TOKENS,
            "utility_share": UTILITY_SHARE,
            **comparison,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
