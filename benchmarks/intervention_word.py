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
"""
One word made unreachable in a trained model: by its rows of the LM head, by a middle layer, universally.

    export HF_UNLEARN_TEST_DATA=DIR
    python benchmarks/intervention_word.py --json benchmarks/results/intervention_word_cpu.json

The model is `tinystories-260k` (CONTRIBUTING.md names the source), the word "Lily", which is one of its 512 tokens.
The contexts are the prompt of the test and eleven beginnings of stories that the model tells itself, after each of
which it says the name; twenty more are not listed. The demand is a probability of at most 0.01. What is kept are
stories without the name, one half of which is the retain set and the other the test of perplexity.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from typing import Any

import torch
from machine import describe_versions
from measuring import describe_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from hf_unlearn.constraints.linearize import second_moments
from hf_unlearn.constraints.points import Demand
from hf_unlearn.constraints.preconditioning import retain_factor
from hf_unlearn.constraints.solve import solve_intervention
from hf_unlearn.constraints.spellings import find_spellings, single_tokens, spelling_nodes
from hf_unlearn.constraints.vocabulary import certify_universal, close_words, solve_rows, solve_universal


WORD, PROMPT = "Lily", "Once upon a time, there was a little girl named"
PROBABILITY = 0.01
LISTED, UNLISTED = 12, 20
SAMPLES, NEW_TOKENS = 200, 40
LAYER = "model.layers.2.mlp.down_proj"
WAYS = ("before", "rows", "layer", "universal")


class Stories:
    """The model, its own stories, and the contexts after which it says the word."""

    def __init__(self, folder: str):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.spellings = find_spellings(self.tokenizer, [WORD])
        (self.token,) = single_tokens(self.spellings)
        self.prompt = self.tokenizer(PROMPT)["input_ids"]
        told = self.sample([self.tokenizer.bos_token_id], count=200, length=120, seed=0)
        special = self.tokenizer.all_special_ids
        ends = [next((n for n, token in enumerate(ids[1:], 1) if token in special), len(ids)) for ids in told]
        told = [ids[:end] for ids, end in zip(told, ends, strict=True)]
        without = [ids for ids in told if WORD not in self.tokenizer.decode(ids)]
        self.seen, self.unseen = without[::2], without[1::2]
        contexts = [ids[: ids.index(self.token)] for ids in told if self.token in ids[4:]]
        self.listed = [self.prompt, *contexts[: LISTED - 1]]
        self.unlisted = contexts[LISTED - 1 : LISTED - 1 + UNLISTED]

    @torch.no_grad()
    def sample(self, prompt: list[int], count: int, length: int, seed: int | None) -> list[list[int]]:
        """At temperature 1 from the whole distribution, or greedily without a seed."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        cache, ids = DynamicCache(), torch.tensor([prompt] * count)
        step = ids
        for _ in range(length):
            logits = self.model(step, past_key_values=cache, use_cache=True).logits[:, -1]
            if generator is None:
                step = logits.argmax(-1, keepdim=True)
            else:
                step = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, step], 1)
        return ids.tolist()

    @torch.no_grad()
    def perplexity(self) -> float:
        total = count = 0.0
        for ids in self.unseen:
            logits = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            total -= logits.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
            count += len(ids) - 1
        return math.exp(total / count)

    @torch.no_grad()
    def probability(self, context: list[int]) -> tuple[float, float]:
        """That the word's own token comes next, and that the next tokens write the word in any listed spelling."""
        children, ends = defaultdict(list), {spelling.tokens for spelling in self.spellings.spellings}
        for node in spelling_nodes(self.spellings):
            children[node.prefix].append(node.token)
        spelled, beginnings = 0.0, [((), 1.0)]
        own = self.model(torch.tensor([context])).logits[0, -1].softmax(-1)[self.token].item()
        while beginnings:
            rows = self.model(torch.tensor([[*context, *prefix] for prefix, _ in beginnings])).logits[:, -1]
            following = []
            for (prefix, share), row in zip(beginnings, rows.softmax(-1).tolist(), strict=True):
                for token in children[prefix]:
                    longer = (*prefix, token)
                    spelled += share * row[token] if longer in ends else 0.0
                    if longer in children and share * row[token] > 1e-8:
                        following.append((longer, share * row[token]))
            beginnings = following
        return own, spelled

    def measure(self) -> dict[str, Any]:
        listed = [self.probability(context) for context in self.listed]
        unlisted = [self.probability(context) for context in self.unlisted]
        drawn = self.sample(self.prompt, SAMPLES, NEW_TOKENS, seed=1)
        with torch.no_grad():
            logits = self.model(torch.tensor(drawn)).logits[:, len(self.prompt) - 1 : -1]
        texts = [text[len(PROMPT) :] for text in self.tokenizer.batch_decode(drawn, skip_special_tokens=True)]
        greedy = self.sample(self.prompt, 1, NEW_TOKENS, seed=None)[0]
        return {
            "at_prompt": listed[0][0],
            "at_prompt_any_spelling": listed[0][1],
            "listed_highest": max(own for own, _ in listed),
            "listed_highest_any_spelling": max(spelled for _, spelled in listed),
            "unlisted_mean": sum(own for own, _ in unlisted) / len(unlisted),
            "unlisted_mean_any_spelling": sum(spelled for _, spelled in unlisted) / len(unlisted),
            "highest_in_samples": logits.softmax(-1)[..., self.token].max().item(),
            "samples_with_the_word": sum(WORD in text for text in texts),
            "samples": SAMPLES,
            "greedy_has_the_word": WORD in self.tokenizer.decode(greedy[len(self.prompt) :]),
            "perplexity": self.perplexity(),
        }


