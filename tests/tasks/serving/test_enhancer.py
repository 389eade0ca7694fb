"""The run's prompt enhancer in front of its models, the champion beside them, and the lanes of a batch."""

import threading
import time

import pytest
import torch
from fastapi.testclient import TestClient

from infra.local_files import weights_digest
from infra.pointers import champion_of, move
from models.engine.config import OptimizerConfig, TrainConfig
from models.engine.loop import train
from models.networks.prompt_enhancer import SPECIAL, CaptionModel, build, example, train_tokenizer
from models.posttraining.enhancer_files import CARD, EnhancerCard
from models.posttraining.prompt_enhancement import PromptRewriting, batch_of
from models.sampling.generate import load_generator
from tasks.serving import server
from tasks.serving.app import create_app
from tasks.serving.config import ServeConfig
from tasks.serving.engine import Engine, Look
from tasks.serving.lanes import Lanes, proven
from tasks.serving.models import models_of

IMAGES = "/v1/images/generations"
SHORT, LONG = "cat", "a big cat on a blue background"


def write_enhancer(out, scratch) -> None:
    """A language model that has learnt one sentence by heart."""
    tokenizer = train_tokenizer([SHORT, LONG], 280)
    model = build(len(tokenizer), 32, 1, 2, 0)
    batch = batch_of([example(tokenizer, SHORT, LONG)] * 4, tuple(range(4)), SPECIAL.index("<pad>"))
    optimizer = OptimizerConfig(muon_lr=0.02, adamw_lr=1e-2, warmup_steps=2)
    train(PromptRewriting(model), lambda step: batch,
          TrainConfig(steps=60, batch_size=4, log_every=20, checkpoint_every=60, optimizer=optimizer), scratch)  # fmt: skip
    CaptionModel(model, tokenizer).save(out)
    card = EnhancerCard(kind="captions", fingerprint=weights_digest(out))
    (out / CARD).write_text(card.model_dump_json())


@pytest.fixture
def enhancing(new_run, tmp_path):
    """The toy run with an enhancer, as an application."""
    store = new_run("toy", 7)
    (tmp_path / "enhancer").mkdir()
    write_enhancer(tmp_path / "enhancer", tmp_path / "scratch")
    made = store.commit("enhancer", "e" * 64, "enhancer", tmp_path / "enhancer", [], {"function": "toy", "inputs": {}})
    run = store.read_run("toy")
    run["stages"].append({"name": "enhancer", "key": "e" * 64, "digest": made.digest})
    store.write_run("toy", run)
    engine = Engine(models_of(store, "toy"), ServeConfig(threads=1, drain_seconds=5))
    yield TestClient(create_app(engine, ServeConfig()))
    engine.end()


def test_a_short_prompt_is_filled_out_unless_that_is_not_wanted(enhancing):
    def ask(prompt: str, **more) -> dict:
        return enhancing.post(IMAGES, json={"prompt": prompt, "seed": 3, **more}).json()["data"][0]

    assert enhancing.get("/v1/models").json()["enhances"]
    assert ask(SHORT)["revised_prompt"] == LONG
    assert ask(SHORT)["b64_json"] == ask(LONG, enhance=False)["b64_json"]
    plain = ask(SHORT, enhance=False)
    assert plain["revised_prompt"] == SHORT
    assert plain["b64_json"] != ask(SHORT)["b64_json"]
    assert "zwx" in ask("zwx robot", model="robot")["revised_prompt"]


def test_a_promoted_champion_is_swapped_in_without_a_failed_request(new_run):
    store = new_run("first", 7)
    first, second = (
        models_of(new_run(name, seed), name).served["fast"].artifact for name, seed in (("a", 7), ("b", 8))
    )
    move(store, champion_of("demo"), 0, first, "night 1", "better")
    app = server.build(str(store.root), "latest", ServeConfig(threads=1, follow_seconds=0.05, queue=1000), None, None)
    statuses: list[int] = []
    with TestClient(app) as client:

        def champion() -> str:
            return client.get("/v1/models/champion").json()["digest"]

        def hammer() -> None:
            while champion() != second.digest:
                statuses.append(client.post(IMAGES, json={"prompt": SHORT, "model": "champion"}).status_code)

        assert champion() == first.digest
        threads = [threading.Thread(target=hammer) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(statuses) < 4:
            time.sleep(0.01)
        move(store, champion_of("demo"), 1, second, "night 2", "better")
        for thread in threads:
            thread.join(60)
        assert champion() == second.digest
        assert set(statuses) == {200}


def test_a_damaged_champion_changes_nothing(new_run, tmp_path):
    (bad,) = (each for each in new_run("first", 7).list() if each.stage == "fast")
    (weights,) = (tmp_path / "root").rglob("fast/**/transformer/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    store = new_run("second", 8)
    app = server.build(str(store.root), "latest", ServeConfig(threads=1, follow_seconds=0.02), None, None)
    with TestClient(app) as client:
        before = client.get("/v1/models").json()
        move(store, champion_of("demo"), 0, bad, "night", "better")
        time.sleep(0.3)
        assert client.get("/v1/models").json() == before
        assert client.post(IMAGES, json={"prompt": SHORT}).status_code == 200


def test_a_lane_is_used_only_if_it_gives_the_largest_one_s_bits(new_run, monkeypatch):
    models = models_of(new_run("toy", 7), "toy")
    fast = models.find("student-1")
    look, generator = Look(fast, (), 16, 16, 1, 1.0, fast.card.sampler, 16), load_generator(fast.folder)
    assert Lanes(6).sizes == (1, 2, 4, 6)
    found = proven(generator, look, (1, 2, 4))
    assert found[-1] == 4 or found == (1,)
    honest = type(generator).draw

    def off_at_two(self, prompts, seeds, width, height, steps, guidance, lane, num_tokens):
        drawn = honest(self, prompts, seeds, width, height, steps, guidance, lane, num_tokens)
        return drawn + (1e-6 if lane == 2 else 0)

    monkeypatch.setattr(type(generator), "draw", off_at_two)
    assert proven(generator, look, (1, 2, 4)) == tuple(size for size in found if size != 2)

    def by_place(self, prompts, seeds, width, height, steps, guidance, lane, num_tokens):
        drawn = honest(self, prompts, seeds, width, height, steps, guidance, lane, num_tokens)
        return drawn + (torch.arange(len(drawn)) % lane == 1).numpy()[:, None, None, None] * 1e-6

    monkeypatch.setattr(type(generator), "draw", by_place)
    assert proven(generator, look, (1, 2, 4)) == (1,)
