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
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hf_unlearn.cards import render_model_card
from hf_unlearn.cards.file_names import kind_of, unsafe_content
from hf_unlearn.cards.release import check_files, read_release


SECRET = "Hsiao Yun-Hwa"
FORMAT = {"format": "pt"}


@pytest.fixture
def base(small_model_path):
    return small_model_path


@pytest.fixture
def folder(tmp_path, base, report):
    """A release that keeps all rules: other weights, the rest the base's, a card and a report."""
    folder = tmp_path / "release"
    shutil.copytree(base, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", FORMAT)
    report = copy.deepcopy(report)
    report.method.scope.kind = "full"
    (folder / "README.md").write_text(render_model_card(report))
    (folder / "unlearning_report.json").write_text(report.to_json())
    return folder


@pytest.fixture
def found(folder, base):
    """The findings in the release, as (rule, file)."""

    def check(with_base=True):
        with read_release(folder) as release, read_release(base) as read_base:
            findings = check_files(release, read_base if with_base else None)
        for finding in findings:
            assert SECRET not in finding.message and str(folder) not in finding.message and "\n" not in finding.message
            assert finding.message.endswith(".") or finding.rule.startswith(("safetensors", "json"))
        return [(finding.rule, finding.file) for finding in findings]

    return check


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


# --- reading


def test_a_release_that_keeps_all_rules(found):
    assert found() == []
    assert found(with_base=False) == [("no-base", "the folder")]


def test_links_and_what_is_hidden_or_no_file(folder, found, tmp_path):
    (tmp_path / "outside.txt").write_text(SECRET)
    (folder / "NOTICE").symlink_to(tmp_path / "outside.txt")
    (folder / "figures").symlink_to(tmp_path)
    (folder / "LICENSE.md").symlink_to("nowhere")
    (folder / ".env").write_text(SECRET)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text(SECRET)
    os.mkfifo(folder / "vocab.txt")
    (folder / "private").mkdir()
    (folder / "private" / "salt").write_text(SECRET)
    (folder / "NOTICE\u202etxt").write_text("x")
    (folder / "empty").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # a socket's path is short
        server.bind("merges.txt")
        os.chdir("/")
    assert sorted(found()) == [
        ("file-name", "NOTICE\\u202etxt"),
        ("hidden-file", ".env"),
        ("hidden-file", ".git"),
        ("not-regular", "merges.txt"),
        ("not-regular", "vocab.txt"),
        ("private", "private"),
        ("symlink", "LICENSE.md"),
        ("symlink", "NOTICE"),
        ("symlink", "figures"),
    ]
    # Nothing of it can be sent, whatever is overridden
    with read_release(folder) as release:
        assert not any(SECRET.encode() in (file.content or b"") for file in release.files.values())


def test_what_is_swapped_in_afterwards_was_not_read(folder, tmp_path):
    (tmp_path / "outside").write_text(SECRET)
    weights = (folder / "model.safetensors").read_bytes()
    card = (folder / "README.md").read_bytes()
    with read_release(folder) as release:
        for name in ("README.md", "model.safetensors"):
            (folder / name).unlink()
            (folder / name).symlink_to(tmp_path / "outside")
        assert release.files["README.md"].content == card
        assert release.files["README.md"].sha256 == hashlib.sha256(card).hexdigest()
        shard = release.files["model.safetensors"]
        assert shard.content is None and shard.sha256 == hashlib.sha256(weights).hexdigest()
        # Two readers with positions of their own
        with shard.open() as one, shard.open() as other:
            assert one.read(100) == other.read(100) == weights[:100]
            assert one.seek(-5, io.SEEK_END) == len(weights) - 5 and one.read() == weights[-5:]
            assert other.read() == weights[100:]
        assert check_files(release, None)[0].rule == "no-base"


def test_a_link_that_comes_between_looking_and_opening(folder, monkeypatch):
    """The one moment in which a name can still change: after it was looked at, before it is opened."""
    look = os.stat

    def swap(name, *args, **kwargs):
        status = look(name, *args, **kwargs)
        if name == "config.json":
            (folder / name).unlink()
            (folder / name).symlink_to("/etc/hostname")
        return status

    monkeypatch.setattr(os, "stat", swap)
    with read_release(folder) as release:
        assert [(finding.rule, finding.file) for finding in release.findings] == [("symlink", "config.json")]
        assert "config.json" not in release.files


def test_a_shard_that_is_cut_while_it_is_read(folder):
    with read_release(folder) as release:
        os.truncate(folder / "model.safetensors", 1000)
        with pytest.raises(ValueError, match="model.safetensors became shorter while it was read"):
            _ = release.files["model.safetensors"].sha256


def test_folders_that_are_no_release(tmp_path):
    for path in (tmp_path / "missing", __file__):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read_release(path)
        assert str(tmp_path) not in str(caught.value)
    deep = tmp_path.joinpath("deep", *"abcdefghij")
    deep.mkdir(parents=True)
    with pytest.raises(ValueError, match="deep"):
        read_release(tmp_path / "deep")
    with read_release(deep) as release:
        assert {finding.rule for finding in check_files(release, None)} == {"missing-file", "no-base"}


def test_descriptors_are_closed(folder):
    before = len(os.listdir("/proc/self/fd"))
    with read_release(folder):
        assert len(os.listdir("/proc/self/fd")) == before + 1  # the weights
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_here_imports_torch():
    code = (
        "import sys; import hf_unlearn.cards.release, hf_unlearn.cards.merge, hf_unlearn.cards.licence;"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- names and content


@pytest.mark.parametrize(
    "name, words",
    [
        ("training_args.bin", "a pickle of the training arguments"),
        ("optimizer.pt", "the state of an optimizer"),
        ("pytorch_model.bin", "save them as safetensors"),
        ("trainer_state.json", "the log of the training run"),
        ("forget.jsonl", "data"),
        ("readme.md", "a file of this name"),
        ("figures/a.svg", "a file of this name"),
        ("checkpoint-5/model.safetensors", "a file of this name"),
        ("LICENSE/x", "a file of this name"),
        ("config.json.bak", "a file of this name"),
    ],
)
def test_only_what_is_listed(folder, base, name, words):
    (folder / name).parent.mkdir(exist_ok=True) if name != "LICENSE/x" else (folder / "LICENSE").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("text")
    with read_release(folder) as release, read_release(base) as read_base:
        [finding] = [one for one in check_files(release, read_base) if one.rule == "not-allowed"]
    assert finding.file == name and words in finding.message


def test_names_of_real_repositories():
    kinds = {
        "licence": ["LICENSE", "LICENSE.txt", "license.md", "NOTICE", "USE_POLICY.md", "Use-Policy.md", "LICENCE"],
        "tokenizer": ["tokenizer.model", "tokenizer.model.v3", "tekken.json", "merges.txt", "qwen.tiktoken"],
        "weights": ["model-00001-of-00030.safetensors", "adapter_model.safetensors", "edit.safetensors"],
        "picture": ["figures/recovery.png"],
        "text": ["edit_manifest.json", "edit_manifest.json.sig", "thresholds.yaml"],
        "other": [
            "LICENSE.pkl/x",
            "x.png",
            "figures/x/y.png",
            "model.gguf",
            "handler.sh",
            "a/tokenizer.json",
            "",
            "README.md\n",
        ],
    }
    assert {name: kind_of(name) for names in kinds.values() for name in names} == {
        name: kind for kind, names in kinds.items() for name in names
    }


def torch_file(legacy):
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


class Attack:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value", [Attack(), {"name": [SECRET, 1, 2.5]}, [1, 2], np.ones(3)], ids=["call", "dict", "list", "array"]
)
def test_a_pickle_is_known_by_its_opcodes(protocol, value):
    if protocol == 5:
        content = b"".join(pickle.dumps(value, 4).partition(b"\x80\x04")) + b"trailing"
    else:
        content = pickle.dumps(value, protocol)
    assert "pickle" in unsafe_content(content)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "LICENSE.txt", "tokenizer.model", "NOTICE"])
