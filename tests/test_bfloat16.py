"""Products in bfloat16 on a CPU: the scans and the cells, on each instruction set that has them.

The tiles of AMX are also tested by a library that computes them in software. Legend as in
test_rssm.py; "rounded" is the reference in float64 that rounds the same factors.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_common import gradients as gradients_of
from rounded import doubled, rounded, rounding
from test_rssm import LARGE, Draw, cells, gradients, make_policy, make_scan, make_weights
from test_sanitizers import build
from torch import Tensor

from fastdreamer.kernels import gru_step as cell_operators
from fastdreamer.kernels import library
from fastdreamer.kernels.rssm_imagine import _compute, rssm_imagine, rssm_imagine_cpp
from fastdreamer.kernels.rssm_observe import rssm_observe, rssm_observe_cpp
from fastdreamer.kernels.rssm_observe_operator import observe
from fastdreamer.kernels.rssm_observe_weights import flatten
from fastdreamer.kernels.rssm_weights import GRUWeights, RSSMWeights

pytestmark = pytest.mark.operators

# Against float64 with the same roundings: sums of a few hundred products, through two steps.
TIGHT = {"rtol": 1e-5, "atol": 2e-5}
# Relative, of a whole gradient: a sum over rows, of which few are spoilt (assert_rows_equal); a
# matrix's is a product of PyTorch's, which rounds it to bfloat16, by 2^-8 of an element at most.
WITHIN = {False: 2**-12, True: 2**-8}
# B, T, D, S, K, A, U, G: odd widths, columns beside a panel, rows beside a tile and a block.
SHAPES = [
    (19, 2, 24, 3, 4, 3, 7, 8),
    (13, 2, 40, 2, 5, 6, 33, 8),
    (33, 2, 70, 4, 3, 1, 35, 2),
    (150, 1, 8, 3, 3, 2, 5, 1),
]
# B, D, U, G: also inputs, gates and rows of more than one block.
STEPS = [(17, 24, 7, 8), (5, 3, 1, 1), (101, 10, 17, 2), (9, 33, 530, 1), (8, 350, 9, 2)]
EPS = 1e-3

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
steps = pytest.mark.parametrize("shape", STEPS, ids=str)
both = pytest.mark.parametrize("name", ["gru_step", "block_gru_step"])


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU library with the tiles of AMX computed in software."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instruction sets of x86-64")
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["avx512bf16", "amx", "amx_emulated"])
def half(request: pytest.FixtureRequest, cpp: object) -> Iterator[str]:
    """Each instruction set with products in bfloat16, as the one in use."""
    caches = (library._load, library.function, library._lend_threads)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "amx_emulated":
            patch.setattr(library, "CPU_LIBRARY", request.getfixturevalue("emulated"))
            for cached in caches:
                cached.cache_clear()
        before = library.isa()
        try:
            library.set_isa(request.param.removesuffix("_emulated"))
        except RuntimeError as error:
            pytest.skip(str(error))
        yield request.param
        library.set_isa(before)
    for cached in caches:
        cached.cache_clear()


def assert_rows_equal(actual: Tensor, expected: Tensor) -> None:
    """Most rows to the last digits.

    Where an activation lies next to a tie, another order of sums rounds it the other way, by 2^-7
    of it, which spoils its row; a product of wrong factors spoils them all.
    """
    actual, expected = actual.detach(), expected.detach().to(actual.dtype)
    size = max(1.0, float(expected.abs().max()))
    actual, expected = (x.flatten(1) / size for x in (actual, expected))
    assert float((actual - expected).abs().max()) < 2**-6
    good = torch.isclose(actual, expected, **TIGHT).all(1)
    assert good.sum() >= 0.8 * len(good), f"{int(good.sum())} of {len(good)} rows"


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def stoch_weights_are_halves(weights: RSSMWeights) -> RSSMWeights:
    """A product with a one-hot latent is a row of the weights, which is not rounded."""
    cell = weights.cell
    layer = cell.input if isinstance(cell, GRUWeights) else cell.stoch
    layer.weight.data = rounded(layer.weight.data)
    return weights


def observe_arguments(cell: str, shape: tuple[int, ...], grad: bool = False) -> list[Any]:
    """Weights and scan, whose draws are clear."""
    draw = Draw(grad=grad)
    weights, scan = make_weights(draw, cell, shape), make_scan(draw, shape)
    return [stoch_weights_are_halves(weights), *scan[:5], 50 * scan[5]]


def observe_half(weights: RSSMWeights, *scan: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return observe(weights, *scan, torch.bfloat16)


@cells
@shapes
def test_observe_values(half, cell, shape):
    arguments = observe_arguments(cell, shape)
    with rounding():
        expected = rssm_observe(*doubled(arguments))
    for x, y in zip(observe_half(*arguments), expected, strict=True):
        assert_rows_equal(x, y)


@cells
@shapes
def test_observe_gradients(half, cell, shape):
    weights, *scan = observe_arguments(cell, shape, grad=True)
    with rounding():
        expected = gradients(rssm_observe, *as_scan(doubled([weights, *scan])))
    actual = gradients(observe_half, weights, scan)
    assert_rows_equal(actual[-1], expected[-1])
    for x, y in zip(actual, expected, strict=True):
        assert y is None or distance(x, y) < WITHIN[x.ndim > 1]


def as_scan(arguments: list[Any]) -> tuple[RSSMWeights, list[Tensor]]:
    return arguments[0], arguments[1:]


def imagine_arguments(cell: str, shape: tuple[int, ...], steps: int) -> tuple[Any, ...]:
    """A discrete and a continuous part of the action; draws are clear."""
    draw, (rows, _, D, S, K, A, *_) = Draw(), shape
    weights = make_weights(draw, cell, (*shape[:5], 2 * A, *shape[6:]))
    policy = make_policy(draw, shape, "dc", cell == "gru")
    policy.layers[0].weight.data = rounded(policy.layers[0].weight.data)
    noise = 50 * draw.gumbel(rows, steps, S, K), draw.gumbel(rows, steps + 1, 2 * A)
    noise[1][..., :A] *= 50
    starts = draw(rows, D), draw.one_hot(rows, S, K)
    return stoch_weights_are_halves(weights), policy, *starts, *noise


@cells
@shapes
def test_imagine(half, cell, shape):
    arguments = imagine_arguments(cell, shape, steps=2)
    with rounding():
        expected = rssm_imagine(*doubled(arguments))
    for x, y in zip(imagine(*arguments, torch.bfloat16), expected[:3], strict=True):
        assert_rows_equal(x, y)


def imagine(*arguments: Any) -> tuple[Tensor, ...]:
    """What every backend gives of a rollout."""
    return _compute(*arguments)[:3]


def step_inputs(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    """h, x and the cell's weights, all with a gradient."""
    draw, (B, D, U, G) = Draw(grad=True), shape
    width = D // G
    if name == "gru_step":
        return [draw(B, D), draw(B, U), draw(3 * D, D + U), draw(3 * D), draw(3 * D)]
    matrices = [draw(G, width + U, width), draw(G, width, 3 * width)]
    return [draw(B, D), draw(B, U), matrices[0], draw(D), draw(D), matrices[1], draw(3 * D)]


