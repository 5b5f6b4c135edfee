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
See the tool work, with no network, no GPU and no data: a small model that knows invented people forgets some of them.

```bash
hf-unlearn quickstart --output_dir out/quickstart
```

The first time, two models are taught on the spot and cached: one knows all people, its twin never saw those who are to
be forgotten and shows how little is left where nothing was ever known. Then the first one forgets twice, each time
from where it started: NPO and a KL term train a LoRA, through [`UnlearnTrainer`]; and one edit of one matrix, solved
for under constraints, through [`InterventionTrainer`]. Nothing else is used than what a script would use.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from . import UsageError
from .quickstart_models import Row, Settings, find_or_make_models
from .quickstart_output import as_text, draw_figure


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

    from hf_unlearn import InterventionTrainer, UnlearnConfig, UnlearnTrainer
    from hf_unlearn.cards.report import Footprint
    from hf_unlearn.metrics import Evaluation


# A rerun may overwrite a folder that holds these.
_OUTPUTS = (
    "base/config.json",
    "model/config.json",
    "intervention/config.json",
    "data/forget.jsonl",
    "data/retain.jsonl",
    "unlearning_report.json",
)

# The answers are a few words, and a model that lost them may go on for ever.
_MAX_NEW_TOKENS = 16

_REPORT = "unlearning_report.json"

_LORA = {"r": 8, "alpha": 16, "target_modules": "all-linear"}


