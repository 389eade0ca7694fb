"""What short prompts ask, how pictures of them are judged and counted, and the stage on a random model."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_curation.scenes import BACKGROUNDS, CORNERS, OBJECTS, all_scenes, long_caption, plural, short_caption
from models.evaluation.prompt_categories import Asked
from models.posttraining.config import PromptCheckConfig
from models.posttraining.intent import Intent
from models.posttraining.prompt_enhancement import Enhancer
from tasks import prompt_check as stage
from tasks.prompt_check import Typed, judged, prompt_check, scores, short_prompts


def read(text: str) -> tuple[str, Asked]:
    """Kind and question of a prompt, from its words."""
    singular = {plural(name): name for name in OBJECTS}
    for corner in CORNERS:
        if text.endswith(f" {corner}"):
            return "place", Asked((text.removesuffix(f" {corner}"),), layout=corner)
    for word, kind in ((" left of ", "relation"), (" and ", "two objects"), (" on ", "object on colour")):
        if word in text:
            first, last = text.split(word)
            return kind, {
                "relation": Asked((first, last), layout="beside", ordered=True),
                "two objects": Asked((first, last)), "object on colour": Asked((first,), background=last),
            }[kind]  # fmt: skip
    if text.startswith("three "):
        return "count", Asked((singular[text.removeprefix("three ")],), count=3)
    return "object", Asked((text,))


def test_short_prompts_ask_what_they_say_and_none_is_a_caption() -> None:
    prompts = short_prompts(240, 4321)
    assert set(Counter(prompt.kind for prompt in prompts).values()) == {40}
    captions = {caption(scene) for scene in all_scenes("full") for caption in (short_caption, long_caption)}
    for prompt in prompts:
        assert (prompt.kind, prompt.asked) == read(prompt.text)
        assert prompt.text not in captions
        assert set(prompt.asked.objects) <= set(OBJECTS)
        assert prompt.asked.background in (None, *BACKGROUNDS)
        assert len(set(prompt.asked.objects)) == len(prompt.asked.objects)
    assert short_prompts(240, 4321) == prompts
    assert short_prompts(12, 4321) == prompts[:12]
    assert short_prompts(240, 1) != prompts


class SeesCatAndDog:
    """A judge that sees one thing in every picture: a cat left of a dog on red, but rejects what is white."""

    def __init__(self) -> None:
        self.settings = {"reject_above": 0.5}
        self.vocabulary = SimpleNamespace(
            layouts=("big", "beside"), backgrounds=("red", "blue"), objects=("cat", "dog")
        )

    def logits(self, images):
        one, many = torch.tensor([[9.0, 0.0]]), len(images)
        white = torch.from_numpy((images.mean((1, 2, 3)) > 200).astype(np.float32))
        part = {"reject": (white * 20 - 10)[:, None], "layout": one.flip(1).expand(many, 2),
                "background": one.expand(many, 2), "object_1": one.expand(many, 2), "object_2": one.flip(1).expand(many, 2)}  # fmt: skip
        return part, part


def test_pictures_are_judged_by_what_was_typed_and_by_no_more() -> None:
    typed = [
        Typed("relation", "cat left of dog", Asked(("cat", "dog"), layout="beside", ordered=True)),
        Typed("relation", "dog left of cat", Asked(("dog", "cat"), layout="beside", ordered=True)),
        Typed("two objects", "dog and cat", Asked(("dog", "cat"))),
        Typed("object on colour", "cat on blue", Asked(("cat", "dog"), background="blue")),
        Typed("two objects", "cat and dog", Asked(("cat", "dog"))),
    ]
    images = np.zeros((5, 8, 8, 3), np.uint8)
    images[4] = 255
    found = judged(SeesCatAndDog(), typed, images)
    assert found["all"].tolist() == [True, False, True, False, False]
    assert found["position"].tolist() == [True, False]
    assert found["colour"].tolist() == [False]


def test_scores_are_shares_with_a_paired_difference() -> None:
    typed = [Typed(kind, kind, Asked(("cat",))) for kind in ("object", "count") for _ in range(10)]
    before, after = np.arange(20) < 2, np.arange(20) % 2 == 0
    found = scores(typed, {"typed": {"all": before}, "rewritten": {"all": after}})
    assert found["short_prompt_accuracy"]["typed"]["value"] == pytest.approx(0.1)
    assert found["short_prompt_accuracy"]["rewritten"]["value"] == pytest.approx(0.5)
    assert found["difference"]["value"] == pytest.approx(0.4)
    assert found["by_kind"]["object"]["typed"]["value"] == pytest.approx(0.2)
    assert found["by_kind"]["count"]["typed"]["value"] == 0
    assert found["by_kind"]["count"]["rewritten"]["n"] == 10


class Rewrites:
    """Fills out prompts of some kinds and has nothing to say on others."""

    def rewrite(self, prompt: str) -> tuple[str | None, str | None]:
        if " on " not in prompt:
            return None, "not taught"
        return f"a big {prompt} background", None


def test_the_stage_counts_spans_of_rewritten_prompts_only(inputs, context, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stage, "load_enhancer", lambda folder, triggers: Enhancer(Rewrites(), Intent(), "x"))
    ctx = context("check", {**inputs, "enhancer": tmp_path}, tmp_path)
    facts = prompt_check(PromptCheckConfig(prompts=12), ctx)
    assert (facts["rewritten"], facts["protected"], facts["protected_kept"]) == (2, 2, 2)  # a colour each; not "three"
    rows = json.loads((ctx.out / "prompts.json").read_text())["rows"]
    assert [row["reason"] is None for row in rows] == [" on " in row["original"] for row in rows]
    for i, row in enumerate(rows):
        if row["reason"] is not None:  # the same words and the same noise
            assert (ctx.out / "typed" / f"{i}.png").read_bytes() == (ctx.out / "rewritten" / f"{i}.png").read_bytes()
