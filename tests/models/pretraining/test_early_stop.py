"""Early stop of flow matching: four pictures are learnt by heart, and the loss on others says when that begins."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from infra.config import versioned
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer, TrainingDivergedError, train
from models.engine.weights import with_weights
from models.pretraining.config import FlowMatchingConfig, TimestepConfig
from models.pretraining.early_stop import EarlyStop
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.validation import Validation

FAST = OptimizerConfig(muon_lr=None, adamw_lr=0.01, warmup_steps=0, decay_from=1.0)
STEPS, EVERY, PATIENCE = 48, 6, 2


class Killed(Exception):
    pass


def run(
    tiny, batches, folder, kill: int | None = None, patience: int = PATIENCE, steps: int = STEPS
) -> tuple[Trainer, EarlyStop]:
    """The same four pictures in every step."""
    denoiser = tiny(0)
    validation = Validation(denoiser, [replace(batches(99), rows=(0, 1, 2, 3))], EVERY, 0)

    def by_heart(step: int):
        if step == kill:
            raise Killed
        return batches(0)

    config = TrainConfig(steps=steps, batch_size=4, log_every=2, checkpoint_every=4, ema_gamma=3.0, optimizer=FAST)
    watch = EarlyStop(validation, patience)
    objective = FlowMatching(denoiser, TimestepConfig(base_tokens=4))
    return train(objective, by_heart, config, folder, watch=watch, measure=validation), watch


def loss_of(trainer: Trainer, watch: EarlyStop, weights: dict[str, torch.Tensor]) -> float:
    own = {name.removeprefix("denoiser."): value for name, value in weights.items()}
    return watch.validation.numbers(with_weights(watch.validation.denoiser, own))["validation"]


def test_a_run_that_learns_by_heart_ends_early_and_takes_the_best(tiny, batches, tmp_path) -> None:
    trainer, watch = run(tiny, batches, tmp_path)
    report = watch.report()
    losses = {look["step"]: look["loss"] for look in report["looks"]}
    assert report["early"]
    assert 0 < report["taken"] == min(losses, key=losses.__getitem__)
    assert trainer.step == report["taken"] + PATIENCE * EVERY < STEPS
    assert report["loss"] == losses[report["taken"]] < losses[trainer.step]
    assert f"{PATIENCE} looks up to step {trainer.step}" in report["reason"]
    average, present = trainer.emas["denoiser"].average, dict(trainer.players["denoiser"].named_parameters())
    assert all(torch.equal(average[name], present[name]) for name in average)
    assert loss_of(trainer, watch, average) == report["loss"]
    assert trainer.rows[-1]["step"] == trainer.step
    assert (
        trainer.rows[-1]["validation"] != losses[trainer.step]
    )  # the log is of the present weights, looks of averages

    free, unwatched = run(tiny, batches, tmp_path / "free", patience=10**6)
    assert free.step == STEPS
    assert not unwatched.report()["early"]
    assert unwatched.report()["reason"] == f"step {STEPS} was the last"
    assert unwatched.report()["taken"] == report["taken"]
    assert unwatched.report()["looks"][-1]["loss"] > 1.02 * report["loss"]
    assert all(torch.equal(value, average[name]) for name, value in free.emas["denoiser"].average.items())


def test_looks_are_of_the_averaged_weights(tiny, batches, tmp_path) -> None:
    trainer, watch = run(tiny, batches, tmp_path, steps=2)
    start, ends = watch.looks
    assert start.loss == Validation(tiny(0), watch.validation.batches, EVERY, 0).numbers()["validation"]
    assert ends.step == 2
    assert ends.loss == loss_of(trainer, watch, trainer.emas["denoiser"].average)
    assert ends.loss != trainer.rows[-1]["validation"]


@pytest.mark.parametrize("late", [-3, 5])
def test_killed_before_or_after_the_best_it_resumes_to_the_bit(late, tiny, batches, tmp_path) -> None:
    straight, watch = run(tiny, batches, tmp_path / "straight")
    with pytest.raises(Killed):
        run(tiny, batches, tmp_path / "broken", kill=watch.report()["taken"] + late)
    again, resumed = run(tiny, batches, tmp_path / "broken")
    assert resumed.report() == watch.report()
    assert again.rows == straight.rows
    for name, value in straight.emas["denoiser"].average.items():
        assert torch.equal(value, again.emas["denoiser"].average[name])
    assert run(tiny, batches, tmp_path / "broken", kill=again.step)[1].ended  # an ended run takes no further step


def test_a_loss_that_is_no_number_is_never_the_best(tiny, batches, tmp_path) -> None:
    trainer, watch = run(tiny, batches, tmp_path, steps=2)
    first = watch.looks[0]
    watch.validation.batches[0].images.fill_(math.nan)
    watch.look(trainer)
    assert math.isnan(watch.looks[-1].loss)
    assert watch.report()["taken"] in (first.step, 2)
    with pytest.raises(TrainingDivergedError, match=r"starts from is nan .step 2.*validation.patience to null"):
        EarlyStop(watch.validation, 1).look(trainer)


def test_without_patience_a_stage_keeps_its_key_and_cut_weights_are_refused() -> None:
    looked = FlowMatchingConfig.model_validate({"validation": {"every": 200}})
    assert versioned(looked)["validation"] == {"pictures": 64, "every": 200}
    stopped = FlowMatchingConfig.model_validate({"validation": {"every": 200, "patience": 3}})
    assert versioned(stopped)["validation"]["patience"] == 3
    with pytest.raises(ValidationError, match="validation.patience"):
        FlowMatchingConfig.model_validate({"validation": {"patience": 3}, "train": {"shard": True}})
