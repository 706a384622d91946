"""Numbers as tables and sentences show them."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

WIDTH = 80  # columns of the terminal that text is wrapped to


def wrap_line(text: str) -> str:
    """A sentence in lines of at most WIDTH columns; paths and options stay whole."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def join_with_and(parts: Sequence[str]) -> str:
    """'7', '7 and 4', '7, 4 and 9'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def show_size(record: Mapping[str, Any]) -> str:
    """Of a report's record: '32 x 3', and '32 x 3, batch 256' in a study with that axis."""
    others = ("num_experts", "batch", "samples")
    more = (f", {axis.removeprefix('num_')} {record[axis]}" for axis in others if record.get(axis))
    return f"{record['width']} x {record['depth']}{''.join(more)}"


def show_seeds(seeds: Iterable[int]) -> str:
    """'0, 1, 4', and '0 to 5, 7' where more than two follow each other."""
    ordered = sorted(set(seeds))
    parts = []
    for _, follow in groupby(enumerate(ordered), lambda each: each[1] - each[0]):
        run = [str(seed) for _, seed in follow]
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else run
    return ", ".join(parts)


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
    """A share of the loss: '0.3 %', '12 %', '0 %' for less than a twentieth of a per cent; beyond ten times the loss no
    number says more than another: 'over 1000 %'."""
    percent = 100 * share
    if percent > 1000:
        return "over 1000 %"
    return f"{percent:.0f} %" if percent >= 9.95 or percent < 0.05 else f"{percent:.1f} %"


def show_bound(share: float) -> str:
    """An upper bound of such a share, never rounded to nothing: '0.1 %' for all below it but 0."""
    return show_share(max(share, 0.001) if share > 0 else share)


def show_close_bound(share: float) -> str:
    """With two digits, as it may lie close to a limit that decides: '0.54 %'."""
    return show_share(share) if share >= 0.1 else f"{100 * share:.2g} %"


def show_times(factor: float) -> str:
    """Of a cost: '0.35', '4.5', '15', '1500' with 'times one run' behind it."""
    return f"{factor:.3g}" if factor < 1000 else f"{float(f'{factor:.3g}'):.0f}"


def show_cost(share: float, of: str = "") -> str:
    """What something costs beside `of`: '0.35 % of one run', '15 times one run'; '0.35 %' and '15 times' in a column
    that says of what."""
    if share < 9.995:
        return f"{100 * share:.3g} %" + (f" of {of}" if of else "")
    return f"{show_times(share)} times {of}".rstrip()


def show_shares(found: tuple[float, float] | None) -> str:
    """An interval of such shares: '0 to 0.3 %'."""
    if not found:
        return ""
    low, high = found
    return f"{show_share(low).removesuffix(' %')} to {show_bound(high)}"


def show_number(value: float | None) -> str:
    """A loss with three digits; '' for none, 'fails' for an infinite one."""
    if value is None or math.isnan(value):
        return ""
    return "fails" if math.isinf(value) else f"{value:.3g}"


def show_quantity(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def show_power(value: float) -> str:
    """0.015625 -> '2^-6', as the report writes it; '0.01' where the exponent is not round."""
    exponent = math.log2(value)
    return f"2^{exponent:.4g}" if abs(exponent * 4 - round(exponent * 4)) < 1e-9 else f"{value:.4g}"


def show_duration(seconds: float) -> str:
    """'42 s', '3 min 05 s' or '2 h 10 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
