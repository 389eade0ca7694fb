"""Stage `evaluate`: every checkpoint draws the same prompts with the same noise; the judge says what they show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_curation.scenes import draw_batch
from infra.errors import ConfigError, GateFailed
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.evaluation.gates import Verdict, judge_collapse, judge_gate, paired_difference
from models.evaluation.judge import SIDE, Judge, area_average
from models.sampling.generate import load_generator
from tasks.config import EvaluateConfig
from tasks.evaluate_detector import GENEVAL, file_prompts, ready
from tasks.evaluate_prompts import Prompts, geneval_list, grid_prompts, prompt_set, several_seeds, subject_prompts
from tasks.evaluate_scores import (
    Reference,
    Sheet,
    label_of,
    score_distance,
    score_diversity,
    score_geneval,
    score_set,
    suffix_of,
)
from tasks.evaluate_subjects import compare_subjects, score_subjects, subject_label

NOT_CHECKPOINTS = ("judge", "data", "truth", "source")
GRID, DIVERSITY, REAL = "grid", "diversity", "real"
CHUNKS = 8


@dataclass(frozen=True)
class Asked:
    """One prompt list, the side of its pictures, and who is asked (None: every checkpoint)."""

    prompts: Prompts
    side: int | None  # None: that of each checkpoint
    stages: tuple[str, ...] | None


@dataclass(frozen=True)
class Job:
    """One checkpoint and one prompt list."""

    stage: str
    label: str
    folder: Path
    asked: Asked
    batch_size: int


def draw_job(job: Job) -> np.ndarray:
    """Pictures uint8 [N, side, side, 3]; on one thread, so that they do not depend on the machine's cores."""
    prompts, side = job.asked.prompts, job.asked.side
    with one_thread():
        generator = load_generator(job.folder)
        return generator.sample(prompts.texts, prompts.seeds, width=side, height=side, batch_size=job.batch_size)


def lists_of(config: EvaluateConfig) -> dict[str, Asked]:
    """Every prompt list by its label."""
    lists = {label_of(c): Asked(prompt_set(c.name, c.prompts, config.seed), c.side, c.stages) for c in config.sets}
    if len(lists) < len(config.sets):
        raise ConfigError(
            f"evaluate.sets asks twice for one of {sorted(lists)}; give every set once, with all its stages"
        )
    lists[GRID] = Asked(grid_prompts(config.grid_prompts, config.seed, config.subjects), SIDE, None)
    if config.diversity_prompts:
        several = several_seeds(config.diversity_prompts, config.diversity_seeds, config.seed)
        lists[DIVERSITY] = Asked(several, SIDE, None)
    if config.geneval is not None:
        lists[GENEVAL] = Asked(geneval_list(config.geneval, config.seed), config.geneval.side, None)
    for subject in config.subjects:
        asked = (subject.stage, subject.parent, *subject.mixed)
        lists[subject_label(subject)] = Asked(subject_prompts(subject, config.seed), SIDE, asked)
    return lists


def refuse_unknown(config: EvaluateConfig, checkpoints: Mapping[str, Path]) -> None:
    """Names of stages in the config must be inputs."""
    named = {stage for chosen in config.sets for stage in chosen.stages or ()}
    named |= {name for subject in config.subjects for name in (subject.stage, subject.parent, *subject.mixed)}
    named |= {name for gate in config.gates for name in (gate.stage, gate.parent) if name is not None}
    if unknown := sorted(named - set(checkpoints)):
        raise ConfigError(f"evaluate names {unknown}, but its checkpoints are {sorted(checkpoints)}; fix the names")


