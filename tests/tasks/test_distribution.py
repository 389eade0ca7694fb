"""The stage on a small training set: real pictures are near real ones, an untrained checkpoint is not, a copier is caught."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data_curation.encode import CAPTIONS_SCHEMA, INDEX_SCHEMA
from data_curation.filter_config import HubEmbedder
from data_curation.manifest import write_table
from data_curation.scenes import all_scenes, draw_batch, short_caption
from infra.errors import DataRefused
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig
from tasks import distribution
from tasks.config import DistributionConfig

SPLITS = {"train": 60, "validation": 120}


@pytest.fixture(scope="module")
def training_set(tmp_path_factory) -> Path:
    """60 + 120 drawings at 32 px with their captions."""
    folder = tmp_path_factory.mktemp("data")
    every = all_scenes("basic")
    scenes = [every[i] for i in np.random.default_rng(0).permutation(len(every))[:180]]
    captions = ["", *sorted({short_caption(scene) for scene in scenes})]
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    index = [
        {"row_id": str(i), "resolution": 32, "width": 32, "height": 32, "position": i, "domain": "basic", "split": split,
         "caption_short": captions.index(short_caption(scene)), "caption_long": 0}
        for i, (scene, split) in enumerate(zip(scenes, splits, strict=True))
    ]  # fmt: skip
    write_table(index, INDEX_SCHEMA, folder / "index.parquet")
    write_table(
        [{"id": i, "text": text} for i, text in enumerate(captions)], CAPTIONS_SCHEMA, folder / "captions.parquet"
    )
    text = {"tokens": np.ones((1, 4), np.float16), "offsets": np.zeros(len(captions) + 1, np.int64)}
    save_file(text | {"mean": np.zeros(4, np.float32), "std": np.ones(4, np.float32)}, folder / "text.safetensors")
    teacher = np.zeros((180, 8, 8, 0), np.float16)
    save_file({"images": draw_batch(scenes, 32, 0), "teacher": teacher}, folder / "images-32x32.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A network that was never trained."""
    (tmp_path / "checkpoint").mkdir()
    config = PrxConfig(hidden_size=32, depth=1, num_heads=2, patch_size=4, text_dim=384, prompt_max_tokens=32)
    card = SamplingCard(steps=1, guidance=1.0, side=32, prompt_max_tokens=32)
    write_checkpoint(tmp_path / "checkpoint", prx.build(config, torch.zeros(384), torch.ones(384), seed=0), card)
    return tmp_path / "checkpoint"


def measured(config: DistributionConfig, folder: Path, **inputs: Path) -> dict:
    out = folder / f"out-{len(list(folder.iterdir()))}"
    out.mkdir()
    context = StageContext("distribution", inputs, {}, out, out, Resources(), no_progress, fan_out_here)
    distribution.measure_distribution(config, context)
    return json.loads((out / "distribution.json").read_text()) | {"out": out}


def test_an_untrained_checkpoint_is_far_and_the_floor_is_near(training_set, checkpoint, clip_folder, tmp_path):
    save_file({"weight": np.ones((1, 16)), "bias": np.zeros(1)}, tmp_path / "head.safetensors")
    config = DistributionConfig(
        embedder=HubEmbedder(model=str(clip_folder)), aesthetic=tmp_path / "head.safetensors", bootstrap=40,
        rewards=({"model": str(clip_folder), "kind": "hps"},),
    )  # fmt: skip
    found = measured(config, tmp_path, data=training_set, start=checkpoint)
    floor, scores = found["scores"]["real"], found["scores"]["start"]
    assert (found["pictures"], found["training"], found["resolution"]) == (60, 60, 32)
    assert found["embedding"]["features"] == 16
    assert floor["kernel_distance"]["low"] < 0 < floor["kernel_distance"]["high"] < scores["kernel_distance"]["low"]
    assert scores["coverage"]["high"] < floor["coverage"]["low"]
    assert set(scores) - set(floor) == {"copied"}
    assert {"image_text", "aesthetic", "hub_hps"} < set(floor)
    for name in ("real", "start"):  # the same CLIP, asked in two ways
        assert found["scores"][name]["hub_hps"]["value"] == pytest.approx(
            found["scores"][name]["image_text"]["value"], abs=1e-4
        )
    assert found["models"]["hub_hps"].startswith("clip")
    assert (found["out"] / "nearest-start.png").exists()
    again = measured(config, tmp_path, data=training_set, start=checkpoint)
    assert again["scores"] == found["scores"]


def test_a_copier_is_caught(training_set, checkpoint, tmp_path, monkeypatch):
    data = distribution.TrainingSet.open(training_set)
    learnt = distribution.held(data, 32, "train", "short", 60, 0).images
    monkeypatch.setattr(distribution, "draw", lambda job: np.stack(learnt)[: len(job.prompts)])
    found = measured(DistributionConfig(bootstrap=20), tmp_path, data=training_set, copier=checkpoint)
    assert found["scores"]["copier"]["copied"]["value"] == 1.0
    assert found["embedding"]["model"].startswith("efficientnet-lite0 at 128 px")


def test_too_few_held_out_pictures_are_refused(training_set, checkpoint, tmp_path, monkeypatch):
    few = distribution.held(distribution.TrainingSet.open(training_set), 32, "validation", "short", 70, 0)
    monkeypatch.setattr(distribution, "held", lambda *a: few)
    with pytest.raises(DataRefused, match="holds out 70 pictures at 32 px and needs 80"):
        measured(DistributionConfig(), tmp_path, data=training_set, start=checkpoint)
