"""The demo web: composed scenes in many sizes and shapes, published as URLs, with planted defects and their truth."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
from PIL import Image, ImageEnhance, ImageFilter

from data_curation.config import DemoWebConfig
from data_curation.manifest import SOURCE_SCHEMA, Row, write_table
from data_curation.scenes import REPEATS, Scene, all_scenes, draw, long_caption, short_caption

if TYPE_CHECKING:
    from infra.stages import StageContext

HOST = "demo.localhost"  # stands for the demo's own server, whatever port it listens on
LICENCE = "CC BY-SA 4.0 (drawings by OpenMoji)"
Defect = Literal[
    "exact_duplicate", "near_duplicate", "http_404", "corrupt", "truncated", "not_image", "too_small", "oversize",
    "blurred", "over_compressed", "caption_mismatch",
]  # fmt: skip
SHARES: dict[Defect, float] = {
    "exact_duplicate": 0.15, "near_duplicate": 0.25, "http_404": 0.08, "corrupt": 0.08, "truncated": 0.08,
    "not_image": 0.06, "too_small": 0.08, "oversize": 0.02, "blurred": 0.07, "over_compressed": 0.06,
    "caption_mismatch": 0.07,
}  # fmt: skip
assert set(SHARES) == set(get_args(Defect))
assert abs(sum(SHARES.values()) - 1) < 1e-9
COPIES: tuple[Defect, ...] = ("exact_duplicate", "near_duplicate")
OVERSIZE_SIDE = 7_000
FORMATS = {"JPEG": ("jpg", "image/jpeg"), "PNG": ("png", "image/png"), "WEBP": ("webp", "image/webp")}
CHUNK = 125
BASIC_SQUARES = 0.4  # share of the square pictures that show scenes of the basic vocabulary; the others show any
WEB_SCHEMA = pa.schema([
    ("path", pa.string()), ("body", pa.binary()), ("status", pa.int32()), ("content_type", pa.string()),
])  # fmt: skip
TRUTH_SCHEMA = pa.schema([
    ("row_id", pa.string()), ("scene_id", pa.string()), ("defect", pa.string()), ("duplicate_of", pa.string()),
    ("image_w", pa.int32()), ("image_h", pa.int32()),
])  # fmt: skip


@dataclass(frozen=True)
class Page:
    """One URL of the web: what is drawn, how it is stored, what is wrong with it."""

    ordinal: int
    scene: Scene
    caption_of: Scene
    width: int
    height: int
    format: str
    quality: int
    seed: int
    defect: Defect | None = None
    origin: Page | None = None

    @property
    def path(self) -> str:
        """Path part of the URL."""
        return f"/pictures/{self.ordinal:07d}.{FORMATS[self.format][0]}"

    @property
    def url(self) -> str:
        """Address in the published list."""
        return f"http://{HOST}{self.path}"

    @property
    def row_id(self) -> str:
        """Id of the row, see `row_id`."""
        return row_id(self.url, self.ordinal)


def row_id(url: str, ordinal: int) -> str:
    """Id of a source row: its place, then a hash of the URL, so that ids sort as the list does."""
    return f"{ordinal:09d}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def publish_demo_web(config: DemoWebConfig, ctx: StageContext) -> dict[str, Any]:
    """Write the URL list, the bodies the server will answer with, and the truth about every row."""
    pages = plan(config)
    parts = ctx.fan_out(render, [pages[i : i + CHUNK] for i in range(0, len(pages), CHUNK)])
    rows: list[Row] = [
        {"row_id": page.row_id, "url": page.url, "caption_short": short_caption(page.caption_of),
         "caption_long": long_caption(page.caption_of, _wording(page.caption_of)), "licence": LICENCE,
         "domain": "basic" if page.scene.basic and page.caption_of.basic else "extended", "ordinal": page.ordinal}
        for page in pages
    ]  # fmt: skip
    truth: list[Row] = [
        {"row_id": page.row_id, "scene_id": page.scene.id, "defect": page.defect, "image_w": page.width,
         "image_h": page.height, "duplicate_of": page.origin.row_id if page.origin else None}
        for page in pages
    ]  # fmt: skip
    write_table(rows, SOURCE_SCHEMA, ctx.out / "urls.parquet")
    write_table([answer for part in parts for answer in part], WEB_SCHEMA, ctx.out / "web.parquet")
    write_table(truth, TRUTH_SCHEMA, ctx.out / "truth.parquet")
    planted = {name: sum(page.defect == name for page in pages) for name in SHARES}
    return {"rows": len(pages), "scenes": len({page.scene.id for page in pages}), "planted": planted}


def _wording(scene: Scene) -> int:
    """Which of the four long wordings the scene has: one each, or the web would have four times the captions."""
    return hashlib.sha256(scene.id.encode()).digest()[4] % 4


def plan(config: DemoWebConfig) -> list[Page]:
    """Every page of the web, decided before anything is drawn."""
    rng = np.random.default_rng([config.seed, 1])
    counts = {name: round(config.rows * config.defect_share * share) for name, share in SHARES.items()}
    copies: list[Defect] = [kind for kind in COPIES for _ in range(counts.pop(kind))]
    num_drawn = config.rows - len(copies)
    defects: list[Defect | None] = [name for name, count in counts.items() for _ in range(count)]
    defects += [None] * (num_drawn - len(defects))
    ordinals = rng.permutation(config.rows)
    pages = [
        _deface(_sound_page(config, int(ordinals[i]), scene, square, rng), defect, rng)
        for i, (defect, (scene, square)) in enumerate(zip(_shuffled(defects, rng), _scenes(config, num_drawn, rng), strict=True))
    ]  # fmt: skip
    sound = [page for page in pages if page.defect is None]
    for i, kind in enumerate(copies):
        origin = sound[int(rng.integers(len(sound)))]
        pages.append(replace(origin, ordinal=int(ordinals[num_drawn + i]), defect=kind, origin=origin))
    return sorted(pages, key=lambda page: page.ordinal)


def _shuffled(items: list[Any], rng: np.random.Generator) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]


def _scenes(config: DemoWebConfig, count: int, rng: np.random.Generator) -> list[tuple[Scene, bool]]:
    """(scene, square?) of every drawn page: each list of scenes is gone through in turn, so none is rare."""
    num_square = round(count * config.square_share)
    basic = [scene for scene in all_scenes("basic") if not scene.held_out]
    full = [scene for scene in all_scenes("full") if not scene.held_out]

    def turns(scenes: list[Scene], number: int) -> list[Scene]:
        once = [scene for scene in scenes for _ in range(REPEATS.get(scene.layout, 1))]
        rounds = -(-number // len(once))
        return [once[i] for _ in range(rounds) for i in rng.permutation(len(once))][:number]

    num_basic = round(num_square * BASIC_SQUARES)
    chosen = [(scene, True) for scene in turns(basic, num_basic) + turns(full, num_square - num_basic)]
    chosen += [(scene, False) for scene in turns(full, count - num_square)]
    return _shuffled(chosen, rng)


def _sound_page(config: DemoWebConfig, ordinal: int, scene: Scene, square: bool, rng: np.random.Generator) -> Page:
    low, high = config.shortest_side, config.longest_side
    side = low * (high / low) ** (rng.random() ** 2)  # small pictures are cheap, so most are small
    ratio = 1.0 if square else 2.0 ** rng.uniform(-1, 1)
    scale = min(max(side, low * max(ratio, 1 / ratio) ** 0.5), high / max(ratio, 1 / ratio) ** 0.5)
    width, height = (int(np.clip(round(v), low, high)) for v in (scale * ratio**0.5, scale / ratio**0.5))
    form = ("JPEG", "JPEG", "PNG", "WEBP")[int(rng.integers(4))]
    return Page(ordinal, scene, scene, width, height, form, int(rng.integers(85, 96)), int(rng.integers(2**31)))


def _deface(page: Page, defect: Defect | None, rng: np.random.Generator) -> Page:
    match defect:
        case "too_small":
            width, height = (int(v) for v in rng.integers(16, 56, 2))
            return replace(page, width=width, height=height, defect=defect)
        case "over_compressed":
            return replace(page, format="JPEG", quality=int(rng.integers(2, 12)), defect=defect)
        case "oversize":
            return replace(page, format="PNG", width=OVERSIZE_SIDE, height=OVERSIZE_SIDE, defect=defect)
        case "caption_mismatch":
            others = [s for s in all_scenes("basic" if page.scene.basic else "full") if not s.held_out]
            while (other := others[int(rng.integers(len(others)))]) == page.scene:
                continue
            return replace(page, caption_of=other, defect=defect)
        case _:
            return replace(page, defect=defect)


# --- drawing ---


def render(pages: Sequence[Page]) -> list[Row]:
    """The server's answers for a few pages."""
    return [_answer(page) for page in pages]


