"""The images API over real tiny checkpoints."""

import asyncio
import base64
import io
import threading
import time

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from infra.errors import ConfigError
from models.sampling.generate import load_generator, to_uint8
from tasks.lineage import STAMP
from tasks.serving.engine import Ending, Look
from tasks.serving.models import models_of
from tasks.serving.server import later_run, refuse_open

IMAGES = "/v1/images/generations"
PROMPT = "a big apple on a blue background"


def picture(item: dict) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


@pytest.fixture
def live():
    """Serve an application with uvicorn on a free port."""
    servers = []

    def start(app) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def test_models_are_listed_with_what_they_were_trained_for(serving):
    app, _ = serving()
    listed = TestClient(app).get("/v1/models").json()
    by_id = {each["id"]: each for each in listed["data"]}
    assert listed["default"] == "fast"
    assert by_id["fast"]["steps"] == [1, 4]
    assert by_id["fast"]["aliases"] == ["student-1", "student-4"]
    assert by_id["teacher"]["steps"] is None
    assert by_id["teacher"]["loras"] == {"cup": True, "robot": True}
    assert by_id["fast"]["loras"] == {"cup": False, "robot": False}  # they were trained on its teacher
    assert by_id["robot"]["trigger"] == "zwx"


def test_a_picture_is_what_the_checkpoint_draws_and_says_where_it_is_from(serving):
    app, engine = serving(batch=1)
    answer = TestClient(app).post(IMAGES, json={"prompt": PROMPT, "model": "teacher", "seed": 5, "n": 2}).json()
    assert [item["seed"] for item in answer["data"]] == [5, 6]
    assert answer["data"][0]["revised_prompt"] == PROMPT
    served = engine.models.find("teacher")
    want = load_generator(served.folder).sample([PROMPT, PROMPT], [5, 6], batch_size=1)
    got = np.stack([np.asarray(picture(item)) for item in answer["data"]])
    assert (
        np.abs(got.astype(int) - want.astype(int)).max() <= 1
    )  # the text is padded further, so a bit may round otherwise
    assert got.std() > 5
    said = picture(answer["data"][1]).text[STAMP]
    assert served.artifact.digest in said
    assert '"seed": 6' in said


def test_a_request_chooses_its_sampler(serving):
    app, engine = serving(batch=1)
    asked = {"prompt": PROMPT, "model": "teacher", "seed": 5, "steps": 4}
    answers = {name: TestClient(app).post(IMAGES, json={**asked, "sampler": name}).json() for name in ("euler", "heun")}
    assert [answers[name]["sampler"] for name in answers] == ["euler", "heun"]
    served = engine.models.find("teacher")
    assert served.card.sampler == "euler"
    heun = load_generator(served.folder).draw([PROMPT], [5], steps=4, sampler="heun", batch_size=1)
    want = to_uint8(torch.from_numpy(heun))[0]
    got = {name: np.asarray(picture(answer["data"][0])).astype(int) for name, answer in answers.items()}
    assert np.abs(got["heun"] - want).max() <= 1
    assert not np.array_equal(got["euler"], got["heun"])


def test_eight_at_once_are_bit_equal_to_one_after_another(serving):
    app, engine = serving()
    asked = [
        {"prompt": prompt, "model": model, "seed": seed, **more}
        for seed, (prompt, model, more) in enumerate(
            [(PROMPT, "fast", {}), ("two cats", "fast", {}), (PROMPT, "fast", {"steps": 4}), ("a zwx robot", "fast", {}),
             (PROMPT, "teacher", {}), ("a zwx robot", "teacher", {"loras": {"robot": 1.0}}), (PROMPT, "teacher", {"size": "24x16"}),
             ("two cats side by side", "fast", {"n": 3})]
        )
    ]  # fmt: skip

    async def at_once() -> list[dict]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return [each.json()["data"] for each in await asyncio.gather(*(client.post(IMAGES, json=a) for a in asked))]

    client = TestClient(app)
    serial = [client.post(IMAGES, json=a).json()["data"] for a in asked]
    calls, drawn = engine.num_calls, engine.num_drawn
    together = asyncio.run(at_once())
    assert together == serial
    assert engine.num_calls - calls < engine.num_drawn - drawn  # some were drawn together


