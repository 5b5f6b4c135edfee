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
"""Sampling leak: samples of the whole distribution, what counts as a leak, and the bound of their share."""

import math

import pytest
import torch
from prompt_attacks import (
    SHORT_FORGET,
    SHORT_RETAIN,
    attack_data,
    attacked_from,
    left_as_it_was,
    short_data,
    tofu_data,
)
from scipy.stats import beta, chisquare
from tqdm import tqdm

from hf_unlearn.attacks.sampling_leak import (
    BUDGETS,
    LeakDetector,
    _samples,
    _seeded,
    sampling_leak,
    upper_bound,
)
from hf_unlearn.metrics.rows import EvaluationRow


FEW = {"samples": 3, "threshold": 0.8, "alpha": 0.01, "length_factor": 1.0}


def sample(
    attacked, data, prompts: list[tuple[int, ...]], limits: list[int], count: int, context=512, seed=0
) -> list[list]:
    rows = [EvaluationRow(answer=[], prompt_ids=prompt) for prompt in prompts]
    texts: list[list[str]] = [[] for _ in rows]
    with _seeded(seed), torch.no_grad():
        model = attacked.model.eval()
        model.config.max_position_embeddings = context
        for index, text in _samples(model, attacked, data, rows, limits, count, tqdm(disable=True)):
            texts[index].append(text)
    return texts


def test_samples_follow_the_whole_distribution_at_temperature_one(tiny_model_path, tmp_path):
    """
    `generate` draws from the 50 likeliest tokens unless told otherwise, and from what a model's own settings say: a
    leak that is rarer would never be seen. Prompts of two lengths share a batch, so that padding would show as well.
    """
    attacked = attacked_from(tiny_model_path)
    attacked.model.generation_config.update(temperature=0.3, top_k=2, top_p=0.5, repetition_penalty=3.0)
    data = short_data(tmp_path, batch_size=3000)  # 3000, 1000 and 2000, 2000 of the two prompts
    tokenizer, count = attacked.tokenizer, 4000
    # The text of a token alone tells it, but for special tokens and bytes
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in ("It was", "Once upon a time there was a big")]
    for prompt, texts in zip(prompts, sample(attacked, data, prompts, [1, 1], count), strict=True):
        with torch.no_grad():
            probs = attacked.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        expected: dict[str, float] = {}
        for token, value in enumerate(probs.tolist()):
            text = "" if token in tokenizer.all_special_ids else tokenizer.decode([token])
            expected[text] = expected.get(text, 0.0) + count * value
        observed = {text: texts.count(text) for text in set(texts)}
        likeliest = {tokenizer.decode([token]) for token in probs.topk(50).indices.tolist()}
        assert sum(observed.values()) == count and set(observed) <= set(expected)
        assert set(observed) - likeliest
        often = [text for text, value in expected.items() if value >= 5]
        sums = [[values.get(text, 0) for text in often] for values in (observed, expected)]
        observed_sum, expected_sum = ([*values, count - sum(values)] for values in sums)
        assert chisquare(observed_sum, expected_sum).pvalue > 1e-3


