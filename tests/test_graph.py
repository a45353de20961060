"""One update is one CUDA graph: what that asks of it, shown as far as a CPU can."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from execution_common import B, T, replayed, tiny_learner
from test_resume import CARTPOLE, losses, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdreamer import kernels
from fastdreamer.execution import Act, Execution, Update
from fastdreamer.graph import Graphed, preserved
from fastdreamer.learner import JointLearner, Learner, UpdateNoise, warm_up
from fastdreamer.stored import unpack

EAGER = Execution("fp32", compile=False, graph=False)
GRAPH = Execution("fp32", compile=False, graph=True)
RECIPES = ("2023", "2025")


@pytest.fixture
def device() -> str:
    """What these tests compare is on the CPU, whatever device the operators are tested on."""
    return "cpu"


# No synchronisation ----------------------------------------------------------------------------

READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2")


class Unread(TorchDispatchMode):
    """Refuses operators by which the host would wait for a value on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"{func} reads a value on the host"
        assert not (name == "_to_copy" and (kwargs or {}).get("device")), f"{func} moves a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_reads_no_value_on_the_host(ops, recipe):
    """Among all operators that PyTorch dispatches, of the loss, its gradient and the steps."""
    update = Update(tiny_learner(recipe, ops), EAGER)
    batch = replayed(update.learner)
    with Unread():
        update(batch)
    with Unread(), pytest.raises(AssertionError, match="reads a value"):
        batch["reward"].sum().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_runs_where_there_are_no_values(recipe, monkeypatch):
    """On the meta device every read, branch on a value and copy to the host raises."""
    here = tiny_learner(recipe, kernels.resolve("reference"))
    batch, noise = moved(unpack(replayed(here), here.agent)), moved(fresh_noise(here))
    generator = torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda device: generator)
    learner = Learner.make(here.agent.to("meta"), here.config)
    metrics, _ = learner.learn(batch, noise)
    assert len(metrics) > 10 and all(value.is_meta for value in metrics.values())
    for read in (Tensor.item, Tensor.cpu, Tensor.nonzero, bool):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(metrics["kl"])


def fresh_noise(learner: Learner) -> UpdateNoise:
    return learner.draw_noise(B, T)


def moved(values):
    """A structure of tensors on the meta device."""
    if isinstance(values, Tensor):
        return values.to("meta")
    if isinstance(values, dict):
        return {k: moved(v) for k, v in values.items()}
    return type(values)(**moved(vars(values)))


# Scalars on the device -------------------------------------------------------------------------


def test_steps_by_tensors_equal_steps_by_numbers(monkeypatch):
    """The first update has rate 0, the second half of it; further ones amplify the rounding."""
    ends = []
    for on_device in (False, True):
        learner = tiny_learner("2025", kernels.resolve("reference"), warmup=2, lr=1e-2)
        if on_device:
            monkeypatch.setattr(JointLearner, "progress", lambda self: self.count)
        update = Update(learner, EAGER)
        start = {k: p.detach().clone() for k, p in learner.params.items()}
        update(replayed(learner, 0))
        assert_equal(start, {k: p.detach() for k, p in learner.params.items()})
        update(replayed(learner, 1))
        assert learner.count == learner.updates == 2
        ends.append(learner.agent.state_dict())
        assert any(not torch.equal(start[k], ends[-1][k]) for k in start)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-6, atol=1e-8, msg=name)


def test_warm_up():
    for updates, expected in ((0, 0.0), (1, 0.5), (2, 1.0), (9, 1.0)):
        assert warm_up(2.0, updates, 2) == 2 * expected
        assert warm_up(2.0, torch.tensor(updates), 2) == 2 * expected
    assert warm_up(2.0, torch.tensor(0), 0) == 2.0


