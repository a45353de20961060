"""Properties that any implementation must have: operators' references, actions, policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdreamer import kernels
from fastdreamer.actions import ActionSpec, BoundedNormal
from fastdreamer.kernels.gru_step import block_gru_step, gru_step
from fastdreamer.kernels.gumbel import gumbel
from fastdreamer.kernels.optim import adaptive_clip, laprop
from fastdreamer.kernels.twohot import bins, symexp, symlog

OPS = kernels.resolve("reference")
SHAPES = [(63, 5), (1, 4), (0, 7), (41, 32)]
logits = st.integers(0, 2**31 - 1).map(
    lambda seed: 5 * torch.randn(7, 11, generator=torch.Generator().manual_seed(seed))
)


@settings(deadline=None)
@given(logits)
def test_unimix_is_a_distribution_with_a_floor(x):
    logp = OPS.unimix(x, 0.01)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(len(x)))
    assert logp.exp().min() >= 0.01 / x.shape[-1] * (1 - 1e-5)
    torch.testing.assert_close(OPS.unimix(x, 0.0), x.log_softmax(-1))


@settings(deadline=None)
@given(logits, logits)
def test_kl_and_entropy_agree_with_torch(x, y):
    logp, logq = OPS.unimix(x, 0.01), OPS.unimix(y, 0.01)
    p, q = (
        torch.distributions.Categorical(logits=logp),
        torch.distributions.Categorical(logits=logq),
    )
    torch.testing.assert_close(OPS.kl(logp, logq), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(OPS.entropy(logp), p.entropy())
    assert (OPS.kl(logp, logq) >= -1e-6).all() and OPS.kl(logp, logp).abs().max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_are_one_hot_and_zero_noise_is_the_mode(shape):
    logp = torch.randn(shape).log_softmax(-1)
    noise = gumbel(shape, torch.Generator().manual_seed(0), torch.float32)
    sample = OPS.sample(logp, noise)
    assert torch.equal(sample.sum(-1), torch.ones(shape[0]))
    assert ((sample == 0) | (sample == 1)).all()
    mode = OPS.sample(logp, torch.zeros(shape))
    assert torch.equal(mode.argmax(-1), logp.argmax(-1))


def test_gumbel_samples_follow_the_probabilities():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(1)
    count = 20_000
    noise = gumbel((count, 4), generator, torch.float32)
    drawn = OPS.sample(p.log().expand(count, -1), noise).mean(0)
    assert ((drawn - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all(), drawn


def test_gumbel_of_a_zero_uniform_is_never_drawn(monkeypatch):
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.zeros(3).index_fill(0, torch.tensor(1), 0.5)
    )
    noise = gumbel((3,), torch.Generator(), torch.float32)
    assert not noise.isnan().any() and noise.argmax() == 1


@pytest.mark.parametrize("layout", ["symlog", "symexp"])
def test_twohot_puts_mass_on_two_bins(layout):
    b = bins(layout, 255, torch.float64, torch.device("cpu"))
    assert torch.equal(b, -b.flip(0)) and (b.diff() > 0).all()
    targets = torch.tensor([0.0, 0.3, -17.3, 1e4, 1e12, -1e12, 123.456], dtype=torch.float64)
    x = torch.zeros(len(targets), 255, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(OPS.twohot_loss(x, targets, layout).sum(), x)
    weights = 1 / 255 - grad  # the gradient is softmax - target
    assert ((weights > 1e-12).sum(-1) <= 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(targets))
    place = symlog(targets) if layout == "symlog" else targets
    torch.testing.assert_close(
        (weights * b).sum(-1), place.clamp(b[0], b[-1]), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("layout", ["symlog", "symexp"])
def test_twohot_mean(layout):
    assert OPS.twohot_mean(torch.full((3, 255), 7.0), layout).eq(0).all()
    one = torch.full((1, 255), -1e4)
    one[0, 200] = 0
    b = bins(layout, 255, torch.float32, torch.device("cpu"))[200]
    expected = symexp(b) if layout == "symlog" else b
    torch.testing.assert_close(OPS.twohot_mean(one, layout)[0], expected)


def test_bins_first_asked_for_without_gradients_can_be_trained_with():
    bins.cache_clear()
    with torch.inference_mode():
        OPS.twohot_mean(torch.zeros(2, 9))
    x = torch.randn(2, 9, requires_grad=True)
    OPS.twohot_mean(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_cells_keep_states_between_old_and_candidate(rows):
    deter, units, blocks = 16, 6, 4
    h, x = torch.rand(rows, deter) * 2 - 1, torch.randn(rows, units)
    new = gru_step(
        h, x, torch.randn(3 * deter, deter + units), torch.ones(3 * deter), torch.zeros(3 * deter)
    )
    assert new.shape == h.shape and (new.abs() <= 1).all()
    weights = (
        torch.randn(blocks, deter // blocks + units, deter // blocks),
        torch.zeros(deter),
        torch.ones(deter),
        torch.randn(blocks, deter // blocks, 3 * deter // blocks),
        torch.zeros(3 * deter),
    )
    new = block_gru_step(h, x, *weights)
    assert new.shape == h.shape and (new.abs() <= 1).all()


def test_laprop_first_step_is_the_sign_of_the_gradient():
    params, grads = [torch.zeros(5)], [torch.tensor([3.0, -1e-3, 0.0, 1e3, -2.0])]
    nu, mu = [torch.zeros(5)], [torch.zeros(5)]
    laprop(params, grads, nu, mu, step=1, lr=0.1)
    torch.testing.assert_close(params[0], -0.1 * grads[0].sign(), rtol=1e-4, atol=0)


def test_adaptive_clip_bounds_each_tensor():
    params = [torch.full((4,), 2.0), torch.zeros(3)]
    grads = [torch.full((4,), 100.0), torch.full((3,), 1e-5)]
    big, small = adaptive_clip(grads, params, 0.3)
    torch.testing.assert_close(big.norm(), torch.tensor(0.3 * 4.0))
    assert torch.equal(small, grads[1])


SPACES = [
    spaces.Discrete(5),
    spaces.Discrete(3, start=2),
    spaces.MultiDiscrete([2, 5, 3]),
    spaces.MultiDiscrete([2, 3], start=[1, -1]),
    spaces.Box(-2.0, 3.0, (2, 3)),
    spaces.Box(0, 255, (2,), np.uint8),
    spaces.Dict({"turn": spaces.Box(-1, 1, (2,)), "jump": spaces.Discrete(2)}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_go_to_vectors_and_back(space):
    from gymnasium.vector.utils import batch_space, iterate

    spec, batched = ActionSpec(space), batch_space(space, 4)
    batched.seed(0)
    for _ in range(20):
        action = batched.sample()
        vector = spec.encode(action)
        assert vector.shape == (4, spec.size) and vector.dtype == np.float32
        assert (np.abs(vector) <= 1 + 1e-6).all()
        back = spec.decode(vector)
        for ours, theirs in zip(iterate(batched, back), iterate(batched, action), strict=True):
            assert space.contains(ours)
            values = (
                [(ours[k], theirs[k]) for k in ours] if isinstance(ours, dict) else [(ours, theirs)]
            )
            for a, b in values:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_continuous_actions_stay_in_their_bounds(low, width):
    space = spaces.Box(np.float32(low), np.float32(low + width), (3,))
    if not (space.high > space.low).all():
        return
    action = ActionSpec(space).decode(np.array([[-9.0, 9.0, 1.0]], np.float32))
    assert space.contains(action[0])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(1, 1, (2,)),
        spaces.Text(3),
        spaces.MultiDiscrete([[2, 2]]),
        spaces.Dict({"a": spaces.MultiDiscrete([2, 2]), "a0": spaces.Discrete(2)}),
    ],
    ids=str,
)
def test_other_action_spaces_are_refused(space):
    with pytest.raises(ValueError, match=r"not supported|not unique"):
        ActionSpec(space)


def test_bounded_normal_agrees_with_torch():
    mean, std, action = torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 3)
    dist = BoundedNormal(mean, std)
    normal = torch.distributions.Normal(mean.tanh(), 0.9 * torch.sigmoid(std + 2) + 0.1)
    torch.testing.assert_close(dist.log_prob(action), normal.log_prob(action).sum(-1))
    torch.testing.assert_close(dist.entropy(), normal.entropy().sum(-1))
    assert torch.equal(dist.sample(torch.zeros(6, 3)), normal.mean)
    assert (dist.std > 0.1).all() and (dist.std < 1).all()
