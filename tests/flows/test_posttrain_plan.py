import re
from pathlib import Path

import pytest

from flows.config import LifecycleConfig, PosttrainConfig
from flows.dag import stage_specs
from flows.judged import asking
from infra.config import load_yaml, parse
from infra.errors import ConfigError

PRESETS = Path(__file__).resolve().parents[2] / "presets"


def lifecycle(name: str, *overrides: str) -> LifecycleConfig:
    return parse(LifecycleConfig, load_yaml(PRESETS / name, overrides), name)


def test_all_branches_start_from_sft_and_are_scored() -> None:
    config = lifecycle("posttrain-all.yaml")
    specs = {spec.name: spec for spec in stage_specs(config)}
    assert {specs[name].inputs["init"] for name in ("grpo", "nft", "refl", "dpo")} == {"sft"}
    assert {"sft", "grpo", "nft", "refl", "dpo"} <= set(specs["evaluate"].inputs)
    assert specs["dpo"].inputs["judge"] == "judge"  # its guard asks for it
    assert config.chain[-1] == "dpo"
    demo = {spec.name: spec for spec in stage_specs(lifecycle("demo.yaml"))}
    assert (demo["sft"].versioned, demo["sft"].inputs) == (specs["sft"].versioned, specs["sft"].inputs)
    assert "judge" not in demo["dpo"].inputs


def test_the_chosen_branch_hands_on() -> None:
    config = lifecycle("smoke.yaml", "posttrain.hands_on=grpo")
    specs = {spec.name: spec for spec in stage_specs(config)}
    assert config.chain[-2:] == ("sft", "grpo")
    assert specs["distill-4"].inputs["init"] == "grpo"
    assert "dpo" in specs["evaluate"].inputs
    with pytest.raises(ConfigError, match="no branch"):
        lifecycle("smoke.yaml", "posttrain.hands_on=sft")


def test_without_a_branch_sft_hands_on_and_no_pairs_are_made() -> None:
    config = lifecycle("posttrain-all.yaml", *(f"posttrain.{name}=null" for name in ("grpo", "nft", "refl", "dpo")),
                       "posttrain.reward_model=null", "evaluate.gates=[]", "evaluate.sets=[{name: held_out_basic}]")  # fmt: skip
    assert config.chain[-1] == "sft"
    assert "pairs" not in {spec.name for spec in stage_specs(config)}


def test_the_reward_model_reaches_whom_it_rewards() -> None:
    config = lifecycle("posttrain-all.yaml", "posttrain.grpo.rewards=[{kind: model}, {kind: judge, weight: 0.5}]")
    specs = {spec.name: spec for spec in stage_specs(config)}
    assert specs["grpo"].inputs["reward"] == "reward-model"
    assert specs["reward-model"].inputs == {"pairs": "pairs", "data": "encode"}
    assert "reward" not in specs["nft"].inputs
    with pytest.raises(ValueError, match="set posttrain.reward_model"):
        PosttrainConfig.model_validate({"grpo": {"rewards": [{"kind": "model"}]}})


def test_a_guard_looks_where_the_log_ends() -> None:
    with pytest.raises(ConfigError, match="guard.every=7"):
        lifecycle("posttrain-all.yaml", "posttrain.grpo.guard.every=7")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ("posttrain.pairs.source=judge", "posttrain.pairs.source to data"),
        ("posttrain.grpo.rewards=[{kind: judge}]", "posttrain.grpo.rewards to"),
        ("posttrain.grpo.guard={}", "posttrain.grpo.guard to null"),
        ("posttrain.dpo.guard={}", "posttrain.dpo.guard to null"),
        ("posttrain.prompt_enhancer={check: {}}", "posttrain.prompt_enhancer.check to null"),
    ],
)
def test_a_foreign_model_is_not_judged_by_the_demo_s_scenes(change: str, advice: str) -> None:
    assert asking(lifecycle("posttrain-hub.yaml")) == []
    with pytest.raises(ConfigError, match=re.escape(advice)):
        lifecycle("posttrain-hub.yaml", change)
    with pytest.raises(ConfigError, match=f"judge is null; change .*{re.escape(advice)}"):
        lifecycle("own-pictures.yaml", *(["posttrain.grpo={}"] if "grpo" in change else []), change)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ("compare={}", "compare to null"),
        ("evaluate.subjects=[{}]", "evaluate.subjects to []"),
        ("evaluate.gates=[{stage: sft, metric: prompt_accuracy, minimum: 0.5}]", "evaluate.gates to nothing"),
        ("evaluate.rewards=[{model: a/b}]", "evaluate.rewards to nothing"),
        ("sweep=[{name: s, stage: dreambooth-robot}]", "sweep to []"),
    ],
)
def test_without_a_judge_whatever_asks_it_is_refused_with_advice(change: str, advice: str) -> None:
    assert asking(lifecycle("own-pictures.yaml")) == []
    with pytest.raises(ConfigError, match=re.escape(advice)):
        lifecycle("own-pictures.yaml", "personalize=[{}]", change)


def test_own_pictures_are_learnt_from_first_to_last_without_a_judge() -> None:
    more = ("personalize=[{}]", "posttrain.grpo={rewards: [{kind: sharpness}], guard: null}", "posttrain.hands_on=dpo")
    config = lifecycle("own-pictures.yaml", *more)
    specs = {spec.name: spec for spec in stage_specs(config)}
    assert "judge" not in {role for spec in specs.values() for role in (spec.name, *spec.inputs)}
    trained = ("pretrain-32", "continue", "sft", "grpo", "dpo", "dreambooth-robot", "distill-4", "distill-1")
    for name in ("pictures", "distribution"):
        assert tuple(specs[name].inputs) == ("data", *trained)
    assert specs["export"].inputs == {
        "teacher": "dpo", "student-4": "distill-4", "student-1": "distill-1", "lora-robot": "dreambooth-robot",
    }  # fmt: skip
    assert {*trained, "pictures", "distribution", "pairs", "encode", "export"} <= set(specs["report"].inputs)
    assert "scores" not in specs["report"].inputs


def test_a_foreign_model_that_is_not_tuned_is_drawn_measured_and_given_away() -> None:
    nothing = ("posttrain.sft=null", "posttrain.dpo=null", "posttrain.grpo=null", "posttrain.reward_model=null")
    config = lifecycle("posttrain-hub.yaml", *nothing, "distribution={}")
    specs = {spec.name: spec for spec in stage_specs(config)}
    assert config.chain == config.checkpoints == ("model",)
    assert specs["export"].inputs == {"model": "model"}
    assert specs["distribution"].inputs == specs["pictures"].inputs == {"data": "encode", "model": "model"}
