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
"""Every loss against numbers worked by hand, and against what the trainer relies on."""

import inspect
import math

import pytest
import torch

from hf_unlearn import UnlearnConfig
from hf_unlearn.losses import FORGET_LOSSES, HIDDEN_READS, REFERENCE_READS, RETAIN_LOSSES
from hf_unlearn.losses.forget import ga, npo, rmu
from hf_unlearn.losses.retain import nll


LOSSES = {**FORGET_LOSSES, **RETAIN_LOSSES}

# Two rows of four positions. Row 0 is a text: every token counts, but nothing predicts the first. Row 1 is a prompt of
# two tokens, an answer of one, and one position of padding.
TOKENS = torch.tensor([[False, True, True, True], [False, False, True, False]])  # 4 tokens
POSITIONS = torch.tensor([[True, True, True, True], [False, False, True, False]])  # 5 positions

LOG_PROBS = torch.tensor([[-9.0, -1.0, -2.0, -0.5], [-9.0, -9.0, -3.0, -9.0]])
REFERENCE_LOG_PROBS = torch.tensor([[-7.0, -1.5, -1.0, -0.5], [-7.0, -7.0, -1.0, -7.0]])
TOKEN_KL = torch.tensor([[7.0, 0.5, 1.5, 0.25], [7.0, 7.0, 0.75, 7.0]])
HIDDEN_STATES = torch.tensor(
    [[[3.0, 4.0], [0.0, 0.0], [1.0, 1.0], [2.0, 0.0]], [[9.0, 9.0], [9.0, 9.0], [5.0, 0.0], [9.0, 9.0]]]
)
REFERENCE_HIDDEN_STATES = torch.tensor(
    [[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [[7.0, 7.0], [7.0, 7.0], [4.0, 2.0], [7.0, 7.0]]]
)
CONTROL_VECTOR = torch.tensor([1.0, 0.0])

TENSORS = {
    "log_probs": LOG_PROBS,
    "reference_log_probs": REFERENCE_LOG_PROBS,
    "token_kl": TOKEN_KL,
    "hidden_states": HIDDEN_STATES,
    "reference_hidden_states": REFERENCE_HIDDEN_STATES,
    "control_vector": CONTROL_VECTOR,
}
NUM_ITEMS = {"sequence": 2, "token": 4, "position": 5}
SETTINGS = {"beta": 0.5}

EXPECTED = {
    # (-1 - 2 - 0.5 - 3) / 4
    "ga": (-1.625, {}),
    # Minus that
    "nll": (1.625, {}),
    # log ratios: row 0: (-1 + 1.5) + (-2 + 1) + (-0.5 + 0.5) = -0.5; row 1: -3 + 1 = -2; their mean -1.25
    # log sigmoid(0.25) = -log(1 + e^-0.25) = -log 1.7788008 = -0.5759394; log sigmoid(1) = -0.3132617
    # -(2 / (0.5 * 2)) * (-0.5759394 - 0.3132617) = 1.7784022
    "npo": (1.7784022, {"log_ratio": -1.25}),
    # Squared distances to (1, 0): 4 + 16 = 20, 1, 1, 1; row 1: 16. (20 + 1 + 1 + 1 + 16) / (5 positions * 2) = 3.9
    # Norms: 5, 0, sqrt 2, 2; row 1: 5. (12 + 1.4142136) / 5 = 2.6828427
    "rmu": (3.9, {"hidden_norm": 2.6828427}),
    # (0.5 + 1.5 + 0.25 + 0.75) / 4
    "kl": (0.75, {}),
    # Squared distances: 16, 1, 0, 4; row 1: 1 + 4 = 5. (16 + 1 + 0 + 4 + 5) / (5 * 2)
    "hidden_mse": (2.6, {}),
}

# With respect to the first tensor that the loss reads
EXPECTED_GRADIENTS = {
    # 1 / 4 for each token that counts
    "ga": [[0.0, 0.25, 0.25, 0.25], [0.0, 0.0, 0.25, 0.0]],
    "nll": [[0.0, -0.25, -0.25, -0.25], [0.0, 0.0, -0.25, 0.0]],
    # d/dr [-(2 / beta) log sigmoid(-beta r)] = 2 sigmoid(beta r), then / 2 rows: sigmoid(-0.25), sigmoid(-1)
    "npo": [[0.0, 0.4378235, 0.4378235, 0.4378235], [0.0, 0.0, 0.2689414, 0.0]],
    # 2 (h - c) / (5 * 2) = (h - c) / 5
    "rmu": [[[0.4, 0.8], [-0.2, 0.0], [0.0, 0.2], [0.2, 0.0]], [[0.0, 0.0], [0.0, 0.0], [0.8, 0.0], [0.0, 0.0]]],
    "kl": [[0.0, 0.25, 0.25, 0.25], [0.0, 0.0, 0.25, 0.0]],
    # (h - h_ref) / 5
    "hidden_mse": [
        [[0.0, 0.8], [0.0, -0.2], [0.0, 0.0], [0.4, 0.0]],
        [[0.0, 0.0], [0.0, 0.0], [0.2, -0.4], [0.0, 0.0]],
    ],
}


def mask_of(loss):
    return POSITIONS if loss.unit == "position" else TOKENS


def settings_of(loss):
    return {name: SETTINGS[name] for name in loss.settings}


def compute(name, tensors, mask, num_items):
    """Loss, metrics, and the gradient with respect to the first tensor."""
    loss = LOSSES[name]
    first, *others = (tensors[read] for read in loss.reads)
    first = first.clone().requires_grad_()
    value, metrics = loss.function(first, *others, mask=mask, num_items=num_items, **settings_of(loss))
    (gradient,) = torch.autograd.grad(value, first)
    return value.detach(), metrics, gradient


def random_tensors(rows=4, length=6, size=3):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "log_probs": -normal(rows, length).abs(),
        "reference_log_probs": -normal(rows, length).abs(),
        "token_kl": normal(rows, length).abs(),
        "hidden_states": normal(rows, length, size),
        "reference_hidden_states": normal(rows, length, size),
        "control_vector": normal(size),
    }
    # Unequal lengths, and one row in which a single token counts
    mask = torch.arange(length) < torch.tensor([[6], [3], [5], [2]])
    mask[:, 0] = False
    return tensors, mask


