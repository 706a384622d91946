"""The documentation: a site that needs no other host, and what it says of the code is what the code does."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from depthmup.models.parameterization import TABLE, Formula, Role

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    specification = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


class Sources(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = given.get("src") or (given.get("href") if tag == "link" and given.get("rel") != "canonical" else None)
        self.found += [fetched] if fetched else []


def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", str(DOCS), str(tmp_path)]
    built = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    pages = {path: path.read_text() for path in tmp_path.glob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= {path.name for path in pages}
    fetched = {source for page in pages.values() for source in Sources(page).found}
    assert len(fetched) > 5
    assert not [source for source in fetched if re.match(r"(https?:)?//", source)]
    styles = "".join(path.read_text() for path in tmp_path.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)]*", styles)
    articles = "".join(
        page.split("<article")[1].split("</article>")[0] for page in pages.values() if "<article" in page
    )
    assert not re.findall(r"<!-- \w+ -->|\.\. \w+::", articles)  # what was to be filled in, and was not


def test_every_key_has_its_type_default_and_words(generated: ModuleType) -> None:
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in generated.keys().splitlines() if "| `" in line]
    keys = [row[0].strip("`") for row in rows]
    assert {"optimizer.role_lr.input", "study.values.per_octave", "data.root", "launch.nodes", "seed"} <= set(keys)
    assert not [row for row in rows if len(row) != 4 or not all(cell.strip() for cell in row)]
    found = {row[0].strip("`"): row for row in rows}
    assert found["optimizer.lr"][1:3] == ["number above 0", "**needed**"]
    assert found["schedule.warmup"][1:3] == ["number from 0, below 1", "`0.1`"]
    assert found["train.pack"][3].endswith("*(not in the hash)*")
    assert "not in the hash" not in found["train.samples"][3]


def test_a_comment_or_the_docstring_says_what_a_key_does(generated: ModuleType) -> None:
    @dataclasses.dataclass
    class Section:
        """Of the test.

        both, one: of the docstring, in
        two lines.
        """

        one: int = 1  # beside it
        # above it,
        # in two lines
        two: int = 2
        both: int = 3
        none: int = 4

    assert generated.comments(Section) == {"one": "beside it", "two": "above it, in two lines"}
    assert generated.entries(Section) == (
        "Of the test.",
        {"both": "of the docstring, in two lines.", "one": "of the docstring, in two lines."},
    )


@pytest.mark.parametrize("role", Role)
def test_the_table_of_rules_is_that_of_the_code(generated: ModuleType, role: Role) -> None:
    """A cell, read back as powers, gives the factor that the code gives."""

    def value(cell: str, N: float, L: float, alpha: float) -> float:
        formula = re.sub(r"<sup>(.*?)</sup>", r"**(\1)", cell.replace("&alpha;", "*alpha").replace("<sup>*", "<sup>"))
        formula = formula.replace("(-*alpha", "(-alpha").replace(" L", " * L")
        return float(eval(formula, {"N": N, "L": L, "alpha": alpha}))

    formulas: dict[str, Formula | None] = vars(TABLE[role])
    for name, formula in formulas.items():
        cell = generated.describe_formula(formula)
        if formula is None:
            assert cell == "as AdamW"
        else:
            assert value(cell, 2.0, 3.0, 0.7) == pytest.approx(formula(2.0, 3.0, 0.7)), (role, name)
        assert f"`{role.value}`" in generated.rules()


def test_a_rule_that_is_no_product_of_powers_is_refused(generated: ModuleType) -> None:
    with pytest.raises(ValueError, match="no product of powers"):
        generated.describe_formula(lambda N, L, a: N + L)
