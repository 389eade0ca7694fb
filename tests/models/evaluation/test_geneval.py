"""GenEval's rules on boxes made by hand, where the answer follows from the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.evaluation.geneval import Found, Prompt, answer, overlap, read_prompts, relations, surest
from models.evaluation.intervals import mean_of_groups, share_by_prompt, wilson

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}],
     "prompt": "a photo of three cats"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "blue"}], "prompt": "a photo of a blue cow"},
    {"tag": "position", "include": [{"class": "bear", "count": 1},
                                    {"class": "dog", "count": 1, "position": ["right of", 0]}],
     "prompt": "a photo of a dog right of a bear"},
]  # fmt: skip


def at(name: str, x: float, y: float, side: float = 10.0, score: float = 0.95) -> Found:
    """A square object around a centre."""
    return Found(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def no_colour(objects, name) -> list[str]:
    raise AssertionError(f"the colour of {name} was asked")


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, Prompt]:
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return {prompt.tag: prompt for prompt in read_prompts(tmp_path / "p.jsonl")}


def right(prompt: Prompt, found: list[Found], colours=no_colour, above: float = 0.3) -> bool:
    return not answer(prompt, surest(found, above), colours)


def test_counts_are_at_least_and_below_the_excluded(prompts) -> None:
    cats = [at("cat", 20 * i, 0) for i in range(5)]
    assert [right(prompts["counting"], cats[:n]) for n in range(6)] == [False, False, False, True, False, False]
    assert answer(prompts["counting"], surest(cats[:4], 0.3), no_colour) == ["expected fewer than 4 cat, found 4"]
    assert right(prompts["single_object"], [at("bench", 0, 0), at("bench", 50, 0), at("cat", 9, 9)])  # more is right
    assert answer(prompts["single_object"], {}, no_colour) == ["expected 1 bench, found 0"]


def test_only_what_is_above_the_confidence_counts_and_the_surest_are_taken(prompts) -> None:
    scores = (0.91, 0.9, 0.95, 0.92, 0.31)
    cats = [at("cat", 20 * i, 0, score=score) for i, score in enumerate(scores)]
    assert right(prompts["counting"], cats, above=0.9)  # .9 is not above .9
    assert not right(prompts["counting"], cats, above=0.3)
    assert [each.score for each in surest(cats, 0.9)["cat"]] == [0.95, 0.92, 0.91]
    assert len(surest([at("cat", i, 0) for i in range(40)], 0.3)["cat"]) == 16


def test_overlapping_boxes_are_one_object_only_if_that_is_asked() -> None:
    pair = [at("cat", 0, 0, score=0.9), at("cat", 1, 0, score=0.8), at("dog", 1, 0)]
    assert overlap(pair[0].box, pair[1].box) == pytest.approx(9 / 11)
    assert [len(surest(pair, 0.3, most)["cat"]) for most in (1.0, 0.9, 0.8)] == [2, 2, 1]
    assert len(surest(pair, 0.3, 0.1)["dog"]) == 1  # another class does not hide it


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (30, 0, {"right of"}), (-30, 0, {"left of"}), (0, 30, {"below"}), (0, -30, {"above"}),
        (30, 30, {"right of", "below"}),  # (30 - 2) / (30 sqrt 2) = .66
        (2, 0, set()),  # within a tenth of 10 + 10
        (2.1, 0, set()),  # .1 / 2.1 of the offset is left: below a half
        (4.1, 0, {"right of"}),  # 2.1 / 4.1 > 1/2
        (3.9, 0, set()),
        (30, 14, {"right of"}),  # (14 - 2) / 33.1 = .36
        (0, 0, set()),
    ],
)  # fmt: skip
def test_a_relation_is_the_larger_part_of_an_offset_beyond_the_margin(x: float, y: float, expected: set[str]) -> None:
    assert relations(at("a", x, y).box, at("b", 0, 0).box) == expected


def test_a_position_is_asked_of_the_surest_and_needs_its_target(prompts) -> None:
    bear, dog = at("bear", 0, 0), at("dog", 40, 0)
    assert right(prompts["position"], [bear, dog])
    assert not right(prompts["position"], [bear, at("dog", -40, 0)])
    assert right(prompts["position"], [bear, dog, at("dog", -40, 0, score=0.5)])  # the less sure dog is not asked
    assert not right(prompts["position"], [bear, dog, at("dog", -40, 0, score=0.99)])
    wrong = answer(prompts["position"], surest([dog], 0.3), no_colour)
    assert wrong == ["expected 1 bear, found 0", "nothing for dog to be right of"]


def test_a_colour_is_asked_of_as_many_as_are_taken(prompts) -> None:
    asked = []

    def colours(objects, name):
        asked.append((len(objects), name))
        return ["blue" if each.box[0] < 0 else "red" for each in objects]

    assert right(prompts["colors"], [at("cow", 0, 0)], colours)
    assert not right(prompts["colors"], [at("cow", 90, 0), at("cow", 0, 0, score=0.5)], colours)
    assert asked == [(1, "cow"), (1, "cow")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ('{"tag": "x", "prompt": "y"}', "'include' is missing"),
        ('{"tag": "x", "prompt": "y", "include": []}', "both clause lists are empty"),
        ('{"tag": "x", "prompt": "y", "include": [{"class": "cat", "count": 0}]}', "count 0"),
        ('{"tag": "x", "prompt": "y", "include": [{"class": "cat", "count": 1, "color": "teal"}]}', "color 'teal'"),
        ('{"tag": "x", "prompt": "y", "include": [{"class": "cat", "count": 1, "position": ["above", 0]}]}', "earlier"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(LINES[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl line 2") as error:
        read_prompts(tmp_path / "p.jsonl")
    assert message in str(error.value)
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "p.jsonl")


def test_pictures_of_one_prompt_are_not_independent() -> None:
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.random((60, 1)) < 0.5, 4, axis=1)  # all four pictures of a prompt are right, or none
    found, naive = share_by_prompt(alike, 2000, np.random.default_rng(1)), wilson(alike.reshape(-1))
    assert found["value"] == naive["value"]
    share = alike[:, 0].mean()  # of 60 independent answers; the bootstrap's ends are multiples of 1/60
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / 60), abs=1 / 60)
    assert found["high"] - found["low"] > 1.7 * (naive["high"] - naive["low"])
    assert share_by_prompt(np.ones((8, 4), bool), 100, rng) == wilson(np.ones(8, bool))
    assert share_by_prompt(alike[:, :1], 100, rng) == wilson(alike[:, 0])


def test_the_mean_over_tags_weighs_tags_not_prompts() -> None:
    groups = [np.ones(90), np.zeros(10)]
    assert mean_of_groups(groups, 50, np.random.default_rng(0))["value"] == 0.5
    noisy = [np.random.default_rng(i).random(50) for i in (1, 2)]
    found = mean_of_groups(noisy, 4000, np.random.default_rng(0))
    error = np.sqrt(sum(each.var() / 50 for each in noisy)) / 2  # of the mean of two independent means
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found["n"] == 100
