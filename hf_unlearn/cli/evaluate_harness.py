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
"""`hf-unlearn evaluate --lm-eval`: tasks of lm-evaluation-harness, and where their numbers go."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hf_unlearn._version import __version__
from hf_unlearn.cards.report import Data, DataSummary, UnlearningReport

from . import UsageError
from .evaluate_models import Inputs
from .evaluate_output import Result


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from peft import PeftModel
    from transformers import PreTrainedModel

    from hf_unlearn import UnlearnConfig
    from hf_unlearn.lm_eval import HarnessScore

    from .evaluate_arguments import EvaluateArguments


def check_tasks(args: "EvaluateArguments") -> "TaskManager":
    """
    Finds the tasks, before a model is loaded.

    Raises:
        `UsageError`: there is none of a name, or the command runs on several processes.
    """
    from accelerate import PartialState

    from hf_unlearn.lm_eval import find_tasks

    if PartialState().num_processes > 1:
        raise UsageError(
            "--lm_eval measures a model that is loaded once: run it in a command of its own, on one process."
        )
    try:
        return find_tasks(
            args.lm_eval_tasks,
            args.lm_eval_include_path,
            forget_token=(args.forget_tokens or [None])[0],
            perturbation_seed=args.insertion_seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def add_harness(result: Result, model: "PreTrainedModel | PeftModel", inputs: Inputs, manager: "TaskManager") -> None:
    """
    Runs the tasks on MODEL.

    Raises:
        `UsageError`: the data of a task cannot be loaded.
    """
    from hf_unlearn.lm_eval import run_harness

    args = inputs.args
    try:
        result.harness = run_harness(
            model,
            inputs.tokenizer,
            args.lm_eval_tasks,
            num_fewshot=args.lm_eval_num_fewshot,
            limit=args.lm_eval_limit,
            batch_size=args.batch_size,
            seed=args.lm_eval_seed,
            task_manager=manager,
        )
    except OSError as error:  # of `datasets`: whose messages name folders of this machine
        raise UsageError(
            f"The data of --lm_eval {args.lm_eval} cannot be loaded ({type(error).__name__}): check the connection to "
            "the Hub, or the files that the tasks name."
        ) from error
    result.harness_limit = args.lm_eval_limit


def harness_metrics(scores: "Iterable[HarnessScore]", limit: int | None) -> dict[str, float]:
    """
    The numbers as a report keeps them: `mmlu.acc@0-shot-v2`, the ends of its interval, and `mmlu_rows`.

    Shots, version and a limit of the rows are in the name, so that numbers that do not compare do not replace each
    other.

    Example:

    ```python
    >>> from hf_unlearn.cli.evaluate_harness import harness_metrics
    >>> from hf_unlearn.lm_eval import HarnessScore
    >>> harness_metrics([HarnessScore("mmlu", "acc", "none", 0.5, None, 100, shots=0, version="2")], limit=None)
    {'mmlu.acc@0-shot-v2': 0.5, 'mmlu_rows': 100}

    ```
    """
    metrics: dict[str, float] = {}
    part = "" if limit is None else f"-limit-{limit}"
    for score in scores:
        reading = "" if score.filter == "none" else f".{score.filter}"
        name = _plain(f"{score.task}.{score.metric}{reading}@{score.shots}-shot-v{score.version}{part}")
        metrics[name] = score.value
        if score.interval is not None:
            metrics[f"{name}_ci_low"], metrics[f"{name}_ci_high"] = score.interval
        metrics[_plain(f"{score.task}_rows")] = score.rows
    return metrics


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.@+-]+", "-", name)


def report_without_data(
    model: "PreTrainedModel | PeftModel", config: "UnlearnConfig", revision: str | None
) -> UnlearningReport:
    """The report of a model whose making is not on record and whose forget set was not named."""
    from accelerate import PartialState

    from hf_unlearn.recording import describe_environment, describe_model, hub_origin

    return UnlearningReport(
        tool_version=__version__,
        base=describe_model(model, hub_origin(model, revision)),
        method=None,
        data=Data(DataSummary(rows=None, tokens=None)),
        environment=describe_environment(config.device, PartialState().num_processes, train_seconds=None),
    )
