"""Numbers as configurations write them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

POWER = re.compile(r"\s*([+-]?[\d.]+)\s*(?:\*\*|\^)\s*([+-]?[\d.]+)\s*")
FRACTION = re.compile(r"\s*([+-]?[\d.]+)\s*/\s*([\d.]+)\s*")


def parse_number(value: Any) -> Any:
    """'2**-9' -> 2^-9, '-1/3' -> -1/3 and '1e-3' -> 0.001 (YAML reads them as text). Anything else is passed on."""
    if isinstance(value, str):
        try:
            if parts := POWER.fullmatch(value):
                return float(parts[1]) ** float(parts[2])
            if parts := FRACTION.fullmatch(value):
                return float(parts[1]) / float(parts[2])
            return float(value)
        except (ValueError, ArithmeticError):  # text; 10**999
            return value
    return value


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(gt=0)]
