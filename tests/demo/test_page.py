"""The page in a browser, as the Space serves it, with two tiny models and no network."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from commands import lion
from headless import asked_addresses, open_browser, set_screen, wait, what_is_missing
from tiny_models import TEXTS

import lion_st
from lion_st.data import save_beir
from lion_st.demo import launch

pytest.importorskip("gradio", reason="gradio is not installed (pip install 'lion-st[demo]')")

SPACE = Path(__file__).parents[2] / "hub_uploads" / "spaces" / "lion-explorer"
QUERY = "What is the capital of France?"
EVIL = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'> {{x}} ${y} capital"
LONG = "The capital of France. " + "A retriever expands a query with terms. " * 40


@pytest.fixture(scope="module")
def settings(tiny_backbone, tmp_path_factory) -> dict[str, str]:
    """What the Space is told by its variables."""
    folder = tmp_path_factory.mktemp("space")
    for name, paradigm in (("lion-sp-tiny", "sparse"), ("lion-ds-tiny", "dense")):
        lion_st.build(tiny_backbone(), paradigm).save(str(folder / name), create_model_card=False)
    corpus = {
        f"d{number}": {"title": f"Text {number}", "text": text} for number, text in enumerate([*TEXTS, EVIL, LONG])
    }
    save_beir(folder / "data", corpus, {"q": QUERY, "p": TEXTS[2]}, {"q": {"d1": 1}, "p": {"d3": 1}})
    return {
        "LION_MODEL": str(folder / "lion-sp-tiny"),
        "LION_DENSE_MODEL": str(folder / "lion-ds-tiny"),
        "LION_DATA": str(folder / "data"),
    }


@pytest.fixture(scope="module")
def address(settings, tmp_path_factory) -> Iterator[str]:
    """Where the Space's own program serves its page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LION_ST_DEMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name, value in settings.items():
            patch.setenv(name, value)
        page = runpy.run_path(str(SPACE / "app.py"))["page"]
    yield launch(page, "127.0.0.1", block=False)
    page.close()


@pytest.fixture(scope="module")
def browser(request) -> Iterator[Any]:
    if missing := what_is_missing():
        pytest.skip(f"no browser to look at the page with: {missing}")
    request.getfixturevalue("address")
    with open_browser() as driver:
        yield driver


