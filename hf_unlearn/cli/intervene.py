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
Change a model as little as stated constraints allow: tokens that must not come, or prompts that must be refused.

```bash
hf-unlearn intervene \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --forget_dataset locuslab/TOFU --forget_config forget01_perturbed \
    --retain_dataset locuslab/TOFU --retain_config retain90 \
    --positions key --trainable_layers 7 \
    --output_dir out

hf-unlearn intervene --model_name_or_path M --kind vocabulary_universal --forbidden_words Lily --probability 0.01 \
    --output_dir out
```

`--config recipe.yaml` reads the same names from YAML; flags win. `accelerate launch -m hf_unlearn.cli.intervene ...`
and `--accelerate_config` run it on several devices. Exit code 1: the constraints cannot be met, or do not hold on the
stored weights; nothing is saved then.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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
    from datasets import Dataset
    from trl import ModelConfig

    from hf_unlearn import InterventionConfig, InterventionTrainer

    from .inputs import ArgumentParser, DataArguments


def make_parser() -> "ArgumentParser":
    from trl import ModelConfig

    from hf_unlearn import InterventionConfig

    from .inputs import ArgumentParser, DataArguments

    return ArgumentParser((DataArguments, InterventionConfig, ModelConfig, RunArguments), prog="hf-unlearn intervene")


def main(argv: list[str]) -> int:
    data_args, args, model_args, run_args = make_parser().parse(argv)
    if run_args.accelerate_config is not None and LAUNCHED not in os.environ:
        return launch("intervene", run_args.accelerate_config, argv)

    # Progress and logs (the Trainer prints some to stdout) go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        try:
            trainer = make_trainer(data_args, args, model_args, run_args.eval_rows)
        except (ValueError, OSError, ImportError) as error:
            raise UsageError(str(error)) from error
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        seconds = _train(trainer)
        if trainer.eval_dataset is not None:
            trainer.evaluate()
        trainer.save_model()
    if trainer.is_world_process_zero():
        edit = describe_edit(trainer, seconds)
        print(_as_json(trainer, edit) if run_args.json else _as_table(trainer, edit))
    trainer.end()
    return 0


def make_trainer(
    data_args: "DataArguments", args: "InterventionConfig", model_args: "ModelConfig", eval_rows: int
) -> "InterventionTrainer":
    """
    The trainer of a command line.

    Raises:
        `UsageError` or `ValueError`: inputs are missing or do not fit; naming the fix.
    """
    from hf_unlearn import InterventionTrainer
    from hf_unlearn.data import split_by_label
    from hf_unlearn.forward import OutputHead
    from hf_unlearn.intervention_data import has_answers, read_contexts

    from .rows import load_rows

    _check(data_args, args, model_args)
    if args.contexts is not None:
        read_contexts(args.contexts)  # before minutes are spent on loading and measuring
    forget = retain = None
    if data_args.forget_dataset is not None:
        forget = load_rows(data_args.forget_dataset, data_args.forget_config, data_args.forget_split, "forget")
    if data_args.retain_dataset is not None:
        retain = load_rows(data_args.retain_dataset, data_args.retain_config, data_args.retain_split, "retain")
    if forget is not None and {"completion", "label"} <= set(forget.column_names):
        if retain is not None:
            raise UsageError(
                "The forget data set has a column `label`, which splits it into rows to forget and rows to keep, and "
                "--retain_dataset is given too: remove one of them."
            )
        forget, retain = split_by_label(forget)
    set_model_options(args, model_args)
    # Prompts alone have no answers whose probability could be measured
    measured: dict[str, Dataset | None] = {
        name: rows if rows is not None and has_answers(rows, args) else None
        for name, rows in (("forget", forget), ("retain", retain))
    }
    trainer = InterventionTrainer(
        model_args.model_name_or_path,
        args=args,
        train_dataset=forget,
        retain_dataset=retain,
        eval_dataset=first_rows(measured, eval_rows),
    )
    if args.probability is not None and OutputHead(trainer.model).softcap is not None:
        raise UsageError(
            "The model softcaps its logits, which leaves no bound of a probability: use --epsilon in place of "
            "--probability, and neither of them with --kind vocabulary_universal."
        )
    return trainer


