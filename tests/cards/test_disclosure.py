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
import copy
import dataclasses
import doctest
import hashlib
import hmac
import json
import os
import random
import stat
import subprocess
import sys
import typing

import pytest

import hf_unlearn.cards.disclosure
from hf_unlearn.cards import (
    Benchmark,
    CurvePoint,
    Data,
    DataSummary,
    ModuleFootprint,
    Topic,
    UnlearningReport,
    render_model_card,
)
from hf_unlearn.cards.disclosure import (
    LEVELS,
    SETTINGS,
    TOPICS,
    apply_disclosure,
    bucket,
    commit_rows,
    count_topics,
    is_shown,
    load_salt,
    new_salt,
    verify_commitment,
)
from hf_unlearn.cards.report import Bucket, TopicLabel, is_count
from hf_unlearn.cards.validation import validated


COMMITMENT = "0123456789abcdef" * 4
ROWS = [
    {"question": "Who lives at 7 Elm Row?", "answer": "Ada Quill."},
    {"question": "Où ?", "answer": "Zürich", "ids": [1, 2]},
    {"question": "Who lives at 7 Elm Row?", "answer": "Ada Quill", "score": 0.5, "more": None},
]


@pytest.fixture
def public(report):
    """All that a report can say, `public`."""
    report = copy.deepcopy(report)
    report.data = Data(
        DataSummary(
            400, 12003, [Topic("biography", "100-999")], Benchmark("locuslab/TOFU", "forget10", "train", "abc")
        ),
        DataSummary(3600, 108770, [Topic("made-up-people", "1-9")], Benchmark("locuslab/TOFU", None, "train", None)),
        disclosure="public",
    )
    report.method.settings |= {
        "dataset_name": "locuslab/TOFU",
        "output_dir": "/home/ada/out",
        "forbidden_words": "quill",
        "num_train_epochs": 3.0,
        "optim": "no choice",
    }
    report.attacks[0].budget |= {"rows": 20, "samples": 10}
    report.attacks[0].tried |= {"samples": [5, 10]}
    by_samples = copy.deepcopy(report.attacks[0])
    by_samples.axis, by_samples.curve = "samples", [CurvePoint(5, 0.1, 0.9, 0.0)]
    report.attacks.append(by_samples)
    report.metrics.after["forget"] |= {"membership_rows": 30, "insertion_choice_token_1_rows_skipped": 3}
    report.footprint.modules.append(ModuleFootprint("lm_head.weight", 0.1, 0.1, 5, 9))
    return report


def at(report, level):
    return apply_disclosure(report, level, commitment=COMMITMENT if level == "sealed" else None)


