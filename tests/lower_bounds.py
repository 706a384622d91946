"""Ends with 1 when a lower bound of pyproject.toml is not the version installed here: a bound that nobody tried.

For an environment that was made with the lowest versions. Packages of extras that are not installed are left out.
"""

import sys
from importlib.metadata import distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

installed = {canonicalize_name(package.metadata["Name"]): Version(package.version) for package in distributions()}
bounds = [Requirement(text) for text in requires("depthmup") or []]
wrong = {
    f"{bound.name}: pyproject.toml has {bound.specifier}, the lowest that can be installed is {installed[name]}"
    for bound in bounds
    if (name := canonicalize_name(bound.name)) in installed and name != "depthmup"
    for specifier in bound.specifier
    if Version(specifier.version) != installed[name]
}
sys.exit("\n".join(sorted(wrong)) or 0)
