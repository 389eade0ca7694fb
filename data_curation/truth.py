"""Score of a curation against the demo web's truth: planted defects caught with the right reason, sound rows lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_curation.demo_web import COPIES
from data_curation.manifest import KEEP, Row

REASONS = {
    "exact_duplicate": {"exact_duplicate", "near_duplicate"}, "near_duplicate": {"near_duplicate"},
    "http_404": {"http_404"}, "corrupt": {"corrupt"}, "truncated": {"truncated"}, "not_image": {"not_image"},
    "too_small": {"too_small"}, "oversize": {"oversize"}, "blurred": {"blurred"},
    "over_compressed": {"over_compressed"}, "caption_mismatch": {"caption_mismatch"},
}  # fmt: skip
COPY_REASONS = {"exact_duplicate", "near_duplicate"}


def score_truth(rows: list[Row], source: Path) -> dict[str, Any]:
    """Planted and caught per defect; near-duplicate recall and precision; sound rows lost, and why.

    Which of two copies is kept is the curator's choice: an original dropped for its planted copy catches that copy.
    """
    truth = {row["row_id"]: row for row in pq.read_table(source / "truth.parquet").to_pylist()}
    by_id = {row["row_id"]: row for row in rows}
    group = {row_id: fact["duplicate_of"] or row_id for row_id, fact in truth.items()}
    spared = _spared(by_id, group)
    planted: dict[str, dict[str, int]] = {name: {"planted": 0, "caught": 0} for name in REASONS}
    lost: dict[str, int] = {}
    num_sound = 0
    for row_id, fact in truth.items():
        row, defect = by_id[row_id], fact["defect"]
        swapped = _goes_for_its_copy(row, group)
        if defect is None:
            num_sound += 1
            if row["decision"] != KEEP and not swapped:
                lost[row["reasons"][0]] = lost.get(row["reasons"][0], 0) + 1
            continue
        planted[defect]["planted"] += 1
        right = bool(REASONS[defect] & set(row["reasons"] or ()))
        if defect in COPIES:
            right = swapped or (row_id in spared)
        planted[defect]["caught"] += right
    dropped = [row for row in rows if row["decision"] != KEEP and "near_duplicate" in row["reasons"]]
    correct = sum(group[row["row_id"]] == group[row["keeper_id"]] for row in dropped)
    near = planted["near_duplicate"]
    return {
        "defects": planted,
        "defects_planted": sum(count["planted"] for count in planted.values()),
        "defects_caught": sum(count["caught"] for count in planted.values()),
        "near_duplicate_recall": round(near["caught"] / max(near["planted"], 1), 4),
        "near_duplicate_precision": round(correct / max(len(dropped), 1), 4),
        "sound_rows": num_sound, "sound_rows_lost": sum(lost.values()), "lost_by_reason": dict(sorted(lost.items())),
    }  # fmt: skip


def _goes_for_its_copy(row: Row, group: dict[str, str]) -> bool:
    dropped = bool(COPY_REASONS & set(row["reasons"] or ()))
    return dropped and group.get(row["keeper_id"] or "") == group[row["row_id"]]


def _spared(by_id: dict[str, Row], group: dict[str, str]) -> set[str]:
    """Planted copies that stayed as the only member of their group: the original went in their place."""
    remaining: dict[str, list[str]] = {}
    for row_id, name in group.items():
        if not _goes_for_its_copy(by_id[row_id], group):
            remaining.setdefault(name, []).append(row_id)
    return {members[0] for members in remaining.values() if len(members) == 1}