def step_half(name: str) -> Callable[..., Tensor]:
    operator = getattr(torch.ops.fastdreamer, name)
    return lambda *inputs: operator(*inputs, EPS, torch.bfloat16)[0]


@both
@steps
def test_step(half, name, shape):
    inputs, reference = step_inputs(name, shape), getattr(cell_operators, name)
    with rounding():
        exact = doubled(inputs)
        expected = reference(*exact, EPS)
        expected_gradients = gradients_of(reference, exact, EPS)
    assert_rows_equal(step_half(name)(*inputs), expected)
    actual = gradients_of(step_half(name), inputs)
    for x, y in zip(actual[:2], expected_gradients, strict=False):
        assert_rows_equal(x, y)
    for x, y in zip(actual, expected_gradients, strict=True):
        assert distance(x, y) < WITHIN[x.ndim > 1]


@cells
def test_one_row_is_as_among_others(half, cell):
    """Bit for bit, and from call to call."""
    scan, rollout = observe_arguments(cell, SHAPES[2]), imagine_arguments(cell, SHAPES[2], 3)
    one = [scan[0], *(x[32:] for x in scan[1:])]
    other = [*rollout[:2], *(x[32:] for x in rollout[2:])]
    every = (*observe_half(*scan), *imagine(*rollout, torch.bfloat16))
    again = (*observe_half(*scan), *imagine(*rollout, torch.bfloat16))
    alone = (*observe_half(*one), *imagine(*other, torch.bfloat16))
    for x, y, z in zip(every, again, alone, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x[32:], z)


