"""Colours, counts and places stay with their things: swapped ones are refused, the demo's own pairs never are."""

import numpy as np
import pytest

from data_curation.scenes import Scene, all_scenes, long_caption, short_caption
from models.posttraining import binding
from models.posttraining.binding import phrases, relations
from models.posttraining.caption_pairs import shorten
from models.posttraining.intent import Intent

SWAPPED = [
    ("a red cube on a blue sphere", "a blue cube on a red sphere", "'blue' of 'cub'"),
    ("a big red cube and a big blue sphere", "a big blue cube and a big red sphere", "'red' of"),
    ("a red cube on a blue sphere", "a cube that is blue on a sphere that is red", "'red' of"),
    ("red cats blue dogs", "blue cats and red dogs", "'red' of"),
    ("two cats and three dogs", "three cats and two dogs", "'two' of 'dog'"),
    ("2 cats and 3 dogs", "3 cats and 2 dogs", "'2' of 'dog'"),
    ("a pair of cats and a dog", "a cat and a pair of dogs", "'pair' of 'dog'"),
    ("a red cat", "a big cat on a red background", "does not say 'red' of 'cat'"),
    ("rocket on pink", "a pink rocket", "'pink' of 'rocket'"),
    ("cat left of dog", "dog left of cat", "'left of'"),
    ("cat left of dog", "a dog sitting to the left of a big cat", "'left of'"),
    ("cat above dog", "a dog above a cat", "'above'"),
    ("a cat in front of a tree", "a tree in front of a cat", "'in front of'"),
    ("two cats beside three dogs, a tree behind a house", "a house behind a tree, two cats beside three dogs", "'behind'"),
    ("a cat on a mat", "a mat on a cat", "'on'"),
    ("a car left of a cat", "In this drawing on the left side there is a cat and on the right side there is a car.", "'left of'"),
    ("a cat left of a key", "a cat stands on the right, with a key to the left of it", "'left of'"),
    ("a cat above a key", "a cat is below and a key is right above it", "'above'"),
]  # fmt: skip
HONEST = [
    ("a red cube on a blue sphere", "a shiny red cube on a large blue sphere"),
    ("a red cube on a blue sphere", "a cube that is red on a sphere that is blue"),
    ("red and blue balls", "many blue and red balls"),
    ("a white and black cat", "a sleeping black and white cat"),
    ("key, red", "a big key on a red background"),
    ("rocket on pink", "a big rocket on a pink background"),
    ("three, cars", "three cars on a gray background"),
    ("three cats", "three fluffy cats sleeping"),
    ("a pair of cats and a dog", "a dog and a pair of fluffy cats"),
    ("cat left of dog", "a cat standing to the left of a sleeping dog"),
    ("cat and dog", "a cat left of a dog"),
    ("a cat on a mat", "a mat with a cat on it"),
    ("a lamp left of a big lamp", "a big lamp left of a lamp"),
    ("a dog and a cat left of a tree", "a cat and a dog left of a tree"),
    ("a cat left of a key", "a key stands on the right, with a cat to the left of it"),
    ("a cat above a key", "a key is below and a cat is right above it"),
]


@pytest.mark.parametrize(("prompt", "revised", "why"), SWAPPED)
def test_what_is_said_of_another_thing_is_refused(prompt: str, revised: str, why: str) -> None:
    fault = [*binding.moved(prompt, revised), *binding.turned(prompt, revised)]
    assert any(why in each for each in fault)
    assert Intent().fault(prompt, revised) is not None


@pytest.mark.parametrize(("prompt", "revised"), HONEST)
def test_honest_rewrites_pass(prompt: str, revised: str) -> None:
    assert [*binding.moved(prompt, revised), *binding.turned(prompt, revised)] == []


def scenes(count: int) -> list[Scene]:
    there = all_scenes("full")
    return [there[i] for i in np.random.default_rng(0).choice(len(there), count, replace=False)]


def test_no_pair_of_captions_that_shows_one_scene_is_refused() -> None:
    for i, scene in enumerate(scenes(400)):
        short, long = short_caption(scene), long_caption(scene, i % 4)
        typed = shorten(short, np.random.default_rng(i))
        for prompt, revised in ((typed, short), (short, short), (short, long), (typed, long)):
            assert [*binding.moved(prompt, revised), *binding.turned(prompt, revised)] == [], (prompt, revised)


def test_captions_with_the_objects_swapped_are_refused() -> None:
    pairs = [scene for scene in scenes(1500) if len(set(scene.objects)) == 2]
    assert len(pairs) > 300
    for i, scene in enumerate(pairs):
        swapped = Scene(scene.layout, scene.objects[::-1], scene.background)
        short = short_caption(scene)
        assert Intent().fault(short, short_caption(swapped)) is not None
        assert [*binding.turned(short, long_caption(swapped, i % 4))] != [], long_caption(swapped, i % 4)


def test_phrases_and_relations_by_hand() -> None:
    found = [(phrase.said, sorted(phrase.things), phrase.own) for phrase in phrases("two red cats, a dog that is blue")]
    assert found == [(("two", "red"), ["cat"], True), ((), ["dog"], True), (("blue",), ["dog"], False)]
    assert [(p.said, sorted(p.things)) for p in phrases("key on red")] == [((), ["key"]), (("red",), [])]
    (one,) = relations("a dog right of a big red cat on grass")[:1]
    assert (one.kind, sorted(one.first), sorted(one.second)) == ("left", ["big", "cat"], ["dog"])
