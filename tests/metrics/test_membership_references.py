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
Metrics against other people's code, and against loops that do what the definition says and use nothing of the package.

What stands elsewhere: the loop on a model that was taught (test_evaluation.py, with ROUGE-L by the table), and Min-K
with NumPy's moments (test_membership.py).
"""

import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_unlearn import UnlearnConfig
from hf_unlearn.metrics import auc, evaluate_model, forget_quality, membership_scores
from hf_unlearn.metrics.answers import exact_memorization, extraction_strength


@pytest.fixture
def args(tmp_path) -> UnlearnConfig:
    return UnlearnConfig(str(tmp_path), use_cpu=True, max_length=1024)


def load(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


# --- Statistics


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_scikit_learn(seed):
    """With ties within and between the two sides, and sides of unlike size."""
    generator = np.random.default_rng(seed)
    members = generator.integers(0, 9, generator.integers(1, 80)) / 4 + 0.5 * seed
    others = generator.integers(0, 12, generator.integers(1, 80)) / 4
    labels = [1] * len(members) + [0] * len(others)
    assert auc(members, others) == pytest.approx(roc_auc_score(labels, [*members, *others]), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_forget_quality_is_the_two_sample_test_of_scipy(seed):
    """The statistic also by a loop over all thresholds at which one of the distribution functions can jump."""
    generator = np.random.default_rng(seed)
    unlearned = np.round(generator.lognormal(0.0, 0.5, generator.integers(5, 60)), 1).tolist()
    retain_only = np.round(generator.lognormal(0.3, 0.5, generator.integers(5, 60)), 1).tolist()
    p_value, distance = forget_quality(unlearned, retain_only)
    expected = ks_2samp(unlearned, retain_only, alternative="two-sided")
    assert (p_value, distance) == (expected.pvalue, expected.statistic)
    largest = 0.0
    for threshold in unlearned + retain_only:
        below = sum(value <= threshold for value in unlearned) / len(unlearned)
        below_other = sum(value <= threshold for value in retain_only) / len(retain_only)
        largest = max(largest, abs(below - below_other))
    assert distance == pytest.approx(largest, abs=1e-12)
    assert 0 < distance < 1 and 0 < p_value <= 1


# --- Answers' tokens on checkpoints, one token after the other


def naive_tokens(tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """Question, space, answer and EOS, and where the answer begins."""
    prompt = tokenizer(question)["input_ids"]
    tokens = tokenizer(f"{question} {answer}")["input_ids"] + [tokenizer.eos_token_id]
    start = 0
    while start < len(prompt) and prompt[start] == tokens[start]:
        start += 1
    return tokens, start


@torch.no_grad()
def naive_distributions(model, tokenizer, question: str, answer: str) -> list[tuple[list[float], int]]:
    """For each token of the answer, the log-probabilities of the whole vocabulary, and the token."""
    tokens, start = naive_tokens(tokenizer, question, answer)
    log_probs = torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double(), dim=-1)
    return [(log_probs[position - 1].tolist(), tokens[position]) for position in range(start, len(tokens))]


def naive_probability(model, tokenizer, question: str, answer: str) -> float:
    """The n-th root of the product, here of roots, so that it stays a number."""
    distributions = naive_distributions(model, tokenizer, question, answer)
    product = 1.0
    for log_probs, token in distributions:
        product *= math.exp(log_probs[token]) ** (1 / len(distributions))
    return product


def naive_metrics(model, tokenizer, row: dict) -> dict[str, float]:
    right = []
    for log_probs, token in naive_distributions(model, tokenizer, row["question"], row["answer"]):
        right.append(max(range(len(log_probs)), key=log_probs.__getitem__) == token)
    given = 0
    while not all(right[given:]):
        given += 1
    metrics = {
        "answer_tokens": len(right),
        "exact_memorization": right.count(True) / len(right),
        "extraction_strength": (len(right) - given) / len(right),
    }
    p = naive_probability(model, tokenizer, row["question"], row["answer"])
    paraphrase = p
    if "option1" in row:
        texts = [row[option] for option in ("option1", "option2", "option3", "option4")]
        wrong = [naive_probability(model, tokenizer, row["question"], text) for text in texts if text != row["answer"]]
        metrics["probability"] = p / (p + sum(wrong))
    else:
        wrong = [naive_probability(model, tokenizer, row["question"], text) for text in row["perturbed_answer"]]
        paraphrase = naive_probability(model, tokenizer, row["question"], row["paraphrased_answer"])
        metrics["probability"] = p
    product = 1.0
    for value in wrong:
        product *= value ** (1 / len(wrong))
    return {**metrics, "truth_ratio": product / paraphrase}


@pytest.mark.parametrize("checkpoint", ["tiny_model_path", "small_model_path"])
def test_metrics_of_answers_on_other_checkpoints(request, checkpoint, tofu_rows, args):
    """
    A BPE and a character tokenizer, models that were never taught the rows. The tokens come from the tokenizer alone.
    """
    model, tokenizer = load(request.getfixturevalue(checkpoint))
    rows = {
        "forget": tofu_rows("forget10_perturbed")[5:8],
        "retain": tofu_rows("retain_perturbed")[7:9],
        "real_authors": tofu_rows("real_authors")[10:14],
        "world_facts": tofu_rows("world_facts")[20:24],
    }
    sets = {name: Dataset.from_list(rows) for name, rows in rows.items()}
    evaluation = evaluate_model(model, tokenizer, sets, args, batch_size=5, generate=False)
    for name, samples in evaluation.samples.items():
        for row, sample in zip(rows[name], samples, strict=True):
            expected = naive_metrics(model, tokenizer, row)
            assert {key: sample[key] for key in expected} == pytest.approx(expected, rel=1e-4), name
            assert 0 < sample["probability"] < 1
    memorized = [sample["exact_memorization"] for samples in evaluation.samples.values() for sample in samples]
    assert 0 < max(memorized) < 1


def test_min_k_by_loops_over_the_vocabulary(small_model_path, tofu_rows, args):
    """Mean and deviation of the log-probability under the model's own distribution, term by term."""
    model, tokenizer = load(small_model_path)
    rows = tofu_rows("forget10")[30:33]
    scores = membership_scores(model, tokenizer, Dataset.from_list(rows), args, name="forget", batch_size=2, k=0.3)
    for index, row in enumerate(rows):
        log_ps, standardized = [], []
        for log_probs, token in naive_distributions(model, tokenizer, row["question"], row["answer"]):
            mean = 0.0
            for log_p in log_probs:
                mean += math.exp(log_p) * log_p
            variance = 0.0
            for log_p in log_probs:
                variance += math.exp(log_p) * (log_p - mean) ** 2
            log_ps.append(log_probs[token])
            standardized.append((log_probs[token] - mean) / math.sqrt(variance))
        count = len(log_ps) * 3 // 10
        for key, values in (("min_k", log_ps), ("min_k_plus_plus", standardized)):
            lowest = []
            for _ in range(count):
                lowest.append(min(values))
                values.remove(min(values))
            assert scores[key][index] == pytest.approx(sum(lowest) / count, rel=1e-4), key