def unlearning_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of the unlearning run, by their names in [`UnlearnConfig`] and on the command line of `train`."""
    return {
        "forget_loss": "npo",
        # NPO's gradient fades once an answer is unlikely, and the sooner the larger beta is: at this one it comes to
        # rest about where the twin stands, at the default of 0.1 far below.
        "beta": 0.3,
        "retain_loss": "kl",
        "retain_loss_weights": 3.0,
        "learning_rate": 2e-3,
        "num_train_epochs": settings.forgetting_epochs,
        "per_device_train_batch_size": 20,
        "seed": settings.seed,
    }


def intervention_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of the edit, by their names in [`InterventionConfig`] and on the command line of `intervene`."""
    return {
        "kind": "pointwise",
        # An edit of the next layer has to be three times as large, and costs the people to keep more
        "trainable_layers": "0",
        # Brings the answers to about where the twin stands; a margin alone would leave them far above
        "probability": 0.01,
        "seed": settings.seed,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hf-unlearn quickstart",
        description="Teach a small model invented people and make it forget some of them: no network, no GPU, no "
        "data. One to three minutes the first time, less from the cache.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        metavar="DIR",
        default="out/quickstart",
        help="where models, data, report, card and figure go (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="other people (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` lists the arguments.")


def main(argv: list[str]) -> int:
    options = make_parser().parse_args(argv)
    if not 0 <= options.seed < 2**32:
        raise UsageError(f"--seed {options.seed} must be 0 to {2**32 - 1}.")
    check_output_dir(options.output_dir)
    # stdout holds the result alone
    with redirect_stdout(sys.stderr):
        settings = Settings(seed=options.seed)
        result = run(options.output_dir, settings)
    print(json.dumps(result, indent=2) if options.json else as_text(result))
    return 0


def check_output_dir(output_dir: str) -> None:
    """
    Makes the folder, unless it holds something else than an earlier quickstart.

    Raises:
        `UsageError`: naming what to do.
    """
    if os.path.exists(output_dir) and not os.path.isdir(output_dir):
        raise UsageError(f"--output_dir {output_dir!r} is a file: name a folder.")
    is_earlier = all(os.path.isfile(os.path.join(output_dir, name)) for name in _OUTPUTS)
    if os.path.isdir(output_dir) and os.listdir(output_dir) and not is_earlier:
        raise UsageError(
            f"--output_dir {output_dir!r} holds files that are not a quickstart's: name a new or an empty folder."
        )
    try:
        os.makedirs(output_dir, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir!r} cannot be made: {error.strerror}.") from error


def run(output_dir: str, settings: Settings) -> dict[str, Any]:
    """
    Teaches, forgets, measures and writes.

    Args:
        output_dir (`str`): folder, empty or from an earlier run.
        settings ([`Settings`]): seed and size.

    Returns:
        `dict`: what `--json` prints.
    """
    start = time.monotonic()
    _say("Loading the libraries ...")
    with _quiet_libraries(), _one_thread():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hf_unlearn import UnlearningReport
        from hf_unlearn.people import make_people, split_people

        rows = make_people(settings.num_people, settings.seed)
        forget, retain = split_people(rows, settings.num_forget)
        cache, is_cached = find_or_make_models(rows, settings)
        ready = time.monotonic()

        base = AutoModelForCausalLM.from_pretrained(os.path.join(cache, "base"))
        retain_only = AutoModelForCausalLM.from_pretrained(os.path.join(cache, "retain_only"))
        tokenizer = AutoTokenizer.from_pretrained(os.path.join(cache, "base"))
        weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        samples = [
            {"set": name, "question": row["question"], "answer": row["answer"]}
            for name, people in (("forget", forget), ("retain", retain))
            for row in (people[0], people[2])  # two facts of the first person
        ]
        for sample in samples:
            sample["before"] = reply(base, tokenizer, sample["question"])

        trainer = make_trainer(base, tokenizer, forget, retain, settings)
        data = (tokenizer, forget, retain, trainer.args)
        evaluations = {
            "before": measure(base, *data, "Asking it before"),
            "retain_only": measure(retain_only, *data, "Asking one never taught"),
        }
        seconds = {"after": _seconds(trainer.train)}
        evaluations["after"] = measure(trainer.model, *data, "Asking it after")

        base = AutoModelForCausalLM.from_pretrained(os.path.join(cache, "base"))
        editor = make_intervention(base, tokenizer, forget, retain, settings)
        _say(f"Forgetting the {settings.num_forget} by one edit instead ...")
        seconds["edited"] = _seconds(editor.train)
        evaluations["edited"] = measure(editor.model, *data, "Asking it after the edit")

        metrics = summarize(evaluations)
        trainer.record.evaluations = {"before": metrics["before"], "after": metrics["after"]}
        editor.record.evaluations = {"before": metrics["before"], "after": metrics["edited"]}

        # All at the end: an interrupted run leaves the folder empty, or as it was
        write_inputs(output_dir, cache, forget, retain)
        model = save(trainer, output_dir)
        editor.save_model(os.path.join(output_dir, "intervention"))
        for sample in samples:
            sample["after"] = reply(model, tokenizer, sample["question"])
            sample["edited"] = reply(editor.model, tokenizer, sample["question"])
        reports = {"after": _REPORT, "edited": os.path.join("intervention", _REPORT)}
        loaded = {name: UnlearningReport.load(os.path.join(output_dir, path)) for name, path in reports.items()}
        changes = {
            name: {**describe_change(report.footprint, weights), "seconds": seconds[name]}
            for name, report in loaded.items()
        }
        figure = draw_figure(metrics, os.path.join(output_dir, "figures", "before_after.png"))
    return {
        "output_dir": output_dir,
        "report": os.path.join(output_dir, reports["after"]),
        "intervention_report": os.path.join(output_dir, reports["edited"]),
        "figure": figure,
        "retain_only_model": os.path.join(cache, "retain_only"),
        "max_new_tokens": _MAX_NEW_TOKENS,
        "settings": asdict(settings),
        "train_arguments": {
            **unlearning_arguments(settings),
            **{f"lora_{name}": value for name, value in _LORA.items()},
        },
        "intervene_arguments": intervention_arguments(settings),
        "metrics": metrics,
        "changes": changes,
        "certificates": {certificate.name: certificate.values for certificate in loaded["edited"].certificates},
        "samples": samples,
        "from_cache": is_cached,
        "seconds": {"models": round(ready - start, 1), "total": round(time.monotonic() - start, 1)},
    }


# ---- Unlearning ----


def make_trainer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    forget: list[Row],
    retain: list[Row],
    settings: Settings,
) -> "UnlearnTrainer":
    """What a user's own script would hold."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    from hf_unlearn import UnlearnConfig, UnlearnTrainer

    data = {"forget": Dataset.from_list(forget), "retain": Dataset.from_list(retain)}
    trainer = UnlearnTrainer(
        model,
        args=UnlearnConfig(
            output_dir=tempfile.gettempdir(),  # nothing is written there
            **unlearning_arguments(settings),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            use_cache=True,  # the Trainer would write its default, False, into the released config.json
            activation_checkpointing=False,
        ),
        train_dataset=data["forget"],
        retain_dataset=data["retain"],
        processing_class=tokenizer,
        callbacks=[_progress_bar(f"Forgetting {settings.num_forget} of them")],
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=_LORA["r"], lora_alpha=_LORA["alpha"], target_modules=_LORA["target_modules"]
        ),
    )
    trainer.remove_callback(PrinterCallback)  # prints every evaluation as a dict
    return trainer


def make_intervention(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    forget: list[Row],
    retain: list[Row],
    settings: Settings,
) -> "InterventionTrainer":
    """The same for the edit."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from hf_unlearn import InterventionConfig, InterventionTrainer

    trainer = InterventionTrainer(
        model,
        args=InterventionConfig(
            output_dir=tempfile.gettempdir(),
            **intervention_arguments(settings),
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(forget),
        retain_dataset=Dataset.from_list(retain),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    forget: list[Row],
    retain: list[Row],
    args: "UnlearnConfig",
    description: str,
) -> "Evaluation":
    """A model on the people to forget and to keep, measured as TOFU does, and asked in other words."""
    from datasets import Dataset

    from hf_unlearn.metrics import evaluate_model

    sets = {"forget": Dataset.from_list(forget), "retain": Dataset.from_list(retain)}
    evaluation = evaluate_model(
        model, tokenizer, sets, args, batch_size=64, max_new_tokens=_MAX_NEW_TOKENS, description=description
    )
    reworded = {
        name: rows.select_columns(["paraphrased_question", "answer"]).rename_columns(
            {"paraphrased_question": "question"}
        )
        for name, rows in sets.items()
    }
    again = evaluate_model(
        model,
        tokenizer,
        reworded,
        args,
        batch_size=64,
        metrics=["probability"],
        generate=False,
        description=f"{description}, in other words",
    )
    for name, values in again.metrics.items():
        evaluation.metrics[name]["paraphrased_question_probability"] = values["probability"]
    return evaluation


def describe_change(footprint: "Footprint", weights: dict[str, "Tensor"]) -> dict[str, float]:
    """
    How many of a model's weights a report says have changed, and by how much; `weights` are those before, by name.

    Two footprints that hold different tensors do not compare, so the norm is set against that of all weights as well.
    """
    squares = {name: weight.double().square().sum().item() for name, weight in weights.items()}
    norm = footprint.relative_norm * sum(squares[module.name] for module in footprint.modules) ** 0.5
    return {
        "share_of_weights": footprint.changed_parameters / footprint.total_parameters,
        "norm": norm,
        "relative_norm": footprint.relative_norm,
        "relative_norm_of_model": norm / sum(squares.values()) ** 0.5,
    }


def summarize(evaluations: dict[str, "Evaluation"]) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> set -> metric -> value, with what takes two models, or several metrics."""
    from hf_unlearn.metrics import forget_quality, model_utility

    never_taught = [row["truth_ratio"] for row in evaluations["retain_only"].samples["forget"]]
    metrics = {}
    for name, evaluation in evaluations.items():
        ratios = [row["truth_ratio"] for row in evaluation.samples["forget"]]
        metrics[name] = {
            "forget": {**evaluation.metrics["forget"], "forget_quality": forget_quality(ratios, never_taught)[0]},
            "retain": {**evaluation.metrics["retain"], "model_utility": model_utility(evaluation.metrics)[0]},
        }
    return metrics


def save(trainer: "UnlearnTrainer", output_dir: str) -> "PreTrainedModel":
    """
    Writes the model, the report and the card, and returns the model.

    The adapter is merged into the weights: whoever got the adapter alone could undo it by dropping it.
    """
    from hf_unlearn.cards.card import write_model_card
    from hf_unlearn.recording import save_report

    folder = os.path.join(output_dir, "model")
    report = trainer.record.report(trainer)
    model = trainer.model.merge_and_unload()
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    save_report(report, folder)
    # Once more at the top, where people look first
    report.files = [replace(file, path=f"model/{file.path}") for file in report.files]
    report.save(os.path.join(output_dir, _REPORT))
    write_model_card(report, output_dir)
    return model


def reply(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", question: str) -> str:
    """The model's answer, the likeliest token each time."""
    inputs = tokenizer(question, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    # It goes to a terminal, and a model that lost its answers may write any byte
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in " ".join(text.split()))


# ---- Files ----


def write_inputs(output_dir: str, cache: str, forget: list[Row], retain: list[Row]) -> None:
    """The model before, and the data."""
    shutil.copytree(os.path.join(cache, "base"), os.path.join(output_dir, "base"), dirs_exist_ok=True)
    os.makedirs(os.path.join(output_dir, "data"), exist_ok=True)
    for name, rows in (("forget", forget), ("retain", retain)):
        with open(os.path.join(output_dir, "data", f"{name}.jsonl"), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _seconds(function: Callable[[], Any]) -> float:
    start = time.monotonic()
    function()
    return round(time.monotonic() - start, 1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress_bar(description: str) -> "TrainerCallback":
    """A bar with a description; the Trainer's own has none."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc=description, file=sys.stderr)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(1)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return ProgressBar()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No bars of loading, saving and tokenizing, which are over in a moment, and no advice meant for developers."""
    import datasets
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    had_dataset_bars = not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # Libraries that warn each other of names that will change
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
        if had_dataset_bars:
            datasets.enable_progress_bars()


@contextmanager
def _one_thread() -> Iterator[None]:
    """
    A model this small gains little from a second thread, and waits for it ten times over where the core is taken. The
    numbers do not depend on the machine's cores either.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
