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
Measure a model, run every attack on it, and judge by thresholds that were declared before.

```bash
hf-unlearn robustness-report out --original open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --control open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90 \
    --forget locuslab/TOFU --forget_config forget10_perturbed \
    --retain locuslab/TOFU --retain_config retain_perturbed \
    --budgets small,standard --seeds 0,1 --output_dir out/robustness
```

What is done is kept: a command that was killed goes on where it was, and ends with the same report.
"""

import json
import os
import shutil
import sys
import textwrap
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_unlearn.cards.figures import can_draw, draw_heat_map, draw_recovery_curves
from hf_unlearn.cards.report import REPORT_NAME, UnlearningReport, write_text
from hf_unlearn.cards.robustness import render_robustness_report
from hf_unlearn.cards.verdict import OUTCOMES, THRESHOLDS_NAME, judge, load_thresholds

from . import UsageError, run
from .attack import HelpFormatter, as_table, list_of_attacks
from .attacking import (
    BUDGETS,
    Battery,
    Inputs,
    SharedArguments,
    check_arguments,
    needy_attacks,
    read_inputs,
    run_battery,
    save_report_and_card,
)
from .evaluate_output import PRIVATE, write_private
from .reports import check_same_model, earlier_report, new_report


if TYPE_CHECKING:
    from hf_unlearn.cards.verdict import Thresholds
    from hf_unlearn.metrics.cache import ScoreCache

    from .inputs import ArgumentParser, DataArguments


TEXT_NAME = "robustness_report.md"
_FIGURES = {"heat_map": "figures/attacks.png", "curves": "figures/recovery_curves.png"}
_STAGES = {"original": "before", "unlearned": "after", "control": "control"}


@dataclass
class RobustnessArguments(SharedArguments):
    """
    What the battery is, and where its report goes; besides what all commands that attack share.

    Parameters:
        output_dir (`str`, *optional*):
            Folder of the report, its text and pictures, and of `private/` with the values per row.
        budgets (`list[str]`, *optional*, defaults to `["small"]`):
            How much the attacker may spend, one or several of `small`, `standard`, `large`.
        seeds (`list[str]`, *optional*, defaults to `["0"]`):
            Seeds of the split of the forget rows and of what attacks draw; the worst counts.
        thresholds (`str`, *optional*):
            What has to hold (YAML); without it, the thresholds that are shipped.
        generate (`bool`, *optional*, defaults to `True`):
            Whether answers are generated, which ROUGE-L and the rules on fluency need.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            At most this many tokens are generated per answer.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the report, its text and pictures, and private/."}
    )
    budgets: list[str] = field(
        default_factory=lambda: ["small"],
        metadata={"help": f"How much the attacker may spend: one or several of {', '.join(BUDGETS)}."},
    )
    seeds: list[str] = field(
        default_factory=lambda: ["0"], metadata={"help": "Seeds of the split and of what attacks draw."}
    )
    thresholds: str | None = field(
        default=None, metadata={"help": "What has to hold (YAML); the shipped ones if unset."}
    )
    generate: bool = field(
        default=True, metadata={"help": "Whether answers are generated, for ROUGE-L and the rules on fluency."}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "At most this many tokens are generated per answer."})


@dataclass
class Result:
    """What `--json` prints: the report's attacks and verdict, and the files."""

    report: UnlearningReport
    output_dir: str
    figures: dict[str, str | None]

    def as_json(self) -> str:
        content = self.report.to_dict()
        files = {
            "report": os.path.join(self.output_dir, REPORT_NAME),
            "text": os.path.join(self.output_dir, TEXT_NAME),
            "figures": [os.path.join(self.output_dir, path) for path in self.figures.values() if path],
        }
        return json.dumps({**files, **{key: content[key] for key in ("verdict", "metrics", "attacks")}}, indent=2)


