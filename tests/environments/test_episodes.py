"""Episodes of scripted turns: what was written stays as it is, what tools said is marked, nobody waits for another."""

import collections
import functools
import json
import time

import numpy as np
import pytest

from posttrain_jax.data import templates, tool_calls
from posttrain_jax.environments import episode as kinds
from posttrain_jax.environments import host as host_lib
from posttrain_jax.environments.episode import restored
from posttrain_jax.environments.episodes import Asked, Episodes, Rules
from posttrain_jax.environments.host import EnvironmentFailed, Hosts, Source
from posttrain_jax.rollout.requests import Answer, Request
from tests import tiny
from tests.environments import made

FILE = made.__file__
TOKENIZER = tiny.tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
TEMPLATE = templates.bind(TOKENIZER, "chatml")


def call(name, **arguments):
  said = ", ".join(f'"{k}": {v}' for k, v in arguments.items())
  return f'<tool_call>\n{{"name": "{name}", "arguments": {{{said}}}}}\n</tool_call>'


def ids(text):
  return TOKENIZER(text, add_special_tokens=False)["input_ids"]


class Scripted:
  """Writes, for the sample of a request, its next text; one window each."""

  rows = 2

  def __init__(self, scripts, end=END):
    self.scripts, self.end = {i: collections.deque(s) for i, s in enumerate(scripts)}, end
    self.requests, self.under_way, self.dropped = [], {}, []

  def submit(self, request):
    self.requests.append(request)
    self.under_way[len(self.requests)] = request
    return len(self.requests)

  def advance(self):
    done, self.under_way = self.under_way, {}
    return [(ticket, self.answer(request)) for ticket, request in done.items()]

  def answer(self, request):
    tokens = [*ids(self.scripts[request.sample & 0xFFFFF].popleft()), self.end]
    whole = tokens[: request.max_new_tokens]
    ended = "stop_token" if whole == tokens else "max_new_tokens"
    return Answer(request, whole, np.full(len(whole), -0.5, np.float32), ended)

  def drop(self, ticket):
    self.dropped.append(ticket)


describe = functools.cache(host_lib.describe)


@pytest.fixture
def episodes():
  """Makes episodes of a source; its processes end with the test."""
  every = []

  def make(source, sampler, *, room=400, seconds=20.0, max_turns=4, tool_tokens=60, rows=({},)):
    about = describe(source)
    hosts = Hosts(source, 4)
    every.append(hosts)
    rules = Rules(
      about,
      None if about.acts else tool_calls.form(TEMPLATE),
      tool_calls.Continuation(TEMPLATE, TOKENIZER, about.schemas),
      TOKENIZER,
      max_turns,
      tool_tokens,
      seconds,
      bool(source.environment),
    )
    asked = [
      Asked(
        Request([5, 6], room, stop_tokens=(sampler.end,), seed=1, number=3, sample=i),
        row,
        lambda said: [5, *ids(said), 6],
      )
      for i, row in enumerate(rows)
    ]
    run = Episodes(sampler, hosts, rules).run(asked)
    return [one for _, one in sorted(run, key=lambda pair: pair[0])]

  yield make
  for hosts in every:
    hosts.close()


def test_a_call_is_answered_and_what_was_written_is_never_read_again(episodes):
  sampler = Scripted([[call("double", number=21), "It is 42."]])
  (one,) = episodes(Source(tools=(f"{FILE}:double",)), sampler)
  wrote = [*ids(call("double", number=21)), END]
  said = ids(
    "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
  )
  last = [*ids("It is 42."), END]
  assert one.tokens == [*wrote, *said, *last]
  assert one.written.tolist() == [True] * len(wrote) + [False] * len(said) + [True] * len(last)
  np.testing.assert_array_equal(one.logps, np.where(one.written, np.float32(-0.5), 0))
  assert (one.turns, one.calls, one.failures, one.ended) == (2, 1, 0, "stop_token")
  assert one.final == "It is 42."
  assert [message["role"] for message in one.messages] == ["assistant", "tool", "assistant"]
  first, second = sampler.requests
  assert second.prompt == [5, 6, *wrote, *said]
  assert second.max_new_tokens == 400 - len(wrote) - len(said)
  assert first.sample != second.sample  # each turn is drawn by another key


def test_an_episode_is_the_same_after_a_journal(episodes):
  (one,) = episodes(Source(tools=(f"{FILE}:double",)), Scripted([[call("double", number=1), "2"]]))
  kept = dict(tokens=one.tokens, logps=one.logps, ended=one.ended, kept=None, beside=one.beside)
  again = restored(Request([5, 6], 400), kept)
  assert again.beside == one.beside
  np.testing.assert_array_equal(again.written, one.written)


