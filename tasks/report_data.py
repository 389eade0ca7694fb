"""The report's part about the data: what curation refused, what it kept, what it nearly refused, and the buckets."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from data_curation.bucket_facts import BATCHES
from data_curation.manifest import pictures, read_manifest, shards
from infra.stages import StageContext
from tasks.config import ReportConfig
from tasks.report_parts import thumbnail

LIMITS = (  # column of the manifest, setting it is compared with, reason of what is beyond
    ("blur", "max_blur", "blurred"), ("jpeg_quality", "min_jpeg_quality", "over_compressed"),
    ("contrast", "min_contrast", "no_content"), ("border", "max_border", "bordered"),
    ("clipped", "max_clipped", "badly_exposed"), ("overlay", "max_overlay", "text_overlay"),
    ("caption_gap", "max_caption_gap", "caption_mismatch"), ("crop_share", "max_crop", "crop_too_large"),
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A row: what it claims to be, how it looks, the row it copies, and what was measured."""

    caption: str
    url: str
    picture: str | None = None
    keeper: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Group:
    """Rows with something in common, a few of them as examples."""

    name: str
    about: str
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True)
class Bucket:
    """How many kept pictures train at one size; `share` is of the fullest one."""

    name: str
    count: int
    share: float


@dataclass(frozen=True)
class DataPart:
    """Everything the page shows of the data."""

    refused: list[Group]
    kept: list[Example]
    borderline: list[Group]
    buckets: list[Bucket]
    resolutions: dict[str, dict[str, Any]] = field(default_factory=dict)  # what bucketing cost, by side
    batch_sizes: tuple[int, ...] = BATCHES


def data_part(config: ReportConfig, ctx: StageContext) -> DataPart:
    """Read the last manifest once, and of the pictures those that are shown."""
    if "buckets" not in ctx.inputs or "download" not in ctx.inputs:
        return DataPart([], [], [], [])
    rows = read_manifest(ctx.inputs["buckets"])
    kept = [row for row in rows if row["decision"] == "keep"]
    refused, near = refusals(rows, config.dropped_examples), nearly_refused(kept, ctx, config.dropped_examples)
    shown_kept = kept[:: max(1, len(kept) // config.dropped_examples)][: config.dropped_examples]
    chosen = [*shown_kept, *(row for _, _, found in (*refused, *near) for row, _ in found)]
    wanted = {str(row[name]) for row in chosen for name in ("row_id", "keeper_id") if row.get(name)}
    stored = {key: data for shard in shards(ctx.inputs["download"]) for key, data in pictures(shard, wanted)}
    shown = {key: thumbnail(data, config.thumbnail_side) for key, data in stored.items()}

    def groups(found: list[tuple[str, str, list[tuple[dict[str, Any], str]]]]) -> list[Group]:
        return [Group(name, about, [_example(row, note, shown) for row, note in some]) for name, about, some in found]

    costs = ctx.parents["buckets"].facts.get("resolutions", {}) if "buckets" in ctx.parents else {}
    return DataPart(
        groups(refused), [_example(row, "", shown) for row in shown_kept], groups(near), buckets_of(kept), costs
    )


def refusals(rows: list[dict[str, Any]], most: int) -> list[tuple[str, str, list[tuple[dict[str, Any], str]]]]:
    """Every reason for which rows were dropped or failed, the most frequent first, how many, and a few of them."""
    refused = [row for row in rows if row["decision"] != "keep"]
    counts = Counter((str(row["reasons"][0]), str(row["decision"])) for row in refused)
    chosen = defaultdict[tuple[str, str], list[tuple[dict[str, Any], str]]](list)
    for row in refused:
        group, distance = chosen[(str(row["reasons"][0]), str(row["decision"]))], row.get("dup_distance")
        if len(group) < most:
            group.append((row, f"distance {distance}" if row.get("keeper_id") and distance is not None else ""))
    return [
        (reason, f"{count} rows, {'failed' if decision == 'error' else 'dropped'}", chosen[(reason, decision)])
        for (reason, decision), count in counts.most_common()
    ]


def nearly_refused(
    kept: list[dict[str, Any]], ctx: StageContext, most: int
) -> list[tuple[str, str, list[tuple[dict[str, Any], str]]]]:
    """For every limit that was in force, the kept rows nearest to it."""
    settings: dict[str, Any] = {}
    for stage in ("quality", "buckets"):
        settings |= ctx.parents[stage].facts.get("config", {}) if stage in ctx.parents else {}
    found = []
    for column, setting, reason in LIMITS:
        limit = settings.get(setting)
        measured = [row for row in kept if row.get(column) is not None] if limit is not None else []
        nearest = sorted(measured, key=lambda row: (abs(row[column] - limit), row["row_id"]))[:most]
        if nearest:
            found.append(
                (
                    reason,
                    f"{column} against a limit of {limit:g}",
                    [(row, f"{column} {row[column]:.3g}") for row in nearest],
                )
            )
    return found


def buckets_of(kept: list[dict[str, Any]]) -> list[Bucket]:
    """Pictures per bucket (resolution: width x height); a picture may be in one bucket of each resolution."""
    counts = Counter(str(name) for row in kept for name in row.get("buckets") or ())
    most = max(counts.values(), default=1)
    order = sorted(counts, key=lambda name: (int(name.split(":")[0]), [int(x) for x in name.split(":")[1].split("x")]))
    return [Bucket(name.replace(":", " px: "), counts[name], counts[name] / most) for name in order]


def _example(row: dict[str, Any], note: str, shown: dict[str, str]) -> Example:
    keeper = row.get("keeper_id")
    return Example(
        caption=str(row["caption_short"] or ""), url=str(row["url"]), picture=shown.get(str(row["row_id"])),
        keeper=shown.get(str(keeper)) if keeper else None, note=note,
    )  # fmt: skip
