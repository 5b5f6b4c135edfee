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
"""Soft prompt: free embeddings before the question, trained on the forget rows that the attacker has."""

import itertools
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from ..data import IGNORE_INDEX
from ..forward import Decoder, gather_predicting, token_log_probs
from ..metrics.inference import max_positions
from ..metrics.rows import Tokens
from .answer_batches import AnswerBatch, AnswerBatches, batch_answers, frozen
from .base import AttackData, Attacked, Trial, make_trial, tokenized


BUDGETS: dict[str, dict[str, Any]] = {
    "small": {"num_embeddings": 8, "learning_rates": [1e-3, 5e-3], "steps": [10, 30]},
    "standard": {"num_embeddings": 20, "learning_rates": [1e-3, 3e-3], "steps": [50, 100, 200]},
    "large": {"num_embeddings": 50, "learning_rates": [3e-4, 1e-3, 3e-3, 1e-2], "steps": [50, 100, 200, 500, 1000]},
}


def soft_prompt(attacked: Attacked, data: AttackData, settings: dict[str, Any], seed: int) -> list[Trial]:
    r"""
    Trains embeddings that stand before every question, after its BOS token where it has one, to raise the probability
    of the answers of T; a trial per learning rate and number of steps, scored on V and on the retain rows with the
    same embeddings.

    $$P \leftarrow P + \eta\, \bar e \cdot \operatorname{sign} \nabla_P \frac{1}{|T|}
    \sum_{(q, a) \in T} \frac{1}{|a|} \log p(a \mid P, q)$$

    \\(\bar e\\) is the mean length of the model's embeddings, so that a learning rate means the same for models whose
    embeddings differ in scale. Each step reads all of T, and the prompt begins as the embeddings of tokens that are
    drawn.

    One prompt serves all rows and is scored on others than it was trained on. It can still elicit text that the model
    never saw ([2502.15836](https://huggingface.co/papers/2502.15836)): without a control, a high score says nothing.

    Args:
        attacked ([`~hf_unlearn.attacks.base.Attacked`]): the model.
        data ([`~hf_unlearn.attacks.base.AttackData`]): trained on T; V and the retain rows are scored.
        settings (`dict[str, Any]`): `num_embeddings`; `learning_rates`, relative; `steps` after which it is scored,
            the last of them the end.
        seed (`int`): seed of the tokens that it begins with.

    Returns:
        `list[Trial]`: one for each `learning_rate` and number of `steps`.

    Raises:
        `ValueError`: a row with the prompt is longer than the model's context.

    Source: embedding-space attacks on unlearned models,
    [2402.09063](https://huggingface.co/papers/2402.09063).
    """
    count, bos = settings["num_embeddings"], attacked.tokenizer.bos_token_id
    sets = (data.train, data.held_out, data.retain)
    train, forget, retain = (_answers_with_room(dataset, attacked, data, count) for dataset in sets)
    trials = []
    with frozen(attacked.model) as decoder:
        begin, scale = _initial_prompt(decoder, count, seed)
        stops = sorted(settings["steps"])
        runs = list(itertools.product(settings["learning_rates"], range(1, stops[-1] + 1)))
        for rate, step in tqdm(runs, desc="Soft prompt"):
            if step == 1:
                prompt = begin
            prompt = prompt + rate * scale * _gradient(decoder, train, prompt, bos).sign()
            if step in stops:
                scores = [
                    answers.probabilities(lambda batch, prompt=prompt: log_probs_after(decoder, batch, prompt, bos))
                    for answers in (forget, retain)
                ]
                trials.append(make_trial({"learning_rate": rate, "steps": step, "num_embeddings": count}, *scores))
    return trials


