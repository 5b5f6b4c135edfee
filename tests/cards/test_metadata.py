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
import random
import time

import pytest
from huggingface_hub import ModelCard

from hf_unlearn.cards.card import render_model_card
from hf_unlearn.cards.metadata import check_metadata, metadata_warnings, parse_card, validate_metadata


INDEX = [
    {
        "name": "model",
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": "TOFU", "type": "org/tofu", "config": "forget10", "split": "train"},
                "metrics": [{"type": "probability", "value": 0.5, "name": "Probability"}],
            }
        ],
    }
]


def with_result(**changes):
    result = {**INDEX[0]["results"][0], **changes}
    return {"model-index": [{"name": "model", "results": [{k: v for k, v in result.items() if v is not None}]}]}


def test_front_matter_and_body():
    assert parse_card("---\r\nlicense: mit\r\n---\r\n\r\n# A\r\n") == ({"license": "mit"}, "\r\n# A\r\n")
    assert parse_card("# A\n---\nb: c\n---\n") == ({}, "# A\n---\nb: c\n---\n")
    assert parse_card("---\n---\nx") == ({}, "x")
    assert parse_card("---\n# only a comment\n---") == ({}, "")
    assert parse_card("\ufeff\n---\na: 1\n---   \nx") == ({"a": 1}, "x")
    assert parse_card("---\na: |\n  x\n  --- y\n---\nz") == ({"a": "x\n--- y"}, "z")


def test_scalars_are_those_of_the_hub():
    """Norwegian is a language, and no "no"; a version is no number of base 60, a date no object."""
    text = "---\na: no\nb: on\nc: 1:30\nd: 2024-01-01\ne: 010\nf: 1e-3\ng: 3\n"
    text += "h: true\ni: ~\nj: -1.5\nk: 1e3\n<<: x\n---\n"
    assert parse_card(text)[0] == {
        **{"a": "no", "b": "on", "c": "1:30", "d": "2024-01-01", "e": "010", "f": 0.001, "g": 3, "h": True},
        **{"i": None, "j": -1.5, "k": 1000.0, "<<": "x"},
    }


@pytest.mark.parametrize(
    "front, words",
    [
        ("a: b: secret", "Line 2 of the card is no valid YAML"),
        ("license: mit\ntags: [a, secret\nx: y", "Line 4 of the card is no valid YAML"),
        ("license: mit\n\tsecret: x", "Line 3 of the card is no valid YAML"),
        ("license: mit\na: \x07secret", "Line 3 of the card is no valid YAML"),
        ("license: mit\ntags: []\nlicense: secret", "Line 4 of the card has the key `license` for the second time"),
        ("a:\n  b: 1\n  b: secret", "Line 4 of the card has the key `b` for the second time"),
        ("the secret words: 1\nthe secret words: 2", "Line 3 of the card has a key for the second time"),
        ("a: &secret 1\nb: *secret", "Line 2 of the card has an alias or an anchor"),
        ("a: !!python/object/apply:os.system [secret]", "Line 2 of the card has a YAML tag"),
        ("a: !secret b", "Line 2 of the card has a YAML tag"),
        ("1: secret", "Line 2 of the card has a key that is no text"),
        ("? [secret]\n: x", "Line 2 of the card has a key that is no text"),
        ("- secret", "no list of keys with values"),
        ("secret", "no list of keys with values"),
        ("a: " + "[" * 40 + "]" * 40, "Line 2 of the card is nested too deep"),
        ("a: [" + "1," * 30_000 + "]", "too many values"),
        ("a: " + "x" * 200_000, "longer than 131,072"),
    ],
)
def test_front_matter_that_cannot_be_read_is_named_by_its_line(front, words):
    with pytest.raises(ValueError) as caught:
        parse_card(f"---\n{front}\n---\n# Title\n")
    assert words in str(caught.value) and "\n" not in str(caught.value) and "secret" not in str(caught.value)
    [finding] = check_metadata("README.md", f"---\n{front}\n---\n# Title\n")
    assert finding.rule == "card-metadata"


def test_an_alias_bomb_is_refused_at_once():
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 15)]
    start = time.perf_counter()
    with pytest.raises(ValueError, match="Line 2 of the card has an alias"):
        parse_card("---\n" + "\n".join(levels) + "\n---\n")
    assert time.perf_counter() - start < 1