# Rehearsal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_rehearsal_leaves_nothing_behind(ops, recipe):
    """Before the first update and between two: weights, optimisers, statistics, randomness."""
    learners = [tiny_learner(recipe, ops) for _ in range(2)]
    plain, rehearsed = (Update(learner, EAGER) for learner in learners)
    graphed = Graphed(rehearsed.work, learners[1].tensors, [learners[1].generator])
    for seed in range(3):
        batch = replayed(learners[0], seed)
        before = copy.deepcopy([learners[1].tensors(), learners[1].generator.get_state()])
        graphed.rehearse(batch)
        after = [learners[1].tensors(), learners[1].generator.get_state()]
        assert torch.equal(before[1], after[1])
        assert_equal(before[0], after[0])
        assert learners[1].updates == seed
        assert_equal(plain(batch), rehearsed(batch))
    assert_equal(learners[0].agent.state_dict(), learners[1].agent.state_dict())
    assert_equal(learners[0].state_dict(), learners[1].state_dict())


def test_what_is_preserved_is_all_that_an_update_changes(ops):
    """Every tensor of a checkpoint that an update changes is in the list."""
    for recipe in RECIPES:
        learner = tiny_learner(recipe, ops)
        update = Update(learner, EAGER)
        for seed in range(2):
            update(replayed(learner, seed))
        before = copy.deepcopy([learner.agent.state_dict(), learner.state_dict()])
        with preserved(learner.tensors, [learner.generator]):
            update.run(replayed(learner, 7))
        assert_equal(before, [learner.agent.state_dict(), learner.state_dict()])


def test_tensors_come_back_where_an_error_cuts_in():
    x, g = torch.ones(2), torch.Generator().manual_seed(1)

    def fail():
        with preserved(lambda: [x], [g]):
            x.add_(torch.rand(2, generator=g))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(x, torch.ones(2))
    assert torch.equal(g.get_state(), torch.Generator().manual_seed(1).get_state())


def assert_equal(ours, theirs) -> None:
    """Structures of tensors, bit for bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    elif hasattr(ours, "__dataclass_fields__"):
        assert_equal(vars(ours), vars(theirs))
    else:
        assert ours == theirs


# Capture and replay, on a stand-in for CUDA's ----------------------------------------------------


class Tape:
    """Stands in for a CUDA graph: runs the captured function again, into the same results.

    Like the original it changes nothing while it captures.
    """

    made = 0

    def __init__(self):
        Tape.made += 1
        self.generators: list[torch.Generator] = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        results = self.function()
        with torch.no_grad():
            _copy(self.results, results)


def _copy(targets, values) -> None:
    if isinstance(targets, Tensor):
        targets.copy_(values)
    elif isinstance(targets, dict):
        for key, target in targets.items():
            _copy(target, values[key])
    elif isinstance(targets, list | tuple):
        for pair in zip(targets, values, strict=True):
            _copy(*pair)
    else:
        _copy(vars(targets), vars(values))


@pytest.fixture
def tape(monkeypatch):
    """Lets `Graphed` capture on the CPU."""
    monkeypatch.setattr(Tape, "made", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    capture = Graphed._capture

    def captured(graphed, inputs):
        @contextmanager
        def capturing(graph, capture_error_mode):
            assert capture_error_mode == "thread_local"
            with preserved(graphed._state, graph.generators):
                yield
            graph.results = None

        monkeypatch.setattr(torch.cuda, "graph", capturing)
        capture(graphed, inputs)
        tape = graphed._graph
        tape.function = lambda: graphed._function(graphed._inputs)
        tape.results = copy.deepcopy(_detached(graphed._outputs))
        graphed._outputs = tape.results
        assert tape.generators == list(graphed._generators)

    monkeypatch.setattr(Graphed, "_capture", captured)


def _detached(values):
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, dict):
        return {k: _detached(v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(map(_detached, values))
    return type(values)(**_detached(vars(values)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_updates_equal_eager_ones(tape, ops, recipe):
    """With batches in memory that is used again, and another shape in between."""
    learners = [tiny_learner(recipe, ops) for _ in range(2)]
    eager, graphed = Update(learners[0], EAGER), Update(learners[1], GRAPH)
    seen = []
    for seed, rows in enumerate((3, 3, 2, 2, 3)):
        batch = replayed(learners[0], seed, rows)
        expected = eager(batch)
        got = graphed(batch)
        assert_equal(expected, got)
        for value in batch.values():
            value.zero_()
        seen.append(id(got))
        assert learners[1].updates == learners[1].count == seed + 1
    assert Tape.made == 3 and seen[0] == seen[1] and seen[2] == seen[3]  # results are static
    assert_equal(learners[0].agent.state_dict(), learners[1].agent.state_dict())
    assert_equal(learners[0].generator.get_state(), learners[1].generator.get_state())


@pytest.mark.parametrize("recipe", RECIPES)
def test_replayed_acting_equals_eager_acting(tape, ops, recipe):
    """The carry that a step returns is the graph's own memory, and the next step's input."""
    agent = tiny_learner(recipe, ops).agent
    eager, graphed = (Act(agent, torch.Generator().manual_seed(5), g) for g in (False, True))
    ours = theirs = None
    for seed in range(4):
        rows = replayed(tiny_learner(recipe, ops), seed)
        obs, first = {k: rows[k][:, 0] for k in agent.obs_space}, rows["is_first"][:, 0]
        ours, theirs = graphed(obs, first, ours), eager(obs, first, theirs)
        assert_equal(ours, theirs)
    assert Tape.made == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_by_graphs_equals_an_eager_one(tape, tmp_path, monkeypatch, recipe):
    """Over an interruption too, whose checkpoint is loaded before anything is captured."""
    options = [*CARTPOLE[recipe], "--learner.replay-ratio", "1.5", "--log.no-tensorboard"]
    for name, steps, execution in (
        ("eager", (80,), EAGER),
        ("graph", (72, 80), GRAPH),
    ):
        choose = classmethod(lambda cls, *_, chosen=execution: chosen)
        monkeypatch.setattr(Execution, "choose", choose)
        for until in steps:
            train(options, tmp_path / name, until)
    assert Tape.made == 4  # of updates and of acting, in each of the two processes
    eager, graph = (losses(tmp_path / name) for name in ("eager", "graph"))
    assert eager == graph and len(eager) > 10


# On a GPU --------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def refused_sync():
    """Every synchronisation raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_cuda(recipe: str, backend: str) -> Learner:
    learner = tiny_learner(recipe, kernels.resolve(backend, "cuda"))
    return Learner.make(learner.agent.cuda(), learner.config)


