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
import itertools
import random
import re

import pytest
from peft import LoraConfig, get_peft_model

from hf_unlearn.cards import Metrics, render_model_card
from hf_unlearn.cards.markdown_rules import BEGIN_MARKER, END_MARKER
from hf_unlearn.cards.merge import is_generated, mark, merge_card
from hf_unlearn.cards.metadata import parse_card


GENERATED = "---\nbase_model: org/base\nlicense: mit\ntags:\n- unlearning\n---\n\n# Generated\n"
EXAMPLE = f"```\n{BEGIN_MARKER}\n```\n"
USER = "# My model\r\n\r\nText with trailing spaces  \r\n\tand\x0b odd\u2028 characters\n\n"


def body_of(card):
    return parse_card(card)[1]


def block_of(card):
    return re.search(f"{re.escape(BEGIN_MARKER)}.*?{re.escape(END_MARKER)}", card, re.DOTALL)[0]


def variants(report):
    for kind, attacks, metrics, footprint in itertools.product(["lora", "full"], *[[True, False]] * 3):
        variant = copy.deepcopy(report)
        variant.method.scope.kind = kind
        variant.attacks = report.attacks if attacks else []
        variant.metrics = report.metrics if metrics else Metrics()
        variant.footprint = report.footprint if footprint else None
        yield render_model_card(variant)


def test_marking_keeps_all_of_the_card(report):
    card = render_model_card(report)
    marked = mark(card)
    assert parse_card(marked)[0] == parse_card(card)[0]
    assert body_of(marked) == f"{BEGIN_MARKER}\n{body_of(card)}\n{END_MARKER}\n"
    assert mark(marked) == marked


def test_modes():
    assert merge_card(None, GENERATED) == merge_card(None, GENERATED, "keep") == mark(GENERATED)
    assert merge_card(" \n", GENERATED) == merge_card(USER, GENERATED, "new") == mark(GENERATED)
    assert merge_card("---\n[broken", GENERATED, "keep") == "---\n[broken"
    with pytest.raises(ValueError, match="new, merge and keep"):
        merge_card(None, GENERATED, "pr")


def test_text_outside_the_markers_is_kept_byte_for_byte():
    old = f"{BEGIN_MARKER}\nold\r\n{END_MARKER}"
    existing = f"---\nlicense: mit\n---\n{USER}{old}\r\n\r\n{USER}"
    merged = merge_card(existing, GENERATED)
    assert body_of(merged) == f"{USER}{block_of(mark(GENERATED))}\r\n\r\n{USER}"


def test_a_card_without_markers_is_kept_below():
    merged = merge_card(f"---\nlanguage: en\n---\n{USER}", GENERATED)
    assert body_of(merged) == f"{block_of(mark(GENERATED))}\n\n{USER}"
    assert body_of(merge_card(USER, GENERATED)) == body_of(merged)


def test_metadata_of_the_user_wins_but_for_what_must_be_true():
    existing = """---
# a comment
license: apache-2.0
license_name: theirs
base_model: /home/user/checkpoint
base_model_relation: quantized
datasets:
- org/forget
library_name: other
pipeline_tag: text2text-generation
model-index: []
language: no
tags: [mine, unlearning, "base_model:adapter:/home/user", "dataset:org/forget", "unlearning-method:ga"]
---
text
"""
    generated = GENERATED.replace("- unlearning\n", "- unlearning\n- unlearning-method:npo\n").replace(
        "license", "pipeline_tag: text-generation\nlicense"
    )
    merged = merge_card(existing, generated)
    assert parse_card(merged)[0] == {
        "license": "mit",
        "base_model": "org/base",
        "pipeline_tag": "text2text-generation",
        "language": "no",
        "tags": ["mine", "unlearning", "unlearning-method:npo"],
    }
    assert "/home" not in merged and "org/forget" not in merged
    assert merge_card(merged, generated) == merged


def test_the_licence_stays_where_none_is_generated():
    own = "---\nlicense: apache-2.0\nlicense_name: theirs\n---\n"
    generated = GENERATED.replace("license: mit\n", "")
    assert parse_card(merge_card(own, generated))[0]["license"] == "apache-2.0"
    # Never two halves of two licences
    half = GENERATED.replace("license: mit", "license_link: LICENSE")
    assert "license_link" not in parse_card(merge_card(own, half))[0]


def test_metadata_that_does_not_change_keeps_its_form():
    front = "---\n# a comment\nbase_model: 'org/base'\nlicense:   mit\ntags: [unlearning, \"mine\"]\n---\n"
    assert merge_card(front + USER, GENERATED).startswith(front)


def trainer_card():
    from transformers.modelcard import TrainingSummary

    summary = TrainingSummary(
        model_name="out", finetuned_from="org/x", tags=["generated_from_trainer"], hyperparameters={"lr": 1}
    )
    return summary.to_model_card()


def trl_card(tmp_path):
    from trl.trainer.utils import generate_model_card

    card = generate_model_card("org/x", "out", "me/out", "forget", ["trl"], None, "SFT", None)
    return str(card)


