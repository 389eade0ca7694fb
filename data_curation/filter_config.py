"""Settings of the stages that drop rows or rewrite their captions; no field changes meaning without a raised version."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from data_curation.own_data import OwnData
from infra.config import Config
from infra.hub_models import HubModel
from infra.stages import IF_SET, UNVERSIONED


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


class HubEmbedder(HubModel):
    """A vision model of transformers: CLIP, SigLIP, DINOv2, or an SSCD converted to that form."""

    kind: Literal["transformers"] = Field(default="transformers", description="A model read by transformers.")


Embedding = Annotated[PackagedEmbedder | HubEmbedder, Field(discriminator="kind")]


class SemanticConfig(Config):
    """Drop pictures that mean the same as a better one: their embeddings point the same way."""

    embedder: Embedding = Field(default=PackagedEmbedder(), description="What turns a picture into a vector.")
    min_cosine: float = Field(
        default=0.95, ge=0, le=1, description="Cosine from which two pictures are the same (reason semantic_duplicate)."
    )


class AestheticHead(OwnData):
    """A linear head on the embedding: safetensors with `weight` [1, D] and `bias` [1]."""

    path: str = Field(min_length=1, description="The head's file.")


class AestheticConfig(Config):
    """Drop pictures that a linear head on their embedding finds less pleasing; no head is packaged."""

    embedder: Embedding = Field(default=PackagedEmbedder(), description="What turns a picture into a vector.")
    head: AestheticHead = Field(description="The head made for this embedding, such as LAION's for CLIP ViT-L/14.")
    min_score: float = Field(default=5.0, description="Least score, on the head's own scale (reason unaesthetic).")


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


class VisionLanguageModel(HubModel):
    """A model of transformers that turns a picture into text, such as BLIP, Florence-2 or Qwen-VL."""

    kind: Literal["transformers"] = Field(default="transformers", description="A model read by transformers.")
    prompt: str = Field(default="", description="What the model is asked; a chat template is used where it has one.")
    max_new_tokens: int = Field(default=128, ge=1, le=2048, description="Longest caption in tokens.")
    batch_size: int = Field(
        default=8, ge=1, le=1024, description="Pictures at once.", json_schema_extra=UNVERSIONED
    )  # fmt: skip


class RecaptionConfig(Config):
    """Write long captions."""

    captioner: Annotated[ComposedCaptions | VisionLanguageModel, Field(discriminator="kind")] = Field(
        default=ComposedCaptions(), description="Who writes them."
    )
    rows: Literal["missing", "all"] = Field(
        default="missing", description="missing: rows without a long caption that differs from the short one."
    )
