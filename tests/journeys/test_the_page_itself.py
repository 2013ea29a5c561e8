"""The page as a place: for every eye and every hand, on a phone, and for programs."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app import estimate
from app.page import theme
from engine import paths
from tests.journeys.conftest import Server, open_page, wait_for
from tests.journeys.test_queue_and_gallery import tab

pytestmark = pytest.mark.browser


def faults(page: Page, axe: str) -> list[str]:
    """What axe-core calls serious or critical."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{fault['id']}: {node['html'][:160]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def test_axe_finds_no_serious_fault_on_any_tab(page: Page, axe: str) -> None:
    assert faults(page, axe) == []
    page.locator("#cast [data-act=choose]").first.click()
    expect(page.locator("#cutout img")).to_be_visible()
    assert faults(page, axe) == []
    page.locator("#cast [data-act=add]").click()
    page.locator("#advanced > button").click()
    page.locator("#prompt textarea").fill("")
    page.locator("#go").click()
    expect(page.locator("#form .refusal")).to_be_visible()
    assert faults(page, axe) == []
    for name in ("Gallery", "Queue", "Models"):
        tab(page, name)
        assert faults(page, axe) == []


def test_axe_finds_no_serious_fault_in_the_light_theme(page: Page, axe: str) -> None:
    page.add_style_tag(content=theme.css("light"))
    ground = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ground')")
    assert ground.strip() == theme.LIGHT["ground"]
    page.locator("#prompt textarea").fill("")
    page.locator("#go").click()
    expect(page.locator("#form .refusal")).to_be_visible()
    for name in ("Generate", "Gallery", "Queue", "Models"):
        tab(page, name)
        assert faults(page, axe) == []


@pytest.mark.parametrize("name", ["Generate", "Gallery", "Queue", "Models"])
def test_a_phone_scrolls_down_and_never_sideways(server: Server, browser: Browser, name: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    open_page(page, server)
    tab(page, name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


def test_the_form_is_walked_by_keyboard_alone_and_the_focus_is_seen(page: Page, server: Server) -> None:
    server.queue.pause()
    page.locator("#cast [data-act=choose]").first.focus()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('#chips, #prompt, #quality, #seed, #go')?.id"))
        if "go" in reached:
            break
    assert reached >= {"chips", "prompt", "quality", "seed", "go"}
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    wait_for(server.queue.rows, "the job")


def test_a_name_is_followed_into_the_prompt_when_it_changes(page: Page) -> None:
    page.locator("#cast [data-act=choose]").first.click()
    page.locator("#subject-name input, #subject-name textarea").first.fill("reynard")
    page.locator("#editor-done").focus()
    expect(page.locator("#prompt textarea")).to_have_value("@reynard chases @kite on a beach")


def test_the_page_installs_as_an_app_with_name_and_icon(page: Page, server: Server) -> None:
    manifest = httpx.get(f"{server.url}manifest.json").json()
    assert manifest["name"] == "ID-Crafter Studio" and manifest["display"] == "standalone"
    for icon in manifest["icons"]:
        answer = httpx.get(server.url.rstrip("/") + icon["src"])
        assert Image.open(io.BytesIO(answer.content)).size[0] >= 192


@pytest.mark.parametrize("path", [".studio/queue.db", "../../etc/hostname", "server.log/../.studio/queue.db"])
def test_only_clips_and_assets_are_served(server: Server, path: str) -> None:
    answer = httpx.get(f"{server.url}gradio_api/file={(server.home / path).as_posix()}")
    assert answer.status_code in (403, 404)
    source = httpx.get(f"{server.url}gradio_api/file={(paths.ROOT / 'launch.py').as_posix()}")
    assert source.status_code in (403, 404)


# --- for programs ----------------------------------------------------------------------------------------------------


def document() -> str:
    """A job whose picture rides along."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(picture, "PNG")
    png = base64.b64encode(picture.getvalue()).decode()
    return json.dumps(
        {
            "prompt": "@dot bounces",
            "seed": 5,
            "num_frames": 5,
            "subjects": [{"name": "dot", "pictures": [{"png": png}]}],
            "sampling": {"num_inference_steps": 1},
        }
    )


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url, verbose=False)


def test_a_program_makes_a_clip_and_follows_it(client: Client, server: Server) -> None:
    row = client.predict(document=document(), api_name="/generate")
    state = wait_for(lambda: ended(client, row), "the clip")
    assert state["state"] == "done" and state["seed"] == 5
    assert state["saved"]["clip"] in [clip["clip"] for clip in client.predict(api_name="/clips")["clips"]]


def ended(client: Client, row: int) -> dict | None:
    """The row once it is over."""
    time.sleep(0.5)
    found = client.predict(row=row, api_name="/status")
    return found if found["state"] not in ("waiting", "running") else None


def test_a_program_cancels_estimates_and_lists_presets(client: Client, server: Server) -> None:
    server.queue.pause()
    row = client.predict(document=document(), api_name="/generate")
    assert client.predict(row=row, api_name="/cancel")["state"] == "cancelled"
    cost = client.predict(document=document(), api_name="/estimate")
    assert cost["seconds"] > 0 and cost["free_bytes"] > 0
    assert "toybox" in [preset["name"] for preset in client.predict(api_name="/presets")["presets"]]
    server.queue.resume()


def test_a_program_is_refused_in_words_and_reads_no_file_of_this_machine(client: Client, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    foreign = json.loads(document())
    foreign["subjects"][0]["pictures"] = [{"path": str(secret)}]
    for refused, words in ((json.dumps(foreign), "did not come with it"), ("{", "not valid JSON")):
        with pytest.raises(Exception, match=words):
            client.predict(document=refused, api_name="/generate")


def test_the_api_offers_these_verbs_and_nothing_of_the_pages_own_wiring(client: Client) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {"/generate", "/status", "/cancel", "/clips", "/estimate", "/presets"}


def test_the_mcp_server_lists_the_same_verbs_as_tools(server: Server) -> None:
    tools = {tool["name"] for tool in httpx.get(f"{server.url}gradio_api/mcp/schema").json()}
    assert {"generate", "status", "cancel", "clips", "estimate", "presets"} <= tools


def test_twice_the_frames_cost_more_than_the_same_frames(server: Server) -> None:
    from engine.job import make_job

    short, long = (
        estimate.clip_costs(make_job(prompt="a beach", num_frames=frames), [], server.home) for frames in (17, 33)
    )
    assert long.seconds > short.seconds and long.clip_bytes > short.clip_bytes
