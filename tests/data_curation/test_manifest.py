"""A picture shard that changed on disk is refused, not read."""

from pathlib import Path

import pytest

from data_curation.manifest import ROWS_SCHEMA, pictures, write_table


def test_a_flipped_bit_in_a_picture_is_refused(tmp_path: Path) -> None:
    shard, picture = tmp_path / "rows-00000.parquet", bytes(range(256))
    write_table([{"row_id": "a", "image": picture}], ROWS_SCHEMA, shard)
    assert list(pictures(shard)) == [("a", picture)]
    data = bytearray(shard.read_bytes())
    data[data.index(bytes(range(100, 200)))] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        list(pictures(shard))
