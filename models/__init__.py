"""What is trained, and how it scales: `models.apply` for a network of your own, `models.build.build` for the families.

Names are loaded at first use, so that reading a configuration (models.config) needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthmup.models.build import ScaledModel, apply, build_scaled
    from depthmup.models.config import Size
    from depthmup.models.discovery.find import find_roles
    from depthmup.models.discovery.show import roles_code, roles_table
    from depthmup.models.errors import ModelError
    from depthmup.models.family import Init, ParameterRule, Roles, Slot
    from depthmup.models.optimizer import build_optimizer, parameter_groups
    from depthmup.models.optimizer_config import OptimizerConfig
    from depthmup.models.parameterization import Role
    from depthmup.models.parameterization_config import ParameterizationConfig

HOME = {
    "ScaledModel": "build",
    "apply": "build",
    "build_scaled": "build",
    "find_roles": "discovery.find",
    "roles_code": "discovery.show",
    "roles_table": "discovery.show",
    "OptimizerConfig": "optimizer_config",
    "ParameterizationConfig": "parameterization_config",
    "Size": "config",
    "ModelError": "errors",
    "Slot": "family",
    "Init": "family",
    "ParameterRule": "family",
    "Roles": "family",
    "build_optimizer": "optimizer",
    "parameter_groups": "optimizer",
    "Role": "parameterization",
}
__all__ = [
    "Init",
    "ModelError",
    "OptimizerConfig",
    "ParameterRule",
    "ParameterizationConfig",
    "Role",
    "Roles",
    "ScaledModel",
    "Size",
    "Slot",
    "apply",
    "build_optimizer",
    "build_scaled",
    "find_roles",
    "parameter_groups",
    "roles_code",
    "roles_table",
]


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOME[name]}"), name)
