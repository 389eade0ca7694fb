"""Settings of sources, download, buckets and encoding, and of a whole curation; no field here changes meaning without the stage's version being raised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from data_curation.filter_config import (
    AestheticConfig,
    CaptionsConfig,
    DecontaminateConfig,
    DedupConfig,
    QualityConfig,
    RecaptionConfig,
    RedecideConfig,
    SafetyConfig,
    SemanticConfig,
)
from data_curation.own_data import OwnData
from infra.config import Config
from infra.stages import IF_SET

_MACHINE: dict[str, Any] = {"versioned": False}
CURATION = (  # stages with a manifest, in the order in which they run
    "download", "dedup", "quality", "captions", "redecide", "decontaminate", "semantic", "safety", "aesthetic", "recaption",
    "buckets",
)  # fmt: skip


class DemoWebConfig(Config):
    """Publish composed scenes on a local web server, with planted defects whose truth is kept aside."""

    kind: Literal["demo_web"] = Field(default="demo_web", description="Make up a small web of pictures.")
    rows: int = Field(default=8_000, ge=50, le=1_000_000, description="URLs to publish, planted defects included.")
    square_share: float = Field(default=0.6, ge=0, le=1, description="Share of square pictures.")
    defect_share: float = Field(default=0.12, ge=0, le=0.5, description="Share of rows with a planted defect.")
    shortest_side: int = Field(default=96, ge=64, le=512, description="Least width and height of a sound picture, px.")
    longest_side: int = Field(default=512, ge=128, le=2048, description="Greatest width and height, px.")
    seed: int = Field(default=0, ge=0, description="Seed of the whole web.")


class ListSource(OwnData):
    """A list of picture URLs of your own."""

    kind: Literal["list"] = Field(default="list", description="Read a URL list.")
    path: str = Field(
        description="Parquet, CSV, TSV, JSONL or text file (one URL a line), local or s3://; may end in .gz."
    )
    url_column: str = Field(default="url", description="Column with the URL.")
    caption_column: str | None = Field(default="caption", description="Column with the caption; None: no captions.")
    long_caption_column: str | None = Field(default=None, description="Column with a longer caption, if there is one.")
    licence_column: str | None = Field(default=None, description="Column with the licence, if there is one.")
    metadata_columns: tuple[str, ...] = Field(default=(), description="Columns that captions may be composed from.")
    domain: str = Field(default="basic", min_length=1, description="Domain written to every row.")
    limit: int | None = Field(default=None, ge=1, description="Read at most this many rows; None: all.")


class FolderSource(OwnData):
    """Pictures that lie on this machine: a folder of files, WebDataset tars, or Parquet files with pictures in them."""

    kind: Literal["folder"] = Field(default="folder", description="Read pictures from files.")
    path: str = Field(description="Folder, searched recursively, or one .tar or .parquet file.")
    layout: Literal["auto", "pairs", "imagefolder", "webdataset", "parquet"] = Field(
        default="auto",
        description="pairs: pictures beside .txt or .json captions; imagefolder: metadata.csv/.jsonl/.parquet with file_name;"
        " webdataset: tars; parquet: a column of pictures; auto: what is found.",
    )
    domain: str = Field(default="basic", min_length=1, description="Domain written to every row.")
    caption_from_name: bool = Field(default=True, description="Without a caption, use the file name as caption.")


class SubjectFolder(OwnData):
    """A few pictures of one subject, each with an optional caption in a .txt file of the same name."""

    path: str = Field(description="Folder, searched recursively.")
    fewest: int = Field(default=3, ge=1, description="Least number of pictures.")
    most: int = Field(default=30, ge=1, description="Greatest number of pictures.")
    least_side: int = Field(default=32, ge=8, description="Least width and height, px: the side the model draws.")
    max_bytes: int = Field(default=50_000_000, ge=1_000, description="Greatest file.")
    max_pixels: int = Field(default=64_000_000, ge=10_000, description="Greatest area, read from the header.")
    decode_memory_mb: int = Field(
        default=1_024, ge=256, le=65_536, description="Memory a decoder may take, MiB.", json_schema_extra=_MACHINE
    )
    decode_seconds: float = Field(
        default=20, gt=0, le=600, description="Time one picture's decoding may take.", json_schema_extra=_MACHINE
    )


Source = Annotated[DemoWebConfig | ListSource | FolderSource, Field(discriminator="kind")]


class DownloadConfig(Config):
    """Fetch every URL once and keep what decodes."""

    shard_rows: int = Field(default=1_000, ge=10, le=100_000, description="Rows of one shard, the unit of resume.")
    timeout_seconds: float = Field(default=10, gt=0, le=120, description="Limit of one connection or read.")
    deadline_seconds: float = Field(
        default=30, gt=0, le=600, description="Limit of one whole fetch, redirects and all."
    )
    shard_seconds: float = Field(
        default=3_600,
        gt=0,
        le=86_400,
        description="Limit of one shard; rows not there by then have reason shard_deadline.",
    )
    retries: int = Field(default=1, ge=0, le=10, description="Further tries of a fetch that failed for the time being.")
    backoff_seconds: float = Field(
        default=1, ge=0, le=60, description="Wait before the first retry; doubled each time."
    )
    longest_wait_seconds: float = Field(
        default=30, ge=0, le=3_600, description="Longest wait before a retry; a Retry-After beyond it ends the tries."
    )
    max_bytes: int = Field(default=20_000_000, ge=1_000, description="Greatest body; larger ones are refused unread.")
    max_pixels: int = Field(default=40_000_000, ge=10_000, description="Greatest area, read from the header.")
    decode_memory_mb: int = Field(default=1_024, ge=256, le=65_536, description="Memory a decoder may take, MiB.")
    decode_seconds: float = Field(default=20, gt=0, le=600, description="Time one picture's decoding may take.")
    allow_private: tuple[str, ...] = Field(
        default=(), description="Addresses, host names or networks to fetch from although they are not public."
    )
    user_agent: str = Field(default="t2i-lifecycle", min_length=1, description="Name given to web servers.")
    robots_txt: bool = Field(default=True, description="Obey each host's robots.txt.")
    per_host: int = Field(default=8, ge=1, le=1_024, description="Connections to one host at once, per process.")
    host_interval_seconds: float = Field(default=0, ge=0, le=60, description="Pause between two requests to a host.")
    port: int | None = Field(
        default=None, ge=1024, le=65_535, json_schema_extra=_MACHINE,
        description="Port of the demo web while it is fetched; None: any free one.",
    )  # fmt: skip
    processes: int = Field(default=2, ge=1, le=64, json_schema_extra=_MACHINE, description="Download processes.")
    threads: int = Field(default=8, ge=1, le=256, json_schema_extra=_MACHINE, description="Threads of one process.")


class ResolutionConfig(Config):
    """One training resolution: buckets of about side x side pixels."""

    side: int = Field(ge=8, le=4096, multiple_of=4, description="Side of the square bucket, px.")
    aspects: Literal["square", "any"] = Field(default="any", description="Only the square bucket, or all ratios.")


class EveryShape(Config):
    """Every width and height on the grid is a bucket where it comes near the resolution's pixels (side squared)."""

    tolerance: float = Field(default=0.02, gt=0, le=0.5, description="Greatest share of pixels more or fewer.")
    min_ratio: float = Field(default=0.5, gt=0, le=1, description="Least width / height.")
    max_ratio: float = Field(default=2.0, ge=1, le=100, description="Greatest width / height.")


