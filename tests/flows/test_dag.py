"""What stages a configuration is made of, and which inputs they read."""

from pathlib import Path

import pytest

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.drive import own_stage
from flows.personalize import own_specs
from infra.config import load_yaml, parse
from infra.errors import ConfigError
from models.personalization.config import UntilLearntConfig
from tasks.catalog import TRAITS, stage_function

PRESETS = Path(__file__).parents[2] / "presets"
SMOKE = str(PRESETS / "smoke.yaml")


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_makes_a_sound_dag(preset):
    specs = stage_specs(parse(LifecycleConfig, load_yaml(preset), str(preset)))
    before: set[str] = set()
    for spec in specs:
        assert set(spec.inputs.values()) <= before
        assert spec.function in TRAITS
        before.add(spec.name)
    assert len(before) == len(specs)


def test_a_folder_of_pictures_is_a_stage_before_the_subject_and_part_of_its_key(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")

    def specs():
        subject = f"personalize.0.subject={tmp_path}"
        mixed = "mix=[{name: both, adapters: {dreambooth-robot: 0.5}}]"
        return {spec.name: spec for spec in stage_specs(parse(LifecycleConfig, load_yaml(SMOKE, [subject, mixed]), ""))}

    before = specs()
    assert before["dreambooth-robot"].inputs["subject"] == "dreambooth-robot-pictures"
    assert before["dreambooth-robot-pictures"].function == "read_subject"
    assert before["both"].inputs == {"init": "dpo", "dreambooth-robot": "dreambooth-robot"}
    assert {"lora-robot": "dreambooth-robot", "lora-both": "both"}.items() <= before["export"].inputs.items()
    assert before["evaluate"].inputs["both"] == "both"
    (tmp_path / "b.png").write_bytes(b"2")
    assert specs()["dreambooth-robot-pictures"].versioned != before["dreambooth-robot-pictures"].versioned


def test_a_distilled_mix_trains_on_the_workers_and_reads_captions():
    mixed = "mix=[{name: both, adapters: {dreambooth-robot: 0.5}, method: distilled}]"
    specs = {spec.name: spec for spec in stage_specs(parse(LifecycleConfig, load_yaml(SMOKE, [mixed]), ""))}
    assert (specs["both"].function, specs["both"].runs) == ("distill_mix", "train")
    assert specs["both"].inputs == {"init": "dpo", "data": "encode", "dreambooth-robot": "dreambooth-robot"}


def test_a_mix_of_what_has_no_adapter_is_refused():
    overrides = ["mix=[{name: both, adapters: {dreambooth-robot: 0.5}}]", "personalize.0.lora=null"]
    with pytest.raises(ConfigError, match=r"names \['dreambooth-robot'\], which train all weights"):
        parse(LifecycleConfig, load_yaml(SMOKE, overrides), "")
    with pytest.raises(ConfigError, match=r"names \['dreambooth-robot'\], which tune text encoders"):
        parse(LifecycleConfig, load_yaml(SMOKE, [overrides[0], "personalize.0.text={}"]), "")


def test_a_sweep_is_stages_side_by_side_and_their_grid(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    sweep = "sweep=[{name: s, stage: dreambooth-robot, ranks: [1, 2], steps: [2, 3], weights: [0.5, 1]}]"
    overrides = [sweep, f"personalize.0.subject={tmp_path}"]
    config = parse(LifecycleConfig, load_yaml(SMOKE, overrides), "")
    specs = {spec.name: spec for spec in stage_specs(config)}
    names = ["s-r1-s2", "s-r1-s3", "s-r2-s2", "s-r2-s3"]
    for name in names:
        assert specs[name].inputs == {"data": "encode", "init": "dpo", "subject": "dreambooth-robot-pictures"}
        assert f"s-r{specs[name].config['lora']['rank']}-s{specs[name].config['train']['steps']}" == name
    assert set(specs["s"].inputs.values()) == {*names, "judge", "dpo", "dreambooth-robot-pictures"}
    assert not set(names) & set(specs["evaluate"].inputs)
    with pytest.raises(ConfigError, match="sweep 's' varies 'sft', which is no personalize stage"):
        parse(LifecycleConfig, load_yaml(SMOKE, ["sweep=[{name: s, stage: sft}]"]), "")


def test_a_subject_of_ones_own_takes_the_settings_of_the_runs_first(tmp_path):
    config = parse(LifecycleConfig, load_yaml(SMOKE), SMOKE)
    stage = own_stage(config, tmp_path, "my-dog", {"class_word": "dog", "token": None, "steps": 7, "rank": 3})
    assert (stage.name, stage.class_word, stage.token, stage.label) == ("dreambooth-my-dog", "dog", None, "my-dog")
    assert (stage.train.steps, stage.lora.rank) == (7, 3)
    assert stage.train.model_copy(update={"steps": 4}) == config.personalize[0].train
    assert stage.until is None
    looking = own_stage(config, tmp_path, "my-dog", {})
    assert looking.class_word == "my dog"
    assert (looking.train.steps, looking.until) == (6, UntilLearntConfig())
    specs = {spec.name: spec for spec in own_specs(config, stage, "dpo")}
    assert list(specs) == ["dreambooth-my-dog-pictures", "dreambooth-my-dog", "dreambooth-my-dog-export"]
    assert specs["dreambooth-my-dog"].inputs == {
        "data": "encode", "init": "dpo", "subject": "dreambooth-my-dog-pictures",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="lora.rank"):
        own_stage(config, tmp_path, "my-dog", {"rank": 0})


def test_distill_all_starts_from_the_demos_own_stages():
    demo, students = (
        stage_specs(parse(LifecycleConfig, load_yaml(PRESETS / n), n)) for n in ("demo.yaml", "distill-all.yaml")
    )
    ours = {spec.name: (spec.versioned, spec.inputs) for spec in demo}
    shared = students[: [spec.name for spec in students].index("dpo") + 1]
    assert len(shared) > 10
    assert [spec.name for spec in shared if ours.get(spec.name) != (spec.versioned, spec.inputs)] == []


def test_the_seed_moves_training_and_leaves_data():
    config = parse(LifecycleConfig, load_yaml(SMOKE), SMOKE)
    pairs = zip(stage_specs(config), stage_specs(config.model_copy(update={"seed": 5})), strict=True)
    moved = {a.name for a, b in pairs if a.versioned != b.versioned}
    assert {"pretrain-32", "pairs", "distill-1"} <= moved
    assert not moved & {"source", "download", "encode", "judge", "evaluate"}


@pytest.mark.slow
def test_every_listed_function_can_be_imported_and_takes_its_configuration():
    specs = {spec.function: spec for spec in stage_specs(parse(LifecycleConfig, load_yaml(SMOKE), SMOKE))}
    for name in TRAITS:
        function = stage_function(name)
        if name in specs:
            assert function.config.model_validate(specs[name].config).model_dump(mode="json") == specs[name].config
