"""What people read of the nodes: help pages and translations are complete and belong to the node classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import kolors_nodes
from kolors_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "web" / "docs"
LOCALES = sorted(path.name for path in (ROOT / "locales").iterdir())
PAGES = {"en": "{name}.md", "zh": "{name}/zh.md"}
MAX_PICTURE_BYTES = 100_000

each_node = pytest.mark.parametrize(("name", "node"), NODE_CLASS_MAPPINGS.items(), ids=list(NODE_CLASS_MAPPINGS))
each_page = pytest.mark.parametrize("language", PAGES)


def get_inputs(node: type) -> dict[str, dict]:
    """Input name → its options, of required and optional inputs."""
    declared = node.INPUT_TYPES()
    inputs = {**declared.get("required", {}), **declared.get("optional", {})}
    return {name: spec[1] if len(spec) > 1 else {} for name, spec in inputs.items()}


def read_page(name: str, language: str) -> str:
    path = DOCS / PAGES[language].format(name=name)
    assert path.is_file(), f"no help page {path.relative_to(ROOT)}"
    return path.read_text(encoding="utf-8")


def read_definitions(language: str) -> dict:
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def get_rows(page: str) -> list[str]:
    """The first cells of all tables in a page."""
    return re.findall(r"^\| *`([^`]+)`", page, re.MULTILINE)


@each_page
@each_node
def test_a_help_page_names_every_input_and_output_and_nothing_else(name, node, language):
    page = read_page(name, language)
    assert sorted(get_rows(page)) == sorted([*get_inputs(node), *node.RETURN_NAMES])


@each_page
@each_node
def test_a_help_page_tells_defaults_and_common_errors_with_a_picture(name, node, language):
    page = read_page(name, language)
    for input_name, options in get_inputs(node).items():
        if options.get("default") not in (None, ""):
            (row,) = re.findall(rf"^\| *`{input_name}`.*$", page, re.MULTILINE)
            assert f"`{options['default']}`" in row
    assert {"en": "## Common errors", "zh": "## 常见错误"}[language] in page
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures
    for picture in pictures:
        # ComfyUI resolves them against web/docs, whatever folder the page is in.
        assert (DOCS / picture).is_file(), f"{picture} is missing"
        assert (DOCS / picture).stat().st_size <= MAX_PICTURE_BYTES


def test_no_help_is_left_of_nodes_that_are_gone():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages == {page.format(name=name) for name in NODE_CLASS_MAPPINGS for page in PAGES.values()}
    used = {picture for name in NODE_CLASS_MAPPINGS for page in PAGES
            for picture in re.findall(r"\]\((images/[^)]+)\)", read_page(name, page))}  # fmt: skip
    assert {path.relative_to(DOCS).as_posix() for path in (DOCS / "images").iterdir()} == used


def test_there_is_chinese():
    assert "zh" in LOCALES


@pytest.mark.parametrize("language", LOCALES)
def test_translations_are_of_the_registered_nodes(language):
    assert set(read_definitions(language)) == set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("language", LOCALES)
@each_node
def test_translations_name_every_input_and_output(name, node, language):
    texts = read_definitions(language).get(name)
    assert texts, f"no translation of {name}"
    assert texts["display_name"]
    assert texts["description"]
    assert list(texts["inputs"]) == list(get_inputs(node))
    assert list(texts["outputs"]) == [str(slot) for slot in range(len(node.RETURN_TYPES))]
    for text in [*texts["inputs"].values(), *texts["outputs"].values()]:
        assert text["name"]
        assert text["tooltip"]


@pytest.mark.parametrize("language", LOCALES)
@each_node
def test_translated_names_hold_no_sign_that_the_frontend_interprets(name, node, language):
    """The frontend compiles names and descriptions as message templates; tooltips it takes as they are."""
    texts = read_definitions(language).get(name, {})
    names = [texts.get("display_name", ""), texts.get("description", "")]
    names += [text["name"] for part in ("inputs", "outputs") for text in texts.get(part, {}).values()]
    assert not [text for text in names if set(text) & set("@{}$|%\\")]


@pytest.mark.parametrize("language", LOCALES)
def test_categories_and_our_sockets_are_translated(language):
    texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    segments = {segment for node in NODE_CLASS_MAPPINGS.values() for segment in node.CATEGORY.split("/")}
    assert set(texts["nodeCategories"]) == segments
    sockets = {kind for node in NODE_CLASS_MAPPINGS.values() for kind in node.RETURN_TYPES if kind.startswith("KOLORS")}
    assert sockets <= set(texts["dataTypes"])


@each_node
def test_no_tooltip_is_missing(name, node):
    assert not [input_name for input_name, options in get_inputs(node).items() if not options.get("tooltip")]
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
    assert all(node.OUTPUT_TOOLTIPS)


@each_node
def test_a_node_is_found_by_other_words(name, node):
    assert node.SEARCH_ALIASES
    assert NODE_DISPLAY_NAME_MAPPINGS[name] not in node.SEARCH_ALIASES


def test_comfyui_is_told_where_the_help_pages_are():
    assert (ROOT / kolors_nodes.WEB_DIRECTORY / "docs").samefile(DOCS)


def test_the_chinese_readme_gives_the_english_one_s_commands_and_pictures():
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    for pattern in (r"(?m)^ *(?:pip|kolors|hf) .*$", r"!\[[^\]]*\]\(([^)]+)\)"):
        found = {text.strip() for text in re.findall(pattern, chinese)}
        assert found
        assert found <= {text.strip() for text in re.findall(pattern, english)}
    assert "(README.zh.md)" in english


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_link_to_files_that_are_there(name):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