def test_front_matter_that_is_not_closed():
    with pytest.raises(ValueError, match="never closes it"):
        parse_card("---\nlicense: mit\n# Title\n")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"base_model": ""}, '"base_model" is not allowed to be empty.'),
        ({"base_model": []}, '"base_model" is not allowed to be empty.'),
        ({"base_model": "/home/user/secret"}, '"base_model" is no id of the Hub: write org/name.'),
        ({"base_model": "./secret"}, '"base_model" is no id of the Hub: write org/name.'),
        ({"base_model": "a/b/secret"}, '"base_model" is no id of the Hub: write org/name.'),
        ({"base_model": ["org/name", 3]}, '"base_model[1]" has to be a text.'),
        ({"datasets": ["org/a b"]}, '"datasets[0]" is no id of the Hub: write org/name.'),
        ({"datasets": [None]}, '"datasets[0]" is null: give it a value, or remove it.'),
        ({"datasets": {"a": "b"}}, '"datasets" has to be a text.'),
        ({"widget": {"text": "secret"}}, '"widget" has to be a list.'),
        ({"language": "English"}, '"language" is no ISO 639 code of two or three small letters: write such as en.'),
        (
            {"language": ["en", "xq"]},
            '"language[1]" is no ISO 639 code of two or three small letters: write such as en.',
        ),
        ({"language": False}, '"language" is no ISO 639 code of two or three small letters: write such as en.'),
        ({"license": None}, '"license" is null: give it a value, or remove it.'),
        ({"thumbnail": None}, '"thumbnail" is null: give it a value, or remove it.'),
        ({"tags": ["a", 3]}, '"tags[1]" has to be a text.'),
        ({"tags": "a"}, '"tags" has to be a list.'),
        ({"new_version": "../secret"}, '"new_version" is no id of the Hub: write org/name.'),
        (
            {"license_link": "/home/secret"},
            '"license_link" is neither an https link nor the name of a file of the release.',
        ),
        ({"pipeline_tag": ["a"]}, '"pipeline_tag" has to be a text.'),
        ({"x": float("nan")}, '"x" is no finite number.'),
        ({"x": {"the secret": object()}}, '"x.?" is a object: write a plain number or text.'),
        ({"model-index": {}}, '"model-index" has to be a list.'),
        ({"model-index": [{"results": []}]}, '"model-index[0].name" is missing.'),
        (with_result(metrics=[{"type": "a", "value": float("inf")}]), "metrics[0].value"),
        (with_result(metrics=[{"type": "a", "value": "0.5"}]), 'value" has to be a number.'),
        (with_result(metrics=[{"type": "a", "value": True}]), 'value" has to be a number.'),
        (with_result(dataset={"name": "a", "type": "b", "config": 10}), 'dataset.config" has to be a text.'),
        (with_result(dataset=None), 'results[0].dataset" is missing.'),
    ],
)
def test_what_the_server_refuses(metadata, message):
    metadata = {"base_model": "org/name", **metadata}
    [found] = validate_metadata(metadata)
    assert message in found and "secret" not in found


def test_numbers_of_numpy_are_named():
    import numpy as np

    [found] = validate_metadata(with_result(metrics=[{"type": "a", "value": np.float64(0.5)}]))
    assert "is a float64: write a plain number" in found


def test_what_the_server_takes():
    metadata = {
        **{"base_model": ["org/name", "gpt2"], "base_model_relation": "merge", "datasets": ["org/data", "squad"]},
        **{"language": ["en", "no", "gsw", "code"], "license": "llama3.1", "license_link": "LICENSE", "tags": ["a"]},
        **{"widget": [{"text": "x"}], "model-index": INDEX, "extra_gated_prompt": "x", "co2_eq_emissions": {"a": 0.1}},
    }
    assert validate_metadata(metadata) == metadata_warnings(metadata) == []
    assert validate_metadata({"base_model_relation": "finetune"}) != []


def test_an_unknown_licence_is_a_warning():
    assert validate_metadata({"license": "my-own"}) == []
    assert "no identifier" in metadata_warnings({"license": "my-own"})[0]
    assert "no name" in metadata_warnings({"license": "other"})[0]
    assert metadata_warnings({"license": "other", "license_name": "x"}) == []


def test_generated_cards_pass_and_read_as_the_client_reads_them(report):
    text = render_model_card(report)
    assert check_metadata("README.md", text) == []
    card = ModelCard(text)
    metadata, body = parse_card(text)
    assert metadata == card.data.to_dict() and body == card.text


def test_a_thousand_damaged_cards(report):
    generator = random.Random(0)
    text = render_model_card(report)[:600]
    pieces = [
        "---\n",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "!!int ",
        "|",
        ">",
        "\t",
        "'",
        '"',
        "\0",
        "\n",
        "#",
        "? ",
    ]
    pieces += ["1e999", ".nan", "0x1f", "\u2028", "\ud800", "%YAML 9.9\n", "<<: ", "!!python/name:os.system"]
    refused = 0
    for _ in range(1000):
        damaged = text
        for _ in range(generator.randint(1, 6)):
            place = generator.randrange(len(damaged))
            damaged = damaged[:place] + generator.choice(pieces) + damaged[place + generator.randint(0, 5) :]
        try:
            validate_metadata(parse_card(damaged)[0])
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).endswith(".")
    assert 200 < refused < 1000
