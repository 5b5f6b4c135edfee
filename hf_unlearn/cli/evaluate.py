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
Measure what a model still knows of one data set and what it kept of another.

```bash
hf-unlearn evaluate out \
    --forget_dataset locuslab/TOFU --forget_config forget10 \
    --retain_dataset locuslab/TOFU --retain_config retain90 \
    --retain_only_model open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90 \
    --output out/unlearning_report.json
```

`accelerate launch -m hf_unlearn.cli.evaluate ...` shares the rows among several devices.
"""

import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_unlearn.cards.card import update_model_card
from hf_unlearn.cards.metric_table import SETS
from hf_unlearn.cards.report import REPORT_NAME, UnlearningReport

from . import UsageError, run
from .evaluate_output import PRIVATE, Result, as_json, as_table, write_private
from .reports import check_same_model, check_same_tokens, earlier_report, new_report


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hf_unlearn import UnlearnConfig
    from hf_unlearn.metrics import InsertionResult

    from .inputs import ArgumentParser, DataArguments


@dataclass
class EvaluateArguments:
    """
    What is measured, and how.

    Parameters:
        retain_only_model (`str`, *optional*):
            A model that was trained like MODEL, but never on the forget set: a Hub id, a folder or an adapter folder.
            With it, forget quality is reported. It must have the same tokenizer.
        real_authors (`str`, *optional*):
            Questions about real authors, for model utility: a file, a folder saved by `datasets`, or a Hub id. Loaded
            by default where the retain set is `locuslab/TOFU`; `none` leaves it out.
        world_facts (`str`, *optional*):
            Questions about the world, likewise.
        output (`str`, *optional*):
            The report (JSON) to write, or to update where it exists. What was measured row by row goes to `private/`
            beside it.
        model_stage (`str`, *optional*, defaults to `"after"`):
            Where the report keeps the measurement: `"before"` or `"after"` unlearning.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows per forward pass and process. It changes no metric.
        max_new_tokens (`int`, *optional*, defaults to `200`):
            At most this many tokens are generated per answer.
        generate (`bool`, *optional*, defaults to `True`):
            Whether answers are generated, which takes most of the time and which ROUGE-L needs.
        max_rows (`int`, *optional*):
            At most this many rows of each set, its first ones. All where unset.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum length of a tokenized row, as in `train`.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Type of the weights; `"auto"` is that of the checkpoint.
        revision (`str`, *optional*):
            Branch, tag or commit of MODEL on the Hub.
        chat_template_path (`str`, *optional*):
            A tokenizer whose chat template is used, or a Jinja template file, as in `train`.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether to leave accelerators alone.
        json (`bool`, *optional*, defaults to `False`):
            Whether to print the result as JSON.
        forget_tokens (`list[str]`, *optional*):
            Words of the forget set, such as `SARS-CoV-2`. With them, the retain set is measured with each of them
            inserted in its queries too. They are written nowhere: results number them.
        insertion (`str`, *optional*, defaults to `"choice"`):
            Where a forget-token goes: `"choice"`, in place of an incorrect choice, as in perturbed MMLU; `"question"`,
            before the question; or `"answer_choices"`, before every choice.
        insertion_scoring (`str`, *optional*):
            Whether the letters of listed choices are compared (`"letter"`, as in MMLU) or the choices' own texts
            (`"text"`). By default `"letter"` where the retain set has `choices`, as `cais/mmlu` has, else `"text"`.
        insertion_seed (`int`, *optional*, defaults to `0`):
            Seed of the choices that are replaced.
    """

    retain_only_model: str | None = field(
        default=None,
        metadata={"help": "A model that never saw the forget set, for forget quality: a Hub id or a folder."},
    )
    real_authors: str | None = field(
        default=None,
        metadata={"help": "Questions about real authors, for model utility; none: leave out what TOFU has."},
    )
    world_facts: str | None = field(
        default=None,
        metadata={"help": "Questions about the world, for model utility; none: leave out what TOFU has."},
    )
    output: str | None = field(
        default=None,
        metadata={"help": "The report (JSON) to write or update; values per row go to private/ beside it."},
    )
    model_stage: str = field(
        default="after",
        metadata={"help": "Where the report keeps the measurement.", "choices": ["after", "before"]},
    )
    batch_size: int = field(default=16, metadata={"help": "Rows per forward pass and process."})
    max_new_tokens: int = field(default=200, metadata={"help": "At most this many tokens are generated per answer."})
    generate: bool = field(
        default=True, metadata={"help": "Whether answers are generated: most of the time, and needed by ROUGE-L."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "At most this many rows of each set."})
    max_length: int = field(default=1024, metadata={"help": "Maximum length of a tokenized row."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights; auto: that of the checkpoint.",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of MODEL on the Hub."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A tokenizer whose chat template is used, or a Jinja template file."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Whether to leave accelerators alone."})
    json: bool = field(default=False, metadata={"help": "Whether to print the result as JSON."})
    forget_tokens: list[str] | None = field(
        default=None, metadata={"help": "Words of the forget set to insert in retain queries; they are not reported."}
    )
    insertion: str = field(
        default="choice",
        metadata={
            "help": "Where a forget-token goes: for an incorrect choice, before the question, before every choice.",
            "choices": ["choice", "question", "answer_choices"],
        },
    )
    insertion_scoring: str | None = field(
        default=None,
        metadata={"help": "What is compared: letters of listed choices, or texts.", "choices": ["letter", "text"]},
    )
    insertion_seed: int = field(default=0, metadata={"help": "Seed of the choices that are replaced."})


_RETAIN_ONLY = "retain_only"  # the samples of the second model
_INSERTED = "retain_insertion"  # those of the retain rows with forget-tokens


def make_parser() -> "ArgumentParser":
    from .inputs import ArgumentParser, DataArguments

    parser = ArgumentParser(
        (DataArguments, EvaluateArguments),
        prog="hf-unlearn evaluate",
        usage="%(prog)s MODEL --forget F --retain R ...",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A folder, a Hub id, or the folder of an adapter.")
    return parser


def main(argv: list[str]) -> int:
    data_args, args, positional = make_parser().parse(argv)

    from accelerate import PartialState

    # Progress and logs go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        result = evaluate(positional.model, data_args, args)
    if PartialState().is_main_process:
        print(as_json(result) if args.json else as_table(result))
    PartialState().destroy_process_group()
    return 0


def evaluate(name: str | None, data_args: "DataArguments", args: EvaluateArguments) -> Result:
    """
    Everything that the command does but printing. Nearly all that can be refused is refused before the measurement.

    Raises:
        `UsageError`: inputs are missing or do not fit; naming the fix.
    """
    from accelerate import PartialState

    from hf_unlearn.loading import prepare_tokenizer
    from hf_unlearn.metrics import evaluate_insertion, evaluate_model
    from hf_unlearn.metrics.perturbation import with_options

    from .inputs import read_model, read_tokenizer

    _check_arguments(name, data_args, args)
    config = _config(args)
    report = earlier_report(name, args.output)
    sets = load_sets(data_args, args)
    tokenizer = read_tokenizer(name, args.revision, "model")
    if args.retain_only_model is not None:
        other = read_tokenizer(args.retain_only_model, None, "retain-only model")
        check_same_tokens(tokenizer, other, "retain-only model", "forget quality compares the probabilities of")
    try:
        retain = sets.get("retain")
        sets = {key: with_options(rows, key) for key, rows in sets.items()}
        model = read_model(name, args.revision, config)
        tokenizer = prepare_tokenizer(tokenizer, model, config)
        if report is not None:
            check_same_model(report, model, args.output)
        elif args.output is not None:
            report = new_report(model, tokenizer, sets, config)
        inserted = None
        if args.forget_tokens:  # first, because it may refuse the rows
            inserted = evaluate_insertion(
                model,
                tokenizer,
                retain,
                config,
                forget_tokens=args.forget_tokens,
                insertion=args.insertion,
                scoring=args.insertion_scoring,
                seed=args.insertion_seed,
                batch_size=args.batch_size,
            )
        evaluation = evaluate_model(
            model,
            tokenizer,
            sets,
            config,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            generate=args.generate,
        )
        result = Result(args.model_stage, evaluation.metrics, evaluation.skipped, evaluation.samples)
        if inserted is not None:
            _add_insertion(result, inserted)
        del model  # room for the other one
        if args.retain_only_model is not None:
            _add_forget_quality(result, sets["forget"], tokenizer, config, args)
    except ValueError as error:
        raise UsageError(str(error)) from error
    _add_model_utility(result)
    if args.output is not None:
        result.report = args.output
        if PartialState().is_main_process:
            _save(result, report)
    return result


def _check_arguments(name: str | None, data_args: "DataArguments", args: EvaluateArguments) -> None:
    if name is None:
        raise UsageError(
            "MODEL is required, a folder, a Hub id or the folder of an adapter: hf-unlearn evaluate MODEL."
        )
    if data_args.forget_dataset is None:
        raise UsageError("--forget_dataset is required: a Hub id, a folder saved by datasets, or a file.")
    for option in ("batch_size", "max_new_tokens", "max_rows"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option} {value} measures nothing: use at least 1.")
    if args.forget_tokens and data_args.retain_dataset is None:
        raise UsageError("--forget_tokens are inserted in retain queries: add --retain_dataset.")
    if args.output is not None and os.path.isdir(args.output):
        raise UsageError(
            f"--output {args.output!r} is a folder: name a file, such as {os.path.join(args.output, REPORT_NAME)}."
        )


def _config(args: EvaluateArguments) -> "UnlearnConfig":
    """How rows become tokens and models are loaded: as in training."""
    from hf_unlearn import UnlearnConfig

    try:
        return UnlearnConfig(
            "evaluation",  # nothing is written there
            max_length=args.max_length,
            chat_template_path=args.chat_template_path,
            use_cpu=args.use_cpu,
            model_init_kwargs={"dtype": args.dtype},
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


# ---- Data ----

# TOFU's own knowledge, all of it. On the Hub, only the perturbed configurations have the paraphrases and wrong answers
# that the truth ratio needs; all retain sets share one.
TOFU = "locuslab/TOFU"
_TOFU_PERTURBED = {
    **{f"forget{share}": f"forget{share}_perturbed" for share in ("01", "05", "10")},
    **{f"retain{share}": "retain_perturbed" for share in ("99", "95", "90")},
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


def load_sets(data_args: "DataArguments", args: EvaluateArguments) -> dict[str, "Dataset"]:
    """
    The rows of every set, under the names `forget`, `retain`, `real_authors` and `world_facts`.

    Raises:
        `UsageError`: a set cannot be read, or is empty.
    """
    from .inputs import load_rows

    sources = {
        "forget": (data_args.forget_dataset, data_args.forget_config, data_args.forget_split),
        "retain": (data_args.retain_dataset, data_args.retain_config, data_args.retain_split),
        "real_authors": (args.real_authors, None, "train"),
        "world_facts": (args.world_facts, None, "train"),
    }
    if _is_tofu(data_args.retain_dataset):
        for name in ("real_authors", "world_facts"):
            if sources[name][0] is None:
                sources[name] = (data_args.retain_dataset, name, "train")
    sets = {}
    for name, (source, config, split) in sources.items():
        if source is None or (name in ("real_authors", "world_facts") and source.lower() == "none"):
            continue
        if _is_tofu(source):
            config = _tofu_config(name, config)
        words = SETS[name].removesuffix(" set")
        rows = load_rows(source, config, split, words)
        sets[name] = rows if args.max_rows is None else rows.select(range(min(args.max_rows, len(rows))))
    return sets


def _is_tofu(source: str | None) -> bool:
    return source is not None and source.lower() == TOFU.lower() and not os.path.exists(source)


def _tofu_config(name: str, config: str | None) -> str:
    """The configuration of TOFU that has wrong answers too."""
    if config is None:
        if name == "forget":
            raise UsageError(f"{TOFU} has several forget sets: add --forget_config forget01, forget05 or forget10.")
        config = "retain90" if name == "retain" else name
    perturbed = _TOFU_PERTURBED.get(config, config)
    if perturbed != config:
        _say(f"{TOFU}: {perturbed} is read in place of {config}, which has no wrong answers to compare with.")
    return perturbed


# ---- Forget quality and model utility ----


def _add_forget_quality(
    result: Result,
    forget: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    config: "UnlearnConfig",
    args: EvaluateArguments,
) -> None:
    """Measures the retain-only model's truth ratios on the forget set, and compares."""
    from hf_unlearn.metrics import evaluate_model, forget_quality

    from .inputs import read_model

    if "truth_ratio" not in result.metrics["forget"]:
        result.skipped["forget"]["forget_quality"] = (
            "It compares the truth ratios of the forget set, which are missing; the retain-only model was not run."
        )
        return
    other = evaluate_model(
        read_model(args.retain_only_model, None, config),
        tokenizer,  # the tokens are the same, and so are then the prompts
        {"forget": forget},
        config,
        batch_size=args.batch_size,
        metrics=["truth_ratio"],
        generate=False,
        description="Evaluating the retain-only model",
    )
    result.samples[_RETAIN_ONLY] = other.samples["forget"]
    p_value, statistic = forget_quality(
        *([row["truth_ratio"] for row in rows] for rows in (result.samples["forget"], other.samples["forget"]))
    )
    result.metrics["forget"] |= {"forget_quality": p_value, "forget_quality_statistic": statistic}


