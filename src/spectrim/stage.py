"""Names of stages for progress; one may also say which layer it is at."""


class Stage(str):
    """A stage's name, equal to the plain text, with the layer that was just done."""

    where: str = ""


def at(stage: str, where: str) -> Stage:
    """`stage`, at the layer `where`."""
    named = Stage(stage)
    named.where = where
    return named
