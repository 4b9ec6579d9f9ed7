"""Trainings over HTTP on the real server: watched, rebuilt after a reload, steered, found again; by no other page."""

import http.client
import io
import json
import threading
import time
import uuid
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from PIL import Image

from live_server import PromptError
from served import put_drawings

EVENT = "lora_loom.training"
TRAINER = "3"
PATIENCE = 120


@pytest.fixture(scope="module")
def folder(server):
    put_drawings(server, "input", "live", 4)
    return "live"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def prompt_for(folder, run_name, length, every=1000):
    settings = {"length": length, "unit": "steps", "learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "batch_size": 2}
    run = {"seed": 1, "run_name": run_name, "if_run_exists": "continue"}
    sockets = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0], "preview": ["6", 0]}
    pictures = {"prompts": "a circle", "negative": "", "every": every, "sampler": "euler", "scheduler": "simple"}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="loom-demo-base.safetensors"),
        "2": node("LoomDatasetLoader", root="input", folder=folder, resolution=32, bucket_step=8),
        TRAINER: node("LoomLoRATrainer", **settings, **run, **sockets),
        "4": node("PreviewAny", source=[TRAINER, 4]),
        "6": node("LoomPreviewSettings", **pictures, steps=1, cfg=1.0, width=32, height=32, seeds="0"),
    }


