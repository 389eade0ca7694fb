"""Publishing from a small store with real manifests, records and weights: the card's own code is run by a stranger."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from data_curation.encode import INDEX_SCHEMA
from data_curation.manifest import write_manifest, write_table
from flows.cli import app
from infra.artifacts import Artifact
from infra.errors import ConfigError, GateFailed
from infra.lineage import Graph
from infra.storage import Store, open_store
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import LoraConfig, PrxConfig
from models.personalization.lora import add_lora, merge, save_adapter
from models.sampling.generate import load_generator
from tasks.card_facts import shareable
from tasks.cards import licence_of
from tasks.lineage import lineage, target
from tasks.publish import Wish, publish

EVIL = "CC BY 4.0 <script>alert(1)</script> | ![x](http://evil.invalid)"
SCORE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 20}
TRAIN = {"steps": 7, "batch_size": 2, "optimizer": {"muon_lr": None, "adamw_lr": 0.001}}
FOREIGN = {"source": "/home/someone/sd3", "class": "StableDiffusion3Pipeline"}
PROMPTS = ["a big apple on a blue background", "a zwx toy on a white background"]
STRANGER = """
import re, sys
sys.path = [p for p in sys.path if p not in ("", sys.argv[1])]
for name, path in zip(sys.argv[2::2], sys.argv[3::2]):
    scope = {}
    code = re.search(r"```python\\n(.*?)```", open(path).read(), re.S)[1]
    exec(code.replace("image = pipe(", "import torch; torch.manual_seed(3)\\nimage = pipe("), scope)
    assert not any(m.split(".")[0] in ("tasks", "models", "infra") for m in sys.modules)
    scope["image"].save(name)
