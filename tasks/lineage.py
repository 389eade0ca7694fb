"""What made this? From a sample, checkpoint, adapter or any artifact back to the URLs it was trained on.

Everything is read from records and manifests; no picture and no weight is opened. A row counts as trained on when a
stage that reads pictures selected it (resolution, domain, split); how often the sampler drew it is not asked here.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_curation.manifest import MANIFEST
from infra.artifacts import Artifact
from infra.errors import ConfigError
from infra.lineage import Graph, key_of
from infra.storage import Store

STAMP = "t2i-lineage"  # key of the text chunk in PNG files that we draw
TRAINING_SET = "training-set"
# They take captions or text statistics from a training set, but no picture.
PICTURELESS = (
    "dpo", "grpo", "nft", "dreambooth", "make_pairs", "teacher_pairs", "mix", "distill_mix", "sweep_grid", "evaluate",
    "export", "report",
)  # fmt: skip
URLS = ("row_id", "url", "sha256_raw", "licence", "domain", "caption_short")


def target(store: Store, graph: Graph, what: str, run: str = "latest") -> Artifact:
    """The artifact that `what` names: a picture we drew, a path in the store or an export, a stage, a digest or key."""
    path = Path(what).expanduser()
    if path.exists():
        found = _of_path(store, graph, path)
    else:
        stages = {entry["name"]: entry for entry in store.read_run(run)["stages"]} if store.list_runs() else {}
        digest = stages.get(what, {}).get("digest")
        found = graph.by_digest.get(str(digest)) if digest else graph.named(what)
    if found is None:
        raise ConfigError(
            f"{what!r} is no picture that t2i drew, no path under {store.root}, no export, no stage of run {run} "
            f"and no digest; `t2i status {run}` lists the stages"
        )
    return found


def _of_path(store: Store, graph: Graph, path: Path) -> Artifact | None:
    """What lies at a path: by its stamp, by the lineage.json of an export, or by its place in the store."""
    stamped = stamp_of(path) if path.suffix.lower() == ".png" else None
    if stamped is not None:
        return graph.by_digest.get(stamped["digest"])
    for folder in (path, *path.absolute().parents):
        if (folder / "lineage.json").is_file():
            return graph.by_digest.get(json.loads((folder / "lineage.json").read_text())["digest"])
        if (folder / "artifact.json").is_file():
            return graph.by_key.get(folder.resolve().name)
    return None


def stamp(checkpoint: Artifact, **about: Any) -> PngInfo:
    """The text chunk that ties a picture to the checkpoint that drew it."""
    info = PngInfo()
    info.add_text(STAMP, json.dumps({"digest": checkpoint.digest, "stage": checkpoint.stage, **about}))
    return info


def stamp_of(path: Path) -> dict[str, Any] | None:
    """What a picture says of its making: digest and stage of the checkpoint, prompt and seed."""
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            text = getattr(picture, "text", {}).get(STAMP)
        return None if text is None else dict(json.loads(text))
    except (OSError, ValueError):
        return None


def lineage(store: Store, graph: Graph, artifact: Artifact) -> dict[str, Any]:
    """The stages behind an artifact, and the rows behind those that trained on pictures."""
    steps = graph.ancestors(artifact)
    rows = urls(store, graph, artifact)
    return {
        "target": _step(graph, artifact),
        "steps": [_step(graph, each) for each in steps],
        "missing": sorted({digest for each in steps for digest in each.parents if digest not in graph.by_digest}),
        "pictures": rows.num_rows,
        "licences": dict(Counter(value or "not stated" for value in rows["licence"].to_pylist()).most_common()),
        "domains": dict(Counter(value or "none" for value in rows["domain"].to_pylist()).most_common()),
    }


def urls(store: Store, graph: Graph, artifact: Artifact) -> pa.Table:
    """One row per picture that any stage behind `artifact` trained on: where it came from, and which stages saw it."""
    seen: dict[str, dict[str, list[str]]] = {}  # manifest digest -> row id -> stages
    for each, data in trainers(graph, graph.ancestors(artifact)):
        manifest = graph.inputs(data).get("manifest")
        if manifest is None:
            continue  # collected since
        for row_id in trained_on(each, index_of(store, data)):
            seen.setdefault(manifest.digest, {}).setdefault(row_id, []).append(each.stage)
    tables = [_rows_of(store, graph.by_digest[digest], stages) for digest, stages in seen.items()]
    empty = {name: pa.array([], pa.string()) for name in URLS} | {"stages": pa.array([], pa.list_(pa.string()))}
    return pa.concat_tables(tables) if tables else pa.table(empty)


def _rows_of(store: Store, manifest: Artifact, stages: Mapping[str, list[str]]) -> pa.Table:
    table = manifest_table(store, manifest, URLS)
    table = table.filter(pc.is_in(table["row_id"], value_set=pa.array(list(stages), pa.string())))
    return table.append_column("stages", pa.array([stages[row_id] for row_id in table["row_id"].to_pylist()]))


def trainers(graph: Graph, artifacts: list[Artifact]) -> Iterator[tuple[Artifact, Artifact]]:
    """(stage, training set) of every artifact that learnt from pictures of a training set."""
    for artifact in artifacts:
        if artifact.facts.get("function") not in PICTURELESS:
            for data in graph.inputs(artifact).values():
                if data.kind == TRAINING_SET and artifact.kind != TRAINING_SET:
                    yield artifact, data


def trained_on(artifact: Artifact, index: pa.Table) -> list[str]:
    """Row ids of a training set's index that a stage selected, each once."""
    config = artifact.facts.get("config", {})
    select = config.get("select") or config
    wanted = pc.equal(index["split"], "train")
    if select.get("resolutions"):
        sides = pa.array(select["resolutions"], index.schema.field("resolution").type)
        wanted = pc.and_(wanted, pc.is_in(index["resolution"], value_set=sides))
    if select.get("domains") and not select.get("replay"):  # replay draws from all domains
        wanted = pc.and_(wanted, pc.is_in(index["domain"], value_set=pa.array(select["domains"], pa.string())))
    return list(pc.unique(index.filter(wanted)["row_id"]).to_pylist())


def index_of(store: Store, training_set: Artifact) -> pa.Table:
    """The index of a training set."""
    return _parquet(store, training_set, "index.parquet")


def manifest_table(store: Store, manifest: Artifact, columns: tuple[str, ...]) -> pa.Table:
    """Columns of a manifest; the picture shards of a download stage are read without their pictures."""
    names = [entry.path for entry in store.listing(manifest)]
    files = [MANIFEST] if MANIFEST in names else [name for name in names if name.startswith("rows-")]
    return pa.concat_tables(
        [_parquet(store, manifest, name, columns) for name in sorted(files)], promote_options="default"
    )


def _parquet(store: Store, artifact: Artifact, name: str, columns: tuple[str, ...] | None = None) -> pa.Table:
    file = pq.ParquetFile(io.BytesIO(store.read(artifact, name)), page_checksum_verification=True)
    wanted = None if columns is None else [column for column in columns if column in file.schema_arrow.names]
    return file.read(wanted)


def _step(graph: Graph, artifact: Artifact) -> dict[str, Any]:
    return {
        "stage": artifact.stage, "kind": artifact.kind, "function": artifact.facts.get("function"),
        "digest": artifact.digest, "key": key_of(artifact), "uri": artifact.uri,
        "made_from": {role: each.stage for role, each in graph.inputs(artifact).items()},
        "finished": artifact.facts.get("finished"),
    }  # fmt: skip
