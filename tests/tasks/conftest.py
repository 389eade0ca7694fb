"""What stages of post-training start from, small and random."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.manifest import write_table
from data_curation.scenes import SUBJECT_OBJECTS, Scene, all_scenes
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.judge import Judge, Vocabulary
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A judge, an encoded training set of random pictures, and a random checkpoint."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    subjects = [Scene("big", (name,), "white") for name in SUBJECT_OBJECTS]
    Judge.build(Vocabulary.of([*all_scenes("full"), *subjects]), 4, 16, 0.5).save(root / "judge")
    small = PrxConfig(hidden_size=32, depth=1, num_heads=2, patch_size=4, mlp_ratio=2.0)
    denoiser = prx.build(small, torch.zeros(small.text_dim), torch.ones(small.text_dim), 0)
    torch.nn.init.normal_(denoiser.transformer.final_layer.linear.weight)
    write_checkpoint(root / "sft", denoiser, SamplingCard(steps=2))
    data, dim = root / "data", small.text_dim
    data.mkdir()
    row = {
        "resolution": 32,
        "width": 32,
        "height": 32,
        "caption_short": 1,
        "caption_long": 1,
        "domain": "basic",
        "split": "train",
    }
    write_table([{**row, "row_id": str(i), "position": i} for i in range(8)], INDEX_SCHEMA, data / "index.parquet")
    captions = ("", "a cat", *(f"a cat and {n} dogs" for n in range(10)))
    write_table(
        [{"id": i, "text": text} for i, text in enumerate(captions)], CAPTIONS_SCHEMA, data / "captions.parquet"
    )
    rng = np.random.default_rng(0)
    text = {"tokens": rng.normal(size=(15, dim)).astype(np.float16), "offsets": np.array([0, 2, 5, *range(6, 16)])}
    save_file(text | {"mean": np.zeros(dim, np.float32), "std": np.ones(dim, np.float32)}, data / "text.safetensors")
    images = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    save_file({"images": images, "teacher": np.zeros((8, 8, 8, 0), np.float16)}, data / "images-32x32.safetensors")
    return {"judge": root / "judge", "init": root / "sft", "data": data}


@pytest.fixture(scope="session")
def context() -> Callable[..., StageContext]:
    """A stage's context with its own folders."""

    def make(name: str, inputs: dict[str, Path], folder: Path) -> StageContext:
        out, scratch = folder / f"{name}-out", folder / f"{name}-scratch"
        out.mkdir()
        scratch.mkdir()
        return StageContext(name, inputs, {}, out, scratch, Resources(), no_progress, fan_out_here)

    return make
