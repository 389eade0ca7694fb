"""Fixed evaluation prompts: the same prompts, seeds and order for every checkpoint, so that scores are paired."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_curation.scenes import BACKGROUNDS, LAYOUTS, Scene, all_scenes, long_caption, short_caption
from models.evaluation.config import PromptFile
from tasks.config import PromptSetName, SubjectConfig
from tasks.evaluate_detector import file_prompts

SEEDS_APART = 1_000_003


@dataclass(frozen=True)
class Prompts:
    """Parallel lists: what is asked, with which noise, and the scene the picture must show."""

    texts: tuple[str, ...]
    seeds: tuple[int, ...]
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        """Number of (prompt, seed) pairs."""
        return len(self.texts)

    def __add__(self, other: Prompts) -> Prompts:
        """Both lists, one after the other."""
        return Prompts(self.texts + other.texts, self.seeds + other.seeds, self.scenes + other.scenes)


def _pool(name: PromptSetName) -> list[Scene]:
    match name:
        case "held_out_basic":
            return [scene for scene in all_scenes("basic") if scene.held_out]
        case "training":
            return [scene for scene in all_scenes("basic") if not scene.held_out]
        case "held_out_full" | "long":
            return [scene for scene in all_scenes("full") if scene.held_out]


def prompt_set(name: PromptSetName, count: int, seed: int) -> Prompts:
    """`count` prompts of a set; scenes repeat with new noise only after all were used once."""
    pool = _pool(name)
    rng = np.random.default_rng([seed, len(name), *name.encode()])
    order = [pool[i] for _ in range(-(-count // len(pool))) for i in rng.permutation(len(pool))][:count]
    long = name == "long"
    texts = tuple(long_caption(scene, i % 4) if long else short_caption(scene) for i, scene in enumerate(order))
    return Prompts(texts, tuple(seed * SEEDS_APART + i for i in range(count)), tuple(order))


def reference_scenes(name: PromptSetName, count: int, seed: int) -> list[Scene]:
    """Scenes of a set drawn independently: the kernel distance would be biased by a reference paired with the prompts."""
    pool = _pool(name)
    return [pool[i] for i in np.random.default_rng([seed, 9]).integers(len(pool), size=count)]


def several_seeds(prompts: int, seeds: int, seed: int) -> Prompts:
    """For diversity: each of the first held-out prompts with several noises, prompt by prompt."""
    base = prompt_set("held_out_basic", prompts, seed)
    scenes = tuple(scene for scene in base.scenes for _ in range(seeds))
    noises = tuple((seed + 1) * SEEDS_APART + i for i in range(len(scenes)))
    return Prompts(tuple(short_caption(scene) for scene in scenes), noises, scenes)


def subject_prompts(subject: SubjectConfig, seed: int) -> Prompts:
    """The subject alone in every single layout and background, under the name the checkpoint learnt."""
    layouts = [layout for layout in LAYOUTS if layout not in ("beside", "above", "three")]
    scenes = [Scene(layout, (subject.scene_object,), background) for background in BACKGROUNDS for layout in layouts]
    rng = np.random.default_rng([seed, 5])
    order = [scenes[i] for _ in range(-(-subject.prompts // len(scenes))) for i in rng.permutation(len(scenes))]
    order = order[: subject.prompts]
    texts = tuple(short_caption(scene).replace(subject.scene_object, subject.phrase) for scene in order)
    return Prompts(texts, tuple((seed + 2) * SEEDS_APART + i for i in range(len(order))), tuple(order))


def grid_prompts(count: int, seed: int, subjects: tuple[SubjectConfig, ...]) -> Prompts:
    """A few prompts for the eye: held-out scenes of as many layouts as fit, two long ones, one per subject."""
    long = 2 if count >= 6 else 0
    pool = prompt_set("held_out_full", len(_pool("held_out_full")), seed)
    chosen: list[int] = []
    while len(chosen) < count - long:
        for layout in LAYOUTS:
            free = (i for i, scene in enumerate(pool.scenes) if scene.layout == layout and i not in chosen)
            chosen.append(next(free))
    chosen = chosen[: count - long]
    picked = Prompts(tuple(pool.texts[i] for i in chosen), tuple(pool.seeds[i] for i in chosen),
                     tuple(pool.scenes[i] for i in chosen))  # fmt: skip
    if long:
        picked += prompt_set("long", long, seed)
    for subject in subjects:
        one = subject_prompts(subject, seed)
        picked += Prompts(one.texts[:1], one.seeds[:1], one.scenes[:1])
    return picked


def geneval_list(file: PromptFile, seed: int) -> Prompts:
    """Each prompt of a file with several noises, prompt by prompt; there are no scenes."""
    texts = tuple(prompt.text for prompt in file_prompts(file) for _ in range(file.pictures))
    return Prompts(texts, tuple((seed + 3) * SEEDS_APART + i for i in range(len(texts))), ())
