"""SD3 and UNet under the one objective and the one loop: exact resume, gradients, their own loss."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks import sd3, unet
from models.networks.config import LoraConfig, Sd3Config, UNetConfig
from models.networks.denoiser import Denoiser
from models.networks.routing import Route
from models.personalization.lora import add_lora
from models.pretraining import baselines
from models.pretraining.config import ObjectiveConfig, TimestepConfig
from models.pretraining.flow_matching import FlowMatching

SD3_TIMES = TimestepConfig(shift="static", static_shift=3.0)
TARGETS = ("to_q", "to_v", "add_q_proj")


def sd3_network() -> Denoiser:
    config = Sd3Config(hidden_size=16, depth=2, num_heads=2, largest=8)
    return sd3.build(config, channels=4, text_dim=12, pooled_dim=20, sample_size=8, seed=0)


def unet_network() -> Denoiser:
    config = UNetConfig(channels=(8, 16), head_dim=4, text_dim=12)
    return unet.build(config, torch.zeros(12), torch.ones(12), 4, 0)


NETWORKS = {"sd3": sd3_network, "unet": unet_network}


def batches(step: int, slots: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    rng = Randomness(5, step, slots)
    tokens, mask = rng.normal("tokens", (7, 12)), torch.ones(len(slots), 7, dtype=torch.bool)
    return Batch(rng.normal("latents", (4, 8, 8)), tokens, mask, slots)


def config(steps: int) -> TrainConfig:
    optimizer = OptimizerConfig(muon_lr=None, adamw_lr=3e-3, warmup_steps=0)
    return TrainConfig(steps=steps, batch_size=4, log_every=1, checkpoint_every=1, ema_gamma=3.0, optimizer=optimizer)


class Killed(Exception):
    pass


def run(make: Callable[[], Denoiser], folder, kill: int | None = None):
    def asked(step: int) -> Batch:
        if step == kill:
            raise Killed
        return batches(step)

    return train(FlowMatching(make(), SD3_TIMES), asked, config(6), folder)


def awake(denoiser: Denoiser) -> Denoiser:
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return denoiser


def adapted() -> Denoiser:
    denoiser = awake(sd3_network())
    add_lora(denoiser, LoraConfig(rank=2, targets=TARGETS), 0)
    return denoiser


@pytest.mark.parametrize("make", [sd3_network, unet_network, adapted])
def test_killed_twice_and_resumed_is_the_same_to_the_bit(make, tmp_path) -> None:
    straight = run(make, tmp_path / "straight")
    for kill in (2, 5):
        with pytest.raises(Killed):
            run(make, tmp_path / "broken", kill)
    resumed = run(make, tmp_path / "broken")
    assert resumed.rows == straight.rows
    for name, value in straight.emas["denoiser"].average.items():
        assert torch.equal(value, resumed.emas["denoiser"].average[name])
    assert straight.rows[0]["loss"] != straight.rows[-1]["loss"]


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_loss_is_the_velocity_error(name) -> None:
    denoiser = NETWORKS[name]()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    objective = FlowMatching(denoiser, SD3_TIMES)
    batch = objective.prepare(batches(0), Randomness(0, 0, (0, 1, 2, 3)))
    v, _ = denoiser.predict(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask)
    slow = (v - (batch.extra["eps"] - batch.images)).square().mean()
    torch.testing.assert_close(objective.loss("denoiser", batch).total, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_fresh_network_has_the_loss_of_the_zero_velocity(name) -> None:
    """Normal data and a zero output: E ||eps - x_0||^2 = 2 per element."""
    objective = FlowMatching(NETWORKS[name](), SD3_TIMES)
    slots = tuple(range(64))
    batch = objective.prepare(batches(0, slots), Randomness(0, 0, slots))
    loss = float(objective.loss("denoiser", batch).total.detach())
    assert abs(loss - 2.0) < 4 * math.sqrt(8 / (64 * 256))


def test_a_unet_hears_no_masked_token_and_saves_what_it_is(tmp_path) -> None:
    denoiser = unet.build(
        UNetConfig(channels=(8, 16), head_dim=4, text_dim=12), torch.randn(12), torch.rand(12) + 0.5, 4, 0
    )
    torch.nn.init.normal_(denoiser.transformer.conv_out.weight)
    batch, t = batches(0), torch.tensor([0.1, 0.4, 0.7, 1.0])
    mask = torch.arange(7).expand(4, 7) < 4
    spoilt = torch.where(mask[..., None], batch.tokens, torch.full_like(batch.tokens, 9.0))
    want = denoiser.predict(batch.images, t, batch.tokens, mask)[0]
    torch.testing.assert_close(denoiser.predict(batch.images, t, spoilt, mask)[0], want)
    denoiser.save(tmp_path)
    assert torch.equal(unet.load(tmp_path).predict(batch.images, t, batch.tokens, mask)[0], want)
    with pytest.raises(ValueError, match="no token grid"):
        denoiser(batch.images, t, batch.tokens, mask, 0)


def test_sd3_text_reaches_the_network_packed() -> None:
    denoiser, batch, t = adapted(), batches(0), torch.full((4,), 0.5)
    for row in (0, 1, 4):  # two rows of pooled vector, then tokens
        changed = replace(batch, tokens=batch.tokens.clone())
        changed.tokens[:, row] += 1
        first, second = (denoiser.predict(b.images, t, b.tokens, b.mask)[0] for b in (batch, changed))
        assert not torch.equal(first, second)


def test_tokens_of_sd3_skip_blocks_and_come_back() -> None:
    """Kept tokens alone pass block 1; all kept is no route at all; a UNet has no tokens to route."""
    denoiser, batch, t = awake(sd3_network()), batches(0), torch.full((4,), 0.5)
    plain, whole = denoiser.predict(batch.images, t, batch.tokens, batch.mask, 0)
    every = Route(torch.arange(16).expand(4, 16), 1, 1)
    same, _ = denoiser.predict(batch.images, t, batch.tokens, batch.mask, route=every)
    torch.testing.assert_close(same, plain)
    kept = Route(torch.tensor([[0, 3, 9]]).expand(4, 3), 1, 1)
    routed, passed = denoiser.predict(batch.images, t, batch.tokens, batch.mask, 1, route=kept)
    assert whole is not None
    assert passed is not None
    assert passed.shape == (4, 3, 16)
    seen: list[torch.Tensor] = []
    denoiser.transformer.norm_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    denoiser.predict(batch.images, t, batch.tokens, batch.mask, route=kept)
    skipped = [i for i in range(16) if i not in (0, 3, 9)]
    assert torch.equal(seen[0][:, skipped], whole[:, skipped])
    assert torch.equal(seen[0][:, [0, 3, 9]], passed)
    assert not torch.equal(routed, plain)
    with pytest.raises(ValueError, match="no token grid"):
        unet_network()(batch.images, t, batch.tokens, batch.mask, route=kept)


def test_a_kind_is_for_networks_whose_answer_is_taken_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"ddpm_v needs .* this family's means velocity; use x_0"):
        FlowMatching(sd3_network(), SD3_TIMES, objective=ObjectiveConfig(kind="ddpm_v"))


@pytest.mark.parametrize("weight", ["min_snr", "cosmap"])
def test_a_weight_is_the_velocity_objectives_own(weight) -> None:
    """Trained as x_0 of a velocity network or, by the written-out formula, as the velocity: one loss."""
    denoiser, config = awake(sd3_network()), ObjectiveConfig(weight=weight)
    objective = FlowMatching(denoiser, SD3_TIMES, objective=config)
    batch = objective.prepare(batches(0), Randomness(0, 0, (0, 1, 2, 3)))
    v, _ = denoiser.predict(batch.extra["x_t"], batch.extra["t"], batch.tokens, batch.mask)
    velocity = ObjectiveConfig(kind="velocity", weight=weight)
    slow = baselines.error(v, batch.images, batch.extra["eps"], batch.extra["t"], velocity).mean()
    torch.testing.assert_close(objective.loss("denoiser", batch).total, slow, rtol=1e-4, atol=1e-5)