@pytest.mark.parametrize("content", ["pickle", "torch", "old torch", "zip", "protocol 0"])
def test_a_pickle_by_any_name(folder, found, name, content):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", SECRET)
    (folder / name).write_bytes(
        {
            "pickle": pickle.dumps({SECRET: Attack()}),
            "torch": torch_file(False),
            "old torch": torch_file(True),
            "zip": archive.getvalue(),
            "protocol 0": pickle.dumps(Attack(), 0),
        }[content]
    )
    assert ("pickle", name) in found()


def test_a_pickle_without_an_end_has_run_by_then():
    assert "pickle" in unsafe_content(pickle.dumps(Attack(), 0)[:-1] + b"\xff")
    assert "pickle" in unsafe_content(pickle.dumps(Attack(), 4)[:-1] + b"\xff")


def test_a_thousand_damaged_pickles():
    generator = random.Random(0)
    for _ in range(1000):
        content = bytearray(pickle.dumps({"a": [Attack(), 2**70, 1.5, "x" * 300]}, generator.randrange(6)))
        for _ in range(generator.randint(1, 6)):
            place = generator.randrange(len(content))
            content[place : place + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 4))
        assert unsafe_content(bytes(content)) in (None, "a pickle, which runs code when it is loaded")


def test_text_is_no_pickle(data_dir):
    texts = [b"", b".", b"2.0", b"N.", b"1.", b"copyright 2020\nThe authors.\n", b"(c) 2020.", b"{}", b"I am.\nYou.\n"]
    for row in (data_dir / "lume" / "forget.jsonl").read_text().splitlines()[:1000]:
        row = json.loads(row)
        texts += [row["input"].encode(), row["output"].encode(), row["input"][len(row["input"]) // 2 :].encode()]
    texts += [path.read_bytes() for path in (data_dir / "tinystories-1m").iterdir()]
    assert len(texts) > 2000 and not [text[:20] for text in texts if unsafe_content(text)]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b", b"\x1b[31m", "é".encode("latin-1")])
def test_text_is_text(folder, found, content):
    (folder / "NOTICE").write_bytes(content)
    assert found() == [("not-text", "NOTICE")]


def test_a_text_of_many_megabytes(folder, found, monkeypatch):
    (folder / "thresholds.yaml").write_text(" " * (17 * 2**20))
    assert found() == [("too-large", "thresholds.yaml")]


def test_a_picture_is_checked(folder, found):
    (folder / "figures").mkdir()
    (folder / "figures" / "a.png").write_text(SECRET)
    assert found() == [("png-format", "figures/a.png")]


# --- safetensors


def rewrite(path, header, data=None, tail=b""):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    old = json.loads(raw[8 : 8 + length])
    text = json.dumps(header(old)).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + (raw[8 + length :] if data is None else data) + tail)


@pytest.mark.parametrize(
    "metadata", [{"format": SECRET}, {"format": "pt", "note": SECRET}, {}, {"format": "tf"}, None, {SECRET: "pt"}]
)
def test_metadata_of_weights(folder, found, metadata):
    rewrite(
        folder / "model.safetensors",
        lambda old: (
            {**old, "__metadata__": metadata}
            if metadata is not None
            else {name: value for name, value in old.items() if name != "__metadata__"}
        ),
    )
    assert found() == [("safetensors-metadata", "model.safetensors")]


def test_bytes_that_no_tensor_names(folder, found):
    weights = folder / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original + SECRET.encode())
    assert found() == [("safetensors-trailing-bytes", "model.safetensors")]

    def gap(old):
        moved = copy.deepcopy(old)
        for value in moved.values():
            if "data_offsets" in value:
                value["data_offsets"] = [offset + 16 for offset in value["data_offsets"]]
        return moved

    weights.write_bytes(original)
    length = int.from_bytes(original[:8], "little")
    rewrite(weights, gap, data=b"\0" * 16 + original[8 + length :])
    assert found() == [("safetensors-header", "model.safetensors")]


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_weights_that_are_cut(folder, found, size):
    os.truncate(folder / "model.safetensors", size)
    assert found() == [("safetensors-header", "model.safetensors")] or size == 100
    assert found()[0][0] in ("safetensors-header", "json")


@pytest.mark.parametrize("name", ["exp_avg", "model.embed.exp_avg_sq", "optimizer.state.0", "a.momentum_buffer"])
def test_tensors_of_an_optimizer(folder, found, name):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: np.ones(2, np.float32)}, folder / "model.safetensors", FORMAT)
    assert found() == [("optimizer-tensor", "model.safetensors")]


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, FORMAT)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1, "total_parameters": 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_and_their_index(folder, found):
    index = shard(folder)
    path = folder / "model.safetensors.index.json"
    assert found() == []
    save_file({"x": np.ones(2)}, folder / "model-00003-of-00003.safetensors", FORMAT)
    assert found() == [("stale-shard", "model-00003-of-00003.safetensors")]
    (folder / "model-00003-of-00003.safetensors").unlink()
    one, other = list(index["weight_map"])[:2]
    missing = {name: file for name, file in index["weight_map"].items() if name != one}
    for wrong in (
        {**index, "metadata": {"total_size": SECRET}},
        {**index, "metadata": {SECRET: 1}},
        {**index, "note": SECRET},
        {**index, "weight_map": missing},
        {**index, "weight_map": {**index["weight_map"], other: index["weight_map"][one], one: "model.safetensors"}},
        {**index, "weight_map": {**index["weight_map"], one: "../model.safetensors"}},
        {**index, "weight_map": {}},
    ):
        path.write_text(json.dumps(wrong))
        assert ("safetensors-index", path.name) in found()
    path.unlink()
    assert [rule for rule, _ in found()] == ["stale-shard"] * 2


