"""The commands evaluate, dream and plot on a run of a few updates, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import fastdreamer
from bench import curves
from fastdreamer import dream, evaluate, plot, reference
from fastdreamer.actions import ActionSpec, Part
from fastdreamer.checkpoint import CheckpointError
from fastdreamer.cli import parse, run
from fastdreamer.config import Config
from fastdreamer.envs import EnvOptions, make_envs
from fastdreamer.errors import UsageError, UserError
from fastdreamer.evaluation import random_policy, run_episodes, standard_errors, summarise
from fastdreamer.imagination import predict
from fastdreamer.loading import from_json, load_agent, load_run
from fastdreamer.video import write_video

TASK = "envpool:Catch-v0"
EPISODE = 10  # rows of an episode of Catch


def train(logdir: Path, task: str = TASK, **options: object) -> Path:
    """A run of six updates on 16 x 16 images."""
    short = {"steps": 128, "num_envs": 4, "threads": 1, "logdir": logdir, **options}
    fastdreamer.train(
        task,
        *("--env.image-size", "16", "--learner.prefill", "64", "--learner.replay-ratio", "0.1"),
        *("--learner.batch-size", "2", "--learner.batch-length", "8", "--learner.horizon", "3"),
        *("--log.every", "2", "--log.no-progress", "--log.no-tensorboard"),
        size="debug",
        **short,
    )
    return logdir


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "catch")


@pytest.fixture
def copy(logdir: Path, tmp_path: Path) -> Path:
    """A run directory to damage."""
    return Path(shutil.copytree(logdir, tmp_path / "copy"))


class TestLoading:
    def test_weights_are_those_of_the_checkpoint(self, logdir: Path) -> None:
        saved = load_run(logdir)
        agent = load_agent(logdir)
        assert saved.step == 128 and saved.config.task == TASK
        state = agent.state_dict()
        assert all(torch.equal(state[k], v) for k, v in saved.weights.items())

    def test_a_folder_or_a_file_does_as_well(self, logdir: Path) -> None:
        path = load_run(logdir / "checkpoints").path
        assert path == load_run(path).path == load_run(logdir).path

    def test_config_of_another_version(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        config["learner"] |= {"warp": 1}
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"learner has unknown fields: warp"):
            load_run(copy)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"device": "tpu"}, "device is 'tpu', valid are auto, cpu"),
            ({"steps": "many"}, "steps is 'many', which is not of type int"),
            ({"model": 3}, "model must hold fields"),
            ([], "must hold fields"),
        ],
    )
    def test_config_values_of_another_type(self, values: object, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            from_json(Config, values, "config.json")

    def test_config_survives_json(self) -> None:
        config = Config(logdir=Path("x"))
        values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        assert from_json(Config, values, "config.json") == config

    def test_missing(self, copy: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            load_run(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            load_run(tmp_path)
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
            load_run(copy)

    def test_damaged(self, copy: Path) -> None:
        path = load_run(copy).path
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match="damaged"):
            load_run(copy)
        path.with_suffix(".json").write_text("{")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_run(copy)

    def test_weights_of_another_size(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        config["model"]["deter"] *= 2
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="has the shape"):
            load_agent(copy)


class TestEvaluate:
    def test_agent(self, logdir: Path, tmp_path: Path) -> None:
        out = {"json": tmp_path / "out.json", "video": tmp_path / "play.mp4"}
        options = evaluate.Options(logdir, episodes=5, num_envs=2, mode=True, **out)
        result = evaluate.evaluate(options)
        assert json.loads(out["json"].read_text()) == json.loads(json.dumps(result))
        assert len(result["scores"]) == 5 and set(result["scores"]) <= {-1.0, 1.0}
        assert result["mean"] == pytest.approx(np.mean(result["scores"]))
        assert "recipe 2023, size debug" in evaluate.report(result)
        frames = iio.imread(out["video"], plugin="pyav")
        assert frames.shape == (3 * EPISODE, 256, 256, 3)

    def test_the_seed_decides(self, logdir: Path) -> None:
        scores = [
            evaluate.evaluate(evaluate.Options(logdir, episodes=24, seed=seed))["scores"]
            for seed in (1, 1, 2)
        ]
        assert scores[0] == scores[1] != scores[2]

    def test_random_actions_need_no_checkpoint(self) -> None:
        result = evaluate.evaluate(evaluate.Options(random=True, task=TASK, episodes=1))
        assert result["subject"] == "random actions" and result["interval"] is None

    def test_random_actions_beside_an_agent(self, logdir: Path) -> None:
        options = evaluate.Options(logdir, episodes=24, random=True)
        alone = evaluate.evaluate(dataclasses.replace(options, random=False))
        chance = evaluate.evaluate(evaluate.Options(random=True, task=TASK, episodes=24))
        result = evaluate.evaluate(options)
        assert result["scores"] == alone["scores"] and "random" not in alone
        assert result["random"]["scores"] != result["scores"]
        assert len(result["random"]["scores"]) == 24 and -1 < result["random"]["mean"] < 1
        assert result["difference"] == result["mean"] - result["random"]["mean"]
        report = evaluate.report(result)
        difference, errors = result["difference"], result["standard_errors"]
        assert f"{difference:+.5g}, which is {errors:+.1f} standard errors" in report
        assert "random" not in chance and chance["subject"] == "random actions"

    def test_standard_errors(self) -> None:
        a, b = summarise([1.0, 2.0, 3.0, 6.0]), summarise([0.0, 2.0])
        variances = np.var(a.scores, ddof=1) / 4 + np.var(b.scores, ddof=1) / 2
        assert standard_errors(a, b) == pytest.approx(2 / np.sqrt(variances))
        assert standard_errors(a, summarise([1.0])) is None
        assert standard_errors(summarise([1.0, 1.0]), summarise([1.0, 1.0])) is None

    def test_atari_is_normalised(self) -> None:
        published = reference.published_score("atari:MsPacman", "2023")
        assert published is not None and published.dreamer == 1326.9
        assert published.normalise(published.random) == 0
        assert published.normalise(published.human) == 1
        assert reference.published_score(TASK, "2023") is None

    def test_interval_covers_the_mean(self) -> None:
        """Of 200 samples of a normal, the 95 % interval of about 190 holds the true mean."""
        rng = np.random.default_rng(0)
        intervals = [summarise(rng.normal(3, 2, 50).tolist(), 1000).interval for _ in range(200)]
        held = sum(i is not None and i[0] <= 3 <= i[1] for i in intervals)
        assert 180 <= held <= 198

    def test_every_row_is_watched(self) -> None:
        envs, seen = make_envs(TASK, 2, 0), []
        run_episodes(envs, random_policy(envs, 0), 4, lambda rows: seen.append(rows["is_last"]))
        envs.close()
        assert len(seen) == 2 * EPISODE and np.sum(seen) == 4

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "give --checkpoint DIR"),
            (["--random"], "with --task"),
            (["--random", "--task", "envpool:Cach-v0"], "Catch-v0"),
            (["--random", "--task", TASK, "--mode"], "--mode"),
            (["--random", "--task", TASK, "--episodes", "0"], "--episodes"),
            (["--random", "--task", TASK, "--video", "x.avi"], "must end in .mp4 or .gif"),
            (["--random", "--task", "gymnasium:CartPole-v1", "--video", "x.gif"], "only vectors"),
            (["--episode", "3"], "did you mean --episodes"),
        ],
    )
    def test_refuses(self, args: list[str], message: str) -> None:
        with pytest.raises(UserError, match=message):
            evaluate.evaluate(parse(evaluate.Options, args, "evaluate", evaluate.Options()))


def played(steps: int = EPISODE) -> dict[str, torch.Tensor]:
    """One episode of three environments, (3, steps, ...), by random actions."""
    envs = make_envs(TASK, 3, 0, EnvOptions(image_size=16))
    rows = dream._play(envs, random_policy(envs, 0), ActionSpec(envs.act_space), steps)
    envs.close()
    return {k: torch.from_numpy(np.stack([row[k] for row in rows], 1)) for k in rows[0]}


def prediction(logdir: Path, rows: dict[str, torch.Tensor], context: int = 4):
    return predict(
        load_agent(logdir), rows, rows["action"], rows["is_first"], rows["reward"], context
    )


class TestDream:
    @pytest.mark.parametrize("suffix", [".gif", ".mp4"])
    def test_film(self, logdir: Path, tmp_path: Path, suffix: str) -> None:
        out = tmp_path / "sub" / f"dream{suffix}"
        options = dream.Options(logdir, out, 2, context=3, horizon=5, json=tmp_path / "e.json")
        result = dream.film(options)
        assert json.loads(options.json.read_text()) == result
        assert all(len(e) == 5 for e in result["mean_squared_pixel_error"].values())
        frames = iio.imread(out, plugin="pillow" if suffix == ".gif" else "pyav")
        assert len(frames) == 8 and frames.shape[1] > 2 * 256 and frames.shape[2] > 3 * 256
        assert "imagined step" in dream.report(result)

    def test_short_episodes_shorten_the_horizon(self, logdir: Path, tmp_path: Path) -> None:
        result = dream.film(dream.Options(logdir, tmp_path / "d.gif", 1, scale=2))
        assert result["horizon"] == EPISODE - 5
        with pytest.raises(UsageError, match="episodes last only 10 steps"):
            dream.film(dream.Options(logdir, tmp_path / "d.gif", 1, context=10))

    def test_open_loop_uses_the_actions_taken_and_no_later_observation(self, logdir: Path) -> None:
        rows = played()
        plain = prediction(logdir, rows)
        changed = dict(rows, image=rows["image"].clone())
        changed["image"][:, 4:] = 255 - changed["image"][:, 4:]
        blind = prediction(logdir, changed)
        np.testing.assert_array_equal(plain.images["imagined"], blind.images["imagined"])
        for taken_at in (3, 6, 9):
            other = dict(rows, action=rows["action"].clone())
            other["action"][:, taken_at] = other["action"][:, taken_at].roll(1, -1)
            differs = prediction(logdir, other).images["imagined"] != plain.images["imagined"]
            first = np.flatnonzero(differs.any((0, 2, 3, 4)))[:1]
            assert first.tolist() == [taken_at + 1][: EPISODE - 1 - taken_at]

    def test_observed_steps_are_reconstructions(self, logdir: Path) -> None:
        rows = played()
        result = prediction(logdir, rows)
        images = result.images
        np.testing.assert_array_equal(images["imagined"][:, :4], images["reconstructed"][:, :4])
        np.testing.assert_array_equal((images["true"] * 255).round(), rows["image"].numpy())
        error = np.square(images["imagined"][:, 6] - images["true"][:, 6]).mean()
        assert result.errors()["imagined"][2] == pytest.approx(error)
        assert result.errors()["still"][0] == pytest.approx(
            np.square(images["true"][:, 3] - images["true"][:, 4]).mean()
        )

    def test_frames_show_the_step(self, logdir: Path) -> None:
        rows = played()
        result = prediction(logdir, rows)
        frames = dream.draw(result, ["LEFT", "STAY", "RIGHT"], scale=4)
        assert frames.dtype == np.uint8 and len(frames) == EPISODE
        true = rows["image"].numpy().repeat(4, 2).repeat(4, 3).repeat(3, 4)  # (3, T, 64, 64, 3)
        for t in range(EPISODE):
            for b in range(3):
                assert contains(frames[t], true[b, t])
        assert dream._captions(result, 0, 3, ["LEFT", "STAY", "RIGHT"])[1].startswith(
            ("LEFT", "STAY", "RIGHT")[int(rows["action"][0, 2].argmax())]
        )
        again = dream.dream_frames(
            load_agent(logdir), rows, rows["action"], rows["is_first"], rows["reward"], 4
        )
        assert again.shape[0] == EPISODE and again.shape[3] == 3

    def test_actions_in_words(self) -> None:
        choice, speed = Part("fire", 2, True), Part("move", 2, False)
        assert dream._name(np.array([0, 1]), [choice], ["NOOP", "FIRE"]) == "FIRE"
        assert dream._name(np.array([0, 1]), [choice], None) == "fire 1"
        assert dream._name(np.array([1, 0, 0.25, -1]), [choice, speed], ["A"]) == "fire 0 +0.2 -1.0"

    def test_refuses(self, logdir: Path, tmp_path: Path) -> None:
        rows = played(EPISODE + 2)
        with pytest.raises(ValueError, match="an episode begins"):
            prediction(logdir, rows)
        with pytest.raises(ValueError, match=r"context must lie in 1\.\.9"):
            prediction(logdir, played(), 10)
        for options, message in [
            (dream.Options(), "give --checkpoint DIR"),
            (dream.Options(logdir, Path("x.avi")), "must end in"),
            (dream.Options(logdir, horizon=0), "--horizon"),
            (dream.Options(logdir, fps=0), "--fps"),
        ]:
            with pytest.raises(UsageError, match=message):
                dream.film(options)

    def test_recipe_2025(self, tmp_path: Path) -> None:
        logdir = train(tmp_path / "run", preset="atari100k-2025", steps=96)
        saved = load_run(logdir)
        assert saved.config.recipe == "2025"
        result = prediction(logdir, played())
        assert np.isfinite(list(result.errors().values())).all()
        assert result.images["imagined"].min() >= 0  # x/255, not x/255 - 0.5

    def test_vectors_have_no_pictures(self, tmp_path: Path) -> None:
        logdir = train(tmp_path / "run", "gymnasium:CartPole-v1", steps=66)
        with pytest.raises(UsageError, match="no images"):
            dream.film(dream.Options(logdir, tmp_path / "d.gif"))


def contains(frame: np.ndarray, panel: np.ndarray) -> bool:
    """Whether a panel stands somewhere in a frame, to the byte."""
    height, width = panel.shape[:2]
    corner = (frame[: -height + 1, : -width + 1] == panel[0, 0]).all(-1)
    return any(
        np.array_equal(frame[y : y + height, x : x + width], panel) for y, x in np.argwhere(corner)
    )


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_colours_survive_in_a_file(tmp_path: Path, suffix: str) -> None:
    """Also those of a small sprite before a background of many shades."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 60, (6, 61, 61, 3), np.uint8)
    frames[:, 20:30, 20:30] = sprite = [210, 180, 40]
    write_video(tmp_path / f"x{suffix}", frames, 10, scale=3)
    shown = iio.imread(tmp_path / f"x{suffix}")
    assert shown.shape == (6, 184, 184, 3)
    np.testing.assert_allclose(shown[:, 75, 75], [sprite] * 6, atol=12)


