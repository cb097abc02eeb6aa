"""The migration page's Python, from top to bottom."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"


@pytest.mark.torch
def test_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) == 15
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})