def with_room(tokens: Tokens, count: int, bos_token_id: int | None) -> Tokens:
    """
    A sequence with room for a soft prompt, where its first token stands again and again until it is replaced.

    The first token of a sequence counts nowhere, because nothing predicts it; it still does not where the prompt now
    stands before it.

    Args:
        tokens ([`~hf_unlearn.metrics.rows.Tokens`]): the sequence.
        count (`int`): length of the prompt.
        bos_token_id (`int`, *optional*): the token that stays first.

    Example:

    ```python
    >>> from hf_unlearn.attacks.soft_prompt import with_room
    >>> from hf_unlearn.metrics.rows import Tokens
    >>> with_room(Tokens((1, 5, 6), (-100, -100, 6)), 2, bos_token_id=1)
    Tokens(input_ids=(1, 1, 1, 5, 6), labels=(-100, -100, -100, -100, 6))
    >>> with_room(Tokens((5, 6), (5, 6)), 2, bos_token_id=None)
    Tokens(input_ids=(5, 5, 5, 6), labels=(-100, -100, -100, 6))

    ```
    """
    start = int(tokens.input_ids[0] == bos_token_id)
    labels = (IGNORE_INDEX, *tokens.labels[1:])
    room = (IGNORE_INDEX,) * count
    return Tokens(
        (*tokens.input_ids[:start], *tokens.input_ids[:1] * count, *tokens.input_ids[start:]),
        (*labels[:start], *room, *labels[start:]),
    )


def _answers_with_room(dataset: Dataset, attacked: Attacked, data: AttackData, count: int) -> AnswerBatches:
    bos = attacked.tokenizer.bos_token_id
    answers = [[with_room(tokens, count, bos) for tokens in row.answer] for row in tokenized(dataset, attacked, data)]
    longest = max(len(tokens.input_ids) for answer in answers for tokens in answer)
    context = max_positions(attacked.model)
    if context is not None and longest > context:
        raise ValueError(
            f"A row with a soft prompt of {count} embeddings has {longest} positions, but the model's context is "
            f"{context}: set max_length to {context - count} or less, or take a shorter prompt."
        )
    return batch_answers(answers, attacked.model.get_input_embeddings().weight.device, data.batch_size)


def _initial_prompt(decoder: Decoder, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The embeddings of tokens drawn at random, `(count, D)` fp32, and the mean length of all embeddings."""
    embedding = decoder.model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(embedding.num_embeddings, (count,), generator=generator)
    # Through the module and not by its weight: some families scale what they look up
    every = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    lengths = torch.cat([embedding(ids).float().norm(dim=-1) for ids in every.split(8192)])
    return embedding(drawn.to(embedding.weight.device)).float(), lengths.mean()


def _gradient(decoder: Decoder, answers: AnswerBatches, prompt: Tensor, bos_token_id: int | None) -> Tensor:
    """Of the mean over rows of the log-probability per token of the answer, with respect to the prompt."""
    gradient = torch.zeros_like(prompt)
    for batch in answers.batches:
        weights = (1.0 / answers.num_labels[batch.owners] / answers.num_rows).float().to(prompt.device)
        leaf = prompt.detach().requires_grad_()
        with torch.enable_grad():
            value = (log_probs_after(decoder, batch, leaf, bos_token_id).sum(1) * weights).sum()
            gradient = gradient + torch.autograd.grad(value, leaf)[0]
    return gradient


def log_probs_after(decoder: Decoder, batch: AnswerBatch, prompt: Tensor, bos_token_id: int | None) -> Tensor:
    """
    Log-probabilities of the labelled tokens after a soft prompt, `(B, T)` fp32, zero elsewhere.

    Args:
        decoder ([`~hf_unlearn.forward.Decoder`]): the model.
        batch ([`AnswerBatch`]): sequences [`with_room`].
        prompt (`torch.Tensor` of shape `(M, D)`): embeddings, fp32.
        bos_token_id (`int`, *optional*): the token that stays first.
    """
    inputs = batch.inputs
    embeddings = decoder.model.get_input_embeddings()(inputs["input_ids"])
    # After BOS, which is told from the first token: the room repeats it. No token has the id -1.
    is_bos = inputs["input_ids"][:, :1] == (-1 if bos_token_id is None else bos_token_id)
    index = is_bos + torch.arange(len(prompt), device=is_bos.device)
    index = index.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])
    embeddings = embeddings.scatter(1, index, prompt.to(embeddings.dtype).expand(len(index), -1, -1))
    output = decoder.model.base_model(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], use_cache=False
    )
    hidden = gather_predicting(output.last_hidden_state, inputs["label_index"])
    return token_log_probs(decoder.head, hidden, inputs)
