"""The figures of the prompt enhancement benchmark from rows written by hand."""

from pathlib import Path

import pytest

from benchmarks.prompt_enhancement import drawing, figures_of, told_of

PROMPTS = 40


def rows(typed: int, rewritten: int) -> list[dict]:
    """The first so many prompts are right."""
    return [
        {"original": f"prompt {i}", "right": {"typed": i < typed, "rewritten": i < rewritten}} for i in range(PROMPTS)
    ]


def facts(protected: int, kept: int) -> dict:
    return {"rewritten": 30, "protected": protected, "protected_kept": kept, "by_kind": {}}


def test_differences_are_paired_and_a_bar_is_met_by_the_lower_end() -> None:
    told = told_of([facts(5, 5)] * 3, [rows(4, 20), rows(4, 24), rows(4, 28)])
    assert (told["typed"], told["rewritten"]) == pytest.approx((0.1, 0.6))
    assert told["difference"]["value"] == pytest.approx(0.5)
    assert [each["difference"]["value"] for each in told["seeds"]] == pytest.approx([0.4, 0.5, 0.6])
    assert told["difference"]["n"] == PROMPTS  # prompts are resampled, not pairs of prompt and seed
    assert all(each["met"] for each in figures_of(told))

    same = told_of([facts(5, 5)] * 3, [rows(4, 4), rows(4, 4), rows(4, 5)])
    met = {each["name"]: each["met"] for each in figures_of(same)}
    assert met == {
        "difference_all_seeds": False, "difference_seed_0": False, "difference_seed_1": False, "difference_seed_2": False,
        "protected_spans_kept": True,
    }  # fmt: skip
    assert same["seeds"][0]["difference"]["high"] == 0


def test_a_lost_span_or_none_at_all_misses_the_bar() -> None:
    for last, met in ((facts(5, 5), True), (facts(0, 0), True), (facts(5, 4), False)):
        told = told_of([facts(5, 5), facts(5, 5), last], [rows(4, 20)] * 3)
        assert figures_of(told)[-1]["met"] == met
    assert figures_of(told_of([facts(0, 0)] * 3, [rows(4, 20)] * 3))[-1] == {
        "name": "protected_spans_kept", "value": 0.0, "bar": 1.0, "met": False,
    }  # fmt: skip


def test_seeds_asked_different_prompts_are_not_compared() -> None:
    with pytest.raises(AssertionError):
        told_of([facts(5, 5)] * 2, [rows(4, 20), rows(4, 20)[::-1]])


def test_dpo_draws_or_else_sft() -> None:
    folders = {name: Path(name) for name in ("encode", "sft", "dpo")}
    assert drawing(folders) == ("dpo", Path("dpo"))
    assert drawing({name: folders[name] for name in ("encode", "sft")}) == ("sft", Path("sft"))
    with pytest.raises(SystemExit, match="has none of the stages"):
        drawing({"encode": Path("encode")})
