import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data_curation.manifest import ROWS_SCHEMA, write_manifest, write_table
from infra.artifacts import Artifact
from infra.errors import ConfigError
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from tasks.config import ReportConfig
from tasks.headline import columns_of, headline
from tasks.report import curves_picture, report
from tasks.report_data import data_part
from tasks.report_parts import curve
from tasks.report_tables import cell, comparison_rows, funnel_rows, guard_rows

EVIL = '<script>alert("x")</script>'
SCORE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 20}


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((90, 120, 3), shade, np.uint8)).save(out, "PNG")
    return out.getvalue()


def row(name: str, decision: str, reasons: list[str], **more: Any) -> dict[str, Any]:
    return {"row_id": name, "url": f"http://x.invalid/{name}", "caption_short": EVIL, "caption_long": "", "ordinal": 0,
            "decision": decision, "reasons": reasons, **more}  # fmt: skip


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    folders = {name: tmp_path / name for name in ("scores", "download", "buckets", "pretrain", "out")}
    for folder in folders.values():
        folder.mkdir()
    rows = [row("a", "keep", [], buckets=["40:40x40"]), row("b", "drop", ["near_duplicate"], keeper_id="a", dup_distance=7),
            row("c", "error", ["http_404"])]  # fmt: skip
    write_table([{**r, "image": None if r["row_id"] == "c" else png(90)} for r in rows], ROWS_SCHEMA,
                folders["download"] / "rows-00000.parquet")  # fmt: skip
    write_manifest(rows, folders["buckets"])
    (folders["pretrain"] / "sampling.json").write_text("{}")
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    (folders["pretrain"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folders["pretrain"] / "grids").mkdir()
    (folders["pretrain"] / "grids" / "step-000004.png").write_bytes(png(10))
    own = {"prompt_accuracy": SCORE, "kernel_distance": SCORE, "kernel_distance_floor": SCORE}
    gates = [{"stage": "pretrain", "metric": "prompt_accuracy", "passed": False, "reason": EVIL, "difference": SCORE}]
    detail = {"by_layout": {"held_out_basic": {"big": SCORE}}, "collapse": {"held_out_basic": 0.0}}
    (folders["scores"] / "scores.json").write_text(json.dumps(
        {"scores": {"pretrain": own}, "real": own, "gates": gates, "detail": {"pretrain": detail}}))  # fmt: skip
    grid = {"prompts": [EVIL], "seeds": [5], "scenes": ["s"], "stages": ["pretrain", "real"],
            "right": {"pretrain": [False], "real": [True]}}  # fmt: skip
    (folders["scores"] / "grid.json").write_text(json.dumps(grid))
    for stage in grid["stages"]:
        (folders["scores"] / "samples" / stage).mkdir(parents=True)
        (folders["scores"] / "samples" / stage / "0-5.png").write_bytes(png(200))
    facts = {"received": 3, "kept": 1, "errored": 1, "dropped": {"near_duplicate": 1}, "seconds": 2.0,
             "truth": {"defects_caught": 2, "defects_planted": 2, "near_duplicate_recall": 1, "near_duplicate_precision": 1},
             "resolutions": {"32": {"pictures": 0, "buckets": 0, "possible": 1}, "40": {
                 "pictures": 7, "buckets": 3, "possible": 9, "cropped": 0.0123, "cropped_p95": 0.05, "downscaled": 0.5,
                 "left_over": {"16": 1.0, "64": 0.25, "256": 0.125}}}}  # fmt: skip
    inputs = {name: folder for name, folder in folders.items() if name != "out"}
    parents = {name: Artifact(kind="x", uri=f"file:///{name}/key", digest=name * 3, stage=name,
                              facts=facts if name == "buckets" else {}) for name in inputs}  # fmt: skip
    return StageContext("report", inputs, parents, folders["out"], tmp_path, Resources(), no_progress, fan_out_here)


def test_page_is_inert_self_contained_and_escaped(context: StageContext) -> None:
    facts = report(ReportConfig(command="t2i run presets/demo.yaml"), context)
    page = (context.out / "report.html").read_text()
    assert facts["megabytes"] < 1
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert "default-src 'none'" in page
    for part in ("near_duplicate", "http_404", "the kept picture it copies", "missed", "OpenMoji", "CC BY-SA 4.0",
                 "loss 1 → 0.125", "floor 0.500", "grid of pretrain", "2 of 2 planted",
                 "<td>7</td><td>3</td><td>9</td><td>1.23 %</td><td>5.00 %</td><td>50.00 %</td><td>100.00 %</td><td>25.00 %</td>"):  # fmt: skip
        assert part in page, part


def test_the_data_part_shows_what_was_kept_and_what_came_nearest_to_a_limit(context: StageContext) -> None:
    rows = [row(name, "keep", [], blur=blur, buckets=["32:32x32", "40:40x40"] if wide else ["32:32x32"])
            for name, blur, wide in (("a", 0.1, True), ("d", 0.49, True), ("e", 0.45, False))]  # fmt: skip
    write_manifest(
        [*rows, row("b", "drop", ["near_duplicate"], keeper_id="a", dup_distance=7)], context.inputs["buckets"]
    )
    quality = Artifact(kind="x", uri="file:///q/key", digest="q", stage="quality",
                       facts={"config": {"max_blur": 0.5, "max_border": None}})  # fmt: skip
    found = data_part(
        ReportConfig(dropped_examples=2), replace(context, parents={**context.parents, "quality": quality})
    )
    assert [(group.name, group.about) for group in found.borderline] == [("blurred", "blur against a limit of 0.5")]
    assert [example.note for example in found.borderline[0].examples] == ["blur 0.49", "blur 0.45"]
    assert [example.note for example in found.refused[0].examples] == ["distance 7"]
    assert found.refused[0].examples[0].keeper is not None
    assert len(found.kept) == 2
    assert [(bucket.name, bucket.count, round(bucket.share, 2)) for bucket in found.buckets] == [
        ("32 px: 32x32", 3, 1.0), ("40 px: 40x40", 2, 0.67),
    ]  # fmt: skip


def test_comparison_shows_every_row_and_who_passed(context: StageContext, tmp_path: Path) -> None:
    def line(stage: str, steps: int, right: float) -> dict[str, Any]:
        return {"stage": stage, "method": None if stage == "teacher" else "dmd", "steps": steps, "network_calls": steps,
                "prompt_accuracy": SCORE | {"value": right}, "prompt_accuracy_full": SCORE, "kernel_distance": SCORE,
                "diversity": SCORE, "high_frequency_ratio": 0.5}  # fmt: skip

    rows = {"weak@1": line("weak", 1, 0.2), "good@1": line("good", 1, 0.9), "teacher@1": line("teacher", 1, 0.7)}
    ratios = {"weak@1": {"basic": 0.2, "full": None}, "good@1": {"basic": 0.9, "full": 1.0},
              "teacher@1": {"basic": 1.0, "full": 1.0}}  # fmt: skip
    verdicts = [{"row": "weak@1", "passed": False}, {"row": "good@1", "passed": True}]
    best = {"1": {"stage": "good", "accuracy": 0.9, "passed": True}}
    folder = tmp_path / "compare"
    folder.mkdir()
    record = {"rows": rows, "verdicts": verdicts, "ratios": ratios, "best": best}
    (folder / "comparison.json").write_text(json.dumps(record))
    facts = {"speed_up": {"1": {"good@1": 60.25, "weak@1": None}}}
    inputs = {**context.inputs, "compare": folder}
    artifact = Artifact(kind="x", uri="file:///c/key", digest="c", stage="compare", facts=facts)
    compared = replace(context, inputs=inputs, parents={**context.parents, "compare": artifact})
    found = comparison_rows(compared)
    assert [row["stage"] for row in found] == ["teacher", "good", "weak"]
    assert [row["passed"] for row in found] == [None, True, False]
    assert [row["best"] for row in found] == [False, True, False]
    report(ReportConfig(), compared)
    page = (context.out / "report.html").read_text()
    assert "Students against their teacher" in page and "60.2x" in page and "given away at 1 step(s)" in page


def test_guards_show_every_look_what_was_taken_and_why_it_ended(context: StageContext) -> None:
    look = {"trained": 0.1, "held_out": -0.2, "change": 0.0, "error": 0.0, "diversity": 1.0, "drift": [0.0, 0.02]}
    looks = [{**look, "step": 0}, {**look, "step": 20, "change": -0.25, "error": 0.05}]
    record = {"looks": looks, "ended": True, "reasons": [EVIL], "taken": 0, "times": [0.1, 0.9]}
    (context.inputs["pretrain"] / "guard.json").write_text(json.dumps(record))
    rows = guard_rows(context, ["pretrain"])
    assert [(r["step"], r["taken"], r["drift"]) for r in rows] == [(0, True, 0.02), (20, False, 0.02)]
    report(ReportConfig(), context)
    page = (context.out / "report.html").read_text()
    assert "-0.250<small>standard error 0.050" in page
    assert "<script" not in page


def test_summary_has_scores_funnel_and_truth(context: StageContext) -> None:
    report(ReportConfig(), context)
    summary = json.loads((context.out / "summary.json").read_text())
    assert summary["scores"]["pretrain"]["prompt_accuracy"] == SCORE
    assert summary["funnel"] == {"received": 3, "kept": 1, "errored": 1, "dropped": {"near_duplicate": 1}}
    assert summary["truth"]["defects_caught"] == 2


def test_without_a_judge_the_page_has_pictures_and_distances_but_no_scores(
    context: StageContext, tmp_path: Path
) -> None:
    folder, distances = tmp_path / "pictures", tmp_path / "distribution"
    grid = {"prompts": ["a cat", "a dog"], "seeds": [5, 6], "stages": ["pretrain", "real"], "held_out": [True, False]}
    for stage, image in (
        ("pretrain", Image.new("RGB", (400, 400), "red")),
        ("real", Image.new("RGB", (40, 20), "blue")),
    ):
        (folder / "samples" / stage).mkdir(parents=True)
        for i, seed in enumerate(grid["seeds"]):
            image.save(folder / "samples" / stage / f"{i}-{seed}.png")
    (folder / "grid.json").write_text(json.dumps(grid))
    distances.mkdir()
    measured = {"embedding": {"model": "efficientnet", "features": 40}, "resolution": 32, "pictures": 40, "training": 9,
                "scores": {"pretrain": {"kernel_distance": SCORE}, "real": {"kernel_distance": SCORE}}}  # fmt: skip
    (distances / "distribution.json").write_text(json.dumps(measured))
    (distances / "nearest-pretrain.png").write_bytes(png(3))
    inputs = {role: path for role, path in context.inputs.items() if role != "scores"}
    made = Artifact(kind="checkpoint", uri="x", digest="p", stage="pretrain", facts={"function": "flow_matching"})
    parents = {role: artifact for role, artifact in context.parents.items() if role != "scores"} | {"pretrain": made}
    own = replace(context, inputs=inputs | {"pictures": folder, "distribution": distances}, parents=parents)
    assert report(ReportConfig(data_source="own"), own)["checkpoints"] == 1
    page = (context.out / "report.html").read_text()
    for part in ("40 features of efficientnet", 'href="#distribution"', "<td>a dog<small>trained on</small>", "<td>a cat</td>",
                 'class="mark"', "loss 1 → 0.125", "near_duplicate"):  # fmt: skip
        assert part in page, part
    for part in ('id="scores"', '#scores"', "judge calls", "right)", "mark yes", "mark no"):
        assert part not in page, part
    shown = [Image.open(io.BytesIO(base64.b64decode(found))).size for found in re.findall(r'png;base64,([^"]*)"', page)]
    assert (160, 160) in shown and (40, 20) in shown and (400, 400) not in shown
    summary = json.loads((context.out / "summary.json").read_text())
    assert summary["scores"] == {} and summary["distribution"]["pretrain"]["kernel_distance"] == SCORE
    with Image.open(context.out / "headline.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
    for colour, there in (
        ((255, 0, 0), True),
        ((0, 0, 255), True),
        ((0x16, 0x6B, 0x2E), False),
        ((0xB3, 0x26, 0x1E), False),
    ):
        assert (drawn == colour).all(2).any() == there, colour


def test_own_data_gets_no_credit_line_and_too_large_a_page_is_refused(context: StageContext) -> None:
    report(ReportConfig(data_source="own"), context)
    assert "OpenMoji" not in (context.out / "report.html").read_text()
    with pytest.raises(ConfigError, match="max_megabytes"):
        report(ReportConfig(max_megabytes=0.001), context)


def test_headline_has_a_column_per_kind_of_stage_and_a_row_per_prompt(context: StageContext, tmp_path: Path) -> None:
    stages = ["base", "more", "sft", "dpo", "robot", "four", "worse", "one"]
    functions = ["flow_matching"] * 3 + ["dpo", "dreambooth", "distill", "distill", "distill"]
    parents = {stage: Artifact(kind="checkpoint", uri="x", digest=stage, stage=stage, facts={"function": function})
               for stage, function in zip(stages, functions, strict=True)}  # fmt: skip
    steps = {"four": 4, "worse": 1, "one": 1}
    chosen = columns_of([*stages, "real"], parents, steps, {"worse": 0.2, "one": 0.9})
    assert [column.stage for column in chosen] == ["real", "base", "sft", "dpo", "four", "one"]
    assert [column.title for column in chosen[-2:]] == ["4 steps", "1 step"]
    made = Artifact(kind="checkpoint", uri="x", digest="p", stage="pretrain", facts={"function": "flow_matching"})
    scores = Artifact(kind="scores", uri="x", digest="s", stage="evaluate", facts={"config": {}})
    report(ReportConfig(), replace(context, parents={**context.parents, "pretrain": made, "scores": scores}))
    with Image.open(context.out / "headline.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
    for colour in ((200, 200, 200), (0x16, 0x6B, 0x2E), (0xB3, 0x26, 0x1E)):  # the pictures, right, not right
        assert (drawn == colour).all(2).any(), colour
    subject = scores.model_copy(update={"facts": {"config": {"subjects": [{"phrase": EVIL}]}}})
    folder = context.inputs["scores"]
    assert not headline(folder, {}, {"pretrain": made, "scores": subject}, {}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_curve_spans_the_box_and_needs_positive_values() -> None:
    line = curve("x", [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 1.0}])
    assert line is not None
    assert line.points == "160.0,0.0 320.0,120.0"
    assert curve("x", [{"step": 1, "loss": 0.0}]) is None


def test_the_curves_are_one_picture_of_every_stage() -> None:
    lines = [curve(name, [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 1.0}]) for name in ("a", "b", "c", "<d>")]
    root = ElementTree.fromstring(curves_picture([line for line in lines if line is not None]))
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert [text.text for text in root.iterfind(".//svg:text[@class='name']", space)] == ["a", "b", "c", "<d>"]
    assert len(root.findall(".//svg:polyline", space)) == 4
    assert root.find("./svg:g[4]", space).get("transform") == "translate(15 198)"  # type: ignore[union-attr]


def test_changes_within_noise_are_not_called_better() -> None:
    up, noise = {"value": 0.1, "low": 0.05, "high": 0.2}, {"value": 0.1, "low": -0.05, "high": 0.2}
    assert cell("prompt_accuracy", SCORE, up, None).verdict == "better"
    assert cell("kernel_distance", SCORE, up, None).verdict == "worse"
    assert cell("prompt_accuracy", SCORE, noise, None).verdict == ""


def test_funnel_lists_each_reason_at_the_stage_that_found_it() -> None:
    first = {"received": 10, "kept": 8, "errored": 2, "dropped": {}, "errors": {"http_404": 2}}
    second = {**first, "kept": 7, "dropped": {"near_duplicate": 1}}
    parents = {name: Artifact(kind="x", uri="x", digest=name, stage=name, facts=facts)
               for name, facts in (("download", first), ("dedup", second))}  # fmt: skip
    assert [r["new"] for r in funnel_rows(parents)] == [{"http_404": 2}, {"near_duplicate": 1}]


def test_prompts_are_shown_as_typed_and_as_rewritten_and_escaped(context: StageContext, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    both = {"typed": SCORE, "rewritten": SCORE | {"value": 0.875}}
    scores = {"short_prompt_accuracy": both, "difference": SCORE, "by_kind": {"object": both}, "rewritten": 1,
              "protected": 3, "protected_kept": 3}  # fmt: skip
    line = {"kind": "object", "original": EVIL, "revised": "a big cat", "reason": None,
            "right": {"typed": False, "rewritten": True}}  # fmt: skip
    for name in both:
        (folder / name).mkdir(parents=True)
        (folder / name / "0.png").write_bytes(png(50))
    (folder / "prompts.json").write_text(json.dumps({"scores": scores, "rows": [line, line]}))
    report(ReportConfig(), replace(context, inputs={**context.inputs, "prompts": folder}))
    page = (context.out / "report.html").read_text()
    assert "as rewritten 0.875" in page and "3 of 3" in page and 'href="#prompts"' in page
    assert page.count('<td style="text-align:left;min-width:14rem">a big cat') == 1  # pictures of the first row only
    assert "<script" not in page


def test_the_training_times_are_drawn(context: StageContext) -> None:
    report(ReportConfig(), context)
    assert "training times" not in (context.out / "report.html").read_text()
    drawn = context.parents["pretrain"].model_copy(update={"facts": {"times": [0.05, 0.2, 0.35, 0.4]}})
    report(ReportConfig(), replace(context, parents={**context.parents, "pretrain": drawn}))
    assert "tenths, data to noise: pretrain <code>▂▅▇█</code></p>" in (context.out / "report.html").read_text()
