"""Pointers on a disk and in a bucket: of eight that move at once one wins, history is kept, a rollback goes back."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from infra.artifacts import Artifact
from infra.errors import ConfigError, LifecycleError
from infra.pointers import move, moves, rollback
from infra.storage import Store, open_store

Commit = Callable[..., Artifact]


def _artifact(digest: str) -> Artifact:
    return Artifact(kind="checkpoint", uri=f"file:///{digest}", digest=digest, stage="nightly")


def test_of_eight_racers_one_wins(store: Store) -> None:
    def race(number: int) -> str:
        try:
            return move(open_store(store.root), "champion", 0, _artifact(str(number)), f"run-{number}", "race").run
        except LifecycleError as error:
            assert "moved by another run" in str(error)
            return ""

    with ThreadPoolExecutor(8) as pool:
        winners = [name for name in pool.map(race, range(8)) if name]
    assert winners == [each.run for each in moves(store, "champion")]
    assert len(winners) == 1


def test_of_eight_racers_for_one_stage_key_one_commits(store: Store, commit: Commit) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: commit(open_store(store.root), name=f"out-{n}", a=bytes([n])), range(8)))
    assert len({artifact.digest for artifact in made}) == 1
    assert [artifact.digest for artifact in store.list()] == [made[0].digest]


def test_history_is_kept_and_rollback_goes_one_back_each_time(store: Store) -> None:
    for number, name in enumerate("abc"):
        move(store, "champion", number, _artifact(name), f"night-{name}", "better")
    again = move(store, "champion", 3, _artifact("c"), "night-c", "better")  # a retried run
    assert again.generation == 3
    assert rollback(store, "champion").artifact.digest == "b"
    assert rollback(store, "champion").artifact.digest == "a"
    with pytest.raises(ConfigError, match="never anywhere else"):
        rollback(store, "champion")
    move(store, "champion", 5, _artifact("d"), "night-d", "better")
    assert [each.artifact.digest for each in moves(store, "champion")] == ["a", "b", "c", "b", "a", "d"]
    assert rollback(store, "champion").artifact.digest == "a"  # b and c had been given up
    with pytest.raises(ConfigError, match="no pointer 'chmpion'"):
        rollback(store, "chmpion")
