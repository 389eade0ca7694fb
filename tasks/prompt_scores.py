"""Stage `measure_prompts`: GenEval's prompts and rewards of the hub for foreign models, whose pictures the demo's judge cannot read.

The same scores.json as `evaluate` writes, without what needs scenes: judge, real pictures, collapse against them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra.errors import ConfigError
from infra.stages import StageContext
from models.engine.distribute import one_thread
from models.evaluation.gates import judge_gate
from tasks.config import EvaluateConfig
from tasks.evaluate import Asked, deltas, draw_all, parents_of, raise_missed, refuse_unknown, write_geneval
from tasks.evaluate_detector import GENEVAL, file_prompts, ready
from tasks.evaluate_prompts import geneval_list
from tasks.evaluate_scores import Sheet, score_geneval


@dataclass(frozen=True)
class Answer:
    """One checkpoint's pictures uint8 [N, H, W, 3] of the prompt file, and the seeds of their noise."""

    config: EvaluateConfig
    seeds: tuple[int, ...]
    images: np.ndarray


def score_answer(answer: Answer) -> Sheet:
    """Every score of the prompt file."""
    sheet = Sheet()
    assert answer.config.geneval is not None  # measure_prompts refuses it
    with one_thread():
        score_geneval(sheet, file_prompts(answer.config.geneval), answer.seeds, answer.images, answer.config)
    return sheet


def measure_prompts(config: EvaluateConfig, ctx: StageContext) -> dict[str, Any]:
    """Draw the file's prompts, score, compare with the parent, judge the gates; scores.json and geneval.jsonl."""
    if config.geneval is None:
        raise ConfigError("measure_prompts draws a prompt file; set evaluate.geneval to one")
    asked = Asked(geneval_list(config.geneval, config.seed), config.geneval.side, None)
    gates_only = config.model_copy(update={"sets": (), "subjects": ()})  # the demo's lists are not drawn here
    refuse_unknown(gates_only, ctx.inputs)
    (models,) = ctx.fan_out(ready, [(config, ())])
    drawn = draw_all(config, ctx, {GENEVAL: asked}, ctx.inputs)
    answers_of = [Answer(config, asked.prompts.seeds, part[GENEVAL]) for part in drawn.values()]
    sheets = dict(zip(drawn, ctx.fan_out(score_answer, answers_of), strict=True))
    parents = parents_of(ctx, sheets)
    scores = {stage: sheet.scores for stage, sheet in sheets.items()}
    verdicts = [judge_gate(gate, scores, {s: sheet.answers for s, sheet in sheets.items()}) for gate in config.gates]
    record = {
        "scores": scores, "deltas": deltas(sheets, parents), "parents": parents, "gates": verdicts, "collapse": [],
        "sets": {GENEVAL: {"prompts": len(asked.prompts), "side": asked.side}}, "models": models,
    }  # fmt: skip
    (ctx.out / "scores.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    write_geneval(ctx.out, sheets)
    raise_missed(verdicts if config.strict_gates else [])
    return {"scores": scores, "gates": verdicts, "checkpoints": len(sheets)}
