"""What models of transformers say of drawn pictures: a detector in the judge's place, GenEval's prompts, rewards of the hub."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from infra.errors import ConfigError, DataRefused
from infra.local_files import fingerprint
from models.evaluation.clip import clip_of
from models.evaluation.colours import Colours
from models.evaluation.config import ClipConfig, DetectorConfig, PromptFile
from models.evaluation.detector import detector
from models.evaluation.geneval import COUNTING, Prompt, answer, read_prompts, surest
from models.evaluation.judge import Judge
from models.evaluation.prompt_categories import Seen, arranged, seen
from models.posttraining.clip_reward import hub_scores
from tasks.config import EvaluateConfig

GENEVAL = "geneval"
Eyes = Callable[[np.ndarray], list[Seen]]  # pictures uint8 [N, S, S, 3] -> what each shows


@functools.lru_cache(maxsize=1)
def colours(config: ClipConfig) -> Colours:
    """What names colours, loaded once a process."""
    return Colours(clip_of(config))


def eyes(config: EvaluateConfig, judge: Judge) -> Eyes:
    """Who names what pictures of scenes show: the judge, or a detector in its place."""
    if config.detector is None:
        return partial(seen, judge)
    return partial(seen_by_detector, config.detector, judge.vocabulary.objects, judge.vocabulary.backgrounds)


def seen_by_detector(
    config: DetectorConfig, names: Sequence[str], backgrounds: Sequence[str], images: np.ndarray
) -> list[Seen]:
    """Objects of these names and their arrangement by a detector, the background's colour by its CLIP."""
    if config.clip is None:
        raise ConfigError("evaluate.detector has no clip, which names the backgrounds of scenes; give it one")
    pictures = [Image.fromarray(image) for image in images]
    grounds = colours(config.clip).of_grounds(pictures, backgrounds)
    out = []
    for start in range(0, len(pictures), config.batch_size):
        part = slice(start, start + config.batch_size)
        for picture, found, ground in zip(
            pictures[part], detector(config)(pictures[part], names, config.confidence), grounds[part], strict=True
        ):
            kept = surest(found, config.confidence, config.max_overlap)
            out.append(arranged([each for objects in kept.values() for each in objects], picture.size, ground))
    return out


def file_prompts(file: PromptFile) -> list[Prompt]:
    """The prompts of a file that is still what the run was planned with."""
    path = Path(file.path).expanduser()
    if file.fingerprint != fingerprint(path):
        raise DataRefused(
            f"prompt file {path} changed or is gone since the run was planned; start again to plan with it"
        )
    return read_prompts(path)


def faults_of(config: EvaluateConfig, prompts: Sequence[Prompt], images: np.ndarray, pictures: int) -> list[list[str]]:
    """What is wrong with each picture uint8 [P x pictures, H, W, 3] by GenEval's rules."""
    eye = config.detector
    if eye is None:
        raise ConfigError("geneval needs a detector; set evaluate.detector.model")
    names = sorted({name for prompt in prompts for name in prompt.names})
    lowest, size = min(eye.confidence, eye.counting_confidence), eye.batch_size
    out = []
    for start in range(0, len(images), size):
        part = [Image.fromarray(image) for image in images[start : start + size]]
        for number, (picture, found) in enumerate(zip(part, detector(eye)(part, names, lowest), strict=True), start):
            prompt = prompts[number // pictures]
            above = eye.counting_confidence if prompt.tag == COUNTING else eye.confidence
            objects = surest(found, above, eye.max_overlap)
            name_colours = partial(_no_colours if eye.clip is None else colours(eye.clip).of_objects, picture)
            out.append(answer(prompt, objects, name_colours))
    return out


def _no_colours(image: Image.Image, objects: Sequence[object], name: str) -> list[str]:
    raise ConfigError(f"the colour of {name} is asked, but evaluate.detector has no clip; give it one")


def hub_rewards(config: EvaluateConfig, images: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Metric -> score of each picture uint8 [N, H, W, 3] for its prompt."""
    return {f"hub_{reward.label}": hub_scores(reward, images, texts) for reward in config.rewards}


def ready(item: tuple[EvaluateConfig, tuple[str, ...]]) -> dict[str, str]:
    """Load what will be asked, before anything is drawn; model and revision of each. Names the detector lacks are refused."""
    config, names = item
    found = {}
    if config.detector is not None:
        asked = set(names) | {name for prompt in _prompts(config) for name in prompt.names}
        detector(config.detector).refuse_unknown(sorted(asked))
        found["detector"] = detector(config.detector).name
        if config.detector.clip is not None:
            found["colours"] = colours(config.detector.clip).clip.name
    return found | {f"hub_{reward.label}": clip_of(reward).name for reward in config.rewards}


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    return [] if config.geneval is None else file_prompts(config.geneval)
