"""Recipe 2023 against sheeprl's numbers; collected by test_golden.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from golden_2023 import Golden2023
from golden_common import TOLERANCES, Arrays, Tolerance, close, leaf
from gymnasium.spaces import Box, Discrete

from fastdreamer.agent import ActNoise, Agent
from fastdreamer.kernels import twohot
from fastdreamer.losses import ReturnScale, kl_losses, reconstruction_loss
from fastdreamer.nets import Decoder, Encoder
from fastdreamer.rssm import State


class Case2023:
    """Fixtures by the names that the tests use."""

    @pytest.fixture
    def golden(self, golden_2023) -> Golden2023:
        return golden_2023

    @pytest.fixture
    def tol(self, golden) -> Tolerance:
        return TOLERANCES[golden.dtype]


class TestFunctions2023(Case2023):
    """One function at a time."""

    @pytest.mark.parametrize("name", ["symlog", "symexp"])
    def test_squashing(self, golden, tol, name):
        f = golden.functions
        x = leaf(f[f"{name}/x"])
        y = getattr(twohot, name)(x)
        close(y, f[f"{name}/y"], tol.forward, name)
        (dx,) = torch.autograd.grad(y.sum(), x)
        # At exactly 0 the derivative is 1; autograd of sign(x) * log(1 + |x|) says 0 there.
        nonzero = x != 0
        close(dx[nonzero], f[f"{name}/dy_dx"][nonzero], tol.grad, f"{name} gradient")

    def test_twohot(self, golden, tol):
        f, ops = golden.functions, golden.ops
        logits, targets = leaf(f["twohot/logits"]), f["twohot/targets"][..., 0]
        close(
            twohot.bins("symlog", logits.shape[-1], logits.dtype, logits.device),
            f["twohot/bins"],
            tol.forward,
            "bins",
        )
        loss = ops.twohot_loss(logits, targets)
        close(-loss, f["twohot/log_prob"], tol.loss, "log-probability")
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        close(-grad, f["twohot/grad_logprob_wrt_logits"], tol.grad, "gradient")
        mean = ops.twohot_mean(logits)
        close(mean, f["twohot/mean"][..., 0], tol.forward, "mean")
        (grad,) = torch.autograd.grad(mean.sum(), logits)
        close(grad, f["twohot/grad_mean_wrt_logits"], tol.grad, "gradient of the mean")
        assert ops.twohot_mean(torch.zeros_like(logits)).eq(0).all()

    def test_unimix(self, golden, tol):
        f, ops, config = golden.functions, golden.ops, golden.config
        raw = leaf(f["unimix/rssm_raw"])
        latent = (config["stochastic_size"], config["discrete_size"])
        logp = ops.unimix(raw.unflatten(-1, latent), config["unimix"]).flatten(-2)
        close(logp, f["unimix/rssm_out"], tol.forward, "latents")
        (grad,) = torch.autograd.grad(logp, raw, f["unimix/rssm_cotangent"])
        close(grad, f["unimix/rssm_grad"], tol.grad, "gradient")
        actor = ops.unimix(f["unimix/actor_raw"], config["unimix"])
        close(actor, f["unimix/actor_out"], tol.forward, "actor")

    def test_straight_through(self, golden, tol):
        f, ops, config = golden.functions, golden.ops, golden.config
        logits = leaf(f["straight_through/logits"])
        latent = (config["stochastic_size"], config["discrete_size"])
        logp = ops.unimix(logits.unflatten(-1, latent), 0.0)
        sample = ops.sample(logp, torch.zeros_like(logp))
        assert torch.equal(sample, f["straight_through/sample"])
        (grad,) = torch.autograd.grad(sample, logits, f["straight_through/cotangent"])
        close(grad, f["straight_through/grad_logits"], tol.grad, "gradient")

    def test_gru(self, golden, tol):
        f, cell = golden.functions, golden.agent().world_model.rssm.cell
        x, h = leaf(f["gru/x"]), leaf(f["gru/h"])
        weights = (cell.gates.weight, cell.norm.weight, cell.norm.bias)
        out = golden.ops.gru_step(h, x, *weights, cell.norm.eps)
        close(out, f["gru/h_next"], tol.forward, "next state")
        grads = torch.autograd.grad(out, [x, h, *weights], f["gru/cotangent"])
        names = ["grad_x", "grad_h", "grad/linear.weight"]
        names += ["grad/layer_norm.weight", "grad/layer_norm.bias"]
        for name, grad in zip(names, grads, strict=True):
            close(grad, f[f"gru/{name}"], tol.grad, name)

    def test_rssm(self, golden, tol):
        f, rssm = golden.functions, golden.agent().world_model.rssm
        stoch, action, deter, embed = (
            f[f"rssm/{k}"][0] for k in ("stoch", "action", "deter", "embed")
        )
        close(
            rssm.cell.input(torch.cat([stoch, action], -1)),
            f["rssm/recurrent_mlp_out"][0],
            tol.forward,
            "input block",
        )
        new = rssm.cell(stoch, action, deter)
        close(new, f["rssm/deter_next"][0], tol.forward, "deter")
        prior = rssm.prior(new)
        close(prior.flatten(-2), f["rssm/prior_logits"][0], tol.forward, "prior")
        state = State(deter, stoch.unflatten(-1, rssm.latent))
        scan = rssm.start_scan(embed)
        first = torch.zeros(len(deter), dtype=torch.bool)
        posterior, logp = rssm.observe_step(
            state, action, scan, scan.embedded, first, torch.zeros_like(prior)
        )
        close(logp.flatten(-2), f["rssm/post_logits"][0], tol.forward, "posterior")
        assert torch.equal(posterior.stoch, f["rssm/post_mode"][0])
        imagined = rssm.imagine_step(state, action, torch.zeros_like(prior))
        assert torch.equal(imagined.stoch, f["rssm/prior_mode"][0])
        initial = rssm.initial()
        close(initial.deter, f["rssm/initial_deter"][0, 0], tol.forward, "initial deter")
        assert torch.equal(initial.stoch, f["rssm/initial_stoch"][0, 0])

    def test_encoder(self, golden, tol):
        f, encoder = golden.functions, golden.agent().world_model.encoder
        key = encoder.images[0]
        image = golden.observation(f["encoder/rgb_uint8"])
        close(encoder({key: image}), f["encoder/embed"], tol.forward, "embedding")
        x = image[0].to(golden.dtype) / 255 - 0.5
        for i, stage in enumerate(encoder.cnn):
            x = stage(x)
            close(x.movedim(-1, -3), f[f"encoder/stage{i}"], tol.forward, f"stage {i}")

    def test_decoder(self, golden, tol):
        f, decoder = golden.functions, golden.agent().world_model.decoder
        feat = f["heads/latent"][0]
        stoch, deter = feat.split([feat.shape[-1] - golden.model().deter, golden.model().deter], -1)
        close(
            decoder.stem(deter, stoch).reshape(f["decoder/linear_unflattened"].shape),
            f["decoder/linear_unflattened"],
            tol.forward,
            "linear",
        )
        recon = f["decoder/recon"].movedim(-3, -1).flatten(0, 1)
        got = decoder(deter, stoch)[decoder.images[0]][: len(recon)]
        close(got, recon, tol.forward, "reconstruction")

    def test_heads(self, golden, tol):
        f, agent, ops = golden.functions, golden.agent(), golden.ops
        feat, model = f["heads/latent"], agent.world_model
        reward, value, cont = model.reward(feat), agent.critic(feat), model.cont(feat)
        close(reward, f["heads/reward_logits"], tol.forward, "reward logits")
        close(ops.twohot_mean(reward), f["heads/reward_mean"][..., 0], tol.forward, "reward")
        close(value, f["heads/value_logits"], tol.forward, "value logits")
        close(ops.twohot_mean(value), f["heads/value_mean"][..., 0], tol.forward, "value")
        close(cont, f["heads/continue_logit"], tol.forward, "continue logit")
        assert torch.equal((cont > 0).to(golden.dtype), f["heads/continue_mode"])
        log_prob = -torch.nn.functional.binary_cross_entropy_with_logits(
            cont, f["heads/continue_target"], reduction="none"
        )
        close(log_prob[..., 0], f["heads/continue_log_prob"], tol.forward, "continue")
        dist = agent.actor(feat)
        raw = agent.actor.heads["action"]["logits"](agent.actor.mlp(feat))
        close(raw, f["heads/actor_raw_logits"], tol.forward, "actor logits")
        close(dist.parts["action"].logp, f["heads/actor_unimix_logits"], tol.forward, "policy")
        close(dist.entropy(), f["heads/actor_entropy"], tol.forward, "policy entropy")
        assert torch.equal(dist.sample(torch.zeros_like(raw)), f["heads/actor_mode"])
        action = f["heads/actor_action"]
        close(dist.log_prob(action), f["heads/actor_log_prob"], tol.forward, "log-probability")

    def test_vector_encoder(self, golden, tol):
        f = golden.functions
        obs = {k: f[f"vec_encoder/{k}"] for k in ("vec", "pos")}
        # Theirs concatenates in the order given (vec, pos), ours by name: permute the columns.
        space = {k: Box(-np.inf, np.inf, v.shape[-1:]) for k, v in obs.items()}
        encoder = Encoder(space, golden.model(), golden.recipe, golden.ops).to(golden.dtype)
        self._load_mlp(encoder.mlp, f, "vec_encoder/param/model._model")
        first = encoder.mlp.hidden[0].linear.weight
        parts = dict(
            zip(obs, first.data.split([v.shape[-1] for v in obs.values()], 1), strict=True)
        )
        first.data = torch.cat([parts[k] for k in encoder.vectors], 1)
        close(encoder(obs), f["vec_encoder/embed"], tol.forward, "embedding")

    def test_vector_decoder(self, golden, tol):
        f, model = golden.functions, golden.model()
        keys = ("vec", "pos")
        space = {k: Box(-np.inf, np.inf, f[f"vec_decoder/{k}"].shape[-1:]) for k in keys}
        feat = f["heads/latent"]
        stoch, deter = feat.split([feat.shape[-1] - model.deter, model.deter], -1)
        sizes = (model.deter, stoch.shape[-1])
        decoder = Decoder(*sizes, space, model, golden.recipe, golden.ops).to(golden.dtype)
        self._load_mlp(decoder.mlp, f, "vec_decoder/param/model._model")
        for i, key in enumerate(keys):
            for kind in ("weight", "bias"):
                param = f[f"vec_decoder/param/heads.{i}.{kind}"]
                getattr(decoder.heads[key], kind).data.copy_(param)
        for key, pred in decoder(deter, stoch).items():
            close(pred, f[f"vec_decoder/{key}"], tol.forward, key)

    @staticmethod
    def _load_mlp(mlp, arrays, prefix: str) -> None:
        for i, block in enumerate(mlp.hidden):
            block.linear.weight.data.copy_(arrays[f"{prefix}.{3 * i}.weight"])
            block.norm.weight.data.copy_(arrays[f"{prefix}.{3 * i + 1}.weight"])
            block.norm.bias.data.copy_(arrays[f"{prefix}.{3 * i + 1}.bias"])

    def test_reconstruction_losses(self, golden, tol):
        f = golden.functions
        pred, value = leaf(f["symlog_dist/mode_param"]), f["symlog_dist/value"]
        loss = reconstruction_loss(pred, value, golden.recipe)
        close(-loss, f["symlog_dist/log_prob"], tol.loss, "vector")
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        close(-grad, f["symlog_dist/grad"], tol.grad, "vector gradient")
        close(twohot.symexp(pred), f["symlog_dist/pred"], tol.forward, "vector prediction")

    def test_lambda_return(self, golden, tol):
        f = golden.functions
        reward, value, discount = (
            f[f"lambda/{k}"][..., 0].T for k in ("rewards", "values", "continues_times_gamma")
        )
        for lam in (0.95, 0.5):
            got = golden.ops.lambda_return(
                reward, discount, value, torch.tensor(lam, dtype=golden.dtype)
            )
            close(got, f[f"lambda/returns_{lam}"][..., 0].T, tol.forward, f"lambda {lam}")

    @pytest.mark.parametrize(("name", "decay"), [("decay099", 0.99), ("decay05", 0.5)])
    def test_return_scale(self, golden, name, decay):
        # The original keeps these in float32 in its float64 run, too.
        f, config = golden.functions, golden.config["moments"]
        scale = ReturnScale(decay, config["max"], (config["low"], config["high"]))
        for i in range(len(f.keys("moments/x"))):
            close(scale(f[f"moments/x{i}"]), f[f"moments/{name}/invscale{i}"], 1e-5, f"scale {i}")
            close(scale.low, f[f"moments/{name}/low{i}"], 1e-5, f"low {i}")
            close(scale.high, f[f"moments/{name}/high{i}"], 1e-5, f"high {i}")

    @pytest.mark.parametrize("variant", ["default", "free0", "scaled"])
    def test_world_model_losses(self, golden, tol, variant):
        f, ops, p = golden.functions, golden.ops, "wm_loss/"
        config = golden.learner_config()
        if variant == "free0":
            config = dataclasses.replace(config, free_nats=0.0)
        if variant == "scaled":
            scales = dict(kl_dynamics=0.7, kl_representation=0.7 * 0.2, free_nats=0.25)
            config = dataclasses.replace(config, cont_scale=3.0, **scales)
        names = ["reward_logits", "posterior_logits", "prior_logits", "continue_logits"]
        names += [k for k in ("recon_rgb", "recon_vec") if f"{p}{variant}/grad_{k}" in f]
        leaves = {k: leaf(f[p + k]) for k in names}
        recon = 0
        if "recon_rgb" in leaves:  # the set's image targets are floats
            error = leaves["recon_rgb"] - f[p + "obs_rgb"]
            recon = recon + error.square().flatten(2).sum(-1)
        if "recon_vec" in leaves:
            recon = recon + reconstruction_loss(
                leaves["recon_vec"], f[p + "obs_vec"], golden.recipe
            )
        reward = ops.twohot_loss(leaves["reward_logits"], f[p + "rewards"][..., 0])
        cont = config.cont_scale * torch.nn.functional.binary_cross_entropy_with_logits(
            leaves["continue_logits"], f[p + "continue_targets"], reduction="none"
        )
        dyn, rep, kl = kl_losses(
            leaves["posterior_logits"].log_softmax(-1),
            leaves["prior_logits"].log_softmax(-1),
            config.free_nats,
            ops,
        )
        state = config.kl_dynamics * dyn + config.kl_representation * rep
        total = (recon + reward + cont[..., 0] + state).mean()
        close(kl, f[p + "kl_tb"], tol.loss, "kl")
        close(recon.mean(), f[f"{p}{variant}/observation_loss"], tol.loss, "observation")
        close(reward.mean(), f[f"{p}{variant}/reward_loss"], tol.loss, "reward")
        close(cont.mean(), f[f"{p}{variant}/continue_loss"], tol.loss, "continue")
        close(total, f[f"{p}{variant}/total"], tol.loss, "total")
        for name, grad in zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True):
            close(grad, f[f"{p}{variant}/grad_{name}"], tol.grad, name)

    def test_acting(self, golden, tol):
        f, agent = golden.functions, golden.agent()
        frames = golden.observation(golden.inputs["player/rgb"])
        rows, rssm = frames.shape[1], agent.world_model.rssm
        shapes = ((rows, *rssm.latent), (rows, agent.spec.size))
        noise = ActNoise(*(torch.zeros(shape, dtype=agent.dtype) for shape in shapes))
        carry = agent.initial_carry(rows)
        for t, frame in enumerate(frames):
            first = torch.tensor([t == 0, t in (0, 3)])
            carry = agent.act({"rgb": frame}, first, carry, noise)
            close(carry.action, f[f"player/action{t}"][0], tol.forward, f"action {t}")
            deter, stoch = f[f"player/recurrent_state{t}"], f[f"player/stochastic_state{t}"]
            close(carry.state.deter, deter[0], tol.forward, f"deter {t}")
            close(carry.state.stoch.flatten(-2), stoch[0], tol.forward, f"stoch {t}")


class TestTrainStep2023(Case2023):
    """Whole updates: losses, gradients, imagination, parameters after one and three."""

    def test_world_model(self, golden, tol):
        t, learner = golden.train, golden.learner()
        observed = learner.observe_batch(golden.batch(0), golden.no_noise().post)
        states, metrics = observed.states, observed.metrics
        close(states.deter, t["step1/wm/recurrent_states"].transpose(0, 1), tol.forward, "deter")
        close(states.stoch, t["step1/wm/posteriors"].transpose(0, 1), tol.forward, "stoch")
        loss = learner.world_model_loss(observed)
        close(loss, t["step1/loss/Loss/world_model_loss"], tol.loss, "total")
        c = learner.config
        state = c.kl_dynamics * metrics["loss/dyn"] + c.kl_representation * metrics["loss/rep"]
        close(state, t["step1/loss/Loss/state_loss"], tol.loss, "state loss")
        names = {
            "loss/rgb": "Loss/observation_loss",
            "loss/reward": "Loss/reward_loss",
            "loss/cont": "Loss/continue_loss",
            "kl": "State/kl",
            "entropy/posterior": "State/post_entropy",
            "entropy/prior": "State/prior_entropy",
        }
        for ours, theirs in names.items():
            close(metrics[ours], t[f"step1/loss/{theirs}"], tol.loss, ours)
        norm = learner.step(["world_model"], loss)["grad_norm/world_model"]
        close(norm, t["step1/grad_norm/world_model"], tol.grad, "gradient norm")

    def test_world_model_predictions(self, golden, tol):
        t, learner = golden.train, golden.learner()
        model, batch = learner.agent.world_model, golden.batch(0)
        first = batch["is_first"].clone()
        first[:, 0] = True
        assert torch.equal(first, t["step1/wm/is_first_used"][..., 0].T.bool())
        embed = model.encoder(batch)
        close(embed, t["step1/wm/embedded_obs"].transpose(0, 1), tol.forward, "embedding")
        previous = torch.nn.functional.pad(batch["action"][:, :-1], (0, 0, 1, 0))
        noise = golden.no_noise().post
        states, post = model.rssm.observe(None, embed, previous, first, noise)
        prior = model.rssm.prior(states.deter)
        feat = model.rssm.features(states)
        for ours, theirs in (
            (post, "posterior_logits"),
            (prior, "prior_logits"),
            (model.decode(states)["rgb"].movedim(-1, -3), "recon_rgb"),
            (model.reward(feat), "reward_logits"),
            (golden.ops.twohot_mean(model.reward(feat))[..., None], "reward_pred"),
            (model.cont(feat), "continue_logits"),
        ):
            close(ours, t[f"step1/wm/{theirs}"].transpose(0, 1), tol.forward, theirs)

    def test_gradients(self, golden, tol):
        """Of every parameter, before clipping."""
        learner = golden.learner()
        agent, names = learner.agent, golden.names(learner.agent)
        batch, noise = golden.batch(0), golden.no_noise()
        observed = learner.observe_batch(batch, noise.post)
        loss = learner.world_model_loss(observed)
        params = golden.trained(agent)
        model = {k: p for k, p in params.items() if k.startswith("world_model.")}
        grads = dict(
            zip(model, torch.autograd.grad(loss, model.values(), retain_graph=True), strict=True)
        )
        learner.step(["world_model"], loss)
        start = observed.states.flatten()
        imagined = learner.imagine(start, 1 - batch["is_terminal"].flatten().float(), noise.imagine)
        policy_loss, value_loss, _ = learner.behaviour_losses(imagined)
        rest = {k: p for k, p in params.items() if k not in model}
        grads |= zip(
            rest, torch.autograd.grad(policy_loss + value_loss, rest.values()), strict=True
        )
        assert set(grads) == set(params)
        for name, grad in grads.items():
            close(grad, golden.train[f"step1/grad/{names[name]}"], tol.grad, name)

    def test_imagination(self, golden, tol):
        t, learner = golden.train, golden.learner()
        agent, batch, noise = learner.agent, golden.batch(0), golden.no_noise()
        observed = learner.observe_batch(batch, noise.post)
        learner.step(["world_model"], learner.world_model_loss(observed))
        start = observed.states.flatten()
        imagined = learner.imagine(start, 1 - batch["is_terminal"].flatten().float(), noise.imagine)
        feat, horizon = imagined.feat, golden.horizon
        dist = agent.actor(feat)
        close(feat, golden.rows(t["step1/imag/trajectories"]), tol.forward, "trajectories")
        assert torch.equal(imagined.actions, golden.rows(t["step1/imag/actions"]))
        for ours, theirs in (
            (imagined.values, "imag/values"),
            (imagined.rewards, "imag/rewards"),
            (imagined.conts, "imag/continues"),
            (imagined.weight, "imag/discount"),
            (imagined.returns, "imag/lambda_values"),
            (imagined.advantage, "actor/advantage"),
            (imagined.target_values, "critic/target_values"),
        ):
            # Values are means over bins up to e^20 of probabilities rounded to 1e-7.
            close(ours, golden.rows(t[f"step1/{theirs}"])[..., 0], tol.forward, theirs)
        log_prob = golden.rows(t["step1/actor/log_prob"])
        close(dist.log_prob(imagined.actions), log_prob, tol.forward, "log-probability")
        close(dist.entropy(), golden.rows(t["step1/actor/entropy"]), tol.forward, "entropy")
        logits = agent.critic(feat[:, :-1])
        for target, theirs in (
            (imagined.returns, "loss_lambda_ht"),
            (imagined.target_values, "loss_target_ht"),
        ):
            got = golden.ops.twohot_loss(logits, target)
            close(got, golden.rows(t[f"step1/critic/{theirs}"]), tol.loss, theirs)
        assert imagined.returns.shape[1] == horizon

    def test_three_updates(self, golden, tol):
        t, learner = golden.train, golden.learner()
        names = golden.names(learner.agent)
        for step in (1, 2, 3):
            metrics, _ = learner.update(golden.batch(step - 1), golden.no_noise())
            for ours, theirs in (
                ("loss/world_model", "Loss/world_model_loss"),
                ("loss/policy", "Loss/policy_loss"),
                ("loss/value", "Loss/value_loss"),
                ("grad_norm/world_model", "Grads/world_model"),
                ("grad_norm/actor", "Grads/actor"),
                ("grad_norm/critic", "Grads/critic"),
            ):
                rel = tol.grad if "grad" in ours else tol.loss
                close(metrics[ours], t[f"step{step}/loss/{theirs}"], rel, f"{ours} {step}")
            for name in ("low", "high"):
                close(metrics[f"return/{name}"], t[f"step{step}/moments/{name}"], 1e-5, name)
            if step != 2:
                for name, parameter in golden.trained(learner.agent).items():
                    expected = t[f"after_step{step}/{names[name]}"]
                    error = (parameter.detach() - expected).abs().max().item()
                    assert error <= tol.param, f"{name} after {step}: off by {error:.1e}"
        for name, parameter in learner.agent.target_critic.named_parameters():
            theirs = names[f"target_critic.{name}"].removeprefix("target_critic/")
            expected = t[f"after_step3/target_critic_next/{theirs}"]
            assert (parameter - expected).abs().max() <= tol.param

    def test_return_scale_and_target_apart(self, folder_2023, ops):
        """The variant whose return range is above 1 and whose target critic differs."""
        path = folder_2023 / "variant_moments_target.npz"
        if not path.exists():
            pytest.skip("the set has no such variant")
        golden = Golden2023(folder_2023, torch.float32, ops)
        tol, learner = TOLERANCES[torch.float32], golden.learner()
        arrays = Arrays(path, torch.float32)
        agent, names = learner.agent, golden.names(learner.agent)
        for name, parameter in agent.target_critic.named_parameters():
            theirs = names[f"target_critic.{name}"].replace("target_critic", "target_critic_used")
            parameter.data.copy_(arrays[f"step1/{theirs}"])
        learner.scale.low.fill_(-0.25)
        learner.scale.high.fill_(3.75)
        batch, noise = golden.batch(0), golden.no_noise()
        observed = learner.observe_batch(batch, noise.post)
        learner.step(["world_model"], learner.world_model_loss(observed))
        start = observed.states.flatten()
        imagined = learner.imagine(start, 1 - batch["is_terminal"].flatten().float(), noise.imagine)
        policy_loss, value_loss, metrics = learner.behaviour_losses(imagined)
        close(policy_loss, arrays["step1/loss/Loss/policy_loss"], tol.loss, "policy loss")
        close(value_loss, arrays["step1/loss/Loss/value_loss"], tol.loss, "value loss")
        close(metrics["return/low"], arrays["step1/moments/low"], tol.forward, "low")
        close(metrics["return/high"], arrays["step1/moments/high"], tol.forward, "high")
        for ours, theirs in (
            (imagined.advantage, "actor/advantage"),
            (imagined.target_values, "critic/target_values"),
        ):
            close(ours, golden.rows(arrays[f"step1/{theirs}"])[..., 0], tol.forward, theirs)
        for module, value in (("actor", policy_loss), ("critic", value_loss)):
            params = dict(getattr(agent, module).named_parameters())
            grads = torch.autograd.grad(value, params.values(), retain_graph=True)
            learner.step([module], value)
            for (name, parameter), ours in zip(params.items(), grads, strict=True):
                theirs = names[f"{module}.{name}"]
                grad, after = arrays[f"step1/grad/{theirs}"], arrays[f"after_step1/{theirs}"]
                close(ours, grad, tol.grad, theirs)
                assert (parameter - after).abs().max() <= tol.param, theirs


def test_initialisation_2023(folder_2023, ops):
    """Zero, one and uniform tensors exactly in kind, normal ones in standard deviation."""
    golden = Golden2023(folder_2023, torch.float32, ops)
    pristine = np.load(folder_2023 / "params_pristine_init.npz")
    torch.manual_seed(0)
    space = Discrete(golden.config["actions"])
    agent = Agent(golden.obs_space, space, golden.model(), golden.recipe, ops)
    names = golden.names(agent)
    for name, parameter in golden.trained(agent).items():
        ours, theirs = parameter.detach().cpu().numpy(), pristine[names[name]]
        if theirs.std() == 0:
            assert (ours == theirs).all(), name
        elif ours.size >= 64:
            ratio = ours.std() / theirs.std()
            assert abs(ratio - 1) < 4 / np.sqrt(ours.size), (name, ratio)
            # A uniform ends at sqrt(3) standard deviations, the truncated normal near 2.27.
            bound = np.abs(theirs).max() / theirs.std() < 1.8
            assert (np.abs(ours).max() / ours.std() < 1.8) == bound or ours.size < 256, name
