"""LoRA slots in the page, and clips of Wan2GP dropped on it, clicked through in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from engine.media import video
from tests.journeys.conftest import Server, quick, wait_for
from tests.journeys.test_queue_and_gallery import tab
from tests.journeys.test_the_page_itself import faults

pytestmark = pytest.mark.browser


@pytest.fixture
def shelf(server: Server) -> Iterator[Path]:
    """Two LoRAs for the toybox that this server has, the second one in a subfolder and with a part of no use."""
    import torch
    from safetensors.torch import save_file

    from engine import presets
    from engine.loading.parts import load_part

    toybox = presets.load("toybox")
    width = load_part("transformer", toybox.place("transformer"), torch.device("cpu")).config
    width = width.num_attention_heads * width.attention_head_dim
    folder = server.models / "loras"
    halves = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(2, width),
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(width, 2),
    }
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    save_file(halves, folder / "ink.safetensors")
    save_file(halves | {"diffusion_model.img_emb.proj.1.diff_b": torch.zeros(3)}, folder / "sub" / "wash.safetensors")
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def choose(page: Page, number: int, name: str) -> None:
    field = page.get_by_label(f"LoRA {number}", exact=True)
    field.click()
    page.get_by_role("option", name=name).click()
    expect(page.get_by_role("option")).to_have_count(0)  # it fades out, beside the next one's


def test_two_loras_are_added_weighed_and_one_removed_and_the_clip_says_so(
    page: Page, server: Server, shelf: Path, axe: str
) -> None:
    quick(page)
    for number in (1, 2, 3):
        page.get_by_role("button", name="Add a LoRA").click()
        expect(page.get_by_label(f"LoRA {number}", exact=True)).to_be_visible()
    page.get_by_role("button", name="Remove LoRA 3").click()
    expect(page.get_by_label("LoRA 3", exact=True)).to_be_hidden()
    choose(page, 1, "sub/wash")
    choose(page, 2, "ink")
    page.locator("#loras input[type=number]").nth(0).fill("0.5")
    assert faults(page, axe) == []
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 720})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.get_by_role("button", name="Make clip").click()
    row = wait_for(lambda: server.row("done"), "the clip")
    assert row.job is not None
    assert [(lora.path, lora.weight) for lora in row.job.loras] == [
        ("sub/wash.safetensors", 0.5),
        ("ink.safetensors", 1),
    ]
    expect(page.locator("#stage")).to_contain_text("2 of 3 weights of wash.safetensors")
    tab(page, "Gallery")
    page.locator("#posters [data-act=open]").first.click()
    expect(page.locator("#detail")).to_contain_text("LoRA wash.safetensors")
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("LoRA 1", exact=True)).to_have_value("sub/wash")
    expect(page.locator("#loras input[type=number]").nth(0)).to_have_value("0.5")
    page.get_by_role("button", name="Remove LoRA 1").click()
    expect(page.get_by_label("LoRA 1", exact=True)).to_have_value("ink")


def test_a_lora_that_went_away_is_refused_beside_the_slots(page: Page, server: Server, shelf: Path) -> None:
    server.queue.pause()
    quick(page)
    page.get_by_role("button", name="Add a LoRA").click()
    expect(page.get_by_label("LoRA 1", exact=True)).to_have_value("ink")
    (shelf / "ink.safetensors").unlink()
    page.get_by_role("button", name="Make clip").click()
    expect(page.locator("#advanced .refusal")).to_contain_text("ink.safetensors is not here")
    assert server.queue.rows() == []


def test_without_a_file_the_button_says_where_to_put_one(page: Page) -> None:
    page.locator("#advanced > button").click()
    page.get_by_role("button", name="Add a LoRA").click()
    expect(page.locator("#loras [role=status]")).to_contain_text("folder loras")


def test_a_dropped_clip_of_wan2gp_fills_the_form_and_says_what_stayed_behind(page: Page, tmp_path: Path) -> None:
    settings = {
        "type": "WanGP v10 by DeepBeepMeep - Nothing We Have",
        "model_type": "nothing_we_have",
        "settings_version": 2.7,
        "prompt": "A ball rolls over the beach",
        "resolution": "832x480",
        "video_length": 9,
        "seed": 4711,
        "num_inference_steps": 7,
        "video_prompt_type": "I",
    }
    clip = tmp_path / "theirs.mp4"
    with video.ClipWriter(clip, fps=16, size=(64, 64), document=json.dumps(settings)) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    tab(page, "Gallery")
    page.locator("#drop-clip input[type=file]").set_input_files(clip)
    expect(page.locator("#prompt textarea")).to_have_value("A ball rolls over the beach")
    expect(page.get_by_label("Seed", exact=True)).to_have_value("4711")
    page.locator("#advanced > button").click()
    expect(page.get_by_label("Steps", exact=True)).to_have_value("7")
    expect(page.locator("#go-bar .note")).to_contain_text("not carried over: its model (nothing_we_have)")
