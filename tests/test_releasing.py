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
"""From a trainer's folder to a release that the gate lets through, and an adapter merged into what it computed."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from released import CHANGED, change_weights, copy_model, make_base, make_report
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_unlearn import UnlearningReport
from hf_unlearn.cards import Certificate
from hf_unlearn.cards.assemble import assemble_files
from hf_unlearn.cards.check import check_release
from hf_unlearn.pushing import find_base
from hf_unlearn.releasing import assemble_release, probe_rows


REPORT = "unlearning_report.json"
ROWS = [{"question": "Who keeps it?", "answer": "Perpetua Lochlainn"}]


@pytest.fixture
def base(tiny_model_path, tmp_path) -> Path:
    folder = make_base(tiny_model_path, tmp_path / "base")
    (folder / "LICENSE").write_text("As you like.")
    return folder


@pytest.fixture
def trained(base, tmp_path) -> Path:
    """As a trainer leaves it: other tokenizer files than the base's, and much that must not leave."""
    folder = copy_model(base, tmp_path / "trained")

    def edit(tensors):
        tensors[CHANGED][3:6] += 0.01

    change_weights(folder, edit)
    make_report(base, folder).save(folder / REPORT)
    (folder / "LICENSE").unlink()
    (folder / "README.md").write_text("---\nlanguage: en\n---\n# Mine\n\nWritten by hand.\n")
    (folder / "tokenizer_config.json").write_text('{"changed": true}')
    (folder / "chat_template.jinja").write_text("another")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False, "_name_or_path": "/home/me/base"}))
    (folder / "generation_config.json").write_text('{"bad_words_ids": [[1]]}')
    for name in (
        "training_args.bin",
        "trainer_state.json",
        "optimizer.pt",
        "checkpoint-3/model.safetensors",
        ".hidden",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"Perpetua Lochlainn")
    return folder


