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
What makes forgetting hold, and what does not: sharpness, gradient conflict, a probe and noise on the reference, each
around the same loss, attacked in the same way, on two tasks with five paired seeds.

    HF_UNLEARN_TEST_DATA=DIR python benchmarks/what_holds.py --work_dir /tmp/what_holds --jobs 2 \
        --json benchmarks/results/what_holds_cpu.json --figure docs/images/what_holds.png

Every method stops where it keeps the same share of the retain probability, so that what is compared is what it forgot
at that price and how much comes back. An interrupted run continues: all that is done stands in the work folder. What
is compared and measured stands in `docs/what_holds.md`.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any


# First, because it says what the libraries read when they are imported
from compare_losses import (  # isort: skip
    Folders,
    Row,
    Run,
    _pairs,
    _quiet,
    evaluation_sets,
    make_models,
    read_rows,
    run_all,
)

import torch
from datasets import Dataset
from machine import describe_versions
from measuring import describe_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from what_holds_attacks import (
    Example,
    answer_probabilities,
    latent_attack,
    relearn,
    residual_norms,
)
from what_holds_floor import EVALUATE_EVERY, StopAtFloor
from what_holds_report import draw_figure, format_tables, summarize

from hf_unlearn import UnlearnConfig, UnlearnTrainer
from hf_unlearn.cli.quickstart_models import Settings, find_or_make_models
from hf_unlearn.data import prepare_dataset
from hf_unlearn.metrics import evaluate_insertion
from hf_unlearn.people import make_people, split_people


TASKS = ("people", "tofu")
SEEDS = (0, 1, 2, 3, 4)
NUM_FORGET_PEOPLE = 8  # 40 rows: 20 to relearn, and 20 others
RETAIN_EVALUATION_ROWS = 80

# A run ends where its retain probability is at this share of the one before
RETAIN_FLOOR = 0.95

RELEARNING = {"rows": (5, 10, 20), "learning_rates": (3e-4, 1e-3), "steps": 20, "batch_size": 5}
LATENT = {"radii": (0.1, 0.3, 0.5), "steps": 16, "rows": 16}
INSERTION = {"rows": 40, "wrong_answers": 3, "names": 2}
# Of TOFU's authors; the rows of each are found by them. The first two are forgotten, the others are kept.
TOFU_NAMES = {"forget": ("Hsiao Yun-Hwa", "Carmen Montenegro"), "retain": ("Kalkidan Abera", "Takashi Nakamura")}

LAYER = 2  # 0-based: the middle one of 4 (people) or 5 (TOFU), of rmu, of the noise and of the latent attack

# By task: rows in a step. What follows was chosen with seed 5, which is none of those that are reported.
BATCH_SIZE = {"people": 20, "tofu": 12}
_NPO = {
    "people": {"learning_rate": 1e-3, "beta": 0.3, "retain_loss_weights": [1.0], "max_steps": 80},
    "tofu": {"learning_rate": 5e-4, "beta": 0.1, "retain_loss_weights": [5.0], "max_steps": 60},
}
_RMU = {
    "people": {"learning_rate": 1e-2, "retain_loss_weights": [4.0], "max_steps": 60},
    "tofu": {"learning_rate": 1e-3, "retain_loss_weights": [4.0], "max_steps": 40},
}
_NPO_KL = {"forget_loss": ["npo"], "retain_loss": ["kl"]}
_RMU_MSE = {
    "forget_loss": ["rmu"],
    "retain_loss": ["hidden_mse"],
    "hidden_layer": LAYER,
    "trainable_layers": f"0-{LAYER}",
    "trainable_modules": ["mlp.down_proj"],
}
_SAM = {"sharpness": "sam", "sharpness_radius": 0.1}
_PRISM = {**_SAM, "gradient_conflict": "global", "probe_weight_ratio": 0.5, "probe_learning_rate": 1e-2}
# In root mean squares of the residual stream after LAYER, by forget loss and task
NOISE = {
    "npo": {"people": (0.05, 0.3, 1.0), "tofu": (0.05, 0.3)},
    "rmu": {"people": (0.05, 0.3, 1.0), "tofu": (0.3, 1.0)},
}


