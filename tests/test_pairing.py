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
"""Who meets whom: the order of forget and retain rows, their batches, and what is masked in them."""

from collections import Counter
from itertools import islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler, DataLoader

from hf_unlearn.pairing import DataCollatorForUnlearning, PairedDataset, PairingSampler


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    pairs = list(sampler)
    assert len(pairs) == len(sampler)
    return pairs


def retain_stream(sampler, epochs):
    return [retain for epoch in range(epochs) for _, retain in epoch_of(sampler, epoch)]


def chunks(values, size):
    iterator = iter(values)
    return list(iter(lambda: list(islice(iterator, size)), []))


# ---- The order ----


def test_order_is_a_function_of_seed_and_epoch():
    # Epoch 3 is the same for a sampler that lived through the first three and for one made anew (a resumed run), and
    # does not depend on the state of any global generator.
    lived, fresh = PairingSampler(10, 7, seed=5), PairingSampler(10, 7, seed=5)
    for epoch in range(3):
        torch.manual_seed(epoch)
        epoch_of(lived, epoch)
    assert epoch_of(lived, 3) == epoch_of(fresh, 3)
    assert epoch_of(lived, 3) == epoch_of(lived, 3)
    assert epoch_of(lived, 2) != epoch_of(lived, 3)
    assert epoch_of(PairingSampler(10, 7, seed=6), 3) != epoch_of(fresh, 3)


def test_stopping_in_the_middle_of_an_epoch_changes_nothing_later():
    sampler = PairingSampler(10, 7, seed=5)
    expected = epoch_of(sampler, 1)
    sampler.set_epoch(0)
    next(iter(sampler))
    assert epoch_of(sampler, 1) == expected


@pytest.mark.parametrize("num_forget, num_retain", [(1, 1), (5, 3), (5, 5), (5, 17), (1, 9), (9, 1)])
def test_each_epoch_visits_every_forget_row_once(num_forget, num_retain):
    sampler = PairingSampler(num_forget, num_retain, seed=0)
    for epoch in range(4):
        assert sorted(forget for forget, _ in epoch_of(sampler, epoch)) == list(range(num_forget))


@pytest.mark.parametrize("num_forget, num_retain", [(5, 3), (5, 5), (5, 17), (1, 9), (9, 1), (7, 4)])
def test_no_retain_row_comes_twice_before_all_have_come_once(num_forget, num_retain):
    """Also across epochs. The public defect draws retain rows at random, with replacement."""
    stream = retain_stream(PairingSampler(num_forget, num_retain, seed=0), epochs=8)
    for cycle in chunks(stream, num_retain):
        assert len(set(cycle)) == len(cycle)
    counts = Counter(stream)
    assert set(counts) <= set(range(num_retain))
    assert max(counts.values()) - min(counts[row] for row in range(num_retain)) <= 1


def test_pairs_change_from_epoch_to_epoch():
    # Equal sizes: each retain row comes once per epoch, so that only a new shuffle can change its partner.
    sampler = PairingSampler(50, 50, seed=0)
    first, second = dict(epoch_of(sampler, 0)), dict(epoch_of(sampler, 1))
    assert sum(first[row] == second[row] for row in range(50)) < 10
    assert list(first) != list(second)  # the forget rows, in another order
    stream = retain_stream(sampler, epochs=2)
    assert stream[:50] != stream[50:]
    # Forget and retain rows are shuffled independently, or row i would meet row i for ever
    assert sum(forget == retain for forget, retain in epoch_of(sampler, 0)) < 10


def test_sequential_order():
    sampler = PairingSampler(4, 3, seed=0, shuffle=False)
    assert epoch_of(sampler, 0) == [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert epoch_of(sampler, 1) == [(0, 1), (1, 2), (2, 0), (3, 1)]  # goes on where epoch 0 stopped
    assert epoch_of(sampler, 2) == [(0, 2), (1, 0), (2, 1), (3, 2)]


def test_without_a_retain_set():
    sampler = PairingSampler(4, 0, seed=0)
    pairs = epoch_of(sampler, 0)
    assert sorted(pairs) == [(row, None) for row in range(4)]
    assert [forget for forget, _ in pairs] == [forget for forget, _ in epoch_of(PairingSampler(4, 9, seed=0), 0)]


# ---- Processes ----


def steps_of_processes(sampler, processes, batch_size, accumulation):
    """What each optimizer step sees: a list of pairs per process, through accelerate's sharding."""
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=False), processes, index))
        for index in range(processes)
    ]
    return [
        [[pair for batch in shard[start : start + accumulation] for pair in batch] for shard in shards]
        for start in range(0, len(shards[0]), accumulation)
    ]


