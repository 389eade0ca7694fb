"""The small VAE: its loss by hand, exact resume, measured scale and shift, latents drawn anew from cached posteriors."""

import pytest
import torch

from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.engine.objective import Batch
from models.engine.randomness import Randomness
from models.networks.codec import Vae, drawn, load_vae
from models.pretraining.autoencoder import Autoencoder, build, measure
from models.pretraining.autoencoder_config import AutoencoderConfig

OPTIMIZER = OptimizerConfig(muon_lr=None, adamw_lr=3e-3, warmup_steps=0)
CONFIG = AutoencoderConfig(
    channels=(8, 16), norm_groups=4, kl_weight=0.1, gradient_weight=0.5,
    train=TrainConfig(steps=6, batch_size=4, log_every=1, checkpoint_every=1, ema_gamma=3.0, optimizer=OPTIMIZER),
)  # fmt: skip


def batches(step: int) -> Batch:
    """Pictures of random 2 x 2 squares in black, white and the colours: one latent has all there is to know of one."""
    slots = (0, 1, 2, 3)
    colour = Randomness(5, step, slots).uniform("colour", (3, 4, 4)).round() * 2 - 1
    text = torch.zeros(4, 1, 4)
    return Batch(
        colour.repeat_interleave(2, 2).repeat_interleave(2, 3), text, torch.ones(4, 1, dtype=torch.bool), slots
    )


def test_the_loss_is_its_formula() -> None:
    objective = Autoencoder(build(CONFIG, 0), CONFIG)
    batch = objective.prepare(batches(0), Randomness(0, 0, (0, 1, 2, 3)))
    vae = objective.vae
    q = torch.distributions.Normal((found := vae.encode(batch.images).latent_dist).mean, found.std)
    back = vae.decode(q.loc + q.scale * batch.extra["eps"]).sample
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    error = back - batch.images
    edges = (error[:, :, 1:] - error[:, :, :-1]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    torch.testing.assert_close(objective.loss("vae", batch).total, error.abs().mean() + 0.5 * edges + 0.1 * kl)


def test_it_resumes_to_the_bit(tmp_path) -> None:
    def run(folder, kill=None):
        def asked(step):
            if step == kill:
                raise KeyboardInterrupt
            return batches(step)

        return train(Autoencoder(build(CONFIG, 0), CONFIG), asked, CONFIG.train, folder)

    straight = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", 3)
    resumed = run(tmp_path / "broken")
    assert resumed.rows == straight.rows
    assert all(torch.equal(v, resumed.emas["vae"].average[n]) for n, v in straight.emas["vae"].average.items())


def test_it_learns_squares(tmp_path) -> None:
    """Grey, the best constant answer, has the error 1."""
    longer = CONFIG.train.model_copy(update={"steps": 120, "log_every": 20, "checkpoint_every": 120})
    objective = Autoencoder(build(CONFIG, 0), CONFIG.model_copy(update={"kl_weight": 1e-4}))
    rows = train(objective, batches, longer, tmp_path).rows
    assert rows[-1]["reconstruction"] < 0.88


def test_measured_scale_makes_unit_variance_and_survives_saving(tmp_path) -> None:
    vae = build(CONFIG, 0).eval()
    measured = measure(vae, batches, 8, 0)
    codec = Vae(vae)
    assert (codec.factor, codec.channels, codec.scaling.scale) == (2, 4, measured["scale"])
    parts = [
        drawn(
            codec.moments(batches(step).images), Randomness(1, step, (0, 1, 2, 3)).normal("z", (4, 4, 4)), codec.scaling
        )
        for step in range(8)
    ]
    latents = torch.cat(parts)
    assert abs(float(latents.mean())) < 0.1
    assert abs(float(latents.std()) - 1) < 0.1
    vae.save_pretrained(tmp_path)
    again = load_vae(tmp_path)
    assert again.scaling == codec.scaling
    assert torch.equal(again.pictures(latents[:2]), codec.pictures(latents[:2]))


def test_without_noise_a_latent_is_its_mean(vae) -> None:
    codec = Vae(vae())
    pictures = batches(0).images
    moments = codec.moments(pictures)
    torch.testing.assert_close(drawn(moments, torch.zeros(4, 4, 4, 4), codec.scaling), codec.x_0(pictures))
    z = codec.network.encode(pictures).latent_dist.mean
    torch.testing.assert_close(codec.x_0(pictures), (z - 0.1) * 0.7)


def test_a_dc_autoencoder_has_exact_latents_and_comes_back_from_its_folder(tmp_path) -> None:
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    levels = {"encoder": (8, 16), "decoder": (8, 16)}
    network = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.4,
        **{f"{side}_block_types": "ResBlock" for side in levels}, **{f"{side}_qkv_multiscales": ((), ()) for side in levels},
        **{f"{side}_block_out_channels": widths for side, widths in levels.items()},
        **{f"{side}_layers_per_block": (1, 1) for side in levels},
    )  # fmt: skip
    network.save_pretrained(tmp_path)
    codec, pictures = load_vae(tmp_path), batches(0).images
    assert (codec.factor, codec.channels, codec.scaling.scale, codec.scaling.shift) == (2, 4, 0.4, 0.0)
    with torch.no_grad():
        z = network.eval().encode(pictures).latent
        back = network.decode(z).sample
    assert z.shape == (4, 4, 4, 4)
    torch.testing.assert_close(codec.x_0(pictures), 0.4 * z)
    noise = Randomness(1, 0, (0, 1, 2, 3)).normal("z", (4, 4, 4))
    torch.testing.assert_close(drawn(codec.moments(pictures), noise, codec.scaling), 0.4 * z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.pictures(codec.x_0(pictures)), back, atol=1e-5, rtol=1e-4)
