"""SFT, DPO, ReFL, Flow-GRPO and DiffusionNFT from one pre-trained checkpoint, three seeds each, paired on prompts and noise.

The checkpoint is a finished demo's `continue` (`T2I_DEMO_RECORD`, the record of a run; without it the demo is run). For every
seed its SFT, then each method from that SFT with the settings of presets/posttrain-all.yaml (pairs of fewer prompts).
`python -m benchmarks.preference refl,nft` measures these beside Flow-GRPO, with "" it alone. Every arm is a stage of its own; what it made and found is kept under runs/preference-benchmark and not made again as long as
its settings and inputs are the same.
Seconds are of one CPU core (process time), guards and pairs included. No method and no guard asks the judges of `other`: they
are trained for this benchmark, with another seed, and their word is the held-out one. Intervals: 95 %, prompts resampled.
bars: Flow-GRPO closes at least .4 of the gap in accuracy to 1; every method raises the reward, the held-out one is not lower, and at
least .8 of the diversity stays; SFT adds .1 to long prompts and loses less than .02 elsewhere.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lifecycle_runs import PRESET, SEEDS, lifecycle, mean
from benchmarks.record import record
from flows.config import LifecycleConfig
from flows.dag import seeded
from infra.artifacts import Artifact
from infra.config import digest_of, load_yaml, parse, versioned
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.engine.distribute import one_thread
from models.evaluation.diversity import within_prompt_distances
from models.evaluation.intervals import Score, bootstrap
from models.evaluation.judge import Judge
from models.posttraining.reward import judge_reward
from models.sampling.generate import load_generator
from tasks.config import EvaluateConfig
from tasks.evaluate_prompts import prompt_set, several_seeds
from tasks.judge import train_judge
from tasks.online import grpo, nft, refl
from tasks.preference import dpo, make_pairs
from tasks.training import flow_matching

log = logging.getLogger(__name__)
FOLDER, FOUND = Path("runs", "preference-benchmark"), "found.json"
START, SFT, CLOSING = "continue", "sft", "grpo"
METHODS: dict[str, Callable[[Any, StageContext], dict[str, Any]]] = {"dpo": dpo, "refl": refl, "grpo": grpo, "nft": nft}
OTHERS = tuple(method for method in METHODS if method != CLOSING)
PROMPTS, SEVERAL, PAIR_PROMPTS, OTHER_SEED, RESAMPLES = 480, 24, 960, 1, 2000
ASKED_SEED = 1  # of prompts and noise: settings were chosen on those of seed 0
GAP, DIVERSITY, LONG, REST = 0.4, 0.8, 0.1, 0.02
PRESETS = parse(LifecycleConfig, load_yaml(PRESET.with_name("posttrain-all.yaml")), "presets/posttrain-all.yaml")

Answers = dict[str, Any]  # of one checkpoint: metric -> one number a prompt, and the CPU seconds it took


@dataclass(frozen=True)
class Places:
    """Folders of a finished demo that every arm reads."""

    start: Path
    data: Path
    judge: Path


def context(name: str, **inputs: Path) -> StageContext:
    """The context of a stage called in this process; a checkpoint's digest is its folder's name."""
    out, scratch = FOLDER / name / "out", FOLDER / name / "scratch"
    for folder in (out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    parents = {role: Artifact(kind="checkpoint", uri=path.absolute().as_uri(), digest=path.name, stage=role, parents=())
               for role, path in inputs.items()}  # fmt: skip
    return StageContext(name, inputs, parents, out, scratch, Resources(), no_progress, fan_out_here)


def known(path: Path) -> dict[str, Any]:
    """What is on record of a stage of this benchmark, by what it wrote; of anything else its folder's name, a digest."""
    told = path.parent / FOUND
    found: dict[str, Any] = json.loads(told.read_text()) if told.exists() else {"key": path.name}
    return found


def stage(name: str, run: Callable[[Any, StageContext], dict[str, Any]], config: Any, **inputs: Path) -> dict[str, Any]:
    """What the stage found and its CPU seconds; on record if it was done before with these settings and inputs."""
    key = digest_of([versioned(config), {role: known(path)["key"] for role, path in inputs.items()}])
    if known(made(name))["key"] != key:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        ctx, started = context(name, **inputs), time.process_time()
        facts = run(config, ctx)
        found = {"key": key, "facts": facts, "cpu": time.process_time() - started}
        (FOLDER / name / FOUND).write_text(json.dumps(found) + "\n")
    return known(made(name))


def made(name: str) -> Path:
    """What a stage of this benchmark wrote."""
    return FOLDER / name / "out"


