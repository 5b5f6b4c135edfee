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
TOFU and MUSE from folders of the same layout as their repositories on the Hub: what is read from where, and what is
said where something is missing.
"""

import json
import logging
from pathlib import Path

import datasets
import pytest

from hf_unlearn import UnlearnConfig
from hf_unlearn.data import prepare_dataset
from hf_unlearn.metrics.rows import prepare_rows
from hf_unlearn.presets import PRESETS, load_muse, load_tofu


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What `datasets` builds from the folders goes with them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(folder: Path, splits: dict[tuple[str, str], list[dict]]) -> str:
    """A folder with the `configs` section of a data set's card; a configuration without folders has its own file."""
    lines, configurations = ["---", "configs:"], {}
    for (configuration, split), rows in splits.items():
        configurations.setdefault(configuration, []).append(split)
        path = folder / configuration / f"{split}-00000-of-00001.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for configuration, names in configurations.items():
        lines += [f"- config_name: {configuration}", "  data_files:"]
        for split in names:
            lines += [f"  - split: {split}", f"    path: {configuration}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A data set", ""]), encoding="utf-8")
    return str(folder)


def tofu_splits(tofu_rows) -> dict[tuple[str, str], list[dict]]:
    """TOFU's configurations, each with other rows so that one read for another shows."""
    forget, retain = tofu_rows("forget10_perturbed"), tofu_rows("retain_perturbed")
    choices = {
        name: [
            {
                "question": row["question"],
                "answer": row["answer"],
                "perturbed_answer": [row[f"option{n}"] for n in range(1, 5) if row[f"option{n}"] != row["answer"]],
            }
            for row in tofu_rows(name)
        ]
        for name in ("real_authors", "world_facts")
    }
    plain = [{"question": row["question"], "answer": row["answer"]} for row in retain]
    return {
        ("forget01", "train"): plain[:1],
        ("forget01_perturbed", "train"): forget[-1:],
        ("forget05_perturbed", "train"): forget[-2:],
        ("forget10", "train"): plain[:1],
        ("forget10_perturbed", "train"): forget[-3:],
        ("retain90", "train"): plain[:1],
        ("retain_perturbed", "train"): retain[:4],
        ("real_authors", "train"): plain[:1],
        ("real_authors_perturbed", "train"): choices["real_authors"][:5],
        ("world_facts_perturbed", "train"): choices["world_facts"][:6],
        ("holdout01", "train"): plain[100:101],
        ("holdout10", "train"): plain[200:203],
    }


MUSE = {
    ("verbmem", "forget"): [{"prompt": "It was", "gt": "a dark night."}, {"prompt": "They", "gt": "left."}],
    ("knowmem", "forget_qa"): [{"question": "Who left?", "answer": "Tom"}],
    ("knowmem", "retain_qa"): [{"question": "Who stayed?", "answer": "Lily"}],
    ("knowmem", "forget_qa_icl"): [{"question": "Who came?", "answer": "Ben"}],
    ("knowmem", "retain_qa_icl"): [{"question": "Who sat?", "answer": "Max"}],
    ("privleak", "forget"): [{"text": "leaked"}],
    ("privleak", "retain"): [{"text": "kept"}],
    ("privleak", "holdout"): [{"text": "unseen"}],
    ("raw", "forget"): [{"text": "a book"}],
    ("raw", "retain1"): [{"text": "a page"}],
    ("raw", "retain2"): [{"text": "another page"}],
    ("raw", "holdout"): [{"text": "an unseen book"}],
    ("train", "forget"): [{"text": "what the model was made with"}],
}


# ---- TOFU ----


@pytest.mark.parametrize(("forget", "rows", "holdout"), [("forget01", 1, 1), ("forget10", 3, 3)])
def test_tofu(tofu_rows, tmp_path, caplog, forget, rows, holdout):
    splits = tofu_splits(tofu_rows)
    sets = load_tofu(forget, write(tmp_path / "tofu", splits))
    assert {name: len(some) for name, some in sets.items()} == {
        "forget": rows, "retain": 4, "real_authors": 5, "world_facts": 6, "holdout": holdout,
    }  # fmt: skip
    expected = {
        "forget": f"{forget}_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
        "holdout": forget.replace("forget", "holdout"),
    }
    for name, configuration in expected.items():
        assert list(sets[name]) == splits[configuration, "train"]
    assert not caplog.records


def test_tofu_has_what_the_metrics_need(tofu_rows, tmp_path, tokenizer):
    """The truth ratio of all four sets, and multiple choice where TOFU has it."""
    sets = load_tofu("forget10", write(tmp_path / "tofu", tofu_splits(tofu_rows)))
    args = UnlearnConfig(str(tmp_path / "output"), use_cpu=True)
    for name in ("forget", "retain", "real_authors", "world_facts"):
        prepared = prepare_rows(sets[name], tokenizer, args, name)
        assert prepared.without_truth_ratio is None
        assert prepared.is_multiple_choice == (name in ("real_authors", "world_facts"))
        assert all(row.paraphrase and len(row.wrong) >= 3 for row in prepared.rows)