@on_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_on_a_gpu_does_not_synchronise(recipe, request):
    learner = on_cuda(recipe, "auto")
    update = Update(learner, EAGER)
    batch = {k: v.cuda() for k, v in replayed(learner).items()}
    update(batch)  # loads kernels
    request.getfixturevalue("refused_sync")
    update(batch)


@on_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_graphs_on_a_gpu_equal_eager(recipe, request):
    """With equal random numbers; sums by atomic additions may differ in their last bits."""
    learners = [on_cuda(recipe, "auto") for _ in range(2)]
    eager, graphed = Update(learners[0], EAGER), Update(learners[1], GRAPH)
    for seed, rows in enumerate((3, 3, 2, 3, 3)):
        batch = {k: v.cuda() for k, v in replayed(learners[0], seed, rows).items()}
        (theirs, _), (ours, _) = eager(batch), graphed(batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert learners[1].count == learners[1].updates == seed + 1
        assert torch.equal(learners[0].generator.get_state(), learners[1].generator.get_state())
    request.getfixturevalue("refused_sync")
    graphed(batch)


@on_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_acting_graphs_on_a_gpu_equal_eager(recipe):
    agent = on_cuda(recipe, "auto").agent
    eager, graphed = (Act(agent, torch.Generator("cuda").manual_seed(5), g) for g in (False, True))
    ours = theirs = None
    for seed in range(4):
        rows = {k: v.cuda() for k, v in replayed(tiny_learner(recipe, agent.ops), seed).items()}
        obs, first = {k: rows[k][:, 0] for k in agent.obs_space}, rows["is_first"][:, 0]
        ours, theirs = graphed(obs, first, ours), eager(obs, first, theirs)
        torch.testing.assert_close(ours.state.deter, theirs.state.deter, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.action, theirs.action, rtol=1e-4, atol=1e-5)
