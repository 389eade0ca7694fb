"""A subject that is learnt until nothing more is gained, through the stage function, at toy size with the real text encoder."""

import pytest
import torch
from safetensors.torch import load_file

from infra.errors import ConfigError
from models.personalization import lora_files

UNTIL = {"every": 2, "patience": 1, "gain": 2.0, "pictures": 2}  # no look can gain as much
TRAIN = {"steps": 9, "batch_size": 4, "ema_gamma": 0.0,
         "optimizer": {"muon_lr": None, "adamw_lr": 0.05, "warmup_steps": 0}}  # fmt: skip


def test_it_ends_early_and_says_what_it_saw(pictures_of, learn) -> None:
    facts, out = learn("dreambooth-toy", pictures_of(), train=TRAIN, until=UNTIL)
    assert [look["step"] for look in facts["looks"]] == [0, 2]
    assert facts["steps"] == 2
    assert facts["looks"][0]["drift"] == 0 < facts["looks"][1]["drift"]
    assert facts["taken"] == max(facts["looks"], key=lambda look: look["similarity"])["step"]
    weights = load_file(out / "adapter" / lora_files.PEFT_FILE)
    moved = [bool(value.any()) for name, value in weights.items() if name.endswith("lora_B.weight")]
    assert all(moved) == any(moved) == (facts["taken"] > 0)


def test_drift_that_is_too_great_leaves_the_base(places, pictures_of, learn) -> None:
    facts, out = learn("dreambooth-toy", pictures_of(), train=TRAIN, until={**UNTIL, "max_drift": 1e-12})
    assert facts["taken"] == 0
    before, after = (
        load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors") for folder in (places["init"], out)
    )
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


def test_text_that_moves_too_is_refused(pictures_of, learn) -> None:
    with pytest.raises(
        ConfigError, match="until takes back weights of the denoiser alone, and text moves others; set one"
    ):
        learn("dreambooth-toy", pictures_of(), train=TRAIN, until=UNTIL, text={})
