"""What is said of inputs that no calibration token reached."""

from collections.abc import Mapping

from spectrim.processes import present
from spectrim.stats import Stats


def dead_inputs(stats: Mapping[str, Stats]) -> list[str]:
    """One warning that counts the layers with inputs that were 0 for every token; their columns are cut at will.

    Of several processes each has `stats` of its own layers; the warning is of all.
    """
    dead: dict[str, tuple[int, int]] = {}
    for name, own in stats.items():
        sizes = own.mean_abs if own.gram is None else own.gram.diagonal()
        if sizes is not None and not bool(sizes.all()):
            dead[name] = (int((sizes == 0).sum()), len(sizes))
    dead = {name: counts for own in present().objects(dead) for name, counts in own.items()}
    if not dead:
        return []
    name, (count, total) = next(iter(dead.items()))
    return [
        f"{len(dead)} layers have inputs that are 0 for every calibration token (first {name}: {count} of {total}); "
        "what they do to other text is not kept"
    ]