class TestPlot:
    def test_figures(self, logdir: Path, tmp_path: Path) -> None:
        out = tmp_path / "curves.png"
        paths = plot.plot(plot.Options((logdir,), out, losses=True))
        assert paths == [out, tmp_path / "curves-losses.png"]
        for path in paths:
            assert iio.imread(path).std() > 0
        svg = tmp_path / "curves.svg"
        plot.plot(plot.Options((logdir, logdir), svg, x="steps"))
        assert "</svg>" in svg.read_text()

    def test_bins(self) -> None:
        edges = np.linspace(0, 4, 5)
        curve = (np.array([0.5, 0.6, 2.5]), np.array([1.0, 3.0, 8.0]))
        other = (np.array([3.5]), np.array([7.0]))
        nan = np.nan
        np.testing.assert_array_equal(plot.binned([curve], edges), [[2, nan, 8, nan]])
        np.testing.assert_array_equal(
            plot.binned([curve, other], edges), [[2, 5, 8, nan], [nan, nan, nan, 7]]
        )

    def test_curve_is_of_the_logged_scores(self, logdir: Path) -> None:
        log = plot.read_log(logdir)
        steps, scores = log.series("episode/score", "steps")
        logged = [line for line in log.lines if "episode/score" in line]
        assert len(scores) == len(logged) > 0 and steps.max() <= 128
        hours, _ = log.series("episode/score", "time")
        np.testing.assert_allclose(hours * 3600, [line["time"] for line in logged])

    def test_a_half_written_line_is_left_out(self, copy: Path) -> None:
        count = len(plot.read_log(copy).lines)
        with (copy / "metrics.jsonl").open("a") as file:
            file.write('{"step": 12')
        assert len(plot.read_log(copy).lines) == count

    def test_official_curves_are_in_steps(self) -> None:
        curves = reference.official_curves("ms_pacman", EnvOptions())
        assert len(curves) == 5 and all(90_000 < c.steps.max() <= 100_000 for c in curves)
        for task in ("envpool:CheetahRun-v1", "dmc:cheetah_run", "dmc_cheetah_run"):
            for repeat in (1, 2):
                curves = reference.official_curves(task, EnvOptions(dmc_repeat=repeat))
                assert [c.steps.max() for c in curves] == [490_000 / repeat] * 5
        for task in (TASK, "dmc_dog_run", "dmc_no_such"):
            assert not reference.official_curves(task, EnvOptions())

    def test_spellings_of_a_task(self) -> None:
        assert reference.same_task("dmc_reacher_easy", "envpool:ReacherEasy-v1")
        assert reference.same_task("ms_pacman", "atari:MsPacman") and reference.same_task("a", "a")
        assert not reference.same_task("dmc_reacher_easy", "dmc_reacher_hard")
        assert not reference.same_task("gymnasium:CartPole-v1", "envpool:CartPole-v1")

    def test_refuses(self, logdir: Path, copy: Path, tmp_path: Path) -> None:
        for options, message in [
            (plot.Options(), "one or more run directories"),
            (plot.Options((tmp_path,)), r"no metrics\.jsonl"),
            (plot.Options((logdir,), Path("x.jpg")), r"\.png or \.svg"),
            (plot.Options((logdir,), bins=0), "--bins"),
        ]:
            with pytest.raises(UsageError, match=message):
                plot.plot(options)
        (copy / "metrics.jsonl").write_text("{\n")
        with pytest.raises(UsageError, match="damaged"):
            plot.read_log(copy)


