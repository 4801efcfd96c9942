"""What each form of the one budget is worth on a model: predicted losses with and without it, how often it is chosen.

    python benchmarks/menu.py --model FOLDER --windows 32 --length 256 --out results
    python benchmarks/menu.py --model FOLDER --probe 0.134 0.2 --out results     # and KL, by stand-ins

Nothing is coded: losses are those of linalg/predicted.py, stand-ins those of engines/probe.py, judged on other text
than the statistics were measured on. Written after every size: menu.json.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.forms import Menu, full_menu
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import frozen, measure
from spectrim.engines.probe import WINDOWS, Noise, Probed, corrected, corrections, evolve_forms
from spectrim.linalg.allocate import Options
from spectrim.linalg.columns import inverse_root
from spectrim.linalg.knapsack import settle, total_error
from spectrim.linalg.metric import shrink
from spectrim.linalg.predicted import Measured
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers, weight_of
from spectrim.report.facts import environment
from spectrim.stats import Stat

KEEPS = (0.1, 0.134, 0.2, 0.26, 0.35, 0.5, 0.75)
MENUS: dict[str, Any] = {
    "codes of 1 to 4 and 8 bits": lambda form: form.kind in ("codes", "dense") and form.code.bits not in (5, 6),
    "codes": lambda form: form.kind in ("codes", "dense"),
    "codes, entries": lambda form: form.kind in ("codes", "dense", "entries"),
    "codes, low rank": lambda form: form.kind in ("codes", "dense", "factor", "pivot"),
    "codes, corrections": lambda form: form.kind in ("codes", "dense", "correction"),
    "all": lambda _form: True,
}


def only(menu: Menu, wanted: Any) -> Menu:
    """A part of a menu."""
    kept = [k for k, form in enumerate(menu.forms) if wanted(form)]
    return Menu([menu.forms[k] for k in kept], Options(menu.options.error[kept], menu.options.cost[kept]))


def at_size(menus: list[Menu], budget: int) -> dict[str, Any]:
    """Predicted losses of all menus, and what the whole one chooses."""
    found: dict[str, Any] = {}
    for name, wanted in MENUS.items():
        parts = [only(menu, wanted) for menu in menus]
        options = [part.options for part in parts]
        chosen = settle(options, budget)
        found[name] = total_error(options, chosen.choice)
        if name == "all":
            forms = [part.forms[k] for part, k in zip(parts, chosen.choice, strict=True)]
            found |= {"gap": chosen.gap, "kinds": Counter(form.kind for form in forms),
                      "forms": Counter(form.label for form in forms)}  # fmt: skip
    return found


def main() -> None:
    """Every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--keep-bytes", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--probe", type=float, nargs="*", default=[], help="sizes at which stand-ins are judged too")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--offspring", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    source = resolve(args.model)
    dense = load_dense(source, pick_device(args.device))
    walk, tokenizer = find_layers(dense), load_tokenizer(source.folder)
    cut = {"length": args.length}
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, count=args.windows, seed=0, **cut
    ).ids
    judged = evaluation_windows(load_texts(args.text, split="evaluation"), tokenizer, count=16, **cut).ids
    stats = measure(dense, walk, ids, frozenset({Stat.GRAM, Stat.OUTPUT_GRAD}))
    clock = time.perf_counter()
    measured = []
    for layer in walk.layers:
        gram, outputs = stats[layer.name].get(Stat.GRAM), stats[layer.name].get(Stat.OUTPUT_GRAD)
        weight = weight_of(dense.get_submodule(layer.name)).detach().double()
        measured.append(Measured(weight, gram, inverse_root(gram), shrink(outputs, 0.2)))
    menus = [full_menu(layer, own, args.window) for layer, own in zip(walk.layers, measured, strict=True)]
    facts: dict[str, Any] = {"environment": environment(), "settings": {k: str(v) for k, v in vars(args).items()},
                             "seconds_of_menus": time.perf_counter() - clock, "rows": [], "probes": []}  # fmt: skip

    def write() -> None:
        (args.out / "menu.json").write_text(json.dumps(facts, indent=1))

    for keep in args.keep_bytes:
        facts["rows"].append({"keep": keep, **at_size(menus, int(2 * keep * walk.numbers))})
        row = facts["rows"][-1]
        print(keep, {name: round(row[name], 5) for name in MENUS}, dict(row["kinds"]), flush=True)
        write()
    names = [layer.name for layer in walk.layers]
    for keep in args.probe:
        noises = {name: Noise(own, i) for i, (name, own) in enumerate(zip(names, measured, strict=True))}
        probed, budget = Probed(dense, skeleton(dense), names, noises, menus), int(2 * keep * walk.numbers)
        first = settle([menu.options for menu in menus], budget).choice
        by_kind = corrections(probed, walk, first, ids[-WINDOWS:])
        choices = {"predicted": first, "probed": settle(corrected(menus, walk, by_kind), budget).choice}
        choices["evopress"] = evolve_forms(
            probed, first, budget, ids, generations=args.generations, offspring=args.offspring, seed=0
        )
        with frozen(dense):
            kls = {name: probed.kl(dict(zip(names, ks, strict=True)), judged) for name, ks in choices.items()}
        facts["probes"].append({"keep": keep, "corrections": by_kind, "kl": kls})
        print(keep, facts["probes"][-1], flush=True)
        write()


if __name__ == "__main__":
    main()
