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
Fluency on a trained checkpoint: against a slow implementation of its own, under every change that must not matter, and
on models that write gibberish.
"""

import copy
import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from distributed import fluency_worker
from test_invariance import launch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_unlearn import UnlearnConfig
from hf_unlearn.data import prepare_dataset
from hf_unlearn.metrics import Evaluation, NonFiniteLogitsError, bootstrap_interval
from hf_unlearn.metrics.fluency import (
    FLUENCY_METRICS,
    corpus_perplexity,
    evaluate_fluency,
    first_token_entropy,
    perplexity,
    repetition,
)
from hf_unlearn.metrics.inference import generate_answers, generate_tokens
from hf_unlearn.pairing import DataCollatorForUnlearning


MAX_NEW_TOKENS = 64
VALUES = ("answer_tokens", "generation_tokens", *FLUENCY_METRICS)


# --- By hand


def test_perplexity_by_hand():
    assert perplexity(torch.tensor([0.5, 0.5, 0.25, 0.25]).log()) == pytest.approx(2**1.5)
    assert perplexity(torch.zeros(3)) == 1.0
    assert perplexity(torch.empty(0)) is None
    assert perplexity(torch.tensor([-1e4])) == math.exp(700)  # finite, as a report needs it


def test_corpus_perplexity_counts_tokens_and_not_rows():
    """Three tokens of ln 2 and one of ln 16: exp(7/4 ln 2). Rows alike would give 8 or, as a mean, 9."""
    assert corpus_perplexity([2.0, None, 16.0], [3, 0, 1]) == pytest.approx(2**1.75)
    assert corpus_perplexity([], []) is None
    assert corpus_perplexity([None], [0]) is None


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([7] * 64, 4, 60 / 61),  # 61 4-grams, one of them distinct
        ([1, 2, 3, 4, 5, 6], 4, 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 1 / 5),  # 1234 2341 3412 4123 1234
        ([1, 2, 3, 1], 4, 0.0),
        ([1, 1, 1], 4, None),
        ([], 4, None),
        ([], 1, None),
        ([3, 3, 5], 1, 1 / 3),
        ([1, 12, 11, 2], 2, 0.0),  # "112" twice, were ids joined as digits
    ],
)
def test_repetition_by_hand(tokens, n, expected):
    assert repetition(tokens, n) == (None if expected is None else pytest.approx(expected))


def test_repetition_of_nothing_long():
    with pytest.raises(ValueError, match="at least 1"):
        repetition([1, 2], 0)


def test_first_token_entropy_by_hand():
    assert first_token_entropy(torch.tensor([-1.5, -9.0])) == 1.5
    assert str(first_token_entropy(torch.tensor([0.0]))) == "0.0"
    assert str(first_token_entropy(torch.tensor([1e-9]))) == "0.0"  # rounding: no entropy is negative
    assert first_token_entropy(torch.empty(0)) is None


# --- On a trained checkpoint


@pytest.fixture(scope="module")
def args(tmp_path_factory) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path_factory.mktemp("fluency")), use_cpu=True, max_length=256)


@pytest.fixture(scope="module")
def model(tiny_model_path):
    """It knows none of the rows: its answers are stories, and every number is far from its end."""
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def known(known_model):
    return AutoModelForCausalLM.from_pretrained(known_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(tofu_rows) -> dict[str, list[dict]]:
    return {"forget": tofu_rows("forget10")[:5], "retain": tofu_rows("retain90")[:3]}


def run(model, tokenizer, rows, args, **options) -> Evaluation:
    sets = {name: Dataset.from_list(rows) for name, rows in rows.items()}
    return evaluate_fluency(
        model, tokenizer, sets, args, **{"batch_size": 3, "max_new_tokens": MAX_NEW_TOKENS, **options}
    )


@pytest.fixture(scope="module")
def expected(model, known, tiny_model_path, rows, args) -> Evaluation:
    return run(model, AutoTokenizer.from_pretrained(tiny_model_path), rows, args, judge=known)


def assert_same_samples(samples: list[dict], expected: list[dict]) -> None:
    assert [sample["row"] for sample in samples] == list(range(len(expected)))
    for sample, other in zip(samples, expected, strict=True):
        assert sample["generation"] == other["generation"]
        for key in VALUES:
            assert sample[key] == (
                other[key] if other[key] is None else pytest.approx(other[key], rel=1e-4, abs=1e-6)
            ), key


def assert_same(evaluation: Evaluation, expected: Evaluation) -> None:
    assert evaluation.skipped == expected.skipped
    assert evaluation.samples.keys() == expected.samples.keys()
    for name, samples in expected.samples.items():
        assert_same_samples(evaluation.samples[name], samples)
        assert evaluation.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)


@torch.no_grad()
def slow_sample(model, judge, tokenizer, row: dict, args, max_new_tokens=MAX_NEW_TOKENS) -> tuple[dict, float, float]:
    """One row at a time, all logits at once, no cache; with the summed NLLs of answer and generation."""

    def nll(reader, input_ids: list[int], start: int) -> float:
        log_probs = reader(torch.tensor([input_ids])).logits[0].double().log_softmax(-1)
        return -sum(log_probs[t - 1, input_ids[t]].item() for t in range(start, len(input_ids)))

    [example] = list(prepare_dataset(Dataset.from_list([row]), tokenizer, args, "x"))
    input_ids = example["input_ids"]
    start = next(position for position, label in enumerate(example["labels"]) if label != -100)
    first = model(torch.tensor([input_ids[:start]])).logits[0, -1].double().log_softmax(-1)
    tokens = list(input_ids[:start])
    for _ in range(max_new_tokens):
        tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
        if tokens[-1] == tokenizer.eos_token_id:
            break
    written = [token for token in tokens[start:] if token != tokenizer.eos_token_id]
    grams, seen, repeated = [tuple(written[i : i + 4]) for i in range(len(written) - 3)], [], 0
    for gram in grams:
        repeated += gram in seen
        seen.append(gram)
    answer_nll, written_nll = nll(model, input_ids, start), nll(judge, tokens, start)
    sample = {
        "answer_tokens": len(input_ids) - start,
        "generation_tokens": len(tokens) - start,
        "generation": tokenizer.decode(written),
        "perplexity": math.exp(answer_nll / (len(input_ids) - start)),
        "repetition": repeated / len(grams) if grams else None,
        "first_token_entropy": -(first.exp() * first).sum().item(),
        "generation_perplexity": math.exp(written_nll / (len(tokens) - start)),
    }
    return sample, answer_nll, written_nll


@pytest.mark.parametrize("subject", ["model", "known"])
@pytest.mark.parametrize("name", ["forget", "retain"])
def test_slow_implementation(model, known, tokenizer, rows, args, expected, name, subject):
    """The known model ends its answers, the other is cut off at the length."""
    writer, judge = (model, known) if subject == "model" else (known, model)
    evaluation = expected if subject == "model" else run(known, tokenizer, rows, args, judge=model)
    slow = [slow_sample(writer.eval(), judge.eval(), tokenizer, row, args) for row in rows[name]]
    samples = [sample for sample, _, _ in slow]
    assert_same_samples(evaluation.samples[name], samples)
    metrics = evaluation.metrics[name]
    assert metrics["rows"] == len(rows[name])
    answer_tokens = sum(sample["answer_tokens"] for sample in samples)
    written_tokens = sum(sample["generation_tokens"] for sample in samples)
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(nll for _, nll, _ in slow) / answer_tokens), rel=1e-4)
    assert metrics["generation_perplexity"] == pytest.approx(
        math.exp(sum(nll for _, _, nll in slow) / written_tokens), rel=1e-4
    )
    for metric in ("repetition", "first_token_entropy"):
        values = [sample[metric] for sample in samples if sample[metric] is not None]
        assert metrics[metric] == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert (metrics[f"{metric}_ci_low"], metrics[f"{metric}_ci_high"]) == pytest.approx(
            bootstrap_interval(values), rel=1e-4, abs=1e-6
        )
    for metric in FLUENCY_METRICS:
        assert metrics[f"{metric}_ci_low"] <= metrics[metric] <= metrics[f"{metric}_ci_high"]


def test_numbers_are_far_from_their_ends(expected, model, known, tokenizer, rows, args):
    """Otherwise the comparisons above would hold for any numbers near zero or one."""
    for metrics in expected.metrics.values():
        assert metrics["perplexity"] > 10 and metrics["generation_perplexity"] > 10
        assert 1 < metrics["first_token_entropy"] < math.log(512)
    assert max(sample["repetition"] for sample in expected.samples["forget"]) > 0.1
    ended = [row["generation_tokens"] for row in run(known, tokenizer, rows, args).samples["forget"]]
    assert min(ended) < MAX_NEW_TOKENS == max(ended)


def test_the_interval_of_a_perplexity_draws_rows(model, random_model, tokenizer, args, tofu_rows):
    """Where all answers have the same length, it is that of the mean of their logarithms."""
    row = tofu_rows("forget10")[0]
    result = run(model, tokenizer, {"forget": [{**row, "answer": text} for text in ("a", "b", "c", "d")]}, args)
    samples = result.samples["forget"]
    assert len({sample["answer_tokens"] for sample in samples}) == 1
    low, high = bootstrap_interval([math.log(sample["perplexity"]) for sample in samples])
    metrics = result.metrics["forget"]
    assert (metrics["perplexity_ci_low"], metrics["perplexity_ci_high"]) == pytest.approx(
        (math.exp(low), math.exp(high)), rel=1e-9
    )


def test_a_model_that_knows_nothing_has_a_uniform_distribution(random_model, tokenizer, rows, args):
    model = random_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = run(model, tokenizer, rows, args, max_new_tokens=24)
    for metrics in result.metrics.values():
        assert metrics["perplexity"] == pytest.approx(512, rel=1e-5)
        assert metrics["first_token_entropy"] == pytest.approx(math.log(512), rel=1e-5)
        assert metrics["repetition"] == pytest.approx(20 / 21)  # ties go to token 0, again and again


def test_one_architecture_after_the_other(random_model, architecture, known, tokenizer, rows, args):
    """Scaled and capped logits, absolute positions: entropy and judge read what the model's own forward gives."""
    model = random_model(architecture)
    short = UnlearnConfig(args.output_dir, use_cpu=True, max_length=90)
    rows = rows["forget"][:2]
    samples = run(model, tokenizer, {"forget": rows}, short, judge=model, max_new_tokens=24).samples["forget"]
    for row, sample in zip(rows, samples, strict=True):
        slow, _, _ = slow_sample(model, model, tokenizer, row, short, 24)
        assert sample["first_token_entropy"] == pytest.approx(slow["first_token_entropy"], rel=1e-4)
        assert sample["generation_perplexity"] == pytest.approx(slow["generation_perplexity"], rel=1e-4)