def _answer(page: Page) -> Row:
    rng = np.random.default_rng([page.seed, page.ordinal])
    status, content_type = 200, FORMATS[page.format][1]
    match page.defect:
        case "http_404":
            body, status, content_type = b"<html><body>Not found</body></html>", 404, "text/html"
        case "not_image":
            text = f"<!doctype html><html><body><h1>Gallery closed</h1><p>Page {page.ordinal}.</p></body></html>"
            body, content_type = text.encode(), ("text/html", content_type)[page.ordinal % 2]
        case "corrupt":
            body = _bytes(page, _picture(page))
            body = body[:16] + rng.bytes(len(body) - 16)
        case "truncated":
            body = _bytes(page, _picture(page))
            body = body[: int(len(body) * rng.uniform(0.3, 0.9))]
        case "oversize":
            body = _bitmap(page)
        case "blurred":
            picture = _picture(page)
            radius = rng.uniform(0.025, 0.05) * min(picture.size)
            body = _bytes(page, picture.filter(ImageFilter.GaussianBlur(radius)))
        case "near_duplicate":
            body = _near_copy(page, rng)
        case _:
            body = _bytes(page, _picture(page))
    return {"path": page.path, "body": body, "status": status, "content_type": content_type}


def _picture(page: Page) -> Image.Image:
    return draw(page.scene, page.width, page.height, np.random.default_rng(page.seed))


