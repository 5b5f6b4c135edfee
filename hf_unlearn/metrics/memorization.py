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
What a model can recite and what it can answer: the verbatim and the knowledge memorisation of MUSE.

Both compare greedy text to the true one by ROUGE-L, as the F1 score and without stemming.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import UnlearnConfig
from ..data import require_map_style
from ..forward import evaluation_mode
from .evaluation import Evaluation
from .inference import checked_model, generate_answers
from .statistics import bootstrap_interval


logger = get_logger(__name__)

MEMORIZATION_METRICS = ("verbatim_memorization", "knowledge_memorization")
VERBATIM, KNOWLEDGE = MEMORIZATION_METRICS

# Where a model that imitates the format goes on to a question of its own
_ENDS_OF_ANSWER = ("\n\n", "\nQuestion", "Question:")


# ---- One text ----


def rouge_l_f1(truth: str, generation: str) -> float | None:
    """
    ROUGE-L of a generated text as the F1 score, `2 P R / (P + R)`, words not stemmed.

    P and R are the length of the longest common subsequence of words over the number of generated and of true words.

    Args:
        truth (`str`): the true text.
        generation (`str`): what the model wrote.

    Returns:
        `float` or `None`: in [0, 1]; `None` where the truth has no word of a-z or 0-9, which is all that the scorer
        reads.

    Example:

    ```python
    >>> from hf_unlearn.metrics.memorization import rouge_l_f1
    >>> round(rouge_l_f1("It was a dark night", "It was night"), 6)  # 3 of 3 and 3 of 5 words
    0.75

    ```
    """
    if not DefaultTokenizer(use_stemmer=False).tokenize(truth):
        return None
    return float(RougeScorer(["rougeL"], use_stemmer=False).score(truth, generation)["rougeL"].fmeasure)


def knowledge_prompt(question: str, demonstrations: Sequence[Mapping[str, str]]) -> str:
    """
    A question after answered ones, in the format of [MUSE](https://huggingface.co/papers/2407.06460).

    Args:
        question (`str`): the question.
        demonstrations (`Sequence[Mapping[str, str]]`): answered questions, as `question` and `answer`.

    Returns:
        `str`: what the model is to continue.

    Example:

    ```python
    >>> from hf_unlearn.metrics.memorization import knowledge_prompt
    >>> knowledge_prompt("Who left?", [{"question": "Who came?", "answer": "Tom"}])
    'Question: Who came?\\nAnswer: Tom\\n\\nQuestion: Who left?\\nAnswer: '

    ```
    """
    answered = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in demonstrations)
    return f"{answered}Question: {question}\nAnswer: "


def first_answer(generation: str) -> str:
    """
    A generated text up to where it leaves the answer: an empty line or a next question.

    Args:
        generation (`str`): what the model wrote after `knowledge_prompt`.

    Returns:
        `str`: the answer.

    Example:

    ```python
    >>> from hf_unlearn.metrics.memorization import first_answer
    >>> first_answer("Tom\\n\\nQuestion: Who stayed?")
    'Tom'

    ```
    """
    for end in _ENDS_OF_ANSWER:
        generation = generation.split(end)[0]
    return generation


# ---- A model on passages and questions ----