def make_parser() -> "ArgumentParser":
    from .inputs import ArgumentParser, DataArguments

    parser = ArgumentParser(
        (DataArguments, RobustnessArguments),
        prog="hf-unlearn robustness-report",
        usage="%(prog)s MODEL --original BASE --control TWIN --forget F --retain R --output_dir DIR ...",
        formatter_class=HelpFormatter,
        epilog=list_of_attacks(),
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A folder, a Hub id, or the folder of an adapter.")
    return parser


def main(argv: list[str]) -> int:
    data_args, args, positional = make_parser().parse(argv)
    with redirect_stdout(sys.stderr):
        result = robustness_report(positional.model, data_args, args)
    print(result.as_json() if args.json else as_text(result))
    return 0


def robustness_report(name: str | None, data_args: "DataArguments", args: RobustnessArguments) -> Result:
    """
    Everything that the command does but printing.

    Raises:
        `UsageError`: inputs are missing or do not fit; naming the fix.
    """
    from tqdm import tqdm

    from hf_unlearn.attacks.table import ATTACKS
    from hf_unlearn.metrics.cache import ScoreCache

    names = check_arguments("robustness-report", name, data_args, args)
    battery = make_battery(names, args)
    try:
        thresholds, text = load_thresholds(args.thresholds)
        if unknown := [
            word
            for word in (*thresholds.required_attacks, *thresholds.recovered)
            if word not in ATTACKS and word != "default"
        ]:
            raise UsageError(f"The thresholds name the attack {unknown[0]!r}: choose from {', '.join(ATTACKS)}.")
    except ValueError as error:
        raise UsageError(str(error)) from error
    output = os.path.join(args.output_dir, REPORT_NAME)
    report = earlier_report(name, output)
    inputs = read_inputs(name, data_args, args)
    scores = ScoreCache(args.cache_dir or os.path.join(args.output_dir, PRIVATE, "cache"))
    try:
        if report is not None:
            check_same_model(report, inputs.models["unlearned"], output)
        else:
            sets = {"forget": inputs.forget, "retain": inputs.retain}
            report = new_report(inputs.models["unlearned"], inputs.tokenizer, sets, inputs.config)
        declare(args.output_dir, thresholds, text, inputs, scores)
        measure(inputs, report, args, scores)
        save_report_and_card(report, output)
        runs = run_battery(battery, inputs, args, scores, report, output)
        for _ in tqdm(runs, total=len(battery.runs()), desc="Attacks", file=sys.stderr):
            pass
    except ValueError as error:
        raise UsageError(str(error)) from error
    report.verdict = judge(report, thresholds, ATTACKS)
    save_report_and_card(report, output)
    figures = draw(report, args.output_dir)
    write_text(os.path.join(args.output_dir, TEXT_NAME), render_robustness_report(report, figures))
    return Result(report, args.output_dir, figures)


def make_battery(names: list[str], args: RobustnessArguments) -> Battery:
    """
    The attacks, budgets and seeds.

    Raises:
        `UsageError`: a budget or a seed is none, or there is nowhere to write.
    """
    if args.output_dir is None:
        raise UsageError("--output_dir is required: a folder for the report, its text and its pictures.")
    if os.path.exists(args.output_dir) and not os.path.isdir(args.output_dir):
        raise UsageError(f"--output_dir {args.output_dir!r} is a file: name a folder.")
    if args.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {args.max_new_tokens} generates nothing: use at least 1.")
    budgets = [word for text in args.budgets for word in text.split(",") if word]
    if unknown := [word for word in budgets if word not in BUDGETS]:
        raise UsageError(f"--budgets: {unknown[0]!r} is none of {', '.join(BUDGETS)}.")
    words = [word for text in args.seeds for word in text.split(",") if word]
    if wrong := [word for word in words if not word.isdecimal()]:
        raise UsageError(f"--seeds: {wrong[0]!r} is no whole number of at least 0.")
    if not budgets or not words:
        raise UsageError("--budgets and --seeds need at least one value each.")
    if args.control is None and (needy := needy_attacks(names)):
        print(
            f"Left out, because without --control they say nothing: {', '.join(needy)}.", file=sys.stderr, flush=True
        )
        names = [name for name in names if name not in needy]
    return Battery(names, [word for word in BUDGETS if word in budgets], list(dict.fromkeys(map(int, words))))


def declare(output_dir: str, thresholds: "Thresholds", text: str, inputs: Inputs, scores: "ScoreCache") -> None:
    """
    Writes down the thresholds, and what is attacked, before the first attack. Neither may change afterwards: a
    threshold that is chosen when the numbers are known says nothing.

    Raises:
        `UsageError`: the folder is that of other thresholds, models or rows.
    """
    from hf_unlearn.metrics.cache import fingerprint_rows, fingerprint_tokenizer

    subject = {
        **{role: scores.fingerprint(model) for role, model in inputs.models.items()},
        **{name: fingerprint_rows(rows) for name, rows in (("forget", inputs.forget), ("retain", inputs.retain))},
        "tokens": fingerprint_tokenizer(inputs.tokenizer, inputs.config),
        "thresholds": thresholds.sha256,
    }
    path = os.path.join(output_dir, PRIVATE, "subject.jsonl")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            earlier = json.loads(file.read())
        if changed := [role for role in {**earlier, **subject} if earlier.get(role) != subject.get(role)]:
            raise UsageError(
                f"--output_dir holds a report that was begun with another {' and another '.join(changed)}: name "
                "another folder, or run it with what it was begun with."
            )
        return
    os.makedirs(output_dir, exist_ok=True)
    write_private(os.path.join(output_dir, PRIVATE), "subject.jsonl", [subject])
    write_text(os.path.join(output_dir, THRESHOLDS_NAME), text)


def measure(inputs: Inputs, report: UnlearningReport, args: RobustnessArguments, scores: "ScoreCache") -> None:
    """Fills the report's metrics of the original, the unlearned model and the control, before any attack."""
    from hf_unlearn.metrics import evaluate_model, forget_quality, model_utility
    from hf_unlearn.metrics.cache import fingerprint_rows, fingerprint_tokenizer
    from hf_unlearn.metrics.fluency import evaluate_fluency
    from hf_unlearn.metrics.perturbation import with_options

    sets = {"forget": inputs.forget, "retain": inputs.retain}
    sets = {key: with_options(rows, key) for key, rows in sets.items()}
    judge_model = inputs.models["original"]
    samples = {}
    for role, model in inputs.models.items():

        def compute(role: str = role, model: Any = model) -> dict[str, Any]:
            settings = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
            first = evaluate_model(
                model,
                inputs.tokenizer,
                sets,
                inputs.config,
                generate=args.generate,
                description=f"Asking the {role} model",
                **settings,
            )
            metrics, rows = first.metrics, {name: [dict(row) for row in own] for name, own in first.samples.items()}
            if args.generate:
                fluency = evaluate_fluency(
                    model,
                    inputs.tokenizer,
                    sets,
                    inputs.config,
                    judge=judge_model,
                    generated=first.generated,
                    description=f"Fluency of the {role} model",
                    **settings,
                )
                for name, values in fluency.metrics.items():
                    metrics[name] |= values
                    for row, other in zip(rows[name], fluency.samples[name], strict=True):
                        row.update(other)
            # Numbers alone: what was generated stays nowhere
            return {
                "metrics": metrics,
                "samples": {
                    name: [{key: value for key, value in row.items() if not isinstance(value, str)} for row in own]
                    for name, own in rows.items()
                },
            }

        key = {
            "measure": "robustness report",
            "model": scores.fingerprint(model),
            "judge": scores.fingerprint(judge_model),
            **{name: fingerprint_rows(rows) for name, rows in sets.items()},
            "tokens": fingerprint_tokenizer(inputs.tokenizer, inputs.config),
            "generate": args.generate,
            "max_new_tokens": args.max_new_tokens,
            "batch_size": args.batch_size,
            "device": model.device.type,
        }
        value = scores.get(key, compute)
        metrics, samples[role] = value["metrics"], value["samples"]
        metrics["retain"]["model_utility"] = model_utility(metrics)[0]
        setattr(report.metrics, _STAGES[role], metrics)
        for name, rows in samples[role].items():
            write_private(os.path.join(args.output_dir, PRIVATE), f"{_STAGES[role]}_{name}.jsonl", rows)
    if "control" in samples and any(row["truth_ratio"] is not None for row in samples["control"]["forget"]):
        ratios = [[row["truth_ratio"] for row in samples[role]["forget"]] for role in ("unlearned", "control")]
        p_value, statistic = forget_quality(*ratios)
        report.metrics.after["forget"] |= {"forget_quality": p_value, "forget_quality_statistic": statistic}


def draw(report: UnlearningReport, output_dir: str) -> dict[str, str | None]:
    """Draws the pictures, in the place of those of an earlier run; `None` for one that there is nothing for."""
    folder = os.path.join(output_dir, "figures")
    shutil.rmtree(folder, ignore_errors=True)
    if not can_draw():
        print("No pictures: matplotlib is missing (pip install 'hf-unlearn[plots]').", file=sys.stderr, flush=True)
        return dict.fromkeys(_FIGURES)
    os.makedirs(folder)
    functions = {"heat_map": draw_heat_map, "curves": draw_recovery_curves}
    return {
        name: path if functions[name](report, os.path.join(output_dir, path)) else None
        for name, path in _FIGURES.items()
    }


def as_text(result: Result) -> str:
    """The table of attacks, the verdict and why, and the files."""
    verdict = result.report.verdict
    lines = [as_table(result.report.attacks), "", f"Verdict: {OUTCOMES[verdict.outcome]}."]
    notes = [
        f"{rule.name}: {rule.measured:.3f}, threshold {rule.bound:g}" for rule in verdict.rules if rule.holds is False
    ]
    notes += [f"Not measured: {', '.join(verdict.missing)}"] if verdict.missing else []
    notes += [f"Attacks without a score: {', '.join(verdict.not_run)}"] if verdict.not_run else []
    for note in notes:
        lines += textwrap.wrap(f"- {note}.", 100, subsequent_indent="  ")
    lines += [
        "",
        f"In {result.output_dir}:",
        f"  {TEXT_NAME:<28} the report to read",
        f"  {REPORT_NAME:<28} its numbers",
    ]
    lines += [f"  {path:<28} picture" for path in result.figures.values() if path]
    lines += [
        f"  {THRESHOLDS_NAME:<28} what had to hold, declared before",
        f"  {PRIVATE + os.sep:<28} values per row: not to be released",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