def _add_model_utility(result: Result) -> None:
    from hf_unlearn.metrics import model_utility

    if "retain" not in result.metrics:
        return
    try:
        utility, result.utility_parts = model_utility(result.metrics)
    except ValueError as error:
        result.skipped["retain"]["model_utility"] = str(error)
    else:
        result.metrics["retain"]["model_utility"] = utility


def _add_insertion(result: Result, inserted: "InsertionResult") -> None:
    numbers, reasons = inserted.metrics()
    result.insertion = inserted
    result.metrics["retain"] |= numbers
    result.skipped["retain"] |= reasons
    result.samples[_INSERTED] = inserted.samples


# ---- The report, the card and the values per row ----


def _save(result: Result, report: UnlearningReport) -> None:
    """Writes the report, the card if there is one, and the values per row."""
    stage = getattr(report.metrics, result.stage)
    if set(result.metrics) != {"forget"}:
        # Model utility is over the sets measured together: none may stay from another time
        for name in set(SETS) - {"forget"}:
            stage.pop(name, None)
    stage.update(result.metrics)
    folder, name = os.path.split(result.report)
    if folder:
        os.makedirs(folder, exist_ok=True)
    report.save(result.report)
    if name == REPORT_NAME and update_model_card(report, folder):
        _say("The model card beside the report was rendered anew.")
    save_samples(result, os.path.join(folder, PRIVATE))


def save_samples(result: Result, folder: str) -> None:
    """
    Writes one JSON line per row. They hold generated answers to the forget set: only the owner can read them, and git
    ignores them.

    Args:
        result ([`Result`]): what was measured.
        folder (`str`): a folder for nothing else.
    """
    for name, rows in result.samples.items():
        write_private(folder, f"{result.stage}_{name}.jsonl", rows)


def _say(text: str) -> None:
    """On stderr, once and not once per process."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
