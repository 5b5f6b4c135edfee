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
import doctest
import hashlib
import io
import re
import struct
import zlib

import huggingface_hub
import numpy as np
import pytest
import yaml

import hf_unlearn.cards.builder
import hf_unlearn.cards.figures
from hf_unlearn.cards import (
    AttackResult,
    Benchmark,
    CurvePoint,
    Data,
    DataSummary,
    FileEntry,
    Metrics,
    ModuleFootprint,
    Rule,
    Topic,
    UnlearningReport,
    render_model_card,
)
from hf_unlearn.cards import figures as drawing
from hf_unlearn.cards.builder import FIGURES, build_card
from hf_unlearn.cards.card import update_model_card
from hf_unlearn.cards.disclosure import LEVELS
from hf_unlearn.cards.figures import (
    describe_before_after,
    describe_footprint,
    describe_heat_map,
    describe_recovery_curves,
    footprint_grid,
    split_name,
)
from hf_unlearn.cards.markdown_rules import check_markdown
from hf_unlearn.cards.metadata import check_metadata
from hf_unlearn.cards.png import check_png


COMMITMENT = "0123456789abcdef" * 4


@pytest.fixture
def full(report):
    """A public report with something in every picture."""
    benchmark = Benchmark("locuslab/TOFU", "forget10", "train", "abc")
    report.data = Data(
        DataSummary(400, 12003, [Topic("biography", "100-999")], benchmark),
        DataSummary(3600, 108770),
        disclosure="public",
    )
    report.footprint.modules = [
        ModuleFootprint(f"model.layers.{layer}.{module}.weight", 0.001 * layer * factor, 0.01, 5, 9)
        for layer in (2, 10)
        for factor, module in enumerate(("self_attn.q_proj", "mlp.down_proj"), start=1)
    ]
    report.footprint.modules.append(ModuleFootprint("lm_head.weight", 0.5, 0.01, 5, 9))
    report.metrics.before["forget"] |= {"rougeL_recall": 0.8, "loss": 0.1}
    report.metrics.after["forget"] |= {
        **{"rougeL_recall": 0.2, "rougeL_recall_ci_low": 0.1, "rougeL_recall_ci_high": 0.3},
        **{"loss": 4.0, "membership_rows": 9},
    }
    report.attacks = [
        AttackResult(
            *(name, {"budget": budget}, share, "model that never saw the forget set", 0.0123, 0.1, 0.91, 0.01, 0.85),
            axis="step",
            curve=[CurvePoint(5, 0.1, 0.9, 0.01), CurvePoint(20, 0.3, 0.9, None)] if name == "relearn" else [],
        )
        for name, budget, share in (
            *(("relearn", "small", 0.2), ("relearn", "large", 0.431), ("gcg", "small", 0.05)),
            ("quantize", "small", None),
        )
    ]
    return report


