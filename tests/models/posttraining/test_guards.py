"""A planted reward that can be hacked: brightness is trained on, true worth is brightness near a value a little above
the start's. Without guards the pictures become too bright; with them the run ends and the best weights are taken."""

import json
from dataclasses import replace

import pytest
import torch

from infra.errors import ConfigError
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.posttraining.config import ReflConfig
from models.posttraining.guard_config import GuardConfig
from models.posttraining.guards import TIMES, Guard, Look, Watched
from models.posttraining.refl import Refl
from models.posttraining.reward import Composite, RewardCard, Weighted

OPTIMIZER = OptimizerConfig(muon_lr=None, adamw_lr=2e-3, warmup_steps=0, decay_from=1.0)
TRAIN = TrainConfig(steps=60, batch_size=8, log_every=5, checkpoint_every=5, optimizer=OPTIMIZER, ema_gamma=1.0)


class Worth:
    """-(brightness - best)^2 per picture, best one tenth above that picture's start (by slot)."""

    card = RewardCard("worth", -4.0, 0.0, "held_out")

    def __init__(self) -> None:
        self.target = 0.0

    def __call__(self, pictures, asked):
        return -((pictures.mean((1, 2, 3)) - self.target) ** 2)


@pytest.fixture
def toy(tiny, sampling, brightness, grouped):
    def make(guarded: bool):
        net, worth = tiny(0), Worth()
        config = ReflConfig.model_validate(
            {"train": TRAIN.model_dump(), "guard": {"every": 5}, "hinge": 50.0, "weight": 1.0, "pretraining": 0.01}
        )
        objective = Refl(net, Composite((Weighted(brightness),)), sampling, config)
        asked = replace(grouped(900), extra={})
        watched = Watched(asked, 4, brightness, worth, lambda x: x.flatten(1), sampling, 4)
        guard = Guard(GuardConfig(every=5, min_diversity=0.0), "denoiser", net, watched)
        worth.target = float(guard._first.trained.mean()) + 0.1
        del guard.__dict__["_first"]
        return objective, guard if guarded else None, guard

    return make


def test_hacked_without_guards_stopped_and_restored_with_them(toy, grouped, tmp_path) -> None:
    objective, _, judge = toy(False)
    free = train(objective, grouped, TRAIN, tmp_path / "free")
    judge.look(free)
    hacked = judge.looks[0]
    assert hacked.trained > judge._first.trained.mean() + 0.3
    assert hacked.held_out < judge._first.held_out.mean() - 0.02

    objective, guard, _ = toy(True)
    trainer = train(objective, grouped, TRAIN, tmp_path / "guarded", watch=guard)
    assert guard.ended
    assert trainer.step < TRAIN.steps
    report = guard.report()
    assert "held-out reward" in report["reasons"][0]
    guard.looks.clear()
    guard.look(trainer)
    restored = guard.looks[0]
    assert restored.held_out >= guard._first.held_out.mean()
    assert restored.trained > guard._first.trained.mean()
    best = max((look for look in report["looks"]), key=lambda look: look["held_out"])
    assert best["step"] == report["taken"]
    assert restored.held_out == pytest.approx(best["held_out"], abs=1e-7)


def test_a_killed_guarded_run_ends_at_the_same_look_with_the_same_bits(toy, grouped, tmp_path) -> None:
    objective, guard, _ = toy(True)
    straight = train(objective, grouped, TRAIN, tmp_path / "straight", watch=guard)

    class KilledError(Exception):
        pass

    def dying(step):
        if step == 12:
            raise KilledError
        return grouped(step)

    objective, broken, _ = toy(True)
    with pytest.raises(KilledError):
        train(objective, dying, TRAIN, tmp_path / "broken", watch=broken)
    objective, again, _ = toy(True)
    resumed = train(objective, grouped, TRAIN, tmp_path / "broken", watch=again)
    assert again.report() == guard.report()
    assert resumed.rows == straight.rows
    own, other = (t.players["denoiser"].state_dict() for t in (straight, resumed))
    assert all(torch.equal(own[name], other[name]) for name in own)
    objective, finished, _ = toy(True)
    train(objective, lambda step: pytest.fail("an ended run went on"), TRAIN, tmp_path / "broken", watch=finished)
    assert finished.ended


ANY = 1e9  # standard errors: the held-out reward alone never ends the run


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"min_diversity": 0.9, "errors": ANY}, "diversity 0."),
        ({"min_diversity": 0.0, "max_drift": 0.5, "errors": ANY}, "velocity drift "),
    ],
    ids=["diversity", "drift"],
)
def test_a_run_that_loses_diversity_or_drifts_is_stopped_and_restored(toy, grouped, tmp_path, limits, reason) -> None:
    objective, guard, _ = toy(True)
    guard.watched = replace(guard.watched, held_out=guard.watched.trained)  # rises to the end
    guard.config = GuardConfig(every=5, **limits)
    trainer = train(objective, grouped, TRAIN, tmp_path, watch=guard)
    report = guard.report()
    assert guard.ended
    assert trainer.step < TRAIN.steps
    assert len(report["reasons"]) == 1
    assert report["reasons"][0].startswith(reason)
    good = [look for look in guard.looks if not guard.faults(look)]
    assert report["taken"] == max(good, key=lambda look: look.held_out).step > 0
    assert [bool(guard.faults(look)) for look in guard.looks[-2:]] == [True, True]  # patience
    guard.look(trainer)
    assert guard.faults(guard.looks[-1]) == []
    assert guard.looks[-1].held_out == pytest.approx(max(look.held_out for look in good), abs=1e-6)


