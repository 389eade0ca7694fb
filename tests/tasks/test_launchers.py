import sys
from pathlib import Path

import pytest

from infra.errors import ConfigError, LifecycleError
from infra.stages import Resources
from infra.storage import open_store
from tasks.launchers import LocalLauncher
from tasks.ray_train import uses_gpu
from tasks.stage import materialise

FLOWS = Path(__file__).parents[1] / "flows"


@pytest.fixture(scope="module")
def toys():
    sys.path.insert(0, str(FLOWS))
    import toys

    yield toys
    sys.path.remove(str(FLOWS))


@pytest.fixture(scope="module")
def on_ray(toys):
    """One Ray and one worker group of two workers for the whole module."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(toys)
    launcher = LocalLauncher(Resources(launcher="ray", num_workers=2), toys.toy_function)
    yield launcher
    launcher.close()
    cloudpickle.unregister_pickle_by_value(toys)


def all_of(launcher, specs, root, report=None):
    store, artifacts = open_store(str(root)), {}
    for spec in specs:
        options = {"report": report} if report else {}
        artifacts[spec.name], _ = materialise(spec, store, artifacts, launcher.resources, launcher, **options)
    return artifacts


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_make_the_same_artifacts_as_one_process(toys, on_ray, tmp_path):
    here = all_of(LocalLauncher(Resources(), toys.toy_function), toys.toy_line(), tmp_path / "here")
    told = []
    there = all_of(on_ray, toys.toy_line(), tmp_path / "ray", lambda *progress: told.append(progress))
    assert {k: v.digest for k, v in here.items()} == {k: v.digest for k, v in there.items()}
    assert ("sft", 3, 3) in [each[:3] for each in told]


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_and_goes_on(toys, on_ray, tmp_path):
    made = all_of(on_ray, [toys.toy("crashing", "crash"), toys.toy("after", "train")], tmp_path)
    assert set(made) == {"crashing", "after"}


@pytest.mark.ray
@pytest.mark.slow
def test_an_error_on_a_worker_reaches_the_driver_and_the_group_goes_on(toys, on_ray, tmp_path):
    bad = toys.ToyConfig(pause=-1.0)
    with pytest.raises(LifecycleError, match="stage 'bad' failed: ValueError"):
        all_of(on_ray, [toys.toy("bad", "train", bad)], tmp_path)
    assert all_of(on_ray, [toys.toy("good", "train")], tmp_path)["good"].stage == "good"


@pytest.mark.parametrize(("device", "gpus", "taken"), [("auto", 2, True), ("auto", 1, False), ("auto", 0, False), ("cpu", 4, False), ("cuda", 2, True)])  # fmt: skip
def test_workers_take_gpus_where_each_has_one(device, gpus, taken, monkeypatch, caplog) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": float(gpus)})
    assert uses_gpu(Resources(num_workers=2, device=device)) is taken
    assert ("training on the CPU" in caplog.text) is (gpus == 1)


def test_cuda_for_more_workers_than_gpus_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(ConfigError, match="num_workers=2 need a GPU each, but Ray has 1"):
        uses_gpu(Resources(num_workers=2, device="cuda"))
