"""Encoded arrays in the store: found again by content, every damaged bit noticed, removed when no run used them."""

import random
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infra import encode_cache
from infra.encode_cache import forget_space, key_of, space, spaces_unused_since, through


@pytest.fixture
def arrays() -> dict[bytes, np.ndarray]:
    draw = np.random.default_rng(0)
    shapes = [(3, 4), (1, 7), (5,), (2, 2, 3)]
    return {key_of("x", i): draw.normal(size=shape).astype(np.float16) for i, shape in enumerate(shapes)}


def same(found: dict[bytes, np.ndarray], arrays: dict[bytes, np.ndarray]) -> bool:
    return found.keys() == arrays.keys() and all(np.array_equal(found[key], arrays[key]) for key in arrays)


def test_arrays_come_back_whole_and_only_what_was_asked_for(tmp_path: Path, arrays, monkeypatch) -> None:
    monkeypatch.setattr(encode_cache, "MOST_BYTES", 40)  # several shards
    kept = space(str(tmp_path), "text", "float16", model="m")
    kept.write(arrays)
    index = kept.index()
    assert index.keys() == arrays.keys()
    assert len(set(index.values())) == 2
    assert same(kept.read(index), arrays)
    some = dict(list(index.items())[:1])
    assert kept.read(some).keys() == some.keys()
    folder = tmp_path / ".encoded" / kept.name
    for shard in folder.glob("*.parquet"):
        pq.read_table(shard, page_checksum_verification=True)


def test_another_model_is_another_space_and_without_a_root_nothing_is_kept(tmp_path: Path, arrays) -> None:
    kept = space(str(tmp_path), "text", "float16", model="m", revision="1")
    kept.write(arrays)
    assert space(str(tmp_path), "text", "float16", model="m", revision="2").index() == {}
    nowhere = space(None, "text", "float16", model="m")
    nowhere.write(arrays)
    assert nowhere.index() == nowhere.read({}) == {}


def test_through_makes_what_is_missing_once_and_keeps_the_order(tmp_path: Path, arrays) -> None:
    kept, keys, asked = space(str(tmp_path), "text", "float16", model="m"), [*arrays], list[int]()
    kept.write({keys[1]: arrays[keys[1]]})

    def make(places: list[int]) -> list[np.ndarray]:
        asked.extend(places)
        return [arrays[wanted[place]] for place in places]

    wanted = [keys[0], keys[1], keys[0], keys[2]]
    for index, made in ((kept.index(), 2), (None, 0)):
        found, count = through(kept, kept.index() if index is None else index, wanted, make)
        assert count == made
        assert all(np.array_equal(got, arrays[key]) for got, key in zip(found, wanted, strict=True))
    assert asked == [0, 3]


def test_every_flipped_bit_is_noticed_and_what_is_damaged_is_removed(tmp_path: Path, arrays, caplog) -> None:
    kept = space(str(tmp_path), "text", "float16", model="m")
    kept.write(arrays)
    folder, draw = tmp_path / ".encoded" / kept.name, random.Random(0)
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(60):
        name = draw.choice(sorted(sound))
        damaged = bytearray(sound[name])
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(damaged)
        assert kept.read(kept.index()) == {}
        assert [path.name for path in folder.iterdir()] == ["used"]
        assert "is damaged or gone; removed" in caplog.text
        caplog.clear()
        kept.write(arrays)
    assert same(kept.read(kept.index()), arrays)


def test_a_shard_that_lacks_its_keys_after_a_kill_is_written_again(tmp_path: Path, arrays) -> None:
    kept = space(str(tmp_path), "text", "float16", model="m")
    kept.write(arrays)
    next((tmp_path / ".encoded" / kept.name).glob("*.keys")).unlink()
    assert kept.index() == {}
    kept.write(arrays)
    assert same(kept.read(kept.index()), arrays)


def test_a_space_that_no_run_opened_can_be_found_and_removed(tmp_path: Path, arrays) -> None:
    kept = space(str(tmp_path), "text", "float16", model="m")
    before = time.time()
    kept.write(arrays)
    assert spaces_unused_since(str(tmp_path), before) == (kept.name,)  # written, but opened by nobody
    kept.index()
    assert spaces_unused_since(str(tmp_path), before) == ()
    forget_space(str(tmp_path), kept.name)
    assert kept.index() == {}
