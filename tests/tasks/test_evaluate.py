import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_curation.scenes import OBJECTS, SUBJECT_OBJECTS, Scene, all_scenes, draw_batch, long_caption, short_caption
from infra.artifacts import Artifact
from infra.errors import ConfigError, GateFailed
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.judge import Judge, Vocabulary
from tasks import evaluate as stage
from tasks.config import EvaluateConfig, GateConfig, PromptSetConfig, SubjectConfig
from tasks.evaluate_prompts import grid_prompts, prompt_set, several_seeds, subject_prompts
from tasks.evaluate_subjects import class_drift, kept

SETS = (PromptSetConfig(name="held_out_basic", prompts=12), PromptSetConfig(name="long", prompts=4, stages=("sft",)))
SUBJECT = SubjectConfig(stage="robot", parent="sft", prompts=4)
SMALL = EvaluateConfig(
    sets=SETS,
    subjects=(SUBJECT,),
    diversity_prompts=2,
    diversity_seeds=2,
    bootstrap=20,
    grid_prompts=4,
    refuse_collapsed=False,
)
MEANING = {short_caption(scene): scene for scene in all_scenes("full")}
MEANING |= {long_caption(scene, i): scene for scene in all_scenes("full") for i in range(4)}
MEANING |= {
    text: scene for p in [subject_prompts(SUBJECT, 1234)] for text, scene in zip(p.texts, p.scenes, strict=True)
}


class Painter:
    """Stands for a checkpoint: one that draws what is asked, or one that draws noise."""

    def __init__(self, folder: Path) -> None:
        self.perfect = folder.name != "noise"

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], width: int, height: int, batch_size: int
    ) -> np.ndarray:
        if self.perfect:
            return draw_batch([MEANING[prompt] for prompt in prompts], width, seeds[0])
        rng = np.random.default_rng(seeds[0])
        return rng.integers(0, 256, (len(prompts), height, width, 3), dtype=np.uint8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[EvaluateConfig, str], tuple[dict, Path]]:
    monkeypatch.setattr(stage, "load_generator", Painter)
    scenes = [*all_scenes("full"), *(Scene("big", (name,), "white") for name in SUBJECT_OBJECTS)]
    torch.manual_seed(0)
    Judge.build(Vocabulary.of(scenes), 4, 16, 0.5).save(tmp_path / "judge")

    def go(config: EvaluateConfig, name: str = "out") -> tuple[dict, Path]:
        inputs = {"judge": tmp_path / "judge", "data": tmp_path, "noise": tmp_path / "noise",
                  "sft": tmp_path / "sft", "robot": tmp_path / "robot"}  # fmt: skip
        made_from = {"noise": (), "sft": ("noise",), "robot": ("data", "sft")}
        parents = {role: Artifact(kind="x", uri=f"file:///{role}", digest=role, stage=role, parents=made_from.get(role, ()))
                   for role in inputs}  # fmt: skip
        out = tmp_path / name
        out.mkdir()
        return stage.evaluate(config, StageContext(
            "evaluate", inputs, parents, out, out, Resources(), no_progress, fan_out_here)), out  # fmt: skip

    return go


def test_prompt_sets_are_fixed_held_out_and_cycle_with_new_noise() -> None:
    first, second = prompt_set("held_out_basic", 300, 7), prompt_set("held_out_basic", 300, 7)
    assert first == second
    assert all(scene.held_out and scene.basic for scene in first.scenes)
    pool = sum(scene.held_out for scene in all_scenes("basic"))
    assert len(set(first.scenes[:pool])) == pool
    assert len(set(first.seeds)) == 300
    assert not any(scene.held_out for scene in prompt_set("training", 40, 7).scenes)
    assert set(prompt_set("long", 20, 7).texts).isdisjoint(prompt_set("held_out_full", 366, 7).texts)


def test_grid_shows_many_layouts_and_diversity_repeats_prompts() -> None:
    grid = grid_prompts(10, 3, (SUBJECT,))
    assert len(grid) == 11
    assert len({scene.layout for scene in grid.scenes[:8]}) == 8
    assert "eels robot" in grid.texts[-1]
    several = several_seeds(3, 4, 1)
    assert len(set(several.texts[:4])) == 1
    assert len(set(several.seeds)) == 12
    assert {scene.objects[0] for scene in subject_prompts(SUBJECT, 0).scenes} == {"robot"}
    assert "robot" not in OBJECTS