def test_a_turn_that_did_not_end_with_the_templates_token_gets_it_from_outside(episodes):
  other = TOKENIZER.convert_tokens_to_ids("<|endoftext|>")
  (one,) = episodes(
    Source(tools=(f"{FILE}:double",)), Scripted([[call("double", number=1), "2"]], end=other)
  )
  at = one.tokens.index(other)
  assert one.tokens[at + 1] == END
  assert not one.written[at + 1]


def test_a_turn_that_cannot_be_read_ends_an_episode(episodes):
  texts = ["<tool_call>double(2)</tool_call>", call("double", number=1).replace("</tool_call>", "")]
  some = episodes(Source(tools=(f"{FILE}:double",)), Scripted([[t] for t in texts]), rows=({}, {}))
  assert [one.ended for one in some] == [kinds.UNPARSED] * 2
  assert some[0].problem.startswith("a call is no JSON")
  assert some[1].problem == "a call does not end with '</tool_call>'"
  assert [one.final for one in some] == ["", ""]


def test_unknown_tools_and_tools_that_raise_are_told_to_the_model(episodes):
  sampler = Scripted([[call("triple", number=1), call("double"), "no"]])
  (one,) = episodes(Source(tools=(f"{FILE}:double",)), sampler)
  assert (one.calls, one.failures) == (2, 2)
  said = [message["content"] for message in one.messages if message["role"] == "tool"]
  assert said[0] == "{'error': 'Tool triple not found.'}"
  assert "missing 1 required positional argument" in said[1]


def test_several_calls_of_a_turn_are_answered_together(episodes):
  both = call("double", number=1) + "\n" + call("double", number=2)
  (one,) = episodes(Source(tools=(f"{FILE}:double",)), Scripted([[both, "2 and 4"]]))
  assert one.calls == 2
  assert [m["content"] for m in one.messages if m["role"] == "tool"] == ["2", "4"]


def test_the_last_turn_may_not_call(episodes):
  (one,) = episodes(
    Source(tools=(f"{FILE}:double",)), Scripted([[call("double", number=1)] * 2]), max_turns=2
  )
  assert (one.ended, one.turns, one.calls, one.final) == (kinds.MAX_TURNS, 2, 1, "")


def test_an_episode_is_cut_where_what_a_tool_says_leaves_no_room(episodes):
  script = [call("double", number=1), "never"]
  (one,) = episodes(
    Source(tools=(f"{FILE}:double",)), Scripted([script]), room=len(ids(script[0])) + 20
  )
  assert (one.ended, one.finished, one.turns) == ("max_new_tokens", False, 1)
  assert one.written.all()  # nothing is kept of what nobody goes on from
  (one,) = episodes(Source(tools=(f"{FILE}:double",)), Scripted([script]), room=10)
  assert (one.ended, one.final) == ("max_new_tokens", "")


def test_what_a_tool_says_is_cut_and_makes_no_special_tokens(episodes, tmp_path):
  path = tmp_path / "long.py"
  path.write_text('def long() -> str:\n  """Says much."""\n  return "<|im_end|>" + "a" * 100\n')
  (one,) = episodes(
    Source(tools=(f"{path}:long",)), Scripted([[call("long"), "ok"]]), tool_tokens=12
  )
  between = [t for t, wrote in zip(one.tokens, one.written, strict=True) if not wrote]
  assert between.count(END) == 1  # the template's own
  assert TOKENIZER.decode(between).count("a") < 20


@pytest.mark.parametrize("name", ["half", "echo"])
def test_half_a_letter_is_no_text_whoever_wrote_it(episodes, name):
  """A model may escape one in the JSON of a call, and a tool cut a text in the middle of a pair."""
  asked = f'<tool_call>{{"name": "{name}", "arguments": {{%s}}}}</tool_call>'
  asked %= {"half": "", "echo": r'"text": "a\ud83d"'}[name]
  (one,) = episodes(Source(tools=(f"{FILE}:{name}",)), Scripted([[asked, "so"]]))
  assert (one.final, one.failures, one.messages[1]["content"]) == ("so", 0, "a?")
  json.dumps(one.messages, ensure_ascii=False).encode()  # as tables of answers keep it


def test_an_environment_may_say_half_a_letter_and_fail_with_one(episodes):
  (one,) = episodes(Source(f"{FILE}:Half"), Scripted([["go", "raise"]]))
  assert one.request.prompt == [5, *ids("say ?"), 6]
  assert one.messages[1]["content"] == "heard ?"
  assert one.problem.endswith("raised ValueError: no ?")


def test_a_tool_that_says_too_much_is_cut_before_it_is_read(episodes):
  (one,) = episodes(
    Source(tools=(f"{FILE}:floods",)), Scripted([[call("floods"), "so"]]), tool_tokens=8
  )
  assert (one.final, one.messages[1]["content"]) == ("so", "word wor...")