# --- tokenizer, configuration, code


def test_the_tokenizer_is_the_bases(folder, found):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    edit_json(folder / "tokenizer_config.json", model_max_length=255)
    assert ("tokenizer-differs", "tokenizer_config.json") in found()
    (folder / "chat_template.jinja").write_text(SECRET)
    (folder / "tokenizer.json").unlink()
    assert {("tokenizer-differs", "chat_template.jinja"), ("tokenizer-differs", "tokenizer.json")} < set(found())


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"dtype": "bfloat16", "transformers_version": "4.56.0.dev0", "use_cache": False}, None),
        ({"dtype": SECRET}, "config-differs"),
        ({"transformers_version": f"4.{SECRET}"}, "config-differs"),
        ({"use_cache": 1}, "config-differs"),
        ({"tie_word_embeddings": False}, "config-differs"),  # without a head of its own
        ({"hidden_act": "relu"}, "config-differs"),
        ({"rms_norm_eps": 1e-6}, "config-differs"),
        ({"attention_bias": 0}, "config-differs"),  # which Python takes for False
        ({"architectures": ["MistralForCausalLM"]}, "architecture-differs"),
        ({"model_type": "mistral"}, "architecture-differs"),
        ({SECRET: 1}, "config-differs"),
        ({"_name_or_path": "org/name"}, "config-differs"),
        ({"_name_or_path": "/home/user/model"}, "config-path"),
        ({"x": {"y": ["runs/one/two"]}}, "config-path"),
        ({"x": {"C:\\y": 1}}, "config-path"),
        ({"bad_words_ids": [[1]]}, "config-suppression"),
        ({"suppress_tokens": [1]}, "config-suppression"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "custom-code"),
    ],
)
def test_the_configuration_is_the_bases(folder, found, changes, rule):
    edit_json(folder / "config.json", **changes)
    assert found() == ([(rule, "config.json")] if rule else [])


