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
"""What commands share: data arguments, reading data sets, and a parser that explains itself in one sentence."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NoReturn

import yaml
from datasets import Dataset, load_dataset, load_from_disk
from trl import TrlParser

from . import UsageError


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


_ALIASES = {"forget": "forget_dataset", "retain": "retain_dataset"}

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_rows(source: str, config: str | None, split: str, name: str) -> Dataset:
    """
    Reads one data set.

    Args:
        source (`str`): Hub id, folder saved by `datasets`, or file.
        config (`str`, *optional*): configuration of a Hub data set.
        split (`str`): split.
        name (`str`): for messages.

    Raises:
        `UsageError`: there is no such data set, format or split.
    """
    extension = os.path.splitext(source)[1].lower()
    if os.path.isfile(source):
        if extension not in _FILE_FORMATS:
            raise UsageError(f"The {name} data set {source!r} is not a {', '.join(_FILE_FORMATS)} file.")
        if os.path.getsize(source) == 0:
            raise UsageError(f"The {name} data set {source!r} is empty: it needs at least one row.")
        options: dict[str, Any] = {"sample_by": "paragraph"} if extension == ".txt" else {}
        with _explained(f"The {name} data set {source!r} cannot be read as {extension}"):
            return load_dataset(_FILE_FORMATS[extension], data_files=source, split="train", **options)
    if os.path.isdir(source):
        with _explained(f"The {name} data set {source!r} is no folder saved by `Dataset.save_to_disk`"):
            dataset = load_from_disk(source)
        if isinstance(dataset, Dataset):
            return dataset
        if split not in dataset:
            raise UsageError(f"The {name} data set has no split {split!r}: choose from {', '.join(dataset)}.")
        return dataset[split]
    if extension in _FILE_FORMATS or source.startswith((".", "/", "~")):
        raise UsageError(f"The {name} data set {source!r} does not exist: check the path.")
    with _explained(f"The {name} data set {source!r} (config {config!r}, split {split!r}) cannot be loaded"):
        return load_dataset(source, config, split=split)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Says what failed, and of why only the kind: the readers' own messages may quote a row."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"{what} ({type(error).__name__}): check the path or id, the config and the split."
        ) from error


class ArgumentParser(TrlParser):
    """
    TRL's parser (`--config recipe.yaml`, flags win) whose errors are one sentence.

    `--config=x` works, hyphens and underscores are equal in YAML too, and unknown keys and flags name their
    neighbours.
    """

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def parse(self, argv: list[str]) -> tuple[Any, ...]:
        """
        The dataclasses, filled from the recipe and the flags.

        Raises:
            `UsageError`: something is unknown, missing or has no valid value.
        """
        expanded: list[str] = []
        for argument in argv:
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
