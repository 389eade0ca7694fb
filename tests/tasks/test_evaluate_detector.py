"""A detector in the judge's place, GenEval's file and hub rewards, through the stages and in the plan."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_curation.scenes import SUBJECT_OBJECTS, Scene, all_scenes, draw_batch
from flows.config import LifecycleConfig
from flows.dag import stage_specs
from infra.config import parse, versioned
from infra.errors import ConfigError, DataRefused, GateFailed
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.detector import detector
from models.evaluation.geneval import Found, answer, read_prompts, surest
from models.evaluation.judge import Judge, Vocabulary
from models.evaluation.prompt_categories import Asked, Seen, answered, arranged, by_category
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig
from models.posttraining.clip_reward import hub_scores
from tasks.config import EvaluateConfig
from tasks.evaluate import evaluate
from tasks.evaluate_detector import faults_of, file_prompts, seen_by_detector
from tasks.prompt_scores import measure_prompts

LINES = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "single_object", "include": [{"class": "rocket", "count": 1}], "prompt": "a photo of a rocket"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}],
     "prompt": "a photo of two cats"},
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "blue"}], "prompt": "a photo of a blue cat"},
]  # fmt: skip
VOCABULARY = Vocabulary.of([*all_scenes("full"), *(Scene("big", (name,), "white") for name in SUBJECT_OBJECTS)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def config(file, clip_folder, mask2former_folder) -> EvaluateConfig:
    clip, segmenter = str(clip_folder), str(mask2former_folder(*VOCABULARY.objects))
    return EvaluateConfig.model_validate({
        "sets": [{"name": "held_out_basic", "prompts": 6}], "diversity_prompts": 0, "bootstrap": 20, "grid_prompts": 4,
        "detector": {"model": segmenter, "clip": {"model": clip}, "confidence": 0.02, "counting_confidence": 0.05, "batch_size": 5},
        "geneval": {"path": str(file), "pictures": 2}, "rewards": [{"model": clip}, {"model": clip, "kind": "hps", "name": "taste"}],
        "refuse_collapsed": False,
    })  # fmt: skip


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    Judge.build(VOCABULARY, 4, 16, 0.5).save(tmp_path / "judge")
    small = PrxConfig(hidden_size=32, depth=1, num_heads=2, patch_size=4, mlp_ratio=2.0)
    denoiser = prx.build(small, torch.zeros(small.text_dim), torch.ones(small.text_dim), 0)
    torch.nn.init.normal_(denoiser.transformer.final_layer.linear.weight)
    write_checkpoint(tmp_path / "model", denoiser, SamplingCard(steps=1))
    shutil.copytree(tmp_path / "model", tmp_path / "sft")
    return {"judge": tmp_path / "judge", "model": tmp_path / "model", "sft": tmp_path / "sft"}


def context(name: str, inputs: dict[str, Path], folder: Path) -> StageContext:
    (folder / f"{name}-out").mkdir()
    return StageContext(name, inputs, {}, folder / f"{name}-out", folder, Resources(), no_progress, fan_out_here)


def box(name: str, left: float, top: float, side: float = 12.0) -> Found:
    return Found(name, 0.9, (left, top, left + side, top + side))


def test_an_arrangement_is_told_from_boxes() -> None:
    size = (60, 60)

    def seen(*found: Found) -> Seen:
        return arranged(found, size, "pink")

    assert seen(box("cat", 24, 24)) == Seen(("cat",), "big", "pink", True, 1)
    corners = {(4, 4): "top left", (44, 4): "top right", (4, 44): "bottom left", (44, 44): "bottom right"}
    assert {place: seen(box("cat", *place)).layout for place in corners} == corners
    assert seen(box("dog", 40, 24), box("cat", 4, 24)) == Seen(("cat", "dog"), "beside", "pink", True, 2)
    assert seen(box("dog", 26, 44), box("cat", 24, 4)) == Seen(("cat", "dog"), "above", "pink", True, 2)
    assert seen(box("dog", 24, 44), box("cat", 26, 4)) == Seen(("cat", "dog"), "above", "pink", True, 2)
    three = seen(*(box("cat", 20 * i, 24) for i in range(3)))
    assert (three.layout, three.count) == ("three", 3)
    assert seen(*(box("cat", 12 * i, 24) for i in range(5))).count == 5
    assert not seen().accepted
    asked = Asked.of(Scene("three", ("cat",), "pink"))
    assert answered(asked, three)["all"]
    assert not answered(asked, seen(*(box("cat", 12 * i, 24) for i in range(4))))["count"]
    assert answered(Asked.of(Scene("beside", ("cat", "dog"), "pink")), seen(box("cat", 4, 24), box("dog", 40, 24)))[
        "all"
    ]
    assert not answered(Asked.of(Scene("beside", ("dog", "cat"), "pink")), seen(box("cat", 4, 24), box("dog", 40, 24)))[
        "all"
    ]


def test_the_stage_scores_the_file_and_the_categories_by_the_detector(config, inputs, tmp_path, file) -> None:
    ctx = context("evaluate", inputs, tmp_path)
    evaluate(config, ctx)
    record = json.loads((ctx.out / "scores.json").read_text())
    rows = [json.loads(line) for line in (ctx.out / "geneval.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if row["stage"] == "sft"] == [
        line["prompt"] for line in LINES for _ in range(2)
    ]
    assert len({row["seed"] for row in rows if row["stage"] == "sft"}) == 8
    scores = record["scores"]["sft"]
    for tag in ("single_object", "counting", "colors"):
        right = [not row["wrong"] for row in rows if row["stage"] == "sft" and row["tag"] == tag]
        assert scores[f"geneval_{tag}"]["value"] == pytest.approx(np.mean(right))
    assert 0 < sum(bool(row["wrong"]) for row in rows) < len(rows)
    tags = [scores[f"geneval_{tag}"]["value"] for tag in ("single_object", "counting", "colors")]
    assert scores["geneval"]["value"] == pytest.approx(np.mean(tags), abs=1e-5)
    assert {"hub_pickscore", "hub_taste", "hub_pickscore_geneval", "hub_taste_geneval"} <= scores.keys()
    assert record["models"]["detector"].startswith("mask2former")
    assert record["models"].keys() == {"detector", "colours", "hub_pickscore", "hub_taste"}
    assert "geneval" not in record["real"]  # there is no real picture of these prompts
    assert "hub_pickscore" in record["real"]
    assert record["scores"]["model"] == record["scores"]["sft"]  # the same weights draw the same


def test_pictures_get_what_the_parts_say_of_them(config) -> None:
    """`faults_of` and `seen_by_detector` against the detector, the rules and the layouts asked one by one."""
    assert config.geneval is not None
    assert config.detector is not None
    prompts, eye = file_prompts(config.geneval), config.detector
    images = np.random.default_rng(0).integers(0, 256, (8, 48, 48, 3), dtype=np.uint8)
    prompts = [prompt for prompt in prompts if not prompt.asks_colour]
    faults = faults_of(config, prompts, images[:6], 2)
    names = sorted({name for prompt in prompts for name in prompt.names})
    for i, image in enumerate(images[:6]):
        found = detector(eye)([Image.fromarray(image)], names, 0.0)[0]
        above = eye.counting_confidence if prompts[i // 2].tag == "counting" else eye.confidence
        assert faults[i] == answer(prompts[i // 2], surest(found, above), lambda objects, name: [])
    seen = seen_by_detector(eye, VOCABULARY.objects, VOCABULARY.backgrounds, images)
    assert len(seen) == 8
    assert {each.background for each in seen} <= set(VOCABULARY.backgrounds)
    for image, each in zip(images, seen, strict=True):
        kept = surest(detector(eye)([Image.fromarray(image)], VOCABULARY.objects, eye.confidence)[0], eye.confidence)
        assert each.count == sum(map(len, kept.values()))
    assert by_category([Asked(("cat",))] * 8, seen).keys() == {"all", "single_object"}


def test_a_foreign_model_is_scored_by_the_file_alone(config, inputs, tmp_path) -> None:
    config = config.model_copy(update={"gates": (config.__class__.model_validate({"gates": [
        {"stage": "sft", "metric": "hub_pickscore_geneval", "minimum": 1000}]}).gates)})  # fmt: skip
    checkpoints = {name: inputs[name] for name in ("model", "sft")}
    ctx = context("foreign", checkpoints, tmp_path)
    facts = measure_prompts(config, ctx)
    assert facts["gates"][0]["passed"] is False
    record = json.loads((ctx.out / "scores.json").read_text())
    assert record["scores"]["model"].keys() == {"geneval", "geneval_single_object", "geneval_counting", "geneval_colors",
                                                "hub_pickscore_geneval", "hub_taste_geneval"}  # fmt: skip
    with pytest.raises(GateFailed, match="below the minimum 1000"):
        measure_prompts(config.model_copy(update={"strict_gates": True}), context("strict", checkpoints, tmp_path))


def test_a_class_the_detector_never_learnt_stops_before_anything_is_drawn(config, inputs, tmp_path, file) -> None:
    file.write_text(
        file.read_text() + json.dumps({"tag": "x", "prompt": "a tuba", "include": [{"class": "tuba", "count": 1}]})
    )
    config = EvaluateConfig.model_validate(config.model_dump() | {"geneval": str(file)})
    missing = {"sft": tmp_path / "not there"}  # drawing would fail
    with pytest.raises(ConfigError, match="does not know tuba"):
        measure_prompts(config, context("foreign", missing, tmp_path))
    with pytest.raises(ConfigError, match="does not know tuba"):
        evaluate(config, context("evaluate", {"judge": inputs["judge"], **missing}, tmp_path))


def test_a_file_that_changed_after_the_plan_is_refused(config, file) -> None:
    file.write_text(file.read_text() + json.dumps(LINES[0]) + "\n")
    with pytest.raises(DataRefused, match="changed or is gone since the run was planned"):
        file_prompts(config.geneval)


def test_hub_rewards_of_a_prompt_list_are_their_mean(config, clip_folder) -> None:
    scenes = [scene for scene in all_scenes("basic") if scene.held_out][:4]
    images = draw_batch(scenes, 32, 0)
    values = hub_scores(config.rewards[0], images, ["a cat"] * 4)
    alone = [hub_scores(config.rewards[0], images[i : i + 1], ["a cat"])[0] for i in range(4)]
    np.testing.assert_allclose(values, alone, atol=1e-4)


def test_keys_stay_where_nothing_is_asked() -> None:
    plain = versioned(EvaluateConfig())
    assert not {"detector", "geneval", "rewards"} & plain.keys()


def test_a_plan_refuses_what_cannot_be_asked(config, tmp_path, clip_folder, mask2former_folder) -> None:
    """Nothing is loaded: the folders hold no weights that could be."""
    clip, segmenter = {"model": str(clip_folder)}, str(mask2former_folder("cat"))

    def plan(evaluate: dict, **more) -> list:
        return stage_specs(parse(LifecycleConfig, {"evaluate": evaluate, **more}, "test"))

    file = {"path": config.geneval.path}
    with pytest.raises(ConfigError, match="geneval needs a detector"):
        plan({"geneval": file})
    with pytest.raises(ConfigError, match="asks for colours; give the detector a clip"):
        plan({"geneval": file, "detector": {"model": segmenter}})
    with pytest.raises(ConfigError, match="is of type 'mask2former'; one of clip"):
        plan({"rewards": [{"model": segmenter}]})
    with pytest.raises(ConfigError, match="two rewards are called 'pickscore'"):
        plan({"rewards": [clip, clip]})
    with pytest.raises(ConfigError, match="cannot be read"):
        plan({"geneval": str(tmp_path / "none.jsonl"), "detector": {"model": segmenter, "clip": clip}})
    with pytest.raises(ConfigError, match="neither a folder that is there nor OWNER/NAME"):
        plan({"detector": {"model": str(tmp_path / "none"), "clip": clip}})
    (tmp_path / "plain.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    colourless = {"geneval": str(tmp_path / "plain.jsonl"), "detector": {"model": segmenter}}
    with pytest.raises(ConfigError, match="backgrounds of the demo's scenes too"):
        plan(colourless)
    foreign = {
        "model": "stabilityai/stable-diffusion-3-medium-diffusers",
        "pretrain": [],
        "posttrain": {"sft": None, "dpo": None},
    }
    assert [spec.function for spec in plan(colourless, **foreign)][-3:] == ["measure_prompts", "export", "report"]
    assert len(read_prompts(tmp_path / "plain.jsonl")) == 1
    ranked = foreign | {"posttrain": {"sft": None, "pairs": {"hub": clip}}}
    assert "make_pairs" in [spec.function for spec in plan({}, **ranked)]
    for stage, message in (
        (
            {"train": {"batch_size": 8}, "rewards": [{"kind": "sharpness"}]},
            "posttrain.grpo.guard to null, or its held_out to a reward",
        ),
        ({"train": {"batch_size": 8}, "guard": None}, "posttrain.grpo.rewards to .* or one of kind hub"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan({}, **(foreign | {"posttrain": {"sft": None, "dpo": None, "grpo": stage}}))
    with pytest.raises(ConfigError, match=r"posttrain\.pairs\.hub to a reward"):
        plan({}, **(foreign | {"posttrain": {"sft": None}}))