class Page:
    """What a reader does and sees."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        self.address = address

    def open(self, query: str = "") -> Page:
        self.browser.get(f"{self.address}?q={quote(query)}")
        wait(self.browser, lambda: self.all(".lion-hit"), "page")
        return self

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return self.browser.execute_script(script, selector)

    def type(self, *keys: str) -> None:
        self.browser.switch_to.active_element.send_keys(*keys)

    def await_text(self, selector: str, text: str) -> None:
        wait(self.browser, lambda: any(text in shown for shown in self.texts(selector)), repr(text))


@pytest.fixture
def page(browser, address) -> Page:
    set_screen(browser, 1280, 900)
    return Page(browser, address)


def test_a_query_shows_its_terms_and_two_rankings_with_reasons(page) -> None:
    page.open(QUERY)
    assert len(page.texts(".lion-bars .own")) + len(page.texts(".lion-bars .new")) == 20
    assert all("in the query" in bar for bar in page.texts(".lion-bars .own"))
    assert all(bar.startswith("+ ") and "expansion" in bar for bar in page.texts(".lion-bars .new"))
    assert page.texts(".lion-ranking h2") == ["lion-sp-tiny sparse", "lion-ds-tiny dense"]
    assert [len(page.all(f".lion-ranking.{kind} .lion-hit")) for kind in ("sparse", "dense")] == [5, 5]
    assert all("%" in chips for chips in page.texts(".lion-hit .lion-why"))
    assert page.all(".lion-text mark")
    assert page.texts(".lion-hit .relevant")
    left, right = (column.rect for column in page.all(".lion-ranking"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_everything_can_be_done_with_the_keyboard(page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open()
    selected = (
        "const field = document.activeElement; return field.value.slice(field.selectionStart, field.selectionEnd)"
    )
    wait(page.browser, lambda: page.browser.execute_script(selected) == QUERY, "selected example")
    assert page.browser.switch_to.active_element.get_attribute("tagName") in ("TEXTAREA", "INPUT")
    page.type(f"{QUERY} ", Keys.ENTER)
    page.await_text(".lion-ranking h2", "lion-sp-tiny")
    page.await_text("[role=status]", "Documents found: 5 by lion-sp-tiny and 5 by lion-ds-tiny.")
    page.type(Keys.TAB)
    assert page.browser.switch_to.active_element.text == "Search"
    page.type(Keys.TAB)
    assert page.browser.switch_to.active_element.get_attribute("type") == "radio"
    page.type(Keys.ARROW_DOWN)
    page.await_text(".lion-ranking h2", "BM25 words")
    page.type(Keys.TAB)
    assert page.browser.switch_to.active_element.text == QUERY
    page.type(Keys.TAB)
    page.type(Keys.ENTER)
    page.await_text(".lion-ranking.lexical h3", "Text 3")
    ring = page.browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid", "the focus can be seen"
    query = page.browser.execute_script(
        "return document.querySelector('#lion-query textarea, #lion-query input').value"
    )
    assert query == TEXTS[2]


def test_blank_and_very_long_queries_get_a_message(page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(QUERY)
    field = page.all("#lion-query textarea, #lion-query input")[0]
    field.click()
    page.type(Keys.CONTROL, "a")
    page.type(Keys.BACKSPACE, Keys.ENTER)
    page.await_text(".lion-message.error", "Type a query first")
    assert page.all(".lion-hit") == []
    paste = "arguments[0].value = 'lion '.repeat(3000); arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    page.browser.execute_script(paste, field)
    page.type(Keys.ENTER)
    page.await_text(".lion-message.error", "and 10,000 are the most")
    page.open("capital " * 300)
    page.await_text(".lion-message.note", "reads the first 64 of them")
    assert page.all(".lion-hit")


def test_a_collection_cannot_change_the_page(page) -> None:
    page.open(EVIL)
    page.await_text(".lion-hit", "{{x}} ${y}")
    assert page.browser.execute_script("return window.evil === undefined")
    assert page.all(".lion-hit img") == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read(page, dark: bool) -> None:
    set_screen(page.browser, 1280, 900, dark)
    page.open(QUERY)
    brightness = page.browser.execute_script(f"{COLOURS} return luminance(backdrop(document.body))")
    assert brightness < 0.1 if dark else brightness > 0.9
    for query in (QUERY, "capital"):  # a word alone is all of a score, and so the strongest mark
        page.open(query)
        contrasts = page.browser.execute_script(f"{COLOURS} return {CONTRASTS}")
        assert contrasts, "there is text to look at"
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}


def test_a_narrow_screen_needs_no_sideways_scrolling(page) -> None:
    set_screen(page.browser, 360, 740)
    page.open(QUERY)
    width = page.browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= 360
    sparse, dense = page.all(".lion-ranking")
    assert sparse.is_displayed() and not dense.is_displayed()
    tabs = page.all(".lion-columns > label")
    assert [tab.text for tab in tabs] == ["lion-sp-tiny", "lion-ds-tiny"]
    tabs[1].click()
    assert dense.is_displayed() and not sparse.is_displayed()
    set_screen(page.browser, 1280, 900)
    assert sparse.is_displayed() and dense.is_displayed() and not tabs[0].is_displayed()


def test_the_page_starts_with_an_answered_example_and_says_what_a_sparse_retriever_is(page) -> None:
    page.open()
    page.await_text(".lion-ranking h2", "lion-sp-tiny")
    value = "return document.querySelector('#lion-query textarea, #lion-query input').value"
    assert page.browser.execute_script(value) == QUERY
    (header,) = page.texts(".lion-header")
    assert "A sparse retriever gives a text a weight for each word of a vocabulary" in header


def test_nothing_is_asked_of_the_network(page) -> None:
    page.open(QUERY)
    addresses = asked_addresses(page.browser)
    assert any("config" in one or "assets" in one for one in addresses)
    assert [one for one in addresses if not one.startswith((page.address, "data:", "blob:"))] == []
    failed = [entry["message"] for entry in page.browser.get_log("browser") if entry["source"] == "network"]
    assert failed == []


def test_the_command_serves_the_page_or_says_what_is_wrong(settings, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LION_ST_DEMO_CACHE", str(tmp_path / "cache"))
    served: list[tuple[Any, ...]] = []
    monkeypatch.setattr("lion_st.demo.launch", lambda *arguments: served.append(arguments))
    model, dense, data = settings.values()
    lion("demo", model, "--dense", dense, "--data", data, "--port", "7999", "--quiet")
    ((page, host, port),) = served
    assert (page.title, host, port) == ("Lion explorer", None, 7999)
    refused = lion("demo", dense, "--data", data, exit_code=1)
    assert "lion-st demo: lion-ds-tiny is a dense model, and a sparse one is needed" in refused
    assert "nowhere does not exist" in lion("demo", model, "--data", tmp_path / "nowhere", exit_code=None)


# Relative luminance and contrast as WCAG 2.2 defines them; backdrop() lays the backgrounds of an element's ancestors
# over each other, and CONTRASTS gives the ratio of each element with text of its own.
COLOURS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function paint(colours) {
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
}
function backgrounds(element) {
  const layers = [];
  for (let one = element; one; one = one.parentElement) layers.unshift(getComputedStyle(one).backgroundColor);
  return ['white', ...layers];
}
const backdrop = element => paint(backgrounds(element));
const luminance = colour => {
  const [r, g, b] = colour.map(part => part / 255).map(p => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = element => {
  const text = luminance(paint([...backgrounds(element), getComputedStyle(element).color]));
  const behind = luminance(backdrop(element));
  return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
};
"""
CONTRASTS = """Object.fromEntries([...document.querySelectorAll('.gradio-container *')]
  .filter(one => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim()))
  .filter(one => one.checkVisibility() && !['STYLE', 'SCRIPT'].includes(one.tagName))
  .map(one => [`${one.tagName}.${one.className}`, contrast(one)]))"""