def edit_of(stories: Stories, way: str) -> tuple[Any, dict[str, Any]]:
    """The edit, and what is certain of it."""
    model, demand = stories.model, Demand(probability=PROBABILITY)
    if way == "universal":
        return solve_universal(model, [stories.token], PROBABILITY), {}
    points = close_words(model, stories.tokenizer, [WORD], stories.listed, demand)
    name = "lm_head" if way == "rows" else LAYER
    factor = retain_factor(second_moments(model, [name], stories.seen)[name].mean())
    if way == "rows":
        edit = solve_rows(model, points, demand, retain_factor=factor)
    else:
        edit = solve_intervention(model, points, [name], demand, retain_factors={name: factor})
    return edit, {"points": len(points), "constraints": edit.report.constraints, "rounds": edit.report.rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the results to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stories = Stories(os.path.join(os.environ["HF_UNLEARN_TEST_DATA"], "tinystories-260k"))
    results: dict[str, dict[str, Any]] = {"before": stories.measure()}
    for way in WAYS[1:]:
        start = time.perf_counter()
        edit, numbers = edit_of(stories, way)
        numbers["seconds"] = time.perf_counter() - start
        numbers["norm"], numbers["relative_norm"] = edit.norm(), max(edit.relative_norms(stories.model).values())
        with edit.applied(stories.model):
            if way == "universal":
                numbers["certified_ceiling"] = certify_universal(stories.model, edit)[0].values["ceiling"]
            results[way] = numbers | stories.measure()
        results[way]["perplexity_ratio"] = results[way]["perplexity"] / results["before"]["perplexity"]
    names = list(dict.fromkeys(name for numbers in results.values() for name in numbers))
    print("| |" + "|".join(f" {way} " for way in results) + "|")
    print("|---|" + "---|" * len(results))
    for name in names:
        cells = [numbers.get(name, "") for numbers in results.values()]
        print(f"| {name} | " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    if options.json:
        content = {
            "command": "python benchmarks/intervention_word.py",
            "seeds": {"stories": 0, "samples": 1},
            "machine": describe_machine("cpu"),
            "versions": describe_versions("torch", "transformers", "hf-unlearn"),
            "results": results,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