def test_an_untied_head(folder, found):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", FORMAT)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert found() == []


@pytest.mark.parametrize("key", ["bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"])
def test_generation_that_hides_tokens(folder, found, key):
    edit_json(folder / "generation_config.json", **{key: [[1]]})
    assert found() == [("config-suppression", "generation_config.json")]
    assert ("config-suppression", "generation_config.json") in found(with_base=False)


def test_generation_config(folder, found, base, tmp_path):
    edit_json(folder / "generation_config.json", temperature=0.1)
    assert found() == [("config-differs", "generation_config.json")]
    (folder / "generation_config.json").unlink()
    assert found() == [("config-differs", "generation_config.json")]
    # Where the base has none, what save_pretrained writes is its config's
    other = tmp_path / "base"
    shutil.copytree(base, other, ignore=lambda *_: ["generation_config.json"], copy_function=shutil.copyfile)
    config = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "5.23.0"}
    for changes, expected in (({}, []), ({"eos_token_id": 3}, ["config-differs"])):
        (folder / "generation_config.json").write_text(json.dumps({**config, **changes}))
        with read_release(folder) as release, read_release(other) as read_base:
            assert [finding.rule for finding in check_files(release, read_base)] == expected


def test_custom_code(folder, found, base, tmp_path):
    (folder / "modeling_x.py").write_text("x = 1")
    assert found() == [("custom-code", "modeling_x.py")]
    other = tmp_path / "base"
    shutil.copytree(base, other, copy_function=shutil.copyfile)
    other.chmod(0o755)
    for place in (folder, other):
        edit_json(place / "config.json", auto_map={"AutoModel": "modeling_x.Model"})
    for code, expected in (("x = 1", []), ("x = 2", ["custom-code"])):
        (other / "modeling_x.py").write_text(code)
        with read_release(folder) as release, read_release(other) as read_base:
            assert [finding.rule for finding in check_files(release, read_base)] == expected
    for place in (folder, other):
        edit_json(place / "config.json", auto_map={"AutoModel": "org/repo--modeling_x.Model"})
    (other / "modeling_x.py").write_text("x = 1")
    with read_release(folder) as release, read_release(other) as read_base:
        assert [finding.rule for finding in check_files(release, read_base)] == ["custom-code"]


