import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.config import RunConfig
from flows.plan import plan
from flows.run import Run
from infra.errors import ArtifactCorrupted, ConfigError, DataRefused, GateFailed, LifecycleError
from infra.storage import open_store

TOYS = Path(__file__).with_name("toys.py")
REPOSITORY = TOYS.parents[2]


@pytest.fixture
def counts(tmp_path, monkeypatch):
    path = tmp_path / "counts.txt"
    monkeypatch.setenv("TOY_COUNTS", str(path))
    path.touch()

    def taken() -> list[str]:
        names = path.read_text().split()
        path.write_text("")
        return names

    return taken


@pytest.fixture
def toys():
    sys.path.insert(0, str(TOYS.parent))
    import toys

    yield toys
    sys.path.remove(str(TOYS.parent))


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "root")


def run(toys, root, run_id="one", specs=None, **options):
    return Run(
        run_id, specs or toys.toy_line(), RunConfig(root=root), {"name": "toy"}, catalog=toys.toy_function, **options
    )


def digests(root):
    return {artifact.stage: artifact.digest for artifact in open_store(root).list()}


def test_second_run_reuses_everything(toys, root, counts):
    first = run(toys, root).execute()
    assert counts() == ["source", "judge", "pretrain", "sft", "report"]
    assert [stage["status"] for stage in first["stages"]] == ["ran"] * 5
    second = run(toys, root, "two").execute()
    assert counts() == []
    assert [stage["status"] for stage in second["stages"]] == ["reused"] * 5
    assert [s["digest"] for s in first["stages"]] == [s["digest"] for s in second["stages"]]
    assert second["outcome"] == "ok"
    assert not list((Path(root) / ".scratch").glob("*"))


def test_one_changed_value_reruns_exactly_its_cone_and_plan_says_so(toys, root, counts):
    run(toys, root).execute()
    counts()
    specs = toys.toy_line(sft=toys.ToyConfig(value=7))
    rows = plan(specs, open_store(root))
    assert [row.state for row in rows] == ["HIT", "HIT", "HIT", "RUN", "RUN?"]
    assert rows[3].reason == "value 1 -> 7"
    assert rows[4].reason == "sft is made first"
    run(toys, root, "two", specs).execute()
    assert counts() == ["sft", "report"]


def test_unversioned_settings_change_nothing(toys, root):
    run(toys, root).execute()
    specs = toys.toy_line(pretrain=toys.ToyConfig(pause=0.5))
    assert {row.state for row in plan(specs, open_store(root))} == {"HIT"}


def test_failure_keeps_what_was_made_and_names_the_stage(toys, root, counts, tmp_path):
    gate = tmp_path / "ready"
    specs = toys.toy_line(sft=toys.ToyConfig(), report=toys.ToyConfig(fail_unless=str(gate)))
    with pytest.raises(DataRefused, match="waits for"):
        run(toys, root, specs=specs).execute()
    record = open_store(root).read_run("latest")
    assert record["outcome"] == "stage_failed"
    assert [stage["status"] for stage in record["stages"]] == ["ran"] * 4 + ["failed"]
    counts()
    gate.touch()
    run(toys, root, specs=specs).execute()
    assert counts() == ["report"]


def test_unexpected_error_names_stage_and_scratch(toys, root):
    specs = [toys.toy("source"), toys.toy("broken", "train", toys.ToyConfig(), other="source")]
    specs[1] = specs[1].model_copy(update={"config": {"steps": 1, "value": 1, "pause": -1.0}})
    with pytest.raises(LifecycleError, match=r"stage 'broken' failed: ValueError: .*going? on|goes on from there"):
        run(toys, root, specs=specs).execute()