@pytest.mark.parametrize(
    "processes, batch_size, accumulation", [(1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 1, 4), (4, 2, 1)]
)
@pytest.mark.parametrize("topics", [False, True])
def test_any_split_over_processes_sees_the_same_step(processes, batch_size, accumulation, topics):
    options = {"forget_topics": [0] * 16 + [1] * 16, "retain_topics": [0, 1] * 10, "step_size": 8} if topics else {}
    sampler = PairingSampler(32, 20, seed=0, **options)
    for epoch in range(2):
        expected = [Counter(step) for step in chunks(epoch_of(sampler, epoch), 8)]
        steps = steps_of_processes(sampler, processes, batch_size, accumulation)
        assert [Counter(pair for rows in step for pair in rows) for step in steps] == expected


def test_processes_draw_different_retain_rows():
    """The public defect: every rank draws the same retain rows."""
    sampler = PairingSampler(32, 40, seed=0)
    for first, second in steps_of_processes(sampler, processes=2, batch_size=4, accumulation=1):
        assert not {retain for _, retain in first} & {retain for _, retain in second}
        assert not {forget for forget, _ in first} & {forget for forget, _ in second}


# ---- Topics ----

FORGET_TOPICS = [0, 1, 0, 0, 2, 0, 1, 0, 0, 1, 2, 0]  # 7 rows of topic 0, 3 of topic 1, 2 of topic 2
RETAIN_TOPICS = [2, 2, 0, 1, 1, 0, 0, 2, 1, 1]  # 3, 4 and 3


def topic_sampler(**options):
    return PairingSampler(12, 10, **{"seed": 0, "forget_topics": FORGET_TOPICS, "step_size": 2, **options})


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_step_holds_one_topic_and_topics_alternate(shuffle):
    sampler = topic_sampler(shuffle=shuffle)
    # 7 rows fill 4 steps of 2, 3 rows fill 2, 2 rows fill 1
    assert len(sampler) == 14
    for epoch in range(3):
        steps = chunks(epoch_of(sampler, epoch), 2)
        topics = [{FORGET_TOPICS[forget] for forget, _ in step} for step in steps]
        assert topics == [{0}, {1}, {2}, {0}, {1}, {0}, {0}]


def test_topic_is_filled_up_with_its_own_rows():
    sampler = topic_sampler(step_size=5)
    # 7 rows -> 10, 3 -> 5, 2 -> 5: each row at least once, none more than once oftener than another of its topic
    for epoch in range(3):
        counts = Counter(forget for forget, _ in epoch_of(sampler, epoch))
        for topic, total in ((0, 10), (1, 5), (2, 5)):
            of_topic = [counts[row] for row, other in enumerate(FORGET_TOPICS) if other == topic]
            assert sum(of_topic) == total
            assert min(of_topic) >= 1 and max(of_topic) - min(of_topic) <= 1


def test_retain_rows_of_a_topic_meet_its_forget_rows():
    sampler = topic_sampler(retain_topics=RETAIN_TOPICS)
    pairs = [pair for epoch in range(6) for pair in epoch_of(sampler, epoch)]
    assert all(FORGET_TOPICS[forget] == RETAIN_TOPICS[retain] for forget, retain in pairs)
    # Each topic has its own stream, balanced over epochs
    for topic in range(3):
        stream = [retain for _, retain in pairs if RETAIN_TOPICS[retain] == topic]
        for cycle in chunks(stream, RETAIN_TOPICS.count(topic)):
            assert len(set(cycle)) == len(cycle)


def test_retain_rows_without_topics_serve_every_topic():
    sampler = topic_sampler()
    stream = retain_stream(sampler, epochs=5)
    for cycle in chunks(stream, 10):
        assert len(set(cycle)) == len(cycle)
    met = Counter(FORGET_TOPICS[forget] for forget, _ in epoch_of(sampler, 0))
    assert met == {0: 8, 1: 4, 2: 2}


def test_topics_of_equal_size_are_shuffled_independently():
    sampler = PairingSampler(40, 0, seed=0, forget_topics=[0] * 20 + [1] * 20, step_size=20)
    first, second = chunks([forget for forget, _ in epoch_of(sampler, 0)], 20)
    assert first != [row - 20 for row in second]


def test_one_topic_is_like_none_in_whole_steps():
    sampler = PairingSampler(8, 5, seed=0, forget_topics=[0] * 8, step_size=4)
    assert epoch_of(sampler, 1) == epoch_of(PairingSampler(8, 5, seed=0), 1)


# ---- The data set ----


