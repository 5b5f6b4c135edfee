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
"""What commands share: reading data sets and models, and a parser that explains itself in one sentence."""

import copy
import difflib
import os
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from trl import TrlParser

from . import UsageError


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_unlearn import UnlearnConfig


@dataclass
class DataArguments:
    """
    Which data to forget and which to keep.

    Parameters:
        forget_dataset (`str`, *optional*):
            The forget set: a Hub id, a folder saved by `datasets`, or a .json, .jsonl, .csv, .parquet or .txt file
            (text: one row per paragraph). `--forget` is short for it.
        forget_config (`str`, *optional*):
            Configuration of a Hub data set, such as `forget10`.
        forget_split (`str`, *optional*, defaults to `"train"`):
            Split of the forget set.
        retain_dataset (`str`, *optional*):
            The retain set, likewise. `--retain` is short for it.
        retain_config (`str`, *optional*):
            Configuration of a Hub data set, such as `retain90`.
        retain_split (`str`, *optional*, defaults to `"train"`):
            Split of the retain set.
    """

    forget_dataset: str | None = field(
        default=None,
        metadata={
            "help": "The forget set: a Hub id, a folder saved by datasets, or a .json/.jsonl/.csv/.parquet/.txt file.",
            "aliases": ["--forget"],
        },
    )
    forget_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    forget_split: str = field(default="train", metadata={"help": "Split of the forget set."})
    retain_dataset: str | None = field(
        default=None, metadata={"help": "The retain set, likewise.", "aliases": ["--retain"]}
    )
    retain_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    retain_split: str = field(default="train", metadata={"help": "Split of the retain set."})


# What may follow a switch
_TRUTH_VALUES = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")

_ALIASES = {"forget": "forget_dataset", "retain": "retain_dataset", "holdout": "holdout_dataset"}


def read_tokenizer(name: str, revision: str | None, role: str) -> "PreTrainedTokenizerBase":
    """
    The tokenizer of a model, or of an adapter, which may leave it to its base.

    Args:
        name (`str`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        role (`str`): what the model is, for messages.

    Raises:
        `UsageError`: there is none.
    """
    from transformers import AutoTokenizer

    base = _adapter_base(name, revision)
    for source, its_revision in [(name, revision)] if base is None else [(name, revision), base]:
        try:
            return AutoTokenizer.from_pretrained(source, revision=its_revision)
        except (OSError, ValueError):
            continue
    raise UsageError(
        f"The {role} {name!r} cannot be loaded: it is neither a folder nor a model on the Hub that can be reached and "
        "has a tokenizer. Check the path or id (`hf auth login` for a private one)."
    )


def read_model(name: str, revision: str | None, args: "UnlearnConfig") -> "PreTrainedModel | PeftModel":
    """
    A model, or an adapter on its base, in evaluation mode and on the device of `args`.

    Args:
        name (`str`): Hub id or folder.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        args ([`UnlearnConfig`]): `model_init_kwargs` without a revision, and the device.

    Raises:
        `UsageError` or `ValueError`: there is no such model, or the adapter's weights are pickled.
    """
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from transformers.utils import cached_file

    from hf_unlearn.loading import load_model

    base = _adapter_base(name, revision)
    args = copy.copy(args)
    args.model_init_kwargs = {**(args.model_init_kwargs or {}), "revision": revision if base is None else base[1]}
    if base is None:
        return load_model(name, args, None).to(args.device).eval()
    try:
        cached_file(name, SAFETENSORS_WEIGHTS_NAME, revision=revision)
    except OSError as error:  # PEFT would go on to pickled weights, which run code when they are loaded
        raise UsageError(
            f"The adapter {name!r} has no {SAFETENSORS_WEIGHTS_NAME}: save it again with PEFT."
        ) from error
    try:
        model = load_model(base[0], args, None)
    except ValueError as error:
        raise UsageError(f"{name!r} is an adapter, and its base model is missing. {error}") from error
    return PeftModel.from_pretrained(model, name, revision=revision).to(args.device).eval()


def _adapter_base(name: str, revision: str | None) -> tuple[str, str | None] | None:
    """The model that an adapter belongs to, and its revision; `None` where there is no adapter."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
    except (OSError, ValueError):  # no such model, which is explained where it is loaded
        return None
    config = PeftConfig.from_pretrained(name, revision=revision)
    if config.base_model_name_or_path is None:
        raise UsageError(f"The adapter {name!r} names no base model: set base_model_name_or_path in its config.")
    return config.base_model_name_or_path, config.revision


class ArgumentParser(TrlParser):
    """
    TRL's parser (`--config recipe.yaml`, flags win) whose errors are one sentence.

    `--config=x` works, hyphens and underscores are equal in YAML too, unknown keys and flags name their neighbours,
    and a switch such as `--json` takes no positional argument for its value.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """
        The dataclasses, filled from the recipe and the flags.

        Raises:
            `UsageError`: something is unknown, missing or has no valid value.
        """
        switches = {
            option
            for action in self._actions
            if action.nargs == "?" and action.const is True
            for option in action.option_strings
        }
        expanded: list[str] = []
        for argument in argv:
            if expanded and expanded[-1] in switches and argument.lower() not in _TRUTH_VALUES:
                expanded.append("true")
            expanded.extend(argument.split("=", 1) if argument.startswith("--config=") else [argument])
        if "--config" in expanded:
            position = expanded.index("--config") + 1
            if position == len(expanded):
                raise UsageError("--config needs a file or the name of a shipped recipe: --config recipe.yaml.")
            expanded[position] = _recipe(expanded[position])
        try:
            return self.parse_args_and_config(expanded, return_remaining_strings=False)
        except yaml.MarkedYAMLError as error:
            raise UsageError(f"The recipe is not valid YAML (line {error.problem_mark.line + 1}).") from error
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        values = {_ALIASES.get(key.replace("-", "_"), key.replace("-", "_")): value for key, value in values.items()}
        known = {action.dest for action in self._actions}
        for key in values:
            if key not in known:
                raise UsageError(f"The recipe has an unknown key `{key}`.{_near(key, known)}")
        return super().set_defaults_with_config(**values)

    def error(self, message: str) -> NoReturn:
        # argparse would print hundreds of flags before the message
        if message.startswith("unrecognized arguments: "):
            self._unknown(message.removeprefix("unrecognized arguments: ").split())
        raise UsageError(f"{message}. `{self.prog} --help` lists the arguments.")

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        *filled, remaining = super().parse_args_into_dataclasses(*args, **{**kwargs, "return_remaining_strings": True})
        if remaining:
            self._unknown(remaining)
        return tuple(filled)

    def _unknown(self, arguments: list[str]) -> NoReturn:
        flags = {option.lstrip("-").replace("-", "_") for action in self._actions for option in action.option_strings}
        name = arguments[0].split("=")[0].lstrip("-").replace("-", "_")
        if name.removeprefix("no_") in flags:
            raise UsageError(f"Unknown argument `{arguments[0]}`: write `--{name.removeprefix('no_')} false`.")
        raise UsageError(f"Unknown argument `{arguments[0]}`.{_near(name, flags)}")


def _recipe(name: str) -> str:
    """Path of a recipe: a file, or one that is shipped with the package."""
    if os.path.isfile(name):
        return name
    shipped = files("hf_unlearn.recipes")
    path = shipped / f"{name}.yaml"
    if not path.is_file():
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        raise UsageError(f"The recipe {name!r} is neither a file nor one of {', '.join(names)}.")
    return str(path)


def _near(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" Near matches: {', '.join(near)}." if near else ""
