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
"""Running a model without gradients: the scores of given answers, and answers of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..forward import (
    LOGITS_BUDGET,
    Decoder,
    OutputHead,
    check_output_head,
    gather_predicting,
)
from ..pairing import DataCollatorForUnlearning
from ..reference import inner_model
from .rows import Tokens


@dataclass
class TokenScores:
    """
    What the model says about the tokens of one answer, on the CPU.

    Attributes:
        log_probs (`torch.Tensor` of shape `(n,)`, float64): log-probabilities, in nats.
        is_argmax (`torch.Tensor` of shape `(n,)`, bool): whether the token has the highest logit.
        means (`torch.Tensor` of shape `(n,)`, float64, *optional*): mean of the log-probabilities of all tokens under
            the model's own distribution (the negative entropy).
        stds (`torch.Tensor` of shape `(n,)`, float64, *optional*): their standard deviation.
    """

    log_probs: Tensor
    is_argmax: Tensor
    means: Tensor | None = None
    stds: Tensor | None = None


@dataclass(frozen=True)
class GeneratedTokens:
    """
    One answer as the model wrote it: its text, tokenized again, may be other tokens.

    Attributes:
        token_ids (`tuple[int, ...]`): token ids up to the EOS token, without it; may be empty.
        eos_token_id (`int`, *optional*): the EOS token that ended the answer; `None` where its length did.
    """

    token_ids: tuple[int, ...]
    eos_token_id: int | None


def checked_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """
    The causal language model inside, its adapter layers in place. Call it in [`evaluation_mode`].

    Raises:
        `ValueError`: the adapter adds tokens, which the model inside does not see, or the architecture's logits are
            not what hf-unlearn computes.
        [`NonFiniteLogitsError`]: its logits are NaN or infinite.
    """
    if isinstance(model, PeftModel):
        adapter = model.active_peft_config
        if adapter.is_prompt_learning or adapter.is_adaption_prompt:
            raise ValueError(
                f"{adapter.peft_type.value} adds tokens and not weights, which is not supported: use LoRA."
            )
    inner = inner_model(model)
    input_ids = torch.tensor([[0, 1]], device=inner.get_input_embeddings().weight.device)
    _require_finite(inner(input_ids=input_ids, use_cache=False).logits)  # before two NaNs are found to be unequal
    check_output_head(inner)
    return inner


class NonFiniteLogitsError(RuntimeError):
    """The model's logits are NaN or infinite: there is nothing to measure."""


def _require_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise NonFiniteLogitsError(
            "The model's logits are not finite, its weights may have diverged: evaluate an earlier checkpoint, or "
            "train with a smaller learning rate."
        )


