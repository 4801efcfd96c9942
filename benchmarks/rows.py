"""The rows of compare.py: every method as it is run there, in groups; and how a benchmark goes on after a bad row."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spectrim.linalg.codebook import CODEBOOK_BITS
from spectrim.linalg.quantise import BITS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method as it is run here; `cost` in words is in `spectrim methods`."""

    label: str
    method: str
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    recover: tuple[str, ...] = ()


def eora_options(base: str) -> dict[str, Any]:
    """Groups of 128 do not divide the kept half of the reference model's 384 inputs."""
    return {"base": base, "group_size": 64} if base.startswith("2:4+") else {"base": base}


TIME_IS_UP = "not started: the time was up"


def attempted(work: Callable[[], dict[str, Any]], until: float = float("inf")) -> dict[str, Any]:
    """What `work` finds; {"error": why} where it fails, or where `until` (of time.time) came before it was begun.

    One row that fails must not take the others along; where it failed is printed to stderr.
    """
    if time.time() > until:
        return {"error": TIME_IS_UP}
    try:
        return work()
    except Exception as error:  # whatever it is, it belongs into the row
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


GROUPS: dict[str, list[Row]] = {
    "closed-form": [
        Row(label="svd", method="svd"),
        Row(label="asvd", method="asvd"),
        Row(label="fwsvd", method="fwsvd"),
        Row(label="fwsvd, outputs weighed", method="fwsvd", options={"weigh": "outputs"}),
        Row(label="tfwsvd", method="tfwsvd"),
        Row(label="svd-llm", method="svd-llm"),
        Row(label="svd-llm, update=sequential", method="svd-llm", options={"update": "sequential"}),
        Row(label="svd-llm, pivot", method="svd-llm", options={"storage": "pivot"}),
        Row(label="afm", method="afm"),
        Row(label="lord", method="lord"),
        Row(label="welore", method="welore"),
        Row(label="zero-sum", method="zero-sum"),
        Row(label="mpifa", method="mpifa"),
        Row(label="basis-sharing", method="basis-sharing"),
        Row(label="basis-sharing, pooled", method="basis-sharing", options={"fit": "pooled"}),
        Row(label="basis-sharing, drifted", method="basis-sharing", options={"fit": "drifted"}),
        Row(label="basis-sharing, groups of 4", method="basis-sharing", options={"group_size": 4}),
        Row(label="two-sided", method="two-sided"),
        Row(label="dsformer", method="dsformer"),
        Row(label="dsformer, straight-through", method="dsformer", options={"solver": "straight-through"}),
        Row(label="compactifai", method="compactifai"),
        Row(label="compactifai, uniform", method="compactifai", options={"allocation": "uniform"}),
        Row(label="soco fast", method="soco", preset="fast"),
        Row(label="slicegpt", method="slicegpt"),
        Row(label="slicegpt, not turned", method="slicegpt", options={"basis": "variance"}),
        Row(label="modegpt", method="modegpt"),
        Row(label="modegpt, uniform", method="modegpt", options={"allocation": "uniform"}),
        Row(label="modegpt, magnitude", method="modegpt", options={"allocation": "uniform", "rule": "magnitude"}),
    ],
    "bits": [  # keep is a share of bytes; the bits of rtn and gptq do not follow it
        Row(label="trellis", method="trellis"),
        Row(label="trellis, no drift", method="trellis", options={"propagate": 0.0}),
        Row(label="trellis, all the drift", method="trellis", options={"propagate": 1.0}),
        Row(label="trellis, rows alike", method="trellis", options={"output_shrinkage": 1.0}),
        *(Row(label=f"{name} {b}", method=name, options={"bits": b}) for name in ("rtn", "gptq") for b in BITS),
        *(
            Row(label=f"{name} {bits}, plain", method=name, options={"bits": bits, "search": False, "symmetric": True})
            for name in ("rtn", "gptq")
            for bits in (2, 3, 4)
        ),
        *(
            Row(label=f"eora on {base}, {metric}", method="eora", options=eora_options(base) | {"metric": metric})
            for base in ("2:4", "2:4+rtn4", "rtn2", "rtn3", "rtn4", "gptq2", "gptq3", "gptq4")
            for metric in ("svd", "diagonal", "eora")
        ),
        *(
            Row(label=f"gptq {bits}, groups of {size}", method="gptq", options={"bits": bits, "group_size": size})
            for bits in (2, 3, 4)
            for size in (16, 32)
        ),
        *(Row(label=f"squeezellm {bits}", method="squeezellm", options={"bits": bits}) for bits in CODEBOOK_BITS),
        *(
            Row(label=f"squeezellm {bits}, {label}", method="squeezellm", options={"bits": bits, **options})
            for bits in CODEBOOK_BITS
            for label, options in (
                ("dense", {"sensitive": 0.0, "outliers": 0.0}),
                ("dense, k-means", {"sensitive": 0.0, "outliers": 0.0, "weigh": "none"}),
            )
        ),
        *(Row(label=f"spqr {bits}", method="spqr", options={"bits": bits}) for bits in (2, 3, 4)),
        *(
            Row(label=f"spqr {bits}, {label}", method="spqr", options={"bits": bits, **options})
            for bits in (2, 3, 4)
            for label, options in (("no outliers", {"outliers": 0.0}), ("searched", {"search": True}))
        ),
        Row(
            label="spqr 4, damped less, searched", method="spqr", options={"bits": 4, "damping": 0.1, "search": True}
        ),
        Row(
            label="spqr 4, damped less, searched, sequential",
            method="spqr",
            options={"bits": 4, "damping": 0.1, "search": True, "sequential": True},
        ),
        *(Row(label=f"gqsa 4, {p} %", method="gqsa", options={"sparsity": p / 100}) for p in (25, 42, 50, 60)),
        *(
            Row(label=f"gqsa 4, 50 %, {label}", method="gqsa", options=options)
            for label, options in (
                ("no zeros", {"symmetric": True}),
                ("of the layer", {"balance": "layer"}),
                ("later columns' cost", {"saliency": "later"}),
                ("weights' cost", {"saliency": "weights"}),
            )
        ),
        *(Row(label=f"lq-lora, rank_bits {b}", method="lq-lora", options={"rank_bits": b}) for b in (0.0, 0.25, 0.5)),
        *(
            Row(label=f"lq-lora, {solver}, rank_bits {b}", method="lq-lora", options={"solver": solver, "rank_bits": b})
            for solver in ("columns",)
            for b in (0.0, 0.1, 0.25, 0.5)
        ),
        Row(label="lq-lora, columns, trained", method="lq-lora", preset="trained", options={"solver": "columns"}),
        Row(label="lq-lora, not weighed", method="lq-lora", options={"weigh": "none"}),
        Row(label="lq-lora, one form", method="lq-lora", options={"allocation": "uniform"}),
        Row(label="lq-lora, trained", method="lq-lora", preset="trained"),
        *(
            Row(label=f"int2.1 on {base}, {start}", method="int2.1", options={"base": base, "start": start})
            for base in ("rtn2", "gptq2")
            for start in ("eora", "svd", "lora")
        ),
    ],
    "bits-trained": [  # the same recovery for the best method of few bits and for its rival
        Row(label="trellis, kl:300", method="trellis", recover=("kl:300",)),
        *(
            Row(label=f"gptq {bits}, kl:300", method="gptq", options={"bits": bits}, recover=("kl:300",))
            for bits in (4, 3, 2)
        ),
    ],
    "searched": [
        Row(label="svd-llm, global", method="svd-llm", options={"allocation": "global"}),
        Row(label="svd-llm, sensitivity", method="svd-llm", options={"allocation": "sensitivity"}),
        Row(label="svd-llm, evopress", method="svd-llm", options={"allocation": "evopress"}),
        Row(label="two-sided, evopress", method="two-sided", options={"allocation": "evopress"}),
    ],
    "storages": [
        Row(label=f"{label}, storage={storage}", method=method, preset=preset, options={"storage": storage})
        for label, method, preset in (("svd-llm", "svd-llm", None), ("soco fast", "soco", "fast"))
        for storage in ("factor", "pivot", "shared", "shared-pivot", "best")
    ],
    "trained": [
        Row(label="soco balanced", method="soco", preset="balanced"),
        Row(label="soco best", method="soco", preset="best"),
        Row(label="svd-llm, block:25", method="svd-llm", recover=("block:25",)),
        Row(label="welore, kl:300", method="welore", recover=("kl:300",)),
        Row(label="svd-llm, kl:300", method="svd-llm", recover=("kl:300",)),
        Row(label="dsformer, trained", method="dsformer", preset="trained"),
        Row(label="compactifai, healed", method="compactifai", preset="healed"),
        Row(label="lpaf, 300 + 300 steps", method="lpaf"),
        Row(label="svd, kl:600", method="svd", recover=("kl:600",)),
        Row(label="acip, 1000 steps", method="acip", options={"target": "dense"}),
    ],
}  # fmt: skip
