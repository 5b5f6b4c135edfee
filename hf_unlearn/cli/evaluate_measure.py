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
"""What `hf-unlearn evaluate` measures of MODEL: each family of metrics, merged into one result."""

from typing import TYPE_CHECKING

from .evaluate_models import Inputs, reference_means
from .evaluate_output import Result


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_unlearn.metrics import Evaluation, InsertionResult


# What is skipped for want of an argument, by the name that it has on the command line
_REASONS = {
    "membership_auc_gradient_norm": "It needs gradients: leave out --gradient_norm false.",
    "membership_auc_reference": "It needs a model that was trained on neither set: add --reference_model.",
    "privleak": (
        "It compares with a model that never saw the forget set: add --retain_only_model. PrivLeak against chance "
        "compares with 0.5."
    ),
}


def measure(model: "PreTrainedModel", given: "dict[str, Dataset]", inputs: Inputs) -> Result:
    """
    Measures one model.

    Args:
        model ([`~transformers.PreTrainedModel`]): MODEL.
        given (`dict[str, Dataset]`): the sets as they were before multiple choice became columns of options.
        inputs ([`Inputs`]): all else.

    Raises:
        `ValueError`: rows that cannot be read.
    """
    from hf_unlearn.metrics import evaluate_model, evaluate_refusals

    data, args = inputs.data, inputs.args
    # First, because they may refuse the rows
    inserted = _insertion(model, given, inputs) if args.forget_tokens and "retain" in given else None
    membership = _membership(model, inputs) if data.holdout is not None else None
    evaluation = evaluate_model(
        model,
        inputs.tokenizer,
        data.sets,
        inputs.config,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        generate=args.generate,
    )
    result = Result(args.model_stage, evaluation.metrics, evaluation.skipped, evaluation.samples)
    _add_choices(result, model, given, inputs)
    if args.generate:
        _add_fluency(result, model, evaluation, inputs)
    if data.questions:
        _add_memorization(result, model, inputs)
    if membership is not None:
        _add_membership(result, membership, inputs)
    if inserted is not None:
        numbers, reasons = inserted.metrics()
        result.insertion = inserted
        result.add("retain", numbers, reasons)
        result.samples["retain_insertion"] = inserted.samples
    if data.prompts:
        refusals = evaluate_refusals(model, inputs.tokenizer, data.prompts, inputs.config, batch_size=args.batch_size)
        for name, values in refusals.metrics.items():
            result.add(name, values, refusals.skipped[name])
            result.samples[name] = refusals.samples[name]
    return result


def _insertion(model: "PreTrainedModel", given: "dict[str, Dataset]", inputs: Inputs) -> "InsertionResult":
    from hf_unlearn.metrics import evaluate_insertion

    args = inputs.args
    return evaluate_insertion(
        model,
        inputs.tokenizer,
        given["retain"],
        inputs.config,
        forget_tokens=args.forget_tokens,
        insertion=args.insertion,
        scoring=args.insertion_scoring,
        seed=args.insertion_seed,
        batch_size=args.batch_size,
    )


def _add_choices(result: Result, model: "PreTrainedModel", given: "dict[str, Dataset]", inputs: Inputs) -> None:
    """Of the sets that have other answers to choose from."""
    from hf_unlearn.metrics import evaluate_choices
    from hf_unlearn.metrics.choices import has_choices

    sets = {name: rows for name, rows in given.items() if has_choices(set(rows.column_names))}
    for name, rows in sets.items():
        try:
            choices = evaluate_choices(
                model,
                inputs.tokenizer,
                {name: rows},
                inputs.config,
                batch_size=inputs.args.batch_size,
                description=f"Choices, {name}",
            )
        except ValueError as error:  # rows whose question and answer are not apart, which are no reason to stop
            result.skipped[name]["choice_accuracy"] = str(error)
            continue
        result.add(name, choices.metrics[name], choices.skipped[name])
        for sample, choice in zip(result.samples[name], choices.samples[name], strict=True):
            sample["choice_accuracy"], sample["choice_nlls"] = choice["choice_accuracy"], choice["nlls"]
            sample["right_choice"] = choice["right"]


def _add_fluency(result: Result, model: "PreTrainedModel", evaluation: "Evaluation", inputs: Inputs) -> None:
    """Of the forget and the retain set, over the answers that were generated already."""
    from hf_unlearn.metrics import evaluate_fluency

    from .inputs import read_model

    judge = None
    if inputs.args.judge_model is not None:
        judge = read_model(inputs.args.judge_model, None, inputs.config)
    sets = {name: inputs.data.sets[name] for name in ("forget", "retain") if name in inputs.data.sets}
    fluency = evaluate_fluency(
        model,
        inputs.tokenizer,
        sets,
        inputs.config,
        judge=judge,
        generated=evaluation.generated,
        batch_size=inputs.args.batch_size,
    )
    for name in sets:
        reasons = dict(fluency.skipped[name])
        if judge is None:
            reasons.pop("generation_perplexity", None)  # not asked for
        result.add(name, fluency.metrics[name], reasons)
        for sample, values in zip(result.samples[name], fluency.samples[name], strict=True):
            sample.update(values)


def _add_memorization(result: Result, model: "PreTrainedModel", inputs: Inputs) -> None:
    from hf_unlearn.metrics import evaluate_memorization
    from hf_unlearn.metrics.memorization import KNOWLEDGE, VERBATIM

    data, args = inputs.data, inputs.args
    if not args.generate:
        reason = "It compares generated text, and generate=False."
        for name in data.questions:
            result.skipped[name] |= {KNOWLEDGE: reason} | ({VERBATIM: reason} if name == "forget" else {})
        return
    memorization = evaluate_memorization(
        model,
        inputs.tokenizer,
        data.passages,
        data.questions,
        data.demonstrations,
        inputs.config,
        batch_size=args.batch_size,
    )
    for name, samples in memorization.samples.items():
        kinds = [sample["kind"] for sample in samples]
        counts = {f"{kind}_rows": kinds.count(kind) for kind in ("passage", "question") if kind in kinds}
        result.add(name, counts | memorization.metrics[name], memorization.skipped[name])
        result.samples[f"{name}_memorization"] = samples


def _membership(model: "PreTrainedModel", inputs: Inputs) -> "Evaluation":
    from hf_unlearn.metrics import evaluate_membership

    return evaluate_membership(
        model,
        inputs.tokenizer,
        inputs.data.members,
        inputs.data.holdout,
        inputs.config,
        reference=reference_means(inputs),
        gradient_norm=inputs.args.gradient_norm,
        batch_size=inputs.args.batch_size,
    )


def _add_membership(result: Result, membership: "Evaluation", inputs: Inputs) -> None:
    metrics, reasons = membership.metrics["forget"], membership.skipped["forget"]
    wanting = {
        "membership_auc_gradient_norm": not inputs.args.gradient_norm,
        "membership_auc_reference": inputs.args.reference_model is None,
        "privleak": True,
    }
    reasons = reasons | {
        name: _REASONS[name] for name, is_wanting in wanting.items() if is_wanting and name in reasons
    }
    result.add("forget", {"membership_rows": metrics["rows"]} | metrics, reasons)
    for name, samples in membership.samples.items():
        result.samples[f"{name}_membership"] = samples