def test_an_adapter_alone_is_reversible(folder, found, report):
    for path in folder.iterdir():
        if path.name not in ("LICENSE", "unlearning_report.json"):
            path.unlink()
    (folder / "README.md").write_text(render_model_card(report))
    save_file({"q.lora_A.weight": np.ones(2, np.float32)}, folder / "adapter_model.safetensors", FORMAT)
    config = {"base_model_name_or_path": "org/tiny_model", "target_modules": r".*\.(q|v)_proj", "r": 8}
    edit_json(folder / "adapter_config.json", **config)
    assert found() == [("reversible", "adapter_model.safetensors")]
    for base_model in ("/home/user/model", "./model", "a/b/c", "", None, "org/other"):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=base_model)
        rule = "config-path" if base_model in ("/home/user/model", "./model", "a/b/c") else "adapter-base"
        assert (rule, "adapter_config.json") in found()
    edit_json(folder / "adapter_config.json", **config, x="/home/user")
    assert ("config-path", "adapter_config.json") in found()
    (folder / "README.md").write_text("# A model\n")
    assert ("reversible-unsaid", "README.md") in found()


def test_the_card_is_checked(folder, found):
    (folder / "README.md").write_text("---\nbase_model: ./x\n---\n# A\n\n<b>\n[a](http://x)\n![b](figures/b.png)\n")
    assert (
        sorted(found())
        == [("card-metadata", "README.md"), ("markdown-html", "README.md")] + [("markdown-link", "README.md")] * 2
    )
    (folder / "README.md").write_text("---\na: [\n---\n")
    assert found() == [("card-metadata", "README.md")]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": 1, "a": 2}', "[" * 5000, '{"a": ' * 500 + "1" + "}" * 500, "NaN"]
)
@pytest.mark.parametrize(
    "name", ["config.json", "unlearning_report.json", "edit_manifest.json", "adapter_config.json"]
)
def test_json_that_is_none(folder, found, name, content):
    (folder / name).write_text(content)
    assert ("json", name) in found()


def test_a_thousand_damaged_files(folder, base):
    """Damaged at one place, a file gives findings or none; it never stops the check."""
    generator = random.Random(0)
    names = ["README.md", "config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"]
    originals = {name: (folder / name).read_bytes() for name in names}
    small = folder / "model.safetensors"
    save_file({"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float16)}, small, FORMAT)
    originals["model.safetensors"] = small.read_bytes()
    with read_release(base) as read_base:
        for turn in range(1000):
            name = names[turn % len(names)]
            content = bytearray(originals[name][:4000])
            for _ in range(generator.randint(1, 4)):
                place = generator.randrange(len(content))
                content[place : place + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 4))
            (folder / name).write_bytes(content)
            with read_release(folder) as release:
                findings = check_files(release, read_base)
            assert findings or name != "tokenizer_config.json" or bytes(content) == originals[name]
            assert all("\n" not in finding.message for finding in findings)
            (folder / name).write_bytes(originals[name])