def test_tofu_without_holdout(tofu_rows, tmp_path, caplog):
    """`holdout05` is not in the folder, as in older copies."""
    source = write(tmp_path / "tofu", tofu_splits(tofu_rows))
    with caplog.at_level(logging.WARNING):
        sets = load_tofu("forget05", source)
    assert set(sets) == {"forget", "retain", "real_authors", "world_facts"} and len(sets["forget"]) == 2
    [message] = [record.getMessage() for record in caplog.records]
    assert message.endswith("has no configuration 'holdout05': the set `holdout` is left out.")


# ---- MUSE ----


def test_muse(tmp_path):
    source = write(tmp_path / "muse", MUSE)
    expected = {
        "forget_passages": ("verbmem", "forget"),
        "forget_questions": ("knowmem", "forget_qa"),
        "retain_questions": ("knowmem", "retain_qa"),
        "forget_demonstrations": ("knowmem", "forget_qa_icl"),
        "retain_demonstrations": ("knowmem", "retain_qa_icl"),
        "forget_texts": ("privleak", "forget"),
        "retain_texts": ("privleak", "retain"),
        "holdout_texts": ("privleak", "holdout"),
        "forget_train": ("raw", "forget"),
        "retain_train": ("raw", "retain1"),
    }
    for sets in (load_muse("news", source), load_muse("books", source)):
        assert {name: list(rows) for name, rows in sets.items()} == {
            name: MUSE[place] for name, place in expected.items()
        }


def test_muse_texts_are_what_training_takes(tmp_path, tokenizer):
    sets = load_muse("books", write(tmp_path / "muse", MUSE))
    args = UnlearnConfig(str(tmp_path / "output"), use_cpu=True)
    [example] = list(prepare_dataset(sets["forget_train"], tokenizer, args, "forget"))
    assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == "a book"


# ---- Both ----


def test_presets_by_name(tofu_rows, tmp_path):
    tofu, muse = write(tmp_path / "tofu", tofu_splits(tofu_rows)), write(tmp_path / "muse", MUSE)
    assert list(PRESETS) == ["tofu", "muse-news", "muse-books"]
    assert len(PRESETS["tofu"](tofu)["forget"]) == 3  # forget10, the default
    assert list(PRESETS["muse-news"](muse)) == list(PRESETS["muse-books"](muse)) == list(load_muse("news", muse))


@pytest.mark.parametrize(
    ("name", "place"),
    [("tofu", "'locuslab/TOFU'"), ("muse-news", "'muse-bench/MUSE-News'"), ("muse-books", "'muse-bench/MUSE-Books'")],
)
def test_an_unreachable_hub(name, place):
    """The tests run offline: the default source is each benchmark's own repository."""
    with pytest.raises(ValueError, match=rf"^{place} \(.*\) cannot be loaded \(ConnectionError\): .*downloaded copy"):
        PRESETS[name](None)


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded .*check the id or folder"):
        load_muse("news", str(tmp_path / "nothing"))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="no forget set 'forget20': choose from forget01, forget05, forget10"):
        load_tofu("forget20", str(tmp_path))
    with pytest.raises(ValueError, match="no corpus 'films': choose from news, books"):
        load_muse("films", str(tmp_path))


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="leave `revision` out"):
        load_muse("news", write(tmp_path / "muse", MUSE), revision="main")


def test_missing_configuration_split_and_column(tofu_rows, tmp_path):
    splits = tofu_splits(tofu_rows)
    del splits["retain_perturbed", "train"]
    with pytest.raises(
        ValueError, match="not have the configuration 'retain_perturbed', split 'train': pass a source"
    ):
        load_tofu(source=write(tmp_path / "tofu", splits))

    # As in the repository's first versions
    renamed = {(config, split.replace("retain_qa", "retain2_qa")): rows for (config, split), rows in MUSE.items()}
    with pytest.raises(ValueError, match="'knowmem', split 'retain_qa': .* another `revision`"):
        load_muse(source=write(tmp_path / "old", renamed))

    without = {**MUSE, ("verbmem", "forget"): [{"prompt": "Secret", "completion": "words"}]}
    with pytest.raises(ValueError, match="has no column `gt`: rename .* which are `prompt`, `gt`") as error:
        load_muse(source=write(tmp_path / "columns", without))
    assert "Secret" not in str(error.value)


def test_a_broken_file_is_not_repeated(tmp_path):
    source = write(tmp_path / "muse", MUSE)
    (tmp_path / "muse" / "verbmem" / "forget-00000-of-00001.json").write_text('{"prompt": "Secret" words')
    # Older versions of `datasets` say a ValueError of such a file, too
    with pytest.raises(ValueError, match="cannot be loaded|does not have the configuration") as error:
        load_muse(source=source)
    assert "Secret" not in str(error.value)
