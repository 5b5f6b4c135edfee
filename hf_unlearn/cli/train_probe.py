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
Train a probe that tells forget from retain rows by a model's hidden states: the first stage of PRISM.

```bash
hf-unlearn train-probe \
    --model_name_or_path open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --forget_dataset locuslab/TOFU --forget_config forget10 \
    --retain_dataset locuslab/TOFU --retain_config retain90 \
    --probe_layers 5-12 \
    --output_dir probe
```

`--config recipe.yaml` reads the same names from YAML; flags win. Exit code 1: the probe is no better than chance, and
nothing is saved.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from . import UsageError, run


if TYPE_CHECKING:
    from datasets import Dataset

    from hf_unlearn.robustness.probe import ProbeConfig, RobustProbe

    from .inputs import ArgumentParser, DataArguments


@dataclass
class ProbeArguments:
    """
    Which model is probed, and how the probe is trained.

    Parameters:
        model_name_or_path (`str`, *optional*):
            The model before unlearning: a Hub id, a folder, or the folder of an adapter.
        output_dir (`str`, *optional*):
            Folder that `probe.safetensors` is written to.
        probe_layers (`str`, *optional*):
            Candidate decoder layers, 0-based, such as `"5-20"` or `"8,12"`: the probe reads the one with the best
            held-out accuracy. All where unset.
        pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over the attended positions of a row, or the `"last"` of them.
        epsilon (`float`, *optional*, defaults to `1e-2`):
            Step of the attack, in standard deviations of the features.
        adversarial_weight (`float`, *optional*, defaults to `0.4`):
            Weight of the loss on attacked features.
        l1_weight (`float`, *optional*, defaults to `1e-4`):
            Weight of the sum of absolute values of the probe's parameters.
        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate of the probe.
        epochs (`int`, *optional*, defaults to `10`):
            Passes over the larger set; rows of the smaller one repeat.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows in one step of the probe's training.
        held_out_share (`float`, *optional*, defaults to `0.2`):
            Share of each set that is kept from training, to choose the layer and to measure accuracy.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split, the initial weights and the order of rows.
        forward_batch_size (`int`, *optional*, defaults to `8`):
            Rows in one forward pass of the model.
        max_rows (`int`, *optional*):
            At most this many rows of each set, its first ones. All where unset.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum length of a tokenized row, as in `train`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the model's weights; `"auto"` is that of the checkpoint.
        revision (`str`, *optional*):
            Branch, tag or commit of the model on the Hub.
        chat_template_path (`str`, *optional*):
            A tokenizer whose chat template is used, or a Jinja template file, as in `train`.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave accelerators alone.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the result as JSON.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before unlearning: a Hub id, a folder, or an adapter's folder."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder that probe.safetensors is written to."})
    probe_layers: str | None = field(
        default=None,
        metadata={"help": "0-based candidate decoder layers, such as '5-20' or '8,12'; the best is chosen."},
    )
    pooling: str = field(
        default="mean",
        metadata={"help": "How the positions of a row become one vector.", "choices": ["mean", "last"]},
    )
    epsilon: float = field(default=1e-2, metadata={"help": "Step of the attack, in standard deviations."})
    adversarial_weight: float = field(default=0.4, metadata={"help": "Weight of the loss on attacked features."})
    l1_weight: float = field(default=1e-4, metadata={"help": "Weight of the L1 norm of the probe's parameters."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the probe."})
    epochs: int = field(default=10, metadata={"help": "Passes over the larger set; rows of the smaller repeat."})
    batch_size: int = field(default=16, metadata={"help": "Rows in one step of the probe's training."})
    held_out_share: float = field(default=0.2, metadata={"help": "Share of each set that is kept from training."})
    seed: int = field(default=0, metadata={"help": "Seed of the split, the initial weights and the order of rows."})
    forward_batch_size: int = field(default=8, metadata={"help": "Rows in one forward pass of the model."})
    max_rows: int | None = field(default=None, metadata={"help": "At most this many rows of each set."})
    max_length: int = field(default=1024, metadata={"help": "Maximum length of a tokenized row."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the model's weights; auto: that of the checkpoint.",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A tokenizer whose chat template is used, or a Jinja template file."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    json: bool = field(default=False, metadata={"help": "Whether to print the result as JSON."})

    def __post_init__(self):
        # A YAML recipe gives a lone layer as a number, and may give several as a list
        if self.probe_layers is not None:
            layers = self.probe_layers if isinstance(self.probe_layers, list) else [self.probe_layers]
            self.probe_layers = ",".join(str(layer) for layer in layers)


def make_parser() -> "ArgumentParser":
    from .inputs import ArgumentParser, DataArguments

    return ArgumentParser((DataArguments, ProbeArguments), prog="hf-unlearn train-probe")


def main(argv: list[str]) -> int:
    data_args, args = make_parser().parse(argv)
    # Progress and logs go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        probe = make_probe(data_args, args)
        probe.save(args.output_dir)
    print(_as_json(probe, args.output_dir) if args.json else _as_table(probe, args.output_dir))
    return 0


def make_probe(data_args: "DataArguments", args: ProbeArguments) -> "RobustProbe":
    """
    The probe of a command line.

    Raises:
        `UsageError`: inputs are missing or do not fit; naming the fix.
        [`~hf_unlearn.robustness.probe_training.NearChanceError`]: the probe learned nothing.
    """
    from hf_unlearn import UnlearnConfig
    from hf_unlearn.data import prepare_dataset
    from hf_unlearn.loading import prepare_tokenizer
    from hf_unlearn.robustness.probe_training import NearChanceError, train_probe

    from .inputs import read_model, read_tokenizer

    _check_arguments(data_args, args)
    sets = _load_sets(data_args, args.max_rows)
    try:
        config = UnlearnConfig(
            args.output_dir,
            max_length=args.max_length,
            chat_template_path=args.chat_template_path,
            use_cpu=args.use_cpu,
            model_init_kwargs={"dtype": args.dtype},
        )
        tokenizer = read_tokenizer(args.model_name_or_path, args.revision, "model")
        model = read_model(args.model_name_or_path, args.revision, config)
        probe_config = _probe_config(args, model.config.get_text_config().num_hidden_layers)
        tokenizer = prepare_tokenizer(tokenizer, model, config)
        prepared = {name: prepare_dataset(rows, tokenizer, config, name) for name, rows in sets.items()}
        return train_probe(
            model,
            prepared["forget"],
            prepared["retain"],
            probe_config,
            pad_token_id=tokenizer.pad_token_id,
            batch_size=args.forward_batch_size,
        )
    except NearChanceError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_arguments(data_args: "DataArguments", args: ProbeArguments) -> None:
    """Refuses what is missing or does not apply, before anything is loaded."""
    if args.model_name_or_path is None:
        raise UsageError("--model_name_or_path is required: a Hub id or a folder.")
    if data_args.forget_dataset is None:
        raise UsageError("--forget_dataset is required: a Hub id, a folder saved by datasets, or a file.")
    if args.output_dir is None:
        raise UsageError("--output_dir is required: the folder that the probe is written to.")
    if os.path.isfile(args.output_dir):
        raise UsageError(f"--output_dir {args.output_dir!r} is a file: name a folder.")
    for name in ("forward_batch_size", "max_rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} leaves nothing to read: use at least 1.")


def _probe_config(args: ProbeArguments, num_layers: int) -> "ProbeConfig":
    from hf_unlearn.robustness.probe import ProbeConfig
    from hf_unlearn.scope import parse_layers

    layers = None
    if args.probe_layers is not None:
        layers = parse_layers(args.probe_layers, num_layers, name="probe_layers")
    return ProbeConfig(
        layers=layers,
        pooling=args.pooling,
        epsilon=args.epsilon,
        adversarial_weight=args.adversarial_weight,
        l1_weight=args.l1_weight,
        learning_rate=args.learning_rate,
        epochs=args.epochs,
        batch_size=args.batch_size,
        held_out_share=args.held_out_share,
        seed=args.seed,
    )


def _load_sets(data_args: "DataArguments", max_rows: int | None) -> "dict[str, Dataset]":
    """The rows of both sets; unpaired preferences hold both in one."""
    from hf_unlearn.data import split_by_label

    from .rows import load_rows

    forget = load_rows(data_args.forget_dataset, data_args.forget_config, data_args.forget_split, "forget")
    retain = None
    if data_args.retain_dataset is not None:
        retain = load_rows(data_args.retain_dataset, data_args.retain_config, data_args.retain_split, "retain")
    if {"completion", "label"} <= set(forget.column_names):
        if retain is not None:
            raise UsageError(
                "The forget data set has a column `label`, which splits it into rows to forget and rows to keep, and "
                "--retain_dataset is given too: remove one of them."
            )
        try:
            forget, retain = split_by_label(forget)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if retain is None:
        raise UsageError("--retain_dataset is required: the probe learns to tell the forget set from it.")
    sets = {"forget": forget, "retain": retain}
    if max_rows is None:
        return sets
    return {name: rows.select(range(min(max_rows, len(rows)))) for name, rows in sets.items()}


# ---- The result ----


def _as_json(probe: "RobustProbe", output_dir: str) -> str:
    from hf_unlearn.robustness.probe import PROBE_NAME

    return json.dumps(
        {
            "probe": os.path.join(output_dir, PROBE_NAME),
            "layer": probe.layer,
            "pooling": probe.pooling,
            "held_out_rows": probe.num_held_out,
            "layers": [asdict(score) for score in probe.scores],
        },
        indent=2,
    )


def _as_table(probe: "RobustProbe", output_dir: str) -> str:
    from hf_unlearn.robustness.probe import PROBE_NAME

    lines = [f"{'layer':<8}{'accuracy':>9}{'under attack':>14}{'loss':>8}"]
    for score in probe.scores:
        mark = " *" if score.layer == probe.layer else ""
        lines.append(
            f"{f'{score.layer}{mark}':<8}{score.accuracy:>9.3f}{score.attacked_accuracy:>14.3f}{score.loss:>8.3f}"
        )
    held_out = probe.num_held_out
    lines += [
        "",
        f"* The layer that the probe reads. Accuracy is balanced, over {held_out['forget']} forget and "
        f"{held_out['retain']} retain rows that were not trained on.",
        f"Saved in {output_dir}: {PROBE_NAME}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
