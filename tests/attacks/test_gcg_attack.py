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
"""The adapter of nanogcg: without the package, its error; with it, suffixes that are scored on other rows."""

import copy
import importlib.util
import sys

import pytest
import torch
from datasets import Dataset
from hidden_attacks import CHECKPOINTS, attack_data, attacked_at, unchanged
from prompt_attacks import naive_probability

from hf_unlearn.attacks import gcg as gcg_module
from hf_unlearn.attacks.gcg import BUDGETS, gcg


SETTINGS = {"suffixes": 2, "num_steps": 2, "search_width": 8, "topk": 256}

needs_nanogcg = pytest.mark.skipif(
    importlib.util.find_spec("nanogcg") is None, reason="nanogcg is not installed: pip install nanogcg"
)


def test_without_the_package_the_error_says_what_to_install(tiny_model_path, tofu_rows, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nanogcg", None)  # what an absent package is to `import`
    with pytest.raises(ValueError, match="pip install nanogcg"):
        gcg(attacked_at(tiny_model_path), attack_data(tofu_rows, tmp_path), SETTINGS, seed=0)


@needs_nanogcg
@pytest.mark.parametrize("name", [pytest.param("tinystories-1m", marks=pytest.mark.slow), "tinystories-260k"])
def test_two_runs_agree_and_leave_model_and_tokenizer(data_dir, tofu_rows, tmp_path, name):
    """It gives a tokenizer without a chat template one, and seeds the global generator: neither may stay."""
    attacked, data = attacked_at(data_dir / name), short_rows(attack_data(tofu_rows, tmp_path, num_rows=2))
    with unchanged(attacked.model):
        first = gcg(attacked, data, SETTINGS, seed=0)
    assert attacked.tokenizer.chat_template is None and not torch.are_deterministic_algorithms_enabled()
    assert gcg(attacked, data, SETTINGS, seed=0) == first
    assert [trial.settings["suffix"] for trial in first] == [0, 1]
    for trial in first:
        assert all(isinstance(value, int) for value in trial.settings.values())
        assert len(trial.rows) == 2 and 0 <= trial.score <= 1 and 0 <= trial.utility <= 1


@pytest.fixture
def found(monkeypatch):
    """The suffixes that a run found, which are in no trial."""
    suffixes = []
    search = gcg_module._find_suffix

    def find(*args):
        suffixes.append(search(*args))
        return suffixes[-1]

    monkeypatch.setattr(gcg_module, "_find_suffix", find)
    return suffixes


@needs_nanogcg
@pytest.mark.parametrize("name", [pytest.param("tinystories-1m", marks=pytest.mark.slow), "tinystories-260k"])
def test_the_suffix_raises_the_answer_that_it_was_found_for(data_dir, tofu_rows, tmp_path, found, name):
    """By the forward of the tests, not by the loss that the search reports."""
    attacked, data = attacked_at(data_dir / name), short_rows(attack_data(tofu_rows, tmp_path, num_rows=2))
    data = type(data)(data.train.select([0]), data.held_out, data.retain, data.args, data.batch_size)
    settings = {"suffixes": 5, "num_steps": 8, "search_width": 40, "topk": 32}
    [trial] = gcg(attacked, data, settings, seed=0)  # T has one row, so that there is one suffix
    row = data.train[0]
    plain, begun, after = (
        naive_probability(attacked, f"{row['question']}{suffix}", f" {row['answer']}")
        for suffix in ("", f" {gcg_module._INITIAL_SUFFIX}", f" {found[0]}")
    )
    assert after > 1.3 * max(plain, begun)
    expected = [
        naive_probability(attacked, f"{row['question']} {found[0]}", f" {row['answer']}") for row in data.held_out
    ]
    assert trial.rows == pytest.approx(expected, rel=1e-4)
    assert found[0] not in trial.settings.values()


@needs_nanogcg
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_suffix_has_no_special_tokens_however_small_the_vocabulary(data_dir, tofu_rows, tmp_path, found, name):
    """The search ranks them last, and takes them too where it takes the whole vocabulary."""
    from nanogcg.gcg import sample_ids_from_grad
    from nanogcg.utils import get_nonascii_toks

    attacked, data = attacked_at(data_dir / name), short_rows(attack_data(tofu_rows, tmp_path, num_rows=1))
    [trial] = gcg(attacked, data, {**SETTINGS, "topk": 10**6}, seed=0)
    allowed, others = trial.settings["topk"], get_nonascii_toks(attacked.tokenizer)
    vocabulary = len(attacked.tokenizer)
    assert allowed == vocabulary - len(set(others.tolist())) < vocabulary - 3
    ids = attacked.tokenizer(found[0], add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(attacked.tokenizer.all_special_ids)
    # One more than that is too many
    gradient = torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0))
    begin = torch.full((20,), ids[0])
    with torch.random.fork_rng():
        sampled = [
            sample_ids_from_grad(begin, gradient.clone(), 4000, topk, 1, others) for topk in (allowed, allowed + 1)
        ]
    assert [bool(torch.isin(ids, others).any()) for ids in sampled] == [False, True]


