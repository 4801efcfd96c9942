"""Prints what an installed package needs on this machine, a line each, but for the packages named after it."""

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

package, *left_out = sys.argv[1:]
for line in requires(package) or ():
    need = Requirement(line)
    if canonicalize_name(need.name) in left_out or (need.marker and not need.marker.evaluate({"extra": ""})):
        continue
    need.marker = None
    print(need)