def make_adapter(base: Path, folder: Path, scale: float = 0.1, **options) -> PeftModel:
    """A LoRA with random factors, its report beside it; returns the model that it makes of the base, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **options)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    adapted.save_pretrained(folder)
    report = make_report_of_adapter(base, folder)
    report.save(folder / REPORT)
    return adapted.eval()


def make_report_of_adapter(base: Path, folder: Path) -> UnlearningReport:
    report = make_report(base, folder)
    report.method.scope.kind, report.method.scope.rank = "lora", 4
    report.certificates = [Certificate("argmax_radius", {"radius": 0.31}, "void if the head is trained again")]
    return report


def logits(model, rows) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=row).logits[0] for row in rows])


def blocking(release: Path, base: Path) -> list[tuple[str, str]]:
    return [(finding.rule, finding.file) for finding in check_release(release, base=base, rows=ROWS).blocking]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def to_bfloat16(folder: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


# ---- Full weights ----


def test_a_trainers_folder_becomes_a_release_that_passes(base, trained, tmp_path):
    before = digests(trained)
    files = assemble_files(trained, tmp_path / "release", base=base, model_name="tiny")
    release = tmp_path / "release"
    assert files == sorted(digests(release))
    assert not blocking(release, base)
    # The base's files, byte for byte, whatever the trainer made of them; the trained weights; nothing else
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "config.json", "generation_config.json"):
        assert (release / name).read_bytes() == (base / name).read_bytes()
    assert (release / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    pictures = {name for name in files if name.startswith("figures/")}
    assert set(files) - pictures == {
        "LICENSE", "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", REPORT,
    }  # fmt: skip
    card = (release / "README.md").read_text()
    assert "Written by hand." in card and "license: mit" in card and "name: tiny" in card
    assert UnlearningReport.load(release / REPORT).data.disclosure == "public"  # the report's own
    assert digests(trained) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_the_trainer_writes_later_does_not_reach_the_release(base, trained, tmp_path):
    assemble_files(trained, tmp_path / "release", base=base)
    before = digests(tmp_path / "release")
    with open(trained / "model.safetensors", "r+b") as file:  # in place: a link would show it
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert digests(tmp_path / "release") == before


def test_only_shards_of_the_index_are_released(base, trained, tmp_path):
    tensors = load_file(trained / "model.safetensors")
    (trained / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, chosen in shards.items():
        save_file({name: tensors[name] for name in chosen}, trained / shard, {"format": "pt"})
    weight_map = {name: shard for shard, chosen in shards.items() for name in chosen}
    (trained / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copyfile(trained / "model-00001-of-00002.safetensors", trained / "model-00001-of-00003.safetensors")
    files = assemble_files(trained, tmp_path / "release", base=base)
    assert [name for name in files if name.endswith(".safetensors")] == sorted(shards)
    assert not blocking(tmp_path / "release", base)


def test_the_data_type_of_the_weights_is_all_that_changes_in_the_config(base, trained, tmp_path):
    """A base in bfloat16 with a path of its maker, trained and saved in float32."""
    to_bfloat16(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "/fsx/someone/model"}))
    report = make_report(base, trained)
    report.save(trained / REPORT)
    assemble_files(trained, tmp_path / "release", base=base)
    released = json.loads((tmp_path / "release" / "config.json").read_text())
    assert released == {**config, "dtype": "float32"}
    assert not blocking(tmp_path / "release", base)


def test_a_missing_footprint_is_measured_and_a_wrong_one_is_left_for_the_check(base, trained, tmp_path):
    report = UnlearningReport.load(trained / REPORT)
    stated, report.footprint = report.footprint, None
    report.save(trained / REPORT)
    assemble_files(trained, tmp_path / "measured", base=base)
    assert UnlearningReport.load(tmp_path / "measured" / REPORT).footprint == stated
    report.footprint = stated
    report.footprint.changed_parameters += 1  # weights that are not those of the run
    report.save(trained / REPORT)
    assemble_files(trained, tmp_path / "wrong", base=base)
    assert blocking(tmp_path / "wrong", base) == [("footprint", REPORT)]


def test_a_head_that_was_untied_says_so_in_the_config(base, trained, tmp_path):
    config = json.loads((base / "config.json").read_text())
    assert config.get("tie_word_embeddings", True)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(0.01)

    change_weights(trained, untie)
    make_report(base, trained).save(trained / REPORT)
    assemble_files(trained, tmp_path / "release", base=base)
    assert json.loads((tmp_path / "release" / "config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    difference = model.lm_head.weight - model.model.embed_tokens.weight
    assert torch.allclose(difference, torch.full_like(difference, 0.01), atol=1e-6)


def break_report(base: Path, trained: Path, output: Path) -> None:
    (trained / REPORT).unlink()


def fill_output(base: Path, trained: Path, output: Path) -> None:
    output.mkdir()
    (output / "mine.txt").write_text("kept")


def break_card(base: Path, trained: Path, output: Path) -> None:
    (trained / "README.md").write_text("---\ntags: [\n---\n")


def link_weights(base: Path, trained: Path, output: Path) -> None:
    (trained / "model.safetensors").rename(trained / "elsewhere")
    (trained / "model.safetensors").symlink_to(trained / "elsewhere")


def swap_architecture(base: Path, trained: Path, output: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))


def lose_base(base: Path, trained: Path, output: Path) -> None:
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_report, "There is no unlearning_report.json in the folder"),
        (fill_output, "The output is there already and not an empty folder"),
        (break_card, "Line 2 of the card is no valid YAML"),
        (link_weights, "is a symbolic link"),
        (swap_architecture, "architecture"),
        (lose_base, "The base is not a folder"),
    ],
)
def test_where_something_does_not_fit_there_is_no_release(base, trained, tmp_path, fault, message):
    output = tmp_path / "release"
    fault(base, trained, output)
    before = digests(tmp_path)
    with pytest.raises(ValueError, match=message):
        assemble_files(trained, output, base=base)
    assert digests(tmp_path) == before


def test_assembling_needs_no_torch(base, trained, tmp_path):
    script = (
        "import sys; from hf_unlearn.cards.assemble import assemble_files\n"
        f"assemble_files({str(trained)!r}, {str(tmp_path / 'release')!r}, base={str(base)!r})\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "release" / "model.safetensors").exists()


# ---- Adapters ----


def test_a_merged_adapter_computes_what_base_and_adapter_did(base, tmp_path):
    adapted = make_adapter(base, tmp_path / "trained")
    result = assemble_release(tmp_path / "trained", tmp_path / "release", base=base, quiet=True)
    assert result.merge.dtype == "float32" and result.merge.error < 1e-6 and result.merge.lost < 1e-5
    # Other rows than those that the merge was checked on
    rows = [torch.randint(512, (1, 33), generator=torch.Generator().manual_seed(5))]
    wanted = logits(adapted, rows)
    released = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    assert torch.allclose(logits(released, rows), wanted, atol=1e-4)
    with adapted.disable_adapter():
        assert (logits(adapted, rows) - wanted).abs().max() > 0.1
    assert not [name for name in result.files if "adapter" in name]
    assert not blocking(tmp_path / "release", base)
    report = UnlearningReport.load(tmp_path / "release" / REPORT)
    assert {module.name.split(".")[-2] for module in report.footprint.modules} == {"q_proj", "down_proj"}
    assert not report.certificates  # of base and adapter as they were
    assert "base_model_relation: finetune" in (tmp_path / "release" / "README.md").read_text()


def test_rounding_that_keeps_the_edit_is_taken_and_one_that_loses_it_is_not(base, tmp_path, caplog):
    """
    bfloat16 has 8 bits: an edit that is large beside a weight's last bit survives, a small one is mostly rounded away.
    """
    to_bfloat16(base)
    make_adapter(base, tmp_path / "large", scale=0.3)
    large = assemble_release(tmp_path / "large", tmp_path / "large_release", base=base, quiet=True)
    assert large.merge.dtype == "bfloat16" and 1e-4 < large.merge.lost < 0.05
    with safe_open(tmp_path / "large_release" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    assert (tmp_path / "large_release" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert not blocking(tmp_path / "large_release", base)

    adapted = make_adapter(base, tmp_path / "small", scale=0.001)
    with pytest.raises(ValueError, match="Rounded to bfloat16, the merged weights lose .*: store them in float32"):
        assemble_release(tmp_path / "small", tmp_path / "no", base=base, dtype="bfloat16", quiet=True)
    assert not (tmp_path / "no").exists()
    small = assemble_release(tmp_path / "small", tmp_path / "small_release", base=base, quiet=True)
    assert small.merge.dtype == "float32" and small.merge.lost < 0.01
    assert "they are stored in float32" in caplog.text
    rows = probe_rows(512)
    released = AutoModelForCausalLM.from_pretrained(tmp_path / "small_release")
    assert released.dtype == torch.float32
    wanted = logits(adapted, rows)
    with adapted.disable_adapter():
        effect = (logits(adapted, rows) - wanted).square().mean().sqrt()
    assert (logits(released, rows) - wanted).square().mean().sqrt() < 0.01 * effect
    assert not blocking(tmp_path / "small_release", base)


def test_what_is_lost_is_what_a_reader_computes(base, tmp_path):
    """In bfloat16, from the files alone, without PEFT: W + B A · scale by hand."""
    to_bfloat16(base)
    make_adapter(base, tmp_path / "trained", scale=0.3)
    result = assemble_release(tmp_path / "trained", tmp_path / "release", base=base, quiet=True)
    factors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = probe_rows(512)
    before = logits(model, rows).double()
    scale = 8 / 4  # lora_alpha by default, over r
    with torch.no_grad():
        for name, down in factors.items():
            if name.endswith("lora_A.weight"):
                up = factors[name.replace("lora_A", "lora_B")]
                module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight += scale * up @ down
    wanted = logits(model, rows).double()
    given = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "release", dtype=torch.float32), rows).double()
    lost = (given - wanted).square().mean().sqrt() / (wanted - before).square().mean().sqrt()
    assert result.merge.lost == pytest.approx(lost.item(), rel=1e-3)


def test_a_merge_that_went_wrong_is_refused(base, tmp_path, monkeypatch):
    """What was saved is not what was merged: one weight is off by a hundredth."""
    make_adapter(base, tmp_path / "trained")

    save = PreTrainedModel.save_pretrained

    def save_another(model, *args, **kwargs):
        with torch.no_grad():
            model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 4] += 1e-2
        save(model, *args, **kwargs)

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save_another)
    with pytest.raises(ValueError, match="does not compute what base and adapter do .* nothing is released"):
        assemble_release(tmp_path / "trained", tmp_path / "release", base=base, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "trained"]


def test_an_adapter_on_a_model_that_is_in_no_file_is_refused(base, tmp_path):
    """Two adapters, one after the other: base and second adapter do not give what was trained."""
    first = make_adapter(base, tmp_path / "first").merge_and_unload()
    second = get_peft_model(first, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_alpha=4))
    for name, parameter in second.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    second.save_pretrained(tmp_path / "second")
    make_report_of_adapter(base, tmp_path / "second").save(tmp_path / "second" / REPORT)
    with pytest.raises(ValueError, match="trained on weights that are not those of the base's files"):
        assemble_release(tmp_path / "second", tmp_path / "release", base=base, trained=second, quiet=True)
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["down_proj"], "target_modules": ["q_proj"]}])
def test_an_adapter_on_its_base_is_seen_to_be_that(base, tmp_path, dtype, options):
    """In the data type of the training; and with modules that are trained as a whole."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    settings = {"r": 4, "target_modules": "all-linear", **options}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "trained")
    make_report_of_adapter(base, tmp_path / "trained").save(tmp_path / "trained" / REPORT)
    result = assemble_release(tmp_path / "trained", tmp_path / "release", base=base, trained=adapted, quiet=True)
    assert result.merge.error < 1e-6
    assert not blocking(tmp_path / "release", base)


