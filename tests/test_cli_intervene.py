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
"""`hf-unlearn intervene`, run as a user runs it, on trained checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import InterventionConfig, UnlearningReport
from hf_unlearn.cli import main
from hf_unlearn.data import prepare_dataset
from hf_unlearn.intervention_data import prompt_ids


ROOT = Path(__file__).parents[1]
EDITED = "model.layers.2.mlp.down_proj"  # the middle one of five layers
WORD = "Lily"
CONTEXTS = (
    "Once upon a time, there was a little girl named",
    "One day, a little girl named",
    "There was a girl and her name was",
)


@pytest.fixture
def cli(monkeypatch, capfd):
    """Runs `hf-unlearn ...` in this process; returns exit code, stdout and stderr."""
    monkeypatch.delenv("HF_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def files(tofu_rows, tmp_path) -> dict[str, Path]:
    """Rows that the known model knows, and prompts; each under a name that must not come back."""
    prompts = [{"instruction": row["question"]} for row in tofu_rows("retain90")[:4]]
    return {
        "forget": write_rows(tmp_path / "hush_forget.jsonl", tofu_rows("forget10_perturbed")[:3]),
        "retain": write_rows(tmp_path / "hush_retain.jsonl", tofu_rows("retain90")[:12]),
        "risky": write_rows(tmp_path / "hush_risky.jsonl", prompts[:2]),
        "safe": write_rows(tmp_path / "hush_safe.jsonl", prompts[2:]),
        "contexts": write_lines(tmp_path / "hush_contexts.txt", CONTEXTS),
        "out": tmp_path / "out",
    }


@pytest.fixture
def authors(cli, known_model, files):
    """Runs `hf-unlearn intervene` on three facts about an author; later arguments win."""

    def run(*arguments: object) -> tuple[int, str, str]:
        return cli("intervene", *words(author_arguments(known_model, files)), *arguments)

    return run


@pytest.fixture
def lily(cli, tiny_model_path, files):
    """Runs `hf-unlearn intervene` against a name in stories, without any data set."""

    def run(kind: str, *arguments: object) -> tuple[int, str, str]:
        given = {"--kind": kind, "--model_name_or_path": tiny_model_path, "--output_dir": files["out"]}
        return cli("intervene", *words(given), "--forbidden_words", WORD, "--use_cpu", *arguments)

    return run


def author_arguments(model: str, files: dict[str, Path]) -> dict[str, object]:
    return {
        "--model_name_or_path": model,
        "--forget": files["forget"],
        "--retain": files["retain"],
        "--positions": "first",
        "--output_dir": files["out"],
        "--max_length": 256,
        "--use_cpu": "true",
    }


def words(arguments: dict[str, object]) -> list[object]:
    return [word for pair in arguments.items() for word in pair]


def write_rows(path: Path, rows: list[dict]) -> Path:
    return write_lines(path, [json.dumps(row) for row in rows])


def write_lines(path: Path, lines: tuple[str, ...] | list[str]) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def sentence(err: str) -> str:
    """The one line of an error; progress bars may stand before it."""
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("Error: ")


def load(path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
def next_logits(model, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


def first_tokens(path: str, rows: list[dict]) -> list[tuple[list[int], int]]:
    """Question and first token of the answer, by the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for row in rows:
        question = tokenizer(row["question"])["input_ids"]
        whole = tokenizer(f"{row['question']} {row['answer']}")["input_ids"]
        assert whole[: len(question)] == question
        found.append((question, whole[len(question)]))
    return found


def weight_change(before: str, after: str, name: str = EDITED) -> tuple[float, float]:
    """Norm of what changed, and relative to the weight, from the files; nothing else may have changed."""
    old, new = (load_file(f"{path}/model.safetensors") for path in (before, after))
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert changed == {f"{name}.weight"}
    weight = old[f"{name}.weight"].double()
    norm = (new[f"{name}.weight"].double() - weight).norm().item()
    return norm, norm / weight.norm().item()


def secrets(rows: list[dict]) -> set[str]:
    """Capitalised words of answers that stand in no question."""
    questions = " ".join(row["question"] for row in rows)
    answers = " ".join(row["answer"] for row in rows).replace(",", " ").replace(".", " ").split()
    return {word for word in answers if word[0].isupper() and len(word) > 4 and word not in questions}


# ---- Answers that must not come ----