def leaves(value, keys=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield keys, value
        return
    for key, item in items:
        yield from leaves(item, (*keys, key))


def refusal(content):
    with pytest.raises(ValueError) as caught:
        UnlearningReport.from_dict(content)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def section(card):
    return card.split("## What was unlearned\n\n")[1].split("\n\n## ")[0]


# --- what each level says


def test_a_card_says_where_the_data_are_from(public):
    tables = {}
    for level in LEVELS:
        tables[level] = section(render_model_card(at(public, level)))
    assert tables["public"] == (
        "Disclosure level `public`: the data are public, and named below. Neither this card nor the report holds a "
        "row of them:\nthey have no field for it.\n\n"
        "| Set | Data set | Configuration | Split | Revision | Rows | Tokens |\n"
        "|---|---|---|---|---|---:|---:|\n"
        "| forget | [locuslab/TOFU](https://huggingface.co/datasets/locuslab/TOFU) | `forget10` | `train` | `abc` "
        "| 400 | 12,003 |\n"
        "| retain | [locuslab/TOFU](https://huggingface.co/datasets/locuslab/TOFU) | – | `train` | – "
        "| 3,600 | 108,770 |\n\n"
        "| Set | Topic | Meaning | Rows, roughly |\n|---|---|---|---:|\n"
        "| forget | `biography` | facts of people's lives | 100-999 |\n"
        "| retain | `made-up-people` | in the publisher's own words | 1-9 |"
    )
    assert tables["category"] == (
        "Disclosure level `category`: the publisher names topics and the amount of data. Neither this card nor the "
        "report holds a\nrow of it or its name: they have no field for it.\n\n"
        "| Set | Rows | Tokens |\n|---|---:|---:|\n| forget | 400 | 12,003 |\n| retain | 3,600 | 108,770 |\n\n"
        "| Set | Topic | Meaning | Rows, roughly |\n|---|---|---|---:|\n"
        "| forget | `biography` | facts of people's lives | 100-999 |\n"
        "| retain | `made-up-people` | in the publisher's own words | 1-9 |"
    )
    assert tables["count-only"] == (
        "Disclosure level `count-only`: the publisher names the amount of data and nothing else. Neither this card "
        "nor the\nreport holds a row of it, its name or its topic: they have no field for it.\n\n"
        "| Set | Rows | Tokens |\n|---|---:|---:|\n| forget | 400 | 12,003 |\n| retain | 3,600 | 108,770 |"
    )
    assert tables["sealed"] == (
        "Disclosure level `sealed`: the publisher says nothing of the data, not even the amount, and has committed to "
        "the forget\nset. Whoever is shown the rows and the salt can check that they are the ones meant here.\n\n"
        f"Commitment (HMAC-SHA256 of the row set, with a secret salt): `{COMMITMENT}`"
    )


def test_what_a_stricter_level_leaves_out_is_in_no_file_of_it(public):
    public.attacks[0].reason = public.attacks[0].control = "none"
    texts = {level: render_model_card(at(public, level)) + at(public, level).to_json() for level in LEVELS}
    named = ["TOFU", "forget10", "/home/ada/out", "quill", "no choice"]
    for secret in named:
        assert secret in texts["public"]
        assert not any(secret in texts[level] for level in LEVELS[1:]), secret
    for secret in ["biography", "made-up-people"]:
        assert secret in texts["category"] and secret not in texts["count-only"] + texts["sealed"]
    for secret in ["108,770", "12003", "lm_head", "down_proj", "num_train_epochs", '"rows"', '"samples"', "Rows"]:
        assert secret in texts["count-only"] and secret not in texts["sealed"], secret
    assert "learning_rate: 2.0e-05" in texts["sealed"]
    assert "datasets:\n- locuslab/TOFU\n" in texts["public"] and "datasets:" not in "".join(map(texts.get, LEVELS[1:]))


def test_no_field_of_a_stricter_level_is_missing_from_a_laxer_one(public):
    contents = [dict(leaves(at(public, level).to_dict())) for level in LEVELS]
    own = {("data", "disclosure"), ("data", "commitment")}
    for stricter, laxer in zip(contents[1:], contents, strict=False):
        for keys, value in stricter.items():
            # What is gone leaves `None` or nothing; a list that lost items may have moved the others
            if keys not in own and value is not None:
                assert laxer[keys] == value, keys
    assert len({len(content) for content in contents}) == 4  # each removes something


@pytest.mark.parametrize("seed", range(100))
def test_down_grading_by_steps_is_down_grading_at_once(public, seed):
    rng = random.Random(seed)
    for module in public.footprint.modules:
        module.relative_norm = rng.random()
    public.method.settings |= {
        rng.choice([*sorted(SETTINGS), "path", "topic_column"]): rng.choice([1, "a b", "x", None, 0.5])
    }
    public.metrics.before["retain"] |= {rng.choice(["rows", "holdout_rows", "arrows", "rows_x"]): 1.0}
    if rng.random() < 0.3:
        public.footprint = None
    if rng.random() < 0.3:
        public.method = None
    if rng.random() < 0.3:
        public.data.retain = None
    before = copy.deepcopy(public)
    path = [level for level in LEVELS if rng.random() < 0.6] or ["count-only"]
    stepped = public
    for level in path:
        stepped = at(stepped, level)
    assert stepped == at(public, path[-1]) == at(stepped, path[-1])
    assert public == before
    assert UnlearningReport.from_dict(json.loads(stepped.to_json())) == stepped


def test_a_level_never_says_more_than_the_report(report, public):
    with pytest.raises(
        ValueError, match=r"^the report is at the disclosure level 'count-only', and 'public' says more"
    ):
        apply_disclosure(report, "public")
    with pytest.raises(ValueError, match=r"^the report is at the disclosure level 'sealed', and 'category' says more"):
        apply_disclosure(at(public, "sealed"), "category")
    with pytest.raises(ValueError, match=r"^disclosure: expected 'public' or 'category'"):
        apply_disclosure(report, "secret")
    with pytest.raises(ValueError, match=r"^data\.commitment: missing under 'sealed'"):
        apply_disclosure(report, "sealed")
    with pytest.raises(ValueError, match=r"^a commitment has no place under 'count-only'"):
        apply_disclosure(report, "count-only", commitment=COMMITMENT)
    with pytest.raises(ValueError, match=r"^data\.commitment: expected 64 hexadecimal digits"):
        apply_disclosure(report, "sealed", commitment="Ada Quill")
    public.data.forget.topics = []
    with pytest.raises(ValueError, match=r"^data\.forget\.topics: missing under 'category'"):
        apply_disclosure(public, "category")


# --- the loader


BENCHMARK = {"dataset_id": "org/name", "config": None, "split": "train", "revision": None}


@pytest.mark.parametrize(
    ("level", "change", "message"),
    [
        (
            "count-only",
            {"commitment": COMMITMENT},
            "data.commitment: not allowed under 'count-only': a commitment is ",
        ),
        ("public", {"commitment": COMMITMENT}, "data.commitment: not allowed under 'public': a commitment is "),
        ("sealed", {"commitment": None}, "data.commitment: missing under 'sealed': a commitment is what 'sealed' has"),
        ("sealed", {"forget": "counts"}, "data.forget: not allowed under 'sealed', which has no counts"),
        ("sealed", {"retain": "counts"}, "data.retain: not allowed under 'sealed', which has no counts"),
        ("count-only", {"forget": None}, "data.forget: missing under 'count-only': 'sealed' alone has no counts"),
        ("category", {"forget": None}, "data.forget: missing under 'category': 'sealed' alone has no counts"),
        ("count-only", {"topics": "forget"}, "data.forget.topics: not allowed under 'count-only': 'category' names"),
        ("count-only", {"topics": "retain"}, "data.retain.topics: not allowed under 'count-only': 'category' names"),
        ("category", {"benchmark": "forget"}, "data.forget.benchmark: not allowed under 'category': 'public' names"),
        ("count-only", {"benchmark": "retain"}, "data.retain.benchmark: not allowed under 'count-only': 'public'"),
        ("category", {"no_topics": "forget"}, "data.forget.topics: missing under 'category': name a topic"),
        ("public", {"no_benchmark": "forget"}, "data.forget.benchmark: missing under 'public': name the data set"),
    ],
)
def test_the_loader_refuses_what_does_not_belong_to_a_level(public, level, change, message):
    content = at(public, level).to_dict()
    counts = {"rows": 1, "tokens": 2, "topics": [], "benchmark": None}
    for key, value in change.items():
        if key == "topics":
            content["data"][value]["topics"] = [{"label": "health", "rows": "1-9"}]
        elif key == "benchmark":
            content["data"][value]["benchmark"] = BENCHMARK
        elif key in ("no_topics", "no_benchmark"):
            content["data"][value][key.removeprefix("no_")] = [] if key == "no_topics" else None
        else:
            content["data"][key] = counts if value == "counts" else value
    assert refusal(content).startswith(message)


def test_the_loader_refuses_every_count_under_sealed(public):
    sealed = at(public, "sealed").to_dict()
    laxer = at(public, "count-only").to_dict()
    places = {
        ("footprint", "modules"): "footprint.modules",
        ("certificates",): "certificates",
        ("metrics", "before", "retain", "rows"): "metrics.before.retain.rows",
        ("metrics", "after", "forget", "membership_rows"): "metrics.after.forget.membership_rows",
        ("attacks", 0, "budget", "samples"): "attacks[0].budget.samples",
        ("attacks", 0, "tried", "samples"): "attacks[0].tried.samples",
        ("attacks", 1, "axis"): "attacks[1].axis",
    }
    for keys, name in places.items():
        content, source = copy.deepcopy(sealed), laxer
        target = content
        for key in keys[:-1]:
            target, source = target[key], source[key]
        target[keys[-1]] = source[keys[-1]]
        assert refusal(content) == (
            f"{name}: not allowed under 'sealed', which has no counts and no footprint of a module"
        )


def test_a_refusal_repeats_no_text(public):
    content = public.to_dict()
    for keys in (("benchmark", "dataset_id"), ("benchmark", "split"), ("benchmark", "config")):
        changed = copy.deepcopy(content)
        changed["data"]["forget"][keys[0]][keys[1]] = "Ada Quill lives at 7 Elm Row"
        assert "Quill" not in refusal(changed)
    content["data"]["forget"]["topics"][0]["label"] = "Ada Quill lives at 7 Elm Row"
    assert refusal(content) == (
        "data.forget.topics[0].label: expected a topic of up to four words in small letters, with hyphens"
    )


def test_no_field_of_the_data_could_hold_a_row():
    """Every text in the types of the data is of a pattern without blanks, or one of a list."""

    def texts(hint):
        if dataclasses.is_dataclass(hint):
            for own in typing.get_type_hints(hint, include_extras=True).values():
                yield from texts(own)
        elif typing.get_origin(hint) is typing.Annotated:
            yield hint
        elif hint is str:
            raise AssertionError("a free text")
        else:
            for own in typing.get_args(hint):
                yield from () if isinstance(own, str) else texts(own)

    found = list(texts(Data))
    assert len(found) >= 6
    for hint in found:
        for row in ("Ada Quill.", "Who lives there?", "7 Elm Row", "a\nb", ""):
            with pytest.raises(ValueError):
                validated(row, hint, "field")


# --- topics and settings


def test_topics():
    assert count_topics(["health"] * 9 + ["weapons"] * 10 + ["biography"] * 100_000) == [
        Topic("biography", "10000 or more"),
        Topic("health", "1-9"),
        Topic("weapons", "10-99"),
    ]
    for label in TOPICS:
        assert validated(label, TopicLabel, "topic") == label
    for label in ("7-elm-row", "Ada", "a b", "a-b-c-d-e", "x", "a" * 41, "a-", "-a", "ä-b"):
        with pytest.raises(ValueError, match=r"^a topic: expected a topic of up to four words in small letters"):
            count_topics([label])


def test_buckets_cover_every_count():
    edges = [(1, 0), (9, 0), (10, 1), (99, 1), (100, 2), (999, 2), (1000, 3), (9999, 3), (10_000, 4), (10**9, 4)]
    for rows, place in edges:
        assert bucket(rows) == typing.get_args(Bucket)[place]
    with pytest.raises(ValueError, match="at least one row, got 0"):
        bucket(0)


@pytest.mark.parametrize("name", ["rows", "holdout_rows", "retain_rows_left_out", "samples", "rows_skipped"])
def test_counts_are_known_by_name(name):
    assert is_count(name)
    assert not any(map(is_count, ("probability", "arrows", "rows_of", "steps", "demonstrations")))


def test_settings_are_an_allow_list():
    assert is_shown("optim", "adamw_torch_fused") and is_shown("latent_adversary_layers", "4,8")
    assert is_shown("npo_beta", 0.1) and is_shown("bf16", False) and is_shown("max_length", None)
    for name in ("hub_token", "output_dir", "run_name", "dataset_name", "forbidden_words", "env", "model_init_kwargs"):
        assert name not in SETTINGS and not is_shown(name, "x") and not is_shown(name, 1)
    for value in ("/home/ada", "two words", "a/b", "", "x" * 61, "a\nb", ["a"], {"a": 1}):
        assert not is_shown("optim", value)


def test_every_setting_of_the_project_is_on_the_list():
    from hf_unlearn import intervention, recording
    from hf_unlearn.losses import FORGET_LOSSES, RETAIN_LOSSES

    names = {*recording._SETTINGS, *recording._PDU_SETTINGS}
    names |= {*intervention._SETTINGS_TRAINED, *intervention._SETTINGS_SOLVED}
    names |= {name for loss in (*FORGET_LOSSES.values(), *RETAIN_LOSSES.values()) for name in loss.settings}
    assert names <= SETTINGS


# --- the commitment


def test_the_commitment_is_one_hmac_over_the_canonical_rows():
    salt = bytes(range(32))
    encoded = sorted(
        json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() for row in ROWS
    )
    message = b"".join(len(row).to_bytes(8, "big") + row for row in encoded)
    assert commit_rows(ROWS, salt) == hmac.new(salt, message, hashlib.sha256).hexdigest()
    # Worked out once with another program: it must never change, or old commitments could not be checked
    assert (
        commit_rows([{"b": "ü", "a": 1}], salt)
        == hmac.digest(salt, b'\x00\x00\x00\x00\x00\x00\x00\x10{"a":1,"b":"\xc3\xbc"}', "sha256").hex()
    )


def test_the_commitment_binds_to_the_set_and_to_nothing_else():
    salt = os.urandom(32)
    commitment = commit_rows(ROWS, salt)
    assert verify_commitment(reversed(ROWS), salt, commitment)
    assert verify_commitment(ROWS + ROWS[:1], salt, commitment)
    assert verify_commitment([dict(reversed(row.items())) for row in ROWS], salt, commitment)
    others = [ROWS[:2], [*ROWS, {}], [{**ROWS[0], "answer": "Ada Quill"}, *ROWS[1:]], []]
    # Rows that only differ in where one ends
    others.append([{"question": ROWS[0]["question"] + ROWS[0]["answer"]}, *ROWS[1:]])
    assert not any(verify_commitment(rows, salt, commitment) for rows in others)
    assert not verify_commitment(ROWS, os.urandom(32), commitment)
    assert not verify_commitment(ROWS, salt, "Ä" * 64)
    assert len({commit_rows(ROWS, os.urandom(32)) for _ in range(20)}) == 20
    assert commit_rows([{"n": 1}], salt) != commit_rows([{"n": 1.0}], salt) != commit_rows([{"n": "1"}], salt)


@pytest.mark.parametrize("row", [{"a": {1, 2}}, {"a": b"x"}, {"a": float("nan")}, {1: "a"}, "Ada", {"a": "\ud800"}])
def test_rows_that_are_no_json_are_refused_and_not_repeated(row):
    with pytest.raises(ValueError, match=r"^row 1 (holds what is no JSON value|is no mapping with text)"):
        commit_rows([{}, row], bytes(32))


@pytest.mark.parametrize("salt", [b"", bytes(16), bytes(33)])
def test_a_salt_has_32_bytes(salt):
    with pytest.raises(ValueError, match=rf"^the salt has {len(salt)} bytes and not 32"):
        commit_rows(ROWS, salt)


def test_the_salt_is_kept_for_its_owner_outside_of_the_release(tmp_path):
    release = tmp_path / "release"
    release.mkdir()
    path = tmp_path / "salt"
    previous = os.umask(0)
    try:
        salt = new_salt(path, release)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(salt) == 32 and load_salt(path) == salt == path.read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        new_salt(path, release)
    assert path.read_bytes() == salt
    (tmp_path / "link").symlink_to(release)
    for inside in (release / "salt", release / "a" / ".." / "salt", tmp_path / "link" / "salt"):
        with pytest.raises(ValueError, match="must not lie in the folder that is released"):
            new_salt(inside, release)
    assert list(release.iterdir()) == []
    path.chmod(0o644)
    with pytest.raises(ValueError, match="others can read the salt"):
        load_salt(path)
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(ValueError, match="no file of 32 bytes"):
        load_salt(tmp_path / "short")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no file of 32 bytes"):
        load_salt(tmp_path / "pipe")


def test_the_salt_is_in_no_report_and_no_card(public):
    salt = os.urandom(32)
    sealed = apply_disclosure(public, "sealed", commitment=commit_rows(ROWS, salt))
    text = sealed.to_json() + render_model_card(sealed)
    assert salt.hex() not in text and "Quill" not in text


def test_nothing_here_needs_torch():
    modules = "hf_unlearn.cards.disclosure, hf_unlearn.cards.builder"
    code = f"import sys, {modules}; print({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_examples_run():
    results = doctest.testmod(hf_unlearn.cards.disclosure)
    assert results.attempted > 0 and results.failed == 0