@pytest.fixture
def release(full, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    full.save(folder / "unlearning_report.json")
    return folder


def build(folder, level=None, **options):
    return build_card(folder, disclosure=level, commitment=COMMITMENT if level == "sealed" else None, **options)


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def chunks(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    place, names = 8, []
    while place < len(png):
        length, name = struct.unpack_from(">I4s", png, place)
        [checksum] = struct.unpack_from(">I", png, place + 8 + length)
        assert checksum == zlib.crc32(png[place + 4 : place + 8 + length])
        names.append(name.decode())
        place += 12 + length
    assert place == len(png)
    return names


# --- what is written


@pytest.mark.parametrize("level", LEVELS)
def test_the_release_agrees_with_itself(release, level):
    written = build(release, level, model_name="my-model", license="apache-2.0")
    figures = [path for path in FIGURES.values() if not (level == "sealed" and "footprint" in path)]
    assert written == ["unlearning_report.json", "README.md", *figures]
    assert sorted(str(path.relative_to(release)) for path in release.rglob("*") if path.is_file()) == sorted(written)
    card, report = card_of(release), UnlearningReport.load(release / "unlearning_report.json")
    assert report.data.disclosure == level and f"Disclosure level `{level}`: " in card
    digest = hashlib.sha256((release / "unlearning_report.json").read_bytes()).hexdigest()
    assert f"(SHA-256 `{digest}`)" in card
    # Every picture is listed with its hash, shown once with a text, and nothing but a picture
    listed = {file.path: file for file in report.files}
    assert re.findall(r"!\[[^]]{40,}\]\((.+?)\)", card) == figures
    for path in figures:
        content = (release / path).read_bytes()
        assert (listed[path].size, listed[path].sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert set(chunks(content)) <= {"IHDR", "PLTE", "tRNS", "IDAT", "pHYs", "IEND"}
        assert check_png(path, content) == []
        assert b"matplotlib" not in content.lower()
    assert check_markdown("README.md", card) == [] and check_metadata("README.md", card) == []
    assert "\n\n\n" not in card.replace("\n\n\nfolder", "\n\nfolder") and "None" not in card
    assert report.files[:2] == [
        FileEntry("adapter_model.safetensors", 1234567, "ab" * 32),
        FileEntry("config.json", 612, "cd" * 32),
    ]
    # The files of the model still say where it lies
    assert 'folder = "path/to/this/folder"\n' in card


def test_building_again_changes_nothing(release):
    build(release, "category")
    contents = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    build(release)
    assert {path: path.read_bytes() for path in release.rglob("*") if path.is_file()} == contents


def test_a_stricter_card_leaves_no_picture_of_a_laxer_one(release):
    build(release, "public")
    build(release, "sealed")
    assert not (release / "figures" / "footprint.png").exists()
    report = UnlearningReport.load(release / "unlearning_report.json")
    assert "figures/footprint.png" not in [file.path for file in report.files]
    with pytest.raises(ValueError, match="'sealed', and 'public' says more than it holds"):
        build(release, "public")


def test_without_matplotlib_there_are_tables(release, monkeypatch):
    build(release)
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    assert build(release) == ["unlearning_report.json", "README.md"]
    assert list((release / "figures").iterdir()) == []
    card = card_of(release)
    assert "![" not in card and "figures/" not in card
    assert (
        "| `lm_head.weight` | 0.500 |" in card and "| `relearn` | `large` | `step = 20` | 0.300 | 0.900 | – |" in card
    )


def test_what_a_person_wrote_stays(release):
    (release / "README.md").write_bytes(b"---\nlanguage: en\nbase_model: me/old\n---\n# My own words\r\nkept")
    build(release)
    card = (release / "README.md").read_bytes()
    assert b"# My own words\r\nkept" in card and b"language: en" in card and b"me/old" not in card
    assert card.count(b"hf-unlearn:begin") == card.count(b"hf-unlearn:end") == 1
    build(release)
    assert (release / "README.md").read_bytes() == card
    # A report that changed is rendered anew, and the words around it stay
    report = UnlearningReport.load(release / "unlearning_report.json")
    report.metrics.after["forget"]["probability"] = 0.123
    report.save(release / "unlearning_report.json")
    assert update_model_card(report, release)
    again = (release / "README.md").read_bytes()
    assert b"0.123" in again and b"# My own words\r\nkept" in again and again != card
    build(release, mode="keep")
    assert (release / "README.md").read_bytes() == again
    build(release, mode="new")
    assert b"My own words" not in (release / "README.md").read_bytes()


def test_a_malformed_card_is_refused_before_anything_is_written(release):
    (release / "README.md").write_text("---\nlanguage: [\n---\n# Mine")
    before = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as caught:
        build(release)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in release.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no unlearning_report.json in the folder: the trainer writes it when it saves the model"),
        (b"{", "unlearning_report.json: not a JSON file"),
        (b'{"schema_version": 9}', "unlearning_report.json: this report has schema version 9; "),
    ],
)
def test_bad_reports_are_refused_in_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / "unlearning_report.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build_card(tmp_path)
    assert str(caught.value).startswith(message) and str(caught.value).isprintable()
    assert not (tmp_path / "README.md").exists()


def test_the_cards_of_programs_are_replaced_and_the_model_is_listed(release, full):
    full.files = []
    full.save(release / "unlearning_report.json")
    (release / "README.md").write_text(
        "---\nbase_model: /home/ada/base\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n\n"
        "<!-- Provide a quick summary of what the model is/does. -->\n\n## Model Details\n\n"
        "[More Information Needed]\n### Framework versions\n\n- PEFT 0.21.2"
    )
    for name in ("adapter_model.safetensors", "config.json", "training_args.bin", "tokenizer.json", "notes.md"):
        (release / name).write_text(name)
    (release / "generation_config.json").symlink_to("config.json")
    build(release)
    assert "/home/ada" not in card_of(release)
    files = {file.path: file for file in UnlearningReport.load(release / "unlearning_report.json").files}
    model = ["adapter_model.safetensors", "config.json", "tokenizer.json"]
    assert list(files) == [*model, *FIGURES.values()]
    assert files["config.json"].sha256 == hashlib.sha256(b"config.json").hexdigest()


def test_a_refused_level_writes_nothing(release):
    before = (release / "unlearning_report.json").read_bytes()
    with pytest.raises(ValueError, match=r"^data\.commitment: missing under 'sealed'"):
        build_card(release, disclosure="sealed")
    assert [path.name for path in release.iterdir()] == ["unlearning_report.json"]
    assert (release / "unlearning_report.json").read_bytes() == before


# --- metadata and sections


def test_the_model_index_has_the_released_models_numbers_alone(release):
    build(release, model_name="my-model", license="llama3.2")
    card = huggingface_hub.ModelCard(card_of(release))
    assert card.data.license == "llama3.2" and card.data.datasets == ["locuslab/TOFU"]
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert card.data.model_name == "my-model"
    # As the client reads them: nothing merged, none of before or of the control, no count, no end of an interval
    assert results == {
        ("forget", "probability"): 0.01234,
        ("forget", "rougeL_recall"): 0.2,
        ("forget", "loss"): 4.0,
        ("retain", "probability"): 0.871,
    }
    build(release, mode="new")
    metadata = front_matter(card_of(release))
    assert "model-index" not in metadata and "license" not in metadata and "## Licence" not in card_of(release)


def test_the_licence_is_inherited_with_its_notices(release):
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "LICENSES_of_others", "notes.txt"):
        (release / name).write_text("x")
    build(release, license="llama3.2")
    licence = card_of(release).split("## Licence\n\n")[1].split("\n\n## Citation")[0]
    assert licence == (
        "Under `llama3.2`, the licence of the base model, which this model inherits.\n"
        "Licence and notices of the base model: [LICENSE](LICENSE), [NOTICE.txt](NOTICE.txt), "
        "[USE\\_POLICY.md](USE_POLICY.md)."
    )