def test_result_is_what_was_saved(authors, known_model, tofu_rows, files):
    code, out, err = authors("--json", "--logging_steps", "1")
    assert code == 0, err
    result = json.loads(out)  # nothing else is on stdout
    edit, metrics, folder = result["edit"], result["metrics"], files["out"]
    assert result["output_dir"] == str(folder)

    # Three rows, one token each; the norm is that of what the files hold
    assert (edit["kind"], edit["modules"], edit["constraints"], edit["violated"]) == ("pointwise", [EDITED], 3, 0)
    assert 1 <= edit["active"] <= 3 and 1 <= edit["rounds"] <= 10
    norm, relative_norm = weight_change(known_model, folder)
    assert edit["norm"] == pytest.approx(norm, rel=1e-4)
    assert edit["relative_norm"] == pytest.approx(relative_norm, rel=1e-4)

    # What was asked for holds on the saved model: the tokens lie a nat below the best ones
    before, after = load(known_model), load(folder)
    for question, token in first_tokens(known_model, tofu_rows("forget10_perturbed")[:3]):
        assert next_logits(before, question).argmax() == token
        logits = next_logits(after, question)
        assert logits.max() - logits[token] >= 1 - 1e-4

    assert metrics["before"]["forget"]["probability"] > 0.99
    assert metrics["after"]["forget"]["probability"] < 0.97  # one token of each answer
    assert metrics["after"]["retain"]["probability"] > 0.99 * metrics["before"]["retain"]["probability"]

    report = UnlearningReport.load(result["report"])
    assert report.metrics.after == metrics["after"]
    assert [certificate.name for certificate in report.certificates] == [
        certificate["name"] for certificate in result["certificates"]
    ]
    assert {"solution", "storage", "head_radius"} <= {certificate["name"] for certificate in result["certificates"]}
    assert all(certificate["limits"] for certificate in result["certificates"])


