"""DiffusionOPD: the distance of transitions, its gradient, its policy-gradient form, teachers that nothing moves."""

import math

import pytest
import torch

from agents.flow.diffusion_opd import DiffusionOPD
from ccrl.collect import Request
from ccrl.data import Data
from ccrl.diffusion import gaussian_log_prob, make_schedule, mean_step
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import surrogate
from ccrl.settings import ConfigError

SMALL = {"n_prompts": 2, "group_size": 4, "steps": 4, "hidden": (8, 8), "compile": "off", "teacher_steps": 3}
TASK = {"env_kwargs": {"conditions": 2}}


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def one_step(schedule, x, v_student, v_teacher, action=None):
    """``[1, 1]``: outputs of the student and the columns of the step."""
    student, teacher = (mean_step(x, v, schedule.x, schedule.v).unsqueeze(0) for v in (v_student, v_teacher))
    column = {"std": schedule.std, "sigma": schedule.sigma, "valid": torch.ones(1).double()}
    columns = {name: value.unsqueeze(0) for name, value in column.items()}
    columns |= {"teacher_mean": teacher.detach(), "action": student.detach() if action is None else action}
    columns["log_prob"] = gaussian_log_prob(columns["action"], student.detach(), columns["std"], "sum")
    batch = Data(columns).with_scalars(n_valid=double(1.0), n_sequences=double(1.0))
    outputs = {"mean": student, "log_prob": gaussian_log_prob(columns["action"], student, columns["std"], "sum")}
    return outputs, batch


def loss_of(outputs, batch, **settings):
    config = DiffusionOPD.Settings(**settings)
    terms = DiffusionOPD.Recipe(config, Parts(None, None, Request(counts=torch.ones(1)), 1)).terms()
    return surrogate(terms, outputs, batch)[0]


X, STUDENT, TEACHER = double([[0.5, -1.0]]), double([[1.0, 0.2]]), double([[0.6, -0.1]])