def test_loras_by_name_and_mixed_change_the_picture_as_their_deltas_say(serving):
    app, _ = serving()
    client = TestClient(app)

    def ask(**more: object) -> bytes:
        item = client.post(IMAGES, json={"prompt": "a zwx robot", "model": "teacher", "seed": 1, **more}).json()[
            "data"
        ][0]
        return picture(item).tobytes()

    plain, one, both = ask(), ask(loras={"robot": 1.0}), ask(loras={"robot": 1.0, "cup": 0.5})
    assert len({plain, one, both}) == 3
    assert ask(loras={"robot": 0.0}) == plain
    robot = client.post(IMAGES, json={"prompt": "a zwx robot", "model": "robot", "seed": 1}).json()["data"][0]
    merged = np.asarray(picture(robot), int)
    assert np.abs(merged - np.frombuffer(one, np.uint8).reshape(merged.shape)).max() <= 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"steps": 2}, r"steps=2 was not trained.*\[1, 4\]"),
        ({"guidance": 3.0}, "would be applied twice"),
        ({"sampler": "heun"}, "sampler=heun was not trained"),
        ({"sampler": "ddim"}, "'euler' or 'heun'"),
        ({"model": "nobody"}, "model 'nobody' is not served; choose one of student-1"),
        ({"size": "17x16"}, "multiples of 4"),
        ({"size": "640x640"}, "at most 4 times 16x16"),
        ({"size": "big"}, "not WIDTHxHEIGHT"),
        ({"n": 99}, "at most 8 are drawn at once"),
        ({"loras": {"dog": 1.0}}, "LoRA 'dog' does not go with model 'fast'; these do: robot, cup|cup, robot"),
        ({"loras": {"robot": 9.0}}, "outside -2 to 2"),
        ({"prompt": ""}, "at least 1 character"),
        ({"prompt": "apple " * 60}, "tokens, the model reads 32"),
        ({"seed": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_openais_form(serving, more, says):
    app, engine = serving()
    answer = TestClient(app).post(IMAGES, json={"prompt": PROMPT, **more})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    import re

    assert re.search(says, error["message"]), error["message"]
    assert engine.num_drawn == 0


def test_a_full_queue_is_429_and_an_ending_server_503(serving):
    app, engine = serving(queue=2)
    client = TestClient(app)
    many = client.post(IMAGES, json={"prompt": PROMPT, "n": 3})
    assert many.status_code == 429
    assert many.headers["retry-after"] == "1"
    assert client.post(IMAGES, json={"prompt": PROMPT, "n": 2}).status_code == 200
    engine.end()
    late = client.post(IMAGES, json={"prompt": PROMPT})
    assert late.status_code == 503
    assert client.get("/healthz").status_code == 503


def test_a_key_locks_everything_but_the_page_and_health(serving):
    app, _ = serving(key="0123456789abcdef")
    client = TestClient(app)
    for path in ("/v1/models", "/metrics", "/lineage/fast"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"Authorization": "Bearer 0123456789abcdef"}).status_code == 200
    assert client.post(IMAGES, json={"prompt": PROMPT}).status_code == 401
    assert client.get("/healthz").status_code == 200
    assert 'type="password"' in client.get("/").text


def test_other_hosts_are_refused_and_the_page_may_load_nothing(serving):
    app, _ = serving()
    client = TestClient(app)
    assert client.get("/v1/models", headers={"Host": "evil.test"}).status_code == 400
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "http://" not in page.text.replace("${location.origin}", "")
    assert "https://" not in page.text


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", None), ("10.0.0.3", ""), ("127.0.0.1", "short")])
def test_an_open_server_without_a_good_key_does_not_start(host, key):
    with pytest.raises(ConfigError, match="T2I_SERVE_KEY"):
        refuse_open(host, key)


def test_a_swap_fails_no_request_and_later_ones_see_the_new_model(serving, new_run):
    app, engine = serving(queue=1000)
    store = new_run("next", 8)
    client = TestClient(app)
    before = client.post(IMAGES, json={"prompt": PROMPT, "seed": 3}).json()
    results: list[int] = []

    def hammer() -> None:
        for _ in range(15):
            results.append(client.post(IMAGES, json={"prompt": PROMPT, "seed": 3}).status_code)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    engine.swap(models_of(store, "next"))
    for thread in threads:
        thread.join()
    assert results == [200] * 30
    after = client.post(IMAGES, json={"prompt": PROMPT, "seed": 3}).json()
    assert after["data"][0]["b64_json"] != before["data"][0]["b64_json"]
    assert client.get("/v1/models").json()["run"] == "next"


def test_only_a_later_run_of_the_same_lifecycle_takes_over(new_run):
    store = new_run("first", 7)
    for name, about in {
        "ablation": {"name": "ablate-repa", "outcome": "ok"},
        "night": {"name": "demo", "outcome": "ok", "flow": "nightly"},
        "again": {"name": "demo", "outcome": "ok", "rerun_of": "first"},
        "broken": {"name": "demo", "outcome": "stage_failed"},
    }.items():
        store.write_run(name, about)
    assert later_run(store, "first") is None
    new_run("second", 8)
    assert later_run(store, "first") == "second"
    assert later_run(store, "second") is None


def test_a_client_that_left_frees_its_place_in_the_queue(serving, live):
    app, engine = serving(queue=1000, pictures=64)
    url = live(app)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + IMAGES, json={"prompt": PROMPT, "model": "teacher", "steps": 300, "n": 64}, timeout=0.5)
    until = time.monotonic() + 30
    while engine.waiting and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.waiting == 0
    assert engine.num_drawn < 64
    assert httpx.post(url + IMAGES, json={"prompt": PROMPT}, timeout=60).status_code == 200