def test_a_changed_report_gets_a_card_like_the_last(release):
    build(release, model_name="my-model", license="llama3.2")
    picture = (release / FIGURES["attacks"]).read_bytes()
    report = UnlearningReport.load(release / "unlearning_report.json")
    report.attacks[0].recovered = 0.9
    report.save(release / "unlearning_report.json")
    assert update_model_card(report, release)
    metadata = front_matter(card_of(release))
    assert metadata["license"] == "llama3.2" and metadata["model-index"][0]["name"] == "my-model"
    assert (release / FIGURES["attacks"]).read_bytes() != picture and "relearn (small) 90.0%" in card_of(release)


def test_the_sections_stand_in_their_order(release):
    (release / "LICENSE").write_text("x")
    build(release, license="mit")
    assert re.findall(r"^## (.*)$", card_of(release), flags=re.MULTILINE) == [
        *("Summary", "What was unlearned", "Method", "Footprint", "Before and after", "Robustness", "Certificates"),
        *("Side effects and limits", "Files", "Reproduce", "Licence", "Citation"),
    ]


def test_the_verdict_by_rule_stands_first_and_its_rules_in_robustness(report):
    report.verdict.rules += [
        Rule("left.probability", 0.2, 0.001, True),
        Rule("fluent.repetition", 0.1, None, None),
        Rule("of_someone_else", 0.5, 0.25, False),
    ]
    report.verdict.not_run = ["gcg", "logit_lens"]
    card = render_model_card(report)
    assert (
        card.split("---\n\n# ")[1]
        .split("\n\n")[1]
        .startswith(
            "**Hidden, not forgotten: an attack brings it back.** By rule, from thresholds declared before the first "
            "attack: 2 of 5 rules broken, 1 not measured. "
        )
    )
    robustness = card.split("## Robustness\n\n")[1].split("\n\n## ")[0]
    assert f"The thresholds were declared before the first attack (SHA-256 `{'ef' * 32}`)." in robustness
    assert [line for line in robustness.splitlines() if line.endswith(("**no** |", "yes |", "not measured |"))] == [
        "| recovered by `relearn` | ≤ 0.200 | 0.431 | **no** |",
        "| Probability of the retain set: share kept | ≥ 0.900 | 0.990 | yes |",
        "| Probability of the forget set: share left, beyond the control | ≤ 0.200 | 0.00100 | yes |",
        "| repetition in answers to the forget set, beyond the control's | ≤ 0.100 | – | not measured |",
        "| `of_someone_else` | 0.500 | 0.250 | **no** |",
    ]
    assert "Missing for a verdict of *suppressed*: relearn at two learning rates." in robustness
    assert "**Attacks not run:** `gcg`, `logit_lens`. Nothing is known about what they would bring back." in robustness
    # An adapter says in its first lines what drops it
    assert card.split("\n\n")[3].startswith("> [!WARNING]\n> **This release is reversible.**")
    report.verdict = None
    assert "By rule" not in render_model_card(report) and "Attacks not run" not in render_model_card(report)