def num_items_of(loss, mask):
    return mask.shape[0] if loss.unit == "sequence" else int(mask.sum())


def naive(name, tensors, mask, beta=0.5):
    """The formulas of the docstrings, position by position, without a mask operation."""
    rows = [[t for t in range(mask.shape[1]) if mask[b, t]] for b in range(mask.shape[0])]
    n = sum(len(row) for row in rows)
    if name in ("ga", "nll", "kl"):
        values = tensors["token_kl" if name == "kl" else "log_probs"]
        total = sum(values[b, t] for b, row in enumerate(rows) for t in row)
        return (-total if name == "nll" else total) / n
    if name == "npo":
        ratios = [
            sum(tensors["log_probs"][b, t] - tensors["reference_log_probs"][b, t] for t in row)
            for b, row in enumerate(rows)
        ]
        return sum(2 / beta * torch.log1p(torch.exp(beta * ratio)) for ratio in ratios) / len(rows)
    total = 0
    for b, row in enumerate(rows):
        for t in row:
            target = tensors["control_vector"] if name == "rmu" else tensors["reference_hidden_states"][b, t]
            total = total + sum((tensors["hidden_states"][b, t] - target) ** 2)
    return total / (n * tensors["hidden_states"].shape[-1])


def test_every_loss_has_numbers_worked_by_hand():
    assert set(EXPECTED) == set(EXPECTED_GRADIENTS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_worked_by_hand(name):
    loss = LOSSES[name]
    value, metrics, gradient = compute(name, TENSORS, mask_of(loss), NUM_ITEMS[loss.unit])
    expected, expected_metrics = EXPECTED[name]
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert {key: entry.item() for key, entry in metrics.items()} == pytest.approx(expected_metrics, rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor(EXPECTED_GRADIENTS[name]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_the_formula(name):
    tensors, mask = random_tensors()
    value, _, gradient = compute(name, tensors, mask, num_items_of(LOSSES[name], mask))
    first = LOSSES[name].reads[0]
    leaf = tensors[first].clone().requires_grad_()
    expected = naive(name, {**tensors, first: leaf}, mask)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_values_change_neither_loss_nor_gradient(name, filler):
    """Prompt and padding are not counted: the public defect is to train on both."""
    loss, mask = LOSSES[name], mask_of(LOSSES[name])
    filled = {
        read: tensor if read == "control_vector" else tensor.clone().masked_fill_(~_expand(mask, tensor), filler)
        for read, tensor in TENSORS.items()
    }
    expected_value, expected_metrics, expected_gradient = compute(name, TENSORS, mask, NUM_ITEMS[loss.unit])
    value, metrics, gradient = compute(name, filled, mask, NUM_ITEMS[loss.unit])
    assert value.item() == expected_value.item()
    assert metrics == expected_metrics
    assert torch.equal(gradient, expected_gradient)
    assert gradient[~_expand(mask, gradient)].eq(0).all()


def _expand(mask, tensor):
    return mask.unsqueeze(-1).expand_as(tensor) if tensor.dim() == 3 else mask


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)])
def test_micro_batches_sum_to_the_whole_batch(name, sizes):
    """With the count of the whole step (the public defect is to ignore it), accumulation changes nothing."""
    tensors, mask = random_tensors()
    num_items = torch.tensor(float(num_items_of(LOSSES[name], mask)))
    whole, whole_metrics, whole_gradient = compute(name, tensors, mask, num_items)
    value, metrics, gradients = 0.0, dict.fromkeys(whole_metrics, 0.0), []
    for rows in torch.arange(mask.shape[0]).split(sizes):
        part = {key: entry if key == "control_vector" else entry[rows] for key, entry in tensors.items()}
        part_value, part_metrics, part_gradient = compute(name, part, mask[rows], num_items)
        value = value + part_value
        metrics = {key: metrics[key] + part_metrics[key] for key in metrics}
        gradients.append(part_gradient)
    torch.testing.assert_close(value, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics, whole_metrics, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(gradients), whole_gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_rows_does_not_matter(name):
    tensors, mask = random_tensors()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {key: entry if key == "control_vector" else entry[order] for key, entry in tensors.items()}
    num_items = num_items_of(LOSSES[name], mask)
    value, metrics, gradient = compute(name, tensors, mask, num_items)
    shuffled_value, shuffled_metrics, shuffled_gradient = compute(name, shuffled, mask[order], num_items)
    torch.testing.assert_close(shuffled_value, value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shuffled_metrics, metrics, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shuffled_gradient, gradient[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_hold_no_graph(name):
    loss = LOSSES[name]
    _, metrics, _ = compute(name, TENSORS, mask_of(loss), NUM_ITEMS[loss.unit])
    assert all(not entry.requires_grad and entry.shape == () for entry in metrics.values())


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reads[0] == "hidden_states"])
def test_hidden_states_in_bf16_are_compared_in_fp32(name):
    # 256.0 and 257.0 are the same number in bf16, whose unit in the last place is 2 there: an error computed in bf16
    # would be 0 or 2 and never 1.
    hidden = torch.full((1, 2, 2), 256.0, dtype=torch.bfloat16)
    target = torch.full((2,), 257.0)
    tensors = {"hidden_states": hidden, "control_vector": target, "reference_hidden_states": target.expand(1, 2, 2)}
    value, _, gradient = compute(name, tensors, torch.ones(1, 2, dtype=torch.bool), 2)
    assert value.dtype == torch.float32
    assert value.item() == 1.0  # (2 positions * 2 dims * 1^2) / (2 * 2)
    assert gradient.dtype == torch.bfloat16
    assert gradient.eq(-0.5).all()  # 2 * (256 - 257) / 4


def test_rmu_weighs_each_position_the_same_whatever_the_length_of_its_row():
    """
    The public defect divides each row's error by every row's token count (a broadcast of `[b]` by `[b, 1]`): a
    position in a batch with short rows then weighs more.
    """
    hidden = torch.ones(3, 8, 2, requires_grad=True)
    mask = torch.arange(8) < torch.tensor([[8], [1], [3]])
    loss, _ = rmu(hidden, torch.zeros(2), mask=mask, num_items=12)
    assert loss.item() == pytest.approx(1.0)  # each of the 12 positions has a mean square of 1
    (gradient,) = torch.autograd.grad(loss, hidden)
    weights = gradient[mask]
    assert weights.shape == (12, 2)
    torch.testing.assert_close(weights, torch.full((12, 2), 1 / 12), rtol=1e-6, atol=0)

    per_row = hidden.detach().square().mean(-1).masked_fill(~mask, 0).sum(-1)
    public = (per_row / mask.sum(-1, keepdim=True)).mean()  # 12 * (1/8 + 1 + 1/3) / 9
    assert public.item() == pytest.approx(1.9444, abs=1e-4)


def test_npo_gradient_at_the_reference_is_that_of_gradient_ascent_on_the_sum():
    # d/dr [-(2 / beta) log sigmoid(-beta r)] = 2 sigmoid(beta r), which is 1 at r = 0 for every beta: the gradient of
    # the mean over rows of the *summed* log-probability, whose sign is that of ga.
    reference = LOG_PROBS.clone()
    for beta in (0.01, 0.1, 4.5):
        log_probs = LOG_PROBS.clone().requires_grad_()
        loss, metrics = npo(log_probs, reference, mask=TOKENS, num_items=2, beta=beta)
        assert loss.item() == pytest.approx(2 / beta * math.log(2), rel=1e-6)
        assert metrics["log_ratio"].item() == 0
        (gradient,) = torch.autograd.grad(loss, log_probs)
        log_probs = LOG_PROBS.clone().requires_grad_()
        summed, _ = ga(log_probs, mask=TOKENS, num_items=2)
        torch.testing.assert_close(gradient, torch.autograd.grad(summed, log_probs)[0], rtol=1e-6, atol=1e-7)


def test_npo_stops_pushing_what_is_far_less_likely_than_under_the_reference():
    # log ratio -40 and 40 at beta 0.5: 2 sigmoid(-20) = 4.1e-9 and 2 sigmoid(20) = 2
    log_probs = torch.tensor([[0.0, -60.0], [0.0, -20.0]], requires_grad=True)
    reference = torch.tensor([[0.0, -20.0], [0.0, -60.0]])
    mask = torch.tensor([[False, True], [False, True]])
    loss, _ = npo(log_probs, reference, mask=mask, num_items=2, beta=0.5)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert 0 < gradient[0, 1].item() < 1e-8
    assert gradient[1, 1].item() == pytest.approx(1.0, rel=1e-6)


def test_npo_tends_to_gradient_ascent_for_small_beta():
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, _ = npo(log_probs, REFERENCE_LOG_PROBS, mask=TOKENS, num_items=2, beta=1e-5)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, TOKENS / 2, rtol=1e-4, atol=1e-7)


