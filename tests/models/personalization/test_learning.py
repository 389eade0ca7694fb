"""The watch that ends DreamBooth: its measures by hand, when it ends, what it leaves, and resume."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import Trainer, train
from models.engine.randomness import Randomness
from models.networks.config import LoraConfig
from models.personalization.config import UntilLearntConfig
from models.personalization.dreambooth import DreamBooth, Pictures, mixed_batches
from models.personalization.learning import DRIFT_TIMES, LearningWatch, Look
from models.personalization.lora import add_lora, merge
from models.pretraining.config import TimestepConfig

SLOTS = (0, 1, 2, 3)
FAST = OptimizerConfig(muon_lr=None, adamw_lr=0.02, warmup_steps=0, decay_from=1.0)


class Killed(Exception):
    pass


def pictures(batch, low: float) -> Pictures:
    return Pictures(batch.images * 0.1 + low, batch.tokens, batch.mask)


def set_up(tiny, batches, **settings) -> tuple[LearningWatch, DreamBooth, Pictures, Pictures]:
    """A dark subject on a base that draws whatever it draws."""
    own, plain = pictures(batches(0), -0.9), pictures(batches(1), 0.4)
    denoiser, base = tiny(0), tiny(0)
    add_lora(denoiser, LoraConfig(rank=2), 0)

    def draw(net) -> torch.Tensor:
        noise = Randomness(3, 0, SLOTS).normal("draw", tuple(own.images.shape[1:]))
        with torch.no_grad():
            return merge(net)(noise, torch.ones(4), own.tokens, own.mask)[0]

    config = UntilLearntConfig(**{"every": 2, "patience": 2, "gain": 0.0, "max_drift": 1e9, **settings})
    null = (plain.tokens[:1], plain.mask[:1])
    watch = LearningWatch(config, denoiser, base, draw, own.images, plain, null)
    return watch, DreamBooth(denoiser, TimestepConfig(), base), own, plain


def run(tiny, batches, folder, steps: int = 8, kill: int | None = None, **settings) -> tuple[Trainer, LearningWatch]:
    watch, objective, own, plain = set_up(tiny, batches, **settings)
    made = mixed_batches(own, plain, 1.0, SLOTS, 0)

    def asked(step: int):
        if step == kill:
            raise Killed
        return made(step)

    config = TrainConfig(steps=steps, batch_size=4, log_every=1, checkpoint_every=1, ema_gamma=3.0, optimizer=FAST)
    return train(objective, asked, config, folder, watch=watch), watch


def test_similarity_is_the_greatest_cosine_of_centred_features(tiny, batches) -> None:
    watch, _, own, plain = set_up(tiny, batches)

    def hidden(image: torch.Tensor) -> torch.Tensor:
        eps = Randomness(0, 0, (0,)).normal("features", tuple(image.shape))[0]
        x_t = (0.75 * image + 0.25 * eps).unsqueeze(0)
        with torch.no_grad():
            return watch.base.predict(x_t, torch.tensor([0.25]), *watch.null, watch.base.depth // 2)[1][0]

    everywhere = torch.cat([hidden(image) for image in plain.images])
    mean, spread = everywhere.mean(0), everywhere.std(0)

    def features(images: torch.Tensor) -> list[torch.Tensor]:
        return [((hidden(image) - mean) / spread).max(0).values for image in images]

    centre = torch.stack(features(plain.images)).mean(0)
    drawn, real = features(plain.images[:2]), features(own.images)
    slow = [max(float(F.cosine_similarity(a - centre, b - centre, dim=0)) for b in real) for a in drawn]
    assert watch.similarity(plain.images[:2]) == pytest.approx(sum(slow) / 2, abs=1e-5)
    assert watch.similarity(own.images) == pytest.approx(1.0, abs=1e-5)


def test_drift_is_the_relative_change_of_the_velocity(tiny, batches) -> None:
    watch, _, _, plain = set_up(tiny, batches)
    assert watch.drift(tiny(0)) == 0
    other = tiny(7)
    changed = size = 0.0
    for t in DRIFT_TIMES:
        eps = Randomness(0, 0, SLOTS).normal(f"drift {t}", tuple(plain.images.shape[1:]))
        x_t = (1 - t) * plain.images + t * eps
        with torch.no_grad():
            x_0, base = (net(x_t, torch.full((4,), t), plain.tokens, plain.mask)[0] for net in (other, watch.base))
        changed += float(((x_0 - base) / t).square().sum())
        size += float(((x_t - base) / t).square().sum())
    assert watch.drift(other) == pytest.approx(changed / size, rel=1e-4)


def test_it_ends_when_nothing_is_gained_and_takes_the_best(tiny, batches, tmp_path) -> None:
    trainer, watch = run(tiny, batches, tmp_path, steps=60, every=4)
    similarities = [look.similarity for look in watch.looks]
    best = similarities.index(max(similarities))
    assert watch.ended
    assert trainer.step == watch.looks[best].step + 8 < 60
    assert similarities[best] > similarities[0] + 0.005
    assert watch.report()["taken"] == watch.looks[best].step
    for name, value in watch.best.kept.items():
        assert torch.equal(value, trainer.emas["denoiser"].average[name])
        assert torch.equal(value, dict(trainer.players["denoiser"].named_parameters())[name])


def test_drift_ends_it_with_weights_from_before(tiny, batches, tmp_path) -> None:
    trainer, watch = run(tiny, batches, tmp_path, steps=60, every=4, max_drift=5e-3)
    assert [look.drift > 5e-3 for look in watch.looks] == [False] * (len(watch.looks) - 1) + [True]
    assert watch.report()["taken"] == trainer.step - 4 > 0
    drift = run(tiny, batches, tmp_path / "on", steps=4, every=4, max_drift=1e-9)[1]
    assert drift.report()["taken"] == 0
    assert all(not value.any() for name, value in drift.best.kept.items() if ".lora_B." in name)


@pytest.mark.parametrize("kill", [3, 6])
def test_killed_and_resumed_it_looks_the_same_to_the_bit(kill, tiny, batches, tmp_path) -> None:
    straight, watch = run(tiny, batches, tmp_path / "straight")
    with pytest.raises(Killed):
        run(tiny, batches, tmp_path / "broken", kill=kill)
    again, resumed = run(tiny, batches, tmp_path / "broken")
    assert resumed.looks == watch.looks
    assert replace(resumed.looks[0]) == Look(0, resumed.looks[0].similarity, 0.0)
    assert again.rows == straight.rows
    for name, value in straight.emas["denoiser"].average.items():
        assert torch.equal(value, again.emas["denoiser"].average[name])