# --- pictures


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.layers.5.mlp.down_proj.weight", ("5", "mlp.down_proj")),
        ("transformer.h.11.attn.c_attn.bias", ("11", "attn.c_attn.bias")),
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("3", "mlp.experts.*.up_proj")),
        ("lm_head.weight", ("outside the layers", "lm_head")),
        ("model.norm.weight", ("outside the layers", "norm")),
        ("weight", ("outside the layers", "weight")),
        ("0", ("outside the layers", "0")),
    ],
)
def test_names_of_tensors_have_a_layer_and_a_module(tensor, place):
    assert split_name(tensor) == place


def test_the_grid_is_in_the_order_of_the_layers(full):
    full.footprint.modules += [
        ModuleFootprint("model.layers.2.mlp.experts.0.up.weight", 0.1, 0.1, 1, 1),
        ModuleFootprint("model.layers.2.mlp.experts.1.up.weight", 0.3, 0.1, 1, 1),
    ]
    assert footprint_grid(full) == {
        "2": {"self_attn.q_proj": 0.002, "mlp.down_proj": 0.004, "mlp.experts.*.up": 0.3},
        "10": {"self_attn.q_proj": 0.01, "mlp.down_proj": 0.02},
        "outside the layers": {"lm_head": 0.5},
    }


