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
"""The arguments of `hf-unlearn evaluate`, and what can be refused before anything is loaded."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_unlearn.cards.report import REPORT_NAME
from hf_unlearn.lm_eval import PERTURBED_TASKS

from . import UsageError
from .evaluate_output import PRIVATE


if TYPE_CHECKING:
    from .inputs import DataArguments


PRESET_NAMES = ["tofu", "muse-news", "muse-books"]


@dataclass
class EvaluateArguments:
    """
    What is measured, and how.

    Parameters:
        preset (`str`, *optional*):
            A public benchmark whose sets are all loaded: `tofu`, `muse-news` or `muse-books`. `--forget_config`
            chooses TOFU's share, `forget10` by default.
        preset_source (`str`, *optional*):
            Where the preset is loaded from: a Hub id, or a folder of the same layout; by default its own repository.
        holdout_dataset (`str`, *optional*):
            Rows like those of the forget set that MODEL was never trained on, for membership: a file, a folder saved
            by `datasets`, or a Hub id. `--holdout` is short for it; `none` leaves out that of a preset.
        holdout_config (`str`, *optional*):
            Configuration of a Hub data set, such as `holdout10`.
        holdout_split (`str`, *optional*, defaults to `"train"`):
            Split of the holdout.
        harmful (`str`, *optional*):
            Prompts that should be refused, a file: the share that is.
        harmless (`str`, *optional*):
            Prompts that should be answered, a file: the share that is refused.
        retain_only_model (`str`, *optional*):
            A model that was trained like MODEL, but never on the forget set: a Hub id, a folder or an adapter folder.
            With it, forget quality is reported, and with a holdout PrivLeak. Second models must have the same
            tokenizer.
        reference_model (`str`, *optional*):
            A model that was trained on neither the forget set nor the holdout, such as the one before any training on
            them: a membership score against it.
        judge_model (`str`, *optional*):
            A model that reads what MODEL wrote, usually the one before unlearning: whether it is gibberish.
        gradient_norm (`bool`, *optional*, defaults to `True`):
            Whether membership is inferred from gradients, too: a forward and a backward for each row, and a copy of
            the weights.
        cache_dir (`str`, *optional*):
            A folder that keeps the scores of the retain-only and the reference model, by the weights, rows, settings
            and code that they depend on, so that they run once for many MODELs. It holds numbers per row, which only
            their owner can read. By default `private/cache` beside the output; nothing is kept without either.
        real_authors (`str`, *optional*):
            Questions about real authors, for model utility: a file, a folder saved by `datasets`, or a Hub id. Loaded
            by default where the retain set is TOFU's; `none` leaves it out.
        world_facts (`str`, *optional*):
            Questions about the world, likewise.
        output (`str`, *optional*):
            The report (JSON) to write, or to update where it exists. What was measured row by row goes to `private/`
            beside it.
        model_stage (`str`, *optional*, defaults to `"after"`):
            Where the report keeps the measurement: `"before"` or `"after"` unlearning.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward pass and process. It changes no metric.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            At most this many tokens are generated per answer.
        generate (`bool`, *optional*, defaults to `True`):
            Whether answers are generated, which takes most of the time and which ROUGE-L, fluency and MUSE's
            memorisation need.
        max_rows (`int`, *optional*):
            At most this many rows of each set, its first ones. All where unset.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum length of a tokenized row, as in `train`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the weights; `"auto"` is that of the checkpoint.
        revision (`str`, *optional*):
            Branch, tag or commit of MODEL on the Hub.
        chat_template_path (`str`, *optional*):
            A tokenizer whose chat template is used, or a Jinja template file, as in `train`.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave accelerators alone.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the result as JSON.
        forget_tokens (`list[str]`, *optional*):
            Words of the forget set, such as `SARS-CoV-2`. With them, the retain set is measured with each of them
            inserted in its queries too. They are written nowhere: results number them.
        insertion (`str`, *optional*, defaults to `"choice"`):
            Where a forget-token goes: `"choice"`, in place of an incorrect choice, as in perturbed MMLU; `"question"`,
            before the question; or `"answer_choices"`, before every choice.
        insertion_scoring (`str`, *optional*):
            Whether the letters of listed choices are compared (`"letter"`, as in MMLU) or the choices' own texts
            (`"text"`). By default `"letter"` where the retain set has `choices`, as `cais/mmlu` has, else `"text"`.
        insertion_seed (`int`, *optional*, defaults to `0`):
            Seed of the choices that are replaced.
        lm_eval (`str`, *optional*):
            Tasks and groups of lm-evaluation-harness, with commas between them: `wmdp,mmlu`. Alone, or with the sets
            above. `perturbed_mmlu` and `perturbed_mmlu_question` are MMLU with a forget-token (`SARS-CoV-2`, or the
            one of `forget_tokens`) in place of an incorrect choice, or before the question.
        lm_eval_num_fewshot (`int`, *optional*, defaults to `0`):
            Answered examples before each question of the harness.
        lm_eval_limit (`int`, *optional*):
            At most this many questions of each of its tasks.
        lm_eval_include_path (`str`, *optional*):
            A folder of further task files. They may name Python functions, which are run: use what you trust.
        lm_eval_seed (`int`, *optional*, defaults to `0`):
            Seed of the harness.
    """

    preset: str | None = field(
        default=None,
        metadata={"help": "A public benchmark whose sets are all loaded.", "choices": PRESET_NAMES},
    )
    preset_source: str | None = field(
        default=None, metadata={"help": "Where the preset is loaded from: a Hub id, or a folder of the same layout."}
    )
    holdout_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Rows like the forget set's that MODEL never saw, for membership; none: leave out the preset's.",
            "aliases": ["--holdout"],
        },
    )
    holdout_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    holdout_split: str = field(default="train", metadata={"help": "Split of the holdout."})
    harmful: str | None = field(default=None, metadata={"help": "Prompts that should be refused: a file."})
    harmless: str | None = field(default=None, metadata={"help": "Prompts that should be answered: a file."})
    retain_only_model: str | None = field(
        default=None,
        metadata={
            "help": "A model that never saw the forget set, for forget quality and PrivLeak: an id or a folder."
        },
    )
    reference_model: str | None = field(
        default=None, metadata={"help": "A model that saw neither the forget set nor the holdout, for membership."}
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "A model that reads what MODEL wrote, usually the one before unlearning."}
    )
    gradient_norm: bool = field(
        default=True, metadata={"help": "Whether membership is inferred from gradients, too: a copy of the weights."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Keeps what second models gave, so that they run once; private/cache beside the output."},
    )
    real_authors: str | None = field(
        default=None,
        metadata={"help": "Questions about real authors, for model utility; none: leave out what TOFU has."},
    )
    world_facts: str | None = field(
        default=None,
        metadata={"help": "Questions about the world, for model utility; none: leave out what TOFU has."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "The report (JSON) to write or update; values per row go to private/ beside it."},
    )
    model_stage: str = field(
        default="after",
        metadata={"help": "Where the report keeps the measurement.", "choices": ["after", "before"]},
    )
    batch_size: int = field(default=16, metadata={"help": "Rows per forward pass and process."})
    max_new_tokens: int = field(default=200, metadata={"help": "At most this many tokens are generated per answer."})
    generate: bool = field(
        default=True, metadata={"help": "Whether answers are generated, for ROUGE-L, fluency and memorisation."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "At most this many rows of each set."})
    max_length: int = field(default=1024, metadata={"help": "Maximum length of a tokenized row."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights; auto: that of the checkpoint.",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of MODEL on the Hub."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A tokenizer whose chat template is used, or a Jinja template file."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    json: bool = field(default=False, metadata={"help": "Whether to print the result as JSON."})
    forget_tokens: list[str] | None = field(
        default=None, metadata={"help": "Words of the forget set to insert in retain queries; they are not reported."}
    )
    insertion: str = field(
        default="choice",
        metadata={
            "help": "Where a forget-token goes: for an incorrect choice, before the question, before every choice.",
            "choices": ["choice", "question", "answer_choices"],
        },
    )
    insertion_scoring: str | None = field(
        default=None,
        metadata={"help": "What is compared: letters of listed choices, or texts.", "choices": ["letter", "text"]},
    )
    insertion_seed: int = field(default=0, metadata={"help": "Seed of the choices that are replaced."})
    lm_eval: str | None = field(
        default=None, metadata={"help": "Tasks of lm-evaluation-harness, such as wmdp,mmlu,perturbed_mmlu."}
    )
    lm_eval_num_fewshot: int = field(
        default=0, metadata={"help": "Answered examples before each question of the harness."}
    )
    lm_eval_limit: int | None = field(
        default=None, metadata={"help": "At most this many questions of each task of the harness."}
    )
    lm_eval_include_path: str | None = field(
        default=None, metadata={"help": "A folder of further task files, whose Python functions are run."}
    )
    lm_eval_seed: int = field(default=0, metadata={"help": "Seed of the harness."})

    @property
    def lm_eval_tasks(self) -> list[str]:
        """The names in `lm_eval`."""
        return [name.strip() for name in (self.lm_eval or "").split(",") if name.strip()]


def check_arguments(name: str | None, data_args: "DataArguments", args: EvaluateArguments) -> None:
    """
    Refuses what does not fit together.

    Raises:
        `UsageError`: naming the fix.
    """
    if name is None:
        raise UsageError(
            "MODEL is required, a folder, a Hub id or the folder of an adapter: hf-unlearn evaluate MODEL."
        )
    if args.preset is not None:
        _check_preset(data_args, args)
    elif args.preset_source is not None:
        raise UsageError(f"--preset_source is where a preset is loaded from: add --preset {PRESET_NAMES[0]}.")
    elif data_args.forget_dataset is None and not is_harness_alone(data_args, args):
        raise UsageError(
            "--forget_dataset is required: a Hub id, a folder saved by datasets, or a file (or --preset: "
            f"{', '.join(PRESET_NAMES)})."
        )
    for option in ("batch_size", "max_new_tokens", "max_rows", "lm_eval_limit"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option} {value} measures nothing: use at least 1.")
    if args.lm_eval is not None:
        check_harness_arguments(args)
    perturbed = bool(set(args.lm_eval_tasks) & set(PERTURBED_TASKS))
    if args.forget_tokens and data_args.retain_dataset is None and args.preset is None and not perturbed:
        raise UsageError("--forget_tokens are inserted in retain queries: add --retain_dataset.")
    for option in ("judge_model", "harmful", "harmless"):
        if getattr(args, option) is not None and not args.generate:
            raise UsageError(f"--{option} needs answers that MODEL generates: leave out --generate false.")
    if args.output is not None and os.path.isdir(args.output):
        raise UsageError(
            f"--output {args.output!r} is a folder: name a file, such as {os.path.join(args.output, REPORT_NAME)}."
        )
    if args.cache_dir is not None and os.path.exists(args.cache_dir) and not os.path.isdir(args.cache_dir):
        raise UsageError(f"--cache_dir {args.cache_dir!r} is a file: name a folder.")


_ON_SETS = (
    *("holdout_dataset", "harmful", "harmless", "retain_only_model", "reference_model", "judge_model"),
    *("real_authors", "world_facts"),
)


def is_harness_alone(data_args: "DataArguments", args: EvaluateArguments) -> bool:
    """Whether nothing but tasks of lm-evaluation-harness is asked for."""
    sets = (
        data_args.forget_dataset,
        data_args.retain_dataset,
        args.preset,
        *(getattr(args, name) for name in _ON_SETS),
    )
    return args.lm_eval is not None and all(value is None for value in sets)


def check_harness_arguments(args: EvaluateArguments) -> None:
    """
    Refuses what the harness could not run.

    Raises:
        `UsageError`: naming the fix.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UsageError('--lm_eval needs lm-evaluation-harness: pip install "hf-unlearn[lm-eval]".')
    if not args.lm_eval_tasks:
        raise UsageError("--lm_eval names no task: --lm_eval wmdp,mmlu.")
    if args.lm_eval_num_fewshot < 0:
        raise UsageError(f"--lm_eval_num_fewshot {args.lm_eval_num_fewshot}: use 0 or more.")
    if args.lm_eval_include_path is not None and not os.path.isdir(args.lm_eval_include_path):
        raise UsageError(f"--lm_eval_include_path {args.lm_eval_include_path!r} is no folder of task files.")
    if set(args.lm_eval_tasks) & set(PERTURBED_TASKS) and len(args.forget_tokens or []) > 1:
        raise UsageError("The perturbed tasks of --lm_eval take one forget-token: name one in --forget_tokens.")


def _check_preset(data_args: "DataArguments", args: EvaluateArguments) -> None:
    given = {
        "forget_dataset": data_args.forget_dataset,
        "retain_dataset": data_args.retain_dataset,
        "retain_config": data_args.retain_config,
        "holdout_dataset": None if is_none(args.holdout_dataset) else args.holdout_dataset,
        "holdout_config": args.holdout_config,
    }
    if own := [option for option, value in given.items() if value is not None]:
        raise UsageError(f"--preset {args.preset} brings its own sets: leave out --{' and --'.join(own)}.")
    if data_args.forget_config is not None and args.preset != "tofu":
        raise UsageError(
            f"--forget_config chooses the share of TOFU, and {args.preset} has one forget set: leave it out."
        )


def is_none(source: str | None) -> bool:
    """Whether a set is left out in so many words."""
    return source is not None and source.lower() == "none"


def cache_folder(args: EvaluateArguments) -> str | None:
    """Where the scores of second models are kept; `None`: nowhere."""
    if args.cache_dir is not None or args.output is None:
        return args.cache_dir
    return os.path.join(os.path.dirname(args.output), PRIVATE, "cache")