"""


def network() -> Any:
    denoiser = prx.build(PrxConfig(hidden_size=32, depth=1, num_heads=2), torch.zeros(384), torch.ones(384), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """dedup -> encode -> base -> dreambooth-toy and student-bad; evaluate judged all three, the student badly."""
    root = tmp_path_factory.mktemp("publish")
    store = open_store(root / "root")

    def make(stage: str, kind: str, function: str, inputs: Mapping[str, Artifact], config: Mapping[str, Any], **facts: Any) -> Artifact:  # fmt: skip
        about = {"function": function, "config": config, "inputs": {r: a.digest for r, a in inputs.items()}, **facts}
        code = {"code": {"commit": "c0ffee", "version": "0.1.0", "changed": False, "digest": "d" * 64}}
        return store.commit(
            stage, stage.ljust(64, "0"), kind, root / stage, [a.digest for a in inputs.values()],
            about | {"finished": stage, "seconds": 2.0, "samples": 14, "provenance": code},
        )  # fmt: skip

    for name in ("dedup", "encode", "evaluate"):
        (root / name).mkdir()
    rows = [{"row_id": f"r{i}", "url": f"http://x.test/{i}", "sha256_raw": str(i) * 64, "decision": "keep", "reasons": [],
             "licence": EVIL, "domain": "basic", "split": "train"} for i in range(3)]  # fmt: skip
    write_manifest(rows, root / "dedup")
    index = [{"row_id": r["row_id"], "resolution": 32, "domain": "basic", "split": "train"} for r in rows]
    write_table(index, INDEX_SCHEMA, root / "encode" / "index.parquet")
    funnel = {"received": 4, "kept": 3, "errored": 0, "dropped": {"near_duplicate": 1}}
    dedup = make("dedup", "manifest", "deduplicate", {}, {"path": "/home/someone/pictures"}, **funnel)
    data = make("encode", "training-set", "encode", {"manifest": dedup}, {})

    denoiser = network()
    write_checkpoint(root / "base", denoiser, SamplingCard(steps=2))
    base = make("base", "checkpoint", "flow_matching", {"data": data}, {"train": TRAIN})
    student = SamplingCard(
        steps=1, guidance=1.0, distilled=True, trained_steps=(1,), method="dmd", distilled_guidance=2.0
    )
    write_checkpoint(root / "student-bad", denoiser, student)
    bad = make("student-bad", "checkpoint", "distill", {"init": base}, {"train": TRAIN, "method": {"kind": "dmd"}})
    add_lora(denoiser, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in denoiser.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    save_adapter(denoiser, root / "dreambooth-toy" / "adapter", {"base": base.digest, "trigger": "zwx"})
    write_checkpoint(root / "dreambooth-toy", merge(denoiser), SamplingCard(steps=2, trigger="zwx", origin=FOREIGN))
    toy = make(
        "dreambooth-toy",
        "checkpoint",
        "dreambooth",
        {"init": base},
        {"train": TRAIN, "class_word": "toy", "folder": "/home/someone/rex"},
    )

    own = {"prompt_accuracy": SCORE, "kernel_distance": SCORE}
    gates = [{"stage": "student-bad", "metric": "prompt_accuracy", "passed": False, "reason": "0.1 is below 0.5"}]
    roles = {"base": base, "student-bad": bad, "dreambooth-toy": toy}
    scores = {"scores": {role: own | {"subject_accuracy": SCORE} for role in roles}, "gates": gates, "collapse": []}
    (root / "evaluate" / "scores.json").write_text(json.dumps(scores))
    (root / "evaluate" / "grid.json").write_text(json.dumps({"prompts": PROMPTS}))
    (root / "evaluate" / "samples").mkdir()
    Image.new("RGB", (64, 32)).save(root / "evaluate" / "samples" / "base.png")
    Image.new("RGB", (64, 32)).save(root / "evaluate" / "samples" / "dreambooth-toy.png")
    evaluate = make("evaluate", "scores", "evaluate", roles, {}, gates=gates)
    stages = [{"name": a.stage, "digest": a.digest, "status": "ran"} for a in (dedup, data, *roles.values(), evaluate)]
    config = {"name": "toy", "seed": 11, "run": {"root": str(root)}, "data": {"path": str(root / "mine")}}
    store.write_run("toy", {"name": "toy", "stages": stages, "outcome": "gate_failed", "config": config})
    return store


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_cards_code_draws_our_pixels_without_us(store: Store, tmp_path: Path) -> None:
    wish = Wish(base="me/base")
    publish(store, "base", str(tmp_path / "me" / "base"), Wish())
    publish(store, "dreambooth-toy", str(tmp_path / "me" / "toy"), wish)
    (tmp_path / "stranger.py").write_text(STRANGER)
    for name in ("base", "toy"):  # folders of the hub's form, read from where the code runs
        path = tmp_path / "me" / name / "README.md"
        path.write_text(re.sub(rf'from_pretrained\((.*?)"{name}"', rf'from_pretrained(\1"me/{name}"', path.read_text()))
    repository = str(Path(__file__).resolve().parents[2])
    arguments = [repository, "base.png", "me/base/README.md", "toy.png", "me/toy/README.md"]
    done = subprocess.run(
        [sys.executable, "stranger.py", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, stage, prompt in (("base", "base", PROMPTS[0]), ("toy", "dreambooth-toy", PROMPTS[1])):
        ours = load_generator(store.local(target(store, Graph(store.list()), stage))).sample([prompt], [3], steps=2)[0]
        theirs = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert ours.std() > 5
        assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1, name


def test_the_card_is_what_the_hub_reads_and_says_it_all(store: Store, tmp_path: Path) -> None:
    publish(store, "dreambooth-toy", str(tmp_path / "toy"), Wish(base="me/base"))
    card = card_of(tmp_path / "toy")
    said = card.data.to_dict()
    assert said["base_model"] == "me/base" and said["base_model_relation"] == "adapter"
    assert (said["license"], said["library_name"], said["pipeline_tag"]) == ("cc-by-4.0", "diffusers", "text-to-image")
    assert {"lora", "text-to-image", "prx-pixel"} <= set(said["tags"]) and said["instance_prompt"] == "zwx"
    found = {each.metric_type: each for each in card.data.eval_results}
    assert list(found) == ["prompt_accuracy", "kernel_distance", "subject_accuracy"]
    assert found["prompt_accuracy"].metric_args == {"low": 0.25, "high": 0.75, "interval": 0.95, "n": 20, "steps": 2}
    for part in ("| base | flow matching |  | 7 | 2 | adamw 0.001 | 14 | 2 |", "DreamBooth with LoRA | base", "near_duplicate 1",
                 "0.250 to 0.750 | 20", "commit `c0ffee`", "seed 11", "t2i run config.yaml", "## Intended use and limits"):  # fmt: skip
        assert part in card.text, part
    assert "<script" not in card.text and "![x]" not in card.text and r"\[x\]" in card.text


def test_lineage_lies_beside_it_and_nothing_private_does(store: Store, tmp_path: Path) -> None:
    publish(store, "dreambooth-toy", str(tmp_path / "toy"), Wish(base="me/base"))
    graph = Graph(store.list())
    told = json.loads((tmp_path / "toy" / "lineage.json").read_text())
    assert told["pictures"] == 3
    assert [step["stage"] for step in told["steps"]] == ["dedup", "encode", "base", "dreambooth-toy"]
    assert lineage(store, graph, target(store, graph, str(tmp_path / "toy")))["target"]["stage"] == "dreambooth-toy"
    for path in (tmp_path / "toy").rglob("*"):
        if path.suffix in (".md", ".json", ".yaml"):
            text = path.read_text()
            assert str(store.root) not in text and "/home/someone" not in text and str(tmp_path) not in text, path
    assert yaml.safe_load((tmp_path / "toy" / "config.yaml").read_text()) == {
        "name": "toy", "seed": 11, "data": {"path": "mine"},
    }  # fmt: skip


def test_a_missed_gate_is_refused_unless_wanted_anyway(store: Store, tmp_path: Path) -> None:
    with pytest.raises(GateFailed, match=r"student-bad .* is not published: prompt_accuracy: 0\.1 is below 0\.5"):
        publish(store, "student-bad", str(tmp_path / "bad"), Wish())
    assert list(tmp_path.iterdir()) == []
    found = publish(store, "student-bad", str(tmp_path / "bad"), Wish(anyway=True))
    assert found["missed"] == ["prompt_accuracy: 0.1 is below 0.5"]
    assert "**Missed gate**: prompt_accuracy: 0.1 is below 0.5" in (tmp_path / "bad" / "README.md").read_text()


def test_a_run_whose_evaluation_failed_publishes_nothing(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root" / "evaluate")
    other = open_store(tmp_path / "root")
    record = other.read_run("toy")
    record["stages"][-1] |= {"status": "failed", "digest": None}
    other.write_run("toy", record | {"error": "sft is collapsed"})
    with pytest.raises(GateFailed, match="the evaluation of run toy failed: sft is collapsed"):
        publish(other, "dreambooth-toy", str(tmp_path / "toy"), Wish(base="me/base"))
    publish(other, "dreambooth-toy", str(tmp_path / "toy"), Wish(base="me/base", anyway=True))
    assert "was not evaluated at this number of steps" in (tmp_path / "toy" / "README.md").read_text()


def test_only_an_earlier_publication_is_replaced(store: Store, tmp_path: Path) -> None:
    place, wish = tmp_path / "toy", Wish(base="me/base")
    place.mkdir()
    (place / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and was not written by"):
        publish(store, "dreambooth-toy", str(place), wish)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]
    (place / "mine.txt").unlink()
    first = publish(store, "dreambooth-toy", str(place), wish)
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    (place / "mine.txt").write_text("mine")
    (place / "README.md").write_text("changed")
    assert publish(store, str(place), str(place), wish) == first
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {**whole, "mine.txt": b"mine"}
    outside = {"published_by": "t2i-lifecycle", "files": [["../keep.txt", 1, ""]]}
    (tmp_path / "keep.txt").write_text("keep")
    (place / "lineage.json").write_text(json.dumps(outside))
    with pytest.raises(ConfigError, match=r"names \.\./keep\.txt, which is not in that folder"):
        publish(store, "dreambooth-toy", str(place), wish)
    assert (tmp_path / "keep.txt").exists()
    (place / "README.md").unlink()
    (place / "lineage.json").write_text(json.dumps({"published_by": "t2i-lifecycle", "files": []}))
    with pytest.raises(ConfigError, match="would be written over"):
        publish(store, "dreambooth-toy", str(place), wish)


@pytest.mark.parametrize(
    ("what", "where", "wish", "message"),
    [
        ("encode", "out", Wish(), "is a training-set, not a checkpoint"),
        ("dreambooth-toy", "out", Wish(), "must name the model it belongs to"),
        ("dreambooth-toy", "out", Wish(base="base"), "'base' is no OWNER/NAME"),
        ("base", "s3://bucket/x", Wish(), "neither a folder nor hf://OWNER/NAME"),
        ("base", "hf://a b/c", Wish(), "is no OWNER/NAME of the Hub"),
        ("student-bad", "out", Wish(steps=3, anyway=True), "steps=3 was not trained"),
    ],
)
def test_what_cannot_be_published_is_said(store: Store, tmp_path: Path, what: str, where: str, wish: Wish, message: str) -> None:  # fmt: skip
    with pytest.raises(ConfigError, match=re.escape(message)):
        publish(store, what, where if "://" in where else str(tmp_path / where), wish)


def test_the_command_says_what_it_published(store: Store, tmp_path: Path) -> None:
    place = str(tmp_path / "toy")
    arguments = ["dreambooth-toy", place, "--base", "me/base", "--root", str(store.root), "--json", "--licence", "mit"]
    done = CliRunner().invoke(app, ["publish", *arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "target": place, "stage": "dreambooth-toy", "steps": 2, "missed": [],
        "digest": json.loads((tmp_path / "toy" / "lineage.json").read_text())["digest"],
    }  # fmt: skip
    assert card_of(tmp_path / "toy").data.license == "mit"


def test_licences_of_many_kinds_are_other_and_configurations_lose_what_is_private() -> None:
    assert licence_of({"CC-BY-SA-4.0": 3, "CC BY-SA 4.0 (drawings)": 1}) == "cc-by-sa-4.0"
    assert licence_of({"CC0": 1}) == "cc0-1.0"
    assert licence_of({"CC0": 1, "not stated": 1}) == licence_of({}) == "other"
    assert shareable({"a": ["https://me:pw@x.test/l?key=1", "~/own/pictures/"], "b": 1, "c": "a/b"}) == {
        "a": ["https://x.test/l", "pictures"], "b": 1, "c": "a/b",
    }  # fmt: skip


def test_the_command_pushes_what_it_would_write_and_never_shows_the_token(store: Store, hub: Any, tmp_path: Path) -> None:  # fmt: skip
    """huggingface_hub's own code talks to a local server; `debug` is its most talkative setting."""
    token = "hf_" + "notarealtoken" * 2
    env = hub.environment(tmp_path / "home", HF_TOKEN=token, HF_HUB_VERBOSITY="debug", HF_DEBUG="1")
    arguments = ["publish", "base", "hf://me/x", "--root", str(store.root), "--json", "--debug"]
    done = subprocess.run([sys.executable, "-m", "flows.cli", *arguments], capture_output=True, text=True, check=False, env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["target"] == f"{hub.address}/me/x"
    publish(store, "base", str(tmp_path / "x"), Wish())
    sent = {
        line["value"]["path"]: line["value"].get("oid") or base64.b64decode(line["value"]["content"])
        for line in hub.commit
        if line["key"] in ("file", "lfsFile")
    }
    written = {
        path.relative_to(tmp_path / "x").as_posix(): path for path in (tmp_path / "x").rglob("*") if path.is_file()
    }
    assert sent.keys() == written.keys()
    for name, path in written.items():
        stored = hub.blobs[sent[name]] if name.endswith("safetensors") else sent[name]
        said, ours = (data.replace(b"me/x", b"x") for data in (stored, path.read_bytes()))
        assert said == ours or name == "lineage.json", name  # lineage.json lists the card, which names the repository
    assert "/api/repos/create" in done.stderr  # it did talk
    kept = [
        path.read_bytes() for place in (store.root, str(tmp_path)) for path in Path(place).rglob("*") if path.is_file()
    ]
    for text in (done.stdout.encode(), done.stderr.encode(), *kept, json.dumps(hub.commit).encode()):
        assert token.encode() not in text
