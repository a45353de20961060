"""gumbel: Philox against the published numbers, the operator against Philox, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdreamer import kernels
from fastdreamer.kernels import library
from fastdreamer.kernels.gumbel import SIGNATURE, gumbel

pytestmark = pytest.mark.operators

SHAPES = [(1024, 15, 4), (64,), (63,), (1025,), (1,), (), (0, 4), (41, 401)]
SEEDS = [0, 1, 2**32 - 1, 2**40 + 7, 2**63 - 1]
# From the file kat_vectors of Random123 1.14: four words of a counter, two of a key, what follows.
KNOWN = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (N, 4), words of 32 bits in uint64."""
    x, mask, (low, high) = counter.T.astype(np.uint64), np.uint64(0xFFFFFFFF), key
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        upper, k = np.uint64(32), (np.uint64(low), np.uint64(high))
        x = np.stack([(b >> upper) ^ x[1] ^ k[0], b & mask, (a >> upper) ^ x[3] ^ k[1], a & mask])
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return x.T


def expected(seed: int, count: int) -> torch.Tensor:
    """The operator's noise (count,) in float64."""
    blocks = -(-count // 64)
    counter = np.zeros((16 * blocks, 4), np.uint64)
    counter[:, 0] = np.arange(16 * blocks)
    words = philox(counter, (seed % 2**32, seed >> 32)).reshape(blocks, 16, 4).swapaxes(1, 2)
    u = ((words >> np.uint64(9)).astype(np.float64) + 0.5) / 2**23
    return torch.from_numpy(-np.log(-np.log(u.reshape(-1)[:count])))


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.ops.fastdreamer.gumbel(torch.tensor(seed), shape)


def test_philox_gives_the_published_numbers():
    for line in KNOWN.split("\n")[1:-1]:
        words = [int(word, 16) for word in line.split()]
        actual = philox(np.array([words[:4]]), (words[4], words[5]))[0]
        assert actual.tolist() == words[6:]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_values(cpp, isa, seed, shape):
    noise = drawn(seed, *shape)
    assert noise.shape == shape and noise.dtype == torch.float32
    torch.testing.assert_close(
        noise.flatten().double(), expected(seed, math.prod(shape)), rtol=1e-6, atol=1e-6
    )


def test_does_not_depend_on_threads(cpp, threads):
    noise = drawn(5, 300_001)
    threads(3)
    assert torch.equal(drawn(5, 300_001), noise)


def test_mean_variance_and_tails(cpp):
    noise = drawn(3, 2**22).double()
    count, variance = noise.numel(), math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 5 * (variance / count) ** 0.5
    assert abs(noise.var() / variance - 1) < 5 * (4.4 / count) ** 0.5  # kurtosis 5.4
    for at in (-2.0, 0.0, 5.0, 10.0):
        p = math.exp(-math.exp(-at))
        assert abs((noise < at).double().mean() - p) < 5 * (p * (1 - p) / count) ** 0.5, at


def test_generator_gives_the_numbers(cpp):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, same, other = (cpp.gumbel((4, 7), g, torch.float32) for g in generators)
    assert torch.equal(first, same) and not torch.equal(first, other)
    state = generators[0].get_state()
    second = cpp.gumbel((4, 7), generators[0], torch.float32)
    assert not torch.equal(first, second)
    assert torch.equal(cpp.gumbel((4, 7), generators[0].set_state(state), torch.float32), second)


def test_float64_is_the_reference(cpp):
    x, y = (
        draw((5, 3), torch.Generator().manual_seed(0), torch.float64)
        for draw in (cpp.gumbel, gumbel)
    )
    assert torch.equal(x, y)


def test_opcheck(cpp):
    torch.library.opcheck(torch.ops.fastdreamer.gumbel.default, (torch.tensor(3), (4, 5)))


def test_compiles_to_one_graph(cpp):
    def run(seed):
        return torch.ops.fastdreamer.gumbel(seed, (4, 5))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(3)), drawn(3, 4, 5))


def test_refuses_other_seeds(cpp):
    for seed in (torch.tensor(1.0), torch.tensor([1])):
        with pytest.raises(ValueError, match="seed must be one int64"):
            torch.ops.fastdreamer.gumbel(seed, (3,))


def test_c_interface_checks_its_arguments(cpp):
    run, y = library.function("fd_gumbel", SIGNATURE), torch.empty(3)
    run(0, None, 0, 0, None)
    for arguments, message in (
        ((0, None, 3, 0, None), "null"),
        ((0, y.data_ptr(), -1, 0, None), "size"),
        ((0, y.data_ptr(), 3, 1, None), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(*arguments)
    assert y.isnan().all()


def test_is_served_by_the_library(cpp):
    assert cpp.served_by["gumbel"] == "cpp"
    assert kernels.resolve("reference").gumbel is gumbel
