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
"""What the quickstart shows: a table, what the models answer, and a figure."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any


# Of the models and of the data: keys in the results, and what a person reads.
_MODELS = {"before": "before", "after": "trained", "edited": "one edit", "retain_only": "never taught"}
_GROUPS = {"forget": "people to forget", "retain": "people to keep"}

_METRICS = {
    "probability": "probability of the true answer",
    "paraphrased_question_probability": "the same, asked in other words",
    "rougeL_recall": "true words in what it answers",
    "exact_memorization": "tokens right, given those before",
    "extraction_strength": "answer extracted from its start",
    "truth_ratio": "truth ratio",
}

_CHANGES = {
    "share_of_weights": "share of the weights",
    "relative_norm": "norm, relative to that of these",
    "relative_norm_of_model": "norm, relative to that of all",
}


def as_text(result: dict[str, Any]) -> str:
    """The result for a person; `result` is what `--json` prints."""
    metrics, seconds, settings = result["metrics"], result["seconds"], result["settings"]
    people, forgotten = settings["num_people"], settings["num_forget"]
    places = result["certificates"]["solution"]["constraints"]
    bound = f"{100 * result['intervene_arguments']['probability']:g} %"
    lines = [f"A model that knew {people} invented people was made to forget {forgotten} of them, in two ways.", ""]
    for group, label in _GROUPS.items():
        lines.append(_line(f"{label}, {metrics['after'][group]['rows']:.0f} questions", _MODELS))
        lines += [_row(f"  {name}", group, metric, metrics) for metric, name in _METRICS.items()]
        lines.append("")
    lines += [
        _row("forget quality (a p-value)", "forget", "forget_quality", metrics),
        _row("model utility (people to keep)", "retain", "model_utility", metrics),
        "",
        "what changed",
        *(_line(f"  {name}", _changes(result, key, ".3f")) for key, name in _CHANGES.items()),
        _line("  seconds", _changes(result, "seconds", ".1f")),
        "",
        "trained: NPO and a KL term, on a LoRA. one edit: one matrix, changed as little as was found to suffice for",
        f"each of the {places} tokens of the true answers to come with at most {bound}. That was checked for these",
        "questions, and is promised for no others: what is left under other words is measured above.",
        "never taught: the same model, taught without the people to forget. Forgetting should come down to its level.",
        "Forget quality asks whether truth ratios tell a model from that one: below 0.05 they do. All other metrics",
        "are 0 to 1; of the truth ratio, 1 is best: wrong answers about the forgotten as likely as true ones, about",
        "others never.",
        "Both make true answers unlikely and put nothing in their place: what is said instead may be gibberish.",
        "No attack was run: what could be brought back is not known.",
    ]
    for group, label in _GROUPS.items():
        lines += ["", f"One of the {label}:"]
        for sample in result["samples"]:
            if sample["set"] == group:
                lines.append(f"  {sample['question']} {sample['answer']}")
                lines += [
                    f"    {_MODELS[when]:<8} {sample[when] or '(nothing)'}" for when in ("before", "after", "edited")
                ]
    models = "came from the cache" if result["from_cache"] else f"took {seconds['models']:.0f} s, and are cached now"
    lines += [
        "",
        f"Done in {seconds['total']:.0f} s; the two models {models}.",
        "",
        f"In {result['output_dir']}:",
        "  base/                   the model before",
        "  model/                  the trained model, the LoRA merged: AutoModelForCausalLM.from_pretrained loads it",
        "  intervention/           the model with the one edit, its report and its card",
        "  data/                   forget.jsonl and retain.jsonl",
        "  unlearning_report.json  the trained model's numbers; README.md, the model card, is rendered from it",
        *(["  figures/                before_after.png"] if result["figure"] else []),
        "",
        "What to run next: the same in your own hands, then with your model and your data",
        "",
        _train_command(result),
        "",
        _intervene_command(result),
        "",
        _evaluate_command(result),
        "",
        "and what attacks bring back, within a minute:",
        "",
        _robustness_command(result),
        "",
        "`--help` after the name of a command lists what else can be set.",
    ]
    return "\n".join(lines)


def _row(name: str, group: str, metric: str, metrics: dict[str, Any]) -> str:
    values = {model: metrics[model][group][metric] for model in _MODELS}
    # A p-value may be far below what three digits show
    cells = {model: f"{value:.1e}" if 0 < value < 5e-4 else f"{value:.3f}" for model, value in values.items()}
    return _line(name, cells)


def _changes(result: dict[str, Any], key: str, digits: str) -> dict[str, str]:
    return {model: format(change[key], digits) for model, change in result["changes"].items()}


def _line(name: str, cells: dict[str, str]) -> str:
    """A line of the table; a model without a cell has nothing to show."""
    return f"{name:<36}{''.join(f'{cells.get(model, str()):>14}' for model in _MODELS)}".rstrip()


def _train_command(result: dict[str, Any]) -> str:
    """The command that does with `train` what was done here."""
    return _command(
        "train --use_peft",
        {**_inputs(result), **result["train_arguments"], "output_dir": _by_hand(result["output_dir"])},
    )


def _intervene_command(result: dict[str, Any]) -> str:
    """The command that makes with `intervene` the edit that was made here."""
    folder = f"{_by_hand(result['output_dir'])}-edit"
    return _command("intervene", {**_inputs(result), **result["intervene_arguments"], "output_dir": folder})


def _inputs(result: dict[str, Any]) -> dict[str, str]:
    output_dir = result["output_dir"]
    return {
        "model_name_or_path": os.path.join(output_dir, "base"),
        "forget_dataset": os.path.join(output_dir, "data", "forget.jsonl"),
        "retain_dataset": os.path.join(output_dir, "data", "retain.jsonl"),
    }


def _evaluate_command(result: dict[str, Any]) -> str:
    """The command that measures what `train` left."""
    output_dir = result["output_dir"]
    return _command(
        f"evaluate {shlex.quote(_by_hand(output_dir))}",
        {
            "forget": os.path.join(output_dir, "data", "forget.jsonl"),
            "retain": os.path.join(output_dir, "data", "retain.jsonl"),
            "retain_only_model": result["retain_only_model"],
            "max_new_tokens": result["max_new_tokens"],
        },
    )


def _robustness_command(result: dict[str, Any]) -> str:
    """The command that attacks the trained model, beside the model before and the one never taught."""
    output_dir = result["output_dir"]
    return _command(
        f"robustness-report {shlex.quote(os.path.join(output_dir, 'model'))}",
        {
            "original": os.path.join(output_dir, "base"),
            "control": result["retain_only_model"],
            "forget": os.path.join(output_dir, "data", "forget.jsonl"),
            "retain": os.path.join(output_dir, "data", "retain.jsonl"),
            "max_new_tokens": result["max_new_tokens"],
            "output_dir": f"{output_dir.rstrip(os.sep)}-robustness",
        },
    )


def _by_hand(output_dir: str) -> str:
    return f"{output_dir.rstrip(os.sep)}-by-hand"


def _command(name: str, arguments: dict[str, Any]) -> str:
    pieces = [f"--{argument} {shlex.quote(str(value))}" for argument, value in arguments.items()]
    # `make` runs the command from a virtual environment that is not active
    program = "hf-unlearn" if shutil.which("hf-unlearn") else os.path.relpath(f"{sys.prefix}/bin/hf-unlearn")
    return " \\\n    ".join([f"{program} {name}", *pieces])


def draw_figure(metrics: dict[str, Any], path: str) -> str | None:
    """Bars of the probabilities; returns their file, or `None` where matplotlib is missing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(FileNotFoundError):
        os.remove(path)  # an earlier run's must not stay beside new numbers
    if find_spec("matplotlib") is None:
        print("No figure: matplotlib is missing (pip install 'hf-unlearn[plots]').", file=sys.stderr, flush=True)
        return None
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, (name, label) in enumerate(_MODELS.items()):
        heights = [metrics[name][group]["probability"] for group in _GROUPS]
        middle = (len(_MODELS) - 1) / 2
        bars = axes.bar([group + 0.21 * (place - middle) for group in range(len(_GROUPS))], heights, 0.19, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(_GROUPS)), list(_GROUPS.values()))
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("probability of the true answer")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(_MODELS), frameon=False)
    figure.savefig(path, dpi=150)
    return path
