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
"""What the commands that change a model share: how they run, what they measure, and how that is printed."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import UsageError


if TYPE_CHECKING:
    from datasets import Dataset
    from trl import ModelConfig

    from hf_unlearn.base_config import SharedConfig
    from hf_unlearn.base_trainer import ReportingTrainer


# Set for the process that `accelerate launch` starts, whose recipe may still name the configuration
LAUNCHED = "HF_UNLEARN_LAUNCHED"


@dataclass
class RunArguments:
    """
    How the command runs.

    Parameters:
        accelerate_config (`str`, *optional*):
            An accelerate configuration file, or the name of one that is shipped here (`ddp`, `fsdp2`, `zero2`,
            `zero3`, `cpu_2`) or by TRL (`multi_gpu`, ...): the command starts itself again under `accelerate launch`.
        eval_rows (`int`, *optional*, defaults to `500`):
            At most this many rows of each set are measured before and after; 0 measures nothing.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the result as JSON.
    """

    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "An accelerate configuration file, or a name: ddp, fsdp2, zero2, zero3, cpu_2, or one of TRL's."
        },
    )
    eval_rows: int = field(
        default=500,
        metadata={"help": "At most this many rows of each set are measured before and after; 0: none."},
    )
    json: bool = field(default=False, metadata={"help": "Whether to print the result as JSON."})


def launch(command: str, accelerate_config: str, argv: list[str]) -> int:
    """
    Starts a command again under `accelerate launch`.

    Args:
        command (`str`): its name.
        accelerate_config (`str`): a file, or the name of one that is shipped here or by TRL; ours come first.
        argv (`list[str]`): its arguments.

    Returns:
        `int`: exit code.

    Raises:
        `UsageError`: there is no such configuration.
    """
    from importlib.resources import files

    path = accelerate_config
    if not os.path.isfile(path):
        folders = (files("trl.accelerate_configs"), files("hf_unlearn") / "accelerate_configs")
        shipped = {
            entry.name.removesuffix(".yaml"): str(entry)
            for folder in folders
            for entry in folder.iterdir()
            if entry.name.endswith(".yaml")
        }
        if accelerate_config not in shipped:
            raise UsageError(
                f"--accelerate_config {accelerate_config!r} is neither a file nor one of {', '.join(sorted(shipped))}."
            )
        path = shipped[accelerate_config]
    words = ["-m", "accelerate.commands.launch", "--config_file", path, "-m", f"hf_unlearn.cli.{command}", *argv]
    return subprocess.run([sys.executable, *words], env={**os.environ, LAUNCHED: "1"}, check=False).returncode


def set_model_options(args: "SharedConfig", model_args: "ModelConfig") -> None:
    """TRL's flags on how a model is loaded, into `args.model_init_kwargs`, which win where they say more."""
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(args.model_init_kwargs or {}),
    }


def first_rows(sets: "dict[str, Dataset | None]", eval_rows: int) -> "dict[str, Dataset] | None":
    """At most `eval_rows` rows of each set that there is; `None` where nothing is to be measured."""
    chosen = {name: rows.select(range(min(eval_rows, len(rows)))) for name, rows in sets.items() if rows is not None}
    return chosen if eval_rows and chosen else None


def probability_lines(evaluations: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """
    How much of each set is left, as a table; no line where nothing was measured.

    Args:
        evaluations (`dict`): `before|after` -> `forget|retain` -> metric -> value.
    """
    before, after = evaluations["before"], evaluations["after"]
    if not before or not after:
        return []
    lines = [f"{'probability of the answers':<28}{'before':>9}{'after':>9}{'rows':>7}"]
    for name in ("forget", "retain"):
        if name in before and name in after:
            old, new = before[name], after[name]
            lines.append(
                f"{f'  {name} set':<28}{old['probability']:>9.3f}{new['probability']:>9.3f}{new['rows']:>7.0f}"
            )
    return [*lines, ""]


def release_lines(trainer: "ReportingTrainer") -> list[str]:
    """Where the release is, how it is loaded and verified; no line where nothing was pushed."""
    from .push import as_lines

    return [] if trainer.receipt is None else ["", as_lines(trainer.receipt)]