def test_table_for_a_person_and_an_adapter_that_others_can_load(cli, authors, known_model, files):
    code, out, err = authors("--store", "adapter", "--eval_rows", "2")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split("  ") == [
        "constraints", "active", "rounds", "seconds", "norm of the edit", "relative to the weights"
    ]  # fmt: skip
    assert lines[1].split()[0] == "3"
    table = {line[:28].strip(): line[28:].split() for line in lines}
    assert table["probability of the answers"] == ["before", "after", "rows"]
    assert table["forget set"][2] == table["retain set"][2] == "2"
    assert float(table["forget set"][0]) > 0.99 > float(table["forget set"][1])
    for heading in ("certified, at the worst place", "if the edited weights are cast to"):
        assert sum(line.startswith(heading) for line in lines) == 1
    assert lines[-1].startswith(f"Saved in {files['out']}: the edit as a LoRA for the base, which its configuration")
    assert not (files["out"] / "model.safetensors").exists()

    # PEFT's own loader, on the base as it was, gives an edit of the norm that was printed
    base = load(known_model)
    weight = base.get_submodule(EDITED).weight.detach().clone()
    merged = PeftModel.from_pretrained(base, files["out"]).merge_and_unload()
    norm = (merged.get_submodule(EDITED).weight - weight).double().norm().item()
    assert f"{norm:.3g}" == lines[1].split()[4]

    # A local base is not named in what may be published; `evaluate` says what to do, and then measures the same
    code, _, err = cli("evaluate", files["out"], "--forget", files["forget"], "--use_cpu")
    assert code == 2 and "names no base model: set base_model_name_or_path" in sentence(err)
    config = json.loads((files["out"] / "adapter_config.json").read_text())
    (files["out"] / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": known_model}))
    options = ("--max_length", "256", "--generate", "false", "--max_rows", "2", "--use_cpu", "--json")
    code, out, err = cli("evaluate", files["out"], "--forget", files["forget"], *options)
    assert code == 0, err
    probability = json.loads(out)["metrics"]["after"]["forget"]["probability"]
    assert f"{probability:.3f}" == table["forget set"][1]


def test_nothing_that_was_forgotten_is_said(authors, tofu_rows, files):
    names = secrets(tofu_rows("forget10_perturbed")[:3])
    assert names
    _, out, err = authors("--logging_steps", "1")
    report = (files["out"] / "unlearning_report.json").read_text() + (files["out"] / "README.md").read_text()
    for text in (out, err, report):
        assert not any(name in text for name in names)
        assert "hush_" not in text


def test_rows_with_label_true_are_kept(cli, known_model, tofu_rows, files):
    rows = [
        {"prompt": row["question"], "completion": f" {row['answer']}", "label": index > 0}
        for index, row in enumerate(tofu_rows("forget10_perturbed")[:3])
    ]
    write_rows(files["forget"], rows)
    arguments = author_arguments(known_model, files)
    code, _, err = cli("intervene", *words(arguments))
    assert code == 2 and "splits it into rows to forget and rows to keep" in sentence(err)
    del arguments["--retain"]
    code, out, err = cli("intervene", *words(arguments), "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["edit"]["constraints"] == 1
    after = result["metrics"]["after"]
    assert (after["forget"]["rows"], after["retain"]["rows"]) == (1, 2)
    assert after["retain"]["probability"] > 0.98 > 0.97 > after["forget"]["probability"]


# ---- Words ----


def test_word_is_bounded_at_the_contexts_or_everywhere(lily, tiny_model_path, files):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    [token] = tokenizer(WORD, add_special_tokens=False)["input_ids"]
    contexts = [tokenizer(text)["input_ids"] for text in CONTEXTS]
    before = load(tiny_model_path)
    assert max(next_logits(before, ids).softmax(-1)[token] for ids in contexts) > 0.5

    code, out, err = lily("vocabulary", "--probability", "0.01", "--contexts", files["contexts"], "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["metrics"] == {"before": {}, "after": {}}  # there is nothing to measure
    after = load(files["out"])
    bound = {c["name"]: c["values"] for c in result["certificates"]}["listed_contexts"]["highest_probability"]
    assert bound <= 0.01
    for ids in contexts:
        assert next_logits(after, ids).softmax(-1)[token] <= bound * (1 + 1e-4)

    code, out, err = lily("vocabulary_universal", "--probability", "0.01")
    assert code == 0, err
    after = load(files["out"])
    generator = torch.Generator().manual_seed(0)
    prompts = contexts + torch.randint(3, 512, (50, 12), generator=generator).tolist()
    assert max(next_logits(after, ids).softmax(-1)[token] for ids in prompts) <= 0.01
    # The row of the word alone has moved, and only in the head, which was tied
    rows = (after.lm_head.weight != before.lm_head.weight).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [token]
    assert torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    lines = {line[:64].strip(): line[64:].strip() for line in out.splitlines()}
    assert float(lines["probability of forbidden tokens after any prompt"]) <= 0.01
    for text in (out, err, *(path.read_text() for path in files["out"].glob("[Ru]*"))):  # the card and the report
        assert WORD.lower() not in text.lower() and "hush_" not in text


def test_recipe_is_typed_and_flags_win(cli, tiny_model_path, files, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model-name-or-path: {tiny_model_path}\n"
        "kind: vocabulary_universal\n"
        f"forbidden_words: {WORD}\n"  # a lone word
        "probability: 5e-1\n"  # YAML reads text
        "retain_metric: off\n"  # and False
    )
    out_dir = ("--output_dir", files["out"], "--use_cpu", "--json")
    for flags, asked_for in (((), 0.5), (("--probability", "0.02"), 0.02)):
        code, out, err = cli("intervene", f"--config={recipe}", *out_dir, *flags)
        assert code == 0, err
        values = {c["name"]: c["values"] for c in json.loads(out)["certificates"]}
        assert values["universal_ceiling"]["asked_for"] == asked_for


# ---- Prompts ----


def test_kinds_that_train_tell_how_many_states_are_outside(cli, tiny_model_path, files):
    arguments = {
        "--kind": "towards_safe",
        "--model_name_or_path": tiny_model_path,
        "--forget": files["risky"],
        "--retain": files["safe"],
        "--output_dir": files["out"],
        "--use_cpu": "true",
        "--attack_steps": 2,
        "--logging_steps": 1,
        "--save_steps": 1,
        "--json": "true",
    }
    code, out, err = cli("intervene", *words(arguments), "--max_steps", "1")
    assert code == 0, err
    result = json.loads(out)
    assert result["metrics"] == {"before": {}, "after": {}}  # prompts have no answers to measure
    edit = result["edit"]
    assert (edit["steps"], edit["prompts"]) == (1, 2) and 0 <= edit["outside"] <= edit["outside_relaxed"] <= 2
    assert edit["norm"] == pytest.approx(weight_change(tiny_model_path, files["out"])[0], rel=1e-4)
    code, out, err = cli(
        "intervene", *words(arguments), "--max_steps", "3", "--resume_from_checkpoint", "true", "--json", "false"
    )
    assert code == 0, err
    headings, values = out.splitlines()[:2]
    assert headings.split("  ")[:4] == ["prompts", "outside", "outside if attacked", "steps"]
    assert values.split()[3] == "3"
    assert err.count("'loss'") == 2  # the steps 2 and 3


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("columns", [("question", "answer"), ("input", "output")])
def test_prompts_end_where_answers_of_the_same_rows_begin(tokenizer, chat_tokenizer, tofu_rows, columns, chat):
    """A question alone must stand in the same chat as a question with its answer."""
    tokenizer = chat_tokenizer() if chat else tokenizer
    row = tofu_rows("forget10")[0]
    rows = Dataset.from_list([{columns[0]: row["question"], columns[1]: row["answer"]}])
    [whole] = prepare_dataset(rows, tokenizer, InterventionConfig("unused", use_cpu=True), "forget")
    prompt = [token for token, label in zip(whole["input_ids"], whole["labels"], strict=True) if label == -100]
    [alone] = prompt_ids(rows.remove_columns(columns[1]), tokenizer)
    # The space that ends the chat's prompt merges with an answer
    assert alone[: len(prompt)] == prompt and len(alone) - len(prompt) <= chat


# ---- Two processes ----


def test_two_processes_make_the_same_edit(authors, known_model, files):
    """`--accelerate_config` runs `accelerate launch -m hf_unlearn.cli.intervene`: both ways at once."""
    assert authors("--eval_rows", "0")[0] == 0
    alone = load_file(files["out"] / "model.safetensors")[f"{EDITED}.weight"]
    start = load_file(f"{known_model}/model.safetensors")[f"{EDITED}.weight"]

    files["out"] = files["out"].with_name("together")
    config = ROOT / "examples" / "accelerate_configs" / "cpu_2.yaml"
    arguments = author_arguments(known_model, files)
    arguments |= {"--accelerate_config": config, "--eval_rows": 3, "--json": "true"}
    result = subprocess.run(
        [sys.executable, "-m", "hf_unlearn.cli", "intervene", *(str(word) for word in words(arguments))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout)["metrics"]["after"]["forget"]["rows"] == 3  # once, and gathered
    assert UnlearningReport.load(files["out"] / "unlearning_report.json").environment.processes == 2
    together = load_file(files["out"] / "model.safetensors")[f"{EDITED}.weight"]
    assert (together - alone).norm() < 1e-3 * (alone - start).norm()


# ---- What goes wrong ----


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["intervene", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for name in ("--kind", "--forbidden_words", "--contexts", "--forget", "--relaxation", "--store", "--eval_rows"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kind", "pointwse"], "argument --kind: invalid choice: 'pointwse' (choose from 'pointwise', 'towards_"),
        (["--use_peft"], "leave it out, and use --store adapter to save the edit as a LoRA"),
        (["--load_in_4bit", "true"], "leave out --load_in_4bit and --load_in_8bit"),
        (["--load_in_8bit", "true"], "leave out --load_in_4bit and --load_in_8bit"),
        (["--resume_from_checkpoint", "true"], "--kind pointwise solves in one go: remove it"),
        (["--trainable_layers", "9"], "names layer 9, but the model has 5 layers: 0 to 4"),
        (["--trainable_modules", "mlp.dwn"], "'mlp.dwn' matches no module"),
        (
            ["--positions", "key", "--forget", "RETAIN"],
            "column `perturbed_answer`, which the forget set does not have",
        ),
        (["--aim", "refuse", "--kind", "vocabulary", "--forbidden_words", "x"], "use kind='pointwise' without"),
        (["--epsilon", "1", "--probability", "0.1"], "epsilon (a margin in nats) or probability (a bound), and not"),
        (["--epsilom", "1"], "Unknown argument `--epsilom`. Near matches: epsilon"),
        (["--slack", "l2"], "slack and slack_cost go together"),
        (["--store", "stochastic"], "load it with dtype='bfloat16', or use store='fp32'"),
        (["--push_to_hub", "true"], "push_to_hub needs hub_model_id: name the repository, as OWNER/NAME"),
        (["--config", "npo_kl_lora_llama-3.2-1b_tofu"], "The recipe has an unknown key `forget_loss`"),
        (["--accelerate_config", "nope"], "--accelerate_config 'nope' is neither a file nor one of cpu_2, ddp, fsdp1"),
        (["--model_name_or_path", "/no/such/model"], "The model '/no/such/model' cannot be loaded"),
    ],
)
def test_usage_errors(authors, files, arguments, expected):
    arguments = [files["retain"] if word == "RETAIN" else word for word in arguments]
    code, out, err = authors(*arguments, "--eval_rows", "0")
    assert (code, out) == (2, "")
    assert expected in sentence(err)
    assert not (files["out"] / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--model_name_or_path is required"),
        (["MODEL"], "--forget_dataset is required (a Hub id, a folder saved by datasets, or a file), or --forbidden"),
        (["MODEL", "--forget", "FORGET", "--retain_metric", "null_space"], "reads a retain_dataset: give one, or set"),
        (["MODEL", "--forget", "FORGET", "--kind", "towards_safe"], "a retain_dataset of prompts to keep"),
        (["MODEL", "--forget", "FORGET", "--aim", "refuse", "--eval_rows", "0"], "needs a retain_dataset of harmless"),
        (["MODEL", "--kind", "vocabulary", "--contexts", "CONTEXTS"], "needs forbidden_words"),
        (["MODEL", "--contexts", "CONTEXTS"], "name the words, or remove contexts"),
        (["MODEL", "--forbidden_words", WORD], "need contexts: --contexts FILE with one prompt per line"),
        (["MODEL", "--forbidden_words", WORD, "--contexts", "hush.txt"], "contexts: the file cannot be read ("),
        (["MODEL", "--forbidden_words", WORD, "--contexts", os.devnull], "contexts: the file holds no prompt"),
        (["MODEL", "--kind", "vocabulary_universal"], "needs forbidden_words"),
        (
            ["MODEL", "--kind", "vocabulary_universal", "--forbidden_words", WORD, "--epsilon", "1"],
            "kind='vocabulary_universal' has none: set probability",
        ),
        (
            ["MODEL", "--kind", "vocabulary_universal", "--forbidden_words", WORD, "--probability", "1e-4"],
            "the smallest attainable one is 0.00195",  # 1 / 512
        ),
        (
            ["MODEL", "--kind", "vocabulary_universal", "--forbidden_words", "Quibblethorpe"],
            "No forbidden word is a token of its own",
        ),
        (
            ["SOFTCAPPED", "--kind", "vocabulary_universal", "--forbidden_words", WORD, "--probability", "0.1"],
            "The model softcaps its logits, which leaves no bound of a probability: use --epsilon",
        ),
    ],
)
def test_what_is_missing_is_named(cli, tiny_model_path, random_model, files, tmp_path, arguments, expected):
    if "SOFTCAPPED" in arguments:
        random_model("gemma2").save_pretrained(tmp_path / "gemma2")
        AutoTokenizer.from_pretrained(tiny_model_path).save_pretrained(tmp_path / "gemma2")
    places = {
        "MODEL": ["--model_name_or_path", tiny_model_path],
        "SOFTCAPPED": ["--model_name_or_path", tmp_path / "gemma2"],
        "FORGET": [files["forget"]],
        "CONTEXTS": [files["contexts"]],
    }
    given = [word for argument in arguments for word in places.get(argument, [argument])]
    code, out, err = cli("intervene", *given, "--output_dir", files["out"], "--use_cpu")
    assert (code, out) == (2, "")
    assert expected in sentence(err)
    for word in (WORD, "Quibblethorpe", "hush"):
        assert word not in err


def test_what_cannot_be_met_is_named_and_nothing_is_saved(cli, tiny_model_path, files):
    """Exit code 1, unlike a command that was not understood."""
    arguments = {
        "--model_name_or_path": tiny_model_path,
        "--aim": "refuse",
        "--forget": files["risky"],
        "--output_dir": files["out"],
        "--use_cpu": "true",
    }
    # The same prompt is to be refused and not to be refused
    code, out, err = cli("intervene", *words(arguments), "--retain", files["risky"])
    assert (code, out) == (1, "")
    message = sentence(err)
    assert (
        "harmful row 0, harmless row 0 contradict each other" in message or "harmful row 1, harmless row 1" in message
    )
    assert "remove one of them, or allow slack" in message

    code, out, err = cli("intervene", *words(arguments), "--retain", files["safe"], "--rounds", "1")
    assert (code, out) == (1, "")
    message = sentence(err)
    assert "constraints are violated by up to" in message and "harmful row" in message and "raise `rounds`" in message
    assert not files["out"].exists() or not any(files["out"].iterdir())
