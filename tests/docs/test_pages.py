"""The tables of the pages are those that the code gives, so that they can be read before anything is built."""

import pytest

from docs import pages
from tests.docs.printed import ROOT

TABLES = pages.tables()


@pytest.mark.parametrize("page", TABLES)
def test_a_table_is_the_codes(page):
  written = (ROOT / "docs" / page).read_text()
  assert written == pages.made(written, TABLES[page]), "run make docs"
  assert written.count("\n| ") > 50