def evaluate_memorization(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Dataset | None,
    questions: dict[str, Dataset],
    demonstrations: dict[str, Dataset],
    args: UnlearnConfig,
    *,
    batch_size: int = 16,
    max_passage_tokens: int = 128,
    max_answer_tokens: int = 32,
    description: str = "Reciting and answering",
) -> Evaluation:
    """
    Measures what a model recites and answers, as in [MUSE](https://huggingface.co/papers/2407.06460).

    * `verbatim_memorization` of `forget`: ROUGE-L of the greedy continuation of a passage's prompt, 128 tokens,
      against as many tokens of the true continuation.
    * `knowledge_memorization` of each set of questions: ROUGE-L of the greedy answer, up to 32 tokens, to a question
      that follows ten answered ones.

    ROUGE-L is the F1 score without stemming, and a metric the mean over rows. MUSE's public code computes recall too,
    but F1 is what it averages into VerbMem and KnowMem, and what open-unlearning reports for MUSE. Its numbers of
    tokens are the defaults here. One difference: its code counts the BOS token among the tokens of the true
    continuation, which is then one shorter than the generated one; here both have the same number. The true
    continuation is tokenized on its own, as there.

    Prompts are plain text, with a chat template or without. They are never cut at their end: one longer than
    `max_length` loses its beginning, which is told. Rows are dealt over the processes, and each ends with the complete
    result; order of rows, batch size and padding side change nothing.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model; its modes are given
            back as they were.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer; needs no pad token.
        passages ([`~datasets.Dataset`], *optional*): texts of the forget set, as `prompt` and `gt`, the true
            continuation; without them there is no `verbatim_memorization`.
        questions (`dict[str, Dataset]`): set -> rows of `question` and `answer`; MUSE has `forget` and `retain`.
        demonstrations (`dict[str, Dataset]`): set -> answered questions to put before each of its questions, as
            `question` and `answer`. A set that is not here is asked without any, unlike in MUSE.
        args ([`UnlearnConfig`]): `max_length`.
        batch_size (`int`, *optional*, defaults to 16): prompts in one batch.
        max_passage_tokens (`int`, *optional*, defaults to 128): tokens of a continuation.
        max_answer_tokens (`int`, *optional*, defaults to 32): tokens of an answer.
        description (`str`, *optional*): label of the progress bar.

    Returns:
        [`Evaluation`]: samples are `row` (its number in its own data set), `kind` (`"passage"` or `"question"`;
        passages come first), both metrics (`None` for the other kind, for an empty prompt, and for a truth without a
        word of a-z or 0-9) and `generation`, the text that was scored.

    Raises:
        `ValueError`: nothing to measure, or rows that cannot be read.
        [`NonFiniteLogitsError`]: weights that diverged.
    """
    if passages is None and not questions:
        raise ValueError("There is nothing to measure: pass passages, questions, or both, such as those of load_muse.")
    if unknown := [name for name in demonstrations if name not in questions]:
        raise ValueError(
            f"There are demonstrations for {', '.join(map(repr, unknown))}, but no questions: name both alike."
        )
    if min(batch_size, max_passage_tokens, max_answer_tokens) < 1:
        raise ValueError("batch_size, max_passage_tokens and max_answer_tokens must be at least 1.")

    # On every process, so that all see the same errors
    reader = _Reader(tokenizer, args.max_length)
    prompted: dict[str, list[_Prompt]] = {}
    if passages is not None:
        prompted["forget"] = reader.passages(passages, max_passage_tokens)
    for name, rows in questions.items():
        prompted.setdefault(name, []).extend(reader.questions(rows, demonstrations.get(name), name, max_answer_tokens))
    state = PartialState()
    own = {name: rows[state.process_index :: state.num_processes] for name, rows in prompted.items()}
    evaluation = Evaluation()
    with (
        evaluation_mode(model),
        tqdm(
            total=sum(bool(prompt.input_ids) for rows in own.values() for prompt in rows),
            desc=description,
            file=sys.stderr,
            disable=not state.is_main_process,
        ) as bar,
    ):
        inner = checked_model(model)
        for name, rows in own.items():
            texts = _generate(inner, tokenizer, rows, batch_size, bar.update)
            samples = [prompt.sample(next(texts) if prompt.input_ids else None) for prompt in rows]
            gathered = gather_object(samples)
            gathered.sort(key=lambda sample: (_KINDS.index(sample["kind"]), sample["row"]))
            evaluation.samples[name] = gathered
            evaluation.metrics[name], evaluation.skipped[name] = _summary(name, gathered)
    return evaluation


_KINDS = ("passage", "question")


@dataclass(frozen=True)
class _Prompt:
    """What a row is asked, and what it should say. Without tokens, it is asked nothing."""

    row: int
    kind: str
    input_ids: tuple[int, ...]
    truth: str
    max_new_tokens: int

    @property
    def metric(self) -> str:
        return VERBATIM if self.kind == "passage" else KNOWLEDGE

    def sample(self, generation: str | None) -> dict[str, Any]:
        sample = {"row": self.row, "kind": self.kind, **dict.fromkeys(MEMORIZATION_METRICS), "generation": None}
        if generation is None:
            return sample
        text = generation if self.kind == "passage" else first_answer(generation)
        return {**sample, self.metric: rouge_l_f1(self.truth, text), "generation": text}


