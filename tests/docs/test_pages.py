"""The tables of the pages are those that the code gives, so that they can be read before anything is built."""

import re

import pytest

from docs import pages
from posttrain_jax import settings
from posttrain_jax.settings import fields
from tests.docs.printed import ROOT

TABLES = pages.tables()


@pytest.mark.parametrize("page", TABLES)
def test_a_table_is_the_codes(page):
  written = (ROOT / "docs" / page).read_text()
  assert written == pages.made(written, TABLES[page]), "run make docs"
  assert written.count("\n| ") > 50


def listed():
  return re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "fields.md").read_text(), re.MULTILINE)


def test_the_page_has_every_field_once():
  assert sorted(listed()) == sorted(fields.FIELDS)


@pytest.mark.parametrize("config", settings.shipped_names())
def test_the_page_has_every_field_of_a_shipped_config(config):
  names = [name for name, _ in fields.items(settings.load(config).to_dict())]
  there = listed()
  assert [name for name in names if fields.known_as(name) not in there] == []
