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
"""Greedy coordinate gradient: a suffix of real tokens after the question, found by the optional package `nanogcg`."""

import contextlib
import copy
import sys
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .answer_batches import frozen
from .base import AttackData, Attacked, Trial
from .prompts import PromptTrial, QuestionReader, change_questions, question_rows, score_trials


BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"suffixes": 1, "num_steps": 4, "search_width": 32, "topk": 32},
    "standard": {"suffixes": 5, "num_steps": 250, "search_width": 512, "topk": 256},
    "large": {"suffixes": 20, "num_steps": 1000, "search_width": 512, "topk": 256},
}

# What nanogcg writes the suffix in place of, and what it begins with
_SUFFIX = "{optim_str}"
_INITIAL_SUFFIX = "x x x x x x x x x x x x x x x x x x x x"


def gcg(attacked: Attacked, data: AttackData, settings: dict[str, Any], seed: int) -> list[Trial]:
    """
    For some rows of T, finds the suffix of the question that makes its answer most likely, and puts it after the
    questions of V and of the retain rows; a trial per suffix.

    A suffix can be made to elicit text that the model never saw: it is scored on rows that it was not found on, and
    without a control, a high score says nothing.

    The search is that of `nanogcg`, with `use_prefix_cache=False`: its cache expects the tuples of older releases of
    transformers. It draws from the global generator, which is seeded for it and given back. Suffixes are printable
    ASCII without special tokens: one that ends the text would be another attack. Rows of T that do not fit into the
    model's context with a suffix are not chosen.

    Args:
        attacked ([`~hf_unlearn.attacks.base.Attacked`]): the model; of its tokenizer, a copy is used.
        data ([`~hf_unlearn.attacks.base.AttackData`]): suffixes are found on T; V and the retain rows are scored.
        settings (`dict[str, Any]`): `suffixes`, at most the number of rows of T; `num_steps`; `search_width`,
            candidates per step; `topk`, candidates per position, at most the tokens that a suffix may hold.
        seed (`int`): seed of the choice of rows and of the search.

    Returns:
        `list[Trial]`: one for each `suffix`, which is numbered and never written out.

    Raises:
        `ValueError`: `nanogcg` is not installed, the rows have no prompt, none of T fits into the context, or no
            candidate of a step is tokenized as it was written.

    Source: [2307.15043](https://huggingface.co/papers/2307.15043).
    """
    nanogcg = _nanogcg()
    train, held_out = (question_rows(dataset, attacked, data, "forget") for dataset in (data.train, data.held_out))
    retain = question_rows(data.retain, attacked, data, "retain")
    reader = QuestionReader(attacked, data)
    begun = _with_suffix(train, _INITIAL_SUFFIX, "forget")
    fitting = [index for index, row in enumerate(begun) if reader.row(row, index, "forget") is not None]
    if not fitting:
        raise ValueError(
            f"None of the {len(train)} rows that suffixes are found on fits into the model's context with a suffix: "
            "use shorter rows, or leave gcg out."
        )
    order = torch.randperm(len(fitting), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [fitting[index] for index in order[: settings["suffixes"]]]
    config = nanogcg.GCGConfig(
        num_steps=settings["num_steps"],
        optim_str_init=_INITIAL_SUFFIX,
        search_width=settings["search_width"],
        topk=min(settings["topk"], _num_allowed(nanogcg, attacked)),
        use_prefix_cache=False,
        verbosity="ERROR",  # it logs what it finds
    )
    trials = []
    for number, row in enumerate(tqdm(chosen, desc="GCG", file=sys.stderr)):
        [asked] = _with_suffix([train[row]], _SUFFIX, "forget")
        suffix = _find_suffix(nanogcg, attacked, asked, config, seed)
        forget, kept = (
            reader.rows(_with_suffix(rows, suffix, name), name)
            for name, rows in (("forget", held_out), ("retain", retain))
        )
        trial_settings = {
            "suffix": number,
            "num_steps": config.num_steps,
            "search_width": config.search_width,
            "topk": config.topk,
        }
        trials.append(PromptTrial(trial_settings, forget.answers, forget.left_out, kept.answers, kept.left_out))
    return score_trials(attacked, data, trials, "GCG")


def _nanogcg() -> ModuleType:
    try:
        import nanogcg
    except ImportError:
        raise ValueError(
            "The attack gcg needs the package nanogcg: install it with `pip install nanogcg`, or leave gcg out."
        ) from None
    return nanogcg


def _with_suffix(rows: list[dict[str, Any]], suffix: str, name: str) -> list[dict[str, Any]]:
    """Rows with a suffix after their questions."""
    return change_questions(rows, [lambda question: f"{question} {suffix}"] * len(rows), name)


def _num_allowed(nanogcg: ModuleType, attacked: Attacked) -> int:
    """
    The number of tokens that a suffix may hold.

    The search ranks the others last and does not leave them out: where it takes more of the best than are allowed, as
    all of a small vocabulary, it takes BOS and EOS as well.
    """
    others = set(nanogcg.utils.get_nonascii_toks(attacked.tokenizer).tolist())
    return attacked.model.get_input_embeddings().num_embeddings - len(others)


def _find_suffix(nanogcg: ModuleType, attacked: Attacked, row: dict[str, Any], config: Any, seed: int) -> str:
    """The suffix for a row whose question holds the place for it."""
    prompt, completion = row["prompt"], row["completion"]
    # It gives a tokenizer without a chat template one of its own
    tokenizer: PreTrainedTokenizerBase = copy.deepcopy(attacked.tokenizer)
    if isinstance(prompt, str):
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        messages, target = [{"role": "user", "content": prompt}], completion
    else:
        messages, target = prompt, completion[-1]["content"]
    with (
        frozen(attacked.model) as decoder,
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.enable_grad(),
        contextlib.redirect_stdout(sys.stderr),  # it prints when it runs out of memory and halves its batches
    ):
        torch.manual_seed(seed)
        try:
            return nanogcg.run(decoder.model, tokenizer, messages, target, config).best_string
        except RuntimeError as error:
            if "after decoding and re-encoding" not in str(error):
                raise
            raise ValueError(
                f"GCG: none of the {config.search_width} candidates of a step is tokenized as it was written: use a "
                "larger search_width, or leave gcg out."
            ) from None