def draw_all(
    config: EvaluateConfig, ctx: StageContext, lists: Mapping[str, Asked], checkpoints: Mapping[str, Path]
) -> dict[str, dict[str, np.ndarray]]:
    """Stage -> label -> pictures; the longest lists are drawn first, dealt in turn so that workers end together."""
    jobs = [
        Job(stage, label, folder, asked, config.batch_size)
        for stage, folder in checkpoints.items()
        for label, asked in lists.items()
        if asked.stages is None or stage in asked.stages
    ]
    jobs.sort(key=lambda job: -len(job.asked.prompts) * (job.asked.side or SIDE) ** 2)
    drawn: dict[str, dict[str, np.ndarray]] = {stage: {} for stage in checkpoints}
    for start in range(0, len(jobs), CHUNKS):
        part = jobs[start : start + CHUNKS]
        for job, images in zip(part, ctx.fan_out(draw_job, part), strict=True):
            drawn[job.stage][job.label] = images
        ctx.progress(min(start + CHUNKS, len(jobs)), len(jobs), {})
    return drawn


def real_pictures(lists: Mapping[str, Asked], seed: int) -> dict[str, np.ndarray]:
    """Renders of every list's scenes: what a perfect model would draw."""
    return {
        label: draw_batch(asked.prompts.scenes, asked.side or SIDE, seed + i)
        for i, (label, asked) in enumerate(lists.items())
        if asked.prompts.scenes
    }


@dataclass(frozen=True)
class Answer:
    """One checkpoint's pictures (or the real ones) by label, and what they are measured with."""

    config: EvaluateConfig
    judge: Judge
    reference: Reference
    lists: Mapping[str, Asked]
    drawn: Mapping[str, np.ndarray]


def score_answer(answer: Answer) -> Sheet:
    """Every score that one checkpoint's pictures allow on their own."""
    with one_thread():
        return score_pictures(answer.config, answer.judge, answer.reference, answer.lists, answer.drawn)


def score_pictures(
    config: EvaluateConfig,
    judge: Judge,
    reference: Reference,
    lists: Mapping[str, Asked],
    drawn: Mapping[str, np.ndarray],
) -> Sheet:
    """The scores of every prompt list these pictures answer."""
    sheet = Sheet()
    for i, chosen in enumerate(config.sets):
        label = label_of(chosen)
        if label not in drawn:
            continue
        score_set(sheet, judge, chosen, lists[label].prompts, drawn[label], config)
        if i == 0:
            score_distance(sheet, judge, drawn[label], reference, config)
    if DIVERSITY in drawn:
        score_diversity(sheet, judge, drawn[DIVERSITY], config)
    if GENEVAL in drawn and config.geneval is not None:
        score_geneval(sheet, file_prompts(config.geneval), lists[GENEVAL].prompts.seeds, drawn[GENEVAL], config)
    score_subjects(sheet, judge, {label: asked.prompts for label, asked in lists.items()}, drawn, config)
    return sheet


def write_samples(out: Path, judge: Judge, grid: Asked, pictures: Mapping[str, np.ndarray]) -> None:
    """The grid's pictures one by one, one sheet per stage, and grid.json that says what each should show."""
    prompts = grid.prompts
    for stage, images in pictures.items():
        folder = out / "samples" / stage
        folder.mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{i}-{prompts.seeds[i]}.png")
        strip = np.concatenate(list(area_average(images, SIDE)), axis=1)
        sheet = Image.fromarray(strip)
        sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save(
            out / "samples" / f"{stage}.png"
        )
    right = {stage: judge.score(images, prompts.scenes)["all"].tolist() for stage, images in pictures.items()}
    record = {"prompts": prompts.texts, "seeds": prompts.seeds, "scenes": [scene.id for scene in prompts.scenes],
              "stages": list(pictures), "right": right}  # fmt: skip
    (out / "grid.json").write_text(json.dumps(record, indent=1) + "\n")


