import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows.config import LifecycleConfig
from flows.dag import stage_specs
from flows.drive import own_stage
from flows.personalize import own_specs
from infra.config import load_yaml, parse
from infra.errors import ConfigError
from infra.stages import stage_key
from models.personalization.config import UntilLearntConfig
from tasks.catalog import TRAITS, stage_function

PRESETS = Path(__file__).parents[2] / "presets"
SMOKE = str(PRESETS / "smoke.yaml")
T2I = [sys.executable, "-m", "flows.cli"]


def t2i(*arguments, cwd=None):
    environment = {**os.environ, "PYTHONPATH": str(PRESETS.parent)}
    return subprocess.run(
        [*T2I, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )


def test_help_is_quick():
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        assert "rerun" in t2i("--help").stdout
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.5


def test_planning_imports_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['t2i', 'plan', sys.argv[1], '--root', sys.argv[2]]\n"
        "from flows.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code, end\n"
        "print('heavy', sorted({'torch', 'ray', 'prefect', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SMOKE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy []"
    assert "pretrain-32" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", SMOKE, "--set", "posttrain.sft.train.stepz=3"], 2, "did you mean 'steps'?"),
        (["plan", SMOKE, "--set", "judge.updates=-1"], 2, "judge.updates = -1: input should be greater than"),
        (["run", "nowhere.yaml"], 2, "configuration file nowhere.yaml does not exist"),
        (["run", SMOKE, "--root", "/proc/nothing"], 2, "choose another place with --root"),
        (["run", SMOKE, "--force", "sftt"], 2, "there is no stage 'sftt'; the stages are source, download"),
        (["run", SMOKE, "--set", "run.min_free_gb=1e9"], 2, "GB free, the run needs"),
        (["rerun", "latest", "sft"], 2, "there is no run under"),
        (["report", "other"], 2, "there is no run 'other'"),
        (["sample", "latest", "a cat"], 2, "there is no run under"),
        (["plan"], 2, "Missing argument"),
        (["personalize", "nowhere", "--name", "cat"], 2, "folder nowhere does not exist"),
        (["personalize", ".", "--name", "My Cat"], 2, "--name 'My Cat' is no name of a stage"),
        (["personalize", ".", "--name", "cat"], 2, "there is no run under"),
        (["plan", SMOKE, "--set", "personalize.0.subject=./nowhere"], 2, "subject folder nowhere does not exist"),
        (["plan", SMOKE, "--set", "mix=[{adapters: {sft: 1}}]"], 2, "names ['sft'], which is no personalize stage"),
    ],
)
def test_bad_input_gets_one_clear_message(arguments, code, message, tmp_path):
    done = t2i(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.prefect
def test_a_run_whose_downloads_all_fail_ends_with_its_code(tmp_path):
    listed = tmp_path / "urls.txt"
    listed.write_text("http://127.0.0.1:9/a.png\nhttp://localhost:9/b.png\nfile:///etc/hostname\n")
    settings = (f"data.source={listed}", "data.download.retries=0", "data.download.allow_private=[]")
    done = t2i("run", SMOKE, *(part for each in settings for part in ("--set", each)), "--root", tmp_path / "root")
    assert done.returncode == 3, done.stderr
    assert "none of 3 rows gave a picture; reasons: {'bad_url': 1, 'refused_address': 2}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "root" / "dedup").exists()


def test_plan_as_json(tmp_path):
    rows = json.loads(t2i("plan", SMOKE, "--root", tmp_path, "--json").stdout)
    assert [row["stage"] for row in rows][:2] == ["source", "download"]
    assert {row["state"] for row in rows} == {"RUN"}
    assert t2i("status", "--root", tmp_path).stdout.startswith("no runs yet")


def test_init_writes_a_preset_that_parses(tmp_path):
    assert t2i("init", tmp_path / "new").returncode == 0
    written = tmp_path / "new" / "lifecycle.yaml"
    assert parse(LifecycleConfig, yaml.safe_load(written.read_text()), "it").name == "mine"
    assert t2i("init", tmp_path / "new").returncode == 2


def test_init_says_what_the_data_are_and_reads_them(tmp_path):
    data = tmp_path / "my pictures"
    data.mkdir()
    done = t2i("init", data, "--out", tmp_path / "x.yaml")
    assert (done.returncode, (tmp_path / "x.yaml").exists()) == (0, True)  # an empty folder: a plain preset
    (data / "a.doc").write_text("x")
    refused = t2i("init", data, "--out", tmp_path / "y.yaml")
    assert refused.returncode == 3
    assert "Looked for: pictures" in refused.stderr
    (data / "list.csv").write_text("URL,TEXT\nhttp://a.org/x.png,a\n")
    done = t2i("init", data, "--out", tmp_path / "y.yaml")
    assert "a URL list, URLs in 'URL', captions in 'TEXT'" in done.stdout
    source = parse(LifecycleConfig, yaml.safe_load((tmp_path / "y.yaml").read_text()), "it").data.source
    assert (source.kind, source.url_column, source.caption_column) == ("list", "URL", "TEXT")
    assert t2i("init", data, "--out", data / "z.yaml").returncode == 2


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


def listening(pid):
    """Addresses on which a process and everything it started wait for connections."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {c.laddr.ip for each in family for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
@pytest.mark.prefect
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.lifecycle)]
)
def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path, number, code):
    command = [*T2I, "run", SMOKE, "--root", str(tmp_path), "--set", "data.source.rows=400"]
    environment = {**os.environ, "PYTHONPATH": str(PRESETS.parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "download: starts" in line:
            break
    time.sleep(1)
    assert listening(process.pid) == {"127.0.0.1"}  # Prefect's server and the demo web
    process.send_signal(number)
    said = process.stderr.read()
    assert process.wait(60) == code, said
    assert f"To go on: t2i run {SMOKE}" in said
    assert "Traceback" not in said
    record = json.loads(t2i("status", "latest", "--root", tmp_path, "--json").stdout)
    assert record["outcome"] == "interrupted"
    assert [stage["status"] for stage in record["stages"]][:3] == ["ran", "interrupted", "skipped"]


def keys_of(specs):
    """Stage -> key, every input standing for its own key: what would run again if a key differs."""
    keys = {}
    for spec in specs:
        keys[spec.name] = stage_key(spec, {role: keys[stage] for role, stage in spec.inputs.items()})
    return keys


def cone_of(specs, start):
    """A stage and everything made from it."""
    reached = {start}
    for spec in specs:
        if reached & set(spec.inputs.values()):
            reached.add(spec.name)
    return reached


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ("data.source.seed=1", "source"), ("data.dedup.max_distance=50", "dedup"), ("data.encode.max_tokens=32", "encode"),
        ("judge.updates=5", "judge"), ("pretrain.0.train.steps=7", "pretrain-32"), ("pretrain.1.train.steps=7", "pretrain-40"),
        ("posttrain.sft.train.steps=5", "sft"), ("posttrain.dpo.beta_per_element=0.7", "dpo"),
        ("personalize.0.lora.rank=8", "dreambooth-robot"), ("distill.0.train.steps=3", "distill-4"),
        ("evaluate.seed=5", "evaluate"), ("report.title=Other", "report"),
    ],
)  # fmt: skip
def test_a_changed_value_reruns_exactly_its_cone(change, stage):
    specs = stage_specs(parse(LifecycleConfig, load_yaml(SMOKE), "smoke"))
    changed = stage_specs(parse(LifecycleConfig, load_yaml(SMOKE, [change]), "smoke"))
    before, after = keys_of(specs), keys_of(changed)
    assert {name for name in before if before[name] != after[name]} == cone_of(specs, stage)


def test_a_path_a_comment_or_a_host_reruns_nothing(tmp_path):
    before = keys_of(stage_specs(parse(LifecycleConfig, load_yaml(SMOKE), "smoke")))
    commented = tmp_path / "other-name.yaml"
    commented.write_text(
        "# another comment\n" + Path(SMOKE).read_text().replace("name: smoke", "name: renamed  # here")
    )
    changes = [
        "run.root=s3://bucket/elsewhere", "run.resources.launcher=rayjob", "run.resources.ray_address=http://host:8265",
        "run.resources.num_workers=8", "run.resources.device=cpu", "run.min_free_gb=5", "data.download.port=5000",
        "data.download.processes=4", "data.download.threads=2", "report.command=t2i run other.yaml",
    ]  # fmt: skip
    assert keys_of(stage_specs(parse(LifecycleConfig, load_yaml(commented, changes), "other"))) == before
