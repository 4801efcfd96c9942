"""report.html: everything that report.json says, as one page that a person can read, without a network or a script.

The template (templates/*.html.j2) escapes every text; figures are SVG that figures.py and layers.py write. The page's
own content policy lets it load nothing at all.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from spectrim.report import sections
from spectrim.report.forms import FORMS_HEADER
from spectrim.report.layers import heat_map, layer_rows, layers_of, spectra_by_block
from spectrim.report.reading import Facts

TEMPLATES = "spectrim.report"


@cache
def environment() -> Environment:
    """Templates of this package; everything that is not marked as safe is escaped, and nothing undefined passes."""
    made = Environment(
        loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters["figure"] = Markup  # of figures.py only
    made.filters["pairs"] = sections.pairs
    made.filters["percent"] = lambda share: f"{100 * min(max(share, 0.0), 1.0):.1f}%"
    made.tests["value"] = lambda cell: isinstance(cell, sections.Value)
    return made


def _template(name: str) -> str:
    return (files(TEMPLATES) / "templates" / name).read_text(encoding="utf-8")


def report_page(report: Mapping[str, Any], where: str = "the report") -> str:
    """The page of one folder, of any kind and of any version that wrote a report.json."""
    facts = Facts(dict(report), where)
    name = facts.text("source", "name") or facts.text("exported_from") or "a model"
    size = default_size(facts)
    layers = layers_of(facts, size)
    every = {key: layers_of(facts, key) for key in sizes_of(facts)}
    return environment().get_template("report.html.j2").render(
        title=f"{name} {described(facts)}",
        name=name,
        method=facts.text("method", "method") or "an unnamed method",
        tool=facts.text("tool") or "spectrim",
        facts=facts,
        any_size=bool(every),
        size=size,
        layers=layers,
        heat=heat_map(layers),
        spectra=spectra_by_block(layers),
        forms_header=FORMS_HEADER,
        layer_table=layer_rows(layers, every),
        tiles=tiles(facts),
        warnings=facts.texts("warnings"),
        fallbacks=[sections.pairs(row) for row in facts.rows("fallbacks")],
        **{part.__name__: part(facts) for part in PARTS},
    )  # fmt: skip


PARTS = (
    sections.quality, sections.size_quality, sections.budget, sections.forms, sections.frontier, sections.training,
    sections.samples, sections.times, sections.texts, sections.verdict, sections.command,
)  # fmt: skip


def described(facts: Facts) -> str:
    """What became of the model, in a few words."""
    sizes = sizes_of(facts)
    if sizes:
        return f"in all sizes from {sizes[-1]} to 1"
    keep = facts.number("stored", "keep")
    keep = facts.number("request", "keep") if keep is None else keep
    return "compressed" if keep is None else f"at keep {keep:.4f}"


def sizes_of(facts: Facts) -> list[str]:
    """The sizes of a folder that holds all, as its layers name them; descending."""
    found = [row.number("size") for row in facts.rows("sizes")]
    return [f"{size:g}" for size in sorted((s for s in found if s is not None), reverse=True)]


def default_size(facts: Facts) -> str | None:
    """The measured size at or below the default one; None of a folder of one size."""
    sizes = sizes_of(facts)
    keep = facts.number("request", "keep")
    below = [size for size in sizes if keep is None or float(size) <= keep]
    return (below or sizes or [None])[0]


def tiles(facts: Facts) -> list[dict[str, Any]]:
    """The figures that matter most, at the top of the page."""
    found: list[dict[str, Any]] = []
    dense, small = facts.number("quality", "dense", "perplexity"), facts.number("quality", "compressed", "perplexity")
    if dense is not None and small is not None:
        found.append({"name": "perplexity", "from": sections.perplexity(dense), "to": sections.perplexity(small)})
    for key, name in (("kl", "KL to dense"), ("agreement", "same top token")):
        value = facts.number("quality", "compressed", key)
        if value is not None:
            found.append({"name": name, "from": None, "to": sections.plain(value, ".4f" if key == "kl" else ".1%")})
    before, after = facts.number("source", "bytes"), facts.number("stored", "model_bytes")
    if before is not None and after is not None:
        pair = [sections.Value(sections.amount(n), n) for n in (before, after)]
        found.append({"name": "bytes in all", "from": pair[0], "to": pair[1]})
    total = facts.number("seconds", "total")
    if total is not None:
        found.append({"name": "time", "from": None, "to": sections.Value(sections.span(total), total)})
    return found
