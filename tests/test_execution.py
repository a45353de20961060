"""Compiled losses and mixed precision beside the eager update in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from execution_common import B, T, replayed, tiny_learner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdreamer.errors import UsageError
from fastdreamer.execution import COMPILED, Act, Execution, compile_losses
from fastdreamer.kernels import library, resolve
from fastdreamer.learner import JointLearner, Learner, UpdateNoise
from fastdreamer.stored import unpack

RECIPES = ("2023", "2025")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def device() -> str:
    """What these tests compare is on the CPU, whatever device the operators are tested on."""
    return "cpu"


def gradients(learner: Learner, batch: dict[str, Tensor], noise: UpdateNoise) -> dict[str, Tensor]:
    """Of every loss by every parameter that learns, before any step."""
    if isinstance(learner, JointLearner):
        with learner.agent.products():
            loss, _, _ = learner.loss(batch, noise)
        grads = torch.autograd.grad(loss, [*learner.params.values()])
        return dict(zip(learner.params, grads, strict=True))
    with learner.agent.products():
        observed = learner.observe_batch(batch, noise.post)
        cont = 1 - batch["is_terminal"].float().flatten()
        imagined = learner.imagine(observed.states.flatten(), cont, noise.imagine)
        losses = (learner.world_model_loss(observed), *learner.behaviour_losses(imagined)[:2])
    sum(losses).backward()
    return {k: p.grad for k, p in learner.agent.named_parameters() if p.requires_grad}


# Options ---------------------------------------------------------------------------------------


def test_what_auto_comes_to(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    choose = Execution.choose
    for isa in library.ISAS:
        monkeypatch.setattr(library, "isa", lambda isa=isa: isa)
        precision = "bf16" if isa == "amx" else "fp32"
        assert choose("auto", "auto", "auto", CPU) == Execution(precision, False, False)
        assert choose("fp32", "auto", "auto", CPU).precision == "fp32"
    assert choose("auto", "auto", "auto", GPU) == Execution("bf16", True, True)
    assert choose("fp32", "off", "on", GPU) == Execution("fp32", False, True)
    assert choose("bf16", "on", "off", CPU) == Execution("bf16", True, False)
    assert str(choose("bf16", "on", "off", CPU)) == "precision bf16, compile on, graph off"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert choose("auto", "auto", "auto", GPU).precision == "fp32"
    monkeypatch.setattr("fastdreamer.execution.find_spec", lambda _: None)
    assert choose("fp32", "auto", "auto", GPU) == Execution("fp32", False, True)
    with pytest.raises(UsageError, match="--compile on: it needs the triton package"):
        choose("fp32", "on", "auto", GPU)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UsageError, match=r"--compile on: it needs a C\+\+ compiler"):
        choose("fp32", "on", "auto", CPU)
    with pytest.raises(UsageError, match="--graph on: it needs a GPU"):
        choose("fp32", "auto", "on", CPU)


def test_auto_without_the_library_is_float32(monkeypatch):
    def missing() -> str:
        raise RuntimeError("not built")

    monkeypatch.setattr(library, "isa", missing)
    assert Execution.choose("auto", "auto", "auto", CPU).precision == "fp32"


# Compiled --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("served_by", "recipe", "compiler"),
    [
        *((ops, recipe, "aot_eager") for ops in ("reference", "cpp") for recipe in RECIPES),
        ("reference", "2023", "inductor"),
        ("cpp", "2025", "inductor"),
    ],
)
def test_compiled_losses_equal_eager_ones(served_by, recipe, compiler):
    """Each method is one graph with the backend's operators in it.

    Inductor adds up to 16 * 16 * 3 float32 terms in another order, which 1e-5 covers.
    """
    torch._dynamo.reset()
    eager, compiled = (tiny_learner(recipe, resolve(served_by)) for _ in range(2))
    compile_losses(compiled, compiler)
    batch, noise = unpack(replayed(eager), eager.agent), eager.draw_noise(B, T)
    ours, theirs = (gradients(learner, batch, noise) for learner in (compiled, eager))
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name
    (ours, mine), (theirs, states) = (x.update(batch, noise) for x in (compiled, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.deter, states.deter)


@pytest.mark.slow
@pytest.mark.parametrize("best", ["avx512", "amx"])
def test_compiled_losses_in_bfloat16(best, monkeypatch):
    """One graph each, also where the processor decides what is multiplied."""
    monkeypatch.setattr(library, "isa", lambda: best)
    torch._dynamo.reset()
    eager, compiled = (tiny_learner("2025", resolve("cpp")) for _ in range(2))
    eager.agent.bf16 = compiled.agent.bf16 = True
    compile_losses(compiled, "aot_eager")
    batch, noise = unpack(replayed(eager), eager.agent), eager.draw_noise(B, T)
    ours, theirs = (flat(gradients(x, batch, noise), "") for x in (compiled, eager))
    assert distance(ours, theirs) < 2**-7


def test_what_is_compiled_exists():
    for recipe in RECIPES:
        learner = tiny_learner(recipe, resolve("reference"))
        missing = [name for name in COMPILED if not hasattr(learner, name)]
        assert missing == ([] if learner.recipe.joint else ["replay_value_loss"])


# Precision -------------------------------------------------------------------------------------

PRODUCTS = {"mm", "addmm", "bmm", "convolution"}
# What may touch bfloat16 besides: conversions, moves, and resizing between two convolutions.
MOVES = {"_to_copy", "_unsafe_view", "cat", "clone", "squeeze_"}
MOVES |= {"max_pool2d_with_indices", "upsample_nearest2d"}
# The gradient of a bfloat16 tensor has its type; a bias sums it, two uses add theirs.
GRADIENTS = {"convolution_backward", "max_pool2d_with_indices_backward"}
GRADIENTS |= {"upsample_nearest2d_backward", "sum", "add"}
# Between two products; its arithmetic is in float32 (tests/test_norm_act.py).
NORMS = {"norm_act", "norm_act_backward"}


class Halves(TorchDispatchMode):
    """Names of the operators that touch bfloat16 tensors, and of the products that do not."""

    def __init__(self):
        super().__init__()
        self.halves: set[str] = set()
        self.full: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        dtypes = {x.dtype for x in _tensors((args, out)) if x.is_floating_point()}
        if torch.bfloat16 in dtypes and not func.is_view:
            self.halves.add(name)
        if name in PRODUCTS and dtypes != {torch.bfloat16}:
            self.full.append(name)
        return out


def _tensors(values) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_rollouts_policy_is_not_run_again(cpp, recipe):
    """But in mixed precision, where the scans keep nothing."""
    ran = []

    def heads(feat, latents, given, eps):
        ran.append([head.ran is not None for head in given])
        return cpp.heads(feat, latents, given, eps)

    learner = tiny_learner(recipe, replace(cpp, heads=heads))
    batch = unpack(replayed(learner), learner.agent)
    for learner.agent.bf16 in (False, True):
        learner.update(batch)
    assert ran == [[False] * 4 + [True], [False] * 5]


@pytest.mark.parametrize("recipe", RECIPES)
def test_which_tensors_are_bfloat16(ops, recipe):
    """Products' and the norms' between them: no softmax, logarithm, mean, return, statistic or
    optimiser's."""
    learner = tiny_learner(recipe, ops)
    learner.agent.bf16 = True
    batch, noise = unpack(replayed(learner), learner.agent), learner.draw_noise(B, T)
    with Halves() as seen:
        metrics, states = learner.update(batch, noise)
    others = seen.halves - PRODUCTS - MOVES - GRADIENTS - NORMS
    assert not others, others
    assert PRODUCTS & seen.halves >= {"addmm", "mm", "convolution"}
    tensors = [*metrics.values(), states.deter, states.stoch, *learner.tensors()]
    assert all(x.dtype == torch.float32 for x in tensors if x.is_floating_point())
    assert all(x.dtype == torch.float32 for x in learner.agent.state_dict().values())
    if ops.backend == "reference":
        assert not seen.full


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_stays_near_float32(ops, recipe):
    """bfloat16 has 8 bits: a rounding is off by 2^-8 at most, by 2^-9.2 in the root mean square.

    A loss lies behind about 12 products, each of which rounds two factors and its result: 36
    independent roundings come to 6 * 2^-9.2 = 1 %. Sums over many entries average them out, so
    the losses keep within 2^-7; gradients pass through twice as many: 2^-5. Where max pooling
    picks another of two nearly equal pixels, or a network's gradient is small for lack of
    advantage, single gradients are off by more, but not in their direction.
    """
    full, half = (tiny_learner(recipe, ops) for _ in range(2))
    half.agent.bf16 = True
    for seed in range(2):
        batch, noise = unpack(replayed(full, seed), full.agent), full.draw_noise(B, T)
        ours, theirs = (gradients(learner, batch, noise) for learner in (half, full))
        assert distance(flat(ours, ""), flat(theirs, "")) < 2**-5
        for network in ("world_model", "actor", "critic"):
            pair = flat(ours, network), flat(theirs, network)
            assert torch.cosine_similarity(*pair, dim=0) > 0.98, network
    (ours, mine), (theirs, states) = (x.update(batch, noise) for x in (half, full))
    assert torch.equal(mine.stoch, states.stoch)
    assert (mine.deter - states.deter).abs().max() < 2**-7
    for name in [k for k in theirs if k.startswith(("loss/", "entropy/")) and k != "loss/policy"]:
        assert abs(ours[name] - theirs[name]) < 2**-7 * abs(theirs[name]), name


def flat(tensors: dict[str, Tensor], prefix: str) -> Tensor:
    return torch.cat([v.flatten() for k, v in tensors.items() if k.startswith(prefix)])


@pytest.mark.parametrize("recipe", RECIPES)
def test_acting_in_bfloat16(ops, recipe):
    """The carry stays in float32, and near that of float32."""
    full, half = (tiny_learner(recipe, ops).agent for _ in range(2))
    half.bf16 = True
    rows = replayed(tiny_learner(recipe, ops))
    obs, first = {k: rows[k][:, 0] for k in full.obs_space}, rows["is_first"][:, 0]
    ours, theirs = (
        Act(agent, torch.Generator().manual_seed(3), graph=False)(obs, first, None)
        for agent in (half, full)
    )
    assert ours.state.deter.dtype == ours.action.dtype == torch.float32
    assert torch.equal(ours.state.stoch, theirs.state.stoch)
    torch.testing.assert_close(ours.state.deter, theirs.state.deter, rtol=0, atol=2**-7)
    torch.testing.assert_close(ours.action, theirs.action, rtol=0, atol=2**-7)
