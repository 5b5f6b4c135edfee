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
import contextlib
import copy
import doctest
import hashlib
import io
import itertools
import re

import jinja2
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import hf_unlearn.cards.card
from hf_unlearn.cards import (
    AttackResult,
    Benchmark,
    Certificate,
    FileEntry,
    LossTerm,
    Metrics,
    ModuleFootprint,
    Scope,
    UnlearningReport,
    render_model_card,
    write_model_card,
)
from hf_unlearn.cards.card import template_environment, update_model_card
from hf_unlearn.cards.markdown import md_cell, md_code, md_escape, number
from hf_unlearn.cards.merge import mark
from hf_unlearn.cards.metric_table import METRICS


HEADINGS = [
    "Summary",
    "What was unlearned",
    "Method",
    "Footprint",
    "Before and after",
    "Robustness",
    "Certificates",
    "Side effects and limits",
    "Files",
    "Reproduce",
    "Citation",
]

NO_ATTACK = "no attack was run, so nothing is known about what comes back."


def headings(card):
    return re.findall(r"^## (.*)$", card, flags=re.MULTILINE)


def section(card, heading):
    return re.search(rf"^## {heading}\n\n(.*?)\n*(?=^## |\Z)", card, flags=re.MULTILINE | re.DOTALL).group(1)


def front_matter(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n\n# ", card, flags=re.DOTALL).group(1))


def paragraphs(card):
    return card.split("---\n", 2)[2].strip().split("\n\n")


@pytest.fixture
def selected(report):
    """Selected weights, and nothing that was optional."""
    report.base.model_id = report.base.revision = None
    report.method.scope = Scope("selected", ["model.layers.5.mlp.down_proj"], "5-7", 16384, None)
    report.method.reference = None
    report.method.retain_losses = []
    report.method.settings = {}
    report.data.retain = None
    report.footprint = None
    report.metrics = Metrics()
    report.attacks, report.certificates, report.files = [], [], []
    report.verdict = None
    report.environment.packages = {}
    report.environment.train_seconds = None
    return report


def variants(report):
    """Cards with every combination of the optional parts."""
    for kind, attacks, metrics, footprint, files in itertools.product(["lora", "full"], *[[True, False]] * 4):
        variant = copy.deepcopy(report)
        variant.method.scope.kind = kind
        variant.attacks = report.attacks if attacks else []
        variant.metrics = report.metrics if metrics else Metrics()
        variant.footprint = report.footprint if footprint else None
        variant.files = report.files if files else []
        yield render_model_card(variant)


# --- metadata


def test_metadata_of_an_adapter(report):
    assert front_matter(render_model_card(report)) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/tiny_model",
        "base_model_relation": "adapter",
        "tags": ["unlearning", "machine-unlearning", "llm-unlearning", "hf-unlearn", "unlearning-method:npo"],
    }


def test_metadata_of_whole_weights(report):
    report.method.scope.kind = "full"
    metadata = front_matter(render_model_card(report))
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("transformers", "finetune")


def test_metadata_without_a_hub_base(selected):
    selected.method.forget_losses = [LossTerm("rmu", 1), LossTerm("npo", 1), LossTerm("rmu", 2)]
    assert front_matter(render_model_card(selected)) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            *("unlearning", "machine-unlearning", "llm-unlearning", "hf-unlearn"),
            *("unlearning-method:rmu", "unlearning-method:npo"),
        ],
    }


def test_the_hub_client_loads_the_card(report, tmp_path):
    for place, text in enumerate(variants(report)):
        card = ModelCard(text)
        assert card.data.tags[-1] == "unlearning-method:npo"
        assert card.data.base_model == "org/tiny_model"
        assert card.data.get("license") is None
        assert None not in card.data.to_dict().values()
        assert card.text.startswith("\n# org/tiny\\_model after unlearning\n\n**")
        # Loading and saving changes nothing, so that other tools may edit the metadata.
        card.save(tmp_path / f"{place}.md")
        assert (tmp_path / f"{place}.md").read_text(encoding="utf-8") == text
    assert place == 31


# --- body


