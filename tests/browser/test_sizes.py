"""The page of `spectrim ui` in a real browser, on a phone and on a wide screen; needs Gradio and Chromium."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Tab, browser, find_chromium

from sizes_server import all_sizes, page_of_sizes

pytest.importorskip("gradio")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"),
]
DONE = "document.body && document.body.innerText.includes('tokens judged')"
LABELS = """[...document.querySelectorAll('input, textarea, button')].filter(e => e.getClientRects().length).map(
  e => (e.labels && e.labels.length ? e.labels[0].innerText : '') || e.getAttribute('aria-label') || e.innerText)"""
PALE = """(() => {
  const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const light = colour => { c.fillStyle = 'white'; c.fillRect(0, 0, 1, 1); c.fillStyle = colour; c.fillRect(0, 0, 1, 1);
    const a = [...c.getImageData(0, 0, 1, 1).data].slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * a[0] + 0.7152 * a[1] + 0.0722 * a[2]; };
  const ground = e => { while (e) { const b = getComputedStyle(e).backgroundColor;
    if (b && b !== 'rgba(0, 0, 0, 0)' && b !== 'transparent') return b; e = e.parentElement; } return 'white'; };
  let worst = [99, ''];
  const all = 'main label, main span, main p, main h1, main th, main td, main button, textarea';
  for (const e of document.querySelectorAll(all)) {
    if (!(e.innerText || e.value || '').trim() || !e.getClientRects().length || e.closest('[aria-hidden]')) continue;
    const a = light(getComputedStyle(e).color), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.className + ' ' + (e.innerText || e.value).slice(0, 40)];
  }
  return worst;
})()"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with page_of_sizes(all_sizes(tmp_path_factory.mktemp("sizes"))) as (_, found):
        yield found


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser(str(find_chromium())) as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1440])
def test_everything_has_a_name_and_fits(tab: Tab, address: str, width: int, tmp_path: Path) -> None:
    tab.open(address, width=width)
    tab.wait_for(DONE)
    tab.screenshot(tmp_path / f"sizes-{width}.png")
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert tab.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.getBoundingClientRect().right <= innerWidth)"
    )
    names = tab.evaluate(LABELS)
    assert all(name.strip() for name in names)
    said = "\n".join(names)
    for label in ("Size", "Prompt", "Text to judge by", "New tokens", "Compare", "Full size", "Chosen size"):
        assert label in said
    ratio, where = tab.evaluate(PALE)
    assert ratio >= 4.5, where
    assert [url for url in tab.requested() if not url.startswith((address, "data:"))] == []


def test_the_button_compares_the_size_that_was_typed(tab: Tab, address: str) -> None:
    tab.open(address, width=800)
    tab.wait_for(DONE)
    assert "size 0.8" in tab.evaluate("document.querySelector('table').innerText")
    tab.evaluate("""(() => {
      const box = document.querySelector('input[type=number]');
      Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(box, '0.5');
      box.dispatchEvent(new Event('input', {bubbles: true})); box.dispatchEvent(new Event('change', {bubbles: true}));
    })()""")
    tab.evaluate("[...document.querySelectorAll('button')].find(b => b.innerText.trim() === 'Compare').click()")
    tab.wait_for("document.querySelector('table').innerText.includes('size 0.5')")
    assert "0.4999" in tab.evaluate("document.querySelector('table').innerText")
