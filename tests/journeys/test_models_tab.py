"""A model is fetched by a click, seen on its way through a reload, and taken away again; from a Hub on loopback."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from engine.paths import ROOT
from tests.journeys.conftest import SLOW_S, Server, Watched, free_port, open_page, wait_for
from tests.journeys.test_queue_and_gallery import tab
from tests.journeys.test_the_page_itself import faults
from tests.light.app.test_models import REPOS
from tests.support.hub_server import Fault, HubServer

pytestmark = pytest.mark.browser
SECRET = "hf_notforthepage"


@dataclass
class Market:
    """A studio of its own, and the Hub that it fetches from."""

    server: Server
    hub: HubServer
    cache: Path


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    home = tmp_path_factory.mktemp("market")
    for folder in ("outputs", "models/presets"):
        (home / folder).mkdir(parents=True)
    preset = json.loads((ROOT / "presets" / "toybox.json").read_text(encoding="utf-8"))
    parts = {part: _files("own/wan", part) for part in ("vae", "text_encoder", "tokenizer")}
    preset |= {"name": "little", "title": "Little", "licence": "MIT"}
    preset |= {"components": {"transformer": _files("own/one", "one.safetensors"), **parts}}
    (home / "models" / "presets" / "little.json").write_text(json.dumps(preset), encoding="utf-8")
    repos = {name: dict(files) for name, files in REPOS.items()}
    with HubServer(repos, private=frozenset({"me/secret"}), token=SECRET) as hub:
        repos["me/secret"] = dict(REPOS["me/trained"])
        environment = {
            "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        server = Server(home / "outputs", home / "models", free_port(), environment)
        try:
            server.start()
            yield Market(server, hub, home / "cache")
        finally:
            server.stop()


def _files(repo: str, path: str) -> dict[str, object]:
    size = sum(len(content) for name, content in REPOS[repo].items() if name.startswith(path))
    return {"repo": repo, "path": path, "num_bytes": size, "licence": "MIT"}


@pytest.fixture
def shop(market: Market, browser: Browser) -> Iterator[Page]:
    """The Models tab; nothing that it does may be logged as an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.set_default_timeout(SLOW_S * 1000)
    expect.set_options(timeout=SLOW_S * 1000)
    found = Watched(context.new_page())
    found.listen()
    open_page(found.page, market.server)
    tab(found.page, "Models")
    yield found.page
    context.close()
    assert found.hosts <= {"127.0.0.1", "localhost", ""} and found.complaints == []


def card(page: Page, name: str) -> Locator:
    return page.locator(f".model[data-preset={name}]")


def picture(page: Page, name: str) -> None:
    """Kept where SCREENSHOTS names a folder, for whoever wants to look."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_a_model_is_fetched_seen_through_a_reload_and_removed(shop: Page, market: Market, axe: str) -> None:
    little = card(shop, "little")
    expect(little).to_contain_text("to fetch")
    expect(little).to_contain_text("MIT")
    picture(shop, "models")
    market.hub.faults.append(Fault(bytes_per_s=150_000))
    little.get_by_role("button", name="Fetch Little").click()
    expect(little.locator(".step")).to_contain_text("left")
    picture(shop, "models-pulling")
    assert faults(shop, axe) == []
    shop.reload()
    expect(shop.locator("#cost")).to_contain_text("memory")
    tab(shop, "Models")
    expect(little.locator(".step")).to_contain_text("/s")
    little.get_by_role("button", name="Pause Little").click()
    expect(little).to_contain_text("paused")
    sent = market.hub.bytes_sent
    assert list(market.cache.rglob("*.part"))
    little.get_by_role("button", name="Go on Little").click()
    expect(little).to_contain_text("each one checked")
    expect(little.locator(".word")).to_have_text("here")
    whole = sum(map(len, (REPOS["own/one"] | REPOS["own/wan"]).values()))
    assert market.hub.bytes_sent <= 1.05 * whole and sent > 0
    little.get_by_role("button", name="Verify Little").click()
    expect(little).to_contain_text("Every file that is here is whole")
    little.get_by_role("button", name="Remove Little").click()
    expect(little).to_contain_text("Other programs that use this cache")
    picture(shop, "models-asked")
    assert faults(shop, axe) == []
    little.get_by_role("button", name="Remove Little for good").click()
    expect(little.locator(".word")).to_have_text("missing")
    assert not [path for path in market.cache.glob("*/blobs/*") if path.suffix != ".lock"]


def test_a_pull_that_is_given_up_leaves_nothing(shop: Page, market: Market) -> None:
    little = card(shop, "little")
    market.hub.faults.append(Fault(bytes_per_s=150_000))
    little.get_by_role("button", name="Fetch Little").click()
    expect(little.locator(".step")).to_contain_text("left")
    little.get_by_role("button", name="Cancel Little").click()
    expect(little.get_by_role("button", name="Fetch Little")).to_be_visible()
    assert not list(market.cache.rglob("*.part"))


def test_a_model_that_is_missing_says_so_where_it_is_chosen_and_leads_here(shop: Page, market: Market) -> None:
    tab(shop, "Generate")
    shop.locator("#preset input").click()
    shop.get_by_role("option", name="Little · not here").click()
    expect(shop.locator("#lack .refusal")).to_contain_text("not here yet")
    shop.locator("#go").click()
    expect(shop.locator("#form .refusal").first).to_contain_text("not all here")
    assert market.server.queue.rows() == []
    shop.locator("#lack").get_by_role("button", name="Open Models").click()
    expect(card(shop, "little")).to_be_visible()


def test_a_repository_of_ones_own_is_added_with_a_token_that_nobody_sees(shop: Page, market: Market) -> None:
    shop.get_by_label("Repository of your own").fill("me/secret")
    shop.get_by_role("button", name="Add repository").click()
    expect(shop.locator("#adding .refusal")).to_contain_text("private")
    expect(shop.locator("#adding .refusal")).to_be_in_viewport()
    shop.get_by_label("Token for private repositories").fill(SECRET)
    shop.get_by_role("button", name="Hold until the studio stops").click()
    expect(shop.locator("#models-head")).to_contain_text("a token is held")
    expect(shop.get_by_label("Token for private repositories")).to_have_value("")
    shop.get_by_role("button", name="Add repository").click()
    mine = card(shop, "me-secret")
    expect(mine).to_contain_text("added by you")
    assert SECRET not in shop.content()
    mine.get_by_role("button", name="Fetch secret").click()
    expect(mine.locator(".word")).to_have_text("here")
    mine.get_by_role("button", name="Forget secret").click()
    expect(mine).to_have_count(0)
    kept = [path for path in market.server.home.parent.rglob("*") if path.is_file()]
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


def test_what_another_program_fetched_is_adopted(shop: Page, market: Market, tmp_path: Path) -> None:
    (tmp_path / "renamed.safetensors").write_bytes(REPOS["own/one"]["one.safetensors"])
    shop.get_by_label("Folder of another program").fill(str(tmp_path))
    shop.get_by_role("button", name="Adopt its files").click()
    expect(shop.locator("#adopting")).to_contain_text("Adopted: 1 (renamed.safetensors)")
    assert wait_for(lambda: list(market.cache.rglob("one.safetensors")), "the file")


def test_the_tab_fits_a_phone(market: Market, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.set_default_timeout(SLOW_S * 1000)
    page = context.new_page()
    open_page(page, market.server)
    tab(page, "Models")
    expect(card(page, "little")).to_be_visible()
    picture(page, "models-phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()
