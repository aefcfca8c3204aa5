"""Processes of environments that are used again."""

import contextlib
import os
import signal

from posttrain_jax.environments import host
from posttrain_jax.environments.host import Hosts, Source
from tests.environments import made


def answered(one, verb, *arguments):
  one.ask(verb, *arguments, seconds=30.0)
  while (said := one.reply()) is None:
    host.wait([one])
  return said


def test_a_process_that_died_while_nobody_had_it_is_given_to_nobody():
  with contextlib.closing(Hosts(Source(tools=(f"{made.__file__}:double",)), 1)) as hosts:
    first = hosts.take()
    assert first is not None
    assert answered(first, "describe")["schemas"]
    hosts.give_back(first)
    os.kill(first.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
    second = hosts.take()
    assert second is not None
    assert "schemas" in answered(second, "describe")
    assert second is not first
    assert first.process.replies.closed
