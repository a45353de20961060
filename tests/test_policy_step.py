"""One policy step of environments against its reference, for both cells and all kinds of actions.

Legend: N environments, D deter, S stoch, K classes, A action, U hidden, E inputs, G blocks.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from test_rssm import CELLS, SHAPES, TOLERANCE, Draw, make_policy, make_weights

from fastdreamer.actions import BoundedNormal, Categorical, Policy
from fastdreamer.kernels import library
from fastdreamer.kernels.policy_step import TENSORS, CAct, policy_step, policy_step_cpp
from fastdreamer.kernels.rssm_weights import CModel, Layer

pytestmark = pytest.mark.operators

INPUTS = 37  # E
NAMES = ("deter", "stoch", "action", "x", "is_first", "noise", "action_noise")
WIDE = (0, 0, 96, 4, 16, 5, 48, 4)  # whole vectors, and several of them

cells = pytest.mark.parametrize("cell", CELLS)


def arguments_of(
    cell: str,
    shape: tuple[int, ...] = SHAPES[0],
    kinds: str = "dcd",
    rows: int = 3,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list:
    """Weights and tensors; the second row is first, the first one starts from no classes."""
    draw, (_, _, D, S, K, A, U, _), gru = Draw(dtype), shape, cell == "gru"
    actions = A * len(kinds)
    weights = make_weights(draw, cell, (*shape[:5], actions, *shape[6:]))
    widths = [INPUTS] + [U + 2] * (layers - 1)
    embedding = [draw.layer(i, U + 2, gru) for i in widths[:-1]]
    embedding.append(Layer(draw(U, widths[-1]), None if gru else draw(U)))
    policy = make_policy(draw, shape, kinds, gru)
    stoch = draw.one_hot(rows, S, K)
    stoch[:1] = 0
    is_first = torch.arange(rows) % 3 == 1
    noise = draw.gumbel(rows, S, K), draw.gumbel(rows, actions)
    tensors = (draw(rows, D), stoch, 2 * draw(rows, actions), draw(rows, INPUTS), is_first, *noise)
    return [weights, embedding, policy, *tensors]


def assert_equal_steps(arguments: list) -> None:
    """The same samples, and values up to rounding."""
    actual, expected = policy_step_cpp(*arguments), policy_step(*arguments)
    assert torch.equal(actual[1], expected[1])
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **TOLERANCE)


@cells
@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
@pytest.mark.parametrize("kinds", ["d", "c", "dcd"])
def test_equals_the_reference(isa, cell, shape, kinds):
    assert_equal_steps(arguments_of(cell, shape, kinds))


@cells
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 5, 16, 17])
@pytest.mark.parametrize("layers", [1, 3])
def test_any_number_of_environments_and_layers(isa, cell, rows, layers):
    assert_equal_steps(arguments_of(cell, WIDE, rows=rows, layers=layers))


@cells
def test_a_reset_forgets(isa, cell):
    """What lies before an episode is not read, be it NaN; other rows are not changed by it."""
    arguments = arguments_of(cell)
    expected = policy_step_cpp(*arguments)
    for x in arguments[3:6]:
        x[1] = torch.nan
    actual = policy_step_cpp(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert all(x.isfinite().all() for x in actual)


@cells
def test_a_row_does_not_depend_on_the_others(isa, cell):
    arguments = arguments_of(cell, WIDE, rows=9)
    together = policy_step_cpp(*arguments)
    for row in range(9):
        alone = policy_step_cpp(*arguments[:3], *(x[row : row + 1] for x in arguments[3:]))
        assert all(torch.equal(x[row : row + 1], y) for x, y in zip(together, alone, strict=True))


@cells
def test_does_not_depend_on_threads(cpp, threads, cell):
    arguments = arguments_of(cell, (0, 0, 512, 16, 32, 6, 256, 8), rows=5)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(policy_step_cpp(*arguments))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@cells
def test_without_noise_it_takes_the_modes(ops, cell):
    arguments = arguments_of(cell, kinds="dc", rows=4)
    deter, stoch, action = ops.policy_step(*arguments[:-2], *(x.zero_() for x in arguments[-2:]))
    weights, embedding, policy = arguments[:3]
    x = arguments[6]
    for layer in embedding:
        x = layer(x, weights.eps)
    hidden, out = weights.posterior
    x = hidden.activate(torch.nn.functional.linear(deter, hidden.weight) + x, weights.eps)
    logits = out(x, weights.eps).unflatten(-1, stoch.shape[1:])
    assert torch.equal(stoch.argmax(-1), logits.argmax(-1))
    features = policy.features(deter, stoch)
    for layer in policy.layers:
        features = layer(features, weights.eps)
    (logits,), (mean, _) = ([out(features, 0.0) for out in head] for head in policy.heads)
    size = logits.shape[-1]
    assert torch.equal(action[:, :size].argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(action[:, size:], mean.tanh(), **TOLERANCE)


@cells
def test_actions_are_those_of_the_agents_policy(ops, cell):
    """Of the distributions by which the actor learns."""
    arguments = arguments_of(cell, kinds="dcd", rows=4)
    weights, policy = arguments[0], arguments[2]
    deter, stoch, action = ops.policy_step(*arguments)
    x = policy.features(deter, stoch)
    for layer in policy.layers:
        x = layer(x, weights.eps)
    parts = {}
    for i, head in enumerate(policy.heads):
        raw = [out(x, weights.eps) for out in head]
        discrete = len(raw) == 1
        parts[f"part {i}"] = (
            Categorical(ops.unimix(raw[0], policy.mix), ops) if discrete else BoundedNormal(*raw)
        )
    sizes = [head[0].weight.shape[0] for head in policy.heads]
    expected = Policy(parts, sizes).sample(arguments[-1])
    torch.testing.assert_close(action, expected, **TOLERANCE)


def test_float64_is_the_reference(cpp):
    arguments = arguments_of("gru", dtype=torch.float64)
    pairs = zip(policy_step_cpp(*arguments), policy_step(*arguments), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@cells
def test_strided_inputs(cpp, cell):
    arguments = arguments_of(cell)
    strided = [x.repeat_interleave(2, 0)[::2] for x in arguments[3:]]
    assert not strided[0].is_contiguous()
    pairs = zip(policy_step_cpp(*arguments[:3], *strided), policy_step_cpp(*arguments), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("position", "name"), list(enumerate(NAMES, start=3)))
def test_refuses_shapes_and_dtypes(cpp, position, name):
    arguments = arguments_of("block_gru")
    right = arguments[position]
    for wrong in (right[..., :-1], right[:2], right[None]):
        arguments[position] = wrong
        if position > 3 or wrong.shape[0] == 3:  # the rows are those of deter
            with pytest.raises(ValueError, match=f"policy_step: {name} must be"):
                policy_step_cpp(*arguments)
    arguments[position] = right.half()
    if position > 3:  # another type of deter is the reference's
        with pytest.raises(TypeError, match=f"policy_step: {name} must be"):
            policy_step_cpp(*arguments)


@cells
def test_refuses_weights(cpp, cell):
    weights, embedding, policy, *rest = arguments_of(cell)
    normed = [embedding[0], embedding[1]._replace(scale=weights.posterior[0].scale)]
    for wrong in ([], normed):
        with pytest.raises(ValueError, match="last layer of the embedding"):
            policy_step_cpp(weights, wrong, policy, *rest)
    narrow = [embedding[0], embedding[1]._replace(weight=embedding[1].weight[:-1])]
    with pytest.raises(ValueError, match="a weight must be"):
        policy_step_cpp(weights, narrow, policy, *rest)
    head = policy.heads[0][0]._replace(weight=policy.heads[0][0].weight.double())
    with pytest.raises(TypeError, match="weights must be"):
        policy_step_cpp(
            weights, embedding, policy._replace(heads=((head,), *policy.heads[1:])), *rest
        )


class TestCInterface:
    """The C function, called as another program would."""

    @pytest.fixture(autouse=True)
    def _built(self, cpp, monkeypatch):
        self.arguments, self.passed = arguments_of("block_gru"), []
        monkeypatch.setattr(library, "launch", lambda *passed: self.passed.extend(passed[-2:]))

    def call(self, model_fields: dict, step_fields: dict) -> None:
        """With some fields of the model or the step replaced."""
        policy_step_cpp(*self.arguments)
        step, model = self.passed.pop(), self.passed.pop()
        for structure, fields in ((model, model_fields), (step, step_fields)):
            for name, value in fields.items():
                setattr(structure, name, value)
        self.run(model, step)

    @staticmethod
    def run(*structures: object) -> None:
        types = (CModel, CAct, library.Launch)
        library.function("fd_policy_step", tuple(map(ctypes.POINTER, types)))(*structures, None)

    def test_null_pointers(self):
        policy_step_cpp(*self.arguments)
        for structures in ((None, self.passed[1]), (self.passed[0], None)):
            with pytest.raises(RuntimeError, match="null pointer"):
                self.run(*structures)
        layers = ("embedding", "policy", "part_sizes", "discrete", "heads")
        for name in (*TENSORS, *layers):
            with pytest.raises(RuntimeError, match="null pointer"):
                self.call({}, {name: None})

    def test_sizes(self):
        for name, value in (("N", -1), ("embedding_layers", 0), ("policy_layers", 9), ("parts", 2)):
            with pytest.raises(RuntimeError, match="size"):
                self.call({}, {name: value})
        for name, value in (("head_layers", 3), ("deter", 25), ("hidden", 8)):
            with pytest.raises(RuntimeError, match="size"):
                self.call({name: value}, {})

    def test_nobody_needs_no_pointers(self):
        self.call({}, {"N": 0} | dict.fromkeys(TENSORS))
