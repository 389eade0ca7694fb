"""Flow-GRPO's stage on workers of a real Ray: two do what one does, also with a group that lies on both."""

import json
import shutil
import sys

import pytest
import torch

from infra.stages import Resources, StageSpec
from infra.storage import open_store
from models.engine.distribute import world
from models.posttraining.advantages import weighted_advantages
from models.posttraining.config import GrpoConfig
from models.posttraining.flow_grpo import FlowGrpo
from tasks.catalog import StageFunction, spec_of
from tasks.launchers import LocalLauncher
from tasks.online import grouped
from tasks.stage import materialise

CONFIG = GrpoConfig.model_validate({
    "train": {"steps": 2, "batch_size": 12, "log_every": 1, "checkpoint_every": 1}, "prompts": {"count": 6}, "group": 4,
    "rewards": [{"kind": "judge"}, {"kind": "sharpness", "weight": 0.5}], "steps": 3, "window": 1, "window_from": 1, "same_noise": True, "kl": 0.1,
    "guard": {"every": 1, "prompts": 1, "seeds": 2},
})  # fmt: skip


def advantages(name: str) -> StageFunction:
    """The stage function `grpo`, every worker of which writes down its slots' prompts, rewards and advantages of the first step."""

    def run(config, ctx):
        class Noted(FlowGrpo):
            def prepare(self, batch, rng):
                made = super().prepare(batch, rng)
                if rng.step == 0:
                    columns = (made.extra["scene"], *made.extra["rewards"], made.extra["advantage"])
                    noted = dict(zip(made.slots, zip(*(c.tolist() for c in columns), strict=True), strict=True))
                    (ctx.out / f"worker-{world()[0]}.json").write_text(json.dumps(noted))
                return made

        return grouped(Noted, config, ctx)

    assert name == "grpo"
    return StageFunction(GrpoConfig, run)


def ran(root, resources: Resources, inputs) -> dict[str, object]:
    """What one run wrote: advantages by slot, how they were shared, the log, the guard's looks."""
    store, artifacts = open_store(str(root)), {}
    for role, folder in inputs.items():
        shutil.copytree(folder, root / "given" / role)
        artifacts[role] = store.commit(role, "0" * 16, role, root / "given" / role, [], {})
    spec: StageSpec = spec_of("grpo", "grpo", CONFIG, **{role: role for role in inputs})
    launcher = LocalLauncher(resources, advantages)
    try:
        made, _ = materialise(spec, store, artifacts, resources, launcher)
    finally:
        launcher.close()
    folder = store.local(made)
    noted = [json.loads(path.read_text()) for path in sorted(folder.glob("worker-*.json"))]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by_slot = {int(slot): value for each in noted for slot, value in each.items()}
    return {
        "shares": [len(each) for each in noted], "by_slot": by_slot, "rows": rows,
        "guard": json.loads((folder / "guard.json").read_text()),
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.lifecycle
def test_two_ray_workers_have_the_advantages_and_the_log_of_one(inputs, tmp_path) -> None:
    from ray import cloudpickle

    one = ran(tmp_path / "here", Resources(), inputs)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        two = ran(tmp_path / "ray", Resources(launcher="ray", num_workers=2), inputs)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert (one["shares"], two["shares"]) == ([12], [6, 6])  # slots 4 to 7, one group, lie on both
    here, there = (torch.tensor([run["by_slot"][slot] for slot in range(12)]) for run in (one, two))
    assert torch.equal(here[:, 0], there[:, 0])  # prompts
    torch.testing.assert_close(there[:, 1:3], here[:, 1:3], atol=1e-5, rtol=1e-5)  # rewards of the same pictures
    expected, idle = weighted_advantages(there[:, 1:3].T, [1.0, 0.5], 4, range(12), CONFIG.unit)
    assert idle == 0
    torch.testing.assert_close(there[:, 3], expected, atol=1e-6, rtol=0)  # what one process makes of these rewards
    # an untrained judge's rewards lie so close that rounding in them shows
    torch.testing.assert_close(there[:, 3], here[:, 3], atol=2e-2, rtol=0)
    assert here[:, 3].abs().max() > 1
    for row in (one["rows"][0], two["rows"][0]):
        assert row["ratio_off"] <= 1e-6
    assert two["rows"][0] == pytest.approx(one["rows"][0], rel=2e-3, abs=1e-6)
    first = one["guard"]["looks"][0]
    assert two["guard"]["looks"][0]["held_out"] == pytest.approx(first["held_out"], abs=1e-6)