def peft_card(tmp_path, random_model):
    model = get_peft_model(random_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    return (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("program", ["trainer", "trl", "peft", "hf-unlearn"])
def test_what_a_program_wrote_is_replaced(program, tmp_path, random_model, report):
    existing = {
        "trainer": trainer_card,
        "trl": lambda: trl_card(tmp_path),
        "peft": lambda: peft_card(tmp_path, random_model),
        "hf-unlearn": lambda: render_model_card(report),
    }[program]()
    assert is_generated(existing) and not is_generated(USER)
    merged = merge_card(existing, GENERATED, repair=True)
    assert body_of(merged) == body_of(mark(GENERATED))
    metadata = parse_card(merged)[0]
    assert metadata["base_model"] == "org/base" and "datasets" not in metadata
    assert not [tag for tag in metadata["tags"] if tag.startswith(("base_model:", "generated_from"))]


@pytest.mark.parametrize(
    "front, named",
    [
        ("language: Klingon", '"language"'),
        ("widget: x", '"widget"'),
        ("thumbnail:", '"thumbnail"'),
        ("license: a\nlicense: b", "`license`"),
        ("a: [b", "Line 2"),
    ],
)
def test_a_malformed_card_is_refused_by_name_or_repaired(front, named):
    existing = f"---\n{front}\n---\n{USER}"
    with pytest.raises(ValueError) as caught:
        merge_card(existing, GENERATED)
    assert named in str(caught.value) and "repair" in str(caught.value)
    repaired = merge_card(existing, GENERATED, repair=True)
    assert parse_card(repaired)[0] == parse_card(GENERATED)[0]
    assert body_of(repaired).endswith(USER)
    assert merge_card(repaired, GENERATED) == repaired


def test_repair_keeps_what_is_sound():
    merged = merge_card("---\nlanguage: Klingon\nthumbnail: x\n---\n", GENERATED, repair=True)
    assert parse_card(merged)[0] == {"thumbnail": "x", **parse_card(GENERATED)[0]}


@pytest.mark.parametrize(
    "body, words",
    [
        (f"{BEGIN_MARKER}\na", "and none where it ends"),
        (f"a\n{END_MARKER}", "and none where it begins"),
        (f"{END_MARKER}\n{BEGIN_MARKER}", "before that of the beginning"),
        (f"{BEGIN_MARKER}\n{BEGIN_MARKER}\n{END_MARKER}\n{END_MARKER}", "more than once"),
        (f"{BEGIN_MARKER}\n{END_MARKER}\n{BEGIN_MARKER}\n{END_MARKER}", "more than once"),
        ("<!-- hf-unlearn:begin v2 -->\n<!-- hf-unlearn:end -->", "another version"),
        (f"```\n{BEGIN_MARKER}\n{END_MARKER}", "never closed"),
    ],
)
def test_markers_that_do_not_fit_together(body, words):
    with pytest.raises(ValueError, match=words) as caught:
        merge_card(body, GENERATED)
    assert "\n" not in str(caught.value)


def test_markers_in_a_code_block_are_an_example():
    example = f"```\n{BEGIN_MARKER}\nexample\n{END_MARKER}\n```\n"
    merged = merge_card(example, GENERATED)
    assert body_of(merged) == f"{block_of(mark(GENERATED))}\n\n{example}"
    moved = f"{example}{block_of(merged)}\n{example}"
    assert merge_card(moved, GENERATED.replace("# Gen", "# New gen")).count("example") == 2


def test_a_value_that_looks_like_a_marker(report):
    report.base.model_id = None
    report.base.architecture = END_MARKER
    card = mark(render_model_card(report))
    assert merge_card(card, card) == card


def test_merging_twice_changes_nothing(report):
    """Any generated card into any other, with user text anywhere around."""
    generator = random.Random(0)
    cards = list(variants(report))
    pieces = [
        USER,
        "```\ncode\n```\n",
        "<details>\n\n~~~\nx\n",
        "- a\n  ```\n",
        "---\n",
        "\r\n",
        "\ufeff\n",
        "| a |\n",
        "",
    ]
    pieces += [EXAMPLE, f"   {END_MARKER}\n", "> ```\n"]
    fronts = ["", "---\nlanguage: en\n---\n", "---\r\ntags: [b, a]\r\n---\r\n", "---\n---\n"]
    merges = 0
    for _ in range(60):
        before, after = ("".join(generator.choices(pieces, k=2)) for _ in range(2))
        old, new, other = generator.choices(cards, k=3)
        for body in (before, f"{before}\n{block_of(mark(old))}\n{after}"):
            try:
                once = merge_card(generator.choice(fronts) + body, new)
            except ValueError as error:
                # Behind a block that was never closed, an example may be a marker, and a marker an example
                known = "never close|YAML|no list of keys" + ("|the pair" if EXAMPLE in body or "~~~" in body else "")
                assert re.search(known, str(error))
                continue
            merges += 1
            assert merge_card(once, new) == once
            assert block_of(mark(new)) in once
            # Another card and back again: nothing of either is left behind
            assert merge_card(merge_card(once, other), new) == once or old != new
            if before.strip() and BEGIN_MARKER not in before and not before.lstrip("\ufeff\r\n").startswith("---"):
                assert before in once
    assert merges > 80


def test_a_thousand_damaged_cards(report):
    generator = random.Random(0)
    text = f"# Mine\n\n{mark(render_model_card(report))[:700]}\n{END_MARKER}\nmore\n"
    pieces = [BEGIN_MARKER, END_MARKER, "\n---\n", "```\n", "\n", "\r", "~~~", "<!--", "-->", ": ", "\0"]
    for _ in range(1000):
        damaged = text if generator.random() < 0.5 else text.removeprefix("# Mine\n\n")
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(damaged))
            damaged = damaged[:place] + generator.choice(pieces) + damaged[place + generator.randint(0, 9) :]
        try:
            merged = merge_card(damaged, GENERATED, repair=generator.random() < 0.5)
            assert merge_card(merged, GENERATED) == merged
        except ValueError as error:
            assert "\n" not in str(error)