def test_openais_client_works_unchanged(serving, live):
    from openai import BadRequestError, OpenAI

    app, _ = serving(key="0123456789abcdef")
    client = OpenAI(base_url=live(app) + "/v1", api_key="0123456789abcdef", max_retries=0)
    assert "fast" in [each.id for each in client.models.list()]
    answer = client.images.generate(model="student-1", prompt=PROMPT, size="16x16", n=2, extra_body={"seed": 4})
    files = [Image.open(io.BytesIO(base64.b64decode(item.b64_json))) for item in answer.data]
    assert [file.size for file in files] == [(16, 16)] * 2
    assert answer.data[0].revised_prompt == PROMPT
    with pytest.raises(BadRequestError, match="is not served"):
        client.images.generate(model="dall-e-3", prompt=PROMPT)


def test_ending_draws_what_is_queued_and_takes_nothing_new(serving):
    _, engine = serving()
    model = engine.models.find("fast")
    look = Look(model, (), 16, 16, 1, 1.0, model.card.sampler, 16)
    jobs = engine.submit(engine.models, look, PROMPT, range(20))
    engine.end()
    assert all(job.done.result().shape == (16, 16, 3) for job in jobs)
    with pytest.raises(Ending):
        engine.submit(engine.models, look, PROMPT, [1])


def test_metrics_count_requests_and_pictures(serving):
    app, _ = serving()
    client = TestClient(app)
    client.post(IMAGES, json={"prompt": PROMPT, "n": 3})
    client.post(IMAGES, json={"prompt": PROMPT, "steps": 2})
    text = client.get("/metrics").text
    assert 't2i_requests_total{status="200"} 1.0' in text
    assert 't2i_requests_total{status="400"} 1.0' in text
    assert "t2i_pictures 3.0" in text
    assert "t2i_calls 1.0" in text
