"""A model of a folder of pictures from scratch, without the demo's judge: every stage at toy size, then all of them reused."""

import json
from pathlib import Path

import pytest

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.run import Run
from infra.config import load_yaml, parse

PRESET = Path(__file__).resolve().parents[2] / "presets" / "own-pictures.yaml"
NETWORK = {"hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "ema_gamma": 3.0, "sample_every": None}
SMALL = {
    "data.download": {"processes": 1, "threads": 2}, "data.buckets.validation_share": 0.2, "distribution": None,
    "pretrain.0.repa": {"hidden": 16, "layer": 1}, "pretrain.1.select.resolutions": [32, 40],
    "posttrain.pairs": {"source": "data", "prompts": 8, "steps": 1, "guidance": 1.0}, "evaluate.grid_prompts": 20,
    **{f"{stage}.network": NETWORK for stage in ("pretrain.0", "pretrain.1", "posttrain.sft")},
    **{f"{stage}.sampling": {"steps": 1, "guidance": 1.0} for stage in ("pretrain.0", "pretrain.1", "posttrain.sft")},
    **{f"{stage}.train": TRAIN for stage in ("pretrain.0", "pretrain.1", "posttrain.sft", "posttrain.dpo", "distill.0", "distill.1")},
    "run.resources": {"launcher": "inprocess", "num_workers": 1, "threads_per_worker": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, captioned) -> Path:
    return captioned(tmp_path_factory.mktemp("pictures"), 60, 72)


@pytest.mark.slow
def test_a_folder_becomes_students_and_a_page_and_a_second_run_reuses_all(pictures, tmp_path) -> None:
    sets = {"data.source": str(pictures), "run.root": str(tmp_path / "runs"), **SMALL}
    config = parse(
        LifecycleConfig, load_yaml(PRESET, [f"{key}={json.dumps(value)}" for key, value in sets.items()]), "own"
    )

    def run(name: str) -> dict:
        return Run(
            name, stage_specs(config), config.run, {"name": "own", "config": config.model_dump(mode="json")}
        ).execute()

    first = run("first")
    assert first["outcome"] == "ok"
    assert {stage["status"] for stage in first["stages"]} == {"ran"}
    assert first["exports"].keys() == {"teacher", "student-4", "student-1"}
    assert first["funnel"]["received"] == 60
    page = Path(first["report"]).read_text()
    for part in ("<th>distill-1</th>", "No judge knows what these should show", "trained on", "dpo: loss", "Buckets"):
        assert part in page, part
    for part in ('id="scores"', "both judges", "OpenMoji", "right)"):
        assert part not in page, part
    assert (Path(first["report"]).parent / "headline.png").exists()
    (grid,) = (tmp_path / "runs" / "pictures").glob("*/grid.json")
    drawn = json.loads(grid.read_text())
    assert drawn["stages"] == ["pretrain-32", "continue", "sft", "dpo", "distill-4", "distill-1", "real"]
    assert 0 < sum(drawn["held_out"]) < len(drawn["held_out"]) == len(set(drawn["prompts"]))
    assert drawn["held_out"] == sorted(drawn["held_out"], reverse=True)
    assert {stage["status"] for stage in run("second")["stages"]} == {"reused"}