@dataclass
class _Reader:
    """Rows to prompts."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None

    def passages(self, dataset: Dataset, max_new_tokens: int) -> list[_Prompt]:
        prompts = []
        for row, (prompt, truth) in enumerate(_texts(dataset, ("prompt", "gt"), "passages")):
            # As many tokens as the model may write
            truth_ids = self.tokenizer(truth, add_special_tokens=False)["input_ids"][:max_new_tokens]
            truth = self.tokenizer.decode(truth_ids, skip_special_tokens=True)
            prompts.append(_Prompt(row, "passage", self._tokens(prompt, prompt), truth, max_new_tokens))
        return self._told(prompts, "passages")

    def questions(
        self, dataset: Dataset, demonstrations: Dataset | None, name: str, max_new_tokens: int
    ) -> list[_Prompt]:
        columns = ("question", "answer")
        answered = [] if demonstrations is None else _texts(demonstrations, columns, f"{name} demonstrations")
        before = [dict(zip(columns, texts, strict=True)) for texts in answered]
        prompts = [
            _Prompt(row, "question", self._tokens(knowledge_prompt(question, before), question), truth, max_new_tokens)
            for row, (question, truth) in enumerate(_texts(dataset, columns, f"{name} questions"))
        ]
        return self._told(prompts, f"{name} questions")

    def _tokens(self, text: str, content: str) -> tuple[int, ...]:
        """The whole prompt's tokens; none where the row's own part of it is empty."""
        if not content.strip():
            return ()
        input_ids = self.tokenizer(text)["input_ids"]
        # Some tokenizers end every text with it
        return tuple(input_ids[:-1] if input_ids[-1] == self.tokenizer.eos_token_id else input_ids)

    def _told(self, prompts: list[_Prompt], name: str) -> list[_Prompt]:
        fitted = [replace(prompt, input_ids=self._fit(prompt.input_ids)) for prompt in prompts]
        if cut := sum(prompt != other for prompt, other in zip(prompts, fitted, strict=True)):
            logger.warning(
                f"{cut} of {len(prompts)} {name} have a prompt longer than max_length={self.max_length} and lose its "
                "beginning: use a larger max_length to compare with published numbers."
            )
        return fitted

    def _fit(self, input_ids: tuple[int, ...]) -> tuple[int, ...]:
        if self.max_length is None or len(input_ids) <= self.max_length:
            return input_ids
        bos = input_ids[:1] if input_ids[0] == self.tokenizer.bos_token_id else ()
        return bos + input_ids[len(input_ids) - self.max_length + len(bos) :]


def _texts(dataset: Dataset, columns: tuple[str, str], name: str) -> list[tuple[str, str]]:
    """Two columns of text."""
    dataset = require_map_style(dataset, f"The data set of {name}").with_format(None)
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"The data set of {name} has no column {', '.join(f'`{column}`' for column in missing)}: it needs "
            f"`{columns[0]}` and `{columns[1]}`."
        )
    rows = [(example[columns[0]], example[columns[1]]) for example in dataset]
    for row, texts in enumerate(rows):
        for column, text in zip(columns, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(
                    f"Row {row} of the data set of {name}: `{column}` holds {type(text).__name__}, expected text."
                )
    return rows


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[_Prompt], batch_size: int, progress: Any
) -> Iterator[str]:
    """The text of each row that is asked something, in order: passages come before questions."""
    for kind in _KINDS:
        asked = [prompt for prompt in rows if prompt.kind == kind and prompt.input_ids]
        if asked:
            prompts = [prompt.input_ids for prompt in asked]
            yield from generate_answers(
                model, tokenizer, prompts, batch_size, asked[0].max_new_tokens, progress=progress
            )


def _summary(name: str, samples: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """Means, and why one is missing; where it is missing in some rows only, a warning says in how many."""
    means: dict[str, float] = {"rows": len(samples)}
    skipped = {}
    for kind, metric in zip(_KINDS, MEMORIZATION_METRICS, strict=True):
        of_kind = [sample[metric] for sample in samples if sample["kind"] == kind]
        values = [value for value in of_kind if value is not None]
        if values:
            means[metric] = math.fsum(values) / len(values)
            means[f"{metric}_ci_low"], means[f"{metric}_ci_high"] = bootstrap_interval(values)
            if len(values) < len(of_kind):
                logger.warning(
                    f"{len(of_kind) - len(values)} of {len(of_kind)} {name} {kind}s have no {metric}: their prompt is "
                    "empty, or the true text has no word of a-z or 0-9."
                )
        elif of_kind:
            skipped[metric] = f"No {kind} has a prompt and a true text with a word of a-z or 0-9."
    return means, skipped
