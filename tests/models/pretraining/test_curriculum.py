"""Phases by samples seen, and exact resume at every kind of edge."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import TrainingDivergedError, train
from models.engine.objective import Batch
from models.pretraining.config import FlowMatchingConfig, RepaConfig, TimestepConfig
from models.pretraining.curriculum import phase_at, phases_of, samples_seen
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa

TRAIN = {"steps": 12, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "ema_gamma": 3.0}
CURRICULUM = {
    "train": TRAIN,
    "network": {"depth": 3},
    "repa": {"layer": 0, "until": 0.5},
    "select": {"resolutions": [32]},
    "curriculum": [
        {"from_samples": 0},
        {"from_samples": 15, "select": {"resolutions": [64], "long_captions": 1.0}, "timesteps": {"shift": "none"},
         "repa": False, "tread": {"first": 1, "last": 1}},
    ],
}  # fmt: skip


def test_a_phase_begins_when_its_samples_were_seen_and_keeps_the_tokens_per_step() -> None:
    first, second = phases_of(FlowMatchingConfig.model_validate(CURRICULUM))
    assert (first.first_step, first.batch_size, first.repa, first.tread) == (0, 4, True, None)
    assert (second.first_step, second.batch_size, second.repa) == (4, 1, False)  # 4 x 64 tokens = 1 x 256
    assert second.timesteps.shift == "none"
    assert second.select.long_captions == 1.0
    assert [phase_at((first, second), step) is second for step in (3, 4, 11)] == [False, True, True]
    assert samples_seen((first, second), 12) == 4 * 4 + 8 * 1
    assert samples_seen((first, second), 3) == 12


def test_impossible_curricula_are_refused() -> None:
    late = {**CURRICULUM, "curriculum": [{"from_samples": 0}, {"from_samples": 48}]}
    with pytest.raises(ValueError, match="ends after 12 steps, before its phase from 48 samples"):
        FlowMatchingConfig.model_validate(late)
    uneven = {**CURRICULUM, "train": {**TRAIN, "batch_size": 12, "accumulate": 4}}
    later = {"from_samples": 24, "batch_size": 6}
    with pytest.raises(ValueError, match="phase from 24 samples has batch_size=6, no multiple of accumulate=4; give"):
        FlowMatchingConfig.model_validate({**uneven, "curriculum": [{"from_samples": 0}, later]})
    grown = {"from_samples": 24, "select": {"resolutions": [48]}}  # 12 x (32 / 48)^2 is 5
    with pytest.raises(ValueError, match="batch_size=5, no multiple of accumulate=4"):
        FlowMatchingConfig.model_validate({**uneven, "curriculum": [{"from_samples": 0}, grown]})
    even = {**uneven, "curriculum": [{"from_samples": 0}, {**later, "batch_size": 8}]}
    assert [phase.batch_size for phase in phases_of(FlowMatchingConfig.model_validate(even))] == [12, 8]
    with pytest.raises(ValueError, match="begin at 0 and rise"):
        FlowMatchingConfig.model_validate({"curriculum": [{"from_samples": 5}]})


class KilledError(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("cuts", "stop"),  # the second phase begins at step 4 and has no REPA, so its stop is before that or never seen
    [((2, 5), 4), ((4, 7), 4), ((5, 11), 4), ((2, 3, 4), 3)],
    ids=str,
)
def test_resume_twice_is_exact_at_every_edge(cuts, stop, threads, tiny, batches, tmp_path: Path) -> None:
    config = FlowMatchingConfig.model_validate(CURRICULUM)
    phases = phases_of(config)
    settings = config.train.model_copy(update={"loader_threads": threads, "optimizer": OptimizerConfig(warmup_steps=2)})

    def run(folder: Path, cut: int | None):
        repa = Repa(RepaConfig(layer=0, until=stop / 12), Projector(32, 8, 10, 3), 12)
        objective = FlowMatching(tiny(0), TimestepConfig(base_tokens=4), repa, phases=phases, bins=4)

        def batch(step: int) -> Batch:
            if step == cut:
                raise KilledError
            return batches(step)

        return train(objective, batch, settings, folder)

    straight = run(tmp_path / "straight", None)
    for cut in cuts:
        with pytest.raises(KilledError):
            run(tmp_path / "broken", cut)
    resumed = run(tmp_path / "broken", None)
    assert straight.rows == resumed.rows
    assert ["repa" in row for row in straight.rows] == [step < stop for step in range(12)]
    assert any("flow t=0.5-0.75" in row for row in straight.rows)
    for name, value in straight.players["denoiser"].state_dict().items():
        assert torch.equal(value, resumed.players["denoiser"].state_dict()[name])
        if name in straight.emas["denoiser"].average:
            assert torch.equal(straight.emas["denoiser"].average[name], resumed.emas["denoiser"].average[name])


# --- the engine's options ---


def run_with(tiny, batches, folder: Path, **settings: object):
    config = TrainConfig.model_validate({**TRAIN, "steps": 3, "optimizer": {"warmup_steps": 1}, **settings})
    return train(FlowMatching(tiny(0), TimestepConfig(base_tokens=4)), batches, config, folder)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.players["denoiser"].state_dict().items()}


def test_two_halves_of_a_batch_are_the_batch(tiny, batches, tmp_path: Path) -> None:
    whole, halves = (run_with(tiny, batches, tmp_path / str(n), accumulate=n) for n in (1, 2))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(halves)[name], value, atol=2e-5, rtol=0)
    assert halves.rows[0]["loss"] == pytest.approx(whole.rows[0]["loss"], rel=1e-5)


def test_recomputing_activations_changes_no_bit(tiny, batches, tmp_path: Path) -> None:
    plain, less = (weights(run_with(tiny, batches, tmp_path / str(on), recompute=on)) for on in (False, True))
    assert all(torch.equal(plain[name], less[name]) for name in plain)


def test_autocast_keeps_master_weights_and_averages_in_float32(tiny, batches, tmp_path: Path) -> None:
    trainer = run_with(tiny, batches, tmp_path, precision="bf16")
    assert {value.dtype for value in weights(trainer).values()} == {torch.float32}
    assert {value.dtype for value in trainer.emas["denoiser"].average.values()} == {torch.float32}
    assert all(np.isfinite(row["loss"]) for row in trainer.rows)


def test_a_gradient_that_is_not_finite_is_named_or_ends_the_run(tiny, batches, tmp_path: Path, caplog) -> None:
    def broken(step: int) -> Batch:
        batch = batches(step)
        batch.rows = (7, 8, 9, 10)
        if step == 1:
            batch.images = batch.images * float("nan")
        return batch

    run_with(tiny, broken, tmp_path / "skip")
    assert "not finite in step 1, rows [7, 8, 9, 10]: the step is left out" in caplog.text
    with pytest.raises(TrainingDivergedError, match=r"in step 1, rows \[7, 8, 9, 10\]"):
        run_with(tiny, broken, tmp_path / "stop", non_finite="stop")


def test_changed_settings_and_another_model_are_refused_on_resume(tiny, batches, tmp_path: Path) -> None:
    run_with(tiny, batches, tmp_path)
    with pytest.raises(ValueError, match=r"made with other settings \(seed: 0 -> 4\)"):
        run_with(tiny, batches, tmp_path, seed=4)
    other = FlowMatching(tiny(0), TimestepConfig(), Repa(RepaConfig(), Projector(32, 8, 10, 0), 3))
    config = TrainConfig.model_validate({**TRAIN, "steps": 3, "optimizer": {"warmup_steps": 1}})
    with pytest.raises(ValueError, match="is of another model: 4 weights differ, projector.inner.bias"):
        train(other, batches, config, tmp_path)


def test_the_meter_says_where_the_time_went(tiny, batches, tmp_path: Path) -> None:
    numbers = run_with(tiny, batches, tmp_path).meter.numbers()
    assert set(numbers) == {"samples_per_second", "mfu", "data_wait", "checkpoint_stall"}
    assert 0 < numbers["mfu"] < 1
    assert 0 < numbers["data_wait"] + numbers["checkpoint_stall"] < 1
