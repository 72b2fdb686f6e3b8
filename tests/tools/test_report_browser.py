"""Report pages in a real browser: no complaint on its console, nothing fetched, hostile texts shown as texts."""

import json

import pytest

from ppomax.engine import cli

SHOWN = "document.querySelector('.plot svg')"
# What a reader copies out of a page: marks that spell a character stand for it.
TEXTS = "[...document.querySelectorAll('#samples .side .said')].map(node => node.textContent)"


def spelled(text: str) -> str:
    """The text as the page shows it."""
    names = {"\u202e": "RLO", "\u2066": "LRI", "\u200b": "ZWSP", "\x1b": "ESC", "\x00": "NUL"}
    names |= {"\u2028": "U+2028", "\u2029": "U+2029", "\x07": "U+0007", "\ud800": "U+D800"}
    return "".join(f"\u27e8{names[c]}\u27e9" if c in names else c for c in text)


@pytest.fixture
def page(fake_run, browser):
    """A report of the fake run, open."""
    assert cli.main(["report", str(fake_run.folder)]) == 0
    browser.open((fake_run.folder / "report.html").as_uri())
    browser.wait(SHOWN)
    return browser


def test_hostile_texts_stay_texts_and_nothing_is_fetched(page, fake_run):
    page.run("[...document.querySelectorAll('#samples button')].forEach(one => one.click())")
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    sides = page.run(TEXTS)
    for text in fake_run.hostile:
        assert f"{spelled(text)} at 0" in sides
        assert f"{spelled(text)} at 12" in sides
    # Every response of the browser, in each colour.
    page.run(
        """(async () => { for (const list of [0, 1]) for (const one of document.querySelectorAll('#rollouts button')) {
        one.click(); await new Promise(done => setTimeout(done)); } })()"""
    )
    assert page.run("window.pwned") is None
    assert page.run("document.querySelectorAll('body img, body iframe, body base, body form').length") == 0
    assert page.run("document.scripts.length") == 2
    assert "{{window.pwned = 4}}" in page.run("document.getElementById('events').textContent")
    assert len(page.requests) == 1
    assert page.complaints == []


def test_every_curve_is_drawn_and_can_be_read(page):
    page.run("document.querySelectorAll('#metrics .chart').forEach(card => { card.scrollIntoView(); card.draw() })")
    paths = page.run(
        "Object.fromEntries([...document.querySelectorAll('#metrics .chart')].map(card => "
        "[card.dataset.metric, card.querySelector('path.line')?.getAttribute('d').match(/[ML]/g).length]))"
    )
    assert {"reward": 12, "kl": 12, "odd_one": 12, "grad_norm": 11}.items() <= paths.items()
    assert all(paths.values())
    assert page.run("document.querySelectorAll('#overview [data-metric=reward] line.event.severe').length") == 1
    box = page.run(
        "(() => { const card = document.querySelector('#overview .plot svg'); card.scrollIntoView({block: 'center'});"
        " const b = card.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })()"
    )
    left, top, width, height = box
    page.mouse("mouseMoved", left + width - 12, top + height / 2)
    tip = page.run("document.querySelector('#overview .chart .tip').innerText")
    assert "1.2" in tip
    assert "step 12" in tip
    # Dragging zooms every chart; a double-click goes back.
    page.mouse("mousePressed", left + width / 2, top + height / 2)
    page.mouse("mouseMoved", left + width - 40, top + height / 2)
    page.mouse("mouseReleased", left + width - 40, top + height / 2)
    assert page.run("document.querySelector('.zoomed').textContent").startswith("steps ")
    page.run("document.querySelector('.plot svg').dispatchEvent(new MouseEvent('dblclick'))")
    assert page.run("document.querySelector('.zoomed').textContent") == ""
    assert page.complaints == []


def test_tokens_are_coloured_by_the_chosen_number_and_tell_it(page):
    def colours(label):
        page.run(
            "[...document.querySelectorAll('#rollouts .buttons button')]"
            f".find(button => button.textContent === '{label}').click()"
        )
        page.wait(f"document.querySelector('#rollouts .key b')?.textContent === '{label}'")
        return page.run(
            "[...document.querySelectorAll('#rollouts .token')].map(t => getComputedStyle(t).backgroundColor)"
        )

    by_kl, by_value = colours("KL"), colours("value")
    assert len(by_kl) == len("<script>window.pwned = 1</script>") // 4 + 1 + 4
    assert by_kl != by_value
    # Numbers of the fake run alternate in sign: orange above 0, blue below.
    assert by_kl[2].startswith("rgba(236, 120, 28")
    assert by_kl[3].startswith("rgba(58, 118, 228")
    left, top = page.run(
        "(() => { const t = document.querySelectorAll('#rollouts .token')[3]; t.scrollIntoView({block: 'center'});"
        " const b = t.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2] })()"
    )
    page.mouse("mouseMoved", left, top)
    tip = page.run("document.querySelector('#rollouts .tip').innerText")
    assert "token 4 of" in tip
    assert "advantage" in tip
    assert "-1.2" in tip  # 4 * -0.3
    assert page.complaints == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_several_runs_lie_over_each_other(fake_run, browser, tmp_path, dark):
    other = type(fake_run)(tmp_path / "other").steps(1, 3, reward=7.0).samples(3)
    output = tmp_path / "both.html"
    assert cli.main(["report", str(fake_run.folder), str(other.folder), "--output", str(output)]) == 0
    browser.open(output.as_uri(), dark=dark)
    browser.wait(SHOWN)
    strokes = browser.run(
        "[...document.querySelectorAll('#overview [data-metric=reward] path.line')]"
        ".map(path => getComputedStyle(path).stroke)"
    )
    assert len(set(strokes)) == 2
    cells = browser.run("[...document.querySelectorAll('#values tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert [row for row in cells if row[0] == "reward"] == [["reward", "1.2", "7"]]
    assert browser.complaints == []


def test_a_report_of_every_stage_of_nothing_but_records(fake_run, browser, tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    lines = [{"kind": "sft", "step": step, "loss": 1 / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli.main(["report", str(folder)]) == 0
    browser.open((folder / "report.html").as_uri())
    browser.wait(SHOWN)
    links = browser.run("[...document.querySelectorAll('nav a')].map(a => a.textContent)")
    assert links == ["Overview", "All metrics", "Values", "Configuration"]
    assert browser.complaints == []
