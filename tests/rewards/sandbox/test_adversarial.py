"""Programs that do harm, cheat or try to get out: each has the verdict it should, and the host is as before."""

import concurrent.futures
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from posttrain_jax.rewards import sandbox
from posttrain_jax.rewards.sandbox import slots, tree
from tests.marks import slow
from tests.rewards.sandbox import attacks, here

ROOT = Path(__file__).parents[3]
# Those that wait until a limit is reached have a second each.
PATIENT = {
  "fork bomb",
  "threads without end",
  "memory in many processes",
  "ignoring every signal",
  "a huge integer",
  "busy children",
  "closing all",
  "a busy loop",
}
FEW = [
  "memory in one process",
  "a flood on stdout",
  "an __eq__ that is always true",
  "sockets",
  "ptrace",
]


def cases():
  for isolation in ("bubblewrap", "landlock"):
    for name, attack in attacks.ATTACKS.items():
      if attack.expected(isolation) is not None:
        fast = name not in PATIENT if isolation == "bubblewrap" else name in FEW
        case = (isolation, name)
        yield pytest.param(*case, id=f"{isolation}: {name}") if fast else slow(*case)


def state(folder):
  """Of the host, what a program could have changed: files, processes, descriptors, memory."""
  return dict(
    files={p.name: (p.read_bytes(), p.stat().st_mode) for p in sorted(folder.iterdir())},
    processes=sorted(tree.below(os.getpid())[1:]) + of_slots(),
    descriptors=len(os.listdir("/proc/self/fd")),
  )


def of_slots():
  """Processes of the uids that this process gives to sandboxes, where it is root's."""
  found = []
  for process in Path("/proc").iterdir():
    try:
      if process.name.isdigit() and process.stat().st_uid in slots.shared().uids:
        found.append(int(process.name))
    except FileNotFoundError:
      continue
  return found


@pytest.fixture
def host(tmp_path, monkeypatch):
  """A folder that anybody may write to, and a secret in the environment; both, and all else, are as before."""
  monkeypatch.setenv(attacks.CANARY, "1")
  (tmp_path / "canary").write_text("alive")
  for path in (tmp_path, tmp_path / "canary"):
    path.chmod(0o777)
  sandbox.probe()
  slots.shared()
  before, memory = state(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield tmp_path
  assert state(tmp_path) == before
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10


@pytest.mark.parametrize(("isolation", "name"), [*cases()])
def test_an_attack_has_its_verdict_and_does_no_harm(isolation, name, host):
  here.needs(isolation)
  outcome = attacks.run(attacks.ATTACKS[name], isolation)
  assert not attacks.complaint(attacks.ATTACKS[name], outcome, isolation)
  assert len(outcome.stdout) <= attacks.LIMITS.output


@pytest.mark.parametrize("isolation", ["bubblewrap", "landlock"])
def test_the_hosts_folders_are_not_written_and_hardly_read(isolation, host):
  here.needs(isolation)
  code = f"""
    import os
    for do in (
      lambda: open({str(host)!r} + "/canary").read(),
      lambda: open({str(host)!r} + "/canary", "w"),
      lambda: open({str(host)!r} + "/harm", "w"),
      lambda: os.unlink({str(host)!r} + "/canary"),
      lambda: os.chmod({str(host)!r} + "/canary", 0),
      lambda: os.truncate({str(host)!r} + "/canary", 0),
      lambda: os.utime({str(host)!r} + "/canary"),
      lambda: os.rename({str(host)!r} + "/canary", {str(host)!r} + "/harm"),
      lambda: os.link({str(host)!r} + "/canary", {str(host)!r} + "/harm"),
      lambda: os.symlink({str(host)!r} + "/canary", {str(host)!r} + "/harm"),
      lambda: os.mkfifo({str(host)!r} + "/harm"),
      lambda: os.listdir({str(host)!r}),
      lambda: os.setxattr({str(host)!r} + "/canary", "user.x", b"1"),
    ):
      try: do()
      except OSError: continue
      print("OUT:", do.__code__.co_names)
  """
  attack = attacks.Attack(code, ("ended",), stdout=b"")
  assert not attacks.complaint(attack, attacks.run(attack, isolation), isolation)


def test_what_searches_for_expected_values_finds_them_where_they_are(host):
  """The searches above are no good if they find nothing even here."""
  here.needs("bubblewrap")
  attack = attacks.CHEATS["expected values from memory"]
  planted = f'KEPT = "assert answer(2) == {attacks.SECRET!r}"\n'
  code = planted + textwrap.dedent(attack.code)
  outcome = sandbox.run(code, tests=attack.tests, limits=attacks.LIMITS)
  assert outcome.verdict == "passed"


def test_two_at_once_have_a_budget_of_processes_each(host):
  here.needs("bubblewrap")
  code = """
    import os, time
    count = 0
    try:
      while count < 100:
        if not os.fork(): time.sleep(60); os._exit(0)
        count += 1
    except OSError: pass
    time.sleep(0.5)
    print(count)
  """
  attack = attacks.Attack(code, ("ended",))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    counts = [
      int(outcome.stdout)
      for outcome in pool.map(lambda _: attacks.run(attack, "bubblewrap"), range(2))
    ]
  assert all(10 <= count <= 14 for count in counts), counts


def another_users_python():
  """A Python that any user of this machine can start, or a reason why there is none."""
  if os.geteuid() or shutil.which("setpriv") is None:
    pytest.skip("only root can become another user, with setpriv of util-linux")
  command = ["setpriv", "--reuid=65500", "--regid=65500", "--clear-groups"]
  # twice, since the first start is with root's rights
  tried = "import os, subprocess, sys; os.listdir({!r}); subprocess.run([sys.executable, '-c', ''], check=True)"
  for python in (sys.executable, "/usr/bin/python3"):
    probe = [
      *command,
      python,
      "-c",
      tried.format(str(ROOT)) + "; assert sys.version_info >= (3, 11)",
    ]
    if subprocess.run(probe, capture_output=True).returncode == 0:
      return [*command, python, "-B"]
  pytest.skip("no Python >= 3.11 that another user may start, or this folder is closed to others")


@pytest.mark.parametrize(
  ("isolation", "names"),
  [("bubblewrap", FEW), slow("bubblewrap", []), slow("landlock", [])],
)
def test_attacks_on_a_user_who_is_not_root(isolation, names, host):
  here.needs(isolation)
  command = [*another_users_python(), "-m", "tests.rewards.sandbox.attacks", isolation, *names]
  result = subprocess.run(
    command, capture_output=True, text=True, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout) == {}


@pytest.mark.parametrize("isolation", ["bubblewrap", slow("landlock")])
def test_a_killed_caller_leaves_nothing_running(isolation, host):
  here.needs(isolation)
  code = (
    "from posttrain_jax.rewards import sandbox; sandbox.run('import time; time.sleep(1000)', isolation="
    f"'{isolation}')"
  )
  wanted = 4 if isolation == "bubblewrap" else 3  # the caller, bubblewrap, the judge, the program
  caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
  for _ in range(200):
    if len(started := tree.below(caller.pid)) >= wanted:
      break
    time.sleep(0.05)
  assert len(started) == wanted
  caller.kill()
  caller.wait()
  for _ in range(100):
    if not any(Path(f"/proc/{pid}").exists() for pid in started):
      break
    time.sleep(0.05)
  assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
