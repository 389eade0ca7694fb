"""What may be taken over from a foreign folder, and what is refused with which words."""

import json
import shutil

import pytest

from infra.errors import ConfigError, DataRefused
from models.networks.diffusers_folder import find, take
from models.networks.take_over import take_over


@pytest.fixture
def copy(sd3_folder, tmp_path):
    return shutil.copytree(sd3_folder, tmp_path / "copy")


def rewrite(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sound_folder_is_found(copy) -> None:
    found = find(str(copy))
    assert (found.family, found.revision) == ("sd3", None)


def test_what_is_no_folder_and_no_hub_id(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no folder here and no hub id"):
        find("nothing here")
    with pytest.raises(ConfigError, match=r"'nobody/nothing@abc' is no folder here and cannot be had from the hub"):
        find("nobody/nothing@abc")
    with pytest.raises(ConfigError, match="is not a diffusers folder"):
        find(str(tmp_path))


def test_another_pipeline_is_named_with_those_supported(copy) -> None:
    rewrite(copy / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ConfigError, match="is a FluxPipeline; supported are StableDiffusion3Pipeline, PRXPipeline"):
        find(str(copy))


def test_pickles_instead_of_safetensors_are_refused_and_beside_them_left_out(copy, tmp_path) -> None:
    (copy / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    take(copy, tmp_path / "taken")
    assert not list((tmp_path / "taken").rglob("*.bin"))
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataRefused, match=r"only as diffusion_pytorch_model.bin, a pickle, which can run code"):
        find(str(copy))


def test_missing_parts_are_named(copy) -> None:
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataRefused, match=r"transformer has no .safetensors weights"):
        find(str(copy))
    shutil.rmtree(copy / "transformer")
    with pytest.raises(DataRefused, match=r"transformer is missing, though model_index.json lists it"):
        find(str(copy))


def test_only_a_t5_may_be_missing(copy) -> None:
    rewrite(copy / "model_index.json", text_encoder=[None, None])
    with pytest.raises(DataRefused, match="has no text_encoder; only text_encoder_3, tokenizer_3 may be missing"):
        find(str(copy))


def test_another_scheduler_is_refused(copy, tmp_path) -> None:
    rewrite(copy / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    with pytest.raises(ConfigError, match="scheduler DDIMScheduler is not supported"):
        take_over(str(copy), tmp_path / "out", {})


def test_the_folder_is_copied_not_linked(copy, tmp_path) -> None:
    card, _ = take_over(str(copy), tmp_path / "out", {})
    assert card.side == 16  # the transformer's sample size in the VAE's units
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").rglob("*.safetensors"))
