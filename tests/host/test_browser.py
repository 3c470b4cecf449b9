"""The pack in ComfyUI's own frontend, in a browser: templates, languages, a picture.

Takes Debian's ``chromium``, or the browser in ``CHROMIUM_PATH``.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from kolors_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LANGUAGES = ("en", "zh")
MILLISECONDS = 60_000
IS_READY = "window.app?.graph && window.app?.extensionManager?.command"


@pytest.fixture(scope="module")
def browser(checkout):
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests: pip install -e '.[host]'")
    executable = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
    if not executable:
        pytest.skip("browser tests: install chromium, or set CHROMIUM_PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def page(browser, server, language):
    """ComfyUI's page in a language, as a user who has seen the welcome."""
    for name, value in {"Comfy.Locale": language, "Comfy.TutorialCompleted": True}.items():
        server.post(f"/settings/{name}", value)
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    page.set_default_timeout(MILLISECONDS)
    page.goto(f"http://{server.address}")
    page.wait_for_function(IS_READY)
    page.wait_for_load_state("networkidle")
    yield page
    page.close()


def open_template(page, pack_name: str, name: str) -> None:
    """Opens a template as a user does, by clicking it in the template browser."""
    page.keyboard.press("Escape")
    expect_none(page, ".p-dialog")
    page.evaluate("window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.locator(".p-dialog").get_by_text(pack_name, exact=True).click()
    card = page.get_by_test_id(f"template-workflow-{name}")
    page.wait_for_function(
        "name => document.querySelector(`[data-testid='template-workflow-${name}'] img`)?.naturalWidth > 0", arg=name
    )
    card.click()
    expect_none(page, ".p-dialog:has([data-testid='template-workflows-content'])")


def expect_none(page, selector: str) -> None:
    page.wait_for_selector(selector, state="detached")


def get_nodes(page) -> list[dict]:
    """What the frontend made of a workflow's nodes."""
    return page.evaluate(
        "window.app.graph._nodes.map(n => ({type: n.type, title: n.title, errors: !!n.has_errors,"
        " known: n.type in LiteGraph.registered_node_types,"
        " links: (n.inputs ?? []).map(i => [i.name, i.link !== null, i.localized_name ?? null])}))"
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_templates_open_complete(page, pack_name, path):
    open_template(page, pack_name, path.stem)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.wait_for_function("count => window.app.graph._nodes.length === count", arg=len(workflow["nodes"]))
    nodes = get_nodes(page)
    assert not [node for node in nodes if node["errors"] or not node["known"]]
    assert sorted(node["type"] for node in nodes) == sorted(node["type"] for node in workflow["nodes"])
    # The only dialog may be the offer to fetch the models that the workflow names; none is about nodes.
    models = [model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    dialog = page.locator(".p-dialog")
    if models:
        assert dialog.get_by_text(models[0]).count()
        page.keyboard.press("Escape")
    expect_none(page, ".p-dialog")
    links = page.evaluate("Object.keys(window.app.graph.links).length || window.app.graph.links.size")
    assert links == len(workflow["links"])


def test_nodes_are_named_in_the_language(page, language):
    texts = NODE_DISPLAY_NAME_MAPPINGS
    if language != "en":
        definitions = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        texts = {name: texts["display_name"] for name, texts in definitions.items()}
    titles = page.evaluate(
        "names => Object.fromEntries(names.map(name => [name, LiteGraph.createNode(name).title]))",
        list(NODE_CLASS_MAPPINGS),
    )
    assert titles == {name: texts[name] for name in NODE_CLASS_MAPPINGS}


def test_help_is_found_in_the_language(page, server, language, pack_name):
    """The address that the help panel asks for, and the pictures in it."""
    for name in NODE_CLASS_MAPPINGS:
        for file in (f"{name}/{language}.md" if language != "en" else f"{name}.md", f"images/{name}.jpg"):
            answer = page.request.get(f"http://{server.address}/extensions/{quote(pack_name)}/docs/{file}")
            assert answer.ok, file
            assert "html" not in answer.headers["content-type"]


def test_the_demo_gives_its_pictures(page, pack_name):
    open_template(page, pack_name, "demo_text_to_image")
    page.wait_for_function("window.app.graph._nodes.some(n => n.type === 'KolorsSampler')")
    page.evaluate(
        "() => { const node = window.app.graph._nodes.find(n => n.type === 'KolorsSampler');"
        " node.widgets.find(w => w.name === 'steps').value = 4; }"
    )
    page.get_by_test_id("queue-button").locator("button").first.click()
    page.wait_for_function(
        "() => { const imgs = window.app.graph._nodes.find(n => n.type === 'SaveImage')?.imgs;"
        " return imgs?.length === 4 && imgs.every(img => img.naturalWidth === 128); }"
    )
    assert page.evaluate("!Object.keys(window.app.lastNodeErrors ?? {}).length && !window.app.lastExecutionError")
