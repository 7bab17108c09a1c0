"""The page in a browser: what a reader clicks, and what a page must not do. Needs Chromium and the package playwright, and no network."""

import json
import os
import shutil

import pytest

from jaxrlhf.evaluation.intervals import Interval, as_fields
from jaxrlhf.report.build import report, write
from jaxrlhf.report.figures import DRAWINGS

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright (pip install -e '.[dev]')")
BROWSER = os.environ.get("JAXRLHF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: apt-get install chromium, or name one in JAXRLHF_CHROMIUM; the page is not opened"
)


@pytest.fixture(scope="module")
def address(two_arms, tmp_path_factory):
    return write(report([two_arms]), tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        # Root has no sandbox of its own in a container; the page is ours, and asks the network for nothing.
        chromium = play.chromium.launch(
            executable_path=BROWSER,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
            ignore_default_args=["--hide-scrollbars"],
        )
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desktop", "phone"])
def page(browser, address, request):
    """The page opened; at the end it has said nothing on the console and asked for nothing but itself."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda one: asked.append(one.url))
    opened.goto(address)
    yield opened
    opened.close()
    assert said == []
    assert set(asked) == {address}


def column(page, table, n):
    return page.eval_on_selector_all(f"#{table} tbody tr", f"rows => rows.map(row => row.cells[{n}].textContent)")


def test_nothing_overflows(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    page.evaluate("scrollTo(500, 0)")
    assert page.evaluate("scrollX") == 0


def test_the_table_fits_a_desktop_and_scrolls_visibly_elsewhere(page):
    """On a phone the arm's name stays, and there is a bar that says there is more."""
    box, table = ("document.querySelector('#results .box')", "document.getElementById('summary')")
    hidden = page.evaluate(f"{table}.scrollWidth - {box}.clientWidth")
    if page.viewport_size["width"] > 1000:
        assert hidden <= 0, f"{hidden} px of the table are out of sight"
    else:
        page.evaluate(f"{box}.scrollLeft = 300")
        assert page.evaluate(f"{table}.rows[1].cells[0].getBoundingClientRect().left >= {box}.getBoundingClientRect().left")
        assert page.evaluate(f"{box}.offsetHeight - {box}.clientHeight") > 8


def test_a_wide_table_shows_its_last_column_on_a_small_laptop(browser, make_run, tmp_path, monkeypatch):
    """17 columns, of which 61 px were out of sight at this width; of a run of 20 methods, 83 px at 1250."""
    monkeypatch.setattr("jaxrlhf.report.figures.DRAWINGS", [])
    for n, arm in enumerate(("ppo", "ocrm", "retrain-fixed-reference")):
        path = make_run(tmp_path / "demo" / arm, arm=arm, refits=n > 0, gold_shift=-10.5 * n) / "summary.json"
        body = json.loads(path.read_text())
        wide = {"kl_sft": 12.34 + n, "reward_accuracy": 0.6 + n / 10, "proxy": -102.5 - n, "win_rate": 0.125 + n / 10, "ece": 0.05 * n}
        for name, x in (wide | {"gold": -105.0 * n}).items():
            body["rounds"][-1] |= as_fields(name, Interval(x, x - 0.2, x + 0.2, 15)) | {"length": 10.25 + n}
        path.write_text(json.dumps(body))
    opened = browser.new_page(viewport={"width": 1180, "height": 844})
    opened.goto(write(report([tmp_path / "demo"]), tmp_path / "wide.html").as_uri())
    hidden = opened.evaluate("document.getElementById('summary').scrollWidth - document.querySelector('#results .box').clientWidth")
    assert opened.evaluate("document.getElementById('summary').rows[0].cells.length") >= 17 and hidden <= 0, f"{hidden} px are out of sight"
    opened.close()


def test_every_figure_has_data_and_fits(page):
    figures = page.eval_on_selector_all(
        ".figures figure",
        """all => all.map(one => {
            const svg = one.querySelector("svg"), box = svg.getBoundingClientRect();
            const drawn = [...svg.querySelectorAll('[id^="' + one.id.slice(7) + '-data-"]')].filter(x => {
                const { width, height } = x.getBBox();
                return width > 3 || height > 3;
            });
            const texts = svg.querySelectorAll("text").length;
            return { name: one.id.slice(7), width: box.width, height: box.height, data: drawn.length, texts };
        })""",
    )
    assert {one["name"] for one in figures} == {drawing.name for drawing in DRAWINGS}
    for one in figures:
        assert one["data"] >= 1 and one["texts"] > 3 and one["height"] > 100, one
        assert 250 < one["width"] <= page.viewport_size["width"], one


def test_the_table_sorts(page):
    assert column(page, "summary", 0) == ["ppo", "ocrm"]
    gold = page.locator("#summary").get_by_role("columnheader", name="gold", exact=True)
    gold.get_by_role("button").click()
    assert column(page, "summary", 0) == ["ocrm", "ppo"] and gold.get_attribute("aria-sort") == "descending"
    gold.get_by_role("button").click()
    assert column(page, "summary", 0) == ["ppo", "ocrm"] and gold.get_attribute("aria-sort") == "ascending"
    page.locator("#summary").get_by_role("columnheader", name="RM drift").get_by_role("button").click()
    assert column(page, "summary", 0) == ["ocrm", "ppo"]  # ppo has none, and stands last both ways
    page.locator("#summary").get_by_role("columnheader", name="RM drift").get_by_role("button").click()
    assert column(page, "summary", 0) == ["ocrm", "ppo"]


def test_samples_are_chosen_filtered_and_sorted(page):
    assert page.locator("#count").text_content() == "30 of 30 shown"
    page.locator("#arm").select_option(label="ocrm")
    page.locator("#round").select_option(label="2")
    assert column(page, "sample-table", 1) == ["2"] * 5
    page.locator("#filter").fill("ANSWER 3")
    assert page.locator("#count").text_content() == "1 of 1 shown"
    (response,) = column(page, "sample-table", 3)
    assert response.startswith("ocrm round 2 answer 3 </script><img src=x")
    page.locator("#filter").fill("")
    page.locator("#ended").select_option("no")
    assert column(page, "sample-table", 9) == ["no"]
    page.locator("#ended").select_option("")
    proxy = page.locator("#sample-table th", has_text="proxy").get_by_role("button")
    proxy.click()
    assert column(page, "sample-table", 6) == ["2.00", "1.00", "0.00", "-1.00", "-2.00"]
    proxy.click()
    assert column(page, "sample-table", 6)[0] == "-2.00"
    page.locator("#sample-table th", has_text="reference").get_by_role("button").click()
    assert column(page, "sample-table", 4)[-1] == "–"


def test_what_was_chosen_is_there_after_a_reload(page):
    page.locator("#filter").fill("answer 3")
    page.reload()
    assert page.locator("#filter").input_value() == "answer 3" and page.locator("#count").text_content() == "6 of 6 shown"


def test_a_served_page_reloads_itself_when_the_run_goes_on(browser, make_run, tmp_path):
    import threading

    from jaxrlhf.report.server import server_of

    run = make_run(tmp_path / "run", rounds=0)
    with server_of([str(run)], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page, said = browser.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        assert page.locator("#figure-training_score").count() == 0
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "policy", "round": 1, "step": 1, "rollout/score": 0.5}\n')
        page.locator("#figure-training_score").wait_for(timeout=300_000)
        page.close()
        server.shutdown()
    assert said == []
