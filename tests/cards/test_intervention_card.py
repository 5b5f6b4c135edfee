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
"""The card of a model that a constrained intervention changed: no losses, constraints instead."""

import re

import pytest
import yaml

from hf_unlearn.cards import Certificate, FileEntry, Method, Scope, UnlearningReport, render_model_card
from hf_unlearn.cards.interventions import INTERVENTIONS
from hf_unlearn.cards.losses import LOSSES


REVEALS = "> **This release names its forbidden tokens.** Their rows of the LM head changed and no others did: "
REVERSIBLE = "> **This release is reversible.** "


@pytest.fixture
def intervene(report):
    """Factory of reports of one kind of intervention, as a trainer fills them."""

    def build(kind: str, scope: str = "selected", steps: int = 4, **settings) -> UnlearningReport:
        head = kind.startswith("vocabulary")
        report.method = Method(
            name=kind,
            forget_losses=[],
            retain_losses=[],
            scope=Scope(
                scope,
                ["lm_head" if head else "mlp.down_proj"],
                None if head else "2",
                11008,
                12 if scope == "lora" else None,
            ),
            reference=None,
            settings={"epsilon": 1.0, **settings},
            seed=3,
            steps=steps,
        )
        report.certificates = [Certificate("optimality", {"norm": 0.31234, "rank": 12}, "In float64.")]
        report.attacks, report.verdict = [], None
        report.files = [
            FileEntry("adapter_model.safetensors" if scope == "lora" else "model.safetensors", 9, "ab" * 32)
        ]
        return report

    return build


def section(card: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n\n(.*?)\n*(?=^## |\Z)", card, flags=re.MULTILINE | re.DOTALL).group(1)


def test_method_of_an_intervention(intervene):
    card = render_model_card(intervene("pointwise"))
    text = INTERVENTIONS["pointwise"]
    assert section(card, "Method") == (
        "There is no training loss: the weights got the smallest change found that meets constraints. This is our "
        "formulation\nafter [2510.03567](https://huggingface.co/papers/2510.03567), and no reproduction of that "
        "paper.\n\n"
        f"**`pointwise`.** {text.words}\n\n"
        f"$$\n{text.formula}\n$$\n\n"
        "- **Scope:** selected weights in `mlp.down_proj`, layers `2`; 11,008 parameters that could move.\n"
        "- **Run:** 4 rounds, seed 3.\n\n"
        "<details>\n<summary>Settings</summary>\n\n```yaml\nepsilon: 1.0\n```\n\n</details>"
    )
    assert "unlearned with `pointwise` in 4 rounds." in section(card, "Summary")
    assert f"\n- {text.limits}\n" in section(card, "Side effects and limits")
    assert section(card, "Reproduce").startswith(
        "Run hf-unlearn `0.1.0` on the base model with the kind, scope, settings and seed above."
    )
    assert "- **Time of the intervention:** 83.2 s" in card
    # The verdict is that of any other method
    assert "\n**Suppression measured under the metrics below; no attack was run, " in card
    assert "1 round." in section(render_model_card(intervene("pointwise", steps=1)), "Summary")


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_every_kind_has_a_card_without_gaps(intervene, kind):
    card = render_model_card(intervene(kind))
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["tags"] == [
        *("unlearning", "machine-unlearning", "llm-unlearning", "hf-unlearn", f"unlearning-method:{kind}")
    ]
    assert metadata["library_name"] == "transformers"
    assert card.count("\n$$\n") == 2
    assert not re.search(r"training loss is|losses|[Rr]eference model|released weights|None|\n\n\n(?!folder)", card)
    citation = section(card, "Citation")
    assert re.findall(r"^@.*$", citation, flags=re.MULTILINE) == [
        "@article{rezkellah2025constrained,",
        "@software{hf_unlearn,",
    ]
    assert "  author  = {Rezkellah, Fatmazohra and Dakhmouche, Ramzi},\n" in citation
    assert "  journal = {arXiv preprint arXiv:2510.03567},\n" in citation


@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_the_words_of_a_kind(kind):
    text = INTERVENTIONS[kind]
    assert kind not in LOSSES  # a report is read by its method's name
    assert text.formula.count("{") == text.formula.count("}") and text.formula.startswith(r"\min")
    assert text.formula.count(r"\left") == text.formula.count(r"\right")
    # A viewer without LaTeX would start emphasis there
    assert "}_" not in text.formula
    # Ours after the paper, so no number of its tables: none at all but those of the formula
    assert not re.search(r"\d", text.words + text.limits)


def test_settings_that_change_the_problem_are_said_where_they_are_set(intervene):
    def words(**settings):
        method = section(render_model_card(intervene("pointwise", **settings)), "Method")
        return method.split("\n\n")[1].removeprefix(f"**`pointwise`.** {INTERVENTIONS['pointwise'].words}")

    assert (
        words()
        == words(retain_metric=None, relaxation=None, slack=None)
        == words(slack="none", retain_metric=0.0)
        == ""
    )
    assert words(retain_metric=0.1).startswith(" The norm is not the plain one: ")
    assert words(relaxation="ball") == (
        " The constraints are also asked for at the worst prompts found near the listed ones."
    )
    assert words(slack="l2").startswith(" Constraints may be exceeded at a price, ")
    both = words(relaxation="ball", retain_metric=0.1)
    assert both == words(retain_metric=0.1) + words(relaxation="ball")


@pytest.mark.parametrize("kind", INTERVENTIONS)
@pytest.mark.parametrize("stored_as", ["selected", "lora"])
def test_a_release_that_names_its_tokens_or_is_reversible_says_so_at_the_top(intervene, kind, stored_as):
    card = render_model_card(intervene(kind, scope=stored_as))
    top = card.split("\n## Summary\n")[0]
    assert (REVEALS in top) == kind.startswith("vocabulary")
    assert (REVERSIBLE in top) == (stored_as == "lora")
    # Each a block of its own: two in one would be one warning
    assert top.count("\n\n> [!WARNING]\n> **") == top.count("[!WARNING]")
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == (
        "peft" if stored_as == "lora" else "transformers"
    )
    assert ("a LoRA adapter of rank 12" in card) == (stored_as == "lora")


def test_an_edit_of_chosen_weights_may_be_stored_as_an_adapter(intervene):
    report = intervene("pointwise")
    report.files = [FileEntry("adapter_model.safetensors", 9, "ab" * 32)]
    card = render_model_card(report)
    assert REVERSIBLE in card and "model = PeftModel.from_pretrained(base, folder)" in card
    assert "selected weights in `mlp.down_proj`" in card


def test_trained_models_are_told_nothing_of_constraints(report):
    report.method.settings["relaxation"] = "ball"
    card = render_model_card(report)
    assert "training loss is the weighted sum" in card and "2510.03567" not in card
    assert "worst prompts" not in card and REVEALS not in card
