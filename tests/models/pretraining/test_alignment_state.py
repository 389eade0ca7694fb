"""What alignment leaves behind: a projector that rests after the stop, the followed network's average and its distance."""

from pathlib import Path

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.pretraining.config import RepaConfig, TimestepConfig
from models.pretraining.encoder_free import AVERAGE_DECAY, SelfAlignment
from models.pretraining.flow_matching import FlowMatching
from models.pretraining.repa import Projector, Repa

SLOTS = (0, 1, 2, 3)
STEPS, STOP = 8, 4


@pytest.mark.parametrize("muon_lr", [0.01, None], ids=["muon", "adamw"])
def test_the_projector_rests_after_the_stop_in_spite_of_weight_decay_and_momentum(
    muon_lr, tiny, batches, tmp_path: Path
) -> None:
    optimizer = OptimizerConfig(warmup_steps=1, weight_decay=0.5, muon_lr=muon_lr)
    config = TrainConfig(steps=STEPS, batch_size=4, log_every=4, checkpoint_every=4, optimizer=optimizer)
    projector = Projector(32, 8, 10, 3)
    denoiser = tiny(0)
    seen = []

    def watched(step: int) -> Batch:
        seen.append([p.detach().clone() for p in (projector.inner.weight, projector.out.weight, denoiser.transformer.img_in.weight)])  # fmt: skip
        return batches(step)

    train(FlowMatching(denoiser, TimestepConfig(), Repa(RepaConfig(layer=1, until=STOP / STEPS), projector, STEPS)),
          watched, config, tmp_path)  # fmt: skip
    for place in (0, 1):
        assert not torch.equal(seen[STOP - 1][place], seen[STOP][place])
        assert all(torch.equal(seen[step][place], seen[STOP][place]) for step in range(STOP, STEPS))
    assert not torch.equal(seen[STOP][2], seen[STEPS - 1][2])


def test_self_alignment_is_the_smooth_distance_to_the_average_at_less_noise(tiny, batches) -> None:
    denoiser, gap = tiny(0), 0.3
    config = RepaConfig(kind="self", layer=0, target_layer=1, coefficient=2.0, time_gap=gap, until=1.0)
    align = SelfAlignment(config, Projector(32, 8, 32, 0), denoiser, 10)
    with torch.no_grad():  # so that the followed network is not the trained one
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    rng = Randomness(0, 0, SLOTS)
    batch = FlowMatching(denoiser, TimestepConfig(), align).prepare(batches(0), rng)
    t = (batch.extra["t"] - gap * rng.uniform("self alignment")).clamp_min(0)
    assert bool((t <= batch.extra["t"]).all())
    less = torch.stack([(1 - s) * x + s * e for x, e, s in zip(batch.images, batch.extra["eps"], t, strict=True)])
    _, want = tiny(0)(less, t, batch.tokens, batch.mask, 1)
    _, hidden = denoiser(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask, 0)
    apart = (align.projector(hidden) - want).abs()
    smooth = torch.where(apart < 0.05, apart.square() / 0.1, apart - 0.025)
    torch.testing.assert_close(align.term(hidden, batch, None), 2 * smooth.mean((1, 2)), atol=1e-5, rtol=1e-4)


def test_the_followed_average_warms_up(tiny) -> None:
    denoiser = tiny(0)
    align = SelfAlignment(RepaConfig(kind="self", layer=0), Projector(32, 8, 32, 0), denoiser, 10)
    name = "transformer.img_in.weight"
    weight = dict(denoiser.named_parameters())[name]
    by_hand = weight.detach().double()
    for update in range(1, 6):
        with torch.no_grad():
            weight.add_(update)
        align.after_step(denoiser)
        decay = (1 + update) / (10 + update)
        by_hand = decay * by_hand + (1 - decay) * weight.detach().double()
    torch.testing.assert_close(align.state()[name].double(), by_hand, atol=1e-5, rtol=1e-5)
    align.updates = 10**6
    with torch.no_grad():
        weight.fill_(0.0)
    align.after_step(denoiser)
    torch.testing.assert_close(align.state()[name].double(), AVERAGE_DECAY * by_hand, atol=1e-5, rtol=1e-5)
