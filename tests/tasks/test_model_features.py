"""Latents of a training set: the same whatever was kept before, encoded once, told apart by the VAE."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.networks.codec import load_vae
from tasks.model_features import CHUNK, encode_bucket, latent_space
from tasks.training_data import to_model

COUNT = CHUNK + 5


def test_latents_do_not_depend_on_what_was_kept_and_are_encoded_once(sd3_folder: Path, tmp_path: Path) -> None:
    vae = load_vae(sd3_folder / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 24, 3), np.uint8)
    pixels[7] = pixels[3]  # the same picture twice
    kept = latent_space(str(tmp_path / "root"), sd3_folder)
    found = {}
    for name, space, rows in (
        ("nothing", latent_space(None, sd3_folder), pixels), ("half", kept, pixels[9:13]), ("rest", kept, pixels), ("warm", kept, pixels),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        save_file({"images": rows}, tmp_path / name / "images-24x16.safetensors")
        count, made = encode_bucket(
            vae, tmp_path / name / "images-24x16.safetensors", tmp_path / name, space, space.index()
        )
        found[name] = count, made, load_file(tmp_path / name / "latents-24x16.safetensors")["moments"]
    assert [found[name][:2] for name in found] == [(COUNT, COUNT - 1), (4, 4), (COUNT, COUNT - 5), (COUNT, 0)]
    assert np.array_equal(found["nothing"][2], found["rest"][2])
    assert np.array_equal(found["nothing"][2], found["warm"][2])
    assert found["nothing"][2] == pytest.approx(vae.moments(to_model(pixels)).numpy(), abs=1e-5)


def test_another_vae_has_a_space_of_its_own(sd3_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd3_folder / "vae", tmp_path / "vae")
    assert latent_space(None, tmp_path) == latent_space(None, sd3_folder)
    path = next((tmp_path / "vae").glob("*.safetensors"))
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, path)
    assert latent_space(None, tmp_path) != latent_space(None, sd3_folder)
