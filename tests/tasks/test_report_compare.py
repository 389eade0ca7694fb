"""Two small recorded runs on one page."""

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flows.cli import app
from infra.storage import Store, open_store
from tasks.report_compare import Side, compare_page, config_changes, difference

EVIL = '<script>alert("x")</script>'


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def score(value: float, half: float = 0.02) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": 320}


def recorded(store: Store, work: Path, name: str, stages: Mapping[str, float], steps: int, prompts: list[str], **config: Any) -> Side:  # fmt: skip
    """download, one checkpoint per stage with its accuracy, and an evaluation of them."""
    entries = []

    def make(stage: str, kind: str, files: Mapping[str, bytes], **facts: Any) -> None:
        for path, data in files.items():
            (work / name / stage / path).parent.mkdir(parents=True, exist_ok=True)
            (work / name / stage / path).write_bytes(data)
        key = f"{name}{stage}".replace("-", "").ljust(64, "0")
        made = store.commit(stage, key, kind, work / name / stage, [], {"seconds": float(steps), **facts})
        entries.append({"name": stage, "key": key, "digest": made.digest})

    dropped = {"blurred": steps, "too_small": 3}
    make("download", "manifest", {"rows.txt": b"same"}, received=100, kept=97 - steps, errored=0, dropped=dropped)
    for stage in stages:
        lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, steps + 1)]
        make(stage, "checkpoint", {"metrics.jsonl": "\n".join(lines).encode()})
    grid = {"prompts": prompts, "seeds": list(range(len(prompts))), "stages": [*stages, "real"]}
    grid["right"] = {stage: [True] * len(prompts) for stage in grid["stages"]}
    files = {f"samples/{stage}/{i}-{i}.png": png(10 * steps) for stage in grid["stages"] for i in range(len(prompts))}
    scores = {stage: {"prompt_accuracy": score(value), "kernel_distance": score(1 - value)} for stage, value in stages.items()}  # fmt: skip
    files |= {
        "grid.json": json.dumps(grid).encode(),
        "scores.json": json.dumps({"scores": scores, "real": {}}).encode(),
    }
    make("evaluate", "scores", files)
    store.write_run(name, {"stages": entries, "outcome": "ok", "wall_seconds": 60.0 * steps, "config": config})
    return Side.of(store, name)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Side, Side]:
    stores = [open_store(tmp_path / name) for name in ("one", "two")]
    train = {"name": "sft", "train": {"steps": 4, "lr": 0.1}}
    first = recorded(stores[0], tmp_path, "first", {"base": 0.5, "sft": 0.8}, 4, [EVIL, "a cat", "a dog"],
                     title=EVIL, pretrain=[train], run={"root": "x"})  # fmt: skip
    changed = {"name": "sft", "train": {"steps": 8, "lr": 0.1}}
    second = recorded(stores[1], tmp_path, "second", {"base": 0.5, "sft": 0.7, "dpo": 0.9}, 8, [EVIL, "a cat", "a fox"],
                      title="plain", pretrain=[{"name": "new", "x": 1}, changed], run={"root": "y"})  # fmt: skip
    return first, second


def test_the_page_is_inert_self_contained_and_escaped(sides: tuple[Side, Side]) -> None:
    page = compare_page(*sides)
    assert "<script" not in page and "&lt;script&gt;" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 * (2 + 2 + 1)  # prompts in both; base and sft of both runs, dpo of one
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "default-src 'none'" in page and len(page) < 100_000


def test_it_shows_what_was_set_and_what_became_of_it(sides: tuple[Side, Side]) -> None:
    page = compare_page(*sides)
    for part in ("pretrain[sft].train.steps", "-0.100 worse", "+0.100 worse", "not in A", "2 prompts of one run only",
                 "blurred 4 → 8", "only in second", "the same bytes", "loss of sft in both runs over 8 steps"):  # fmt: skip
        assert part in page, part
    assert page.count("stroke-dasharray") == 3 and page.count("<polyline") == 5
    assert "too_small" not in page and "train.lr" not in page


def test_a_run_beside_itself_differs_in_nothing(sides: tuple[Side, Side]) -> None:
    page = compare_page(sides[0], sides[0])
    assert "both runs were configured alike" in page
    assert "differs" not in page and "better</strong>" not in page and "worse</strong>" not in page


def test_the_command_writes_the_page(sides: tuple[Side, Side], tmp_path: Path) -> None:
    out, roots = tmp_path / "pages" / "two.html", [str(side.store.root) for side in sides]
    arguments = ["first", "latest", "--root", roots[0], "--second-root", roots[1], "-o", str(out)]
    done = CliRunner().invoke(app, ["compare", *arguments])
    assert (done.exit_code, done.stdout.strip()) == (0, str(out))
    assert out.read_text() == compare_page(*sides)


def test_settings_go_by_name_and_what_one_run_lacks_is_empty() -> None:
    a = {"stages": [{"name": "x", "k": 1}, {"name": "y", "k": 2}], "n": [1, 2], "run": {"root": "a"}}
    b = {
        "stages": [{"name": "new", "k": 0}, {"name": "x", "k": 1}, {"name": "y", "k": 3}],
        "n": [1],
        "run": {"root": "b"},
    }
    assert config_changes(a, b) == [
        {"path": "stages[y].k", "a": "2", "b": "3"}, {"path": "n", "a": "[1, 2]", "b": "[1]"},
        {"path": "stages[new].name", "a": "", "b": '"new"'}, {"path": "stages[new].k", "a": "", "b": "0"},
    ]  # fmt: skip


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says() -> None:
    """Newcombe 1998, table II, row (a): 56/70 against 48/80, Wilson: 0.2 with 0.0524 to 0.3339."""
    wilson = {56 / 70: (0.6920, 0.8769), 48 / 80: (0.4904, 0.7005)}
    high, low = ({"value": v, "low": bounds[0], "high": bounds[1], "n": 1} for v, bounds in wilson.items())
    found = difference("prompt_accuracy", low, high)
    assert [round(found[name], 3) for name in ("value", "low", "high")] == [0.2, 0.052, 0.334]
    assert found["verdict"] == "better" and difference("kernel_distance", low, high)["verdict"] == "worse"
    assert difference("prompt_accuracy", score(0.5), score(0.51))["verdict"] == ""