class TestCurves:
    @pytest.fixture
    def runs(self, logdir: Path, tmp_path: Path) -> tuple[Path, ...]:
        """Two seeds of a task with official curves, whose scores are 100 and 300."""
        for seed in (1, 3):
            run = Path(shutil.copytree(logdir, tmp_path / f"run{seed}"))
            config = json.loads((run / "config.json").read_text())
            (run / "config.json").write_text(json.dumps(config | {"task": "dmc_reacher_easy"}))
            lines = [
                {"step": 8_000 * i, "time": i, "episode/score": 100 * seed} for i in (1, 5, 10)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / "run1", tmp_path / "run3"

    def test_numbers_and_figure(self, runs: tuple[Path, ...], tmp_path: Path) -> None:
        options = curves.Options(runs, "dmc:reacher_easy", tmp_path / "over.png", bins=8)
        result = curves.compare(options)
        assert iio.imread(options.out).std() > 0
        assert json.loads((tmp_path / "over.json").read_text()) == result
        assert result["runs"] == 2 and result["official"] == {"recipe": "2023", "runs": 5}
        official = reference.official_curves("dmc_reacher_easy", EnvOptions())
        images = reference.official_curves("dmc_reacher_easy", EnvOptions(dmc_images=True))
        assert (official[0].recipe, images[0].recipe) == ("2023", "2025")
        assert [point["step"] for point in result["points"]] == list(range(10_000, 80_001, 10_000))
        for i, point in enumerate(result["points"]):
            assert point["frames"] == 2 * point["step"]
            assert point["ours"] == [200, 100, 300]  # interpolated where no episode ended
            end = 10_000 * (i + 1) + (i == 7)  # the last part has both its ends
            inside = [(c.steps >= 10_000 * i) & (c.steps < end) for c in official]
            means = [c.scores[x].mean() for c, x in zip(official, inside, strict=True)]
            expected = [np.mean(means), min(means), max(means)]
            np.testing.assert_allclose(point["official"], expected, atol=1e-4)

    def test_refuses(self, runs: tuple[Path, ...], logdir: Path, tmp_path: Path) -> None:
        out, one = tmp_path / "x.png", runs[:1]
        (tmp_path / "run3/metrics.jsonl").write_text("")
        for options, message in [
            (curves.Options(), "one or more run directories"),
            (curves.Options(one, out=tmp_path / "x.gif"), r"\.png or \.svg"),
            (curves.Options(one, bins=0), "--bins must be at least 1"),
            (
                curves.Options(one, "dmc_reacher_hard", out),
                "run of dmc_reacher_easy, not of dmc_re",
            ),
            (curves.Options((logdir,), out=out), "no official curve of envpool:Catch-v0"),
            (curves.Options(runs[1:], out=out), "no episode has ended"),
        ]:
            with pytest.raises(UsageError, match=message):
                curves.compare(options)


@pytest.mark.parametrize("command", [evaluate, dream, plot, curves])
def test_user_errors_are_one_line(
    command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["command", "--chekpoint", "3"])
    with pytest.raises(SystemExit) as stop:
        run(command.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: unknown option --chekpoint")
    assert error.count("\n") == 1
