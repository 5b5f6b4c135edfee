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
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING

from . import UsageError, run
from .running import (
    LAUNCHED,
    RunArguments,
    first_rows,
    launch,
    probability_lines,
    release_lines,
    set_model_options,
)


if TYPE_CHECKING:
    from peft import PeftConfig
    from trl import ModelConfig

    from hf_unlearn import UnlearnConfig, UnlearnTrainer

    from .inputs import ArgumentParser, DataArguments


def make_parser() -> "ArgumentParser":
    from trl import ModelConfig

    from hf_unlearn import UnlearnConfig

    from .inputs import ArgumentParser, DataArguments

    return ArgumentParser((DataArguments, UnlearnConfig, ModelConfig, RunArguments), prog="hf-unlearn train")


def main(argv: list[str]) -> int:
    data_args, args, model_args, run_args = make_parser().parse(argv)
    if run_args.accelerate_config is not None and LAUNCHED not in os.environ:
        return launch("train", run_args.accelerate_config, argv)

    # Progress and logs (the Trainer prints some to stdout) go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        try:
            trainer = make_trainer(data_args, args, model_args, run_args.eval_rows)
        except (ValueError, OSError, ImportError) as error:
            raise UsageError(str(error)) from error
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            args.eval_on_start = bool(run_args.eval_rows)  # they prepare the model when training starts
        elif run_args.eval_rows:
            trainer.evaluate()
        resume = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
        if run_args.eval_rows:
            trainer.evaluate()
        trainer.save_model()
    if trainer.is_world_process_zero():
        print(_as_json(trainer) if run_args.json else _as_table(trainer))
        _say_if_little_changed(trainer)
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

    from .rows import load_rows

    if model_args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is required: a Hub id or a folder.")
    if data_args.forget_dataset is None:
        raise UsageError("--forget_dataset is required: a Hub id, a folder saved by datasets, or a file.")
    forget = load_rows(data_args.forget_dataset, data_args.forget_config, data_args.forget_split, "forget")
    retain = None
    if data_args.retain_dataset is not None:
        retain = load_rows(data_args.retain_dataset, data_args.retain_config, data_args.retain_split, "retain")
    eval_dataset = None
    if "label" not in forget.column_names:
        eval_dataset = first_rows({"forget": forget, "retain": retain}, eval_rows)
    set_model_options(args, model_args)
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
    if isinstance(model_args.lora_target_modules, str) and model_args.lora_target_modules != "all-linear":
        # TRL takes a lone name out of its list, and PEFT takes a text for an expression that the whole path matches
        model_args.lora_target_modules = [model_args.lora_target_modules]
    peft_config = get_peft_config(model_args)
    if args.trainable_layers is not None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
        peft_config.layers_to_transform = parse_layers(
            args.trainable_layers, config.get_text_config().num_hidden_layers
        )
    args.trainable_layers = args.trainable_modules = None
    return peft_config


def _as_json(trainer: "UnlearnTrainer") -> str:
    from hf_unlearn.cards.report import REPORT_NAME

    return json.dumps(
        {
            "output_dir": trainer.args.output_dir,
            "report": os.path.join(trainer.args.output_dir, REPORT_NAME),
            "steps": trainer.state.global_step,
            "metrics": trainer.record.evaluations,
            "release": None if trainer.receipt is None else trainer.receipt.to_dict(),
        },
        indent=2,
    )


def _as_table(trainer: "UnlearnTrainer") -> str:
    """What a person wants to know first: how much of each set is left."""
    from hf_unlearn.engines import count_elements

    lines = probability_lines(trainer.record.evaluations)
    trained = sum(count_elements(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad)
    lines.append(f"{trainer.state.global_step} steps, {trained:,} trained parameters")
    lines.append(
        f"Saved in {trainer.args.output_dir}: the model, unlearning_report.json and README.md (the model card)"
    )
    return "\n".join([*lines, *release_lines(trainer)])


def _say_if_little_changed(trainer: "UnlearnTrainer") -> None:
    """What to raise where the forget set is as likely as before, since the defaults suit large models."""
    before, after = (trainer.record.evaluations[stage].get("forget") for stage in ("before", "after"))
    if before is not None and after is not None and after["probability"] > 0.98 * before["probability"]:
        print(
            f"Hardly anything was forgotten in {trainer.state.global_step} steps at --learning_rate "
            f"{trainer.args.learning_rate:g}: raise it (2e-4 is usual for a LoRA), or --num_train_epochs.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
