"""`spectrim plan`: what `compress` would do with the same flags."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli_options import Deterministic, Json, ShardWeights
from spectrim.cli_request import asks
from spectrim.cli_shard import ShardOption
from spectrim.shard import parse_shard
from spectrim.terminal import emit, print_table, stdout

if TYPE_CHECKING:
    from spectrim.request import Request


World = Annotated[int, typer.Option("--world", help="plan for each of so many processes of torchrun", min=1)]


@asks
def plan(
    request: "Request",
    deterministic: Deterministic = False,
    shard_weights: ShardWeights = None,
    shard: ShardOption = None,
    world: World = 1,
    json_: Json = False,
) -> None:
    """Say what `compress` would do, without touching a weight."""
    del deterministic, shard_weights  # they are in the request
    configured = request.check()  # before transformers is imported: a mistake is told at once
    part = None if shard is None else parse_shard(shard)
    from spectrim.byte_budget import settled
    from spectrim.engines.plan import estimate
    from spectrim.engines.plan_spread import Part
    from spectrim.integrations.folder import COMPANIONS
    from spectrim.job import foresee_all
    from spectrim.models.load import pick_device, pick_dtype, resolve
    from spectrim.reproducible import deterministic as only_deterministic
    from spectrim.shard_job import accepted

    source = resolve(request.model)
    if part is not None:
        accepted(request)
    request = settled(request, configured, source)
    foresee_all(request, configured, source)
    copied = [source.folder / name for name in COMPANIONS]
    with only_deterministic(request.deterministic):
        facts = estimate(
            source, configured, request, dtype=pick_dtype(request.dtype, source.dtype),
            device=pick_device(request.device), part=Part(world, part),
            companions=sum(path.stat().st_size for path in copied if path.is_file()),
        )  # fmt: skip
    emit(facts, json_, lambda: show_plan(facts))


def show_plan(facts: Mapping[str, Any]) -> None:
    """The table of layers and what the whole run takes."""
    rows = [
        [
            r["name"],
            "x".join(map(str, r["shape"])),
            r["codec"],
            str(r["rank"] or ("all" if facts["any_size"] else "by calibration")),
            f"{r['dense']:,}",
        ]
        for r in facts["layers"]
    ]
    title = f"{facts['model']}, {facts['method']['method']}, keep {facts['keep']:g}"
    print_table(title, ["layer", "shape", "codec", "rank", "dense numbers"], rows)
    for part in ("linear_numbers", "linear_bytes", "model_numbers", "model_bytes"):
        after = facts[part]["after"]
        told = "counted in bytes" if after is None else f"{after:,}"
        stdout.print(f"{part:18} {facts[part]['before']:>16,} -> {told}")
    for where, peak in (facts["peak_memory_bytes"] or {}).items():
        stdout.print(f"{'peak memory, ' + where:18} about {peak / 2**30:.2f} GiB")
    stdout.print(f"{'disk':18} {facts['disk_bytes'] / 2**20:.1f} MiB")
    if facts["scratch_bytes"]:
        stdout.print(f"{'scratch files':18} {facts['scratch_bytes'] / 2**20:.1f} MiB in OUT.resume, while it runs")
    stages = sorted(facts["seconds_by_stage"].items(), key=lambda pair: -pair[1])
    most = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages[:4])
    if facts["seconds"] is None:
        stdout.print(f"{'time':18} not known for method {facts['method']['method']}; the rest of the run: {most} s")
    else:
        stdout.print(f"{'time':18} about {facts['seconds']:.0f} s on {facts['device']} ({most})")
    for note in facts["notes"]:
        stdout.print(f"note: {note}")
    for row in facts["untouched"]:
        stdout.print(f"untouched: {row['name']} ({row['numbers']:,} numbers): {row['why']}")