@dataclass(frozen=True)
class Method:
    """
    One way to forget. `noise` is relative to the residual stream; `measures`: what it goes through; `steps_of`: the
    method whose number of steps it takes, instead of stopping at the floor.
    """

    settings: dict[str, Any]
    noise: float = 0.0
    tasks: tuple[str, ...] = TASKS
    measures: tuple[str, ...] = ("insertion",)
    steps_of: str | None = None

    def for_task(self, task: str, residual_rms: float, seed: int, steps: int | None = None) -> dict[str, Any]:
        """The settings of `UnlearnConfig`."""
        own = _NPO if "npo" in self.settings["forget_loss"] else _RMU
        settings = {
            "per_device_train_batch_size": BATCH_SIZE[task],
            **own[task],
            **self.settings,
            "lr_scheduler_type": "constant",
            "seed": seed,
        }
        if steps is not None:
            settings["max_steps"] = steps
        if self.noise:
            settings |= {"reference_noise_std": self.noise * residual_rms, "reference_noise_layer": LAYER}
        return settings


def _with_noise(name: str, settings: dict[str, Any]) -> dict[str, Method]:
    tasks: dict[float, list[str]] = {}
    for task, values in NOISE[name].items():
        for noise in values:
            tasks.setdefault(noise, []).append(task)
    return {f"{name} + rna {noise:g}": Method(settings, noise, tuple(of)) for noise, of in tasks.items()}


ATTACKS = ("relearning", "latent")
BEFORE, RETAIN_ONLY = "before", "retain only"
METHODS = {
    "npo": Method(_NPO_KL, measures=(*ATTACKS, "insertion")),
    "npo + sam": Method({**_NPO_KL, **_SAM}, measures=ATTACKS),
    # Whether what sharpness gives is not what more steps give
    "npo, longer": Method(_NPO_KL, measures=ATTACKS, steps_of="npo + sam"),
    "prism": Method({**_NPO_KL, **_PRISM}, measures=ATTACKS),
    **_with_noise("npo", _NPO_KL),
    "rmu": Method(_RMU_MSE),
    **_with_noise("rmu", _RMU_MSE),
}


# ---- Tasks ----


