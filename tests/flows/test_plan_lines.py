"""What a person reads of a plan and a run; what single stages run on, and what that costs."""

import sys

import pytest

from flows.config import LifecycleConfig, RunConfig
from flows.dag import stage_specs
from flows.display import LineDisplay, clock, plan_lines, times_lines
from flows.plan import PlanRow
from infra.errors import ConfigError


def test_a_plan_says_what_the_stages_to_run_cost():
    rows = [PlanRow(stage="made", state="HIT", reason="made before", seconds=3600.0),
            PlanRow(stage="wide", state="RUN", reason="not made yet", seconds=1800.0),
            PlanRow(stage="narrow", state="RUN", reason="not made yet", seconds=900.0)]  # fmt: skip
    run = RunConfig.model_validate({
        "resources": {"launcher": "rayjob", "hourly_price": 2.0},
        "per_stage": {"wide": {"num_workers": 8, "hourly_price": 3.0}},
    })  # fmt: skip
    assert plan_lines(rows, run)[-1] == "2 of 3 stages to run, about 45:00, 12.50 to pay"
    assert "pay" not in plan_lines(rows, RunConfig())[-1]
    assert run.resources_of("wide").num_workers == 8
    assert run.resources_of("narrow") == run.resources


def test_resources_of_single_stages_are_for_jobs_and_name_stages():
    with pytest.raises(ValueError, match="run.per_stage.sft is for stages that are Ray jobs; with launcher=inprocess"):
        RunConfig.model_validate({"per_stage": {"sft": {"num_workers": 2}}})
    with pytest.raises(ValueError, match=r"run.resources.image is for stages"):
        RunConfig.model_validate({"resources": {"image": "x/y:1"}})
    run = {"resources": {"launcher": "rayjob"}, "per_stage": {"sfd": {"num_workers": 2}}}
    with pytest.raises(ConfigError, match="run.per_stage names 'sfd', which is no stage; the stages are "):
        stage_specs(LifecycleConfig.model_validate({"run": run}))


def test_lines_say_where_and_how_long(capsys):
    display = LineDisplay(sys.stdout)
    display.stage(2, 9, PlanRow(stage="sft", state="RUN", reason="train.steps 5 -> 6", seconds=61))
    display.progress("sft", 2, 6, {"loss": 0.5})
    display.next = 0.0
    display.progress("sft", 3, 6, {"loss": 0.25})
    display.done({"name": "sft", "status": "ran", "seconds": 4.0, "digest": "abc"})
    first, start, second, third = capsys.readouterr().out.splitlines()
    assert first == "[2/9] sft: starts (train.steps 5 -> 6, took 1:01 last time)"
    assert start == "[2/9] sft: 2/6, loss 0.5"
    assert second.startswith("[2/9] sft: 3/6, ")
    assert second.endswith("left, loss 0.25")
    assert third == "[2/9] sft: ran in 4 s abc"
    assert clock(3723) == "1:02:03"
    rows = [
        PlanRow(stage="a", state="HIT", reason="made before"),
        PlanRow(stage="bb", state="RUN", reason="not made yet"),
    ]
    assert plan_lines(rows)[-1] == "1 of 2 stages to run, about 0 s, 1 never timed"


def test_a_plan_shows_the_training_times_of_every_phase():
    uniform = {"density": "uniform", "shift": "none"}
    stages = [
        {"name": "flat", "timesteps": uniform},
        {"name": "grows", "train": {"steps": 100, "batch_size": 4}, "select": {"resolutions": [32]}, "curriculum": [
            {"from_samples": 0},
            {"from_samples": 40, "select": {"resolutions": [64]}, "timesteps": {**uniform, "shift": "sqrt_tokens"}},
        ]},
    ]  # fmt: skip
    flat, grows = times_lines(LifecycleConfig.model_validate({"pretrain": stages}))
    assert flat == "times of flat, data to noise: ██████████ at 32 px, 64 tokens, shift 1"
    low, high = grows.removeprefix("times of grows, data to noise: ").split("; then ")
    assert low == "▂▄▆▇██▇▆▄▂ at 32 px, 64 tokens, shift 1"
    assert high.endswith("at 64 px, 256 tokens, shift 2")
    assert sorted(high[:10]) == list(high[:10])  # more noise: shares of t' = 2 u / (1 + u) rise
    assert high[0] < high[9]
