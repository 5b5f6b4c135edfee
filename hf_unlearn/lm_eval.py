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
"""Tasks of lm-evaluation-harness on a model that is loaded already; see [`run_harness`]."""

import copy
import logging
import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .lm_eval_tasks import tasks_folder


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The tasks of this package, which read `forget_token` and `perturbation_seed`
PERTURBED_TASKS = ("perturbed_mmlu", "perturbed_mmlu_question")
# Of a normal distribution: half of the width of a 95 % interval, in standard errors
_NORMAL_95 = 1.959963984540054


@dataclass
class HarnessScore:
    """
    One number of the harness.

    Parameters:
        task (`str`): name of the task or group.
        metric (`str`): such as `acc`, `acc_norm` or `exact_match`.
        filter (`str`): which of the task's readings of an answer; `none` where there is one.
        value (`float`): the number.
        stderr (`float`, *optional*): its standard error, as the harness estimates it.
        rows (`int`): how many questions were asked.
        shots (`int`): how many answered examples stood before each.
        version (`str`): version of the task; `none` where it has none.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    rows: int
    shots: int
    version: str

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, by a normal distribution."""
        if self.stderr is None:
            return None
        return self.value - _NORMAL_95 * self.stderr, self.value + _NORMAL_95 * self.stderr


def find_tasks(
    names: Sequence[str],
    include_path: str | None = None,
    forget_token: str | None = None,
    perturbation_seed: int = 0,
) -> "TaskManager":
    """
    Finds tasks by name: in `include_path`, among those of this package and among the harness's own.

    Args:
        names (`Sequence[str]`): names of tasks, groups and tags.
        include_path (`str`, *optional*): a folder of task files (.yaml). They may name Python functions, which are
            run.
        forget_token (`str`, *optional*): what the tasks of this package insert, `SARS-CoV-2` by default.
        perturbation_seed (`int`, *optional*, defaults to 0): seed of the choices that they replace.

    Returns:
        `lm_eval.tasks.TaskManager`: one that knows them all.

    Raises:
        `ImportError`: lm-eval is not installed.
        `ValueError`: there is no task of a name; naming the nearest.
    """
    import difflib

    from lm_eval.tasks import TaskManager

    folders = [tasks_folder(), *([include_path] if include_path else [])]
    metadata = None
    if set(names) & set(PERTURBED_TASKS):  # every task gets it, so only where one of them reads it
        token = {} if forget_token is None else {"forget_token": forget_token}
        metadata = {"perturbation_seed": perturbation_seed, **token}
    with _only_errors():
        # To index the harness's thousands of files takes seconds
        manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
        if not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=folders, metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"lm-evaluation-harness has no task {name!r}{': near are ' + ', '.join(near) if near else ''}. "
                "`lm_eval ls tasks` lists its own; --lm_eval_include_path names a folder of others."
            )
    return manager


def run_harness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    task_manager: "TaskManager | None" = None,
) -> list[HarnessScore]:
    r"""
    Runs tasks of [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) on a model that is
    loaded, an adapter on its base included, without a chat template.

    Of a multiple-choice task with prompt \\( x \\) and choices \\( c_1, \dots, c_n \\) the accuracy `acc` is the share
    of questions whose right choice has the largest \\( \log p(c_i \mid x) \\), summed over its tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model, in evaluation mode, on its device.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        tasks (`Sequence[str]`): names of tasks, groups and tags: the harness's own, such as `wmdp` and `mmlu`, and
            `perturbed_mmlu` and `perturbed_mmlu_question` of this package.
        num_fewshot (`int`, *optional*, defaults to 0): answered examples before each question. A task file that sets
            0 itself keeps it.
        limit (`int`, *optional*): at most this many questions of each task, its first ones.
        batch_size (`int`, *optional*, defaults to 16): rows per forward pass.
        seed (`int`, *optional*, defaults to 0): seed of Python's, NumPy's and torch's generators and of the examples.
        task_manager (`lm_eval.tasks.TaskManager`, *optional*): of [`find_tasks`], which has the options.

    Returns:
        `list[HarnessScore]`: of each task, group and subgroup. Tasks whose group has a number of its own are left out.

    Raises:
        `ImportError`: lm-eval is not installed.
        `ValueError`: there is no such task.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from hf_unlearn.lm_eval import run_harness

    >>> model = AutoModelForCausalLM.from_pretrained("org/model")  # doctest: +SKIP
    >>> scores = run_harness(model, AutoTokenizer.from_pretrained("org/model"), ["wmdp_bio"])  # doctest: +SKIP

    ```
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _only_errors():
        results = simple_evaluate(
            # A copy, since the harness may give it a padding token
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=find_tasks(tasks) if task_manager is None else task_manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return _scores(results)


def _scores(results: dict[str, Any]) -> list[HarnessScore]:
    values = results["results"]
    children = {group: set(names) for group, names in results.get("group_subtasks", {}).items()}
    # A leaf is told by its group, where that has a number
    told = {
        name
        for group, names in children.items()
        if any("," in key for key in values.get(group, {}))
        for name in names
        if not children.get(name)
    }
    scores = []
    for task, metrics in values.items():
        if task in told:
            continue
        for key, value in metrics.items():
            metric, _, reading = key.partition(",")
            if not reading or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{reading}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            scores.append(
                HarnessScore(
                    task=task,
                    metric=metric,
                    filter=reading,
                    value=float(value),
                    stderr=float(stderr) if known else None,
                    rows=metrics["sample_len"],
                    shots=_shots(results, children, task),
                    version=str(results["versions"].get(task, "none")),
                )
            )
    return scores


def _shots(results: dict[str, Any], children: dict[str, set[str]], task: str) -> int:
    """Of a group, those of the tasks below it: all were asked with as many, unless a task file sets 0."""
    if task in results["n-shot"]:
        return results["n-shot"][task]
    return max(_shots(results, children, child) for child in children[task])


@contextmanager
def _only_errors() -> "Iterator[None]":
    """The harness tells of every task, and warns that the model is loaded already."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