@pytest.mark.parametrize(("gate", "outcome"), [("strict", ["failed", "skipped"]), ("report", ["ran", "ran"])])
def test_missed_gate(toys, root, gate, outcome):
    specs = [toys.toy("evaluate", config=toys.ToyConfig(gate=gate)), toys.toy("report", scores="evaluate")]
    with pytest.raises(GateFailed, match="toy gate"):
        run(toys, root, specs=specs).execute()
    record = open_store(root).read_run("latest")
    assert record["outcome"] == "gate_failed"
    assert [stage["status"] for stage in record["stages"]] == outcome


def test_forced_stage_runs_once_per_run(toys, root, counts):
    run(toys, root).execute()
    counts()
    run(toys, root, "two", force=["pretrain"]).execute()
    assert counts() == ["pretrain"]  # same bytes: what follows is reused
    run(toys, root, "two", force=["pretrain"]).execute()
    assert counts() == []


def test_corrupted_artifact_is_named_and_rebuilt(toys, root, counts):
    run(toys, root).execute()
    store = open_store(root)
    victim = next(artifact for artifact in store.list() if artifact.stage == "pretrain")
    (store.local(victim) / "value.json").write_text("{}")
    specs = toys.toy_line(sft=toys.ToyConfig(value=5))
    code = f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(TOYS.parent)!r}]\n" + (
        "import toys\nfrom flows.config import RunConfig\nfrom flows.run import Run\n"
        "specs = toys.toy_line(sft=toys.ToyConfig(value=5))\n"
        f"Run('two', specs, RunConfig(root={root!r}), {{}}, catalog=toys.toy_function).execute()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "'pretrain' is corrupted" in done.stderr
    run(toys, root, "three", specs, force=["pretrain"]).execute()
    assert counts().count("pretrain") == 2


def test_damaged_record_is_rebuilt(toys, root, counts):
    run(toys, root).execute()
    counts()
    (next((Path(root) / "judge").iterdir()) / "artifact.json").write_text("{")
    with pytest.raises(ArtifactCorrupted):
        for key in (Path(root) / "judge").iterdir():
            open_store(root).find("judge", key.name)
    run(toys, root, "two").execute()
    assert counts() == ["judge"]


def test_unknown_stage_is_refused_with_the_list(toys, root):
    with pytest.raises(ConfigError, match=r"no stage 'sftt'; the stages are source, judge"):
        run(toys, root, force=["sftt"])


def test_only_one_stage(toys, root, counts):
    run(toys, root).execute()
    counts()
    record = run(toys, root, "two", only="sft", force=["sft"]).execute()
    assert counts() == ["sft"]
    assert [stage["status"] for stage in record["stages"]] == ["reused", "reused", "reused", "ran", "reused"]


def test_status_of_a_running_run_is_on_record(toys, root):
    seen = []
    current = run(toys, root)

    class Watch:
        def stage(self, number, total, row): ...
        def progress(self, stage, done, total, metrics): ...
        def done(self, entry):
            seen.append(json.loads((Path(root) / "runs" / "one.json").read_text())["outcome"])

    current.display = Watch()
    current.execute()
    assert set(seen) == {"running"}


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_digests(toys, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(root):
        return subprocess.Popen(
            [sys.executable, str(TOYS), str(root)], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )

    begun = time.monotonic()
    assert start(tmp_path / "calm").wait() == 0
    length = time.monotonic() - begun
    rng, kills = random.Random(3), 0
    while kills < 8:
        begun = time.monotonic()
        process = start(tmp_path / "stormy")
        try:
            process.wait(rng.uniform(0.4, 1.0) * length)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            assert digests(tmp_path / "stormy") == digests(tmp_path / "calm")
            length = min(length, time.monotonic() - begun)  # the calm run's start may have been a cold one
            for folder in (tmp_path / "stormy").iterdir():
                if folder.name in ("pretrain", "sft", "report"):
                    subprocess.run(["rm", "-r", str(folder)], check=True)
    assert start(tmp_path / "stormy").wait() == 0
    assert digests(tmp_path / "stormy") == digests(tmp_path / "calm")