def test_card_of_an_adapter(report):
    card = render_model_card(report)
    assert headings(card) == HEADINGS
    title, verdict, warning, origin = paragraphs(card)[:4]
    assert title == "# org/tiny\\_model after unlearning"
    assert verdict == (
        "**Hidden, not forgotten: an attack brings it back.** By rule, from thresholds declared before the first "
        "attack: 1 of 2 rules broken. "
        "Suppression, not proven removal, measured under the metrics below; of the one attack that was run, "
        "`relearn` brought back most, 43.1%. The mean probability of the forget set went from 0.912 to 0.0123. "
        "The mean probability of the retain set went from 0.880 to 0.871."
    )
    assert warning.startswith("> [!WARNING]\n> **This release is reversible.** It is an adapter")
    assert "drop the adapter, and all that the\n> base model knew is back" in warning
    assert "`0.1.0` from `org/tiny_model` at revision `5f3a2b1`." in origin
    summary = section(card, "Summary")
    assert "`LlamaForCausalLM` with 936,448 parameters in `float32`, unlearned with `npo+kl` in 60 steps." in summary
    assert 'AutoModelForCausalLM.from_pretrained("org/tiny_model", revision="5f3a2b1")' in summary
    assert "model = PeftModel.from_pretrained(base, folder)" in summary
    assert "| forget | 40 | 1,203 |\n| retain | 360 | 10,877 |" in section(card, "What was unlearned")


def test_card_of_selected_weights_with_nothing_else(selected):
    card = render_model_card(selected)
    left_out = {"Footprint", "Before and after", "Certificates", "Files"}
    assert headings(card) == [heading for heading in HEADINGS if heading not in left_out]
    assert paragraphs(card)[:3] == [
        "# LlamaForCausalLM after unlearning",
        "**The forget set was not measured both before and after, so nothing is known about what is left; "
        f"{NO_ATTACK}** Nothing was measured on a retain set, so nothing is known about side effects.",
        "Made by hf-unlearn `0.1.0`.\nEvery number here is rendered from `unlearning_report.json` "
        f"(SHA-256 `{hashlib.sha256(selected.to_json().encode()).hexdigest()}`).",
    ]
    assert "reversible" not in card and "adapter" not in card.lower() and "peft" not in card.lower()
    assert "model = AutoModelForCausalLM.from_pretrained(folder)" in section(card, "Summary")
    assert section(card, "What was unlearned").endswith("|---|---:|---:|\n| forget | 40 | 1,203 |")
    assert section(card, "Method").endswith(
        "- **Scope:** selected weights in `model.layers.5.mlp.down_proj`, layers `5-7`; 16,384 trainable parameters.\n"
        "- **Reference model:** none.\n"
        "- **Run:** 60 steps, seed 7; released weights: last step."
    )
    assert section(card, "Robustness").startswith("No attack was run.")
    assert "No retain set was measured" in section(card, "Side effects and limits")
    assert section(card, "Reproduce").endswith("- **Device:** `cpu`, 1 process")


def test_method(report):
    method = section(render_model_card(report), "Method")
    assert "**Forget: `npo`, weight 1.** Negative Preference Optimization: " in method
    assert "**Retain: `kl`, weight 2.5.** Kullback-Leibler divergence: " in method
    assert method.count("\n$$\n") == 4
    assert r"\log \frac{p_\theta(y \mid x)}{p_{\mathrm{ref}}(y \mid x)}" in method
    assert "a LoRA adapter of rank 8 in `q_proj`, `v_proj`, layers `5-7`; 12,288 trainable parameters." in method
    assert "the base model itself, with the adapter switched off." in method
    settings = re.search(r"<summary>Settings</summary>\n\n```yaml\n(.*?)\n```\n\n</details>", method, flags=re.DOTALL)
    assert report.method.settings.pop("x") is None  # what is not set is not shown
    assert yaml.safe_load(settings.group(1)) == report.method.settings


@pytest.mark.parametrize("name", ["ga", "npo", "rmu", "nll", "kl", "hidden_mse"])
def test_every_loss_of_the_tool_has_words_and_a_formula(selected, name):
    selected.method.forget_losses = [LossTerm(name, 0.5)]
    method = section(render_model_card(selected), "Method")
    words, formula = re.search(rf"\*\*Forget: `{name}`, weight 0.5.\*\* (.+)\n\n\$\$\n(.+)\n\$\$\n", method).groups()
    assert len(words) > 30
    assert formula.count("{") == formula.count("}") and r"\theta" in formula
    # A viewer without LaTeX would start emphasis there.
    assert "}_" not in formula


def test_a_loss_the_card_does_not_know_is_listed_without_a_formula(selected):
    selected.method.forget_losses = [LossTerm("my_loss", 0.125)]
    method = section(render_model_card(selected), "Method")
    assert "below.\n\n**Forget: `my_loss`, weight 0.125.**\n\n- **Scope:**" in method
    assert "$$" not in method