def _bytes(page: Page, picture: Image.Image) -> bytes:
    options: dict[str, int] = {"compress_level": 3} if page.format == "PNG" else {"quality": page.quality}
    if page.format == "WEBP":
        options["method"] = 0
    file = io.BytesIO()
    picture.save(file, page.format, **options)
    return file.getvalue()


def _near_copy(page: Page, rng: np.random.Generator) -> bytes:
    """The origin's picture as the web copies it: saved again, resized, slightly cropped or made brighter."""
    picture = _picture(page)
    width, height = picture.size
    match int(rng.integers(4)):
        case 0:
            page = replace(page, format="JPEG", quality=int(rng.integers(45, 75)))
        case 1:
            scale = rng.uniform(0.7, 0.95) if min(width, height) > 140 else rng.uniform(1.1, 1.5)
            picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        case 2:
            cut = rng.uniform(0.01, 0.03)  # of each dimension, shared between its two edges
            x, y = rng.uniform(0, cut, 2)
            box = (x * width, y * height, (1 - cut + x) * width, (1 - cut + y) * height)
            picture = picture.crop(tuple(round(v) for v in box))
        case _:
            factor = 1 + rng.choice((-1, 1)) * rng.uniform(0.05, 0.15)
            picture = ImageEnhance.Brightness(picture).enhance(float(factor))
    return _bytes(replace(page, quality=min(page.quality, 84)), picture)


def _bitmap(page: Page) -> bytes:
    """A black and white PNG of many pixels in few bytes, written row by row."""
    small = np.asarray(_picture(replace(page, width=100, height=100)).convert("L")) > 128
    rows = np.repeat(np.packbits(np.repeat(small, page.width // 100, axis=1), axis=1), page.height // 100, axis=0)
    raw = np.concatenate([np.zeros((len(rows), 1), np.uint8), rows], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = page.width.to_bytes(4, "big") + page.height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b"")