@dataclass
class Case:
    """One task with one seed: models, rows, and who stands where."""

    task: str
    seed: int
    folders: Folders
    forget: list[Row] = field(init=False)
    retain: list[Row] = field(init=False)
    retain_sample: list[Row] = field(init=False)
    names: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        if self.task == "people":
            rows = make_people(Settings.num_people, self.seed)
            self.forget, self.retain = split_people(rows, NUM_FORGET_PEOPLE)
            generator = torch.Generator().manual_seed(0)
            sample = torch.randperm(len(self.retain), generator=generator)[:RETAIN_EVALUATION_ROWS].sort().values
            self.retain_sample = [self.retain[index] for index in sample.tolist()]
            self.names = {
                name: list(dict.fromkeys(row["name"] for row in rows))[: INSERTION["names"]]
                for name, rows in (("forget", self.forget), ("retain", self.retain))
            }
        else:
            rows = read_rows(self.folders.data)
            self.forget, self.retain = rows["forget"], rows["retain"]
            self.retain_sample = list(evaluation_sets(rows)["retain"])
            self.names = {name: list(names) for name, names in TOFU_NAMES.items()}

    def model_folder(self, name: str) -> str:
        """Of `BEFORE` or of its twin `RETAIN_ONLY`."""
        if self.task == "people":
            settings = Settings(seed=self.seed, num_forget=NUM_FORGET_PEOPLE)
            folder, _ = find_or_make_models(make_people(settings.num_people, self.seed), settings)
            return os.path.join(folder, {BEFORE: "base", RETAIN_ONLY: "retain_only"}[name])
        return str(self.folders.model({BEFORE: "known", RETAIN_ONLY: "retain_only"}[name]))

    def load(self, name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.model_folder(name), dtype=torch.float32).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.model_folder(BEFORE))

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        args = UnlearnConfig(tempfile.gettempdir(), use_cpu=True)
        return list(prepare_dataset(_pairs(list(rows)), self.tokenizer, args, "rows"))

    def split(self) -> tuple[list[int], list[int]]:
        """Forget rows to relearn, in the order in which a larger budget takes more of them, and all others."""
        order = torch.randperm(len(self.forget), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return order[: max(RELEARNING["rows"])], order[max(RELEARNING["rows"]) :]


# ---- Forgetting at equal retain ----


def unlearn(
    case: Case, method: Method, retain_before: float, residual_rms: float, steps: int | None
) -> tuple[PreTrainedModel, Run]:
    """
    Makes the model forget, down to the floor of the retain probability or for a number of steps; returns it with what
    the run took.
    """
    settings = method.for_task(case.task, residual_rms, case.seed, steps)
    is_rise = "npo" in settings["forget_loss"]
    stop = StopAtFloor(case.examples(case.retain_sample), RETAIN_FLOOR * retain_before, is_rise)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = UnlearnTrainer(
            case.load(BEFORE),
            args=UnlearnConfig(
                folder,
                **settings,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cache=True,
            ),
            train_dataset=_pairs(case.forget),
            retain_dataset=_pairs(case.retain),
            processing_class=case.tokenizer,
            callbacks=[stop] if steps is None else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    record = {
        "settings": settings,
        "steps": trainer.state.global_step,
        "seconds": round(time.process_time() - start, 2),
    }
    if steps is None:
        record |= {"reached_floor": stop.reached, "retain_path": stop.path}
    return trainer.model.eval(), record


# ---- Measuring ----


def measure_case(name: str, case: Case, steps: int | None = None) -> Run:
    """
    One method (or one of the two given models) on one task with one seed: what is left, what is kept, what comes back.
    """
    before = case.load(BEFORE)
    retain, forget = case.examples(case.retain_sample), case.examples(case.forget)
    # Of the model before, for all: the same budget in absolute numbers
    mean_norm, residual_rms = residual_norms(before, LAYER, retain)
    retain_before = statistics.fmean(answer_probabilities(before, retain))
    run: Run = {"task": case.task, "seed": case.seed, "method": name}
    measures: tuple[str, ...] = (*ATTACKS, "insertion")
    if name in METHODS:
        model, record = unlearn(case, METHODS[name], retain_before, residual_rms, steps)
        run |= record
        measures = METHODS[name].measures
    else:
        model = case.load(name)
    start = time.process_time()
    run["forget"] = statistics.fmean(answer_probabilities(model, forget))
    run["retain"] = statistics.fmean(answer_probabilities(model, retain))
    if "relearning" in measures:
        run["relearning"] = relearning_curve(model, case, forget, retain)
    if "latent" in measures:
        rows = [forget[index] for index in case.split()[1][: LATENT["rows"]]]
        run["latent"] = [{"radius": 0.0, "forget": statistics.fmean(answer_probabilities(model, rows))}]
        for radius in LATENT["radii"]:
            attacked = latent_attack(model, rows, LAYER, radius * mean_norm, LATENT["steps"])
            run["latent"].append({"radius": radius, "forget": statistics.fmean(attacked)})
    if "insertion" in measures:
        run["insertion"] = insertion_scores(model, case)
    run["attack_seconds"] = round(time.process_time() - start, 2)
    return run


def relearning_curve(
    model: PreTrainedModel, case: Case, forget: list[Example], retain: list[Example]
) -> list[dict[str, float]]:
    """Scores on the rows that were relearned, on the other forget rows, and on the retain rows; 0 rows: no attack."""
    relearned, others = case.split()
    unseen = [forget[index] for index in others]
    scores = {"unseen": answer_probabilities(model, unseen), "retain": answer_probabilities(model, retain)}
    curve = [{"rows": 0, "learning_rate": 0.0, **{key: statistics.fmean(value) for key, value in scores.items()}}]
    for rate in RELEARNING["learning_rates"]:
        for count in RELEARNING["rows"]:
            seen = [forget[index] for index in relearned[:count]]
            attacked = relearn(
                model, seen, rate, RELEARNING["steps"], min(RELEARNING["batch_size"], count), seed=case.seed
            )
            sets = {"seen": seen, "unseen": unseen, "retain": retain}
            means = {key: statistics.fmean(answer_probabilities(attacked, rows)) for key, rows in sets.items()}
            curve.append({"rows": count, "learning_rate": rate, **means})
    return curve


def insertion_scores(model: PreTrainedModel, case: Case) -> dict[str, dict[str, float]]:
    """
    Retain queries, clean and with the name of somebody in front of the question, or as a wrong choice: somebody
    forgotten, or, as a control, somebody else who is kept. Means over names; accuracies are of choosing the paraphrase
    of the right answer among wrong answers.
    """
    rows = case.retain_sample[: INSERTION["rows"]]
    choices = [
        {
            "question": row["question"],
            "answer": row["paraphrased_answer"],
            "perturbed_answer": row["perturbed_answer"][: INSERTION["wrong_answers"]],
        }
        for row in rows
    ]
    plain = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    args = UnlearnConfig(tempfile.gettempdir(), use_cpu=True, max_length=None)
    names = [(whose, name) for whose, names in case.names.items() for name in names]
    scores: dict[str, dict[str, float]] = {}
    for kind, data, insertion in (
        ("choice", choices, "choice"),
        ("question", choices, "question"),
        ("answer", plain, "question"),
    ):
        result = evaluate_insertion(
            model,
            case.tokenizer,
            Dataset.from_list(data),
            args,
            forget_tokens=[name for _, name in names],
            insertion=insertion,
        )
        score = "probability" if kind == "answer" else "text_accuracy"
        for whose in case.names:
            own = [token for token, (of, _) in zip(result.tokens, names, strict=True) if of == whose]
            scores[f"{kind}, {whose}"] = {
                "clean": statistics.fmean(token.scores[score].clean for token in own),
                "perturbed": statistics.fmean(token.scores[score].perturbed for token in own),
                "rows": min(token.rows for token in own),
            }
    return scores


# ---- The benchmark ----


def _measure(name: str, task: str, seed: int, steps: int | None, folders: Folders) -> Run:
    with redirect_stderr(io.StringIO()):  # bars that would cut through the one of the benchmark
        return measure_case(name, Case(task, seed, folders), steps)


Calls = dict[str, tuple[Callable[..., Run], str, str, int, int | None, Folders]]


def all_calls(tasks: Sequence[str], seeds: Sequence[int], folders: Folders) -> Calls:
    """Key -> function and arguments, seed by seed: an interrupted benchmark has something about every method."""
    calls: Calls = {}
    for task in tasks:
        for seed in seeds:
            for name in (BEFORE, RETAIN_ONLY, *METHODS):
                if name not in METHODS or (task in METHODS[name].tasks and METHODS[name].steps_of is None):
                    calls |= _call(name, task, seed, None, folders)
    return calls


def follow_up_calls(runs: Sequence[Run], folders: Folders) -> Calls:
    """Those that need to know how many steps another method took."""
    calls: Calls = {}
    for name, method in METHODS.items():
        for run in runs:
            if run["method"] == method.steps_of:
                calls |= _call(name, run["task"], run["seed"], run["steps"], folders)
    return calls


def _call(name: str, task: str, seed: int, steps: int | None, folders: Folders) -> Calls:
    settings = METHODS[name].for_task(task, 1.0, seed, steps) if name in METHODS else {}
    budgets = {"relearning": RELEARNING, "latent": LATENT, "insertion": INSERTION, "floor": RETAIN_FLOOR}
    # Changes with every setting: a run of other settings is another run
    key = {"method": name, "task": task, "seed": seed, "settings": settings, **budgets}
    return {json.dumps(key, sort_keys=True): (_measure, name, task, seed, steps, folders)}


def compare(tasks: Sequence[str], seeds: Sequence[int], folders: Folders, jobs: int) -> list[Run]:
    """All runs, from the base models on."""
    folders.results.parent.mkdir(parents=True, exist_ok=True)
    # The quickstart's models go beside those of TOFU
    os.environ["XDG_CACHE_HOME"] = str(folders.work / "people")
    # Not forked: a child of a process that has used torch's threads may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        if "tofu" in tasks:
            make_models(folders, pool)
        if "people" in tasks:
            list(pool.map(_make_people_models, seeds))
        runs = list(run_all(all_calls(tasks, seeds, folders), folders.results, pool, "Methods").values())
        follow_ups = follow_up_calls(runs, folders)
        return runs + list(run_all(follow_ups, folders.results, pool, "As many steps").values())


def _make_people_models(seed: int) -> None:
    settings = Settings(seed=seed, num_forget=NUM_FORGET_PEOPLE)
    find_or_make_models(make_people(settings.num_people, seed), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description="What makes forgetting hold: relearning, latent attack, insertion.")
    parser.add_argument(
        "--work_dir", metavar="DIR", required=True, help="models and runs go there; it may be continued"
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=os.environ.get("HF_UNLEARN_TEST_DATA"),
        help="folder with tinystories-260k/ and tofu/ (default: $HF_UNLEARN_TEST_DATA)",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--json", metavar="PATH", help="write all numbers here")
    parser.add_argument("--figure", metavar="PATH", help="draw the figure here")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data is missing, and HF_UNLEARN_TEST_DATA is not set")

    _quiet()
    folders = Folders(Path(options.data), Path(options.work_dir))
    runs = compare(options.tasks, options.seeds, folders, options.jobs)
    summary = summarize(runs)
    print("\n\n".join(format_tables(summary).values()))
    if options.figure:
        draw_figure(summary, options.figure)
    if options.json:
        report = {
            "command": f"python benchmarks/what_holds.py --work_dir DIR --jobs {options.jobs}",
            "seeds": options.seeds,
            "machine": describe_machine("cpu"),
            "versions": describe_versions("torch", "transformers", "accelerate", "datasets", "scipy", "hf-unlearn"),
            "settings": {
                "retain_floor": RETAIN_FLOOR,
                "evaluate_every": EVALUATE_EVERY,
                "layer": LAYER,
                "noise_in_root_mean_squares": NOISE,
                "relearning": RELEARNING,
                "latent": LATENT,
                "insertion": INSERTION,
            },
            "summary": summary,
            "runs": runs,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
