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
"""Forget rows paired with retain rows: the data set, the sampler that decides who meets whom, and the collator."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers.data.data_collator import DataCollatorMixin

from .data import IGNORE_INDEX
from .row_cache import row_key


class PairedDataset(torch.utils.data.Dataset):
    """
    Pairs of a forget row and a retain row, addressed by `(forget_index, retain_index)`.

    Its length is the number of forget rows: the forget set anchors the epoch.

    Args:
        forget ([`~datasets.Dataset`]): prepared forget rows.
        retain ([`~datasets.Dataset`], *optional*): prepared retain rows.
    """

    def __init__(self, forget: Dataset, retain: Dataset | None):
        self.forget = forget
        self.retain = retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, pair: tuple[int, int | None]) -> dict[str, dict[str, Any]]:
        return self.__getitems__([pair])[0]

    def __getitems__(self, pairs: list[tuple[int, int | None]]) -> list[dict[str, dict[str, Any]]]:
        forget = self.forget.__getitems__([forget_index for forget_index, _ in pairs])
        if self.retain is None:
            return [{"forget": row} for row in forget]
        retain = self.retain.__getitems__([retain_index for _, retain_index in pairs])
        return [{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)]


class PairingSampler(Sampler):
    """
    Draws pairs of row indices as a function of (seed, epoch) alone, so that any number of processes, accumulation and
    resuming see the same pairs in the same order.

    * Each epoch visits every forget row once, shuffled.
    * Retain rows are dealt from one endless stream of shuffles and continue where the last epoch stopped: no retain
      row comes twice before all have come once.
    * With topics, every optimizer step holds one topic, and topics alternate from step to step, as published for RMU.
      A topic is filled up with some of its own rows to whole steps, and ends early when it runs out.

    It is a sampler and not a data set with `set_epoch`, because accelerate calls the latter on one process only.

    Args:
        num_forget (`int`): number of forget rows.
        num_retain (`int`): number of retain rows; 0 without a retain set.
        seed (`int`): seed.
        shuffle (`bool`, *optional*, defaults to `True`): shuffle forget and retain rows.
        forget_topics (`list[int]`, *optional*): topic of each forget row.
        retain_topics (`list[int]`, *optional*): topic of each retain row; then pairs share their topic.
        step_size (`int`, *optional*): rows in one optimizer step, over all processes and micro-batches; with topics.
    """

    def __init__(
        self,
        num_forget: int,
        num_retain: int,
        seed: int,
        shuffle: bool = True,
        forget_topics: list[int] | None = None,
        retain_topics: list[int] | None = None,
        step_size: int | None = None,
    ):
        self.seed = seed
        self.shuffle = shuffle
        self.step_size = step_size
        self.has_topics = forget_topics is not None
        self.epoch = 0
        self.forget_rows = _rows_by_topic(num_forget, forget_topics)
        self.retain_rows = _rows_by_topic(num_retain, retain_topics) if num_retain else None
        # Retain rows without topics serve every topic.
        self.shared_retain = retain_topics is None
        if retain_topics is not None and (missing := set(self.forget_rows) - set(self.retain_rows)):
            raise ValueError(
                f"{len(missing)} of the forget topics have no usable retain row: add some, or remove the column so "
                "that all topics share the retain rows."
            )
        if self.has_topics:
            padded = {topic: -(-len(rows) // step_size) * step_size for topic, rows in self.forget_rows.items()}
        else:
            padded = {topic: len(rows) for topic, rows in self.forget_rows.items()}
        self.rows_per_epoch = padded
        self.length = sum(padded.values())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def _permutation(self, rows: list[int], *key: int) -> list[int]:
        if not self.shuffle:
            return rows
        # One generator per use, seeded by all that distinguishes the use.
        return [rows[index] for index in np.random.default_rng([self.seed, *key]).permutation(len(rows))]

    def _forget_order(self) -> list[tuple[int, int]]:
        """`(topic, row)` in the order of the epoch."""
        orders = {}
        for topic, rows in self.forget_rows.items():
            order = self._permutation(rows, 0, topic, self.epoch)
            orders[topic] = [order[i % len(order)] for i in range(self.rows_per_epoch[topic])]
        if not self.has_topics:
            return [(topic, row) for topic, order in orders.items() for row in order]
        steps = []
        for start in range(0, max(self.rows_per_epoch.values()), self.step_size):
            for topic, order in orders.items():
                steps.extend((topic, row) for row in order[start : start + self.step_size])
        return steps

    def _retain_stream(self, topic: int, start: int) -> Iterator[int]:
        """The endless stream of retain rows of a topic, from position `start`."""
        rows = self.retain_rows[topic]
        cycle, offset = divmod(start, len(rows))
        while True:
            yield from self._permutation(rows, 1, topic, cycle)[offset:]
            cycle, offset = cycle + 1, 0

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        order = self._forget_order()
        if self.retain_rows is None:
            yield from ((row, None) for _, row in order)
            return
        if self.shared_retain:
            stream = self._retain_stream(0, self.epoch * self.length)
            yield from ((row, next(stream)) for _, row in order)
            return
        streams = {
            topic: self._retain_stream(topic, self.epoch * self.rows_per_epoch[topic]) for topic in self.forget_rows
        }
        yield from ((row, next(streams[topic])) for topic, row in order)


def _rows_by_topic(num_rows: int, topics: list[int] | None) -> dict[int, list[int]]:
    if topics is None:
        return {0: list(range(num_rows))}
    rows: dict[int, list[int]] = {topic: [] for topic in sorted(set(topics))}
    for row, topic in enumerate(topics):
        rows[topic].append(row)
    return rows


@dataclass
class DataCollatorForUnlearning(DataCollatorMixin):
    """
    Pads forget and retain rows, each to its own longest.

    Each set becomes a dict of
    * `input_ids`, `attention_mask`, `labels`: `(B, T)` int64, right-padded. The mask comes from lengths, never from
      the pad id: where the pad token is the EOS token, real EOS tokens stay visible;
    * `label_index`: `(N,)` int64, flat indices of the tokens that are predicted and counted, made here so that picking
      them on the device needs no host synchronisation;
    * `topic`: scalar int64, with topics;
    * `packed_index`, `position_ids`: `(N,)` int64, flat indices of all tokens but padding, and their places in their
      rows, with `padding_free`.

    Forget rows that hold another answer to their prompt (`alternative_input_ids`, `alternative_labels`) give a third
    set, `alternative`.

    Rows without sets (evaluation) become one such dict.

    Args:
        pad_token_id (`int`): token that fills `input_ids`; any will do.
        has_row_keys (`bool`, *optional*, defaults to `False`): also give `row_keys`, what each row is called in a
            cache: a list of [`~hf_unlearn.row_cache.RowKey`].
        padding_free (`bool`, *optional*, defaults to `False`): also give what [`~hf_unlearn.packing.Packing`] reads.

    Example:

    ```python
    >>> from hf_unlearn.pairing import DataCollatorForUnlearning
    >>> collator = DataCollatorForUnlearning(pad_token_id=0)
    >>> batch = collator([{"forget": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}},
    ...                   {"forget": {"input_ids": [8, 9], "labels": [8, 9]}}])["forget"]
    >>> batch["labels"].tolist(), batch["label_index"].tolist()
    ([[-100, 6, 7], [8, 9, -100]], [1, 2, 4])

    ```
    """

    pad_token_id: int
    has_row_keys: bool = False
    padding_free: bool = False
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "forget" in examples[0]:
            batch = {name: self._pad([example[name] for example in examples]) for name in examples[0]}
            if "alternative_input_ids" in examples[0]["forget"]:
                rows = [example["forget"] for example in examples]
                batch["alternative"] = self._pad(
                    [{key: row[f"alternative_{key}"] for key in ("input_ids", "labels")} for row in rows]
                )
            return batch
        return self._pad(examples)

    def _pad(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])

        def stack(key: str, value: int) -> torch.Tensor:
            return pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value)

        labels = stack("labels", IGNORE_INDEX)
        counted = labels != IGNORE_INDEX
        counted[:, 0] = False  # nothing predicts the first token
        batch = {
            "input_ids": stack("input_ids", self.pad_token_id),
            "attention_mask": (torch.arange(labels.shape[1]) < lengths.unsqueeze(1)).long(),
            "labels": labels,
            "label_index": counted.flatten().nonzero().squeeze(1),
        }
        if self.padding_free:
            batch["packed_index"] = batch["attention_mask"].flatten().nonzero().squeeze(1)
            batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])
        if self.has_row_keys:
            batch["row_keys"] = [row_key(row["input_ids"], row["labels"]) for row in rows]
        if "topic" in rows[0]:
            batch["topic"] = torch.tensor(rows[0]["topic"])
        return batch