@cells
def test_rows_of_a_large_tile_are_as_alone(half, cell, threads):
    """Those at the ends of the first tile, of tiles of 16 rows in it, and behind it."""
    threads(1)
    weights, policy, *rest = imagine_arguments(cell, LARGE, 2)
    every = imagine(weights, policy, *rest, torch.bfloat16)
    for rows in (slice(0, 1), slice(15, 17), slice(126, 130), slice(134, 135)):
        alone = imagine(weights, policy, *(x[rows] for x in rest), torch.bfloat16)
        assert all(torch.equal(x[rows], y) for x, y in zip(every, alone, strict=True))


@cells
def test_gradients_repeat_bit_for_bit(half, cell, threads):
    weights, *scan = observe_arguments(cell, SHAPES[0], grad=True)
    threads(2)
    first, second = (gradients(observe_half, weights, scan) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@cells
def test_nothing(half, cell):
    for size in ((0, 5), (3, 0)):
        weights, *scan = observe_arguments(cell, (*size, *SHAPES[0][2:]), grad=True)
        deter, _, logp = observe_half(weights, *scan)
        assert deter.shape == (*size, SHAPES[0][2])
        assert not any(
            x.any() for x in torch.autograd.grad(deter.sum() + logp.sum(), flatten(weights))
        )
    rollout = imagine_arguments(cell, (0, *SHAPES[0][1:]), 2)
    assert [len(x) for x in imagine(*rollout, torch.bfloat16)] == [0, 0, 0]


@cells
def test_nan_stays_within_its_row(half, cell):
    weights, *scan = observe_arguments(cell, SHAPES[0])
    clean = observe_half(weights, *scan)
    scan[3] = scan[3].clone()
    scan[3][1, 0] = float("nan")
    spoilt = observe_half(weights, *scan)
    assert spoilt[2][1, 0].isnan().all()
    others = torch.arange(len(scan[3])) != 1
    assert all(torch.equal(x[others], y[others]) for x, y in zip(clean, spoilt, strict=True))


@cells
def test_stays_near_float32(half, cell):
    """A factor is off by 2^-8 at most, by 2^-9.2 in the root mean square.

    After five steps a state lies behind at most 20 products of two factors each, whose errors are
    independent: at most sqrt(40) 2^-9.2 = 2^-6.5, and gates that keep much of the last state take
    from it: 2^-7. Gradients pass through the same products once more, and
    are rounded at the end of theirs: 2^-6.
    """
    shape = (16, 5, 128, 8, 8, 4, 64, 8 if cell == "block_gru" else 1)
    weights, *scan = observe_arguments(cell, shape, grad=True)
    ours, theirs = observe_half(weights, *scan), observe(weights, *scan, torch.float32)
    assert torch.equal(ours[1], theirs[1])
    assert 2**-12 < distance(ours[0], theirs[0]) < 2**-7
    assert 2**-12 < distance(ours[2], theirs[2]) < 2**-7
    pairs = (gradients(x, weights, scan) for x in (observe_half, rssm_observe_cpp))
    for i, (x, y) in enumerate(zip(*pairs, strict=True)):
        assert distance(x, y) < 2**-6, i


@cells
def test_autocast_chooses_it(half, cell):
    scan, rollout = observe_arguments(cell, SHAPES[0]), imagine_arguments(cell, SHAPES[0], 2)
    with torch.autocast("cpu", torch.bfloat16):
        actual = (*rssm_observe_cpp(*scan), *rssm_imagine_cpp(*rollout)[:3])
        assert rssm_imagine_cpp(*rollout).policy is None
    expected = (*observe_half(*scan), *imagine(*rollout, torch.bfloat16))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    full = (*rssm_observe_cpp(*scan), *rssm_imagine_cpp(*rollout)[:3])
    assert not torch.equal(actual[0], full[0]) and not torch.equal(actual[3], full[3])
    name = "block_gru_step" if cell == "block_gru" else "gru_step"
    inputs = step_inputs(name, STEPS[0])
    with torch.autocast("cpu", torch.bfloat16):
        actual = getattr(cell_operators, f"compiled_{name}")(*inputs, EPS)
    assert torch.equal(actual, step_half(name)(*inputs))


@cells
def test_elsewhere_it_is_float32(isa, cell):
    """Sets without products in bfloat16 compute what is asked for in it more exactly."""
    if isa in ("avx512bf16", "amx"):
        pytest.skip("it has them")
    scan, rollout = observe_arguments(cell, SHAPES[0]), imagine_arguments(cell, SHAPES[0], 2)
    actual = (*observe_half(*scan), *imagine(*rollout, torch.bfloat16))
    expected = (*observe(*scan, torch.float32), *imagine(*rollout, torch.float32))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


TILE_INSTRUCTIONS = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"}


@pytest.fixture(scope="module")
def disassembly() -> dict[str, list[str]]:
    """Instructions of each function of the CPU library, demangled."""
    if reason := library.unavailable_reason():
        pytest.skip(reason)
    if "FASTDREAMER_LIBRARY" in os.environ:
        pytest.skip("a library for tests")
    if not shutil.which("objdump"):
        pytest.skip("needs binutils")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library.CPU_LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = {}
    for line in text.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            found = functions.setdefault(head[1], [])
        elif line.startswith(" ") and "\t" in line:
            found.append(line.split("\t", 1)[1].strip())
    if not any("fastdreamer::amx::" in name for name in functions):
        pytest.skip("the compiler has no AMX")
    return functions


def test_tiles_are_in_their_set_alone(disassembly):
    """The processor's own instructions, and none where a machine without them could come by."""
    users = {
        name: found
        for name, code in disassembly.items()
        if (found := {line.split()[0] for line in code} & TILE_INSTRUCTIONS)
    }
    assert set.union(*users.values()) == TILE_INSTRUCTIONS
    assert all("fastdreamer::amx::" in name for name in users), sorted(users)


@pytest.mark.parametrize("of", ["amx", "avx512bf16"])
def test_sets_are_reached_by_the_choice_alone(disassembly, of):
    """Who calls a function of a set, and is not of it, has asked for the current set before."""
    callers = 0
    for name, code in disassembly.items():
        if f"fastdreamer::{of}::" in name:
            continue
        jump = re.compile(rf"(call|j\w+) .*<fastdreamer::{of}::")
        calls = [i for i, line in enumerate(code) if jump.match(line)]
        if calls:
            callers += 1
            asked = [i for i, line in enumerate(code) if "fastdreamer::product_isa(int)" in line]
            assert asked and asked[0] < calls[0], name
    assert callers == 7  # observe, imagine, the step and norms, and three backward passes


def test_the_choice_asks_processor_and_system(disassembly):
    """Before the library takes AMX: cpuid, the enabled state, and the permission for tiles."""
    code = [
        line.split()[0]
        for name, lines in disassembly.items()
        if name.startswith(("fastdreamer::(anonymous namespace)::has", "fd_set_isa"))
        for line in lines
    ]
    assert {"cpuid", "xgetbv"} <= set(code)
    text = "\n".join(line for lines in disassembly.values() for line in lines)
    assert "$0x1023" in text  # ARCH_REQ_XCOMP_PERM


def test_a_processor_without_them_refuses(cpp):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if not flags or "FASTDREAMER_LIBRARY" in os.environ:
        pytest.skip("needs Linux, and the library as it is installed")
    before = library.isa()
    for isa, flag in (("amx", "amx_bf16"), ("avx512bf16", "avx512_bf16")):
        if flag not in flags:
            with pytest.raises(RuntimeError, match="lacks the instruction set"):
                library.set_isa(isa)
    assert library.isa() == before
    assert before != "amx" or "amx_tile" in flags