def test_the_texts_carry_the_numbers(full):
    full.footprint.modules.pop()
    assert describe_footprint(full) == (
        "Heat map of ‖Δ‖/‖W‖ by layer and module. layer 2: mlp.down_proj 0.00400, self_attn.q_proj 0.00200; "
        "layer 10: mlp.down_proj 0.0200, self_attn.q_proj 0.0100."
    )
    assert describe_before_after(full) == (
        "Bars before and after unlearning. Probability of the forget set: 0.912 before, 0.0123 after, 0.0112 for the "
        "control; Probability of the retain set: 0.880 before, 0.871 after; ROUGE-L recall of the forget set: 0.800 "
        "before, 0.200 after."
    )
    left = 100 * (0.01234 - 0.0112) / (0.912 - 0.0112)
    assert describe_heat_map(full) == (
        f"Heat map of the recovered share by attack and budget. without any attack {left:.1f}%; relearn (small) "
        "20.0%; relearn (large) 43.1%; gcg (small) 5.0%; quantize (small) –."
    )
    assert describe_recovery_curves(full) == (
        "Recovery curves: the forget score of the unlearned model under attack. relearn (large), step from 5 to 20: "
        "0.100 to 0.300, at most 0.300."
    )


def test_many_layers_are_summed_up(full):
    full.footprint.modules = [
        ModuleFootprint(f"model.layers.{layer}.{module}.weight", 0.01 + layer / 1000, 0.1, 1, 1)
        for layer in range(80)
        for module in "abcdefg"
    ]
    assert "layer 79: a 0.0890 and 6 smaller." in describe_footprint(full)
    file = io.BytesIO()
    assert drawing.draw_footprint(full, file)
    width, height = struct.unpack_from(">II", file.getvalue(), 16)
    assert height < 2000 and width < 2000


def test_nothing_to_draw(full):
    full.footprint.modules, full.attacks, full.metrics = [], [], Metrics()
    for draw in (drawing.draw_footprint, drawing.draw_before_after):
        assert not draw(full, io.BytesIO())
    full.footprint = None
    assert not drawing.draw_footprint(full, io.BytesIO())
    full.metrics.after = {"forget": {"probability": 0.5}}  # nothing to compare it with
    assert not drawing.draw_before_after(full, io.BytesIO())


def test_the_heat_map_shows_what_moved_most(full):
    import matplotlib.image

    def reddest(value):
        """Share of dark red pixels, which only the top of the colour scale has."""
        full.footprint.modules = [
            ModuleFootprint("model.layers.0.a.weight", 1.0, 1, 1, 1),
            *(ModuleFootprint(f"model.layers.{layer}.a.weight", value, 1, 1, 1) for layer in range(1, 6)),
        ]
        file = io.BytesIO()
        drawing.draw_footprint(full, file)
        file.seek(0)
        pixels = matplotlib.image.imread(file, format="png")[..., :3]
        return np.mean((pixels[..., 0] < 0.6) & (pixels[..., 0] > 0.4) & (pixels[..., 1] < 0.1))

    assert reddest(1.0) > 3 * reddest(0.01) > 0


def test_names_are_literal_in_the_texts_of_pictures(release, full):
    full.footprint.modules[0].name = "layers.0.[x]<b>![z]_*"
    full.save(release / "unlearning_report.json")
    build(release)
    card = card_of(release)
    assert check_markdown("README.md", card) == []
    assert r"layer 0: \[x\]&lt;b&gt;!\[z\]\_\*" in card


def test_a_report_of_odd_numbers_is_drawn(release, full):
    full.footprint.modules = [ModuleFootprint("model.layers.0.a.weight", 0.0, 0.0, 0, 0)]
    full.metrics.before["forget"]["probability"] = 1.0
    full.metrics.after["forget"] |= {"probability": 0.0, "rougeL_recall_ci_low": 0.9}
    full.attacks[0].recovered = -3.0
    full.save(release / "unlearning_report.json")
    assert len(build(release)) == 6
    original = copy.deepcopy(full)
    for name in vars(original.metrics):
        setattr(full.metrics, name, {})
    full.save(release / "unlearning_report.json")
    assert len(build(release)) == 5


def test_examples_run():
    for module in (hf_unlearn.cards.builder, hf_unlearn.cards.figures):
        results = doctest.testmod(module)
        assert results.attempted > 0 and results.failed == 0
