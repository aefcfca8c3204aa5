"""Built-in shapes have the published numbers of parameters."""

import pytest

from posttrain_jax.core import tree
from posttrain_jax.models import decoder
from posttrain_jax.models.shapes import SHAPES

# as the index of each model's files counts them; Gemma's with pictures without the tower and the projector
PUBLISHED = {
  "llama2-7b": 6_738_415_616,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "gemma3-270m": 268_098_176,
  "gemma3-1b": 999_885_952,
  "gemma3-4b": 4_300_079_472 - 416_866_032 - 1152 * 2561,
  "gemma3-12b": 12_187_325_040 - 416_866_032 - 1152 * 3841,
  "gemma3-27b": 27_432_406_640 - 416_866_032 - 1152 * 5377,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name):
  assert tree.size(decoder.abstract(SHAPES[name])) == PUBLISHED[name]
