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
import gc
import json
import os
from pathlib import Path


# Before the libraries read them: nothing may reach the Hub, and test processes share the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import filelock  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


torch.set_num_threads(1)


def pytest_collection_finish():
    """
    Takes what the imports made out of the garbage collector's sight: each training ends with a collection, which
    would otherwise look at all of it every time (0.24 s; a third of what a short run takes).
    """
    gc.collect()
    gc.freeze()


# Tiny models of real families. The initial weights are larger than usual, so that logits are of the size of those of a
# trained model and a forgotten scale or softcap shows; dropout is off, so that train() and eval() compute the same.
_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT_NEOX = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **{key: _COMMON[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")},
}
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _COMMON),
    "mistral": ("MistralConfig", "MistralForCausalLM", _COMMON),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _COMMON),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_COMMON, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_COMMON, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _GPT_NEOX),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _COMMON),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_COMMON, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_COMMON, "logits_scaling": 4.0}),
}

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|> "
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
_CHAT_TEMPLATE_WITH_GENERATION = _CHAT_TEMPLATE.replace(
    "{{ message['content'] + eos_token }}",
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}",
)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of checkpoints and data sets that are not in this repository."""
    folder = os.environ.get("HF_UNLEARN_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            "HF_UNLEARN_TEST_DATA names no folder: set it to one with the test checkpoints and data, whose public "
            "sources are listed in CONTRIBUTING.md"
        )
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model_path(data_dir) -> str:
    """A trained Llama of 260 032 parameters, 5 layers, hidden size 64, with a BPE tokenizer of 512 tokens."""
    return str(data_dir / "tinystories-260k")


@pytest.fixture(scope="session")
def small_model_path(data_dir) -> str:
    """A trained Llama of 936 448 parameters, 5 layers, hidden size 128, with a tokenizer of 105 characters."""
    return str(data_dir / "tinystories-1m")


@pytest.fixture
def tokenizer(tiny_model_path):
    """The tokenizer of `tiny_model_path`: BOS 1, EOS 2, pad 0 (its unknown token), no chat template."""
    return transformers.AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def chat_tokenizer(tiny_model_path):
    """Factory: the tokenizer with a chat template, which marks the assistant's tokens with `generation=True`."""

    def make(generation: bool = False):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_path)
        tokenizer.chat_template = _CHAT_TEMPLATE_WITH_GENERATION if generation else _CHAT_TEMPLATE
        return tokenizer

    return make


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request) -> str:
    """Runs a test once for each family of models."""
    return request.param


@pytest.fixture
def random_model():
    """Factory: a tiny model of a family with random weights (always the same), fp32, on the CPU, in eval mode."""

    def make(architecture: str = "llama", seed: int = 0, **overrides):
        config_class, model_class, options = ARCHITECTURES[architecture]
        config = getattr(transformers, config_class)(**{**options, **overrides})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, model_class)(config)
            # Norms and biases start at ones and zeros in every family, which would hide a wrong order or a lost bias
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def tofu_rows(data_dir):
    """Reader: the rows of a file of TOFU, such as `forget01`, as a list of dicts."""

    def read(name: str) -> list[dict]:
        return read_json_lines(data_dir / "tofu" / f"{name}.json")

    return read


@pytest.fixture(scope="session")
def lume_rows(data_dir):
    """Reader: the rows of a file of LUME, `forget` or `retain`, as a list of dicts."""

    def read(name: str) -> list[dict]:
        return read_json_lines(data_dir / "lume" / f"{name}.jsonl")

    return read


def read_json_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


@pytest.fixture(scope="session")
def known_model(data_dir, tofu_rows, tmp_path_factory) -> str:
    """
    The 260k model fine-tuned until it knows the first author of `forget10` and two of `retain90` (probability > 0.99).

    Made once for all workers of pytest-xdist.
    """
    folder = tmp_path_factory.getbasetemp().parent / "known_model"
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            learn(str(data_dir / "tinystories-260k"), tofu_rows("forget10")[:20] + tofu_rows("retain90")[:40], folder)
    return str(folder)


def learn(model_path: str, rows: list[dict], output: Path) -> None:
    """Plain fine-tuning on the answers, in the format in which they are forgotten."""
    from datasets import Dataset

    from hf_unlearn import UnlearnConfig
    from hf_unlearn.data import prepare_dataset
    from hf_unlearn.pairing import DataCollatorForUnlearning

    epochs, batch_size = 40, 8
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    args = UnlearnConfig(str(output), use_cpu=True, max_length=256)
    examples = list(prepare_dataset(Dataset.from_list(rows), tokenizer, args, "known"))
    collate = DataCollatorForUnlearning(pad_token_id=tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    steps = epochs * -(-len(examples) // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(len(examples), generator=generator)
        for chunk in order.split(batch_size):
            batch = collate([examples[index] for index in chunk.tolist()])
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
            model(**inputs).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