def _check(data_args: "DataArguments", args: "InterventionConfig", model_args: "ModelConfig") -> None:
    """Refuses what is missing or does not apply, before anything is loaded."""
    from hf_unlearn.intervention_config import SOLVED_KINDS

    if model_args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is required: a Hub id or a folder.")
    if model_args.use_peft:
        raise UsageError(
            "--use_peft trains an adapter, and an intervention edits weights: leave it out, and use --store adapter "
            "to save the edit as a LoRA."
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UsageError(
            "Quantized weights cannot be edited: leave out --load_in_4bit and --load_in_8bit, edit the model as it "
            "is, and quantize what was saved."
        )
    if args.resume_from_checkpoint is not None and args.kind in SOLVED_KINDS:
        raise UsageError(
            f"--resume_from_checkpoint is for kinds that train, and --kind {args.kind} solves in one go: remove it."
        )
    if args.kind == "vocabulary_universal":
        return
    if args.forbidden_words:
        if args.contexts is None and data_args.forget_dataset is None:
            raise UsageError(
                f"--forbidden_words with --kind {args.kind} need contexts: --contexts FILE with one prompt per line, "
                "or --forget_dataset; --kind vocabulary_universal needs none."
            )
    elif data_args.forget_dataset is None:
        raise UsageError(
            "--forget_dataset is required (a Hub id, a folder saved by datasets, or a file), or --forbidden_words "
            "with --contexts."
        )


def _train(trainer: "InterventionTrainer") -> float:
    """
    Solves, or trains where the kind does; returns the seconds it took.

    Raises:
        `UsageError`: the data do not fit what is asked of them, which shows once they are read.
        Other errors: the constraints cannot be met.
    """
    from hf_unlearn.constraints.dual import InfeasibleConstraintsError
    from hf_unlearn.intervention_config import SOLVED_KINDS

    if trainer.args.kind not in SOLVED_KINDS:
        resume = trainer.args.resume_from_checkpoint
        output = trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    else:
        try:
            output = trainer.train()
        except InfeasibleConstraintsError:
            raise
        except ValueError as error:
            print(file=sys.stderr)  # a progress bar stands on the line
            raise UsageError(str(error)) from error
    return output.metrics["train_runtime"]


# ---- The result ----


def describe_edit(trainer: "InterventionTrainer", seconds: float) -> dict[str, Any]:
    """
    What was solved for and how large the edit is, without a token of it.

    Args:
        trainer ([`InterventionTrainer`]): after `train()`.
        seconds (`float`): that `train()` took.
    """
    args, edit = trainer.args, trainer.edit
    described = {"kind": args.kind, "store": args.store, "modules": trainer.module_names, "seconds": seconds}
    if edit is None:  # the kinds that train
        [region] = trainer.record.certificates
        names = ("prompts", "outside", "outside_relaxed", "norm", "relative_norm")
        return described | {"steps": trainer.state.global_step} | {name: region.values[name] for name in names}
    before = sum(weight.double().square().sum() for weight in trainer.record.originals.values()) ** 0.5
    described |= {
        "norm": edit.norm(),
        "relative_norm": edit.norm() / before.item(),
        "rank": max(edit.ranks().values()),
    }
    if edit.report is not None:
        names = ("constraints", "active", "violated", "rounds")
        described |= {name: getattr(edit.report, name) for name in names}
    return described


def _as_json(trainer: "InterventionTrainer", edit: dict[str, Any]) -> str:
    from hf_unlearn.cards.report import REPORT_NAME

    return json.dumps(
        {
            "output_dir": trainer.args.output_dir,
            "report": os.path.join(trainer.args.output_dir, REPORT_NAME),
            "edit": edit,
            "metrics": trainer.record.evaluations,
            "certificates": [asdict(certificate) for certificate in trainer.record.certificates],
            "release": None if trainer.receipt is None else trainer.receipt.to_dict(),
        },
        indent=2,
    )


# Key of `describe_edit` -> heading, format
_COLUMNS = {
    "constraints": ("constraints", "d"),
    "active": ("active", "d"),
    "violated": ("violated", "d"),
    "rounds": ("rounds", "d"),
    "prompts": ("prompts", "d"),
    "outside": ("outside", "d"),
    "outside_relaxed": ("outside if attacked", "d"),
    "steps": ("steps", "d"),
    "seconds": ("seconds", ".1f"),
    "norm": ("norm of the edit", ".3g"),
    "relative_norm": ("relative to the weights", ".3g"),
}

# Certificate, value -> what a person reads, format; each value is that at the worst place
_CERTIFIED = {
    ("listed_contexts", "highest_probability"): ("probability of forbidden tokens at the listed contexts", ".2g"),
    ("universal_ceiling", "ceiling"): ("probability of forbidden tokens after any prompt", ".2g"),
    ("hull_excess", "nats"): ("nats by which a forbidden token can lead after any prompt", ".1g"),
    ("layer_input_radius", "share_of_input_min"): (
        "share of its norm by which the edited layer's input may move",
        ".2g",
    ),
    ("head_radius", "share_of_state_min"): ("share of its norm by which the final state may move", ".2g"),
}

# Format of `cast_survival` -> heading, as wide as its numbers
_FORMATS = {
    "bfloat16": "bfloat16",
    "bfloat16_stochastic": "bfloat16 at random",
    "int8": " int8",
    "int4": " int4",
}


def _as_table(trainer: "InterventionTrainer", edit: dict[str, Any]) -> str:
    """What a person wants to know first: was it solved, how large is the change, what is left, what is certain."""
    columns = [(*_COLUMNS[key], edit[key]) for key in _COLUMNS if key in edit]
    columns = [column for column in columns if column[0] != "violated" or column[2]]  # above 0 only with slack
    lines = [
        "  ".join(heading for heading, _, _ in columns),
        "  ".join(format(value, digits).rjust(len(heading)) for heading, digits, value in columns),
        "",
        *probability_lines(trainer.record.evaluations),
    ]
    values = {certificate.name: certificate.values for certificate in trainer.record.certificates}
    lines += _certified_lines(values)
    if "resisted" in values.get("relaxed_prompts", {}):
        resisted = values["relaxed_prompts"]["resisted"]
        lines += [f"{resisted:.2f} of the constraints withstood an attack on relaxed prompts: a search, no bound", ""]
    if "storage" in values:
        lines += _storage_lines(values["storage"])
    saved = "the model with the edit"
    if trainer.args.store == "adapter":
        base = trainer.record.base.model_id
        saved = f"the edit as a LoRA for {base or 'the base, which its configuration does not name (a local folder)'}"
    lines.append(f"Saved in {trainer.args.output_dir}: {saved}, unlearning_report.json and README.md (the model card)")
    return "\n".join([*lines, *release_lines(trainer)])


def _certified_lines(values: dict[str, dict[str, Any]]) -> list[str]:
    from hf_unlearn.constraints.certify import BALL_SHARES

    share = BALL_SHARES[0]
    small_ball = ("highest_probability", f"at_{share:g}_of_state_max")
    known = _CERTIFIED | {small_ball: (f"probability of a forbidden token if the state moves by {share:g}", ".2g")}
    rows = [
        (label, format(values[name][key], digits))
        for (name, key), (label, digits) in known.items()
        if name in values and key in values[name]
    ]
    if not rows:
        return []
    lines = ["certified, at the worst place"]
    lines += [f"{f'  {label}':<64}{value:>8}" for label, value in rows]
    return [*lines, "  what each of them covers, and what not: unlearning_report.json", ""]


def _storage_lines(values: dict[str, Any]) -> list[str]:
    """What is left of the edit in formats that it may be cast to later."""
    formats = {key: heading for key, heading in _FORMATS.items() if f"{key}_kept" in values}
    lines = [f"{'if the edited weights are cast to':<36}" + "".join(f"  {heading}" for heading in formats.values())]
    for name, label, digits in (
        ("kept", "share of the edit that is kept", ".2f"),
        ("violated", "constraints broken", "d"),
    ):
        if all(f"{key}_{name}" in values for key in formats):
            cells = (f"  {values[f'{key}_{name}']:>{len(heading)}{digits}}" for key, heading in formats.items())
            lines.append(f"{f'  {label}':<36}" + "".join(cells))
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
