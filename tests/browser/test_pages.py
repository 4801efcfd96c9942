"""The pages in a real browser: nothing cut, nothing loaded, readable on a phone and on a wide screen, light and dark.

python -m pytest -m browser tests/browser --basetemp shots      also keeps the screenshots below shots/
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chromium import Tab, browser, find_chromium

from spectrim.report.compare import compare_page, read_folders
from spectrim.report.page import report_page
from spectrim.report.record import points_for, spectrum_of

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
WIDTHS = (390, 1440)
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def made_report(blocks: int = 8, **changes: Any) -> dict[str, Any]:
    """A report with everything that a page can show; its numbers are made up, and have the digits of real ones."""
    generator = torch.Generator().manual_seed(1)
    layers = []
    for block in range(blocks):
        for i, name in enumerate(NAMES):
            energy = torch.exp(-torch.linspace(0, 9 + i, 1024, dtype=torch.float64))
            rank = int(torch.randint(100, 900, (1,), generator=generator))
            kept = None if i % 3 else torch.rand(1024, generator=generator) < torch.linspace(1.0, 0.1, 1024)
            layers.append({
                "name": f"model.layers.{block}.{'self_attn' if i < 4 else 'mlp'}.{name}", "shape": [1024, 2816],
                "codec": "factor", "rank": rank, "numbers": rank * 3840,
                "spectrum": spectrum_of(energy, kept, rank, most=points_for(7 * blocks)),
            })  # fmt: skip
    text = {"source": "builtin:stdlib", "note": "windows in order", "windows": 40, "length": 512, "sha256": "0" * 64}
    return {
        "format_version": 1, "tool": "spectrim 0.1.0",
        "request": {"model": "someone/a-model-with-a-rather-long-name-0.6B-Instruct", "keep": 0.6, "method": "soco"},
        "method": {"method": "soco", "steps": 400, "storage": "pivot"},
        "source": {"name": "someone/a-model-with-a-rather-long-name-0.6B-Instruct", "numbers": 596_049_920,
                   "bytes": 1_192_099_840},
        "stored": {"keep": 0.59991, "keep_unit": "numbers", "linear_numbers_dense": 440_401_920,
                   "linear_numbers": 264_201_000, "linear_bytes_counted": 528_402_000, "model_numbers": 419_849_000,
                   "model_bytes": 839_698_000},
        "quality": {"dense": {"perplexity": 29.4712, "tokens": 20440, "window": 512},
                    "compressed": {"perplexity": 33.9123, "kl": 0.183412, "agreement": 0.78312, "tokens": 20440,
                                   "window": 512}},
        "quality_gate": {"passed": True, "factor": 100.0, "dense_perplexity": 29.4712,
                         "compressed_perplexity": 33.9123},
        "text": {"calibration": text, "training": None, "evaluation": text},
        "layers": layers,
        "forms": [
            {"form": form, "layers": layers, "weights": layers * 2_883_584, "bytes": layers * nbytes, "bits": bits}
            for form, layers, nbytes, bits in (
                ("trellis 2.5", 31, 937_168, 2.6), ("trellis 3 + low rank in trellis 4 + entries", 14, 1_297_616, 3.6),
                ("factor of trellis 3, trellis 3", 9, 540_672, 1.5), ("dense", 2, 5_767_168, 16.0),
            )
        ],
        "untouched": [{"name": "lm_head", "numbers": 155_582_464, "why": "tied to the embedding"}],
        "learning": {
            "losses": [2.0 / (1 + step / 40) + 0.05 * (step % 7) for step in range(400)],
            "keeps": [max(0.6, 1 - step / 300) for step in range(400)],
            "score_path": [[step, 1 - step / 2000, 1.0, 1 + step / 1500] for step in range(0, 401, 8)],
            "recovery": [{"step": "kl:300", "losses": [[0.4 / (1 + step / 50) for step in range(300)]]}],
        },
        "samples": [{"prompt": "The history of " * 8, "dense": "the city goes back to the founding of " * 3,
                     "compressed": "the city goes back to a time in which " * 3, "new_tokens": 32, "same_tokens": 6,
                     "decoded": True}],
        "seconds": {"load": 3.1, "calibrate": 61.2, "decompose": 12.9, "learn": 401.7, "distil": 610.0,
                    "total": 1200.4},
        "peak_memory_bytes": {"host": 9_123_456_789, "gpu": 31_123_456_789},
        "warnings": ["4096 calibration tokens for layers with up to 2816 inputs: the statistics are rank-deficient"],
        "fallbacks": [{"stage": "eigh", "from": "cusolver", "to": "CPU", "why": "did not converge"}],
        "environment": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0", "gpu": "none", "threads": "2",
                        "platform": "Linux-6.1.0-x86_64"},
        "command": ["compress", "someone/a-model-with-a-rather-long-name-0.6B-Instruct", "--keep", "0.6", "--out",
                    "small", "--calib", "a/long/path/to/some/calibration/text/that/does/not/break.txt"],
        **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser(str(find_chromium())) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of one size, of all sizes, of an older folder, and of several folders."""
    where = tmp_path_factory.mktemp("pages")
    reports = {"one": made_report(), "all-sizes": json.loads((GOLDEN / "all-sizes" / "report.json").read_text())}
    found = {}
    for name, report in reports.items():
        found[name] = where / f"{name}.html"
        found[name].write_text(report_page(report), encoding="utf-8")
    folders = []
    for i in range(5):
        folder = where / f"a-folder-with-a-long-name-{i}"
        folder.mkdir()
        stored = made_report()["stored"] | {"keep": 0.5 + i / 10, "linear_numbers": 220_000_000 + 44_000_000 * i}
        stored["linear_bytes_counted"] = 2 * stored["linear_numbers"]
        quality = {"perplexity": 45.0 - 3 * i, "kl": 0.4 - 0.07 * i, "agreement": 0.7 + 0.04 * i}
        report = made_report(blocks=3, stored=stored, quality={**made_report()["quality"], "compressed": quality})
        (folder / "report.json").write_text(json.dumps(report))
        folders.append(folder)
    found["compare"] = where / "compare.html"
    found["compare"].write_text(compare_page(read_folders(folders)), encoding="utf-8")
    return found


