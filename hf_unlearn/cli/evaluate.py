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
Measure what a model still knows of one data set and what it kept of another.

```bash
hf-unlearn evaluate out --preset tofu --forget_config forget10 \
    --retain_only_model open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90 \
    --judge_model open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --output out/unlearning_report.json
```

`accelerate launch -m hf_unlearn.cli.evaluate ...` shares the rows among several devices.

```bash
hf-unlearn evaluate out --lm-eval wmdp,mmlu,perturbed_mmlu
```

runs tasks of lm-evaluation-harness, alone or with the sets.
"""

import os
import sys
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import TYPE_CHECKING

from hf_unlearn.cards.card import update_model_card
from hf_unlearn.cards.metric_table import KEPT
from hf_unlearn.cards.report import REPORT_NAME, UnlearningReport

from . import UsageError, run
from .evaluate_arguments import EvaluateArguments, cache_folder, check_arguments, is_harness_alone
from .evaluate_data import EvaluationData, load_data, say
from .evaluate_harness import add_harness, check_tasks, harness_metrics, report_without_data
from .evaluate_measure import measure
from .evaluate_models import Inputs, add_retain_only, check_tokenizers
from .evaluate_output import PRIVATE, Result, as_json, as_table, write_private
from .reports import check_same_model, earlier_report, new_report


if TYPE_CHECKING:
    from hf_unlearn import UnlearnConfig

    from .inputs import ArgumentParser, DataArguments


def make_parser() -> "ArgumentParser":
    from .inputs import ArgumentParser, DataArguments

    parser = ArgumentParser(
        (DataArguments, EvaluateArguments),
        prog="hf-unlearn evaluate",
        usage="%(prog)s MODEL [--forget F --retain R | --preset P] [--lm-eval TASKS] ...",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A folder, a Hub id, or the folder of an adapter.")
    return parser


def main(argv: list[str]) -> int:
    data_args, args, positional = make_parser().parse(argv)

    from accelerate import PartialState

    # Progress and logs go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        result = evaluate(positional.model, data_args, args)
    if PartialState().is_main_process:
        print(as_json(result) if args.json else as_table(result))
    PartialState().destroy_process_group()
    return 0


def evaluate(name: str | None, data_args: "DataArguments", args: EvaluateArguments) -> Result:
    """
    Everything that the command does but printing. Nearly all that can be refused is refused before the measurement.

    Raises:
        `UsageError`: inputs are missing or do not fit; naming the fix.
    """
    from accelerate import PartialState

    from hf_unlearn.loading import prepare_tokenizer
    from hf_unlearn.metrics.cache import ScoreCache
    from hf_unlearn.metrics.perturbation import with_options

    from .inputs import read_model, read_tokenizer

    check_arguments(name, data_args, args)
    alone = is_harness_alone(data_args, args)
    task_manager = check_tasks(args) if args.lm_eval is not None else None
    config = _config(args)
    report = earlier_report(name, args.output)
    data = EvaluationData({}) if alone else load_data(data_args, args)
    tokenizer = read_tokenizer(name, args.revision, "model")
    check_tokenizers(tokenizer, args)
    try:
        given = data.sets
        data.sets = {key: with_options(rows, key) for key, rows in given.items()}
        model = read_model(name, args.revision, config)
        tokenizer = prepare_tokenizer(tokenizer, model, config)
        if report is not None:
            check_same_model(report, model, args.output)
        elif args.output is not None:
            report = (
                report_without_data(model, config, args.revision)
                if alone
                else new_report(model, tokenizer, data.sets, config, args.revision)
            )
        inputs = Inputs(data, tokenizer, config, args, ScoreCache(cache_folder(args)))
        result = Result(args.model_stage, {}, {}, {}) if alone else measure(model, given, inputs)
        if task_manager is not None:
            add_harness(result, model, inputs, task_manager)
        del model  # room for the other one
        if args.retain_only_model is not None:
            add_retain_only(result, inputs)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _add_model_utility(result)
    if args.output is not None:
        result.report = args.output
        if PartialState().is_main_process:
            _save(result, report)
    return result


def _config(args: EvaluateArguments) -> "UnlearnConfig":
    """How rows become tokens and models are loaded: as in training."""
    from hf_unlearn import UnlearnConfig

    try:
        return UnlearnConfig(
            "evaluation",  # nothing is written there
            max_length=args.max_length,
            chat_template_path=args.chat_template_path,
            use_cpu=args.use_cpu,
            model_init_kwargs={"dtype": args.dtype},
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _add_model_utility(result: Result) -> None:
    from hf_unlearn.metrics import model_utility

    if "retain" not in result.metrics:
        return
    try:
        utility, result.utility_parts = model_utility(result.metrics)
    except ValueError as error:
        result.skipped["retain"]["model_utility"] = str(error)
    else:
        result.metrics["retain"]["model_utility"] = utility


# ---- The report, the card and the values per row ----


def _save(result: Result, report: UnlearningReport) -> None:
    """Writes the report, the card if there is one, and the values per row."""
    stage = getattr(report.metrics, result.stage)
    if set(result.metrics) & set(KEPT):
        # Model utility is over the sets measured together: none may stay from another time
        for name in KEPT:
            stage.pop(name, None)
    stage.update(result.metrics)
    if result.harness:
        stage["harness"] = stage.get("harness", {}) | harness_metrics(result.harness, result.harness_limit)
        report.environment.packages["lm-eval"] = version("lm-eval")
    folder, name = os.path.split(result.report)
    if folder:
        os.makedirs(folder, exist_ok=True)
    report.save(result.report)
    if name == REPORT_NAME and update_model_card(report, folder):
        say("The model card beside the report was rendered anew.")
    save_samples(result, os.path.join(folder, PRIVATE))


def save_samples(result: Result, folder: str) -> None:
    """
    Writes one JSON line per row. They hold generated answers to the forget set: only the owner can read them, and git
    ignores them.

    Args:
        result ([`Result`]): what was measured.
        folder (`str`): a folder for nothing else.
    """
    for name, rows in result.samples.items():
        write_private(folder, f"{result.stage}_{name}.jsonl", rows)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
