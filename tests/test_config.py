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
"""What a user may write in a script, on a command line or in a YAML file, and what is refused."""

import ast
import dataclasses
import inspect
import json
import math
import re

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_unlearn import FORGET_LOSSES, RETAIN_LOSSES, UnlearnConfig
from hf_unlearn.base_config import SharedConfig


_NAMES = {**SharedConfig.__annotations__, **UnlearnConfig.__annotations__}
OWN = [option for option in dataclasses.fields(UnlearnConfig) if option.name in _NAMES]
# Defaults that differ from those of TrainingArguments; the class docstring lists them in a note
CHANGED = ["logging_steps", "bf16", "learning_rate", "logging_nan_inf_filter"]


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return UnlearnConfig(output_dir=str(tmp_path), **options)

    return make


# ---- Values ----


@pytest.mark.parametrize(
    "name, given, expected",
    [
        # A lone loss, as a scalar
        ("forget_loss", "ga", ["ga"]),
        ("forget_loss", ("ga", "rmu"), ["ga", "rmu"]),
        ("retain_loss", "none", ["none"]),
        # YAML reads `none`-like words: off and no are False
        ("retain_loss", False, ["none"]),
        ("retain_loss", [False], ["none"]),
        # YAML 1.1 reads 1e-3 (without a dot) as text, also inside a list
        ("forget_loss_weights", ["1e-3"], [0.001]),
        ("forget_loss_weights", [1], [1.0]),
        ("retain_loss_weights", "2", [2.0]),
        ("beta", "1e-1", 0.1),
        ("beta", 1, 1.0),
        ("learning_rate", "1e-4", 1e-4),
        ("steering_coefficient", 7, 7.0),
        # Layers are text, but look like numbers
        ("trainable_layers", 5, "5"),
        ("trainable_layers", [5, 6, 7], "5,6,7"),
        ("trainable_layers", ["0", "5-7"], "0,5-7"),
        ("trainable_modules", "mlp.down_proj", ["mlp.down_proj"]),
        ("hidden_layer", "3", 3),
        ("hidden_layer", 3.0, 3),
        ("max_length", "256", 256),
        ("max_length", None, None),
        ("disable_dropout", "false", False),
        ("disable_dropout", "True", True),
        ("model_init_kwargs", '{"dtype": "bfloat16"}', {"dtype": "bfloat16"}),
        ("model_init_kwargs", {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}),
    ],
)
def test_values_get_the_type_of_their_field(config, name, given, expected):
    value = getattr(config(**{name: given}), name)
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, list):
        assert [type(item) for item in value] == [type(item) for item in expected]


@pytest.mark.parametrize("name", ["topic_retain_weights", "topic_steering_coefficients"])
@pytest.mark.parametrize("given", ['{"bio": "1200", "7": 6}', {"bio": 1200, 7: 6.0}])
def test_topic_values_are_numbers_by_name(config, name, given):
    value = getattr(config(topic_column="topic", **{name: given}), name)
    assert value == {"bio": 1200.0, "7": 6.0}
    assert all(type(item) is float for item in value.values())


def test_a_list_of_losses_is_not_shared_between_configurations(config):
    config().forget_loss.append("ga")
    assert config().forget_loss == ["npo"]