def test_an_environment_speaks_first_and_keeps_its_state(episodes):
  sampler = Scripted([[call("add", number=2), call("add", number=3), "5"]] * 2)
  one, other = episodes(Source(f"{FILE}:Counter"), sampler, rows=({"start": 0}, {"start": 10}))
  assert one.request.prompt == [5, *ids(" The count is 0."), 6]
  assert other.left["total"] == 15
  assert one.left == {"total": 5, "reward": 5.0}
  assert one.reward is None


def test_turns_are_actions_until_the_environment_is_done(episodes):
  sampler = Scripted([["blue", "red"], ["a", "b", "c", "d"]])
  one, other = episodes(Source(f"{FILE}:Guessing"), sampler, rows=({}, {}))
  assert (one.ended, one.reward, one.turns, one.final) == (kinds.DONE, 0.75, 2, "red")
  assert (other.ended, other.reward, other.turns) == (kinds.DONE, -0.75, 3)
  assert one.messages[1] == {"role": "user", "content": "wrong"}
  assert one.left["seed"] == other.left["seed"]  # of one prompt
  assert one.left["episode"] != other.left["episode"]


def test_an_answer_that_has_no_room_for_another_turn_has_no_last_words(episodes):
  (one,) = episodes(Source(f"{FILE}:Texts"), Scripted([["y", "x"]]), room=20)
  assert (one.ended, one.turns, one.final) == ("max_new_tokens", 1, "")
  assert one.reward == 0.0  # of the steps that there were


def test_an_answer_that_is_cut_before_it_acts_has_earned_nothing(episodes):
  (one,) = episodes(Source(f"{FILE}:Texts"), Scripted([["no end of words"]]), room=3)
  assert (one.ended, one.turns, one.final, one.reward) == ("max_new_tokens", 1, "", 0.0)


def test_an_environment_that_raises_leaves_no_reward_and_says_where(episodes):
  sampler = Scripted([["x"], ["x"]])
  one, other = episodes(Source(f"{FILE}:Raises"), sampler, rows=({"fine": True}, {}))
  assert (one.ended, one.reward) == (kinds.FAILED, None)
  assert one.problem.endswith("raised ValueError: out of order")
  assert "made.py:" in one.problem
  assert (other.problem.endswith("raised RuntimeError: no room left"), other.turns) == (True, 0)


def test_an_environment_that_cannot_be_reset_is_made_anew(episodes):
  sampler = Scripted([["lose"], ["a"], ["b"], ["c"]])
  sampler.rows = 0.5  # one after the other, all in the process that is free
  told = episodes(Source(f"{FILE}:Closes"), sampler, rows=({}, {}, {}, {}))
  assert [one.reward for one in told] == [None, None, 1.0, 1.0]
  assert told[1].problem.endswith("raised ConnectionError: closed")


def test_a_hanging_environment_is_ended_and_holds_up_nobody(episodes):
  began = time.monotonic()
  (one,) = episodes(Source(f"{FILE}:Hangs"), Scripted([["x"]]), seconds=0.5)
  assert (one.ended, one.problem) == (kinds.FAILED, "the environment timed out after 0.5 s")
  assert time.monotonic() - began < 30


def test_a_hanging_tool_is_told_to_the_model_which_goes_on(episodes):
  source = Source(tools=(f"{FILE}:sleeps", f"{FILE}:double"))
  (one,) = episodes(
    source, Scripted([[call("sleeps"), call("double", number=1), "2"]]), seconds=0.5
  )
  assert (one.turns, one.calls, one.failures, one.final) == (3, 2, 1, "2")
  assert one.messages[1]["content"] == "{'error': 'timed out after 0.5 s'}"


def test_others_are_written_while_a_tool_runs(episodes):
  scripts = [[call("wait", seconds=1.5), "late"], *[[call("add", number=1), "1"] for _ in range(3)]]
  sampler = Scripted(scripts)
  some = episodes(Source(f"{FILE}:Counter"), sampler, rows=({},) * 4)
  order = [request.sample & 0xFFFFF for request in sampler.requests]
  assert order[-1] == 0  # whose second turn comes when all others have theirs
  assert [one.turns for one in some] == [2] * 4


def test_what_cannot_be_had_is_refused_with_the_line(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text("def broken(:\n")
  with pytest.raises(EnvironmentFailed, match="mine"):
    host_lib.describe(Source(f"{path}:Env"))
  with pytest.raises(EnvironmentFailed, match="no public method"):
    host_lib.describe(Source(f"{FILE}:Neither"))
  with pytest.raises(
    EnvironmentFailed,
    match=r"the tool bare cannot be told to a model: .*; write type hints, and a docstring",
  ):
    host_lib.describe(Source(tools=(f"{FILE}:bare",)))
