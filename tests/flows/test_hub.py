"""A foreign SD3 folder tuned as LoRA on pictures of one's own by the preset, through the command line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_curation.scenes import all_scenes, draw_batch, short_caption

PRESET = Path(__file__).resolve().parents[2] / "presets" / "posttrain-hub.yaml"
TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "ema_gamma": 3.0,
         "optimizer": {"muon_lr": None, "adamw_lr": 0.02, "warmup_steps": 0}}  # fmt: skip
SMALL = {
    "data.buckets.resolutions": [{"side": 16, "aspects": "square"}], "data.buckets.patch": 4,
    "data.download": {"processes": 1, "threads": 2}, "posttrain.sft.select.resolutions": [16],
    "posttrain.sft.train": TRAIN, "posttrain.dpo.train": TRAIN, "posttrain.grpo.train": TRAIN,
    "posttrain.sft.lora.rank": 2, "posttrain.dpo.lora.rank": 2, "posttrain.grpo.lora.rank": 2,
    "posttrain.pairs": {"source": "data", "prompts": 20, "steps": 2, "guidance": 2.0},
    "posttrain.reward_model": {"validation": 0.5, "train": {"steps": 4, "batch_size": 4, "log_every": 2, "checkpoint_every": 2}},
    "posttrain.grpo.prompts": {"count": 8, "side": 16}, "posttrain.grpo.group": 2, "posttrain.grpo.steps": 3,
    "posttrain.grpo.window": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    scenes = all_scenes("full")[::37][:24]
    for i, (scene, image) in enumerate(zip(scenes, draw_batch(scenes, 96, 0), strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(short_caption(scene))
    return folder


def command(verb: str, model: Path, pictures: Path, root: Path) -> dict:
    sets = {"model": str(model), "data.source": str(pictures), **SMALL}
    options = [part for key, value in sets.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    t2i = [sys.executable, "-m", "flows.cli", verb, str(PRESET), "--root", str(root), "--json", *options]
    done = subprocess.run(t2i, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.lifecycle
@pytest.mark.prefect
@pytest.mark.timeout(600)
def test_sft_dpo_and_grpo_as_lora_on_a_foreign_pipeline(sd3_folder, pictures, tmp_path) -> None:
    from diffusers import StableDiffusion3Pipeline

    record = command("run", sd3_folder, pictures, tmp_path / "runs")
    assert record["outcome"] == "ok"
    assert {"sft", "pairs", "reward-model", "grpo", "dpo", "export"} <= {stage["name"] for stage in record["stages"]}
    drawn = {}
    for name in ("sft", "grpo", "dpo"):
        merged, adapted = (
            StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
            for folder in (record["exports"][name], sd3_folder)
        )
        adapted.load_lora_weights(str(Path(record["exports"][name]) / "adapter"))
        for which, pipe in (("merged", merged), ("adapted", adapted)):
            pipe.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            drawn[name, which] = pipe("a cat", num_inference_steps=3, output_type="np", generator=generator).images
        assert np.abs(drawn[name, "merged"] - drawn[name, "adapted"]).max() <= 1e-5  # grpo's and dpo's hold sft's too
    assert np.abs(drawn["sft", "merged"] - drawn["dpo", "merged"]).max() > 1e-6
    again = command("run", sd3_folder, pictures, tmp_path / "runs")
    assert {stage["status"] for stage in again["stages"]} == {"reused"}


def test_the_preset_is_a_plan(tmp_path, pictures) -> None:
    (tmp_path / "model").mkdir()
    rows = command("plan", tmp_path / "model", pictures, tmp_path / "runs")
    names = [row["stage"] for row in rows]
    assert names[6:] == ["model", "features", "sft", "pairs", "reward-model", "grpo", "dpo", "export"]