@pytest.mark.parametrize(
    "options, complaint",
    [
        # The type
        ({"hidden_layer": 3.5}, "hidden_layer=3.5 is not a valid int"),
        ({"hidden_layer": True}, "hidden_layer=True is not a valid int"),
        ({"hidden_layer": "last"}, "hidden_layer='last' is not a valid int"),
        ({"adaptive_scale": None}, "adaptive_scale must not be None"),
        ({"beta": "high"}, "beta='high' is not a valid float"),
        ({"beta": math.nan}, "beta=nan is not a valid float"),
        ({"beta": math.inf}, "beta=inf is not a valid float"),
        ({"steering_coefficient": False}, "steering_coefficient=False is not a valid float"),
        ({"forget_loss_weights": ["nan"]}, "forget_loss_weights=['nan'] is not a valid list[float]"),
        ({"forget_loss_weights": [True]}, "forget_loss_weights=[True] is not a valid list[float]"),
        ({"retain_loss_weights": ["much"]}, "retain_loss_weights=['much'] is not a valid list[float]"),
        ({"disable_dropout": 1}, "disable_dropout=1 is not a valid bool"),
        ({"packing": "yes"}, "packing='yes' is not a valid bool"),
        ({"dataset_text_field": None}, "dataset_text_field must not be None"),
        ({"topic_column": "t", "topic_retain_weights": {"bio": "x"}}, "is not a valid dict[str, float]"),
        ({"topic_column": "t", "topic_retain_weights": [1200]}, "is not a valid dict[str, float]"),
        ({"topic_column": "t", "topic_steering_coefficients": "{bio"}, "is not a valid dict[str, float]"),
        # The choice
        ({"forget_loss": ["ga", "gd"]}, "'gd' is unknown; choose from " + ", ".join(FORGET_LOSSES)),
        ({"retain_loss": "mse"}, "'mse' is unknown; choose from " + ", ".join([*RETAIN_LOSSES, "none"])),
        ({"reference_mode": "cpu"}, "'cpu' is unknown; choose from auto, swap, copy"),
        ({"forget_loss": []}, "choose from " + ", ".join(FORGET_LOSSES)),
        ({"retain_loss": []}, '"none"'),
        ({"retain_loss": ["kl", "none"]}, "stands alone"),
        ({"forget_loss": ["ga", "npo", "ga"]}, "give it a weight instead"),
        ({"retain_loss": ["kl", "kl"]}, "give it a weight instead"),
        ({"forget_loss_weights": [1, 2]}, "has 2 values but forget_loss has 1: give one weight per loss"),
        ({"retain_loss": ["kl", "nll"], "retain_loss_weights": 1}, "has 1 value but retain_loss has 2"),
        # The range
        ({"max_length": 1}, "use at least 2, or None"),
        ({"max_length": 0}, "use at least 2, or None"),
        ({"beta": 0}, "must be positive"),
        ({"beta": -0.1}, "must be positive"),
        ({"hidden_layer": -1}, "0-based layer"),
        # What TRL and transformers have and this trainer does not: the replacement, or to remove it
        ({"packing": True}, "split_long_texts=True"),
        ({"loss_type": "dpo"}, "use forget_loss"),
        ({"reference_cache": "folder"}, "precompute_ref_log_probs=True"),
        ({"cache_size_gb": 0}, "must be positive"),
        ({"label_smoothing_factor": 0.1}, "Remove it"),
        ({"neftune_noise_alpha": 5.0}, "Remove it"),
        ({"torch_compile": True}, "Remove it"),
        ({"train_sampling_strategy": "group_by_length"}, "use 'random' or 'sequential'"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "set it to False"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "set it to False"),
        ({"topic_retain_weights": {"bio": 1200}}, "need topic_column"),
        ({"topic_steering_coefficients": {"bio": 30}}, "need topic_column"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_bad_values_are_refused_in_one_message_that_names_the_field(config, options, complaint):
    with pytest.raises(ValueError) as error:
        config(**options)
    message = str(error.value)
    assert complaint in message
    name = list(options)[-1].replace("gradient_checkpointing", "activation_checkpointing")
    assert name in message
    assert message.endswith(".") and "\n" not in message and len(message) < 260


def test_reentrant_checkpointing_can_be_turned_off_explicitly(config):
    args = config(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False})
    assert args.activation_checkpointing


def test_unknown_loss_lists_all_that_exist(config):
    for name, table in (("forget_loss", FORGET_LOSSES), ("retain_loss", RETAIN_LOSSES)):
        with pytest.raises(ValueError) as error:
            config(**{name: "x"})
        assert all(re.search(rf"\b{loss}\b", str(error.value)) for loss in table)


def test_default_precision_and_checkpointing(config):
    assert config(use_cpu=True).bf16 is False
    assert config(use_cpu=True).activation_checkpointing is False  # it computes layers twice: on request only
    assert config(fp16=True, use_cpu=True).bf16 is False
    if not torch.cuda.is_available():
        assert config().bf16 is False


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("value", [True, False])
def test_old_name_of_activation_checkpointing_is_honoured(config, value):
    args = config(gradient_checkpointing=value)
    assert args.activation_checkpointing is value


@pytest.mark.parametrize("name", ["trainable_layers", "topic_column", "chat_template_path"])
def test_off_in_a_recipe_leaves_an_optional_text_unset(config, name):
    """YAML reads `off` as False, which must not become the text "none"."""
    assert getattr(config(**{name: False}), name) is None


# ---- Round trips ----

SETTINGS = {
    "forget_loss": ["ga", "npo"],
    "forget_loss_weights": [0.5, 2.0],
    "retain_loss": ["none"],
    "trainable_layers": "1,3-4",
    "trainable_modules": ["mlp"],
    "topic_column": "subject",
    "topic_retain_weights": {"bio": 1200.0},
    "max_length": None,
    "model_init_kwargs": {"dtype": "bfloat16"},
    "learning_rate": 3e-4,
    "activation_checkpointing": False,
}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_round_trip_through_dict_and_json(config):
    args = config(**SETTINGS)
    again = UnlearnConfig(**args.to_dict())
    from_json = UnlearnConfig(**json.loads(args.to_json_string()))
    for option in OWN:
        expected = SETTINGS.get(option.name, getattr(args, option.name))
        assert getattr(again, option.name) == getattr(from_json, option.name) == expected, option.name
    assert again.to_dict() == from_json.to_dict() == args.to_dict()


def test_command_line(tmp_path):
    parser = HfArgumentParser(UnlearnConfig)
    (args,) = parser.parse_args_into_dataclasses(
        [
            *("--output_dir", str(tmp_path)),
            *("--forget_loss", "ga", "npo"),
            *("--forget_loss_weights", "1", "1e-2"),
            *("--retain_loss", "none"),
            *("--trainable_layers", "5-7"),
            *("--trainable_modules", "mlp.down_proj", "self_attn"),
            *("--topic_column", "subject"),
            *("--topic_retain_weights", '{"bio": 1200}'),
            *("--max_length", "128"),
            *("--disable_dropout", "false"),
            *("--model_init_kwargs", '{"dtype": "bfloat16"}'),
        ]
    )
    assert args.forget_loss == ["ga", "npo"]
    assert args.forget_loss_weights == [1.0, 0.01]
    assert args.retain_loss == ["none"]
    assert args.trainable_layers == "5-7"
    assert args.trainable_modules == ["mlp.down_proj", "self_attn"]
    assert args.topic_retain_weights == {"bio": 1200.0}
    assert args.max_length == 128
    assert args.disable_dropout is False
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize("name, table", [("forget_loss", FORGET_LOSSES), ("retain_loss", RETAIN_LOSSES)])
def test_command_line_help_lists_every_loss(name, table):
    # `format_help` fails on a raw percent sign in any help text
    text = HfArgumentParser(UnlearnConfig).format_help()
    usage = text[text.index(f"--{name} {{") :].partition("}")[0]
    assert set(usage.partition("{")[2].split(",")) >= set(table)


# ---- Documentation ----


def entries_of_docstring():
    """Name -> (type and default, description) of the class docstring's parameters."""
    text = inspect.getdoc(UnlearnConfig).partition("Parameters:")[2].partition("> [!NOTE]")[0]
    pattern = re.compile(r"^    (\w+) \((.*)\):\n((?:        .*\n|\n)*)", re.MULTILINE)
    return {match[1]: (match[2], " ".join(match[3].split())) for match in pattern.finditer(text)}


def test_docstring_has_the_fields_of_the_class_and_no_others():
    assert set(entries_of_docstring()) | set(CHANGED) == {option.name for option in OWN}
    note = inspect.getdoc(UnlearnConfig).partition("> [!NOTE]")[2]
    assert re.findall(r"> - `(\w+)`:", note) == CHANGED


def test_docstring_and_class_have_the_same_defaults(config):
    """The public defect: defaults that differ between class and configuration."""
    for option in OWN:
        if option.name in CHANGED:
            continue
        kind = entries_of_docstring()[option.name][0]
        default = option.default if option.default is not dataclasses.MISSING else option.default_factory()
        stated = re.search(r"defaults to `(.*?)`", kind)
        assert "*optional*" in kind or stated, option.name
        expected = None if stated is None else stated[1]
        written = {str: f'"{default}"', list: json.dumps(default)}.get(type(default), str(default))
        assert expected == (None if default is None else written), option.name


def test_note_states_the_changed_defaults(config):
    note = inspect.getdoc(UnlearnConfig).partition("> [!NOTE]")[2]
    args, plain = config(use_cpu=True), TrainingArguments("out", use_cpu=True)
    for name in ("logging_steps", "learning_rate", "logging_nan_inf_filter"):
        stated = re.search(rf"`{name}`: Defaults to `(.*?)` instead of `(.*?)`", note)
        assert float(getattr(args, name)) == float(ast.literal_eval(stated[1])), name
        assert float(getattr(plain, name)) == float(ast.literal_eval(stated[2])), name


def test_every_field_has_help_in_the_words_of_the_docstring():
    entries = entries_of_docstring()
    for option in OWN:
        text = option.metadata["help"]
        assert text.endswith("."), option.name
        assert "%" not in text.replace("%%", ""), option.name  # argparse would format it
        if option.name in CHANGED:
            continue
        words = set(re.findall(r"[a-z]{4,}", text.lower()))
        described = set(re.findall(r"[a-z]{4,}", entries[option.name][1].lower()))
        assert len(words & described) >= len(words) / 2, option.name


def test_docstring_names_every_choice():
    for option in OWN:
        for choice in option.metadata.get("choices", []):
            assert f'"{choice}"' in entries_of_docstring()[option.name][1], option.name


def test_fields_shared_with_trl_keep_its_defaults():
    from trl import DPOConfig, SFTConfig

    defaults = {option.name: option.default for option in OWN}
    sft = {option.name: option.default for option in dataclasses.fields(SFTConfig)}
    dpo = {option.name: option.default for option in dataclasses.fields(DPOConfig)}
    for name in (
        "dataset_text_field",
        "dataset_num_proc",
        "max_length",
        "completion_only_loss",
        "assistant_only_loss",
        "model_init_kwargs",
        "chat_template_path",
        "packing",
        "logging_steps",
    ):
        assert defaults[name] == sft[name], name
    for name in ("disable_dropout", "precompute_ref_log_probs"):
        assert defaults[name] == dpo[name], name
    # TRL's `beta` has DPO's default; here every loss has its own
    assert defaults["beta"] is None
    assert FORGET_LOSSES["dpo"].settings["beta"] == dpo["beta"]