# What is wider than the page and not inside something that scrolls; letters too small; text on its own colour.
CUT = """[...document.querySelectorAll('body *')].filter(e => {
  if (e.closest('.scroll') && !e.classList.contains('scroll')) return false;
  const r = e.getBoundingClientRect();
  return r.width > 0 && (r.right > document.documentElement.clientWidth + 1 || r.left < -1);
}).map(e => e.tagName + '.' + (e.getAttribute('class') || '') + ' ' + (e.textContent || '').slice(0, 40))"""
SVG_CUT = """[...document.querySelectorAll('svg text')].filter(t => {
  const r = t.getBoundingClientRect(), s = t.closest('svg').getBoundingClientRect();
  return s.width > 0 && (r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1);
}).map(t => t.textContent)"""
SMALL = """[...document.querySelectorAll('svg.chart text')].map(t => {
  const s = t.closest('svg').getBoundingClientRect();
  return s.width ? parseFloat(getComputedStyle(t).fontSize) * s.width / 420 : 99;
}).reduce((a, b) => Math.min(a, b), 99)"""
CONTRAST = """(() => {
  const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour, under) => {
    c.globalAlpha = 1; c.fillStyle = under; c.fillRect(0, 0, 1, 1); c.fillStyle = colour; c.fillRect(0, 0, 1, 1);
    return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = v => { const a = v.map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * a[0] + 0.7152 * a[1] + 0.0722 * a[2]; };
  const ground = e => { while (e) { const b = getComputedStyle(e).backgroundColor;
    if (b && b !== 'rgba(0, 0, 0, 0)' && b !== 'transparent') return b; e = e.parentElement; } return 'white'; };
  let worst = [99, ''];
  const all = 'p, td, th, li, summary, caption, figcaption, b, span, pre, h1, h2, h3, svg text';
  for (const e of document.querySelectorAll(all)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const under = ground(e), style = getComputedStyle(e);
    const a = light(rgb(e instanceof SVGElement ? style.fill : style.color, under)), b = light(rgb(under, 'white'));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + ' ' + e.className + ' ' + e.textContent.trim().slice(0, 40)];
  }
  return worst;
})()"""
OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true; })"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "all-sizes", "compare"])
def test_nothing_is_cut_small_or_pale(
    tab: Tab, pages: dict[str, Path], name: str, width: int, dark: bool, tmp_path: Path
) -> None:
    tab.open(pages[name], width=width, dark=dark)
    tab.screenshot(tmp_path / f"{name}-{width}-{'dark' if dark else 'light'}.png")
    tab.evaluate(OPEN_ALL)
    assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), tab.evaluate(
        CUT
    )
    assert tab.evaluate(CUT) == []
    assert tab.evaluate(SVG_CUT) == []
    assert tab.evaluate(SMALL) >= 9.5
    ratio, where = tab.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (light == "rgb(18, 21, 24)") == dark


@pytest.mark.parametrize("name", ["one", "all-sizes", "compare"])
def test_nothing_is_loaded_and_nothing_complains(tab: Tab, pages: dict[str, Path], name: str) -> None:
    tab.open(pages[name], width=800)
    assert tab.requested() == [pages[name].resolve().as_uri()]
    complaints = [
        event["params"] for event in tab.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]
    assert complaints == []
    assert tab.evaluate("document.compatMode") == "CSS1Compat"


def test_a_script_in_a_name_does_not_run(tab: Tab, tmp_path: Path) -> None:
    text = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    report = made_report(blocks=1)
    report["source"]["name"] = report["warnings"][0] = report["samples"][0]["prompt"] = report["layers"][0]["name"] = (
        text
    )
    (tmp_path / "page.html").write_text(report_page(report), encoding="utf-8")
    tab.open(tmp_path / "page.html", width=390)
    assert tab.evaluate("document.title") != "run"
    assert tab.evaluate("document.querySelectorAll('script, img').length") == 0
    assert len(tab.requested()) == 1
    assert tab.evaluate(CUT) == []