def rows(lengths, first=10, **columns):
    """Rows of tokens that count up from `first`; the first token of each row has no label."""
    values = []
    for index, length in enumerate(lengths):
        tokens = list(range(first + 10 * index, first + 10 * index + length))
        row = {"input_ids": tokens, "labels": [-100, *tokens[1:]]}
        values.append({**row, **{key: column[index] for key, column in columns.items()}})
    return Dataset.from_list(values)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_loader_yields_the_pairs_of_the_sampler(num_workers):
    forget, retain = rows([3, 2, 4, 5, 2]), rows([2, 6, 3], first=100)
    sampler = PairingSampler(5, 3, seed=0)

    class FetchedTogether(PairedDataset):
        def __getitem__(self, pair):
            raise AssertionError("rows are read one by one, which is slow: not through __getitems__")

    loader = DataLoader(
        FetchedTogether(forget, retain),
        batch_size=2,
        sampler=sampler,
        collate_fn=DataCollatorForUnlearning(pad_token_id=0),
        num_workers=num_workers,
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)
        seen = []
        for batch in loader:
            assert set(batch) == {"forget", "retain"}
            # The first token names the row
            starts = [batch[name]["input_ids"][:, 0].tolist() for name in ("forget", "retain")]
            seen += [((f - 10) // 10, (r - 100) // 10) for f, r in zip(*starts, strict=True)]
        assert seen == epoch_of(sampler, epoch)


def test_rows_fetched_together_are_those_fetched_one_by_one():
    dataset = PairedDataset(rows([3, 2, 4]), rows([2, 6], first=100))
    pairs = [(2, 0), (0, 1), (1, 1)]
    assert len(dataset) == 3
    assert dataset.__getitems__(pairs) == [dataset[pair] for pair in pairs]
    assert dataset[(2, 1)]["forget"]["input_ids"] == [30, 31, 32, 33]
    assert dataset[(2, 1)]["retain"]["input_ids"] == [110, 111, 112, 113, 114, 115]


def test_data_set_without_retain_rows():
    dataset = PairedDataset(rows([3, 2]), None)
    assert dataset.__getitems__([(1, None)]) == [{"forget": {"input_ids": [20, 21], "labels": [-100, 21]}}]


# ---- The collator ----


def test_sets_are_padded_each_to_its_own_longest():
    examples = PairedDataset(rows([3, 2]), rows([1, 4], first=100)).__getitems__([(0, 0), (1, 1)])
    batch = DataCollatorForUnlearning(pad_token_id=7)(examples)
    assert batch["forget"]["input_ids"].tolist() == [[10, 11, 12], [20, 21, 7]]
    assert batch["forget"]["labels"].tolist() == [[-100, 11, 12], [-100, 21, -100]]
    assert batch["forget"]["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["forget"]["label_index"].tolist() == [1, 2, 4]
    assert batch["retain"]["input_ids"].tolist() == [[100, 7, 7, 7], [110, 111, 112, 113]]
    assert batch["retain"]["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["retain"]["label_index"].tolist() == [5, 6, 7]
    assert all(tensor.dtype == torch.int64 for part in batch.values() for tensor in part.values())


@pytest.mark.parametrize("pad_token_id", [0, 2])
def test_real_eos_tokens_stay_visible_where_the_pad_token_is_eos(pad_token_id):
    """The public defect: with pad = EOS, a mask made from the pad id hides real EOS tokens (Llama-3 chats)."""
    eos = 2
    examples = [
        {"input_ids": [1, 5, eos, 6, eos], "labels": [-100, -100, -100, 6, eos]},
        {"input_ids": [1, eos], "labels": [-100, eos]},
    ]
    batch = DataCollatorForUnlearning(pad_token_id=pad_token_id)(examples)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, eos], [-100, eos, -100, -100, -100]]
    assert batch["label_index"].tolist() == [3, 4, 6]


def test_label_of_the_first_token_is_kept_but_never_predicted():
    # It is a position for losses on hidden states, but nothing predicts it.
    batch = DataCollatorForUnlearning(pad_token_id=0)(
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    )
    assert batch["labels"].tolist() == [[5, 6], [7, -100]]
    assert batch["label_index"].tolist() == [1]


def test_labels_in_the_middle_of_a_row():
    batch = DataCollatorForUnlearning(pad_token_id=0)(
        [
            {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, -100]},
            {"input_ids": [1, 2, 3], "labels": [-100] * 3},
        ]
    )
    assert batch["label_index"].tolist() == [1, 3]
    labels = batch["labels"].flatten()
    assert labels[batch["label_index"]].tolist() == [2, 4]


def test_topic_of_a_batch():
    forget = rows([3, 2, 4], topic=[1, 0, 1])
    examples = PairedDataset(forget, rows([2], first=100)).__getitems__([(0, 0), (2, 0)])
    batch = DataCollatorForUnlearning(pad_token_id=0)(examples)
    assert batch["forget"]["topic"].shape == ()
    assert batch["forget"]["topic"].item() == 1
    assert "topic" not in batch["retain"]
