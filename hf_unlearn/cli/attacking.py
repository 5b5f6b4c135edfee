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
"""What the commands that attack share: their inputs, the battery, and where its results go."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_unlearn.cards.card import update_model_card
from hf_unlearn.cards.report import REPORT_NAME, UnlearningReport

from . import UsageError
from .evaluate_output import PRIVATE, write_private
from .reports import check_same_tokens


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_unlearn import UnlearnConfig
    from hf_unlearn.attacks.base import Trial
    from hf_unlearn.cards.report import AttackResult
    from hf_unlearn.metrics.cache import ScoreCache

    from .inputs import DataArguments


BUDGETS = ("small", "standard", "large")


@dataclass
class SharedArguments:
    """
    The models to compare, and how they are read.

    Parameters:
        original (`str`, *optional*):
            The model before unlearning: a Hub id or a folder.
        control (`str`, *optional*):
            A model that never saw the forget set, trained like the original otherwise.
        attacks (`list[str]`, *optional*):
            Names of attacks, separated by commas or spaces; all of them where unset.
        max_rows (`int`, *optional*, defaults to `80`):
            At most this many rows of each set, its first ones.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward pass.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum length of a tokenized row, as in `train`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the weights; `"auto"` is that of the checkpoint.
        chat_template_path (`str`, *optional*):
            A tokenizer whose chat template is used, or a Jinja template file, as in `train`.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave accelerators alone.
        cache_dir (`str`, *optional*):
            A folder that keeps what the attacks gave, by the weights, rows, settings and code that it depends on: an
            original and a control that several models are compared with are attacked once. It holds numbers per row,
            which only their owner can read.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the result as JSON.
    """

    original: str | None = field(default=None, metadata={"help": "The model before unlearning: a Hub id or a folder."})
    control: str | None = field(
        default=None, metadata={"help": "A model that never saw the forget set, trained like the original otherwise."}
    )
    attacks: list[str] | None = field(
        default=None, metadata={"help": "Names of attacks, separated by commas or spaces; all where unset."}
    )
    max_rows: int = field(default=80, metadata={"help": "At most this many rows of each set."})
    batch_size: int = field(default=16, metadata={"help": "Rows per forward pass."})
    max_length: int = field(default=1024, metadata={"help": "Maximum length of a tokenized row."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights; auto: that of the checkpoint.",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A tokenizer whose chat template is used, or a Jinja template file."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    cache_dir: str | None = field(
        default=None, metadata={"help": "Keeps what attacks gave, so that an original and a control run once."}
    )
    json: bool = field(default=False, metadata={"help": "Whether to print the result as JSON."})


@dataclass(frozen=True)
class Inputs:
    """The models (`unlearned`, `original` and, where given, `control`), their tokenizer and the rows."""

    models: "dict[str, PreTrainedModel]"
    tokenizer: "PreTrainedTokenizerBase"
    forget: "Dataset"
    retain: "Dataset"
    config: "UnlearnConfig"


def check_arguments(command: str, name: str | None, data_args: "DataArguments", args: SharedArguments) -> list[str]:
    """
    The attacks to run.

    Raises:
        `UsageError`: something is missing or unknown.
    """
    from hf_unlearn.attacks.table import ATTACKS

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as launchers set it, before anything is initialised
        raise UsageError(
            f"`hf-unlearn {command}` runs in one process: start it without `accelerate launch`, or run one command "
            "per device with other --attacks."
        )
    if name is None:
        raise UsageError(
            f"MODEL is required, a folder, a Hub id or the folder of an adapter: hf-unlearn {command} MODEL."
        )
    if args.original is None:
        raise UsageError("--original is required, the model before unlearning: what can be recovered is what it knew.")
    for words, value, why in (
        ("forget_dataset", data_args.forget_dataset, "what is attacked"),
        ("retain_dataset", data_args.retain_dataset, "the utility under attack"),
    ):
        if value is None:
            raise UsageError(f"--{words} is required ({why}): a Hub id, a folder saved by datasets, or a file.")
    for words, value in (("batch_size", args.batch_size), ("max_rows", args.max_rows)):
        if value < 1:
            raise UsageError(f"--{words} {value} measures nothing: use at least 1.")
    names = [word for text in args.attacks or ATTACKS for word in text.split(",") if word]
    if unknown := [word for word in names if word not in ATTACKS]:
        raise UsageError(f"--attacks: {', '.join(unknown)} is unknown; choose from {', '.join(ATTACKS)}.")
    return list(dict.fromkeys(names))


def read_inputs(name: str, data_args: "DataArguments", args: SharedArguments) -> Inputs:
    """
    Reads the rows, then the tokenizers, then the models: what is cheap to refuse is refused first.

    Raises:
        `UsageError`: something cannot be read, or two models have other tokens.
    """
    from hf_unlearn import UnlearnConfig
    from hf_unlearn.loading import prepare_tokenizer

    from .inputs import read_model, read_tokenizer
    from .rows import load_rows

    try:
        # How rows become tokens and models are loaded: as in training
        config = UnlearnConfig(
            "attack",  # nothing is written there
            max_length=args.max_length,
            chat_template_path=args.chat_template_path,
            use_cpu=args.use_cpu,
            model_init_kwargs={"dtype": args.dtype},
        )
        sets = {
            role: load_rows(source, set_config, split, role)
            for role, source, set_config, split in (
                ("forget", data_args.forget_dataset, data_args.forget_config, data_args.forget_split),
                ("retain", data_args.retain_dataset, data_args.retain_config, data_args.retain_split),
            )
        }
        sets = {role: rows.select(range(min(args.max_rows, len(rows)))) for role, rows in sets.items()}
        tokenizer = read_tokenizer(name, None, "model")
        for role, other in (("original", args.original), ("control", args.control)):
            if other is not None:
                check_same_tokens(tokenizer, read_tokenizer(other, None, role), role, "an attack asks all models for")
        models = {
            role: read_model(path, None, config)
            for role, path in (("unlearned", name), ("original", args.original), ("control", args.control))
            if path is not None
        }
        tokenizer = prepare_tokenizer(tokenizer, models["unlearned"], config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Inputs(models, tokenizer, sets["forget"], sets["retain"], config)


@dataclass(frozen=True)
class Battery:
    """Which attacks run, how hard and how often."""

    attacks: list[str]
    budgets: list[str]
    seeds: list[int]

    def runs(self) -> list[tuple[str, str, int]]:
        """Each attack, budget and seed; that which needs the adapter first, since for all others it is merged."""
        return [
            (name, budget, seed)
            for name in sorted(self.attacks, key=lambda word: word != "adapter_removal")
            for budget in self.budgets
            for seed in self.seeds
        ]


def run_battery(
    battery: Battery,
    inputs: Inputs,
    args: SharedArguments,
    scores: "ScoreCache",
    report: UnlearningReport | None,
    output: str | None,
) -> "Iterator[AttackResult]":
    """Runs the attacks one by one; what is done stands in the report before the next one begins."""
    from peft import PeftModel

    from hf_unlearn.attacks.base import AttackData, Attacked
    from hf_unlearn.attacks.data import split_rows
    from hf_unlearn.attacks.run import TrialCache, run_attack
    from hf_unlearn.attacks.table import ATTACKS

    caches = {}
    for seed in battery.seeds:
        train, held_out = split_rows(inputs.forget, seed)
        data = AttackData(train, held_out, inputs.retain, inputs.config, args.batch_size)
        caches[seed] = TrialCache(data, inputs.tokenizer, scores)
    unlearned, original = inputs.models["unlearned"], merged(inputs.models["original"])
    control = inputs.models.get("control")
    control = None if control is None else Attacked(merged(control), inputs.tokenizer, original)
    for name, budget, seed in battery.runs():
        if name != "adapter_removal" and isinstance(unlearned, PeftModel):
            unlearned = merged(unlearned)
        print(f"Attack: {name}, {budget}, seed {seed}", file=sys.stderr)
        attacked, cache = Attacked(unlearned, inputs.tokenizer, original), caches[seed]
        result, trials = run_attack(name, ATTACKS[name], budget, attacked, control, cache.data, seed, cache)
        if report is not None:
            add_result(report, result)
            _save(report, output, f"attack_{name}_{budget}_seed{seed}.jsonl", trials)
        yield result


def needy_attacks(names: list[str]) -> list[str]:
    """Those that say nothing without a control."""
    from hf_unlearn.attacks.table import ATTACKS

    return [name for name in names if ATTACKS[name].needs_control]


def merged(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model with its adapters in its weights."""
    from peft import PeftModel

    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def add_result(report: UnlearningReport, result: "AttackResult") -> None:
    """Puts a result into a report, in the place of one of the same attack, budget and seed."""

    def kind(entry: "AttackResult") -> tuple[str, object, int]:
        return entry.name, entry.budget.get("budget"), entry.seed

    report.attacks = [entry for entry in report.attacks if kind(entry) != kind(result)] + [result]


def _save(report: UnlearningReport, output: str, name: str, trials: dict[str, list["Trial"]]) -> None:
    """Writes the report, the card beside it, and the scores of each row, which only their owner can read."""
    save_report_and_card(report, output)
    rows = [
        {"model": role, **trial.settings, "score": trial.score, "utility": trial.utility, "rows": trial.rows}
        for role, own in trials.items()
        for trial in own
    ]
    write_private(os.path.join(os.path.dirname(output), PRIVATE), name, rows)


def save_report_and_card(report: UnlearningReport, output: str) -> None:
    """Writes the report, and renders the card beside it anew where there is one of ours."""
    folder, file_name = os.path.split(output)
    if folder:
        os.makedirs(folder, exist_ok=True)
    report.save(output)
    if file_name == REPORT_NAME:
        update_model_card(report, folder)
