"""The flow-matching stage with early stop: what it writes is what its looks took."""

import shutil

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from models.pretraining.config import FlowMatchingConfig
from tasks.training import flow_matching

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_an_sft_that_only_harms_ends_early_with_the_weights_it_started_from(inputs, context, tmp_path) -> None:
    shutil.copytree(inputs["data"], tmp_path / "data")
    index = pq.read_table(inputs["data"] / "index.parquet")
    split = pc.if_else(pc.less(index["position"], 4), "train", "validation")
    place = index.column_names.index("split")
    pq.write_table(index.set_column(place, "split", split), tmp_path / "data" / "index.parquet")
    config = FlowMatchingConfig.model_validate({
        "name": "sft", "repa": None, "validation": {"every": 2, "patience": 2, "pictures": 4},
        "train": {"steps": 40, "batch_size": 4, "log_every": 2, "checkpoint_every": 20, "ema_gamma": 0.0,
                  "optimizer": {"muon_lr": None, "adamw_lr": 1.0, "warmup_steps": 0}},
    })  # fmt: skip
    ctx = context("sft", {"init": inputs["init"], "data": tmp_path / "data"}, tmp_path)
    facts = flow_matching(config, ctx)
    found = facts["early_stop"]
    assert (found["early"], found["taken"], facts["steps"]) == (True, 0, 4)
    assert [look["step"] for look in found["looks"]] == [0, 2, 4]
    assert facts["validation"]["validation"] == found["looks"][-1]["loss"]  # without averaging both look at one thing
    before, after = (load_file(folder / WEIGHTS) for folder in (inputs["init"], ctx.out))
    assert all(torch.equal(before[name], after[name]) for name in before)
