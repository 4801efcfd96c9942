"""Golden numbers of the methods of few bits: share of the outputs lost on one fixed synthetic layer, and bits a weight.

After a wanted change:  python tests/golden/test_golden_packed.py --write
"""

import json
import sys
from pathlib import Path

import pytest
from test_golden import INPUTS, OUTPUTS, layer

from spectrim.linalg.bits import VALUE_BYTES
from spectrim.methods.weights.eora import METRICS
from spectrim.methods.weights.packed import PackedMethod
from spectrim.models.walk import Layer
from spectrim.registry import make_method, method_class

FILE = Path(__file__).with_name("packed_methods.json")
COMMAND = "python tests/golden/test_golden_packed.py --write"
RANK = 4
CASES = {
    **{f"{name} {bits}": (name, {"bits": bits}) for name in ("rtn", "gptq") for bits in (2, 3, 4, 8)},
    "rtn 3 plain": ("rtn", {"bits": 3, "symmetric": True, "search": False}),
    "gptq 3 plain": ("gptq", {"bits": 3, "symmetric": True, "search": False}),
    **{f"squeezellm {bits}": ("squeezellm", {"bits": bits, "outliers": 0.02}) for bits in (2, 3, 4)},
    "squeezellm 3, dense": ("squeezellm", {"bits": 3, "outliers": 0.0, "sensitive": 0.0}),
    "squeezellm 3, k-means": ("squeezellm", {"bits": 3, "outliers": 0.0, "sensitive": 0.0, "weigh": "none"}),
    **{f"spqr {bits}": ("spqr", {"bits": bits, "outliers": 0.02, "damping": 0.01}) for bits in (2, 3, 4)},
    "spqr 3, no outliers": ("spqr", {"bits": 3, "outliers": 0.0, "damping": 0.01}),
    **{f"gqsa 4, {share:g}": ("gqsa", {"sparsity": share}) for share in (0.0, 0.25, 0.5)},
    **{f"gqsa 4, 0.5, {word}": ("gqsa", {"saliency": word}) for word in ("later", "weights")},
    "gqsa 4, 0.5, layer": ("gqsa", {"balance": "layer"}),
    "eora 2:4, wanda": ("eora", {"base": "2:4", "pruner": "wanda"}),
    **{
        f"eora {base}, {metric}": ("eora", {"base": base, "metric": metric})
        for base in ("2:4", "2:4+rtn4", "rtn2", "gptq3")
        for metric in METRICS
    },
}


def measured(label: str) -> dict[str, float]:
    """Of the base, and with a correction of rank 4 where the method has one."""
    name, options = CASES[label]
    grouped = {"group_size": 8} if "group_size" in method_class(name).__dataclass_fields__ else {}
    method = make_method(name, options={**grouped, **options})
    assert isinstance(method, PackedMethod)
    weight, stats = layer()
    assert stats.gram is not None
    gram = stats.gram
    base = method.store_of(weight, stats, weight.dtype).matrix().detach()
    shape = Layer(name="golden", block=0, outputs=OUTPUTS, inputs=INPUTS, has_bias=False)
    missing = {"base": weight - base}
    factors = method.correction(missing["base"], stats, RANK)
    if factors is not None:
        missing["corrected"] = missing["base"] - factors.left @ factors.right
    whole = (weight @ gram * weight).sum()
    found = {key: float(f"{float((m @ gram * m).sum() / whole):.6g}") for key, m in missing.items()}
    return found | {"bits": method.account(shape).bits_a_weight(OUTPUTS * INPUTS)}


def golden() -> dict[str, dict[str, float]]:
    return json.loads(FILE.read_text(encoding="utf-8"))["relative_error"]


@pytest.mark.golden
@pytest.mark.parametrize("label", CASES)
def test_errors_are_the_recorded_ones(label):
    assert golden()[label] == pytest.approx(measured(label), rel=1e-5), f"if wanted: {COMMAND}"


@pytest.mark.golden
def test_recorded_errors_are_in_the_order_that_theory_demands():
    table = golden()
    assert set(table) == set(CASES)
    for bits in (2, 3, 4, 8):
        assert table[f"gptq {bits}"]["base"] < table[f"rtn {bits}"]["base"]
    for base in ("2:4", "2:4+rtn4", "rtn2", "gptq3"):
        eora, *others = (table[f"eora {base}, {metric}"]["corrected"] for metric in METRICS)
        assert eora < min(others) < table[f"eora {base}, eora"]["base"]
    for name in ("spqr", "squeezellm"):
        errors = [table[f"{name} {bits}"]["base"] for bits in (2, 3, 4)]
        assert errors == sorted(errors, reverse=True)
        assert table[f"{name} 3"]["base"] < table["rtn 3"]["base"]
    assert table["spqr 3"]["base"] < table["spqr 3, no outliers"]["base"]
    assert table["squeezellm 3, k-means"]["bits"] == table["squeezellm 3, dense"]["bits"] == 3 + 8 * 16 / INPUTS
    losses = [table[f"gqsa 4, {share}"]["base"] for share in ("0", "0.25", "0.5")]
    assert table["gqsa 4, 0"] == table["gptq 4"]
    assert losses == sorted(losses)
    assert table["gqsa 4, 0.5"]["base"] < table["gqsa 4, 0.5, weights"]["base"]
    assert table["eora 2:4, eora"]["base"] < table["eora 2:4, wanda"]["base"]
    assert table["eora 2:4, eora"]["bits"] == 9 == 16 * 9 / (8 * VALUE_BYTES)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: {COMMAND}")
    about = f"Written by `{COMMAND}`. Layer {OUTPUTS} x {INPUTS}, groups of 8, corrections of rank {RANK}, float64."
    content = {"about": about, "relative_error": {label: measured(label) for label in CASES}}
    FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
