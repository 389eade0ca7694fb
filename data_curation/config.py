"""Settings of every curation stage; no field here changes meaning without the stage's version being raised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from infra import local_files
from infra.config import Config
from infra.stages import IF_SET

_MACHINE: dict[str, Any] = {"versioned": False}


class DemoWebConfig(Config):
    """Publish composed scenes on a local web server, with planted defects whose truth is kept aside."""

    kind: Literal["demo_web"] = Field(default="demo_web", description="Make up a small web of pictures.")
    rows: int = Field(default=8_000, ge=50, le=1_000_000, description="URLs to publish, planted defects included.")
    square_share: float = Field(default=0.6, ge=0, le=1, description="Share of square pictures.")
    defect_share: float = Field(default=0.12, ge=0, le=0.5, description="Share of rows with a planted defect.")
    shortest_side: int = Field(default=96, ge=64, le=512, description="Least width and height of a sound picture, px.")
    longest_side: int = Field(default=512, ge=128, le=2048, description="Greatest width and height, px.")
    seed: int = Field(default=0, ge=0, description="Seed of the whole web.")


def fingerprint(path: str) -> str | None:
    """Digest of a file's bytes, of a folder's names, sizes and times, or of an S3 object's tag; None: nothing there."""
    if path.startswith("s3://"):
        from data_curation.remote import tag_of

        return tag_of(path)
    return local_files.fingerprint(Path(path))


def with_fingerprint(data: Any) -> Any:
    """Settings of a `model` that may be a folder, with that folder's digest."""
    if not isinstance(data, dict) or not isinstance(data.get("model"), str) or data.get("fingerprint"):
        return data
    return data | {"fingerprint": local_files.fingerprint(Path(data["model"]))}