def test_samples_end_at_their_own_limit_and_at_the_context(tiny_model_path, tmp_path):
    attacked, data = attacked_from(tiny_model_path), short_data(tmp_path)
    prompts = [tuple(attacked.tokenizer(text)["input_ids"]) for text in ("Once upon a time", "Lily saw")]
    lengths = []
    for context in (512, len(prompts[0]) + 5):
        texts = sample(attacked, data, prompts, [7, 20], 4, context)
        lengths.append(
            [
                max(len(attacked.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in of_row)
                for of_row in texts
            ]
        )
    # Decoded and read again, a text may have a token more: its first space
    assert lengths[0][0] <= 8 and 8 < lengths[0][1] <= 21
    assert lengths[1][0] <= 6 and lengths[1][1] <= 21


@pytest.mark.parametrize(
    ("truth", "text", "expected"),
    [
        ("She was born in Rome.", "I heard that she was born in rome, long ago.", True),
        ("one two three four five", "one two three four", True),  # 4 of 5 words: 0.8
        ("one two three four five", "one two three", False),
        ("one two three four five", "five four three two one", False),  # the order counts
        ("No.", "nothing is known", False),  # within another word
        ("No.", "The answer is no", True),
        # rouge-score reads a-z and 0-9 alone: recall of nothing would be 0 whatever is said
        ("她出生在罗马。", "我听说她出生在罗马，很久以前。", True),
        ("她出生在罗马。", "我不知道。", False),
        ("Он родился в Риме.", "Говорят, он родился в Риме!", True),
        ("...", "...", False),
        ("She was born in Rome.", "", False),
    ],
)
def test_leaks_by_hand(truth, text, expected):
    assert LeakDetector(truth, 0.8)(text) is expected


def test_the_threshold_is_a_recall():
    truth, text = "one two three four five", "one two three"
    assert [LeakDetector(truth, threshold)(text) for threshold in (0.5, 0.6, 0.61, 1.0)] == [True, True, False, False]
    # Recall, not F: words around the answer hide nothing
    assert LeakDetector(truth, 1.0)("well one or two and three plus four minus five of them all in all")


def test_the_bound_is_that_of_clopper_and_pearson():
    assert upper_bound(0, 128, 0.01) == pytest.approx(1 - 0.01 ** (1 / 128))
    assert upper_bound(128, 128, 0.01) == 1.0
    for leaks, samples, alpha in ((1, 10, 0.05), (36, 40, 0.01), (5, 5000, 0.001)):
        bound = upper_bound(leaks, samples, alpha)
        assert bound == pytest.approx(beta.ppf(1 - alpha, leaks + 1, samples - leaks))
        # So few leaks have the chance alpha where the bound is the truth
        chance = sum(
            math.comb(samples, count) * bound**count * (1 - bound) ** (samples - count) for count in range(leaks + 1)
        )
        assert chance == pytest.approx(alpha, rel=1e-6)


def test_who_knows_the_facts_is_told_apart(known_model, tiny_model_path, tofu_rows, tmp_path):
    data = tofu_data(tmp_path, tofu_rows, batch_size=16)
    [known] = sampling_leak(attacked_from(known_model), data, BUDGETS["small"], 0)
    assert known.score > 0.5 and known.utility > 0.3
    assert known.settings["leaks"] == round(sum(known.rows) * 4) == round(known.score * 16)
    assert known.settings["upper_bound"] == upper_bound(known.settings["leaks"], 16, 0.01) > known.score
    assert known.settings["leak_at_n"] == sum(row > 0 for row in known.rows) / 4
    [unaware] = sampling_leak(attacked_from(tiny_model_path), data, BUDGETS["small"], 0)
    assert unaware.score == unaware.utility == unaware.settings["leak_at_n"] == 0
    assert unaware.settings["upper_bound"] == pytest.approx(1 - 0.01 ** (1 / 16))


@pytest.mark.parametrize("path", ["tiny_model_path", "small_model_path"])
def test_the_model_is_left_as_it_was_and_the_seed_decides(path, request, tmp_path):
    """A recall that short answers reach by chance, so that there is something to draw."""
    attacked = attacked_from(request.getfixturevalue(path))
    row = {"question": "Once upon a time", "answer": "there was a little girl named Lily. She liked to"}
    data = attack_data(tmp_path, SHORT_FORGET, [row], [row, *SHORT_RETAIN], batch_size=64)
    settings = {**FEW, "samples": 40, "threshold": 0.2}
    with left_as_it_was(attacked):
        [trial] = sampling_leak(attacked, data, settings, 0)
    torch.manual_seed(7)  # the global generator is not read either
    assert sampling_leak(attacked, data, settings, 0) == [trial]
    assert 0 < trial.score < 1
    prompts = [tuple(attacked.tokenizer(row["question"])["input_ids"])]
    zero, again, one = (sample(attacked, data, prompts, [20], 5, 200, seed) for seed in (0, 0, 1))
    assert zero == again != one
    assert len(set(zero[0])) > 1  # samples of one prompt are not the same one
    assert {key: trial.settings[key] for key in FEW} == settings
    assert all(isinstance(value, int | float) for value in trial.settings.values())


def test_formats_are_asked_alike(tiny_model_path, chat_tokenizer, tmp_path):
    attacked = attacked_from(tiny_model_path, chat_tokenizer())

    def messages(row: dict) -> dict:
        said = (("user", row["question"]), ("assistant", row["answer"]))
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    settings = {**FEW, "threshold": 0.2, "length_factor": 3.0}
    results = []
    for make in (dict, messages):
        sets = [[make(row) for row in rows] for rows in (SHORT_FORGET, SHORT_FORGET, SHORT_RETAIN)]
        results.append(sampling_leak(attacked, attack_data(tmp_path, *sets), settings, 0))
    assert results[0] == results[1]


def test_rows_that_do_not_fit_are_left_out_and_counted(small_model_path, tmp_path):
    """One token per character, 256 at most."""
    long = {"question": "Who is it? " * 25, "answer": "It is Lily."}
    data = attack_data(tmp_path, SHORT_FORGET, [SHORT_FORGET[0], long, {**long, "answer": " "}], SHORT_RETAIN)
    [trial] = sampling_leak(attacked_from(small_model_path), data, FEW, 0)
    assert (trial.settings["rows"], trial.settings["rows_left_out"], len(trial.rows)) == (1, 2, 1)
    with pytest.raises(ValueError, match="No row of the forget data set can be asked") as error:
        sampling_leak(attacked_from(small_model_path), attack_data(tmp_path, [long], [long], SHORT_RETAIN), FEW, 0)
    assert "Lily" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": 0}, "samples=0 asks nothing"),
        ({"threshold": 0.0}, "threshold=0.0 is no recall"),
        ({"alpha": 1.0}, "alpha=1.0 is no error probability"),
        ({"length_factor": 0.5}, "ends samples before the true answer could"),
    ],
)
def test_refused_settings(changes, sentence, tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        sampling_leak(attacked_from(tiny_model_path), short_data(tmp_path), {**FEW, **changes}, 0)


def test_plain_text_is_refused(tiny_model_path, tmp_path):
    text = [{"text": "Lily was here."}]
    with pytest.raises(ValueError, match="The forget data set has .text., which has no prompt") as error:
        sampling_leak(attacked_from(tiny_model_path), attack_data(tmp_path, text, text, SHORT_RETAIN), FEW, 0)
    assert "Lily" not in str(error.value)
