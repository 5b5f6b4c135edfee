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
"""Reports that a command fills in: the one that is there, or a new one of a model whose making is not on record."""

import logging
import os
from typing import TYPE_CHECKING

from hf_unlearn._version import __version__
from hf_unlearn.cards.report import REPORT_NAME, Data, UnlearningReport

from . import UsageError


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_unlearn import UnlearnConfig


def earlier_report(name: str, output: str | None) -> UnlearningReport | None:
    """The report to fill in: the one in `output`, else the one that lies with the model."""
    if output is None:
        return None
    for path in (output, os.path.join(name, REPORT_NAME)):
        if os.path.isfile(path):
            try:
                return UnlearningReport.load(path)
            except ValueError as error:
                raise UsageError(f"{error}. Move it away, or name another --output.") from error
    return None


def check_same_model(report: UnlearningReport, model: "PreTrainedModel | PeftModel", output: str) -> None:
    from hf_unlearn.reference import inner_model

    architecture = type(inner_model(model)).__name__
    if report.base.architecture != architecture:
        raise UsageError(
            f"{os.path.basename(output)} is the report of a {report.base.architecture}, but MODEL is a "
            f"{architecture}: name another --output."
        )


def new_report(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    sets: dict[str, "Dataset"],
    config: "UnlearnConfig",
    revision: str | None = None,
) -> UnlearningReport:
    """The report of a model whose making is not on record; `revision` is that of the Hub that it was loaded at."""
    from accelerate import PartialState

    from hf_unlearn.data import prepare_dataset
    from hf_unlearn.recording import describe_environment, describe_model, describe_rows, hub_origin

    logging.disable(logging.WARNING)  # the evaluation says the same of these rows
    try:
        data = {
            name: describe_rows(prepare_dataset(sets[name], tokenizer, config, name))
            for name in ("forget", "retain")
            if name in sets
        }
    finally:
        logging.disable(logging.NOTSET)
    return UnlearningReport(
        tool_version=__version__,
        base=describe_model(model, hub_origin(model, revision)),
        method=None,
        data=Data(data["forget"], data.get("retain")),
        environment=describe_environment(config.device, PartialState().num_processes, train_seconds=None),
    )


def check_same_tokens(
    tokenizer: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", role: str, purpose: str
) -> None:
    """
    Refuses a second model whose tokens are others.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): that of MODEL.
        other ([`~transformers.PreTrainedTokenizerBase`]): that of the second model.
        role (`str`): what the second model is.
        purpose (`str`): what needs the same tokens, with its verb.

    Raises:
        `UsageError`: their vocabularies differ.
    """
    differing = set(tokenizer.get_vocab().items()) ^ set(other.get_vocab().items())
    if differing:
        raise UsageError(
            f"The {role} has another tokenizer than MODEL ({len(differing):,} entries of their vocabularies differ), "
            f"but {purpose} the same tokens: pass a model made from the same base."
        )
