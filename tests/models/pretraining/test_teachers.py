"""Vision transformers other than DINOv2: with a class token, without one, with registers; each hands out its patches."""

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
)

from models.pretraining.teachers import IMAGENET_MEAN, IMAGENET_STD, TransformerTeacher

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
BEFORE = {"clip": 1, "siglip": 0, "registers": 5}  # tokens that are no patches: class token, four registers


def network(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {**SMALL, "intermediate_size": 16}
    match kind:
        case "clip":
            return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))
        case "siglip":
            return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision))
        case _:
            return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4))


@pytest.mark.parametrize("kind", list(BEFORE))
def test_the_patches_of_any_vision_transformer_in_their_order(kind: str, tmp_path: Path) -> None:
    model = network(kind).eval()
    model.save_pretrained(tmp_path)
    teacher = TransformerTeacher(str(tmp_path))
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = teacher(images, (4, 4))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():  # at the size the model was made for nothing is resized
        states = getattr(model, "vision_model", model)((images / 2 + 0.5 - mean) / std).last_hidden_state
    assert states.shape[1] == BEFORE[kind] + 16
    by_hand = torch.stack([states[:, BEFORE[kind] + place] for place in range(16)], 1).view(2, 4, 4, 16)
    torch.testing.assert_close(features, by_hand, atol=1e-4, rtol=1e-4)
    assert teacher.width == 16
    assert not any(p.requires_grad for p in teacher.model.parameters())
    wide = teacher(torch.nn.functional.pad(images, (0, 28)), (4, 8))
    assert wide.shape == (2, 4, 8, 16)
    assert not torch.allclose(wide[:, :, :4], wide[:, :, 4:], atol=1e-3)