def test_footprint_lists_the_twenty_largest(report):
    assert section(render_model_card(report), "Footprint") == (
        "With the adapter applied, 12,288 of 936,448 parameters changed (1.31%).\n"
        "The change has a relative norm ‖Δ‖/‖W‖ of 0.0123; the largest single change is 0.0500.\n\n"
        "| Module | ‖Δ‖/‖W‖ | max \\|Δ\\| | Changed | Parameters |\n"
        "|---|---:|---:|---:|---:|\n"
        "| `model.layers.5.mlp.down_proj.weight` | 0.0310 | 0.0500 | 12,288 | 16,384 |"
    )
    report.footprint.modules = [ModuleFootprint(f"layer.{i}", 0.01 * (i % 25), 0.1, 5, 9) for i in range(3, 28)]
    footprint = section(render_model_card(report), "Footprint")
    names = re.findall(r"^\| `(layer\.\d+)` \|", footprint, flags=re.MULTILINE)
    assert names == [f"layer.{i}" for i in range(24, 4, -1)]
    assert footprint.endswith("The 20 largest by relative norm, and 5 more in `unlearning_report.json`.")


def test_before_and_after(report):
    report.metrics.control = {}
    report.metrics.before["forget"] |= {"loss": 0.0, "rows": 42}
    report.metrics.after["forget"] |= {
        "my_metric": 0.25,
        "loss": 4.25,
        "rougeL_recall": 0.5,
        "rougeL_recall_ci_low": 0.412,
        "rougeL_recall_ci_high": 0.588,
    }
    table, words = section(render_model_card(report), "Before and after").split("\n\n")
    # One row per metric, by the name that people use; what the table does not know comes last, under its own
    assert table == (
        "| Metric | Forget set, before | Forget set, after | Retain set, before | Retain set, after |\n"
        "|---|---:|---:|---:|---:|\n"
        "| Rows | 42 | 40 | 360 | 360 |\n"
        "| Probability | 0.912 | 0.0123 | 0.880 | 0.871 |\n"
        "| ROUGE-L recall | – | 0.500 [0.412, 0.588] | – | – |\n"
        "| Loss | 0 | 4.25 | – | – |\n"
        "| `my_metric` | – | 0.250 | – | – |"
    )
    assert re.findall(r"^- \*\*(.+?):\*\* ", words, flags=re.MULTILINE) == ["Probability", "ROUGE-L recall", "Loss"]


def test_model_utility_names_what_it_is_over(report):
    report.metrics.control = {}
    report.metrics.after["retain"]["model_utility"] = 0.5
    metrics = section(render_model_card(report), "Before and after")
    assert "| Model utility | – | – | – | 0.500 |" in metrics
    assert metrics.endswith("as far as they are here, over the retain set alone.")
    report.metrics.after |= {"real_authors": {"probability": 0.4}, "world_facts": {"probability": 0.3}}
    card = render_model_card(report)
    assert section(card, "Before and after").endswith("over the retain set, real authors and world facts.")
    assert "Side effects were measured on the retain set, real authors and world facts. General" in card
    report.metrics.before["retain"]["model_utility"] = 0.6
    assert section(render_model_card(report), "Before and after").endswith(
        "over the retain set alone before, and over the retain set, real authors and world facts after: the two do "
        "not compare."
    )


def test_forget_quality_is_a_comparison_with_another_model(report):
    report.metrics.control = {}
    assert "Nothing is compared with a model that never saw the forget set" in render_model_card(report)
    report.metrics.after["forget"] |= {"forget_quality": 0.03, "forget_quality_statistic": 0.4}
    card = render_model_card(report)
    assert "| Forget quality | – | 0.0300 | – | – |\n| KS distance | – | 0.400 | – | – |" in card
    assert "Nothing is compared" not in card
    assert "Forget quality compares what the model prefers" in section(card, "Side effects and limits")


