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
Make a model forget one data set and keep another.

```bash
hf-unlearn train \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --forget_dataset locuslab/TOFU --forget_config forget10 \
    --retain_dataset locuslab/TOFU --retain_config retain90 \
    --forget_loss npo --retain_loss kl --learning_rate 2e-4 \
    --use_peft --lora_target_modules all-linear \
    --output_dir out
```

`--config recipe.yaml` reads the same names from YAML; flags win. `accelerate launch -m hf_unlearn.cli.train ...` and
`--accelerate_config` run it on several devices.
"""

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import UsageError, run


if TYPE_CHECKING:
    from peft import PeftConfig
    from trl import ModelConfig

    from hf_unlearn import UnlearnConfig, UnlearnTrainer

    from .inputs import ArgumentParser, DataArguments


@dataclass
class RunArguments:
    """
    How the command runs.

    Parameters:
        accelerate_config (`str`, *optional*):
            An accelerate configuration file, or the name of one that TRL ships (`multi_gpu`, `fsdp2`, `zero2`, ...):
            the command starts itself again under `accelerate launch`.
        eval_rows (`int`, *optional*, defaults to `500`):
            At most this many rows of each set are measured before and after; 0 measures nothing.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the result as JSON.
    """

    accelerate_config: str | None = field(
        default=None, metadata={"help": "An accelerate configuration file, or the name of one that TRL ships."}
    )
    eval_rows: int = field(
        default=500,
        metadata={"help": "At most this many rows of each set are measured before and after; 0: none."},
    )
    json: bool = field(default=False, metadata={"help": "Whether to print the result as JSON."})


# Set for the process that `accelerate launch` starts, whose recipe may still name the configuration
_LAUNCHED = "HF_UNLEARN_LAUNCHED"


def make_parser() -> "ArgumentParser":
    from trl import ModelConfig

    from hf_unlearn import UnlearnConfig

    from .inputs import ArgumentParser, DataArguments

    return ArgumentParser((DataArguments, UnlearnConfig, ModelConfig, RunArguments), prog="hf-unlearn train")


def main(argv: list[str]) -> int:
    data_args, args, model_args, run_args = make_parser().parse(argv)
    if run_args.accelerate_config is not None and _LAUNCHED not in os.environ:
        return _launch(run_args.accelerate_config, argv)

    # Progress and logs (the Trainer prints some to stdout) go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        try:
            trainer = make_trainer(data_args, args, model_args, run_args.eval_rows)
        except (ValueError, OSError, ImportError) as error:
            raise UsageError(str(error)) from error
        if run_args.eval_rows:
            trainer.evaluate()
        resume = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
        if run_args.eval_rows:
            trainer.evaluate()
        trainer.save_model()
    if trainer.is_world_process_zero():
        print(_as_json(trainer) if run_args.json else _as_table(trainer))
    trainer.end()
    return 0


def make_trainer(
    data_args: "DataArguments", args: "UnlearnConfig", model_args: "ModelConfig", eval_rows: int
) -> "UnlearnTrainer":
    """
    The trainer of a command line.

    Raises:
        `UsageError` or `ValueError`: inputs are missing or do not fit; naming the fix.
    """
    from trl import get_quantization_config

    from hf_unlearn import UnlearnTrainer

    from .inputs import load_rows

    if model_args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is required: a Hub id or a folder.")
    if data_args.forget_dataset is None:
        raise UsageError("--forget_dataset is required: a Hub id, a folder saved by datasets, or a file.")
    forget = load_rows(data_args.forget_dataset, data_args.forget_config, data_args.forget_split, "forget")
    retain = None
    if data_args.retain_dataset is not None:
        retain = load_rows(data_args.retain_dataset, data_args.retain_config, data_args.retain_split, "retain")
    eval_dataset = None
    if eval_rows and "label" not in forget.column_names:
        sets = {"forget": forget, "retain": retain}
        eval_dataset = {
            name: rows.select(range(min(eval_rows, len(rows)))) for name, rows in sets.items() if rows is not None
        }
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    return UnlearnTrainer(
        model_args.model_name_or_path,
        args=args,
        train_dataset=forget,
        retain_dataset=retain,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=_peft_config(args, model_args),
    )


def _peft_config(args: "UnlearnConfig", model_args: "ModelConfig") -> "PeftConfig | None":
    """TRL's LoRA flags; `--trainable_layers` and `--trainable_modules` choose where the adapter goes."""
    from transformers import AutoConfig
    from trl import get_peft_config

    from hf_unlearn.scope import parse_layers

    if not model_args.use_peft:
        return None
    if args.trainable_modules is not None:
        if model_args.lora_target_modules is not None:
            raise UsageError("--trainable_modules and --lora_target_modules say the same of a LoRA: give one of them.")
        model_args.lora_target_modules = args.trainable_modules
    peft_config = get_peft_config(model_args)
    if args.trainable_layers is not None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
        peft_config.layers_to_transform = parse_layers(
            args.trainable_layers, config.get_text_config().num_hidden_layers
        )
    args.trainable_layers = args.trainable_modules = None
    return peft_config


def _launch(accelerate_config: str, argv: list[str]) -> int:
    """Starts the same command under `accelerate launch`."""
    from importlib.resources import files

    path = accelerate_config
    if not os.path.isfile(path):
        shipped = files("trl.accelerate_configs")
        path = str(shipped / f"{accelerate_config}.yaml")
        if not os.path.isfile(path):
            names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if ".yaml" in entry.name)
            raise UsageError(
                f"--accelerate_config {accelerate_config!r} is neither a file nor one of {', '.join(names)}."
            )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, "-m", "hf_unlearn.cli.train"]
    return subprocess.run([*command, *argv], env={**os.environ, _LAUNCHED: "1"}, check=False).returncode


def _as_json(trainer: "UnlearnTrainer") -> str:
    from hf_unlearn.cards.report import REPORT_NAME

    return json.dumps(
        {
            "output_dir": trainer.args.output_dir,
            "report": os.path.join(trainer.args.output_dir, REPORT_NAME),
            "steps": trainer.state.global_step,
            "metrics": trainer.record.evaluations,
        },
        indent=2,
    )


def _as_table(trainer: "UnlearnTrainer") -> str:
    """What a person wants to know first: how much of each set is left."""
    before, after = trainer.record.evaluations["before"], trainer.record.evaluations["after"]
    lines = []
    if before and after:
        lines.append(f"{'probability of the answers':<28}{'before':>9}{'after':>9}{'rows':>7}")
        for name in ("forget", "retain"):
            if name in before and name in after:
                old, new = before[name], after[name]
                lines.append(
                    f"{f'  {name} set':<28}{old['probability']:>9.3f}{new['probability']:>9.3f}{new['rows']:>7.0f}"
                )
        lines.append("")
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    lines.append(f"{trainer.state.global_step} steps, {trained:,} trained parameters")
    lines.append(
        f"Saved in {trainer.args.output_dir}: the model, unlearning_report.json and README.md (the model card)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