@needs_nanogcg
def test_where_no_candidate_reads_as_it_was_written_the_error_says_what_to_do(tiny_model_path, tofu_rows, tmp_path):
    """With one candidate per step, which other tokens may spell as well."""
    data = short_rows(attack_data(tofu_rows, tmp_path, num_rows=1))
    with pytest.raises(ValueError, match="larger search_width"):
        gcg(attacked_at(tiny_model_path), data, {**SETTINGS, "num_steps": 20, "search_width": 1}, seed=0)


@needs_nanogcg
def test_rows_without_room_for_a_suffix_are_not_chosen(small_model_path, tofu_rows, tmp_path, found):
    """A model of positions that it learned would have no embedding for theirs."""
    data = short_rows(attack_data(tofu_rows, tmp_path, num_rows=2))
    long = {"question": "Who is it? " * 20, "answer": "It is Lily."}
    sets = (data.held_out, data.retain, data.args, data.batch_size)
    attacked = attacked_at(small_model_path)
    settings = {**SETTINGS, "suffixes": 3, "num_steps": 1}
    trials = gcg(attacked, type(data)(Dataset.from_list([long, *data.train]), *sets), settings, seed=0)
    assert len(trials) == len(found) == 2
    with pytest.raises(ValueError, match="None of the 1 rows"):
        gcg(attacked, type(data)(Dataset.from_list([long]), *sets), settings, seed=0)


@needs_nanogcg
def test_of_a_small_budget_nothing_is_written_to_stdout(known_model, tofu_rows, tmp_path, capsys):
    gcg(attacked_at(known_model), attack_data(tofu_rows, tmp_path), BUDGETS["small"], seed=0)
    assert capsys.readouterr().out == ""


@needs_nanogcg
def test_the_suffix_is_scored_on_rows_that_it_was_not_found_on(known_model, tiny_model_path, tofu_rows, tmp_path):
    data = attack_data(tofu_rows, tmp_path)
    settings = {**SETTINGS, "suffixes": 1}
    [known] = gcg(attacked_at(known_model), data, settings, seed=0)
    [never] = gcg(attacked_at(tiny_model_path), data, settings, seed=0)
    assert known.score > 0.3 and never.score < 0.1 and len(known.rows) == len(data.held_out)


@needs_nanogcg
def test_of_a_chat_the_suffix_stands_in_the_turn_of_the_user(known_model, chat_tokenizer, tofu_rows, tmp_path):
    import nanogcg

    attacked = attacked_at(known_model)
    attacked = type(attacked)(attacked.model, chat_tokenizer(), attacked.model)
    template = copy.copy(attacked.tokenizer.chat_template)
    config = nanogcg.GCGConfig(num_steps=1, search_width=8, topk=32, use_prefix_cache=False, verbosity="ERROR")
    row = {
        "prompt": [{"role": "user", "content": "Who is it? {optim_str}"}],
        "completion": [{"role": "assistant", "content": "It is Lily."}],
    }
    assert isinstance(gcg_module._find_suffix(nanogcg, attacked, row, config, seed=0), str)
    assert attacked.tokenizer.chat_template == template
    [trial] = gcg(attacked, attack_data(tofu_rows, tmp_path), {**SETTINGS, "suffixes": 1}, seed=0)
    assert 0 <= trial.score <= 1


def short_rows(data):
    """What fits into 256 characters with a suffix."""
    cut = {
        name: getattr(data, name).map(lambda row: {"question": row["question"][:60], "answer": row["answer"][:60]})
        for name in ("train", "held_out", "retain")
    }
    return type(data)(**cut, args=data.args, batch_size=data.batch_size)