def write_geneval(out: Path, sheets: Mapping[str, Sheet]) -> None:
    """geneval.jsonl: every picture of the prompt file with what is wrong with it, where there is such a file."""
    rows = [{"stage": stage, **row} for stage, sheet in sheets.items() for row in sheet.geneval]
    if rows:
        (out / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def parents_of(ctx: StageContext, stages: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoint -> the checkpoint it started from, by the artifacts' digests."""
    by_digest = {ctx.parents[stage].digest: stage for stage in stages if stage in ctx.parents}
    found = {}
    for stage in stages:
        digests = ctx.parents[stage].parents if stage in ctx.parents else ()
        starts = [by_digest[digest] for digest in digests if digest in by_digest]
        if starts:
            found[stage] = starts[0]
    return found


def deltas(sheets: Mapping[str, Sheet], parents: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Stage -> metric -> paired difference to the checkpoint it started from."""
    return {
        child: {
            metric: paired_difference(values, sheets[parent].answers[metric])
            for metric, values in sheets[child].answers.items()
            if metric in sheets[parent].answers and len(sheets[parent].answers[metric]) == len(values)
        }
        for child, parent in parents.items()
    }


def evaluate(config: EvaluateConfig, ctx: StageContext) -> dict[str, Any]:
    """Draw, judge, compare; scores.json, grid.json and samples/ in the output, verdicts of the gates in the facts."""
    checkpoints = {role: folder for role, folder in ctx.inputs.items() if role not in NOT_CHECKPOINTS}
    refuse_unknown(config, checkpoints)
    judge, lists = Judge.load(ctx.inputs["judge"]), lists_of(config)
    (models,) = ctx.fan_out(ready, [(config, judge.vocabulary.objects)])
    drawn = draw_all(config, ctx, lists, checkpoints)
    drawn[REAL] = real_pictures(lists, config.seed + 50)
    reference = Reference.of(judge, config.sets[0], lists[label_of(config.sets[0])].prompts, config)
    answers_of = [Answer(config, judge, reference, lists, part) for part in drawn.values()]
    sheets = dict(zip(drawn, ctx.fan_out(score_answer, answers_of), strict=True))
    compare_subjects(sheets, config, f"prompt_accuracy{suffix_of(config.sets[0])}")
    real = sheets.pop(REAL)
    parents = parents_of(ctx, sheets)
    scores = {stage: sheet.scores for stage, sheet in sheets.items()}
    answers = {stage: sheet.answers for stage, sheet in sheets.items()}
    verdicts = [judge_gate(gate, scores, answers) for gate in config.gates]
    collapse = collapse_verdicts(config, drawn)
    record = {
        "scores": scores, "real": real.scores, "deltas": deltas(sheets, parents), "parents": parents, "gates": verdicts, "collapse": collapse,
        "detail": {stage: sheet.detail() for stage, sheet in sheets.items()}, "calibration": judge.calibration,
        "sets": {label: {"prompts": len(a.prompts), "side": a.side} for label, a in lists.items()},
    } | ({"models": models} if models else {})  # fmt: skip
    (ctx.out / "scores.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    write_geneval(ctx.out, sheets)
    write_samples(ctx.out, judge, lists[GRID], {stage: pictures[GRID] for stage, pictures in drawn.items()})
    raise_missed([*(verdicts if config.strict_gates else ()), *(collapse if config.refuse_collapsed else ())])
    return {"scores": scores, "gates": verdicts, "collapse": collapse, "checkpoints": len(checkpoints)}


def collapse_verdicts(config: EvaluateConfig, drawn: Mapping[str, Mapping[str, np.ndarray]]) -> list[Verdict]:
    """One verdict per checkpoint on the first prompt list that it answers."""
    labels = [label_of(chosen) for chosen in config.sets]
    found = []
    for stage, pictures in drawn.items():
        label = next((label for label in labels if label in pictures), None)
        if stage != REAL and label is not None and len(pictures[label]) > 1:
            found.append(judge_collapse(stage, pictures[label], drawn[REAL][label]))
    return found


def raise_missed(verdicts: list[Verdict]) -> None:
    """Stop here when a gate was missed."""
    missed = [f"{v['stage']}.{v['metric']}: {v['reason']}" for v in verdicts if not v["passed"]]
    if missed:
        raise GateFailed(
            f"{len(missed)} gate(s) missed: {'; '.join(missed)}; see scores.json, retrain or lower the gate"
        )
