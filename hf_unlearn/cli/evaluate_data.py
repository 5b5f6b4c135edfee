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
"""What `hf-unlearn evaluate` measures on: sets from files and from the Hub, and public benchmarks as a whole."""

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_unlearn.cards.metric_table import SETS

from . import UsageError
from .evaluate_arguments import is_none


if TYPE_CHECKING:
    from datasets import Dataset

    from .evaluate_arguments import EvaluateArguments
    from .inputs import DataArguments


@dataclass
class EvaluationData:
    """
    The rows.

    Parameters:
        sets (`dict[str, Dataset]`): `forget`, `retain`, `real_authors` and `world_facts`: answers to score.
        members (`Dataset`, *optional*): rows of the forget set to compare with the holdout.
        holdout (`Dataset`, *optional*): rows of the same kind that were never trained on.
        passages (`Dataset`, *optional*): passages to recite, of MUSE.
        questions (`dict[str, Dataset]`): questions of `forget` and `retain` to answer after answered ones, of MUSE.
        demonstrations (`dict[str, Dataset]`): those answered ones.
        prompts (`dict[str, Dataset]`): `harmful` and `harmless`: what is refused.
    """

    sets: "dict[str, Dataset]"
    members: "Dataset | None" = None
    holdout: "Dataset | None" = None
    passages: "Dataset | None" = None
    questions: "dict[str, Dataset]" = field(default_factory=dict)
    demonstrations: "dict[str, Dataset]" = field(default_factory=dict)
    prompts: "dict[str, Dataset]" = field(default_factory=dict)


# TOFU's own knowledge, all of it. On the Hub, only the perturbed configurations have the paraphrases and wrong answers
# that the truth ratio needs; all retain sets share one.
TOFU = "locuslab/TOFU"
_TOFU_PERTURBED = {
    **{f"forget{share}": f"forget{share}_perturbed" for share in ("01", "05", "10")},
    **{f"retain{share}": "retain_perturbed" for share in ("99", "95", "90")},
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
_KNOWLEDGE = ("real_authors", "world_facts")


def load_data(data_args: "DataArguments", args: "EvaluateArguments") -> EvaluationData:
    """
    Loads everything that is measured on, at most `max_rows` rows of each set.

    Raises:
        `UsageError`: a set cannot be read, or is empty.
    """
    from .rows import load_rows

    if args.preset is None:
        data = _from_sources(data_args, args)
    else:
        try:
            data = _from_preset(data_args, args)
        except ValueError as error:
            raise UsageError(f"--preset {args.preset}: {error}") from error
    for name in _KNOWLEDGE:
        source = getattr(args, name)
        if is_none(source):
            data.sets.pop(name, None)
        elif source is not None:
            config = _tofu_config(name, None) if _is_tofu(source) else None
            data.sets[name] = load_rows(source, config, "train", SETS[name])
    for name in ("harmful", "harmless"):
        if getattr(args, name) is not None:
            data.prompts[name] = load_rows(getattr(args, name), None, "train", SETS[name])
    if data.holdout is None or is_none(args.holdout_dataset):
        data.members = data.holdout = None
    if args.reference_model is not None and data.holdout is None:
        raise UsageError(
            "--reference_model is compared with on the forget set and a holdout: add --holdout, rows of the same kind "
            "that MODEL was never trained on."
        )
    return data if args.max_rows is None else _cut(data, args.max_rows)


def _from_sources(data_args: "DataArguments", args: "EvaluateArguments") -> EvaluationData:
    from .rows import load_rows

    sources = {
        "forget": (data_args.forget_dataset, data_args.forget_config, data_args.forget_split),
        "retain": (data_args.retain_dataset, data_args.retain_config, data_args.retain_split),
        "holdout": (
            None if is_none(args.holdout_dataset) else args.holdout_dataset,
            args.holdout_config,
            args.holdout_split,
        ),
    }
    if _is_tofu(data_args.retain_dataset):
        sources |= {
            name: (data_args.retain_dataset, name, "train") for name in _KNOWLEDGE if getattr(args, name) is None
        }
    sets = {}
    for name, (source, config, split) in sources.items():
        if source is None:
            continue
        if _is_tofu(source):
            config = _tofu_config(name, config)
        sets[name] = load_rows(source, config, split, SETS.get(name, name).removesuffix(" set"))
    holdout = sets.pop("holdout", None)
    return EvaluationData(sets, sets["forget"], holdout)


def _from_preset(data_args: "DataArguments", args: "EvaluateArguments") -> EvaluationData:
    from hf_unlearn.presets import load_muse, load_tofu

    if args.preset == "tofu":
        sets = load_tofu(data_args.forget_config or "forget10", args.preset_source or TOFU)
        holdout = sets.pop("holdout", None)  # older copies have none
        return EvaluationData(sets, sets["forget"], holdout)
    rows = load_muse(args.preset.removeprefix("muse-"), args.preset_source)
    questions, demonstrations = (
        {name: rows[f"{name}_{kind}"] for name in ("forget", "retain")} for kind in ("questions", "demonstrations")
    )
    return EvaluationData(
        dict(questions),
        rows["forget_texts"],
        rows["holdout_texts"],
        rows["forget_passages"],
        questions,
        demonstrations,
    )


def _cut(data: EvaluationData, max_rows: int) -> EvaluationData:
    """The first rows of everything but the demonstrations, which are part of a question."""

    def first(rows: "Dataset | None") -> "Dataset | None":
        return None if rows is None else rows.select(range(min(max_rows, len(rows))))

    def each(sets: "dict[str, Dataset]") -> "dict[str, Dataset]":
        return {name: first(rows) for name, rows in sets.items()}

    return EvaluationData(
        each(data.sets),
        first(data.members),
        first(data.holdout),
        first(data.passages),
        each(data.questions),
        data.demonstrations,
        each(data.prompts),
    )


def _is_tofu(source: str | None) -> bool:
    return source is not None and source.lower() == TOFU.lower() and not os.path.exists(source)


def _tofu_config(name: str, config: str | None) -> str:
    """The configuration of TOFU that has wrong answers too."""
    if config is None:
        if name in ("forget", "holdout"):
            raise UsageError(f"{TOFU} has several {name} sets: add --{name}_config {name}01, {name}05 or {name}10.")
        config = "retain90" if name == "retain" else name
    perturbed = _TOFU_PERTURBED.get(config, config)
    if perturbed != config:
        say(f"{TOFU}: {perturbed} is read in place of {config}, which has no wrong answers to compare with.")
    return perturbed


def say(text: str) -> None:
    """On stderr, once and not once per process."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text, file=sys.stderr)
