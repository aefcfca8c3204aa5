"""config.reward, and the command-line options that stand for it."""

import json

import ml_collections
import pytest

from posttrain_jax.build import scoring
from posttrain_jax.configs import common
from posttrain_jax.rewards.verifier import Answer
from posttrain_jax.settings import ConfigError


def test_a_config_and_the_options_make_the_same_reward(tmp_path):
  sections = {"reward": common.reward("number+exact"), "holdout_reward": common.reward("")}
  config = ml_collections.ConfigDict(sections)
  config.reward.weights, config.reward.gates = (1.0, 0.5), ("tags",)
  config.reward.options = {"tags": {"names": ["answer"]}}
  path = tmp_path / "reward.json"
  path.write_text(
    json.dumps(
      {
        "parts": "number,exact",
        "weights": [1, 0.5],
        "gates": ["tags"],
        "options": {"tags": {"names": ["answer"]}},
      }
    )
  )
  one, held_out = scoring.make(config, ["prompt", "gold"])
  assert held_out is None
  other = scoring.of(scoring.spec(str(path)), ["prompt", "gold"])
  answers = [Answer("?", text, {"gold": "4"}) for text in ("4", "<answer>4</answer>")]
  assert [scored.total.value for scored in one.score(answers).answers] == [0.0, 1.0]
  assert other.score(answers).answers == one.score(answers).answers


def test_names_on_the_command_line():
  spec = scoring.spec("number, length", "tags", untested="number", unsafe_code=True)
  assert spec["untested"] == ("number",)
  assert (spec["parts"], spec["gates"], spec["unsafe_code"]) == (
    ("number", "length"),
    ("tags",),
    True,
  )


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ('{"part": ["number"]}', "reward.part: there is no such field; there are parts, weights"),
    ("[1]", "holds no object of fields"),
    ("{", "Expecting property name"),
    ('{"parts": ["number"], "retries": -1}', r"reward.retries=-1: it is a count"),
    ('{"parts": ["number"], "retries": 1.0}', r"reward.retries=1.0: it is a count"),
    ('{"parts": [1]}', r"reward.parts=\[1\]: it is a list of names"),
    (
      '{"parts": ["tags"], "options": {"tags": {"names": [1]}}}',
      r"tags has names=\[1\]; it is a text or a list",
    ),
    (
      '{"parts": ["schema"], "options": {"schema": {"schema": {"$schema": 5}}}}',
      r"its \$schema is 5, not an address",
    ),
  ],
)
def test_a_file_that_describes_no_reward(tmp_path, text, said):
  path = tmp_path / "reward.json"
  path.write_text(text)
  with pytest.raises(ConfigError, match=said):
    scoring.of(scoring.spec(str(path)), ["gold"])


def test_a_column_that_the_data_lacks():
  with pytest.raises(
    ConfigError, match="python reads the columns tests, or test_list, or test and"
  ):
    scoring.of(scoring.spec("python"), ["prompt", "entry_point"])


def test_scores_go_by_the_fields_of_their_section_and_by_its_files(tmp_path):
  file, folder = tmp_path / "mine.py", tmp_path / "model"
  folder.mkdir()
  spec = {"parts": (f"{file}:right", str(folder)), "retries": 1}
  seen = set()
  for content, weights, changes in [("1", "a", {}), ("2", "a", {}), ("2", "ab", {})] + [
    ("2", "ab", {"retries": 2})
  ]:
    file.write_text(content)
    (folder / "model.safetensors").write_text(weights)
    seen.add(scoring.identity(spec | changes))
  assert len(seen) == 4
  assert scoring.identity(spec | {"retries": 2}) in seen


@pytest.mark.parametrize(
  ("spec", "message"),
  [
    ({"parts": "number,length", "options": {"length": {"longest": 9, "soft": 2}}}, "length may"),
    ({"parts": "number,exact", "weights": (1.0, -0.5)}, "exact may make negative"),
    ({"parts": "judge", "options": {"judge": {"url": "http://x", "model": "m"}}}, "ranges="),
  ],
)
def test_a_mean_that_is_divided_by_is_of_no_reward_below_0(spec, message):
  with pytest.raises(ConfigError, match=message):
    scoring.check_not_negative(scoring.of(spec, ["gold"]))
  scoring.check_not_negative(scoring.of({"parts": "number", "gates": "tags"}, ["gold"]))


@pytest.mark.parametrize(
  ("told", "instead"),
  [
    ("write '--config.reward.untested=a.py:f'", ""),
    ("reward.untested: 'g' is no part", ""),
    ("reward.options: f", '; options is a field of --reward=FILE.json, as {"parts": ["a.py:f"], "options": {...}}'),
    ("say reward.unsafe_code=true in a run", ""),
    ("reward: there is no 'f'", ""),
  ],
)  # fmt: skip
def test_fields_are_told_as_commands_without_a_config_take_them(told, instead):
  with pytest.raises(ConfigError) as error, scoring.told_of_files({"parts": ("a.py:f",)}):
    raise ConfigError(told)
  for field in ("reward.unsafe_code=true", "--config.reward.untested"):
    told = told.replace(field, f"--{field.partition('=')[0].rpartition('.')[2]}")
  assert str(error.value) == told + instead


def test_a_verifier_that_changes_on_the_way_is_noted_with_its_step(tmp_path):
  """Every change of it once; a run that begins again has none behind it."""
  verifier, path = tmp_path / "mine.py", tmp_path / "config.json"
  section = {"parts": ["exact", f"{verifier}:f"], "gates": [f"{verifier}:g"]}
  config = ml_collections.ConfigDict({"reward": section, "holdout_reward": {"parts": []}})
  path.write_text(json.dumps({"command": "train"}))

  def goes_on(step, text):
    verifier.write_text(text)
    return scoring.note_changes(tmp_path, config, step)

  said = [goes_on(*at) for at in ((0, "a"), (5, "a"), (5, "b"), (7, "b"), (9, "c"))]
  assert [bool(text) for text in said] == [False, False, True, False, True]
  assert f"{verifier} has changed since this run scored with it: from step 5 on" in said[2]
  written = json.loads(path.read_text())
  assert [at["step"] for at in written["rescored"]] == [5, 9]
  assert written["command"] == "train"
  assert goes_on(0, "d") == ""
  assert "rescored" not in json.loads(path.read_text())
