"""Autoencoder, its training set and a latent PRX, one stage after the other, at toy size."""

import json

import pytest
from safetensors.numpy import load_file

from models.pretraining.autoencoder_config import AutoencoderConfig
from models.pretraining.config import FlowMatchingConfig
from models.sampling.generate import load_generator
from tasks.autoencoder import autoencoder
from tasks.config import FeaturesConfig
from tasks.model_features import features
from tasks.training import flow_matching

TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "optimizer": {"muon_lr": None}}


def test_a_picture_is_drawn_by_a_model_in_the_latents_of_a_vae_of_our_own(inputs, context, tmp_path) -> None:
    vae = context("autoencoder", {"data": inputs["data"]}, tmp_path)
    config = AutoencoderConfig.model_validate({"train": TRAIN, "channels": (8, 16, 16), "norm_groups": 4, "prompt_max_tokens": 16})  # fmt: skip
    told = autoencoder(config, vae)
    assert told["factor"] == 4
    latents = context("features", {"data": inputs["data"], "model": vae.out}, tmp_path)
    assert features(FeaturesConfig(), latents)["latents"] == 8
    stored = load_file(latents.out / "latents-32x32.safetensors")["moments"]
    assert stored.shape == (8, 2 * 4, 8, 8)
    scaling = json.loads((latents.out / "latents.json").read_text())
    assert (scaling["scale"], scaling["shift"]) == (pytest.approx(told["scale"]), pytest.approx(told["shift"]))
    trained = context("pretrain", {"data": latents.out, "frozen": vae.out}, tmp_path)
    network = {"kind": "prx-latent", "hidden_size": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "patch_size": 2,
               "prompt_max_tokens": 16}  # fmt: skip
    settings = {"network": network, "train": TRAIN, "repa": None, "sampling": {"steps": 2, "side": 32}}
    facts = flow_matching(FlowMatchingConfig.model_validate(settings), trained)
    assert facts["samples"] == 8
    generator = load_generator(trained.out)
    assert (generator.denoiser.channels, generator.around.codec.factor) == (4, 4)
    pictures = generator.sample(["a cat"], [0])
    assert pictures.shape == (1, 32, 32, 3)
    assert pictures.std() > 1