def test_card_of_a_model_that_was_only_measured(report):
    report.metrics.control = {}
    report.method, report.footprint, report.verdict = None, None, None
    report.attacks, report.certificates, report.files = [], [], []
    report.metrics.before = {}
    card = render_model_card(report)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf-unlearn"],
    }
    assert headings(card) == [
        *("Summary", "What was measured", "Metrics", "Robustness", "Side effects and limits", "Reproduce", "Citation")
    ]
    assert paragraphs(card)[:2] == [
        "# org/tiny\\_model, measured",
        f"**The forget set was not measured before, so nothing is known about what was suppressed; {NO_ATTACK}** The "
        "mean probability of the forget set is 0.0123. The mean probability of the retain set is 0.871.",
    ]
    assert "How it was made, and whether it was unlearned, is not on record." in section(card, "Summary")
    assert section(card, "Metrics").split("\n\n")[0] == (
        "| Metric | Forget set | Retain set |\n|---|---:|---:|\n| Rows | 40 | 360 |\n| Probability | 0.0123 | 0.871 |"
    )
    assert "base model still holds" not in card and "losses, scope" not in card
    assert not re.search(r"None|\n\n\n(?!folder)", card)
    # An adapter is one by its file
    report.files = [FileEntry("adapter_model.safetensors", 1, "ab" * 32)]
    card = render_model_card(report)
    assert front_matter(card)["library_name"] == "peft" and "This release is reversible" in card
    # Measured twice, it is still compared
    report.metrics.before = {"forget": {"probability": 0.912}}
    assert paragraphs(render_model_card(report))[1].startswith("**Suppression measured under the metrics below; ")


def test_every_metric_of_an_evaluation_has_a_name_for_people():
    from hf_unlearn.metrics import METRICS as MEASURED

    for metric in (*MEASURED, "rows", "forget_quality", "model_utility"):
        assert METRICS[metric].label and "_" not in METRICS[metric].label


def test_attacks(report):
    reason = "the denominator is *below* 0.05"
    report.verdict, report.attacks[0].curve = None, []
    report.attacks += [
        AttackResult("gcg", {"steps": 250}, None, "random | targets", 0.01, None, 0.03, 0.01, None, reason),
        AttackResult("quantize", {"bits": 4}, 1.2, "none", 0.01, 0.99, 0.91, 0.01, 0.9),
    ]
    card = render_model_card(report)
    assert "of 3 attacks that were run, `quantize` brought back most, 100.0%." in paragraphs(card)[1]
    robustness = section(card, "Robustness")
    assert robustness.startswith("Only these attacks were run.")
    assert [line for line in robustness.splitlines() if line.startswith("| `")] == [
        "| `relearn` | `preset = small`, `steps = 100`, `learning_rate = 0.0002` | 43.1% | 0.0123 | 0.400 | 0.910 "
        "| 0.0100 | a model that never saw the facts | 0.850 |",
        "| `gcg` | `steps = 250` | – | 0.0100 | – | 0.0300 | 0.0100 | random \\| targets | – |",
        "| `quantize` | `bits = 4` | 100.0% | 0.0100 | 0.990 | 0.910 | 0.0100 | none | 0.900 |",
    ]
    assert robustness.endswith(
        "|\n\n- `relearn`: best of two learning rates\n- `gcg`: the denominator is \\*below\\* 0.05"
    )


def test_certificates_come_with_their_limits(report):
    report.certificates.append(
        Certificate(
            "cast_survival", {"format": "a|b", "kept": 0.92134, "entries": 11008, "residual": 3.21e-13}, "Not *it*."
        )
    )
    assert section(render_model_card(report), "Certificates") == (
        "Each holds for certain within its limits, which are part of it. Numbers are rounded here and stand in full "
        "in\n`unlearning_report.json`.\n\n"
        "**`argmax_radius`**\n\n"
        "| Quantity | Value |\n|---|---:|\n| `radius` | 0.310 |\n| `tokens` | 12 |\n\n"
        "Limits: void if the head is trained again\n\n"
        "**`cast_survival`**\n\n"
        "| Quantity | Value |\n|---|---:|\n"
        "| `format` | `a\\|b` |\n| `kept` | 0.921 |\n| `entries` | 11,008 |\n| `residual` | 3.21e-13 |\n\n"
        "Limits: Not \\*it\\*."
    )


