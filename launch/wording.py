"""Numbers as a report's tables and sentences show them."""

import math


def show_drift(octaves: float) -> str:
    """'-1.2', and '+0.0' for what rounds to nothing."""
    return f"{octaves if abs(octaves) >= 0.05 else 0.0:+.1f}"


def show_interval(found: tuple[float, float]) -> str:
    """Octaves: '-1.2 to +0.3', or 'below -1.2' where one side is open."""
    low, high = map(show_drift, found)
    if math.isinf(found[0]) and math.isinf(found[1]):
        return "unknown"
    if math.isinf(found[0]):
        return f"below {high}"
    return f"above {low}" if math.isinf(found[1]) else f"{low} to {high}"


def show_share(share: float) -> str:
    """A share of the loss: '0.3 %', '12 %', '0 %' for less than a twentieth of a per cent."""
    percent = 100 * share
    return f"{percent:.0f} %" if percent >= 9.95 or percent < 0.05 else f"{percent:.1f} %"


def show_shares(found: tuple[float, float] | None) -> str:
    """An interval of such shares: '0 to 0.3 %'."""
    if not found:
        return ""
    low, high = map(show_share, found)
    return f"{low.removesuffix(' %')} to {high}"


def show_number(value: float | None) -> str:
    """A loss with three digits; '' for none, 'fails' for an infinite one."""
    if value is None or math.isnan(value):
        return ""
    return "fails" if math.isinf(value) else f"{value:.3g}"
