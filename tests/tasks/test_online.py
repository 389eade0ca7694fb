"""The online stages on a random denoiser and an untrained judge: that they run, write, resume and refuse."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from data_curation.scenes import long_caption
from infra.config import versioned
from infra.errors import ConfigError, DataRefused
from models.engine.objective import Batch
from models.networks import families, prx
from models.networks.checkpoint import SamplingCard, read_card, write_checkpoint
from models.posttraining.config import DpoConfig, GrpoConfig, NftConfig, PairsConfig, ReflConfig, RewardModelConfig
from models.posttraining.diffusion_dpo import winners_fell
from models.posttraining.guard_config import GuardConfig
from models.posttraining.reward_model import RewardModel
from models.pretraining.config import FlowMatchingConfig
from tasks.guarding import outside_prompts
from tasks.online import grpo, nft, prompts_of, refl
from tasks.online_prompts import Prompts, prompt_batches, published
from tasks.preference import dpo, make_pairs, with_alarm
from tasks.reward_model import open_curated, open_pairs, part_of, reward_model, scored
from tasks.training import flow_matching
from tasks.training_data import TrainingData

TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1, "checkpoint_every": 1}
SMALL = {"train": TRAIN, "prompts": {"count": 6}, "steps": 2, "guard": {"every": 1, "prompts": 1, "seeds": 2}}
ONLINE = {
    "grpo": (grpo, GrpoConfig.model_validate({**SMALL, "group": 2, "window": 1, "kl": 0.1})),
    "nft": (nft, NftConfig.model_validate({**SMALL, "group": 2})),
    "refl": (refl, ReflConfig.model_validate(SMALL)),
}


@pytest.mark.parametrize("name", ONLINE)
def test_a_stage_writes_moved_weights_and_what_its_guard_saw(name, inputs, context, tmp_path) -> None:
    run, config = ONLINE[name]
    ctx = context(name, inputs, tmp_path)
    facts = run(config, ctx)
    guard = json.loads((ctx.out / "guard.json").read_text())
    assert guard == json.loads(json.dumps(facts["guard"]))
    assert guard["looks"][0]["step"] == 0
    assert guard["looks"][0]["change"] == 0
    assert guard["looks"][1]["drift"][0] > 0
    before, after = (
        load_file(p / "transformer" / "diffusion_pytorch_model.safetensors") for p in (inputs["init"], ctx.out)
    )
    moved = any(not torch.equal(before[key], after[key]) for key in before)
    assert moved == (guard["taken"] > 0)
    assert read_card(ctx.out) == read_card(inputs["init"])


def test_pairs_train_a_guarded_dpo_and_a_reward_model(inputs, context, tmp_path) -> None:
    pairs = context("pairs", inputs, tmp_path)
    make_pairs(PairsConfig(prompts=60, group=2, steps=1, min_gap=0.0), pairs)
    with_pairs = {**inputs, "pairs": pairs.out}
    tuned = dpo(
        DpoConfig.model_validate({"train": TRAIN, "guard": SMALL["guard"]}), context("dpo", with_pairs, tmp_path)
    )
    assert tuned["guard"]["looks"][0]["step"] == 0
    trained = context("reward", with_pairs, tmp_path)
    facts = reward_model(RewardModelConfig.model_validate({"train": TRAIN, "validation": 0.5}), trained)
    assert sum(facts["pairs"].values()) <= 60
    assert facts["bayes_limit"] == 1
    assert facts["accuracy"] == facts["accuracy_before_noise"]["all"]
    noisy = RewardModelConfig.model_validate(
        {"train": TRAIN, "validation": 0.5, "alignment": 0, "label_scale": 0.1, "label_noise": 0.1}
    )
    plain = reward_model(
        noisy, context("plain", {"pairs": pairs.out}, tmp_path)
    )  # preferences alone ask for no training set
    assert 0.5 < plain["bayes_limit"] < 0.9
    assert plain["share_of_limit"] == pytest.approx(plain["accuracy"]["value"] / plain["bayes_limit"], abs=1e-3)
    rewarded = {**SMALL, "group": 2, "window": 1, "rewards": [{"kind": "model"}, {"kind": "sharpness", "weight": 0.5}]}
    ctx = context("rewarded", {**inputs, "reward": trained.out}, tmp_path)
    last = grpo(GrpoConfig.model_validate(rewarded), ctx)["last"]
    assert {"reward-model", "sharpness"} <= last.keys()


def test_ties_are_refused(inputs, context, tmp_path) -> None:

    pairs = context("pairs", inputs, tmp_path)
    make_pairs(PairsConfig(prompts=8, group=2, steps=1, min_gap=0.0), pairs)
    table = pq.read_table(pairs.out / "pairs.parquet")
    column = table.schema.get_field_index("strength")
    values = table["strength"].to_numpy().copy()
    values[3] = 0.0

    pq.write_table(table.set_column(column, "strength", pa.array(values)), pairs.out / "pairs.parquet")
    with pytest.raises(DataRefused, match="row 3 has strength 0"):
        reward_model(RewardModelConfig(), context("reward", {**inputs, "pairs": pairs.out}, tmp_path))


def test_a_training_set_without_squares_is_refused_with_the_way_out(inputs, context, tmp_path) -> None:
    data = tmp_path / "oblong"
    shutil.copytree(inputs["data"], data)
    index = pq.read_table(data / "index.parquet")
    wide = pa.array([40] * len(index), index.schema.field("width").type)
    pq.write_table(index.set_column(index.schema.get_field_index("width"), "width", wide), data / "index.parquet")
    with pytest.raises(ConfigError, match="set reward_model.alignment to 0"):
        open_curated(RewardModelConfig(), context("oblong-reward", {"data": data}, tmp_path))


TAKES_A_MODEL = {
    **ONLINE,
    "dpo": (dpo, DpoConfig.model_validate({"train": TRAIN})),
    "pairs": (make_pairs, PairsConfig(prompts=4, group=2, steps=1, min_gap=0.0)),
    "pairs-data": (make_pairs, PairsConfig(prompts=4, source="data")),
    "sft": (flow_matching, FlowMatchingConfig.model_validate({"name": "sft", "train": TRAIN, "repa": None})),
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_a_distilled_student_is_refused(name, inputs, context, tmp_path) -> None:
    write_checkpoint(tmp_path / "student", prx.load(inputs["init"] / "transformer"), SamplingCard(distilled=True))
    run, config = TAKES_A_MODEL[name]
    ctx = context(name, {**inputs, "init": tmp_path / "student"}, tmp_path)
    with pytest.raises(ValueError, match=f"{name.removesuffix('-data')}: .*distilled student; train its teacher"):
        run(config, ctx)
    assert not list(ctx.out.iterdir())


def test_an_adapter_that_changes_its_base_is_refused_for_dpo(inputs, context, tmp_path) -> None:
    """The reference is the base: PiSSA would move it."""
    config = DpoConfig.model_validate({"train": TRAIN, "lora": {"init": "pissa", "rank": 2}})
    with pytest.raises(ConfigError, match="init=pissa cannot be stacked"):
        dpo(config, context("dpo", inputs, tmp_path))


def test_the_reward_stage_stores_scores_of_mean_0_and_sigma_1(inputs, context, tmp_path) -> None:
    pairs = context("pairs", inputs, tmp_path)
    make_pairs(PairsConfig(prompts=60, group=2, steps=1, min_gap=0.0), pairs)
    config = RewardModelConfig.model_validate({"train": TRAIN, "validation": 0.5})
    ctx = context("reward", {**inputs, "pairs": pairs.out}, tmp_path)
    reward_model(config, ctx)
    stored, model = open_pairs(config, ctx), RewardModel.load(ctx.out)
    chosen = torch.from_numpy(stored.part == "train")
    raw = [scored(model.scorer, side[chosen], stored.text[chosen]) for side in (stored.winner, stored.loser)]
    scores = (np.concatenate(raw) - model.mean) / model.sigma
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    asked = Batch(stored.winner, stored.text[:, None], torch.ones(len(stored.text), 1, dtype=torch.bool), tuple(range(len(stored.text))))  # fmt: skip
    given = model(stored.winner, asked)[chosen].numpy()
    np.testing.assert_allclose(given, scores[: len(given)], atol=1e-4)


def test_the_log_of_dpo_and_its_alarm_are_in_the_facts(inputs, context, tmp_path, caplog) -> None:
    pairs = context("pairs", inputs, tmp_path)
    make_pairs(PairsConfig(prompts=12, group=2, steps=1, min_gap=0.0), pairs)
    calm = {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 4}
    ctx = context("dpo", {**inputs, "pairs": pairs.out}, tmp_path)
    facts = dpo(DpoConfig.model_validate({"train": calm}), ctx)
    rows = [json.loads(line) for line in (ctx.out / "metrics.jsonl").read_text().splitlines()]
    assert facts["winners_fell"] == winners_fell(rows, 4)
    told, warned = list[tuple[int, int]](), with_alarm(replace(ctx, progress=lambda done, total, _: told.append((done, total))), DpoConfig().train)  # fmt: skip
    for step in (10, 20, 30, 40):
        warned.progress(step, 120, {"winner_change": 0.2, "winners_worse": 0.7})
    assert told == [(10, 120), (20, 120), (30, 120), (40, 120)]
    assert [record.message for record in caplog.records if "less likely" in record.message] == [
        "dpo: winners are less likely than at the start in 3 rows of the log running, by step 30 (winner_change +0.2): the "
        "preference pulls both pictures down; raise anchor, or lower beta_per_element or the rates"
    ]


@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_a_guard_looks_at_outside_prompts_where_it_is_asked_to(name, inputs, context, tmp_path) -> None:
    guard = {**SMALL["guard"], "outside": {"prompts": 2}}
    if name == "grpo":
        run, config = grpo, GrpoConfig.model_validate({**SMALL, "group": 2, "window": 1, "guard": guard})
    else:
        pairs = context("pairs", inputs, tmp_path)
        make_pairs(PairsConfig(prompts=6, group=2, steps=1, min_gap=0.0), pairs)
        run, config = dpo, DpoConfig.model_validate({"train": TRAIN, "guard": guard})
        inputs = {**inputs, "pairs": pairs.out}
    found = run(config, context(name, inputs, tmp_path))["guard"]["looks"]
    assert found[0]["outside"]["change"] == 0
    assert found[0]["outside"]["held_out"] < 0
    assert found[0]["outside"]["held_out"] != found[0]["held_out"]
    assert found[1]["outside"]["error"] > 0


def test_outside_prompts_are_long_wordings_of_published_scenes_that_nothing_else_asks(inputs) -> None:
    config = GrpoConfig.model_validate({**SMALL, "group": 2, "window": 1, "guard": {"every": 1, "prompts": 3, "outside": {"prompts": 4}}})  # fmt: skip
    card = read_card(inputs["init"])
    data, around = TrainingData(inputs["data"]), families.surroundings(inputs["init"], card)
    prompts = prompts_of(config, data, around, own=False)
    outside = outside_prompts(config.guard, prompts.spare, around)
    assert (len(prompts.scenes), len(outside.scenes)) == (9, 4)
    assert not {scene.id for scene in prompts.scenes} & {scene.id for scene in outside.scenes}
    assert not any(scene.held_out for scene in outside.scenes)
    assert outside.captions == tuple(long_caption(scene, i) for i, scene in enumerate(outside.scenes))
    plain = config.model_copy(update={"guard": config.guard.model_copy(update={"outside": None})})
    same = prompts_of(plain, data, around, own=False)
    assert (same.captions, same.spare) == (prompts.captions, ())  # the option moves no other prompt
    assert versioned(plain) == versioned(GrpoConfig.model_validate({**SMALL, "group": 2, "window": 1, "guard": {"every": 1, "prompts": 3}}))  # fmt: skip
    assert "outside" not in versioned(plain)["guard"]
    with pytest.raises(ValueError, match=r"guard.outside.texts are judged by guard.held_out"):
        GuardConfig.model_validate({"outside": {"texts": ["a cat"]}})


def test_prompts_of_training_guard_and_evaluation_are_apart() -> None:
    scenes = published(50, 3)
    assert len({scene.id for scene in scenes}) == 50
    assert not any(scene.held_out for scene in scenes)
    others = published(20, 3, {scene.id for scene in scenes})
    assert not {scene.id for scene in scenes} & {scene.id for scene in others}
    with pytest.raises(ConfigError, match="published scenes"):
        published(100_000, 0)


def test_a_group_is_neighbouring_slots_and_an_epoch_asks_every_prompt_once() -> None:
    prompts = Prompts(tuple(published(6, 0)), torch.zeros(6, 2, 4), torch.ones(6, 2, dtype=torch.bool), 6)
    train = SimpleNamespace(batch_size=4, seed=0)
    batches = prompt_batches(prompts, 32, train, 2)
    asked = torch.cat([batches(step).extra["scene"] for step in range(3)]).view(-1, 2)
    assert torch.equal(asked[:, 0], asked[:, 1])
    assert sorted(asked[:, 0].tolist()) == list(range(6))
    assert torch.equal(batches(2).extra["scene"], batches(2).extra["scene"])


def test_the_split_follows_the_prompt() -> None:
    parts = [part_of(f"prompt {i}", 0.4, 0.25, 0) for i in range(2000)]
    assert parts.count("train") / 2000 == pytest.approx(0.6, abs=0.04)
    assert parts.count("report") / 2000 == pytest.approx(0.3, abs=0.03)
    assert part_of("prompt 5", 0.4, 0.25, 0) == parts[5]
