"""A server over a run of other families: a foreign SD3 pipeline with adapters, a latent PRX, a UNet in pixels."""

import base64
import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from models.networks import families
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.networks.config import LatentPrxConfig, LoraConfig, UNetConfig
from models.networks.take_over import take_over
from models.personalization import lora_files
from models.personalization.lora import add_lora, merge, save_forms, stacked
from models.sampling.generate import load_generator
from tasks.serving.app import create_app
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Engine
from tasks.serving.models import models_of

IMAGES = "/v1/images/generations"
CARD = {"side": 16, "steps": 3, "guidance": 2.0}


def awake(denoiser, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if not parameter.any():
                parameter.copy_((0.3 if "lora_B" in name else 0.05) * torch.randn(parameter.shape, generator=generator))
    return denoiser


def fresh(out, config, frozen) -> None:
    denoiser = awake(families.build(config, frozen, torch.zeros(384), torch.ones(384), 16, 0), 1)
    card = SamplingCard(**families.family_of(config), **CARD, prompt_max_tokens=16)
    write_checkpoint(out, denoiser, card, frozen)


def adapted(out, init, root, seed: int, before=None):
    """A LoRA of the SD3 checkpoint in `init`; with `before`, its file holds both and is for the root."""
    denoiser = families.load(init / "transformer", read_card(init))
    add_lora(denoiser, LoraConfig(rank=2, targets=("to_q", "to_v")), 0)
    adapter = lora_files.from_module(awake(denoiser, seed).transformer, {"base": root.digest})
    adapter = adapter if before is None else stacked(before, adapter)
    save_forms(adapter, out / "adapter", "lora", "sd3")
    write_checkpoint(out, merge(denoiser), read_card(init), init)
    return adapter


@pytest.fixture
def served(committed, sd3_folder, vae, tmp_path) -> Iterator[Engine]:
    store, commit = committed
    told = CARD | {"prompt_max_tokens": 32}
    model = commit("model", None, lambda out: take_over(str(sd3_folder), out, told))
    held = []
    sft = commit("sft", model, lambda out: held.append(adapted(out, store.local(model), model, 1)))
    dpo = commit("dpo", sft, lambda out: adapted(out, store.local(sft), model, 2, held[0]))
    vae().save_pretrained(tmp_path / "frozen" / "vae")
    small = LatentPrxConfig(hidden_size=32, depth=1, num_heads=2, mlp_ratio=2.0)
    latent = commit("latent", None, lambda out: fresh(out, small, tmp_path / "frozen"))
    unet = commit("unet", None, lambda out: fresh(out, UNetConfig(channels=(8, 16), head_dim=4), None))
    stages = [
        {"name": each.stage, "key": each.uri.rstrip("/").rsplit("/", 1)[-1], "digest": each.digest}
        for each in (model, sft, dpo, latent, unet)
    ]
    store.write_run("toy", {"name": "demo", "stages": stages, "outcome": "ok"})
    engine = Engine(models_of(store, "toy"), ServeConfig(threads=1, drain_seconds=5, batch=1))
    yield engine
    engine.end()


def test_every_family_is_served_as_its_checkpoint_draws_adapters_on_their_root(served) -> None:
    client, models = TestClient(create_app(served, ServeConfig())), served.models

    def ask(**more) -> np.ndarray:
        item = client.post(IMAGES, json={"prompt": "two cats", "seed": 3, **more}).json()["data"][0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))), int)

    for name in ("model", "dpo", "latent", "unet"):
        want = load_generator(models.find(name).folder).sample(["two cats"], [3], batch_size=1)[0]
        assert np.abs(ask(model=name) - want).max() <= 1, name
        assert want.std() > 5
    assert models.fitting(models.find("model")) == {"sft": True, "dpo": True}
    assert models.fitting(models.find("sft")) == {}  # dpo's file holds sft's changes too
    plain, mixed = ask(model="model"), ask(model="model", loras={"dpo": 1.0})
    assert np.abs(mixed - ask(model="dpo")).max() <= 1 < np.abs(mixed - plain).max()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model": "model", "prompt": "a cat that sits on a mat"}, "the model reads 16; shorten it"),
        ({"model": "model", "size": "18x16"}, "multiples of 4"),
        ({"model": "model", "size": "64x16"}, "has positions for 32 px along a side"),
        ({"model": "latent", "size": "18x16"}, "multiples of 4"),
        ({"model": "unet", "size": "17x16"}, "multiples of 2"),
        ({"model": "unet", "loras": {"sft": 1.0}}, "LoRA 'sft' does not go with model 'unet'"),
    ],
)
def test_what_a_family_cannot_draw_is_refused_with_its_limit(served, more, says) -> None:
    answer = TestClient(create_app(served, ServeConfig())).post(IMAGES, json={"prompt": "a cat", **more})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
