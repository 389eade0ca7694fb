"""Pictures of one subject of one's own, for personalization: 3 to 30 files of a folder, decoded within bounds.

Unlike a source of training data nothing is dropped in silence: a person chose each of these pictures, so one that
cannot be used stops the stage, and all such files are named at once. What is stored has no metadata. A mask beside a
picture says where the subject is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_curation.config import SubjectFolder
from data_curation.decode import Inspected, open_picture
from data_curation.decoder import Decoder
from data_curation.layouts import PICTURES as SUFFIXES
from data_curation.layouts import walk
from data_curation.manifest import Row, write_table
from infra.errors import ConfigError, DataRefused
from infra.local_files import fingerprint

if TYPE_CHECKING:
    from infra.stages import StageContext

PICTURES = "pictures.parquet"
MASK = ".mask.png"  # in place of a picture's suffix
SCHEMA = pa.schema([
    ("name", pa.string()), ("image", pa.binary()), ("sha256_stored", pa.string()), ("width", pa.int32()),
    ("height", pa.int32()), ("caption", pa.string()),
])  # fmt: skip


def read_subject(config: SubjectFolder, ctx: StageContext) -> dict[str, Any]:
    """Write pictures.parquet: the stored picture, its size, and the caption of its .txt file (empty if there is none)."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"subject folder {folder} does not exist; give a folder of 3 to 30 pictures")
    if config.fingerprint not in (None, fingerprint(folder)):
        raise DataRefused(f"subject folder {folder} changed since the run was planned; start again to plan with it")
    files = [path for path in walk(folder) if path.suffix.lower() in SUFFIXES and not is_mask(path)]
    if not config.fewest <= len(files) <= config.most:
        raise DataRefused(
            f"subject folder {folder} has {len(files)} pictures, not {config.fewest} to {config.most}; "
            "give more or fewer (JPEG, PNG, WebP or AVIF)"
        )
    rows, faults = list[Row](), list[str]()
    with Decoder(config.max_pixels, config.decode_memory_mb, config.decode_seconds) as decoder:
        for path in files:
            found = _inspected(decoder, path, config)
            name = path.relative_to(folder).as_posix()
            if fault := _fault(path, found, config, rows):
                faults.append(f"{name}: {fault}")
                continue
            mask, fault = _mask(decoder, path, found, config)
            if fault:
                faults.append(f"{name}: {fault}")
                continue
            rows.append({
                "name": name, "image": found.image, "sha256_stored": found.sha256_stored, "width": found.width,
                "height": found.height, "caption": _caption(path), "mask": mask,
            })  # fmt: skip
    faults += [f"{path.relative_to(folder).as_posix()}: no picture of that name beside it" for path in _lonely(folder)]
    if faults:
        raise DataRefused(
            f"{len(faults)} of {len(files)} pictures in {folder} cannot be used; replace or remove them: "
            + "; ".join(faults)
        )
    masks = sum(row["mask"] is not None for row in rows)
    if not masks:  # as it was before there were masks
        rows = [{key: value for key, value in row.items() if key != "mask"} for row in rows]
    write_table(rows, SCHEMA.append(pa.field("mask", pa.binary())) if masks else SCHEMA, ctx.out / PICTURES)
    counted = {"pictures": len(rows), "captions": sum(bool(row["caption"]) for row in rows)}
    return counted | ({"masks": masks} if masks else {})


def is_mask(path: Path) -> bool:
    """Whether a file is another's mask: `rex.mask.png` is that of `rex.png` or `rex.jpg`."""
    return path.name.lower().endswith(MASK)


def _lonely(folder: Path) -> list[Path]:
    """Masks of no picture."""
    stems = {path.with_suffix("") for path in walk(folder) if path.suffix.lower() in SUFFIXES and not is_mask(path)}
    return [path for path in walk(folder) if is_mask(path) and path.with_suffix("").with_suffix("") not in stems]


def _mask(decoder: Decoder, path: Path, of: Inspected, config: SubjectFolder) -> tuple[bytes | None, str | None]:
    """The stored mask of a picture, white where the subject is, or why it cannot be used; nothing where there is none."""
    file = path.with_suffix(MASK)
    if not file.exists():
        return None, None
    found = _inspected(decoder, file, config)
    if found.reason is not None or found.image is None:
        return None, f"its mask {file.name}: {found.reason}"
    if (found.width, found.height) != (of.width, of.height):
        sizes = f"{found.width}x{found.height} px, the picture {of.width}x{of.height}"
        return None, f"its mask {file.name} has {sizes}; make them the same"
    brightest = open_picture(found.image).convert("L").getextrema()[1]
    if brightest == 0:
        return None, f"its mask {file.name} is black everywhere; paint the subject white"
    return found.image, None


def _inspected(decoder: Decoder, path: Path, config: SubjectFolder) -> Inspected:
    size = path.stat().st_size
    if size > config.max_bytes:
        return Inspected("", size, reason=f"{size} bytes, more than max_bytes={config.max_bytes}")
    return decoder.inspect(path.read_bytes())


def _fault(path: Path, found: Inspected, config: SubjectFolder, before: list[Row]) -> str | None:
    """Why a picture cannot be used, if it cannot."""
    if found.reason is not None:
        return found.reason
    if min(found.width or 0, found.height or 0) < config.least_side:
        return f"{found.width}x{found.height} px, smaller than the {config.least_side} px the model draws"
    same = next((row["name"] for row in before if row["sha256_stored"] == found.sha256_stored), None)
    if same is not None:
        return f"the same picture as {same}"
    if path.with_suffix(".txt").exists() and not _caption(path):
        return f"its caption {path.with_suffix('.txt').name} is empty"
    return None


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text("utf-8", errors="replace").strip() if text.exists() else ""