def test_scores_tell_drawings_from_noise_and_compare_with_the_parent(run) -> None:
    facts, out = run(SMALL)
    record = json.loads((out / "scores.json").read_text())
    scores = record["scores"]
    assert set(scores) == {"noise", "sft", "robot"}
    assert scores["noise"]["prompt_accuracy"]["n"] == 12
    assert scores["noise"]["kernel_distance"]["value"] > scores["sft"]["kernel_distance"]["value"]
    assert {"prompt_accuracy_long", "subject_accuracy"} <= set(scores["sft"])
    assert "prompt_accuracy_long" not in scores["robot"]
    assert {"subject_similarity", "class_drift", "diversity", "reward", "kernel_distance_floor"} <= set(scores["robot"])
    assert record["parents"] == {"sft": "noise", "robot": "sft"}
    assert record["deltas"]["robot"]["prompt_accuracy"]["n"] == 12
    assert record["detail"]["noise"]["collapse"]["held_out_basic"] == 1.0
    assert record["detail"]["sft"]["collapse"]["held_out_basic"] == 0.0
    assert facts["scores"] == scores
    grid = json.loads((out / "grid.json").read_text())
    assert grid["stages"] == ["noise", "sft", "robot", "real"]
    assert (out / "samples" / "sft" / f"0-{grid['seeds'][0]}.png").exists()


def test_a_mix_is_asked_for_every_subject_and_compared_with_each_alone(run) -> None:
    """noise plays the checkpoint that learnt the octopus; the mix "sft" draws both subjects right."""
    octopus = SubjectConfig(
        stage="noise", parent="sft", scene_object="octopus", phrase="vox octopus", prompts=4, mixed=("sft",)
    )
    robot = SUBJECT.model_copy(update={"mixed": ("sft",), "parent": "noise"})
    MEANING.update(zip(*(getattr(subject_prompts(octopus, 1234), part) for part in ("texts", "scenes")), strict=True))
    scores = run(SMALL.model_copy(update={"subjects": (robot, octopus)}))[0]["scores"]
    mixed = scores["sft"]
    assert {"subject_accuracy_robot", "subject_accuracy_octopus", "subject_bleed_robot", "class_drift"} <= set(mixed)
    assert mixed["subject_accuracy"]["n"] == 8
    assert mixed["subject_kept"] == min(
        (mixed[f"subject_kept_{n}"] for n in ("robot", "octopus")), key=lambda s: s["value"]
    )
    assert scores["robot"]["subject_accuracy"] == scores["robot"]["subject_accuracy_robot"]
    assert "subject_kept_robot" not in scores["robot"]
    assert "subject_bleed_robot" not in scores["robot"]
    assert mixed["subject_similarity_octopus"]["value"] > scores["noise"]["subject_similarity_octopus"]["value"]


def test_kept_and_drift_by_hand() -> None:
    alone, mixed = np.array([1, 1, 1, 1, 0], bool), np.array([1, 1, 1, 0, 0], bool)
    assert kept(mixed, alone, 20)["value"] == pytest.approx(3 / 4)
    assert class_drift(mixed, alone, 20)["value"] == pytest.approx(1 / 4)
    assert kept(mixed, np.zeros(5, bool), 20)["value"] == 1


def test_the_same_evaluation_writes_the_same_bytes(run) -> None:
    _, first = run(SMALL, "first")
    _, second = run(SMALL, "second")
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(names) > 10
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_gates_are_reported_and_strict_gates_stop(run) -> None:
    gates = (GateConfig(stage="noise", metric="kernel_distance", maximum=-1), GateConfig(stage="sft", minimum=0.0))
    facts, _ = run(SMALL.model_copy(update={"gates": gates}))
    assert [verdict["passed"] for verdict in facts["gates"]] == [False, True]
    with pytest.raises(GateFailed, match="noise.kernel_distance"):
        run(SMALL.model_copy(update={"gates": gates, "strict_gates": True}), "strict")


def test_names_that_are_no_inputs_are_refused(run) -> None:
    with pytest.raises(ConfigError, match=r"\['ghost'\]"):
        run(SMALL.model_copy(update={"gates": (GateConfig(stage="ghost", minimum=0.1),)}))
    with pytest.raises(ConfigError, match="asks twice"):
        run(SMALL.model_copy(update={"sets": (SETS[0], SETS[0])}), "twice")


def test_a_checkpoint_that_draws_no_pictures_is_refused_with_its_name(run) -> None:
    facts, out = run(SMALL)
    verdicts = {v["stage"]: v for v in json.loads((out / "scores.json").read_text())["collapse"]}
    assert {stage: v["passed"] for stage, v in verdicts.items()} == {"noise": False, "sft": True, "robot": True}
    assert facts["collapse"][0]["reason"] == "100% of the pictures are black, constant, noise or copies (most: noise)"
    with pytest.raises(GateFailed, match="noise.collapse: 100%") as refused:
        run(SMALL.model_copy(update={"refuse_collapsed": True}), "refused")
    assert refused.value.exit_code == 4
