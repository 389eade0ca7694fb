import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from data_curation.scenes import SUBJECT_OBJECTS, Scene, all_scenes
from infra.stages import Resources, StageContext, fan_out_here, no_progress
from models.evaluation.judge import Judge, Vocabulary
from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig
from models.posttraining.config import PairsConfig
from models.posttraining.reward import judge_reward
from tasks.preference import drawn, make_pairs


def test_stored_pictures_have_the_stored_rewards_and_winners_the_larger(tmp_path) -> None:
    torch.manual_seed(0)
    subjects = [Scene("big", (name,), "white") for name in SUBJECT_OBJECTS]
    judge = Judge.build(Vocabulary.of([*all_scenes("full"), *subjects]), 4, 16, 0.5)
    judge.save(tmp_path / "judge")
    small = PrxConfig(hidden_size=32, depth=1, num_heads=2, patch_size=4, mlp_ratio=2.0)
    denoiser = prx.build(small, torch.zeros(small.text_dim), torch.ones(small.text_dim), 0)
    torch.nn.init.normal_(denoiser.transformer.final_layer.linear.weight)  # a new one draws grey only
    write_checkpoint(tmp_path / "sft", denoiser, SamplingCard(steps=1))
    inputs = {"judge": tmp_path / "judge", "init": tmp_path / "sft"}
    out = tmp_path / "out"
    out.mkdir()
    context = StageContext("pairs", inputs, {}, out, out, Resources(), no_progress, fan_out_here)

    facts = make_pairs(PairsConfig(prompts=24, group=3, steps=1, min_gap=0.0), context)

    pictures, table = load_file(out / "pairs.safetensors"), pq.read_table(out / "pairs.parquet").to_pydict()
    scene_of = {scene.id: scene for scene in all_scenes("full")}
    scenes = [scene_of[name] for name in table["scene"]]
    assert facts["pairs"] + facts["ties"] == 24 and facts["pairs"] == len(scenes) > 0
    assert not any(scene.held_out for scene in scenes)
    for side in ("winner", "loser"):
        np.testing.assert_allclose(judge_reward(judge, pictures[side], scenes), table[f"reward_{side}"], atol=1e-5)
    assert all(gap > 0 for gap in np.subtract(table["reward_winner"], table["reward_loser"]))


def test_no_scene_is_asked_again_before_all_were_asked() -> None:
    places = drawn(np.random.default_rng(0), 7, 17)
    assert len(places) == 17
    assert sorted(places[:7]) == sorted(places[7:14]) == list(range(7))
    assert list(places[:7]) != list(places[7:14])
    assert sorted(drawn(np.random.default_rng(0), 7, 7)) == list(range(7))