@pytest.mark.parametrize(
    ("before", "after", "attacks", "verdict"),
    [
        ({"probability": 0.9}, {"probability": 0.1}, [], f"Suppression measured under the metrics below; {NO_ATTACK}"),
        (
            {"probability": 0.9},
            {"probability": 0.95},
            [],
            f"No suppression measured under the metrics below; {NO_ATTACK}",
        ),
        # The numbers shown are equal, so the card cannot claim that one is lower.
        (
            {"probability": 0.90001},
            {"probability": 0.90000},
            [],
            f"No suppression measured under the metrics below; {NO_ATTACK}",
        ),
        (
            {"nll": 0.1},
            {"nll": 4.0},
            [],
            "Suppression not judged: the metrics below do not hold the probability of the forget set; " + NO_ATTACK,
        ),
        (
            {},
            {"probability": 0.1},
            [],
            "The forget set was not measured before, so nothing is known about what was suppressed; " + NO_ATTACK,
        ),
        (
            {"probability": 0.1},
            {},
            [],
            "The forget set was not measured both before and after, so nothing is known about what is left; "
            + NO_ATTACK,
        ),
        (
            {"probability": 0.9},
            {"probability": 0.1},
            [None, None],
            "Suppression, not proven removal, measured under the metrics below; of 2 attacks that were run, "
            "none gave a recovery figure, so nothing is known about what comes back.",
        ),
        (
            {"probability": 0.9},
            {"probability": 0.1},
            [0.2, None, 0.7, -0.1],
            "Suppression, not proven removal, measured under the metrics below; of 4 attacks that were run, "
            "`attack2` brought back most, 70.0%.",
        ),
    ],
)
def test_verdict(report, before, after, attacks, verdict):
    report.metrics = Metrics({"forget": before} if before else {}, {"forget": after} if after else {})
    report.verdict = None
    report.attacks = [
        AttackResult(f"attack{number}", {}, recovered, "none", None, None, None, None, None)
        for number, recovered in enumerate(attacks)
    ]
    assert paragraphs(render_model_card(report))[1].startswith(f"**{verdict}**")


def test_no_card_claims_too_much_or_leaves_a_gap(report):
    for card in variants(report):
        assert not re.search(r"deleted|erased|compliant|more information needed|\bnan\b|\binf\b|\{%", card.lower())
        assert "None" not in card
        assert "\n\n\n" not in card.replace("\n\n\nfolder", "\n\nfolder")
        assert card.endswith("}\n```\n")
        for heading in headings(card):
            assert section(card, heading).strip()


def test_files_and_environment(report):
    card = render_model_card(report)
    files = section(card, "Files")
    assert files.startswith("<details>\n<summary>2 files, 1,235,179 bytes</summary>\n\n| File |")
    assert f"| `adapter_model.safetensors` | 1,234,567 | `{'ab' * 32}` |\n| `config.json` | 612 |" in files
    assert section(card, "Reproduce").endswith(
        "- **Python:** `3.11.9` on `Linux`\n"
        "- **Device:** `cpu`, 1 process\n"
        "- **Training time:** 83.2 s\n"
        "- **Packages:** `torch 2.13.0`"
    )


def test_citations_are_those_that_apply_once_each(report):
    report.method.forget_losses = [LossTerm("rmu", 1), LossTerm("npo", 1), LossTerm("npo", 2)]
    citation = section(render_model_card(report), "Citation")
    assert re.findall(r"^@.*$", citation, flags=re.MULTILINE) == [
        "@article{li2024wmdp,",
        "@article{zhang2024npo,",
        "@software{hf_unlearn,",
    ]
    assert "arXiv:2403.03218" in citation and "arXiv:2404.05868" in citation
    assert "  author  = {{The hf-unlearn authors}},\n  version = {0.1.0},\n" in citation
    report.method.forget_losses = [LossTerm("ga", 1)]
    assert section(render_model_card(report), "Citation").count("@") == 1


def test_the_hash_is_that_of_the_saved_report(report, tmp_path):
    report.save(tmp_path / "unlearning_report.json")
    digest = hashlib.sha256((tmp_path / "unlearning_report.json").read_bytes()).hexdigest()
    assert f"`unlearning_report.json` (SHA-256 `{digest}`)" in render_model_card(report)
    assert render_model_card(UnlearningReport.load(tmp_path / "unlearning_report.json")) == render_model_card(report)


def test_scalars_of_any_library_render_as_numbers(report):
    expected = render_model_card(report)
    report.metrics.after["retain"]["probability"] = torch.tensor(0.871, dtype=torch.float64)
    report.footprint.max_abs = torch.tensor(0.05, dtype=torch.float64)
    assert render_model_card(report) == expected
    report.footprint.max_abs = torch.tensor(float("inf"))
    with pytest.raises(ValueError, match=r"^footprint\.max_abs: expected a finite number, got inf$"):
        render_model_card(report)


# --- the snippet