def score_answers(
    model: PreTrainedModel,
    answers: Sequence[Sequence[Tokens]],
    batch_size: int,
    moments: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> list[TokenScores]:
    """
    Scores answers. Sequences that occur several times run once, batches hold sequences of similar length, and logits
    exist for the answers' tokens only, in chunks.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.
        answers (`Sequence[Sequence[Tokens]]`): answers after their prompts, each of one or more sequences.
        batch_size (`int`): sequences in one forward.
        moments (`bool`, *optional*, defaults to `False`): whether `means` and `stds` are wanted.
        progress (`Callable[[int], None]`, *optional*): told how many answers are done.

    Returns:
        `list[TokenScores]`: one for each answer, in order.
    """
    uses: dict[Tokens, int] = {}
    for answer in answers:
        for tokens in answer:
            uses[tokens] = uses.get(tokens, 0) + 1
    # The longest first: what does not fit into memory fails at once
    order = sorted(uses, key=lambda tokens: len(tokens.input_ids), reverse=True)
    decoder = Decoder(model)
    device = model.get_input_embeddings().weight.device
    collate = DataCollatorForUnlearning(pad_token_id=0)
    scores: dict[Tokens, Tensor] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = collate([{"input_ids": tokens.input_ids, "labels": tokens.labels} for tokens in chunk])
        batch = {key: value.to(device) for key, value in batch.items()}
        last = decoder.run(batch, [], last_hidden_state=True).last_hidden_state
        hidden = gather_predicting(last, batch["label_index"])
        labels = batch["labels"].flatten().index_select(0, batch["label_index"])
        values = _label_scores(decoder.head, hidden, labels, moments).cpu().double()
        _require_finite(values)
        for tokens, columns in zip(chunk, values.split([tokens.num_labels for tokens in chunk], dim=1), strict=True):
            scores[tokens] = columns
        progress(sum(uses[tokens] for tokens in chunk))
    empty = torch.empty(4 if moments else 2, 0, dtype=torch.float64)
    return [_token_scores(torch.cat([empty, *(scores[tokens] for tokens in answer)], dim=1)) for answer in answers]


def _label_scores(head: OutputHead, hidden: Tensor, labels: Tensor, moments: bool) -> Tensor:
    """`(N, D)` hidden states and the labels they predict to `(2, N)`, or with moments `(4, N)`, fp32."""
    pieces = []
    size = max(1, LOGITS_BUDGET // head.module.weight.shape[0])
    for rows, targets in zip(hidden.split(size), labels.split(size), strict=True):
        logits = head(rows)
        log_probs = logits.log_softmax(-1)
        columns = [log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), (logits.argmax(-1) == targets).float()]
        if moments:
            probs = log_probs.exp()
            mean = (probs * log_probs).sum(-1, keepdim=True)
            # Around the mean: the difference of two large moments would lose a small deviation
            deviation = (probs * (log_probs - mean).square()).sum(-1).sqrt()
            columns += [mean.squeeze(-1), deviation]
        pieces.append(torch.stack(columns))
    return torch.cat(pieces, dim=1)


def _token_scores(columns: Tensor) -> TokenScores:
    log_probs, is_argmax, *moments = columns
    return TokenScores(log_probs, is_argmax.bool(), *moments)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """
    The texts of the model's greedy answers, as [`generate_tokens`] finds them.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`Sequence[Sequence[int]]`): token ids, at least one each.
        batch_size (`int`): prompts in one batch.
        max_new_tokens (`int`): the longest answer, in tokens.
        progress (`Callable[[int], None]`, *optional*): told how many prompts are done.

    Returns:
        `list[str]`: the text of each answer up to its EOS token, without special tokens.
    """
    generated = generate_tokens(model, tokenizer, prompts, batch_size, max_new_tokens, progress)
    return [tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in generated]


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda count: None,
) -> list[GeneratedTokens]:
    """
    The model's greedy answers, in tokens.

    Prompts are padded on the left, whatever side the tokenizer pads, and the attention mask comes from their lengths.
    Whatever the model's own generation settings say besides its EOS tokens (sampling, penalties) is set aside.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`Sequence[Sequence[int]]`): token ids, at least one each.
        batch_size (`int`): prompts in one batch.
        max_new_tokens (`int`): the longest answer, in tokens.
        progress (`Callable[[int], None]`, *optional*): told how many prompts are done.

    Returns:
        `list[GeneratedTokens]`: one for each prompt, in order.
    """
    eos = eos_token_ids(model, tokenizer)
    answers: dict[int, GeneratedTokens] = {}
    for batch in generate_batches(model, tokenizer, prompts, batch_size, max_new_tokens, do_sample=False):
        for row, tokens in batch.items():
            end = next((position for position, token in enumerate(tokens) if token in eos), len(tokens))
            answers[row] = GeneratedTokens(tuple(tokens[:end]), tokens[end] if end < len(tokens) else None)
        progress(len(batch))
    return [answers[row] for row in range(len(prompts))]


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    **decoding: Any,
) -> Iterator[dict[int, list[int]]]:
    """
    What a model writes after prompts, padded on the left, a batch of similar lengths at a time.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model; with PEFT, the model inside.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`Sequence[Sequence[int]]`): token ids, at least one each.
        batch_size (`int`): prompts in one batch.
        max_new_tokens (`int`): the longest answer, in tokens.
        decoding (`Any`): further settings of [`~transformers.GenerationConfig`]. Of the model's own, none counts but
            its EOS tokens.

    Yields:
        `dict[int, list[int]]`: the number of each prompt and the tokens after it; EOS tokens and padding are not cut.
    """
    eos = eos_token_ids(model, tokenizer)
    pad_token_id = next(iter(eos), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = model.get_input_embeddings().weight.device
    for rows, new_tokens in _generation_batches(prompts, batch_size, max_new_tokens, max_positions(model)):
        width = max(len(prompts[row]) for row in rows)
        input_ids = torch.tensor([[pad_token_id] * (width - len(prompts[row])) + [*prompts[row]] for row in rows])
        lengths = torch.tensor([len(prompts[row]) for row in rows])
        attention_mask = (torch.arange(width) >= width - lengths.unsqueeze(1)).long()
        settings = GenerationConfig(
            **decoding,
            num_beams=1,
            max_new_tokens=new_tokens,
            use_cache=True,
            eos_token_id=eos or None,
            pad_token_id=pad_token_id,
        )
        with _generation_config(model, settings):
            output = model.generate(input_ids.to(device), attention_mask=attention_mask.to(device))
        yield dict(zip(rows, output[:, width:].tolist(), strict=True))


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's, which ends texts, and the model's, which may also hold the one that ends a turn of a chat."""
    of_model = model.generation_config.eos_token_id
    of_model = [of_model] if isinstance(of_model, int) else of_model or []
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*of_tokenizer, *of_model]))


def max_positions(model: PreTrainedModel) -> int | None:
    """Where absolute positions end. Most models have such a limit in their configuration, some have none."""
    config = model.config.get_text_config()
    return config.to_dict().get(config.attribute_map.get("max_position_embeddings", "max_position_embeddings"))


def _generation_batches(
    prompts: Sequence[Sequence[int]], batch_size: int, max_new_tokens: int, context: int | None
) -> Iterator[tuple[list[int], int]]:
    """
    Rows of similar length, and the number of tokens that they may get. A prompt that leaves less room than
    `max_new_tokens` runs alone, so that no row's answer depends on its neighbours' lengths.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    room = {row: max_new_tokens if context is None else context - len(prompts[row]) for row in order}
    for row in order:
        if room[row] < max_new_tokens:
            yield [row], max(1, room[row])
    others = [row for row in order if room[row] >= max_new_tokens]
    for start in range(0, len(others), batch_size):
        yield others[start : start + batch_size], max_new_tokens


@contextmanager
def _generation_config(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """`generate` fills what its argument leaves unset from the model's own settings: those are replaced instead."""
    original = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = original