def test_an_adapter_that_does_nothing_is_refused(base, tmp_path):
    make_adapter(base, tmp_path / "trained", scale=0.0)
    with pytest.raises(ValueError, match="The adapter changes nothing"):
        assemble_release(tmp_path / "trained", tmp_path / "release", base=base, quiet=True)


def test_an_adapter_whose_start_took_weights_from_the_base_is_refused(base, tmp_path):
    make_adapter(base, tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    (tmp_path / "trained" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' moved a part of the base's weights"):
        assemble_release(tmp_path / "trained", tmp_path / "release", base=base, quiet=True)


def test_an_adapter_can_be_kept_and_names_its_base_by_the_id(base, tmp_path):
    make_adapter(base, tmp_path / "trained")
    files = assemble_files(tmp_path / "trained", tmp_path / "release", base=base, adapter="keep")
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files) and "config.json" not in files
    config = json.loads((tmp_path / "release" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert blocking(tmp_path / "release", base) == [("reversible", "adapter_model.safetensors")]
    with pytest.raises(ValueError, match="merging it needs torch"):
        assemble_files(tmp_path / "trained", tmp_path / "other", base=base)
    report = UnlearningReport.load(tmp_path / "trained" / REPORT)
    report.base.model_id = report.base.revision = None
    report.save(tmp_path / "trained" / REPORT)
    with pytest.raises(ValueError, match="An adapter alone needs a base on the Hub"):
        assemble_files(tmp_path / "trained", tmp_path / "other", base=base, adapter="keep")


def test_the_base_of_a_model(tiny_model_path, random_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    assert find_base(model).completed() == tiny_model_path
    for name in ("", "/no/such/folder", "no-such/model"):
        other = random_model()
        other.config._name_or_path = name
        with pytest.raises(ValueError, match="The folder of the base model is not known"):
            find_base(other)
