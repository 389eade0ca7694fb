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
from infra.config import load_yaml, parse
from infra.stages import stage_key

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
        (
            ["plan", SMOKE, "--set", "posttrain.grpo.group=1"],
            2,
            "posttrain.grpo.group = 1: input should be greater than or equal to 2",
        ),
        (
            ["plan", SMOKE, "--set", "posttrain.grpo.clip_range=0"],
            2,
            "posttrain.grpo.clip_range = 0: input should be greater than 0",
        ),
        (
            ["plan", SMOKE, "--set", "posttrain.grpo.eta=1.6"],
            2,
            "posttrain.grpo.eta = 1.6: input should be less than or equal to 1.5",
        ),
        (
            ["plan", SMOKE, "--set", "posttrain.dpo.beta_per_element=0"],
            2,
            "posttrain.dpo.beta_per_element = 0: input should be greater",
        ),
        (
            ["plan", SMOKE, "--set", "posttrain.grpo={sampler: cps, eta: 1.0}"],
            2,
            "eta=1.0 with cps keeps nothing of x_t",
        ),
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
    config = parse(LifecycleConfig, yaml.safe_load((tmp_path / "y.yaml").read_text()), "it")
    source = config.data.source
    assert config.judge is None  # it knows the demo's scenes
    assert (source.kind, source.url_column, source.caption_column) == ("list", "URL", "TEXT")
    assert t2i("init", data, "--out", data / "z.yaml").returncode == 2


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
