"""Ends with 1 when a lower bound of pyproject.toml is not the version installed here: a bound that nobody tried.

For an environment that was made with the lowest versions: `python lower_bounds.py EXTRA`, the extra that was installed.
"""

import sys
from importlib.metadata import distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

installed = {canonicalize_name(package.metadata["Name"]): Version(package.version) for package in distributions()}
declared = [Requirement(text) for text in requires("depthmup") or []]


def is_asked_for(bound: Requirement, extras: set[str]) -> bool:
    return bound.marker is None or any(bound.marker.evaluate({"extra": extra}) for extra in extras)


extras, known = set(sys.argv[1:]), set[str]()
while extras != known:  # an extra may ask for others
    known = set(extras)
    extras |= {
        extra for bound in declared if bound.name == "depthmup" and is_asked_for(bound, known) for extra in bound.extras
    }
bounds = [bound for bound in declared if bound.name != "depthmup" and is_asked_for(bound, extras)]
wrong = {
    f"{bound.name}: pyproject.toml has {bound.specifier}, the lowest that can be installed is {installed[name]}"
    for bound in bounds
    if (name := canonicalize_name(bound.name)) in installed
    for specifier in bound.specifier
    if Version(specifier.version) != installed[name]
}
sys.exit("\n".join(sorted(wrong)) or 0)
