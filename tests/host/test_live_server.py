"""The real server, the stock nodes, the demo base: the ground that demo and workflow tests stand on."""

import pytest
from PIL import Image

from live_server import PromptError, live_server


def socket(name, link, kind):
    return {"name": name, "type": kind, "link": link}


def picture_workflow(text, seed, steps):
    """Text to image with stock nodes only, in the page's own format."""
    nodes = [
        {"id": 1, "type": "CheckpointLoaderSimple", "widgets_values": ["loom-demo-base.safetensors"]},
        {"id": 2, "type": "CLIPTextEncode", "widgets_values": [text], "inputs": [socket("clip", 1, "CLIP")]},
        {"id": 3, "type": "CLIPTextEncode", "widgets_values": [""], "inputs": [socket("clip", 2, "CLIP")]},
        {"id": 4, "type": "EmptyChromaRadianceLatentImage", "widgets_values": [32, 32, 2]},
        {
            "id": 5,
            "type": "KSampler",
            "widgets_values": [seed, "fixed", steps, 3.0, "euler", "simple", 1.0],
            "inputs": [
                socket("model", 3, "MODEL"),
                socket("positive", 4, "CONDITIONING"),
                socket("negative", 5, "CONDITIONING"),
                socket("latent_image", 6, "LATENT"),
            ],
        },
        {
            "id": 6,
            "type": "VAEDecode",
            "widgets_values": [],
            "inputs": [socket("samples", 7, "LATENT"), socket("vae", 8, "VAE")],
        },
        {"id": 7, "type": "SaveImage", "widgets_values": ["picture"], "inputs": [socket("images", 9, "IMAGE")]},
    ]
    links = [
        [1, 1, 1, 2, 0, "CLIP"],
        [2, 1, 1, 3, 0, "CLIP"],
        [3, 1, 0, 5, 0, "MODEL"],
        [4, 2, 0, 5, 1, "CONDITIONING"],
        [5, 3, 0, 5, 2, "CONDITIONING"],
        [6, 4, 0, 5, 3, "LATENT"],
        [7, 5, 0, 6, 0, "LATENT"],
        [8, 1, 2, 6, 1, "VAE"],
        [9, 6, 0, 7, 0, "IMAGE"],
    ]
    return {"nodes": nodes, "links": links}


def test_a_stock_workflow_runs_on_the_demo_base(server):
    workflow = picture_workflow("a red circle on a white background", seed=1, steps=4)
    events = []
    outputs = server.run(server.prompt_of(workflow), events.append, workflow)
    pictures = [Image.open(path) for path in server.files(outputs)]
    assert [picture.size for picture in pictures] == [(32, 32), (32, 32)]
    assert sum(event["type"] == "progress" for event in events) >= 4
    assert events[-1]["type"] == "execution_success"


def test_an_interrupted_prompt_says_so(server):
    prompt = server.prompt_of(picture_workflow("a blue star on a black background", seed=2, steps=400))

    def stop(event):
        if event["type"] == "progress":
            server.interrupt()

    with pytest.raises(PromptError) as stopped:
        server.run(prompt, stop)
    assert stopped.value.details["event"] == "execution_interrupted"


def test_a_refused_prompt_names_the_reason(server):
    prompt = server.prompt_of(picture_workflow("", seed=3, steps=2))
    prompt["1"]["inputs"]["ckpt_name"] = "absent.safetensors"
    with pytest.raises(PromptError, match=r"absent\.safetensors"):
        server.run(prompt)


def test_nothing_is_left_running(tmp_path):
    with pytest.raises(KeyError):
        with live_server(base=tmp_path) as running:
            process = running.process
            raise KeyError
    assert process.poll() is not None