def test_ga_is_minus_nll():
    loss, _ = ga(LOG_PROBS, mask=TOKENS, num_items=4)
    kept, _ = nll(LOG_PROBS, mask=TOKENS, num_items=4)
    assert loss.item() == -kept.item()


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reads[0] == "hidden_states"])
def test_two_bf16_tensors_are_compared_in_fp32(name):
    # 256 - 1.0078125 = 254.9921875, which bf16 rounds to 255
    hidden = torch.full((1, 1, 2), 256.0, dtype=torch.bfloat16)
    target = torch.full((2,), 1.0078125, dtype=torch.bfloat16)
    tensors = {"hidden_states": hidden, "control_vector": target, "reference_hidden_states": target.expand(1, 1, 2)}
    value, metrics, _ = compute(name, tensors, torch.ones(1, 1, dtype=torch.bool), 1)
    assert value.item() == pytest.approx(254.9921875**2, rel=1e-7)
    assert all(entry.dtype == torch.float32 for entry in metrics.values())


# ---- The table ----


@pytest.mark.parametrize("name", LOSSES)
def test_table_matches_the_signature(name):
    loss = LOSSES[name]
    parameters = inspect.signature(loss.function).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    keyword = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert loss.reads == positional
    assert keyword == {"mask", "num_items", *loss.settings}
    # A default here would be a second one beside the configuration's: the public defect is that the two differ
    assert all(p.default is p.empty for p in parameters)
    assert set(loss.settings) <= set(UnlearnConfig.__dataclass_fields__)
    assert set(loss.reads) <= {"log_probs", "token_kl"} | HIDDEN_READS | REFERENCE_READS
    assert loss.unit == "position" if set(loss.reads) & HIDDEN_READS else loss.unit in ("sequence", "token")


@pytest.mark.parametrize("name", LOSSES)
def test_docstring_says_formula_shapes_source_and_published_defaults(name):
    loss = LOSSES[name]
    text = inspect.getdoc(loss.function)
    assert text.count("$$") == 2
    for section in ("Args:", "Returns:", "Source:", "Published", "Example:"):
        assert section in text, section
    assert "huggingface.co/papers/" in text
    entries = text.partition("Args:")[2].partition("Returns:")[0]
    for read in (*loss.reads, "mask"):
        assert f"{read} (`torch.Tensor` of shape `(" in entries, read
    for setting in ("num_items", *loss.settings):
        assert f"{setting} (`" in entries, setting
    counted = {"sequence": "sequences", "token": "tokens", "position": "positions"}[loss.unit]
    assert counted in entries.partition("num_items")[2].splitlines()[0]
