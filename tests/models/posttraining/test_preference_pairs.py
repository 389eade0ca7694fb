from dataclasses import replace

import numpy as np
import pytest

from infra.errors import DataRefused
from models.posttraining.preference_pairs import (
    HELD_OUT,
    TRAIN,
    PreferencePairs,
    checked,
    read_pairs,
    split_of,
    write_pairs,
)


@pytest.fixture
def pairs() -> PreferencePairs:
    rng = np.random.default_rng(0)
    winner, loser = rng.integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)
    return PreferencePairs(("a", "b", "b"), winner, loser, ("x",) * 3, np.array([1.0, 0.5, 0.2]), (TRAIN, HELD_OUT, HELD_OUT))  # fmt: skip


def test_written_pairs_come_back_and_only_one_side_is_trained_on(pairs, tmp_path) -> None:
    write_pairs(pairs, tmp_path)
    found = read_pairs(tmp_path)
    assert found.prompts == pairs.prompts
    np.testing.assert_array_equal(found.winner, pairs.winner)
    assert found.of(TRAIN).prompts == ("a",)
    assert len(found.of(HELD_OUT)) == 2


def test_what_is_no_preference_is_refused_with_its_row(pairs, tmp_path) -> None:
    with pytest.raises(DataRefused, match="row 1 has strength 0.0"):
        checked(replace(pairs, strength=np.array([1.0, 0.0, 1.0])))
    with pytest.raises(DataRefused, match="row 1 has strength nan"):
        checked(replace(pairs, strength=np.array([1.0, np.nan, 1.0])))
    with pytest.raises(DataRefused, match="one bucket"):
        checked(replace(pairs, loser=pairs.loser[:, :4]))
    with pytest.raises(DataRefused, match="row 0 compares a picture with itself"):
        checked(replace(pairs, loser=pairs.winner))
    winner, loser = pairs.winner.copy(), pairs.loser.copy()
    winner[2], loser[2] = loser[1], winner[1]
    with pytest.raises(DataRefused, match="row 2 is row 1 the other way round"):
        checked(replace(pairs, winner=winner, loser=loser))
    with pytest.raises(DataRefused, match="row 2.*'B '.*split by prompt"):
        checked(replace(pairs, prompts=("a", "b", "B "), split=(TRAIN, HELD_OUT, TRAIN)))
    with pytest.raises(DataRefused, match="none of 3 is in 'nowhere'"):
        pairs.of("nowhere")
    with pytest.raises(DataRefused, match="cannot be read"):
        read_pairs(tmp_path / "none")


def test_the_split_reads_the_prompt_alone() -> None:
    sides = [split_of(f"prompt {i}", 0.2, 0) for i in range(1000)]
    assert 150 < sides.count(HELD_OUT) < 250
    assert all(split_of(f"Prompt  {i}", 0.2, 0) == side for i, side in enumerate(sides))