def test_outside_prompts_end_a_run_that_the_others_would_let_go_on(toy, grouped, tmp_path) -> None:
    """Worth is the same number of brightness everywhere, but outside prompts want the pictures as they were."""
    objective, guard, _ = toy(True)

    class Unlike(Worth):
        def __call__(self, pictures, asked):
            value = pictures.mean((1, 2, 3))
            return value if "outside" not in asked.extra else -((value - self.target) ** 2)

    outside = grouped(901)
    unlike = Unlike()
    guard.watched = replace(guard.watched, held_out=unlike, outside=replace(outside, extra={"outside": torch.ones(8)}))
    guard.config = GuardConfig(every=5, min_diversity=0.0)
    unlike.target = float(next(guard._pictures(guard.start, outside, "guard outside"))[1].mean())
    trainer = train(objective, grouped, TRAIN, tmp_path / "run", watch=guard)
    report = guard.report()
    assert guard.ended
    assert trainer.step < TRAIN.steps
    assert len(report["reasons"]) == 1
    assert "on the outside prompts" in report["reasons"][0]
    assert report["looks"][0]["outside"]["change"] == 0
    assert report["looks"][-1]["outside"]["change"] < 0 < report["looks"][-1]["change"]
    _, again, _ = toy(True)
    again.load_state(guard.state())
    assert again.looks == guard.looks


class Breaks:
    """Brightness until it is asked for the `after`-th time, then no number."""

    card = RewardCard("breaks", -1.0, 1.0, "trained")

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, pictures, asked):
        self.left -= 1
        return pictures.mean((1, 2, 3)) * (1.0 if self.left >= 0 else float("nan"))


@pytest.mark.parametrize("role", ["trained", "held_out"])
def test_a_reward_that_is_no_number_ends_the_run_and_the_last_good_weights_are_taken(
    toy, grouped, tmp_path, role
) -> None:
    objective, guard, _ = toy(True)
    # a look asks once for the 16 pictures; the first measures the start and itself: the third look finds no number
    guard.watched = replace(guard.watched, **{"held_out": Breaks(99), role: Breaks(3)})
    trainer = train(objective, grouped, replace_steps(20), tmp_path, watch=guard)
    report = guard.report()
    assert guard.ended
    assert trainer.step == 15
    assert report["taken"] in (0, 5)
    assert f"{'held-out' if role == 'held_out' else 'trained'} reward is nan" in report["reasons"][0]
    assert [look[role] is None for look in report["looks"]] == [False, False, True, True]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def replace_steps(steps: int) -> TrainConfig:
    return TRAIN.model_copy(update={"steps": steps})


def test_a_start_that_is_bad_itself_is_refused(toy, grouped, tmp_path) -> None:
    objective, guard, _ = toy(True)
    guard.watched = replace(guard.watched, held_out=Breaks(0))
    with pytest.raises(ConfigError, match="nothing could be restored: held-out reward is nan"):
        train(objective, grouped, TRAIN, tmp_path / "nan", watch=guard)
    objective, guard, _ = toy(True)
    guard.config = GuardConfig(every=5, min_diversity=1.5)
    with pytest.raises(ConfigError, match=r"diversity 1.00 of the start's, below 1.5; .*min_diversity=1.5"):
        train(objective, grouped, TRAIN, tmp_path / "diversity", watch=guard)


@pytest.mark.parametrize("field", ["trained", "held_out", "change", "error", "diversity", "drift", "outside"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_whatever_is_no_finite_number_is_a_fault(toy, field, value) -> None:
    _, guard, _ = toy(True)
    good = Look(5, 0.1, -0.1, 0.0, 0.01, 1.0, (0.0,) * len(TIMES), (0.1, 0.0, 0.01))
    assert guard.faults(good) == []
    wrong = {"drift": (0.0, value, 0.0, 0.0, 0.0), "outside": (0.1, value, 0.01)}.get(field, value)
    assert "which is no finite number" in guard.faults(replace(good, **{field: wrong}))[0]


def test_faults_name_value_and_limit(toy) -> None:
    _, guard, _ = toy(True)
    good = Look(5, 0.1, -0.1, 0.0, 0.01, 1.0, (0.0,) * len(TIMES))
    assert guard.faults(good) == []
    guard.config = GuardConfig(every=5, min_diversity=0.8, max_drift=0.1)
    assert "diversity 0.70" in guard.faults(replace(good, diversity=0.7))[0]
    assert "at t=0.9" in guard.faults(replace(good, drift=(0.0, 0.0, 0.0, 0.0, 0.2)))[0]
    assert guard.faults(replace(good, change=-0.03))[0].startswith("held-out reward -0.0300")