class OwnData(Config):
    """Data at a path; its fingerprint is part of the stage key, so changed data is read again."""

    path: str = Field(min_length=1, description="Where the data lies.")
    fingerprint: str | None = Field(
        default=None, description="Digest of what lies at the path; None: taken when the configuration is read."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_fingerprint(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("path"), str | Path):
            return data
        data = data | {"path": str(data["path"])}
        return data if data.get("fingerprint") else data | {"fingerprint": fingerprint(data["path"])}


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


class DedupConfig(Config):
    """Drop copies: the same bytes, then pictures whose perceptual hashes are close and whose pixels agree."""

    hash_size: int = Field(
        default=16, ge=8, le=32, multiple_of=4, description="Side of the phash; bits = side squared."
    )
    max_distance: int = Field(default=90, ge=0, le=200, description="Hash distance up to which a pair is looked at.")
    max_relative: float = Field(
        default=0.36, gt=0, le=1, description="Greatest difference of registered copies over their slopes."
    )
    max_tint: float = Field(default=3.2, gt=0, le=255, description="Their greatest difference of flat colours, levels.")
    max_shear: float = Field(
        default=0.009, gt=0, le=1, description="Greatest tilt that registers them, share of the side."
    )
    same_distance: int = Field(default=24, ge=0, le=200, description="Hash distance of pictures saved again, uncut.")
    known_distance: int = Field(
        default=10, ge=0, le=200, description="The same against earlier manifests that have hashes, but no thumbnails."
    )


class RememberConfig(Config):
    """Nothing to set: what earlier nights have seen and tonight's manifest become one."""


class QualityThresholds(Config):
    """Bounds of the stored scores; each has its own reason."""

    min_side: int = Field(default=64, ge=8, description="Least width and height, px (reason too_small).")
    max_aspect: float = Field(default=2.2, ge=1, description="Greatest long side / short side (reason odd_aspect).")
    max_blur: float = Field(default=0.5, ge=0, le=1, description="Greatest blur score (reason blurred).")
    min_jpeg_quality: int = Field(default=30, ge=0, le=100, description="Least quality (reason over_compressed).")
    min_contrast: float = Field(default=1.5, ge=0, description="Least deviation of grey values (reason no_content).")
    max_caption_gap: float = Field(default=26, gt=0, description="Greatest misfit (reason caption_mismatch).")
    max_border: float | None = Field(
        default=None, ge=0, le=1, json_schema_extra=IF_SET,
        description="Greatest share of a side that a frame takes (reason bordered); null: not measured.",
    )  # fmt: skip
    max_clipped: float | None = Field(
        default=None, ge=0, le=1, json_schema_extra=IF_SET,
        description="Greatest share of pure black or white pixels (reason badly_exposed); null: not measured.",
    )  # fmt: skip
    max_overlay: float | None = Field(
        default=None, ge=0, json_schema_extra=IF_SET,
        description="Most strokes of a line of text (reason text_overlay), about 22; null: not measured.",
    )  # fmt: skip

    @property
    def measures_more(self) -> bool:
        """Whether one of the thresholds is set whose scores are not measured otherwise."""
        return any(limit is not None for limit in (self.max_border, self.max_clipped, self.max_overlay))


class QualityConfig(QualityThresholds):
    """What the quality stage measures, and its thresholds."""

    check_captions: bool = Field(default=True, description="Drop captions that the pictures contradict.")
    caption_min_rows: int = Field(default=3_000, ge=100, description="Do not check captions of fewer rows.")
    caption_min_explained: float = Field(
        default=0.5, ge=0, le=1, description="Do not check captions if pictures explain less of their words."
    )


class CaptionThresholds(Config):
    """Bounds of what captions may look like; each has its own reason."""

    min_words: int = Field(default=2, ge=0, description="Fewest words (reason caption_too_short).")
    max_words: int = Field(default=300, ge=1, description="Most words (reason caption_too_long).")
    languages: tuple[str, ...] = Field(
        default=(),
        description="Languages (en, de, ...) or scripts (cyrillic, ...) taken; none: all (caption_language).",
    )
    max_filler: float = Field(
        default=0.6, ge=0, le=1, description="Greatest share of words such as image, photo, untitled (caption_filler)."
    )
    max_repeated: float = Field(
        default=0.3, ge=0, le=1, description="Greatest share of pairs of words said before (caption_repetitive)."
    )
    max_markup: int = Field(default=0, ge=0, description="Most links, tags, entities, addresses (caption_markup).")


class CaptionsConfig(CaptionThresholds):
    """Drop rows whose short caption breaks a rule."""


class RedecideConfig(QualityThresholds):
    """Other thresholds for scores that are stored already; nothing is measured again."""

    captions: CaptionThresholds | None = Field(
        default=None, description="Other thresholds for stored scores of captions; null: as they were decided.",
        json_schema_extra=IF_SET,
    )  # fmt: skip


class SafetyConfig(Config):
    """Drop pictures that show nudity."""

    max_nsfw: float = Field(default=0.8, ge=0, le=1, description="Greatest probability of nudity (reason unsafe).")


class PackagedEmbedder(Config):
    """EfficientNet-Lite0 (ImageNet), which ships with its weights; nothing is downloaded."""

    kind: Literal["packaged"] = Field(default="packaged", description="The packaged image encoder.")
    side: int = Field(default=224, ge=64, le=512, multiple_of=32, description="Pictures are resized to this, px.")


class HubEmbedder(Config):
    """A vision model of transformers: CLIP, SigLIP, DINOv2, or an SSCD converted to that form."""

    kind: Literal["transformers"] = Field(default="transformers", description="A model read by transformers.")
    model: str = Field(min_length=1, description="Folder, or hub id OWNER/NAME.")
    revision: str | None = Field(default=None, description="Commit of the hub; a folder is known by its weights.")
    fingerprint: str | None = Field(default=None, description="Digest of the folder; None: taken when this is read.")

    @model_validator(mode="before")
    @classmethod
    def _take_fingerprint(cls, data: Any) -> Any:
        return with_fingerprint(data)


Embedding = Annotated[PackagedEmbedder | HubEmbedder, Field(discriminator="kind")]


class SemanticConfig(Config):
    """Drop pictures that mean the same as a better one: their embeddings point the same way."""

    embedder: Embedding = Field(default=PackagedEmbedder(), description="What turns a picture into a vector.")
    min_cosine: float = Field(
        default=0.95, ge=0, le=1, description="Cosine from which two pictures are the same (reason semantic_duplicate)."
    )


class PromptList(OwnData):
    """Evaluation prompts of one's own."""

    path: str = Field(description="Parquet, CSV, TSV, JSONL or text file (one prompt a line).")
    column: str = Field(default="prompt", min_length=1, description="Column with the prompt.")


class EvaluationPictures(OwnData):
    """Evaluation pictures of one's own."""

    path: str = Field(description="Folder of pictures, tars or Parquet files, or of a manifest with signatures.")


class DecontaminateConfig(Config):
    """Drop rows that a model will be tested on: copies of evaluation pictures, captions that are evaluation prompts."""

    pictures: tuple[EvaluationPictures, ...] = Field(default=(), description="Pictures that must not be learnt.")
    prompts: tuple[PromptList, ...] = Field(default=(), description="Prompts that must not be learnt.")
    held_out_scenes: bool = Field(default=False, description="The demo's held-out scenes, in all their wordings.")
    ngram: int = Field(default=5, ge=1, le=20, description="Words of an n-gram; shorter prompts count whole.")
    max_overlap: float = Field(
        default=0.8, gt=0, le=1, description="Share of a prompt's n-grams in a caption from which the row is dropped."
    )
    copies: DedupConfig = Field(default=DedupConfig(), description="When two pictures are copies.")


class ComposedCaptions(Config):
    """Sentences put together from the short caption and the metadata columns; no picture is looked at."""

    kind: Literal["composed"] = Field(default="composed", description="Compose from what the source says.")


class VisionLanguageModel(Config):
    """A model of transformers that turns a picture into text, such as BLIP, Florence-2 or Qwen-VL."""

    kind: Literal["transformers"] = Field(default="transformers", description="A model read by transformers.")
    model: str = Field(min_length=1, description="Folder, or hub id OWNER/NAME.")
    revision: str | None = Field(default=None, description="Commit of the hub; a folder is known by its weights.")
    fingerprint: str | None = Field(default=None, description="Digest of the folder; None: taken when this is read.")
    prompt: str = Field(default="", description="What the model is asked; a chat template is used where it has one.")
    max_new_tokens: int = Field(default=128, ge=1, le=2048, description="Longest caption in tokens.")
    batch_size: int = Field(
        default=8, ge=1, le=1024, description="Pictures at once.", json_schema_extra=_MACHINE
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _take_fingerprint(cls, data: Any) -> Any:
        return with_fingerprint(data)


class RecaptionConfig(Config):
    """Write long captions."""

    captioner: Annotated[ComposedCaptions | VisionLanguageModel, Field(discriminator="kind")] = Field(
        default=ComposedCaptions(), description="Who writes them."
    )
    rows: Literal["missing", "all"] = Field(
        default="missing", description="missing: rows without a long caption that differs from the short one."
    )


class ResolutionConfig(Config):
    """One training resolution: buckets of about side x side pixels."""

    side: int = Field(ge=8, le=4096, multiple_of=4, description="Side of the square bucket, px.")
    aspects: Literal["square", "any"] = Field(default="any", description="Only the square bucket, or all ratios.")


class BucketsConfig(Config):
    """Which bucket a picture trains in, and which split."""

    resolutions: tuple[ResolutionConfig, ...] = Field(
        default=(ResolutionConfig(side=32, aspects="square"), ResolutionConfig(side=40)),
        min_length=1, description="Training resolutions; a picture may be in several.",
    )  # fmt: skip
    patch: int = Field(default=4, ge=1, le=64, description="Width and height of every bucket are multiples of this.")
    ratios: tuple[float, ...] = Field(
        default=(0.5, 2 / 3, 1.0, 1.5, 2.0), min_length=1, description="Width / height of the buckets."
    )
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