class Page:
    """What a page sends, and anybody else might."""

    def __init__(self, server):
        self.host = server.url.removeprefix("http://")
        self.token = self.get("/session")[2]["token"]

    def ask(self, method, path, body=None, **headers):
        """(status, headers, content)"""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request(method, f"/lora_loom{path}", body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers.get_content_type()
            return answer.status, answer.headers, json.loads(content) if kind == "application/json" else content
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def control(self, training, do, **headers):
        own = {"Content_Type": "application/json", "X_LoRA_Loom_Token": self.token, **headers}
        return self.ask("POST", f"/trainings/{training}/control", json.dumps({"do": do}), **own)

    def all(self):
        return self.get("/trainings")[2]

    def of(self, run_name):
        """The last training of a run, once there is one."""
        return until(lambda: [one for one in self.all()["trainings"] if one["run"] == run_name])[-1]

    def everything(self, name, query=""):
        return self.get(f"/trainings/{name}{query}")[2]

    def until(self, name, *, step=0, state=None):
        def there():
            found = self.everything(name)
            return found if found["step"] >= step and state in (None, found["state"]) else None

        return until(there)


@pytest.fixture(scope="module")
def page(server):
    return Page(server)


def until(done):
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


@contextmanager
def queued(server, prompt):
    """The events of a prompt, complete when the ``with`` ends."""
    events, wrong = [], []

    def go():
        try:
            for event in server.follow(prompt):
                events.append(event)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    yield events
    thread.join(PATIENCE)
    assert not thread.is_alive() and not wrong, wrong


def from_events(events, name):
    """What a page that listened from the start knows: points by curve, and what else came."""
    points, previews, wishes = {}, [], {}
    mine = [event["data"] for event in events if event["type"] == EVENT and event["data"]["id"] == name]
    for event in mine:
        for curve, columns in event["points"].items():
            known = points.setdefault(curve, {"step": [], "value": []})
            for column in known:
                known[column] += columns[column]
        previews += event["previews"]
        wishes |= {wish["number"]: wish for wish in event["wishes"]}
    return mine, points, previews, list(wishes.values())


def test_trainings_one_after_the_other_are_watched_and_those_that_wait_are_known(server, folder, page):
    with queued(server, prompt_for(folder, "first", 40, every=20)) as events:
        first = page.of("first")
        others = [
            server.post("/prompt", {"prompt": prompt_for(folder, name, 5), "client_id": uuid.uuid4().hex})["prompt_id"]
            for name in ("second", "third")  # from a page that is not there
        ]
        listed = page.all()
        assert listed["waiting"] == [
            {"node": TRAINER, "prompt": prompt, "run": name}
            for prompt, name in zip(others, ("second", "third"), strict=True)
        ]
        assert first["node"] == TRAINER and first["state"] in ("preparing", "training", "saving")
        page.until(first["id"], step=1)
        assert page.of("first")["seconds_left"] > 0 and page.of("first")["can"]
    mine, points, previews, _ = from_events(events, first["id"])
    whole = page.everything(first["id"])
    assert whole["points"] == points == page.everything(first["id"], "?since=0")["points"], "after a reload"
    assert points["loss"]["step"] == list(range(1, 41)) and previews == whole["previews"] == [20, 40]
    assert (mine[-1]["state"], mine[-1]["step"], mine[-1]["total"]) == ("done", 40, 40)
    assert len(mine) <= 4 * (whole["ended"] - whole["started"]) + 11, "a few a second"
    assert [event["seq"] for event in mine] == [*range(1, whole["seq"] + 1)]
    assert page.everything(first["id"], "?since=39")["points"]["loss"]["step"] == [40]
    second, third = (page.until(page.of(name)["id"], state="done") for name in ("second", "third"))
    assert first["started"] < second["started"] < third["started"] and page.all()["waiting"] == []
    assert [second["prompt"], third["prompt"]] == others
    assert len(second["points"]["loss"]["step"]) == len(third["points"]["loss"]["step"]) == 5


def test_a_panel_steers_a_training(server, folder, page):
    prompt = prompt_for(folder, "steered", 5000)
    with queued(server, prompt) as events:
        name = page.of("steered")["id"]
        page.until(name, step=3)
        status, _, wish = page.control(name, "pause")
        assert status == 200 and wish["do"] == "pause" and wish["step"] is None
        at = page.until(name, state="paused")["step"]
        assert page.control(name, "save")[0] == page.control(name, "preview")[0] == 200
        until(lambda: at in page.everything(name)["previews"])
        assert page.everything(name)["step"] == at
        assert [told["step"] for told in page.everything(name)["wishes"]] == [at] * 3
        until(lambda: "paused" in {event["state"] for event in from_events(events, name)[0]})
        page.control(name, "continue")
        page.until(name, step=at + 2)
        page.control(name, "stop")
    assert events[-1]["type"] == "execution_success", "the graph goes on"
    told = page.everything(name)
    assert told["state"] == "stopped" and told["why"] == f"stopped by you after {told['step']} of 5000 steps"
    mine, points, previews, wishes = from_events(events, name)
    assert points == told["points"] and previews == [at] and wishes == told["wishes"]
    assert [wish["do"] for wish in wishes] == ["pause", "save", "preview", "continue", "stop"]
    assert {"preparing", "training", "paused", "stopped"} <= {event["state"] for event in mine}
    assert (server.base / "output/lora_loom/steered" / f"steered-step{at:06d}.safetensors").exists()
    report = server.get(f"/history/{told['prompt']}")[told["prompt"]]["outputs"]["4"]["text"][0]
    assert f"stopped by you after {told['step']} of 5000 steps; queue again to go on" in report
    status, _, refused = page.control(name, "continue")
    assert status == 409 and "this training is stopped; queue the prompt again" in refused["error"]


@pytest.fixture(scope="module")
def done(server, folder, page):
    """The id of a training that is complete."""
    server.run(prompt_for(folder, "panel", 6, every=3))
    return page.of("panel")["id"]


def shown_by_the_node(events):
    executed = [event["data"] for event in events if event["type"] == "executed"]
    return [data["output"]["loom_training"] for data in executed if data["node"] == TRAINER]


def test_the_node_s_output_is_what_a_panel_is_built_from(server, folder, page):
    """Also when the host serves the node from its cache; hosts that do not tell of that have the training by its id."""
    first, second = [], []
    for events in (first, second):
        server.run(prompt_for(folder, "shown", 6, every=3), events.append)
    [[shown]] = shown_by_the_node(first)
    assert shown == page.everything(page.of("shown")["id"])
    assert shown["previews"] == [3, 6] and shown["state"] == "done"
    assert shown["points"]["loss"]["step"] == [1, 2, 3, 4, 5, 6]
    assert EVENT not in {event["type"] for event in second}, "nothing was trained again"
    tells = server.object_info()["LoomLoRATrainer"].get("has_intermediate_output", False)
    assert shown_by_the_node(second) == [[shown]] * tells


def test_what_fails_is_told(server, folder, page):
    with pytest.raises(PromptError):
        server.run(prompt_for(folder, "../elsewhere", 5))
    told = page.of("../elsewhere")
    assert told["state"] == "failed" and told["why"].startswith("run_name is '../elsewhere'; use letters")
    assert page.control(told["id"], "stop")[0] == 409
    assert str(server.base) not in json.dumps(page.all())


# -- pictures, and runs of before


def test_previews_are_encoded_anew(server, page, done):
    for path in (f"/trainings/{done}/previews/3", "/runs/panel/previews/3"):
        status, headers, content = page.get(path)
        assert status == 200 and headers["Content-Type"] == "image/jpeg"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        sheet = Image.open(server.base / "output/lora_loom/panel/previews/step-000003.png")
        picture = Image.open(io.BytesIO(content))
        assert picture.format == "JPEG" and picture.size == sheet.size
        assert page.get(path, If_None_Match=headers["ETag"])[0] == 304
        for step in ("4", "999999999999999", "3.0", "-3", "٣", "x" * 1000):
            assert page.get(f"{path[:-1]}{quote(step)}")[0] == 404, step


def test_a_run_is_shown_from_its_log_when_nobody_remembers_it(page, done):
    runs = page.get("/runs")[2]["runs"]
    [listed] = [run for run in runs if run["run"] == "panel"]
    assert listed == {"run": "panel", "step": 6, "time": listed["time"], "previews": 2}
    assert [run["time"] for run in runs] == sorted((run["time"] for run in runs), reverse=True)
    assert abs(listed["time"] - page.everything(done)["ended"]) < PATIENCE
    status, _, told = page.get("/runs/panel")
    points = page.everything(done)["points"]
    assert status == 200 and told == {"run": "panel", "step": 6, "points": points, "previews": [3, 6]}
    assert page.get("/runs/panel?since=5")[2]["points"]["loss"]["step"] == [6]


# -- those who may not


ELSEWHERE = ("..", "%2e%2e", "..%2F..%2Finput", "%2Fetc%2Fpasswd", "C%3A%5Cx", "panel%00", "panel%2F..%2Fpanel")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_name_leads_anywhere(server, page, done, name):
    before = {path for path in server.base.rglob("*") if "__pycache__" not in path.parts}
    for path in (f"/runs/{name}", f"/runs/{name}/previews/3", f"/trainings/{name}", f"/trainings/{name}/previews/3"):
        status, _, content = page.get(path)
        assert status in (403, 404), (path, status)
        assert b"root:" not in (content if isinstance(content, bytes) else b"")
    assert page.control(name, "stop")[0] in (403, 404, 405)
    assert {path for path in server.base.rglob("*") if "__pycache__" not in path.parts} == before


def test_an_unknown_training_is_a_404_in_json(page, done):
    nobody = "0123456789abcdef"
    asked = [page.get(path) for path in (f"/trainings/{nobody}", f"/trainings/{nobody}/previews/1", "/runs/nobody")]
    for status, _, content in (*asked, page.control(nobody, "stop"), page.get(f"/runs/{'x' * 3000}")):
        assert status == 404 and content["error"]


@pytest.mark.parametrize("since", ("-1", "x", "1.5", "1" * 50, ""))
def test_nonsense_is_refused_in_json(page, done, since):
    assert page.get(f"/trainings/{done}?since={since}")[0] == page.get(f"/runs/panel?since={since}")[0] == 400


@pytest.mark.parametrize("do", ("delete", "", None, 5, ["stop"], {"stop": 1}, "x" * 10_000))
def test_only_what_is_offered_can_be_asked(page, done, do):
    status, _, content = page.control(done, do)
    assert status == 400 and "expected one of stop, save, preview, pause, continue" in content["error"]


def test_nobody_else_steers_or_looks(page, done):
    assert page.control(done, "stop")[0] == 409
    assert page.control(done, "stop", X_LoRA_Loom_Token="guessed")[0] == 403
    assert page.control(done, "stop", Content_Type="text/plain")[0] == 415
    for headers in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
        assert page.control(done, "stop", **headers)[0] == 403
        for path in ("/trainings", f"/trainings/{done}", "/runs", "/runs/panel", f"/trainings/{done}/previews/3"):
            assert page.get(path, **headers)[0] == 403, path
    assert page.get(f"/trainings/{done}/control")[0] in (404, 405)