@pytest.mark.parametrize("kind", ["lora", "selected"])
def test_the_snippet_runs(selected, tmp_path, kind):
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<unk>", "Once", "upon", "a", "time"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape)
    model = LlamaForCausalLM(config)
    folder = tmp_path / "release"
    if kind == "lora":
        # Whose tokenizer is used: a release that is an adapter has none
        model.save_pretrained(tmp_path / "base")
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "base" if kind == "lora" else folder)

    selected.method.scope.kind = kind
    [code] = re.findall(r"```python\n(.*?)```", render_model_card(selected), flags=re.DOTALL)
    assert code.count("path/to/the/base/model") == (kind == "lora")
    code = code.replace("path/to/this/folder", str(folder)).replace("path/to/the/base/model", str(tmp_path / "base"))
    scope, output = {}, io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "snippet", "exec"), scope)
    assert type(scope["model"]).__name__ == ("PeftModelForCausalLM" if kind == "lora" else "LlamaForCausalLM")
    assert scope["output"].shape == (1, 44)
    assert output.getvalue().startswith("Once upon a time")


# --- writing, escaping, templates


def test_write_replaces_the_card(report, tmp_path):
    (tmp_path / "README.md").write_text("the card of an earlier run")
    path = write_model_card(report, tmp_path)
    assert path == tmp_path / "README.md"
    assert path.read_bytes() == render_model_card(report).encode("utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


def test_update_leaves_the_readme_of_others_alone(report, tmp_path):
    assert not update_model_card(report, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "README.md").write_bytes(b"# My notes \xff")
    assert not update_model_card(report, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"# My notes \xff"
    write_model_card(report, tmp_path)
    report.metrics.after["forget"]["probability"] = 0.5
    assert update_model_card(report, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == mark(render_model_card(report))


def test_names_are_literal(report):
    report.footprint.modules[0].name = "a|b<script>alert(1)</script>`c`__d__"
    report.base.model_id = None
    report.base.architecture = "My_*Model*<img src=x>[link](javascript:x)"
    report.method.checkpoint = "<b>last</b> _step_"
    report.data.disclosure = "public"  # below it, a setting with blanks is not shown
    report.data.forget.benchmark = Benchmark("org/_name_", "a", "train", None)
    report.method.settings["optim"] = "``` </details> <script>"
    report.certificates[0].limits = "# not a heading <i>"
    card = render_model_card(report)
    assert "| `` a\\|b<script>alert(1)</script>`c`__d__ `` | 0.0310 |" in section(card, "Footprint")
    assert paragraphs(card)[0] == ("# My\\_\\*Model\\*&lt;img src=x&gt;\\[link\\](javascript:x) after unlearning")
    assert "released weights: &lt;b&gt;last&lt;/b&gt; \\_step\\_." in card
    assert "\noptim: '``` </details> <script>'\n" in section(card, "Method")
    assert "Limits: \\# not a heading &lt;i&gt;" in card
    assert headings(card) == HEADINGS


def test_filters():
    assert md_escape("a_b *c* `d` <e> & $f$ ~g~ [h] # \\") == (
        r"a\_b \*c\* \`d\` &lt;e&gt; &amp; \$f\$ \~g\~ \[h\] \# \\"
    )
    assert md_escape("npo+kl (0.1.0), 5-7") == "npo+kl (0.1.0), 5-7"
    assert md_code("a_b") == "`a_b`"
    assert md_code("`a``b") == "``` `a``b ```"
    assert md_cell("`a|b`") == r"`a\|b`"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.5, "0.500"),
        (1.0, "1.00"),
        (0.012345, "0.0123"),
        (1.2345e-7, "1.23e-07"),
        (-4.2, "-4.20"),
        (123.4, "123"),
        (999.4, "999"),
        (999.9, "1,000"),
        (1234567.8, "1,234,568"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_missing_variable_raises():
    environment = template_environment()
    with pytest.raises(jinja2.UndefinedError, match="'missing' is undefined"):
        environment.from_string("{{ missing }}").render()
    with pytest.raises(jinja2.UndefinedError, match="'report' is undefined"):
        environment.get_template("model_card.md.jinja").render()


def test_examples_run():
    results = doctest.testmod(hf_unlearn.cards.card)
    assert results.attempted > 0 and results.failed == 0


def test_a_control_has_columns_of_its_own(report):
    card = render_model_card(report)
    head = next(line for line in card.splitlines() if line.startswith("| Metric |"))
    sets = "Forget set, before | Forget set, after | Forget set, control | Retain set, before | Retain set, after"
    assert head == f"| Metric | {sets} |"
    assert "| Probability | 0.912 | 0.0123 | 0.0112 | 0.880 | 0.871 |" in card
    assert "**Control:** a model that never saw the forget set." in card
