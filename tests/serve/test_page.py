"""The page in a real browser, clicked as a person would."""

import json

import pytest

pytest.register_assert_rewrite("serving")
import browser as chromium  # noqa: E402
from serving import KEY, until  # noqa: E402

pytest_plugins = ("serving",)
needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")

TEXT = "Ahab met Ishmael in Nantucket, à un jour froid. 🐋 " * 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def set_value(browser, name, value):
    browser.run(f"document.getElementById('{name}').value = {json.dumps(value)}")


def click(browser, name):
    assert browser.run(f"!document.getElementById('{name}').disabled"), f"{name} is disabled"
    browser.run(f"document.getElementById('{name}').click()")


def text_of(browser, name):
    return browser.run(f"document.getElementById('{name}').textContent")


@needs_browser
def test_read_continue_classify_and_see(server, browser, tmp_path):
    browser.open(server.url)
    browser.until("document.getElementById('status').textContent.startsWith('type a key')")
    assert browser.run("document.getElementById('read').disabled")
    set_value(browser, "key", "wrong")
    click(browser, "connect")
    browser.until("document.getElementById('status').textContent.includes('valid API key')")
    set_value(browser, "key", KEY)
    click(browser, "connect")
    browser.until(
        "document.getElementById('status').textContent === 'connected: completion, classify, extract'"
    )

    click(browser, "read")  # nothing to read yet
    browser.until("document.getElementById('status').textContent.includes('paste a text')")
    set_value(browser, "text", TEXT)
    click(browser, "read")
    browser.until("document.getElementById('status').textContent.startsWith('read once')")
    size = len(TEXT.encode())
    assert f"{size:,} tokens" in text_of(browser, "status")
    assert browser.run("document.getElementById('progress').value") == 1
    # Memory flat: the last two thirds of the curve lie at one height.
    points = browser.run("document.querySelector('#chart polyline').getAttribute('points')").split()[1:]
    assert len(points) == -(-(size - 1) // 64)
    assert len({p.split(",")[1] for p in points[len(points) // 3 :]}) == 1

    for name, value in {"prompt": " Then", "tokens": "40", "temperature": "0", "seed": "1"}.items():
        set_value(browser, name, value)
    click(browser, "continue")
    browser.until(
        "document.getElementById('stop').disabled && document.getElementById('output').textContent.length > 5"
    )
    with server.client() as client:
        session = client.get("/v1/sessions").json()["data"][-1]
        body = {"prompt": " Then", "session_id": session["id"], "max_tokens": 40, "temperature": 0}
        assert (
            text_of(browser, "output")
            == " Then" + client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        )

    click(browser, "classify")
    browser.until("document.querySelectorAll('#classes .bar').length === 2")
    assert "fiction" in text_of(browser, "classes")
    assert browser.run("document.querySelectorAll('#classes blockquote').length") == 3

    click(browser, "extract")
    browser.until("document.getElementById('found').textContent !== ''")
    assert "mentions of" in text_of(browser, "found")
    height = browser.run("document.documentElement.scrollHeight")
    size = {"width": 1000, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10000
    assert not [entry for entry in browser.log if "401" not in entry], browser.log


@needs_browser
def test_a_graph_of_entities_and_relations_is_drawn(start, folders, browser):
    """What an extract model with relations answers, drawn: nodes, labelled arrows, and mentions at a click."""
    server = start(keys=(), extract=folders.extract)
    entities = [
        {"start": 0, "end": 4, "text": "Ahab", "label": "PER"}, {"start": 9, "end": 16, "text": "Ishmael", "label": "PER"},
        {"start": 20, "end": 29, "text": "Nantucket", "label": "LOC"}, {"start": 50, "end": 54, "text": "he", "label": "PER"},
    ]  # fmt: skip
    found = {
        "entities": entities,
        "clusters": {
            "Ahab": [entities[0], entities[3]],
            "Ishmael": [entities[1]],
            "<b>Nantucket</b>": [entities[2]],
        },
        "relations": [{"head": "Ahab", "tail": "Ishmael", "label": "meets"}],
    }
    server.api._extracted = lambda texts, _: [found]
    browser.open(server.url)
    browser.until("document.getElementById('status').textContent.startsWith('connected')")  # no key to type
    set_value(browser, "text", "Ahab and Ishmael")
    click(browser, "extract")
    browser.until("document.querySelectorAll('#graph .node').length === 3")
    assert text_of(browser, "found") == "4 mentions of 3 entities; 1 relations"
    assert browser.run("document.querySelectorAll('#graph line[marker-end]').length") == 1
    drawn = browser.run("[...document.querySelectorAll('#graph text')].map((t) => t.textContent)")
    assert set(drawn) == {"Ahab", "Ishmael", "<b>Nantucket</b>", "meets"}  # text, never markup
    browser.run("document.querySelector('#graph .node').dispatchEvent(new MouseEvent('click'))")
    assert "characters 0–4, 50–54" in text_of(browser, "mentions")  # noqa: RUF001
    found.pop("relations"), found.pop("clusters")
    click(browser, "extract")
    browser.until("document.querySelectorAll('#graph .node').length === 4")
    assert browser.run("document.querySelectorAll('#graph line[stroke-dasharray]').length") == 3
    circles = browser.run(
        "[...document.querySelectorAll('#graph circle')].map((c) => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
    )
    assert all(0 < x < 640 and 0 < y < 420 for x, y in circles)
    assert min(abs(a[0] - b[0]) + abs(a[1] - b[1]) for i, a in enumerate(circles) for b in circles[:i]) > 20


@needs_browser
def test_cancelling_and_closing_free_the_server(start, browser):
    server = start(keys=(), slots=1)
    browser.open(server.url)
    browser.until("!document.getElementById('read').disabled")
    browser.run("document.getElementById('text').value = 'word '.repeat(200000)")
    click(browser, "read")
    browser.until("document.getElementById('figures').textContent.includes('tokens read')")
    click(browser, "cancel")
    browser.until("document.getElementById('status').textContent === 'cancelled'")
    until(lambda: server.engine.report()["reading"] == 0)
    assert server.engine.statistics.jobs["cancelled"] == 1
    click(browser, "read")
    until(lambda: server.engine.report()["reading"] == 1)
    browser.send("Page.navigate", url="about:blank")  # the tab goes away
    until(lambda: server.engine.report()["reading"] == 0)


def test_the_page_loads_nothing_from_elsewhere(server):
    with server.client(None) as client:
        page, script = client.get("/").text, client.get("/page.js").text
    assert "http://" not in (page + script).replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page + script
    assert "innerHTML" not in script
    assert "eval(" not in script
