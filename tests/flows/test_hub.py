"""A foreign SD3 folder tuned as LoRA on pictures of one's own by the preset, through the command line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PRESET = Path(__file__).resolve().parents[2] / "presets" / "posttrain-hub.yaml"
TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1, "ema_gamma": 3.0,
         "optimizer": {"muon_lr": None, "adamw_lr": 0.02, "warmup_steps": 0}}  # fmt: skip
SMALL = {
    "data.buckets.resolutions": [{"side": 16, "aspects": "square"}], "data.buckets.patch": 4,
    "data.download": {"processes": 1, "threads": 2}, "posttrain.sft.select.resolutions": [16],
    "posttrain.sft.train": TRAIN, "posttrain.dpo.train": TRAIN, "posttrain.grpo.train": TRAIN,
    "posttrain.sft.lora.rank": 2, "posttrain.dpo.lora.rank": 2, "posttrain.grpo.lora.rank": 2,
    "posttrain.pairs": {"source": "data", "prompts": 20, "steps": 2, "guidance": 2.0},
    "posttrain.reward_model": {"validation": 0.5, "calibration": 0.5, "train": {"steps": 4, "batch_size": 4, "log_every": 2, "checkpoint_every": 2}},
    "posttrain.grpo.prompts": {"count": 8, "side": 16}, "posttrain.grpo.group": 2, "posttrain.grpo.steps": 3,
    "posttrain.grpo.window": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, captioned) -> Path:
    return captioned(tmp_path_factory.mktemp("pictures"), 24, 96)


def command(verb: str, model: Path, pictures: Path, root: Path, **more: object) -> dict:
    sets = {"model": str(model), "data.source": str(pictures), **SMALL}
    sets |= {key.replace("__", "."): value for key, value in more.items()}
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
    assert names[6:] == [
        "model",
        "features",
        "sft",
        "pairs",
        "reward-model",
        "grpo",
        "dpo",
        "pictures",
        "export",
        "report",
    ]


@pytest.fixture
def judged(clip_folder, mask2former_folder, tmp_path) -> dict:
    """Hub rewards train, rank and watch; GenEval's prompts are drawn and read by a detector."""
    shutil.copytree(clip_folder, tmp_path / "watch")
    prompts = [{"tag": "single_object", "prompt": "a photo of a cat", "include": [{"class": "cat", "count": 1}]},
               {"tag": "colors", "prompt": "a photo of a red dog", "include": [{"class": "dog", "count": 1, "color": "red"}]}]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    clip = {"model": str(clip_folder)}
    return {
        "posttrain__sft": None, "posttrain__reward_model": None, "posttrain__pairs": {"prompts": 6, "group": 2, "steps": 2, "hub": clip, "min_gap": 0.0},
        "posttrain__grpo__rewards": [{"kind": "hub", "hub": clip}],
        "posttrain__grpo__guard": {"every": 1, "prompts": 2, "seeds": 2, "held_out": {"model": str(tmp_path / "watch"), "kind": "hps", "role": "held_out"}},
        "evaluate": {"bootstrap": 20, "geneval": {"path": str(tmp_path / "prompts.jsonl"), "pictures": 2}, "rewards": [clip],
                     "detector": {"model": str(mask2former_folder("cat", "dog")), "clip": clip}},
    }  # fmt: skip


@pytest.mark.lifecycle
@pytest.mark.prefect
@pytest.mark.timeout(600)
def test_a_foreign_pipeline_is_tuned_and_judged_by_models_of_the_hub(sd3_folder, pictures, judged, tmp_path) -> None:
    record = command("run", sd3_folder, pictures, tmp_path / "runs", **judged)
    assert record["outcome"] == "ok"
    stages = [stage["name"] for stage in record["stages"]]
    assert stages[6:] == ["model", "features", "pairs", "grpo", "dpo", "pictures", "evaluate", "export", "report"]
    (place,) = (tmp_path / "runs" / "evaluate").glob("*/scores.json")
    scores = json.loads(place.read_text())
    assert scores["scores"].keys() == {"model", "grpo", "dpo"}
    assert scores["parents"] == {"grpo": "model", "dpo": "model"}
    assert {"geneval", "hub_pickscore_geneval"} <= scores["deltas"]["grpo"].keys()
    page = Path(record["report"]).read_text()
    assert "geneval" in page and "pictures of model" not in page and "Prompt accuracy by layout" not in page
    again = command("run", sd3_folder, pictures, tmp_path / "runs", **judged)
    assert {stage["status"] for stage in again["stages"]} == {"reused"}


def test_a_plan_with_a_model_that_cannot_be_asked_ends_with_the_reason(tmp_path, pictures, clip_folder) -> None:
    (tmp_path / "model").mkdir()
    wrong = {"detector": {"model": str(clip_folder)}}
    t2i = [sys.executable, "-m", "flows.cli", "plan", str(PRESET), "--root", str(tmp_path / "runs"),
           "--set", f"model={tmp_path / 'model'}", "--set", f"data.source={pictures}", "--set", f"evaluate={json.dumps(wrong)}"]  # fmt: skip
    done = subprocess.run(t2i, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is of type 'clip'; one of mask2former, detr" in done.stderr