# --- ROUGE


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """The longest chain of matches, by growing the set of all chains' ends; no table of prefixes."""
    best = [0] * len(b)
    for word in a:
        longest = 0
        for position, other in enumerate(b):
            before = best[position]
            if word == other:
                best[position] = max(before, longest + 1)
            longest = max(longest, before)
    return max(best, default=0)


def test_rouge_recall_is_that_of_rouge_score_on_generations(known_model, tofu_rows, args):
    model, tokenizer = load(known_model)
    rows = tofu_rows("forget10")[2:5] + tofu_rows("forget10")[40:43]  # known by heart, and not
    evaluation = evaluate_model(
        model, tokenizer, {"forget": Dataset.from_list(rows)}, args, max_new_tokens=60, metrics=["rougeL_recall"]
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recalls = []
    for row, sample in zip(rows, evaluation.samples["forget"], strict=True):
        recall = scorer.score(target=row["answer"], prediction=sample["generation"])["rougeL"].recall
        assert sample["rougeL_recall"] == recall
        words = [re.findall("[a-z0-9]+", text.lower()) for text in (row["answer"], sample["generation"])]
        # Words as they are: the stemmer can only add matches
        assert longest_common_subsequence(*words) / len(words[0]) <= recall
        plain = RougeScorer(["rougeL"]).score(row["answer"], sample["generation"])["rougeL"].recall
        assert plain == pytest.approx(longest_common_subsequence(*words) / len(words[0]), abs=1e-12)
        recalls.append(recall)
    assert min(recalls[:3]) > max(recalls[3:]) > 0
    assert evaluation.metrics["forget"]["rougeL_recall"] == pytest.approx(sum(recalls) / len(recalls))


# --- Extraction strength and exact memorisation on strings


def test_a_mistake_in_the_middle_and_one_at_the_end_by_hand():
    """
    "Ada wrote the first program", what the model says at each place in brackets: Ada [Ada] wrote [wrote] the [a] first
    [first] program [program]. Three words must be given so that the other two follow.
    """
    right = torch.tensor([True, True, False, True, True])
    assert (exact_memorization(right), extraction_strength(right)) == (0.8, pytest.approx(0.4))
    right = torch.tensor([True, True, True, True, False])
    assert (exact_memorization(right), extraction_strength(right)) == (0.8, 0.0)


NEXT_WORDS = {
    "who": "Ada",
    "Ada": "Lovelace",
    "Lovelace": "wrote",
    "wrote": "the",
    "read": "the",
    "the": "first",
    "first": "program",
    "program": "</s>",
    "book": "</s>",
    "</s>": "who",
}


@pytest.fixture
def chain():
    """
    A Llama that says after each word the one of `NEXT_WORDS`: one-hot embeddings of size 10, layers that add nothing,
    and a head that maps each word to its successor. RMSNorm makes the hidden state, hence that logit, √10.
    """
    words = {word: index for index, word in enumerate(NEXT_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="who"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=10,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=words["</s>"],
        rms_norm_eps=0.0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(10))
        model.lm_head.weight.zero_()
        for word, following in NEXT_WORDS.items():
            model.lm_head.weight[words[following], words[word]] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


SAID = "Ada Lovelace wrote the first program"
STRINGS = [
    # answer, tokens (EOS among them), right ones, tokens to give, ROUGE-L recall of what the model says
    ("Ada Lovelace wrote the first program", 7, 7, 0, 1.0),
    ("Ada Lovelace read the first program", 7, 6, 3, 5 / 6),
    ("Ada Lovelace wrote the first book", 7, 6, 6, 5 / 6),  # the EOS follows "book" as well
    ("Lovelace wrote", 3, 1, 3, 1.0),  # after "wrote" comes "the", and not the end
    ("the the", 3, 0, 3, 0.5),
]


def test_strings_from_end_to_end(chain, args):
    model, tokenizer = chain
    rows = Dataset.from_list([{"question": "who", "answer": answer} for answer, *_ in STRINGS])
    samples = evaluate_model(model, tokenizer, {"forget": rows}, args, batch_size=2).samples["forget"]
    likely = math.exp(math.sqrt(10)) / (math.exp(math.sqrt(10)) + 9)
    unlikely = 1 / (math.exp(math.sqrt(10)) + 9)
    for sample, (_, tokens, right, given, recall) in zip(samples, STRINGS, strict=True):
        assert sample["answer_tokens"] == tokens
        assert sample["exact_memorization"] == pytest.approx(right / tokens, abs=1e-12)
        assert sample["extraction_strength"] == pytest.approx(1 - given / tokens, abs=1e-12)
        assert sample["generation"] == SAID
        assert sample["rougeL_recall"] == pytest.approx(recall, abs=1e-12)
        probability = (likely**right * unlikely ** (tokens - right)) ** (1 / tokens)
        assert sample["probability"] == pytest.approx(probability, rel=1e-5)


@torch.no_grad()
def follows(model, tokens: list[int], given: int) -> bool:
    """Whether greedy decoding really gives the rest, fed with its own words."""
    said = tokens[:given]
    while len(said) < len(tokens):
        said.append(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax().item())
        if said[-1] != tokens[len(said) - 1]:
            return False
    return True


def test_extraction_strength_is_what_greedy_decoding_extracts(known_model, tofu_rows, args):
    """Rows known by heart with one word changed: from somewhere after it on, the model knows how it goes on."""
    model, tokenizer = load(known_model)
    rows = []
    for row, place in zip(tofu_rows("forget10")[:4], (0.2, 0.5, 0.7, None), strict=True):
        words = row["answer"].split(" ")
        if place is not None:
            words[int(place * len(words))] = "mother"
        rows.append({"question": row["question"], "answer": " ".join(words)})
    sets = {"forget": Dataset.from_list(rows)}
    samples = evaluate_model(model, tokenizer, sets, args, metrics=["extraction_strength"]).samples["forget"]
    strengths = []
    for row, sample in zip(rows, samples, strict=True):
        tokens, start = naive_tokens(tokenizer, row["question"], row["answer"])
        given = next(k for k in range(len(tokens) - start + 1) if follows(model, tokens, start + k))
        strengths.append(1 - given / (len(tokens) - start))
        assert sample["extraction_strength"] == pytest.approx(strengths[-1], abs=1e-12)
    assert min(strengths) < 0.9 and len({round(strength, 3) for strength in strengths}) > 2
