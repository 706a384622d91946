"""Roles as a table to read, and as code to paste."""

from depthmup.models.family import Init, Roles, Slot


def show_init(init: Init) -> str:
    """'zeros', 'normal 0.02', 'uniform_fan_in 0.577'"""
    if init.kind == "constant":
        return {0.0: "zeros", 1.0: "ones"}.get(init.scale, f"constant {init.scale:g}")
    return f"{init.kind} {init.scale:.3g}"


def roles_table(roles: Roles) -> str:
    """One line a rule, then where multipliers sit: plain text."""
    rows = [
        (rule.pattern, rule.role.value, show_init(rule.init) + ("" if rule.decays else ", no decay"))
        for rule in roles.parameters
    ]
    rows += [(slot.output, "end of a branch", f"after {slot.last}") for slot in roles.branches]
    rows += [(slot.output, "queries", "") for slot in roles.queries]
    rows += [(name, "readout", "") for name in roles.readouts]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {role:<{widths[1]}}  {rest}".rstrip() for name, role, rest in rows)


def roles_code(roles: Roles) -> str:
    """The Roles as Python code, which needs Init, ParameterRule, Role, Roles and Slot of depthmup.models."""

    def slots(found: tuple[Slot, ...]) -> str:
        return "".join(
            f"\n        Slot(output={slot.output!r}, last={slot.last!r}, share={slot.share!r})," for slot in found
        )

    rules = "".join(
        f"\n        ParameterRule({rule.pattern!r}, Role.{rule.role.name}, "
        f"Init({rule.init.kind!r}, {rule.init.scale!r}), decays={rule.decays!r}),"
        for rule in roles.parameters
    )
    return (
        f"roles = Roles(\n    parameters=({rules}\n    ),\n    branches=({slots(roles.branches)}\n    ),\n"
        f"    readout={roles.readout!r},\n    queries=({slots(roles.queries)}\n    ),\n"
        f"    blocks={roles.blocks!r},\n"
        + (f"    more_readouts={roles.more_readouts!r},\n)\n" if roles.more_readouts else ")\n")
    )