class BucketsConfig(Config):
    """Which bucket a picture trains in, and which split."""

    resolutions: tuple[ResolutionConfig, ...] = Field(
        default=(ResolutionConfig(side=32, aspects="square"), ResolutionConfig(side=40)),
        min_length=1, description="Training resolutions; a picture may be in several.",
    )  # fmt: skip
    patch: int = Field(
        default=4, ge=1, le=64,
        description="Width and height of every bucket are multiples of this: the model's patch, times its VAE's factor.",
    )  # fmt: skip
    ratios: tuple[float, ...] = Field(
        default=(0.5, 2 / 3, 1.0, 1.5, 2.0), min_length=1, description="Width / height of the buckets."
    )
    every: EveryShape | None = Field(
        default=None, json_schema_extra=IF_SET,
        description="Every shape near a resolution's pixels is a bucket, instead of `ratios`; null: `ratios`.",
    )  # fmt: skip
    max_crop: float = Field(default=0.25, ge=0, le=1, description="Greatest share cut away (reason crop_too_large).")
    upscale: bool = Field(default=False, description="Allow enlarging (otherwise reason too_small_for_bucket).")
    validation_share: float = Field(default=0.03, ge=0, le=0.5, description="Share of rows kept out of training.")


class EncodeConfig(Config):
    """Text and teacher features, computed once."""

    max_tokens: int = Field(default=64, ge=8, le=512, description="Longest caption in tokens; the rest is cut.")
    teacher_resolutions: tuple[int, ...] = Field(
        default=(32,), description="Resolutions that get the teacher features REPA aligns to; none: no features."
    )


class DataConfig(Config):
    """From a source of URLs to a training set."""

    source: Source = Field(default=DemoWebConfig(), description="Where the pictures come from.")
    download: DownloadConfig = Field(default=DownloadConfig(), description="Fetching.")
    dedup: DedupConfig = Field(default=DedupConfig(), description="Copies.")
    quality: QualityConfig = Field(default=QualityConfig(), description="Technical checks.")
    captions: CaptionsConfig | None = Field(default=None, description="Caption rules; null: none.")
    redecide: RedecideConfig | None = Field(
        default=None, description="Thresholds applied to the stored scores instead of those of `quality`."
    )
    decontaminate: DecontaminateConfig | None = Field(
        default=None, description="Evaluation data; null: not looked for."
    )
    semantic: SemanticConfig | None = Field(default=None, description="Semantic duplicates; null: not looked for.")
    safety: SafetyConfig | None = Field(default=None, description="Safety filter; null: none.")
    aesthetic: AestheticConfig | None = Field(default=None, description="Aesthetic filter; null: none.")
    recaption: RecaptionConfig | None = Field(default=None, description="Long captions; null: those of the source.")
    buckets: BucketsConfig = Field(default=BucketsConfig(), description="Aspect and resolution buckets.")
    encode: EncodeConfig = Field(default=EncodeConfig(), description="Features.")

    @field_validator("source", mode="before")
    @classmethod
    def _path_means_own_data(cls, value: Any) -> Any:
        """A bare path is a folder of pictures or a URL list."""
        if not isinstance(value, str):
            return value
        is_pictures = Path(value).expanduser().is_dir() or value.endswith(".tar")
        return {"kind": "folder" if is_pictures else "list", "path": value}
