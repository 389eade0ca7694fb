import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.denoiser import Denoiser
from models.posttraining.advantages import weighted_advantages
from models.posttraining.config import GrpoConfig
from models.posttraining.flow_grpo import FIRST_OFF, FlowGrpo, Stem, surrogate
from models.posttraining.reward import RewardCard, Sharpness, Weighted
from models.posttraining.rollout import Sampling
from models.posttraining.sde import log_prob
from models.pretraining.config import TimestepConfig

TRAIN = TrainConfig(steps=4, batch_size=8, log_every=1, checkpoint_every=1, optimizer=OptimizerConfig(warmup_steps=0))


def config(**fields) -> GrpoConfig:
    return GrpoConfig.model_validate({"train": TRAIN.model_dump(), "group": 4, "guard": {"every": 1}, **fields})


def grpo(tiny, sampling, reward, **fields) -> FlowGrpo:
    made = config(**fields)
    return FlowGrpo(tiny(0), tiny(0) if made.kl > 0 else None, [Weighted(reward)], sampling, made)


def prepared(objective, grouped, step=0):
    return objective.prepare(grouped(step), Randomness(0, step, tuple(range(8))))


def gradient(objective, batch) -> torch.Tensor:
    objective.policy.zero_grad()
    objective.loss("policy", batch).total.backward()
    return torch.cat([p.grad.reshape(-1) for p in objective.policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("sampler", ["flow_sde", "cps", "ou"])
def test_ratio_is_1_before_the_first_move(tiny, sampling, brightness, grouped, sampler) -> None:
    objective = grpo(tiny, sampling, brightness, sampler=sampler, window=3)
    batch = prepared(objective, grouped)
    assert objective.loss("policy", batch).parts["ratio_off"] <= 1e-6
    order = torch.tensor([3, 0, 5, 1, 7, 2, 6, 4])
    moved = {k: v[:, order] for k, v in batch.extra.items() if k in ("states", "results", "log_probs")}
    shuffled = replace(batch, tokens=batch.tokens[order], mask=batch.mask[order], extra={**batch.extra, **moved})
    assert objective.loss("policy", shuffled).parts["ratio_off"] <= 1e-6


HALF = {"train": {**TRAIN.model_dump(), "precision": "bf16"}}
BRANCHING = {"same_noise": True, "window": 1, "window_from": 2}


@pytest.mark.parametrize("fields", [{"window": 3}, {"kl": 0.5}, BRANCHING], ids=["window", "kl", "branches"])
def test_ratio_is_1_before_the_first_move_in_half_precision(tiny, sampling, brightness, grouped, tmp_path, caplog, fields) -> None:  # fmt: skip
    objective = grpo(tiny, sampling, brightness, **HALF, **fields)
    numbers = Trainer(objective, objective.config.train, tmp_path).move(prepared(objective, grouped))
    assert numbers["ratio_off"] <= 1e-6
    assert numbers.get("kl", 0.0) == 0
    assert not caplog.records
    exact = prepared(grpo(tiny, sampling, brightness, **fields), grouped)
    assert (exact.extra["pictures"] - prepared(objective, grouped).extra["pictures"]).abs().max() > 1e-4


def test_a_ratio_that_is_off_before_the_first_move_is_told_once_and_later_ones_are_normal(tiny, sampling, brightness, grouped, tmp_path, caplog) -> None:  # fmt: skip
    objective = grpo(tiny, sampling, brightness, updates=2)  # rollouts in full precision
    trainer = Trainer(objective, TRAIN, tmp_path)
    assert trainer.move(prepared(objective, grouped))["ratio_off"] > FIRST_OFF * objective.config.clip_range
    assert not caplog.records
    half = Trainer(objective, objective.config.train.model_copy(update={"precision": "bf16"}), tmp_path)
    for step in range(2):
        half.move(prepared(objective, grouped, step))
    assert len(caplog.records) == 1
    assert "before the first move, above 0.0001 (a tenth of clip_range=0.001)" in caplog.text


def test_ratio_is_1_after_a_checkpoint_is_restored(tiny, sampling, brightness, grouped, tmp_path) -> None:
    """Rollouts of a policy that has moved, replayed by a fresh process's policy with the checkpoint's weights."""
    trainer = Trainer(grpo(tiny, sampling, brightness), TRAIN, tmp_path)
    trainer.move(prepared(trainer.objective, grouped))
    trainer.step = 1
    batch = prepared(trainer.objective, grouped, 1)
    trainer.save()
    fresh = grpo(tiny, sampling, brightness)
    assert fresh.loss("policy", batch).parts["ratio_off"] > 1e-5
    again = Trainer(fresh, TRAIN, tmp_path)
    assert again.resume()
    assert again.step == 1
    assert fresh.loss("policy", batch).parts["ratio_off"] <= 1e-6
    assert torch.equal(prepared(fresh, grouped, 1).extra["log_probs"], batch.extra["log_probs"])


def test_equal_rewards_leave_the_weights_bit_unchanged(tiny, sampling, same, grouped, tmp_path) -> None:
    objective = grpo(tiny, sampling, same)
    before = copy.deepcopy(objective.policy.state_dict())
    batch = prepared(objective, grouped)
    assert not gradient(objective, batch).any()
    trainer = Trainer(objective, TRAIN, tmp_path)
    numbers = trainer.move(batch)
    assert numbers["idle_groups"] == 1
    assert all(torch.equal(before[name], value) for name, value in objective.policy.state_dict().items())


def test_a_move_makes_better_pictures_of_the_group_likelier(tiny, sampling, brightness, grouped) -> None:
    objective = grpo(tiny, sampling, brightness)
    batch = prepared(objective, grouped)
    gradient(objective, batch)
    with torch.no_grad():
        for parameter in objective.policy.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad
    times = sampling.times(4, batch.images)
    gained = torch.zeros(8)
    with torch.no_grad():
        for k, i in enumerate(batch.extra["window"].tolist()):
            mean, std = objective._mean(
                objective.policy, batch.extra["states"][k], times[i], times[i + 1], Stem.single(batch)
            )
            gained += log_prob(batch.extra["results"][k], mean, std) - batch.extra["log_probs"][k]
    assert (gained * batch.extra["advantage"]).sum() > 0


class Linear(Denoiser):
    """x_0 = theta + x_t / 2: with two steps the picture is theta + x_s / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(3, 2, 2))

    def forward(self, x_t, t, tokens, mask):
        return self.theta + x_t / 2, None

    predict = forward


class Tilt:
    """w . picture for a fixed w."""

    card = RewardCard("tilt", -12.0, 12.0, "trained")
    w = torch.linspace(-1, 1, 12).view(3, 2, 2)

    def __call__(self, pictures, asked):
        return (pictures * self.w).sum((1, 2, 3))


def test_gradient_is_that_of_the_expected_reward() -> None:
    """One stochastic step 1 -> 1/2 (mean (1-s) x_0, deviation 1/2) of a linear policy: dE[R]/dtheta = w / 2 (1-s) = w / 4."""
    count = 8192
    train = {**TRAIN.model_dump(), "batch_size": count}
    made = config(train=train, group=count, steps=2, window=1, same_noise=True)
    null = (torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))
    sampling = Sampling(null, 1.0, TimestepConfig(shift="none"), patch_size=1)
    objective = FlowGrpo(Linear(), None, [Weighted(Tilt())], sampling, made)
    asked = Batch(torch.zeros(count, 3, 2, 2), torch.zeros(count, 1, 4), torch.ones(count, 1, dtype=torch.bool),
                  tuple(range(count)))  # fmt: skip
    batch = objective.prepare(asked, Randomness(0, 0, asked.slots))
    objective.loss("policy", batch).total.backward()
    deviation = 0.5 * 0.5 * Tilt.w.norm()  # of the reward: half of x_s, whose deviation is 1/2
    expected = -Tilt.w / 4 / deviation / 12  # advantages in deviations, log-probabilities per element
    assert (objective.policy.theta.grad - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [(1.0, 1.1, False), (-1.0, 0.9, False), (-1.0, 1.1, True), (1.0, 0.9, True), (1.0, 1.0, True), (-1.0, 1.0, True)],
)
def test_clip_stops_only_the_direction_of_the_advantage(advantage, ratio, moves) -> None:
    rho = torch.tensor([ratio], requires_grad=True)
    surrogate(rho, torch.tensor([advantage]), 0.01).sum().backward()
    assert rho.grad.item() == (-advantage if moves else 0.0)


def test_kl_is_0_at_the_reference_without_gradient_and_grows(tiny, sampling, same, grouped) -> None:
    objective = grpo(tiny, sampling, same, kl=0.5)
    batch = prepared(objective, grouped)
    assert objective.loss("policy", batch).parts["kl"] == 0
    assert not gradient(objective, batch).any()
    with torch.no_grad():
        for parameter in objective.policy.parameters():
            parameter *= 1.01
    assert objective.loss("policy", batch).parts["kl"] > 0
    assert gradient(objective, batch).any()


def test_gradient_reaches_the_policy_only(tiny, sampling, brightness, grouped) -> None:
    objective = grpo(tiny, sampling, brightness, kl=0.5)
    assert gradient(objective, prepared(objective, grouped)).norm() > 0
    assert all(p.grad is None for p in objective.reference.parameters())


def test_a_second_move_on_the_same_rollouts_sees_another_ratio(tiny, sampling, brightness, grouped, tmp_path) -> None:
    objective = grpo(tiny, sampling, brightness, updates=2)
    trainer = Trainer(objective, TRAIN, tmp_path)
    assert trainer.move(prepared(objective, grouped))["ratio_off"] > 1e-5


def test_windows(tiny, sampling, brightness) -> None:
    moving = grpo(tiny, sampling, brightness, steps=6, window=2, window_moves="progressive", window_every=10)
    assert [list(moving.window(Randomness(0, step, ()))) for step in (0, 10, 30, 40)] == [
        [0, 1],
        [1, 2],
        [3, 4],
        [0, 1],
    ]
    drawn = grpo(tiny, sampling, brightness, steps=6, window=2, window_moves="random")
    starts = {drawn.window(Randomness(0, step, ())).start for step in range(60)}
    assert starts == {0, 1, 2, 3}
    late = grpo(tiny, sampling, brightness, steps=6, window=2, window_from=2, window_moves="random")
    assert {late.window(Randomness(0, step, ())).start for step in range(60)} == {2, 3}
    assert list(grpo(tiny, sampling, brightness, window=1, window_from=2).window(Randomness(0, 0, ()))) == [2]
    for wrong in ({"window": 4}, {"window": 2, "window_from": 2}):
        with pytest.raises(ValueError, match="last step adds no noise"):
            config(steps=4, **wrong)


def test_guidance_of_its_own(tiny, sampling, brightness, grouped) -> None:
    given, own = (grpo(tiny, sampling, brightness, guidance=guidance) for guidance in (None, 1.0))
    assert (given.sampling.guidance, own.sampling.guidance) == (sampling.guidance, 1.0)
    assert sampling.guidance != 1
    pictures = [prepared(objective, grouped).extra["pictures"] for objective in (given, own)]
    assert not torch.equal(*pictures)


def test_one_first_noise_for_a_group(tiny, sampling, brightness, grouped) -> None:
    shared = prepared(grpo(tiny, sampling, brightness, same_noise=True), grouped).extra["states"][0]
    assert torch.equal(shared[0], shared[3])
    assert not torch.equal(shared[0], shared[4])
    own = prepared(grpo(tiny, sampling, brightness), grouped).extra["states"][0]
    assert not torch.equal(own[0], own[3])


def test_what_a_group_shares_is_computed_once_and_means_the_same(tiny, sampling, brightness, grouped) -> None:
    fields = {"same_noise": True, "steps": 4, "window": 2, "window_from": 1, "kl": 0.5, "guidance": 1.5}
    once, each = (grpo(tiny, sampling, brightness, **fields) for _ in range(2))
    each._stem = Stem.single
    batches = [prepared(objective, grouped) for objective in (once, each)]
    for name in ("states", "results", "log_probs", "anchors", "pictures"):
        torch.testing.assert_close(batches[0].extra[name], batches[1].extra[name], atol=1e-5, rtol=0)
    assert once.loss("policy", batches[0]).parts["ratio_off"] <= 1e-6
    torch.testing.assert_close(gradient(once, batches[0]), gradient(each, batches[1]), atol=1e-6, rtol=1e-3)


def test_a_stem_of_half_groups(grouped) -> None:
    """Slots 2 to 5 are the ends of one group and the start of another, as on one of two workers."""
    part = grouped(0, (2, 3, 4, 5))
    shared = Stem.shared(part, 4)
    assert shared.rows.tolist() == [0, 2]
    assert shared.branch.tolist() == [0, 0, 1, 1]
    assert torch.equal(shared.asked.tokens[shared.branch], part.tokens)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of group"):
        config(group=3)
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        config(group=1)
    with pytest.raises(ValueError, match="held out"):
        Weighted(Sharpness("held_out"))


WORKER = """
import json, sys, torch, torch.distributed as dist
from models.posttraining.advantages import weighted_advantages
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
slots = tuple(range(rank * 6, rank * 6 + 6))
rewards = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
mine, idle = weighted_advantages(rewards[:, list(slots)], [1.0, 0.5], 4, slots)
print(json.dumps([mine.tolist(), float(idle)]))
dist.destroy_process_group()
"""


def test_two_workers_have_the_advantages_of_one(tmp_path) -> None:
    """Twelve samples in groups of four, six a worker: the middle group lies on both."""
    rewards = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    expected, _ = weighted_advantages(rewards, [1.0, 0.5], 4, tuple(range(12)))
    file = str(tmp_path / "meet")
    runs = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), file], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    answers = [json.loads(run.communicate(timeout=120)[0].splitlines()[-1]) for run in runs]
    torch.testing.assert_close(torch.tensor(answers[0][0] + answers[1][0]), expected, atol=1e-6, rtol=0)
