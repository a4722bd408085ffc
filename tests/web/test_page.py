"""The page in a real browser: typing, filters, uploads, dialogs and shared URLs, without console messages."""

import json
import re
import time
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow

IDS = "all => all.map(one => one.dataset.id)"
COLOURS = "all => all.map(one => getComputedStyle(one).color)"


@pytest.fixture
def visit(browser, server):
    """Opens a path or URL in a new browser context; the teardown fails on any console message or foreign request."""
    problems, contexts = [], []

    def visit(path="/", width=1280, height=800, server=server, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"alert {dialog.message}"))
        page.on("request", lambda r: r.url.startswith((server, "data:", "blob:")) or problems.append(r.url))
        page.goto(server + path if path.startswith("/") else path)
        settle(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems


def until(page, condition):
    """Waits for a JavaScript condition; the page's security policy blocks Playwright's own wait_for_function."""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def settle(page):
    until(page, "document.querySelector('#status').textContent.trim() && !document.querySelector('[aria-busy]')")


def cards(page):
    return page.eval_on_selector_all(".card", IDS)


def query(page):
    return parse_qs(urlsplit(page.url).query)


def ids(results):
    return [row.id for row in results]


def search(page, text):
    page.fill("#q", text)
    page.press("#q", "Enter")
    until(page, f"document.title.startsWith({json.dumps(text)})")
    until(page, "/nearest|No product/.test(document.querySelector('#status').textContent)")
    settle(page)


def test_a_sentence_shows_the_results_of_the_searcher_and_its_url_restores_them(visit, searcher):
    page = visit()
    assert cards(page) == searcher.gallery.ids[:24]
    search(page, "blue shoes")
    shown = cards(page)
    assert shown == ids(searcher.search("blue shoes", k=24)) and query(page) == {"q": ["blue shoes"]}
    score = page.text_content(".card .under span:last-child")
    assert float(score) == pytest.approx(searcher.search("blue shoes")[0].score, abs=1e-3)
    assert cards(visit(page.url)) == shown
    page.go_back()
    until(page, "!/nearest/.test(document.querySelector('#status').textContent)")
    assert cards(page) == searcher.gallery.ids[:24] and page.input_value("#q") == ""


def test_results_update_while_typing(visit, searcher):
    page = visit()
    page.type("#q", "red dress", delay=20)
    page.wait_for_url("**/?q=red+dress")
    settle(page)
    assert cards(page) == ids(searcher.search("red dress", k=24))


def test_filters_come_from_the_catalogue_and_are_part_of_the_url(visit, searcher):
    page = visit("/?q=shoes")
    page.check("input[value='gender:Women']")
    page.wait_for_url("**filter=gender*")
    settle(page)
    swatch = page.locator(".swatch input").first
    colour = swatch.get_attribute("value").partition(":")[2]
    swatch.check()
    page.wait_for_url("**Colour*")
    settle(page)
    expected = searcher.search("shoes", k=24, filters={"gender": "Women", "baseColour": colour})
    assert cards(page) == ids(expected) and colour in page.text_content("legend:has(.names)")
    again = visit(page.url)
    assert cards(again) == ids(expected) and again.is_checked("input[value='gender:Women']")
    again.click("#clear")
    until(again, "document.querySelectorAll('.card').length === 24")
    assert query(again) == {} and not again.is_checked("input[value='gender:Women']")


def test_an_uploaded_picture_is_a_query_and_part_of_the_url(visit, searcher, tmp_path):
    (tmp_path / "query.jpg").write_bytes(searcher.gallery.pictures(13)[0])
    page = visit()
    page.set_input_files("#picture", str(tmp_path / "query.jpg"))
    page.wait_for_url("**#picture=*")
    until(page, "/nearest/.test(document.querySelector('#status').textContent)")
    settle(page)
    assert searcher.gallery.ids[13] in cards(page)[:3] and page.locator(".chip img").count() == 1
    assert len(page.url) < 8000
    shared = visit(page.url)
    assert cards(shared) == cards(page)
    search(shared, "green")
    assert cards(shared) != cards(page) and "#picture=" in shared.url
    shared.click(".chip")
    shared.wait_for_url(re.compile(r"^[^#]*$"))
    settle(shared)
    assert cards(shared) == ids(searcher.search("green", k=24))


def test_a_product_dialog_shows_crop_and_colours_and_leads_to_similar_products(visit, searcher):
    page = visit("/?q=shoes")
    id = cards(page)[2]
    page.click(f".card[data-id='{id}']")
    page.wait_for_selector("dialog[open]")
    details = searcher.gallery.details(searcher.gallery.number(id))
    assert page.text_content("#name") == details.product.title
    assert details.product.attributes["gender"] in page.text_content("#attributes")
    assert details.features["colour_names"][0] in page.text_content("#colours")
    until(page, "document.querySelector('#large').complete && document.querySelector('#shot').style.width")
    left, top, right, bottom = details.features["crops"][0]
    shot, crop = page.locator("#shot").bounding_box(), page.locator("#crop").bounding_box()
    assert crop["x"] - shot["x"] == pytest.approx(left * shot["width"], abs=2)
    assert crop["height"] == pytest.approx((bottom - top) * shot["height"], abs=2)
    opened = visit(page.url)
    opened.wait_for_selector("dialog[open]")
    assert opened.text_content("#name") == details.product.title
    page.keyboard.press("Escape")
    until(page, "!location.search.includes('open=')")
    assert page.evaluate("document.activeElement.dataset.id") == id
    opened.click("#similar")
    opened.wait_for_url("**like=*")
    until(opened, "/nearest/.test(document.querySelector('#status').textContent)")
    settle(opened)
    assert cards(opened) == ids(searcher.search(like=id, k=24))
    assert not opened.locator("dialog[open]").count()


def badges(page, selector):
    return page.eval_on_selector_all(selector, "all => all.map(one => one.querySelector('.moved')?.textContent ?? '')")


def arrow(row):
    return "" if row.place == row.before else f"{'▲' if row.before > row.place else '▼'}{abs(row.before - row.place)}"


ENDS = """
id => {
  const box = (name) => [...document.querySelectorAll(`${name}[data-id="${id}"]`)].map(e => e.getBoundingClientRect());
  const [[left, right], [path]] = [box('.entry'), box('path')];
  const middles = [left, right].map(entry => (entry.top + entry.bottom) / 2);
  const [top, bottom] = [Math.min(...middles), Math.max(...middles)];
  return [path.left - left.right, path.right - right.left, path.top - top, path.bottom - bottom];
}
"""


def test_a_product_dialog_shows_any_of_its_pictures(visit, several_pictures_server):
    address, searcher = several_pictures_server
    number = next(n for n, id in enumerate(searcher.gallery.ids) if id == "id_00000003")
    page = visit("/?open=id_00000003", server=address)
    page.wait_for_selector("dialog[open]")
    buttons = page.locator("#thumbnails button")
    assert buttons.count() == len(searcher.gallery.pictures(number)) == 4
    until(page, "document.querySelector('#large').complete")
    assert page.locator("#crop").is_visible() and page.locator("#large").get_attribute("src").count("number=") == 0
    buttons.nth(2).click()
    until(page, "document.querySelector('#large').complete && /number=2/.test(document.querySelector('#large').src)")
    assert page.evaluate("document.querySelector('#large').naturalWidth") > 0 and not page.locator("#crop").is_visible()
    pressed = [button.get_attribute("aria-pressed") for button in buttons.all()]
    assert pressed == ["false", "false", "true", "false"]
    broken = page.eval_on_selector_all("#thumbnails img", "all => all.filter(one => one.complete && !one.naturalWidth)")
    assert broken == []
    buttons.nth(0).click()
    until(page, "document.querySelector('#crop').checkVisibility()")
    alone = visit("/?open=id_00000004", server=address)
    alone.wait_for_selector("dialog[open]")
    assert alone.locator("#thumbnails button").count() == 0


def test_both_orders_are_shown_side_by_side_with_moved_products(visit, reranking_server, reranking_searcher):
    page = visit("/?q=blue+shoes", server=reranking_server)
    rows = reranking_searcher.search("blue shoes", k=24)
    first = ids(reranking_searcher.search("blue shoes", k=24, rerank=False))
    assert cards(page) == ids(rows) != first and badges(page, ".card") == [arrow(row) for row in rows]
    page.check("input[name=order][value=first]")
    page.wait_for_url("**order=first*")
    settle(page)
    assert cards(page) == first and not any(badges(page, ".card"))
    page.check("input[name=order][value=both]")
    page.wait_for_url("**order=both*")
    settle(page)
    page = visit(page.url, server=reranking_server)
    lists = page.eval_on_selector_all(
        "#compare ol", "all => all.map(o => [...o.children].map(li => li.firstChild.dataset.id))"
    )
    assert lists == [first, ids(rows)] and not cards(page)
    assert badges(page, "#compare section:last-child .entry") == [arrow(row) for row in rows]
    arrows = {row.id: arrow(row) for row in reranking_searcher.search("blue shoes", k=60)}
    assert badges(page, "#compare section:first-child .entry") == [arrows[id] for id in first]
    both = set(first) & set(ids(rows))
    assert page.locator("#compare path").count() == len(both)
    assert len(set(page.eval_on_selector_all(".entry .title", COLOURS))) == 1, (
        "names must not take the colours of the arrows"
    )
    row = next(row for row in rows if row.place != row.before and row.id in both)
    ends = page.evaluate(ENDS, row.id)
    assert max(map(abs, ends)) < 8, "the curve must join the two places"
    page.hover(f"#compare section:last-child [data-id='{row.id}']")
    assert page.eval_on_selector_all(".lit", IDS) == [row.id] * 3
    page.focus("#q")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.id") == rows[1].id


CELLS = "all => all.map(row => [...row.children].map(cell => cell.innerText))"
OFFSETS = """
all => all.map(cell => {
  const [outer, inner] = [cell, cell.firstChild].map(e => e.getBoundingClientRect());
  return (inner.left + inner.right - outer.left - outer.right) / 2;
})
"""


def test_a_reranked_product_explains_its_place(visit, reranking_server, reranking_searcher):
    rows = reranking_searcher.search("blue shoes", k=24)
    row = next(row for row in rows if row.before > row.place)
    opened = visit(f"/?q=blue+shoes&open={row.id}", server=reranking_server)
    opened.wait_for_selector("#why")
    up = row.before - row.place
    assert f"up {up} place{'s' * (up > 1)}" in opened.text_content("#verdict")
    table = opened.eval_on_selector_all("#reasons tbody tr", CELLS)
    assert len(table) == len(row.why) and table[1][0] == "Picture"
    offsets = opened.eval_on_selector_all("#reasons .track", OFFSETS)
    for cells, offset, reason in zip(table, offsets, row.why.values(), strict=True):
        assert float(cells[1]) == pytest.approx(reason.gate, abs=0.006)
        assert float(cells[3].replace("−", "-")) == pytest.approx(reason.added, abs=0.0006)
        assert abs(offset) < 1 or np.sign(offset) == np.sign(reason.added)
    assert max(map(abs, offsets)) > 5
    assert not visit(f"/?open={row.id}", server=reranking_server).is_visible("#why")


def test_markup_in_names_is_shown_as_text(visit, searcher):
    page = visit("/?k=60")
    titles = page.eval_on_selector_all(".card .title", "all => all.map(one => one.textContent)")
    assert "<img src=x onerror=alert(1)> & <b>bold</b> shoes" in titles
    assert not page.locator(".card b, .card script, img[src$='/x']").count()
    hostile = next(row for row in searcher.search("shoes", k=60) if "onerror" in row.caption)
    page = visit(f"/?open={hostile.id}")
    page.wait_for_selector("dialog[open]")
    assert page.text_content("#name") == hostile.caption


def test_markup_in_the_url_is_shown_as_text(visit):
    page = visit("/?q=%3Cimg+src%3Dx+onerror%3Dalert(3)%3E&k=99999#picture=")
    assert page.input_value("#q") == "<img src=x onerror=alert(3)>"
    assert len(cards(page)) == 24


def test_the_page_works_with_the_keyboard_alone(visit):
    page = visit("/?q=shoes", height=900)
    page.keyboard.press("Tab")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.press("ArrowDown")
    active = "document.activeElement.dataset.id"
    shown = cards(page)
    assert page.evaluate(active) == shown[0]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(active) == shown[1]
    page.keyboard.press("ArrowDown")
    below = shown.index(page.evaluate(active))
    assert below > 2
    page.keyboard.press("ArrowUp")
    assert page.evaluate(active) == shown[1]
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.evaluate("document.activeElement.id") == "similar"


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_nothing_overflows_at_any_width(visit, width, reranking_server):
    page = visit("/?q=shoes&order=both", width=width, server=reranking_server)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page = visit("/?q=shoes", width=width, server=reranking_server)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    columns = page.evaluate("getComputedStyle(document.querySelector('#cards')).gridTemplateColumns.split(' ').length")
    assert columns >= 2
    page.click(".card")
    page.wait_for_selector("dialog[open]")
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    assert page.evaluate("document.querySelector('dialog').scrollTop") == 0, (
        "the dialog must open at its top, where the picture is"
    )
    page.evaluate("document.querySelector('dialog').scrollTo(0, 9999)")
    close = page.locator("dialog .close").bounding_box()
    assert box["y"] <= close["y"] and close["x"] + close["width"] <= box["x"] + box["width"], (
        "the close button must stay visible"
    )


NAMELESS = """
[...document.querySelectorAll('button, a, input, select, img, dialog[open]')].filter(element =>
  element.checkVisibility() && element.tagName !== 'IMG' && !(
    element.getAttribute('aria-label') || element.textContent.trim() || element.labels?.length ||
    element.getAttribute('aria-labelledby')) || (element.tagName === 'IMG' && !element.hasAttribute('alt'))
).map(element => element.outerHTML)
"""
CONTRAST = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = value => value / 255 <= .04045 ? value / 255 / 12.92 : ((value / 255 + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = element => {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] > 250 ? colour : element.parentElement ? behind(element.parentElement) : [255, 255, 255];
  };
  return ['.card .title', '.card .under', '.value span', '.value small', '#status', '.go', 'legend'].map(name => {
    const element = document.querySelector(name);
    const both = [luminance(rgba(getComputedStyle(element).color)), luminance(behind(element))];
    return [name, (Math.max(...both) + .05) / (Math.min(...both) + .05)];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_have_names_and_text_has_contrast(visit, scheme):
    page = visit("/?q=shoes", color_scheme=scheme)
    assert page.evaluate(NAMELESS) == []
    assert [(name, ratio) for name, ratio in page.evaluate(CONTRAST) if ratio < 4.5] == []
    assert page.get_attribute("html", "lang") == "en" and page.get_attribute("#status", "aria-live") == "polite"


def test_an_error_in_the_url_is_shown_on_the_page(browser, server):
    page = browser.new_page()
    page.goto(f"{server}/?q=a&filter=gendr:Men")
    page.wait_for_selector("#status.error")
    assert "did you mean 'gender'" in page.text_content("#status")
    page.close()