class TestByHand:
    def test_one_step(self):
        """Means [.344875, -.963650] and [.394675, -.926300]: (.0498^2 + .03735^2) / (2 * .0735) = .0263609694. Released
        code averages and divides by sigma^2 = .735: .0013180485. Without noise dt^2 / 2 (.16 + .09) = .00125."""
        outputs, batch = one_step(make_schedule([0.6, 0.5], "flow_sde", 0.7), X, STUDENT, TEACHER)
        assert float(loss_of(outputs, batch)) == pytest.approx(0.0263609694, abs=1e-10)
        released = loss_of(outputs, batch, kl_divisor="sigma", reduce="mean")
        assert float(released) == pytest.approx(0.0013180485, abs=1e-10)
        outputs, batch = one_step(make_schedule([0.6, 0.5], "ode"), X, STUDENT, TEACHER)
        assert float(loss_of(outputs, batch)) == pytest.approx(0.00125, abs=1e-12)

    def test_it_is_the_kl(self):
        """A million samples of the student's transition, within three standard errors."""
        schedule = make_schedule([0.6, 0.5], "flow_sde", 0.7)
        outputs, batch = one_step(schedule, X, STUDENT, TEACHER)
        mean, other, std = outputs["mean"], batch["teacher_mean"], batch["std"]
        noise = torch.randn(1_000_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        sample = mean[0] + std[0] * noise
        off = gaussian_log_prob(sample, mean[0], std[0], "sum") - gaussian_log_prob(sample, other[0], std[0], "sum")
        assert abs(float(off.mean()) - 0.0263609694) < 3.0 * float(off.std()) / 1000.0

    def test_little_noise_points_where_the_ode_does(self):
        """KL 2 sbar^2 -> dt^2 ||dv||^2 = .01 * .25 as a -> 0."""
        for a, accuracy in ((0.1, 0.02), (1e-3, 1e-5)):
            schedule = make_schedule([0.6, 0.5], "flow_sde", a)
            outputs, batch = one_step(schedule, X, STUDENT, TEACHER)
            found = float(loss_of(outputs, batch)) * 2.0 * float(schedule.std) ** 2
            assert found == pytest.approx(0.0025, rel=accuracy)

    def test_gradient_of_a_linear_student(self):
        """v = W x: dL / dW = c^2 dt^2 / sbar^2 (v_S - v_T) x' by the product rule."""
        schedule = make_schedule([0.6, 0.5], "flow_sde", 0.7)
        weight = double([[0.3, -0.2], [0.1, 0.4]]).requires_grad_()
        student = X @ weight.T
        outputs, batch = one_step(schedule, X, student, TEACHER)
        loss_of(outputs, batch).backward()
        factor = float(schedule.v) ** 2 / float(schedule.std) ** 2
        expected = factor * (student.detach() - TEACHER).T @ X
        torch.testing.assert_close(weight.grad, expected, rtol=1e-8, atol=1e-12)

    def test_the_policy_gradient_form_adds_nothing_but_variance(self):
        """One dimension, means .3 apart, sbar .2: KL 1.125, gradient 7.5, and KL times the score of the drawn step, of
        mean 0 and variance (KL / sbar)^2 = 31.640625."""
        noise = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        mean = torch.full((200_000, 1), 0.3, dtype=torch.float64).requires_grad_()
        std = torch.full((200_000,), 0.2, dtype=torch.float64)
        action = (mean.detach().squeeze(1) + std * noise).unsqueeze(1)
        rows = {"action": action, "teacher_mean": torch.zeros_like(action), "std": std, "sigma": std,
                "valid": torch.ones_like(std)}  # fmt: skip
        rows["log_prob"] = gaussian_log_prob(action, mean.detach(), std, "sum")
        batch = Data({k: v.unsqueeze(0) for k, v in rows.items()}).with_scalars(n_sequences=double(1.0))
        outputs = {"mean": mean.unsqueeze(0), "log_prob": gaussian_log_prob(action, mean, std, "sum").unsqueeze(0)}
        wide = {"clip_low": 1.0, "clip_high": math.inf}
        (closed,) = torch.autograd.grad(loss_of(outputs, batch), mean, retain_graph=True)
        torch.testing.assert_close(closed, torch.full_like(closed, 7.5))
        (slope,) = torch.autograd.grad(loss_of(outputs, batch, form="policy_gradient", **wide), mean)
        assert float(slope.mean()) == pytest.approx(7.5, abs=0.05)
        assert float(slope.var()) == pytest.approx(31.640625, rel=0.02)


class TestTraining:
    def trained(self, iterations=1, **settings):
        agent = DiffusionOPD("ring2d", seed=1, **(SMALL | TASK | settings))
        agent.learn(iterations * agent.samples_per_iteration)
        return agent

    def test_a_student_that_equals_its_teacher_stands_still(self):
        noisy = (("flow_sde", 0.7), ("ddim", 1.0), ("cps", 0.5), ("dance_sde", 0.3))
        for sampler, noise in (*noisy, ("ode", 0.0), ("dpm2", 0.0)):
            agent = DiffusionOPD("ring2d", seed=1, **(SMALL | TASK | {"teacher_steps": 0}),
                                 sampler=sampler, noise_level=noise)  # fmt: skip
            before = [p.detach().clone() for p in agent.policy.parameters()]
            agent.learn(10 * agent.samples_per_iteration)
            assert float(agent.scalars["train/distillation_loss"]) == 0.0
            for p, q in zip(before, agent.policy.parameters()):
                torch.testing.assert_close(p, q, rtol=0, atol=0)

    def test_teachers_stand_still_and_get_no_gradient(self):
        agent = self.trained()
        names = [name for name in agent.ctx.bank.names() if name.startswith("teacher/")]
        assert names == ["teacher/0", "teacher/1"]
        before = [p.clone() for name in names for p in agent.ctx.bank.policy(name).parameters()]
        agent.learn(2 * agent.samples_per_iteration)
        after = [p for name in names for p in agent.ctx.bank.policy(name).parameters()]
        assert all(torch.equal(p, q) and q.grad is None for p, q in zip(before, after))

    def test_every_column_has_its_own_teacher(self):
        agent = self.trained()
        data = agent.collector.collect(Request(counts=torch.tensor([4, 4])), agent.policy)
        on = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
        assert not on["obs"].requires_grad
        for label in (0, 1):
            columns = (data["label"] == label).nonzero().squeeze(1)
            alone = agent.ctx.bank.policy(f"teacher/{label}")(data.take(columns), frozenset({"mean"}))["mean"]
            torch.testing.assert_close(on["teacher_mean"][:, columns], alone)

    def test_other_next_states_change_the_policy_gradient_form_alone(self):
        """At fixed states, next states drawn again: the closed form has one gradient, the other one varies around
        it."""
        agent, wide = self.trained(), {"clip_low": 1.0, "clip_high": math.inf}
        detour = DiffusionOPD("ring2d", **(SMALL | TASK), form="policy_gradient", **wide).estimator.phases()[0].terms
        data = agent.collector.collect(Request(counts=torch.tensor([40, 40])), agent.policy)
        on = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
        phase = agent.estimator.phases()[0]
        found = {"closed": [], "policy_gradient": []}
        for seed in range(40):
            noise = torch.randn(on["action"].shape, generator=torch.Generator().manual_seed(seed))
            action = on["old_mean"] + on["std"].unsqueeze(-1) * noise
            log_prob = gaussian_log_prob(action, on["old_mean"], on["std"], "sum")
            drawn = Data({**on, "action": action, "log_prob": log_prob}, sequence=on.sequence)
            batch = drawn.epoch(phase.batching, None)[0]
            agent.policy.reduce = "sum"
            for form, terms in (("closed", phase.terms), ("policy_gradient", detour)):
                found[form].append(phase.updater.gradient(terms, batch).mean.clone())
        found = {form: torch.stack(rows) for form, rows in found.items()}
        assert torch.equal(found["closed"].var(0), torch.zeros_like(found["closed"][0]))
        mean, spread = found["policy_gradient"].mean(0), found["policy_gradient"].var(0).sum()
        assert float(spread) > 0.0
        off = (mean - found["closed"][0]).square().sum()
        assert float(off) < 3.0 * float(spread) / 40.0

    def test_without_noise_a_rollout_repeats(self):
        agent = DiffusionOPD("ring2d", seed=1, sampler="ode", noise_level=0.0, **SMALL, **TASK)
        labels = torch.tensor([0, 1, 0])
        assert torch.equal(agent.samples(labels, 5), agent.samples(labels, 5))
        assert not torch.equal(agent.samples(labels, 5), agent.samples(labels, 6))

    def test_teachers_from_checkpoints(self, tmp_path):
        agent = self.trained()
        agent.save(tmp_path / "teacher.pt")
        student = DiffusionOPD("ring2d", seed=2, **{k: v for k, v in SMALL.items() if k != "teacher_steps"}, **TASK,
                               teachers=(str(tmp_path / "teacher.pt"),))  # fmt: skip
        student.learn(student.samples_per_iteration)
        assert [n for n in student.ctx.bank.names() if n.startswith("teacher/")] == ["teacher/0"]
        for p, q in zip(agent.policy.parameters(), student.ctx.bank.policy("teacher/0").parameters()):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        wide = DiffusionOPD("ring2d", hidden=(16, 8), teachers=(str(tmp_path / "teacher.pt"),), **TASK)
        with pytest.raises(ValueError, match="like the student"):
            wide.learn(1)

    def test_settings_that_do_not_fit(self):
        with pytest.raises(ConfigError, match="no density"):
            DiffusionOPD("ring2d", form="policy_gradient", sampler="dpm2", noise_level=0.0)
        with pytest.raises(ConfigError, match="teacher_steps"):
            DiffusionOPD("ring2d", teachers=("a.pt",), teacher_steps=5)