def arm(places: Places, name: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed."""
    post = PRESETS.posttrain
    inputs = {"data": places.data, "judge": places.judge}
    if name == SFT:
        return stage(f"{SFT}-{seed}", flow_matching, seeded(post.sft, seed), init=places.start, data=places.data)  # type: ignore[type-var]
    inputs["init"], spent = made(f"{SFT}-{seed}"), 0.0
    if name == "dpo":
        pairs = seeded(post.pairs.model_copy(update={"prompts": PAIR_PROMPTS}), seed)
        spent = stage(f"pairs-{seed}", make_pairs, pairs, **inputs)["cpu"]
        inputs["pairs"] = made(f"pairs-{seed}")
    found = stage(f"{name}-{seed}", METHODS[name], seeded(getattr(post, name), seed), **inputs)
    return found | {"cpu": found["cpu"] + spent, "before": spent}


def answers(places: Places, name: str, checkpoint: Path) -> Answers:
    """One number a prompt for every metric; from their file if they were asked before."""
    told = FOLDER / "answers" / f"{name}-{known(checkpoint)['key'][:16]}-{ASKED_SEED}.json"
    told.parent.mkdir(exist_ok=True)
    if not told.exists():
        seed, sample = ASKED_SEED, load_generator(checkpoint).sample
        judge, other = Judge.load(places.judge), Judge.load(made("other"))
        full, long = prompt_set("held_out_full", PROMPTS, seed), prompt_set("long", PROMPTS // 2, seed)
        images, several = sample(full.texts, full.seeds), several_seeds(SEVERAL, EvaluateConfig().diversity_seeds, seed)
        features = other.features(sample(several.texts, several.seeds)).reshape(
            SEVERAL, -1, other.settings["feature_size"]
        )
        found = {
            "accuracy": judge.score(images, full.scenes)["all"], "reward": judge_reward(judge, images, full.scenes),
            "accuracy_other": other.score(images, full.scenes)["all"],
            "held_out": judge_reward(other, images, full.scenes), "diversity": within_prompt_distances(features),
        }  # fmt: skip
        if name.startswith((START, SFT)):
            found["long"] = judge.score(sample(long.texts, long.seeds), long.scenes)["all"]
        told.write_text(
            json.dumps({metric: [round(float(v), 6) for v in each] for metric, each in found.items()}) + "\n"
        )
    read: Answers = json.loads(told.read_text())
    return read


def table(found: dict[str, list[Answers]], name: str, metric: str) -> np.ndarray:
    """One metric of one arm [seeds, prompts]."""
    return np.array([each[metric] for each in found[name]], dtype=np.float64)


def interval(statistic: Callable[..., float], *tables: np.ndarray) -> Score:
    """A statistic of tables [seeds, prompts] with the interval over prompts, the same prompts in all."""
    rng = np.random.default_rng(0)
    turned = tuple(each.T for each in tables)
    return bootstrap(turned, lambda *rows: statistic(*(row.T for row in rows)), RESAMPLES, rng)


def gain(new: np.ndarray, old: np.ndarray) -> float:
    """Mean difference."""
    return float(new.mean() - old.mean())


def gap_closed(new: np.ndarray, old: np.ndarray) -> float:
    """Share of the way to 1 that accuracy went."""
    return gain(new, old) / max(1 - float(old.mean()), 1e-9)


def ratio(new: np.ndarray, old: np.ndarray) -> float:
    """Mean over mean."""
    return float(new.mean() / old.mean())


def compared(found: dict[str, list[Answers]], name: str, parent: str, cpu: list[float]) -> dict[str, Any]:
    """An arm against what it started from: every statistic with its interval, its value for each seed, and its price."""
    kinds: dict[str, tuple[Callable[..., float], str]] = {
        "reward_gain": (gain, "reward"), "held_out_gain": (gain, "held_out"), "diversity_ratio": (ratio, "diversity"),
        "accuracy_gain": (gain, "accuracy"), "gap_closed": (gap_closed, "accuracy"),
        "accuracy_other_gain": (gain, "accuracy_other"), "gap_closed_other": (gap_closed, "accuracy_other"),
    }  # fmt: skip
    if name == SFT:
        kinds["long_gain"] = (gain, "long")
    told: dict[str, Any] = {"cpu_seconds": [round(x, 1) for x in cpu]}
    for label, (statistic, metric) in kinds.items():
        new, old = table(found, name, metric), table(found, parent, metric)
        each = [round(statistic(n, o), 5) for n, o in zip(new, old, strict=True)]
        told[label] = {**interval(statistic, new, old), "seeds": each}
    told["accuracy"] = [round(float(x), 5) for x in table(found, name, "accuracy").mean(1)]
    told["accuracy_other"] = [round(float(x), 5) for x in table(found, name, "accuracy_other").mean(1)]
    for metric in ("reward", "held_out"):
        told[f"{metric}_per_cpu_second"] = told[f"{metric}_gain"]["value"] / mean(cpu)
    return told


def at_equal_cpu(arms: dict[str, list[dict[str, Any]]], budget: float) -> dict[str, float]:
    """Held-out reward that each arm's guard had seen won after `budget` CPU seconds, mean of seeds.

    Linear between looks, all steps of a run taken as equally long; what a run ended with stays.
    """
    won: dict[str, float] = {}
    for name, runs in arms.items():
        each = []
        for run in runs:
            guard, price = run["facts"]["guard"], (run["cpu"] - run["before"]) / max(run["facts"]["steps"], 1)
            looks = [look for look in guard["looks"] if look["step"] <= guard["taken"]]
            times = [run["before"] + look["step"] * price for look in looks]
            each.append(float(np.interp(budget, times, [look["change"] for look in looks])))
        won[name] = round(mean(each), 5)
    return won


def figure(name: str, value: float, bar: float, met: bool) -> dict[str, Any]:
    """One figure of the record."""
    return {"name": name, "value": round(value, 5), "bar": bar, "met": met}


def figures_of(told: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars, each on the mean of the seeds."""

    def value(arm: str, label: str) -> float:
        return float(told[arm][label]["value"])

    closed, long, rest = value(CLOSING, "gap_closed"), value(SFT, "long_gain"), value(SFT, "accuracy_gain")
    found = [figure("grpo_gap_closed", closed, GAP, closed >= GAP), figure("sft_long", long, LONG, long >= LONG),
             figure("sft_rest", rest, -REST, rest > -REST)]  # fmt: skip
    for name in (name for name in told if name != SFT):
        reward, held, kept = (value(name, label) for label in ("reward_gain", "held_out_gain", "diversity_ratio"))
        found += [figure(f"{name}_reward", reward, 0.0, reward > 0), figure(f"{name}_held_out", held, 0.0, held >= 0),
                  figure(f"{name}_diversity", kept, DIVERSITY, kept >= DIVERSITY)]  # fmt: skip
    return found


def experiments(places: Places, methods: Sequence[str]) -> dict[str, Any]:
    """SFT and these methods from it, with all seeds."""
    stage("other", train_judge, PRESETS.judge.model_copy(update={"seed": OTHER_SEED}))
    found: dict[str, list[Answers]] = {START: [answers(places, START, places.start)] * len(SEEDS)}
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in (SFT, *methods)}
    for seed in SEEDS:
        for name in arms:
            arms[name].append(arm(places, name, seed))
            asked = answers(places, f"{name}-{seed}", made(f"{name}-{seed}"))
            found.setdefault(name, []).append(asked)
            log.info(
                "%s seed %d: accuracy %.3f, %.0f CPU seconds",
                name,
                seed,
                mean(asked["accuracy"]),
                arms[name][-1]["cpu"],
            )
    cpu = {name: [run["cpu"] for run in runs] for name, runs in arms.items()}
    told = {name: compared(found, name, START if name == SFT else SFT, cpu[name]) for name in arms}
    tuned = {name: arms[name] for name in methods}
    budgets = sorted(round(mean(cpu[name])) for name in methods)
    ended = {name: [run["facts"]["guard"]["reasons"] for run in runs] for name, runs in tuned.items()}
    equal = {str(budget): at_equal_cpu(tuned, budget) for budget in budgets}
    return {"arms": told, "held_out_at_equal_cpu_seconds": equal, "ended_by_guard": ended}


def demo_stages() -> dict[str, Path]:
    """Folders of a finished demo's stages."""
    given = os.environ.get("T2I_DEMO_RECORD")
    run = json.loads(Path(given).read_text()) if given else lifecycle(0)
    return {entry["name"]: Path(entry["uri"].removeprefix("file://")) for entry in run["stages"] if entry.get("uri")}


def main(others: Sequence[str] = OTHERS) -> dict[str, Any]:
    """Measure Flow-GRPO and others on a finished demo; without all of them the record has a name of its own."""
    entries = demo_stages()
    with one_thread():
        found = experiments(Places(entries[START], entries["encode"], entries["judge"]), (CLOSING, *others))
    figures, closed = figures_of(found["arms"]), found["arms"][CLOSING]["gap_closed"]["value"]
    met = all(each["met"] for each in figures)
    detail = {"figures": figures, "prompts": PROMPTS, "pair_prompts": PAIR_PROMPTS, **found}
    name = "preference" if tuple(others) == OTHERS else "-".join(["preference", CLOSING, *others])
    return record(name, list(SEEDS), closed, 1.0, GAP, met, detail)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    print(json.dumps(main([name for name in sys.argv[1].split(",") if name]) if len(sys.argv) > 1 else main()))
