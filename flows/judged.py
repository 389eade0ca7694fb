"""What of a lifecycle asks the demo's judge, and what to set instead where there is none: own data, foreign models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from infra.errors import ConfigError
from tasks.config import JudgeConfig

if TYPE_CHECKING:
    from flows.config import LifecycleConfig, PosttrainConfig


def judge_of(config: LifecycleConfig, what: str) -> JudgeConfig:
    """The judge, for what needs one and reads as `what`, such as "a night is"; ConfigError where there is none."""
    if config.model is not None:
        raise ConfigError(f"{what} judged by the demo's scenes, which a foreign model does not know; set model to null")
    if config.judge is None:
        raise ConfigError(
            f"{what} judged by the demo's scenes, and judge is null; on the demo's data set judge to {{}}"
        )
    return config.judge


def asking(config: LifecycleConfig) -> list[str]:
    """Every setting that asks the judge, with what to set instead."""
    return [*_posttraining(config.posttrain), *_others(config)]


def _posttraining(post: PosttrainConfig) -> Iterator[str]:
    if post.needs_pairs and post.pairs_table is None and post.pairs.source == "judge" and post.pairs.hub is None:
        yield "posttrain.pairs.source to data, or posttrain.pairs.hub to a reward"
    for stage in post.online:
        if any(term.kind == "judge" for term in stage.rewards):
            kinds = "[{kind: model}], [{kind: sharpness}] or one of kind hub"
            yield f"posttrain.{stage.name}.rewards to {kinds}"
    for branch in (*post.online, *(() if post.dpo is None else (post.dpo,))):
        if branch.guard is not None and branch.guard.held_out is None:
            yield f"posttrain.{branch.name}.guard to null, or its held_out to a reward"
    if post.prompt_enhancer is not None and post.prompt_enhancer.check is not None:
        yield "posttrain.prompt_enhancer.check to null"


def _others(config: LifecycleConfig) -> Iterator[str]:
    if config.sweep:
        yield "sweep to []"
    if config.compare is not None:
        yield "compare to null; distribution: {} measures students beside their teacher"
    if config.evaluate.subjects:
        yield "evaluate.subjects to []"
    if config.evaluate.geneval is None:
        for name in ("gates", "detector", "rewards"):
            if getattr(config.evaluate, name):
                yield f"evaluate.{name} to nothing, or evaluate.geneval to a file of prompts"