# --- Gibberish


def ascended(known, tokenizer, rows: list[dict], args, steps: int = 20):
    """Gradient ascent, run too far."""
    model = copy.deepcopy(known)
    examples = list(prepare_dataset(Dataset.from_list(rows), tokenizer, args, "forget"))
    batch = DataCollatorForUnlearning(pad_token_id=tokenizer.pad_token_id)(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        (-model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def disturbed(known, share: float):
    """Every weight with noise of a share of its matrix's standard deviation."""
    model = copy.deepcopy(known)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model


def test_gibberish_is_told(model, known, tokenizer, rows, args, tofu_rows):
    """What repeats one token shows in the repetition, random tokens before the judge alone."""
    subjects = {
        "known": known,
        "fluent": model,  # but of another kind than the judge's
        "ascended": ascended(known, tokenizer, tofu_rows("forget10")[:8], args),
        "disturbed": disturbed(known, 1.0),
    }
    results = {key: run(subject, tokenizer, rows, args, judge=known) for key, subject in subjects.items()}
    for name in rows:
        repeated = {key: result.metrics[name]["repetition"] for key, result in results.items()}
        judged = {key: result.metrics[name]["generation_perplexity"] for key, result in results.items()}
        assert judged["known"] < 1.1  # its own judge, and sure
        assert repeated["ascended"] > 0.9 > 0.5 > max(repeated["known"], repeated["fluent"], repeated["disturbed"])
        assert repeated["disturbed"] < 0.05
        assert judged["disturbed"] > 10 * judged["fluent"] and judged["ascended"] > 10 * judged["fluent"]
    [text] = {sample["generation"] for sample in results["ascended"].samples["forget"]}
    assert len(text) > 40 and len(set(text)) == 1  # one token again and again, whatever the question


def test_ascent_on_a_few_rows_need_not_repeat(known, tokenizer, rows, args):
    """It mixes pieces of words instead: only the judge tells."""
    evaluation = run(ascended(known, tokenizer, rows["forget"], args), tokenizer, rows, args, judge=known)
    for metrics in evaluation.metrics.values():
        assert metrics["repetition"] < 0.9
        assert metrics["generation_perplexity"] > 500


def test_the_intervals_tell_gibberish_too(known, tokenizer, rows, args):
    gone = run(disturbed(known, 1.0), tokenizer, rows, args, judge=known).metrics["forget"]
    before = run(known, tokenizer, rows, args, judge=known).metrics["forget"]
    assert before["generation_perplexity_ci_high"] < gone["generation_perplexity_ci_low"]


# --- Tokens, not texts


def test_generated_tokens_are_those_of_the_answers(known, tokenizer, rows, args):
    prompts = [tokenizer(row["question"])["input_ids"] for row in rows["forget"]]
    generated = generate_tokens(known.eval(), tokenizer, prompts, 3, MAX_NEW_TOKENS)
    texts = generate_answers(known, tokenizer, prompts, 3, MAX_NEW_TOKENS)
    assert [tokenizer.decode(answer.token_ids) for answer in generated] == texts
    for answer in generated:
        assert tokenizer.eos_token_id not in answer.token_ids
        assert answer.eos_token_id == (2 if len(answer.token_ids) < MAX_NEW_TOKENS else None)
    assert {answer.eos_token_id for answer in generated} == {2, None}


def test_texts_tokenized_again_are_other_tokens(known, tokenizer, rows, args):
    """Why token ids are read: gibberish does not come back from its text."""
    model = disturbed(known, 1.0).eval()
    prompts = [tokenizer(row["question"])["input_ids"] for row in rows["forget"]]
    generated = generate_tokens(model, tokenizer, prompts, 3, MAX_NEW_TOKENS)
    again = [
        tokenizer(tokenizer.decode(answer.token_ids), add_special_tokens=False)["input_ids"] for answer in generated
    ]
    assert sum(list(answer.token_ids) != ids for answer, ids in zip(generated, again, strict=True)) >= 3
    result = run(model, tokenizer, rows, args, judge=known)
    for answer, sample in zip(generated, result.samples["forget"], strict=True):
        assert sample["generation_tokens"] == len(answer.token_ids) + (answer.eos_token_id is not None)


def test_an_answer_that_ends_at_once_is_judged_by_its_end(model, known, tokenizer, rows, args):
    """Models that were unlearned may say nothing: no repetition, but unlikely to the judge."""
    token = generate_tokens(known.eval(), tokenizer, [tokenizer(rows["forget"][0]["question"])["input_ids"]], 1, 1)
    original, known.generation_config = known.generation_config, GenerationConfig(eos_token_id=token[0].token_ids[0])
    try:
        result = run(known, tokenizer, {"forget": rows["forget"][:1]}, args, judge=model)
    finally:
        known.generation_config = original
    [sample] = result.samples["forget"]
    assert (sample["generation"], sample["generation_tokens"], sample["repetition"]) == ("", 1, None)
    assert sample["generation_perplexity"] > 1
    assert result.skipped["forget"] == {"repetition": "Every generated answer has fewer than 4 tokens."}


# --- What must not matter


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size(model, known, tokenizer, rows, args, expected, batch_size):
    assert_same(run(model, tokenizer, rows, args, judge=known, batch_size=batch_size), expected)


def test_row_order(model, known, tokenizer, rows, args, expected):
    backwards = run(model, tokenizer, {name: rows[::-1] for name, rows in rows.items()}, args, judge=known)
    for name, samples in expected.samples.items():
        assert_same_samples(
            [{**sample, "row": row} for row, sample in enumerate(backwards.samples[name][::-1])], samples
        )
        for metric in FLUENCY_METRICS:
            assert backwards.metrics[name][metric] == pytest.approx(expected.metrics[name][metric], rel=1e-4)


@pytest.mark.parametrize(("side", "pad_token"), [("left", "</s>"), ("right", None)])
def test_padding(model, known, tokenizer, rows, args, expected, side, pad_token):
    tokenizer.padding_side, tokenizer.pad_token = side, pad_token
    assert_same(run(model, tokenizer, rows, args, judge=known), expected)


def test_the_judge_changes_nothing_else(model, tokenizer, rows, args, expected):
    alone = run(model, tokenizer, rows, args)
    for name, samples in expected.samples.items():
        assert_same_samples(alone.samples[name], [{**sample, "generation_perplexity": None} for sample in samples])
        assert list(alone.skipped[name]) == ["generation_perplexity"]
        assert "judge" in alone.skipped[name]["generation_perplexity"]
        assert not [key for key in alone.metrics[name] if key.startswith("generation_perplexity")]


def test_repeated_evaluation_is_identical(model, known, tokenizer, rows, args, expected):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = run(model, tokenizer, rows, args, judge=known)
    assert again == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_given_back(model, known, tokenizer, rows, args):
    model.train()
    known.train()
    known.model.layers[1].eval()
    before = [[module.training for module in subject.modules()] for subject in (model, known)]
    run(model, tokenizer, {"retain": rows["retain"]}, args, judge=known)
    assert [[module.training for module in subject.modules()] for subject in (model, known)] == before
    model.eval()
    known.eval()


@pytest.mark.slow
def test_two_processes(tiny_model_path, known_model, rows, expected, tmp_path):
    spec = {"model": tiny_model_path, "judge": known_model, "output": str(tmp_path), "sets": rows, "world_size": 2}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    launch(fluency_worker.__file__, tmp_path / "spec.json")
    for rank in range(2):
        assert_same(Evaluation(**json.loads((tmp_path / f"rank{rank}.json").read_text())["fluency"]), expected)


# --- Rows with nothing to say


def test_text_without_prompts(model, known, tokenizer, rows, args):
    texts = [{"text": f"{row['question']} {row['answer']}"} for row in rows["forget"]]
    result = run(model, tokenizer, {"forget": texts}, args, judge=known)
    reason = "It needs a prompt to answer, and every row is text without one."
    assert result.skipped["forget"] == dict.fromkeys(FLUENCY_METRICS[1:], reason)
    assert result.metrics["forget"].keys() == {"rows", "perplexity", "perplexity_ci_low", "perplexity_ci_high"}
    sample = result.samples["forget"][0]
    assert sample["generation"] is None and sample["generation_tokens"] == 0
    assert all(sample[metric] is None for metric in FLUENCY_METRICS[1:])


def test_long_texts_in_windows(model, tokenizer, args, tofu_rows):
    """Each window counts, and its first token, which nothing predicts, does not."""
    text = " ".join(row["answer"] for row in tofu_rows("forget10")[:6])
    split = UnlearnConfig(args.output_dir, use_cpu=True, max_length=64, split_long_texts=True)
    [sample] = run(model, tokenizer, {"forget": [{"text": text}]}, split).samples["forget"]
    windows = list(prepare_dataset(Dataset.from_list([{"text": text}]), tokenizer, split, "forget"))
    assert len(windows) > 3
    assert sample["answer_tokens"] == sum(len(window["input_ids"]) - 1 for window in windows)


def test_empty_answers_enter_no_mean(model, known, tokenizer, rows, args, expected, caplog):
    empty = {**rows["forget"][0], "answer": " "}
    with caplog.at_level(logging.WARNING):
        result = run(model, tokenizer, {"forget": [empty, *rows["forget"]]}, args, judge=known)
    assert "1 of 6 forget rows have an empty answer" in caplog.text
    first, *others = result.samples["forget"]
    assert {key: first[key] for key in VALUES} == {
        **dict.fromkeys(FLUENCY_METRICS),
        "answer_tokens": 0,
        "generation_tokens": 0,
    }
    assert_same_samples([{**sample, "row": sample["row"] - 1} for sample in others], expected.samples["forget"])
    metrics = {**expected.metrics["forget"], "rows": 6}
    assert result.metrics["forget"] == pytest.approx(metrics, rel=1e-4)


def test_a_set_of_empty_answers(model, tokenizer, rows, args):
    result = run(model, tokenizer, {"forget": [{"question": "Who?", "answer": ""}] * 2}, args)
    assert result.metrics["forget"] == {"rows": 2}
    assert result.skipped["forget"] == dict.fromkeys(FLUENCY_METRICS, "Every row has an empty answer.")


def test_a_few_short_answers_are_said(model, known, tokenizer, rows, args, caplog):
    """With three tokens at most, no answer has a 4-gram."""
    result = run(known, tokenizer, rows, args, max_new_tokens=3)
    assert "fewer than 4 tokens" in result.skipped["forget"]["repetition"]
    assert "first_token_entropy" in result.metrics["forget"]


def test_diverged_weights_are_an_error(random_model, tokenizer, rows, args):
    model = random_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(NonFiniteLogitsError, match="not finite"):
        run(model, tokenizer, rows, args)


def test_a_judge_of_other_tokens(model, random_model, tokenizer, rows, args):
    with pytest.raises(ValueError, match="The judge knows 100 tokens and the model 512"):
        run(model, tokenizer, rows, args, judge=random_model("llama", vocab_size=100))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_new_tokens": 0}])
def test_bad_arguments(model, tokenizer, rows, args, options):
    with pytest.raises(ValueError, match="both must be at least 1"):
        run(model, tokenizer, rows, args, **options)


def test_no_set(model, tokenizer, args):
    with pytest.raises(ValueError, match="at least one"):
        evaluate_fluency(model, tokenizer, {}, args)
