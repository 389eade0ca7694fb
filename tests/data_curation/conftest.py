"""Stages run by hand: what a stage function is given, its inputs being folders that others left beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.stages import Resources, StageContext, fan_out_here, no_progress


@pytest.fixture(scope="session")
def context() -> Callable[..., StageContext]:
    def make(root: Path, name: str, **inputs: str) -> StageContext:
        out, scratch = root / name, root / f"{name}.scratch"
        out.mkdir()
        scratch.mkdir(exist_ok=True)
        folders = {role: root / stage for role, stage in inputs.items()}
        return StageContext(name, folders, {}, out, scratch, Resources(), no_progress, fan_out_here)

    return make


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of two small towers with its image processor, as a person would have it on a disk."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **small)
    config = CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=99, projection_dim=16, **small).to_dict(),
        vision_config=vision.to_dict(), projection_dim=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
