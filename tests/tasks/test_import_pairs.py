import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.errors import DataRefused
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.posttraining.config import ImportPairsConfig
from models.posttraining.preference_pairs import read_pairs
from tasks.preference import import_pairs


def picture(shade: int, width: int = 48, height: int = 48) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def run(tmp_path, table: dict):
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    context = StageContext("pairs-table", {}, {}, out, out, Resources(), no_progress, fan_out_here)
    return import_pairs(ImportPairsConfig(table=str(tmp_path / "t.parquet"), side=16, held_out=0.5), context), out


def test_pick_a_pic_rows_become_pairs_and_every_dropped_row_has_its_reason(tmp_path) -> None:
    rows = [
        ("a cat", picture(10), picture(200), 1.0), ("a dog", picture(20), picture(90), 0.0),
        ("a tie", picture(10), picture(90), 0.5), ("broken", picture(10)[:40], picture(90), 1.0),
        ("wide", picture(10, 96, 48), picture(90), 1.0), ("twice", picture(10), picture(10), 1.0),
        ("  ", picture(10), picture(90), 1.0), ("odd", picture(10), picture(90), None),
        ("weak", picture(30), picture(60), 0.75),
    ]  # fmt: skip
    facts, out = run(
        tmp_path, dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), map(list, zip(*rows, strict=True)), strict=True))
    )
    pairs = read_pairs(out)
    assert facts["received"] == 9 == facts["pairs"] + sum(facts["dropped"].values())
    assert facts["dropped"] == dict.fromkeys(
        ("tie", "picture missing or broken", "pictures of different shapes", "same picture twice", "no prompt",
         "label is no preference"), 1,
    )  # fmt: skip
    assert pairs.prompts == ("a cat", "a dog", "weak")
    assert pairs.winner[:, 0, 0, 0].tolist() == [10, 90, 30]
    assert pairs.strength.tolist() == [1.0, 1.0, 0.5]


def test_rows_that_contradict_each_other_are_both_dropped_and_counted(tmp_path) -> None:
    table = {
        "caption": ["x", "x", "y", "x"], "jpg_0": [picture(10), picture(200), picture(10), picture(10)],
        "jpg_1": [picture(200), picture(10), picture(200), picture(90)], "label_0": [1.0, 1.0, 0.0, 1.0],
    }  # fmt: skip
    facts, out = run(tmp_path, table)
    assert facts["dropped"] == {"contradicted": 2}
    assert facts["received"] == 4
    assert read_pairs(out).prompts == ("y", "x")


def test_hpd_votes_and_paths_are_read_and_paths_stay_in_the_folder(tmp_path) -> None:
    for name, shade in (("a.png", 10), ("b.png", 200)):
        (tmp_path / name).write_bytes(picture(shade))
    table = {
        "prompt": ["x", "y", "z"], "image_path_0": ["a.png", "a.png", "../../etc/passwd"],
        "image_path_1": ["b.png", "b.png", "b.png"], "human_preference": [[0, 1], [1, 1], [1, 0]],
    }  # fmt: skip
    facts, out = run(tmp_path, table)
    assert facts["dropped"] == {"tie": 1, "picture missing or broken": 1}
    assert read_pairs(out).winner[0, 0, 0, 0] == 200


def test_a_table_without_labels_or_usable_rows_is_refused(tmp_path) -> None:
    with pytest.raises(DataRefused, match="none of the columns"):
        run(tmp_path, {"prompt": ["x"], "jpg_0": [b""], "jpg_1": [b""]})
    with pytest.raises(DataRefused, match="no usable pair"):
        run(tmp_path, {"prompt": ["x"], "jpg_0": [b"1"], "jpg_1": [b"2"], "label_0": [1.0]})
