"""Programs that do harm, cheat, or try to get out, and what must become of each.

It imports the standard library alone, so that it also runs as another user, whose Python may have nothing else:

  python -m tests.rewards.sandbox.attacks bubblewrap [NAME ...]

writes {attack: complaint} as JSON, {} where all went well.
"""

import concurrent.futures
import dataclasses
import json
import os
import sys
import textwrap

from posttrain_jax.rewards import sandbox
from posttrain_jax.rewards.sandbox import Checks, Limits

MIB = 1 << 20
LIMITS = Limits(seconds=1, memory=160 * MIB, processes=12, files=4 * MIB, output=1 << 16)
SECRET = "expected-4711-value"  # what the tests compare with
CANARY = "POSTTRAIN_TEST_SECRET"  # an environment variable of the host's
# Ends a program that has got out, in words.
ESCAPES = """
import ctypes, os, socket, sys, fcntl, struct, signal
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
  return libc.syscall(ctypes.c_long(number), *arguments)
def reads(path):
  try:
    with open(path, "rb") as file: return file.read(1 << 20)
  except OSError: return b""
def names(folder):
  try: return os.listdir(folder)
  except OSError: return []
def out(what):
  print("OUT:", what); sys.exit(3)
ARM = os.uname().machine == "aarch64"
"""


@dataclasses.dataclass(frozen=True)
class Attack:
  """verdicts: those that are right; under Landlock `landlock`, or the same; None: it is not tried."""

  code: str
  verdicts: tuple[str, ...] | None
  landlock: tuple[str, ...] | None = ()
  tests: Checks | None = None
  stdin: bytes = b""
  stdout: bytes | None = None
  reason: str = ""

  def expected(self, isolation: str) -> tuple[str, ...] | None:
    return self.verdicts if isolation != "landlock" or self.landlock == () else self.landlock


def run(attack: Attack, isolation: str, limits: Limits = LIMITS) -> sandbox.Outcome:
  return sandbox.run(
    textwrap.dedent(attack.code),
    tests=attack.tests,
    stdin=attack.stdin,
    limits=limits,
    deadline=60,
    isolation=isolation,
  )


def complaint(attack: Attack, outcome: sandbox.Outcome, isolation: str) -> str:
  """What is wrong with an outcome; "" where nothing is."""
  said = (
    f"{outcome.verdict}: {outcome.reason}, {outcome.stdout[-300:]!r}, {outcome.stderr[-600:]!r}"
  )
  if outcome.verdict not in (attack.expected(isolation) or ()):
    return said
  if b"OUT:" in outcome.stdout or SECRET.encode() in outcome.stdout:
    return said
  if attack.stdout is not None and outcome.stdout != attack.stdout:
    return said
  return "" if attack.reason in outcome.reason else said


USED_UP = ("cpu", "waited", "memory")
RESOURCES = {
  "fork bomb": Attack(
    """
    import os
    while True:
      try: os.fork()
      except OSError: pass
    """,
    USED_UP,
  ),
  "forks are counted": Attack(
    """
    import os, time
    count = 0
    try:
      while count < 100:
        if not os.fork():
          time.sleep(60); os._exit(0)
        count += 1
    except OSError: pass
    print(4 <= count <= 14)
    """,
    ("ended",),
    landlock=None,
    stdout=b"True\n",
  ),
  "no process without namespaces": Attack(
    """
    import os, subprocess
    for start in (os.fork, lambda: os.system("true") and 1 / 0, lambda: subprocess.run(["true"])):
      try: start()
      except (OSError, ZeroDivisionError): continue
      print("OUT: started")
    """,
    None,
    landlock=("ended",),
    stdout=b"",
  ),
  "threads without end": Attack(
    """
    import threading, time
    while True: threading.Thread(target=time.sleep, args=(60,)).start()
    """,
    ("failed", "waited", "cpu"),
  ),
  "memory in one process": Attack("x = bytearray(1 << 30)", ("failed",), reason="exit code 1"),
  "memory in many processes": Attack(
    """
    import os, time
    for _ in range(4):
      if not os.fork(): break
    x = bytearray(os.urandom(1 << 20)) * 80
    time.sleep(60)
    """,
    ("memory",),
    landlock=("failed",),
  ),
  "files in /tmp": Attack(
    """
    written = 0
    try:
      for i in range(1000):
        with open(f"/tmp/{i}", "wb", buffering=0) as file: written += file.write(bytes(1 << 20))
    except OSError: pass
    print(written <= 4 << 20)
    """,
    ("ended",),
    stdout=b"True\n",
  ),
  "files in /dev/shm": Attack(
    """
    written = 0
    try:
      for i in range(1000):
        with open(f"/dev/shm/{i}", "wb", buffering=0) as file: written += file.write(bytes(1 << 20))
    except OSError: pass
    print(written <= 16 << 20)
    """,
    ("ended",),
    stdout=b"True\n",
  ),
  "files elsewhere": Attack(
    """
    import os
    library = os.path.dirname(os.__file__)
    for folder in ("/", "/dev", "/usr", "/etc", "/root", "/proc", "/sys", "/run", "/var/tmp", library):
      try: open(folder + "/harm", "w").close()
      except OSError: continue
      print("OUT:", folder)
    """,
    ("ended",),
    stdout=b"",
  ),
  "a sparse file": Attack(
    """
    import os
    with open("/tmp/sparse", "wb") as file: os.ftruncate(file.fileno(), 1 << 40)
    """,
    ("failed",),
  ),
  "a zip bomb": Attack(
    """
    import zlib
    packed = zlib.compress(bytes(1 << 20), 9)
    parts = [zlib.decompress(packed) for _ in range(1000)]
    """,
    ("failed", "memory"),
  ),
  "memory that is no process's": Attack(
    """
    import os, ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    for start in (lambda: os.memfd_create("x"), lambda: libc.shmget(0, 1 << 24, 0o1600) >= 0 or 1 / 0):
      try: start()
      except (OSError, ZeroDivisionError): continue
      print("OUT: unseen memory")
    """,
    ("ended",),
    stdout=b"",
  ),
  "a flood on stdout": Attack("while True: print('x' * 10000)", ("output",)),
  "a flood on stderr": Attack(
    "import sys\nwhile True: print('x' * 10000, file=sys.stderr)", ("output",)
  ),
  "sleep": Attack("import time; time.sleep(1000)", ("waited",)),
  "a busy loop": Attack("while True: pass", ("cpu",)),
  "a catastrophic regex": Attack(
    "import re; re.match('(a+)+$', 'a' * 40 + 'b')", ("cpu",), reason="1 s of CPU time"
  ),
  "a huge integer": Attack("9 ** 9 ** 9", ("cpu", "failed", "memory")),
  "ignoring every signal": Attack(
    """
    import signal
    for s in signal.valid_signals():
      try: signal.signal(s, signal.SIG_IGN)
      except (OSError, ValueError): pass
    while True: pass
    """,
    ("cpu",),
  ),
  "stopping itself": Attack("import os; os.kill(os.getpid(), 19)", ("waited",)),
  "stdout kept open": Attack(
    """
    import os, time
    if not os.fork(): time.sleep(1000)
    print("done")
    """,
    ("ended",),
    landlock=("failed",),
  ),
  "a daemon": Attack(
    """
    import os, time
    if not os.fork():
      os.setsid()
      if not os.fork():
        for i in range(64):
          try: os.close(i)
          except OSError: pass
        while True: time.sleep(1)
      os._exit(0)
    os.wait(); print("done")
    """,
    ("ended",),
    landlock=("failed",),
  ),
  "busy children": Attack(
    """
    import os
    for _ in range(4):
      if not os.fork():
        while True: pass
    for _ in range(4): os.wait()
    """,
    ("cpu",),
    landlock=("failed",),
  ),
}

ONE = Checks(cases=(f"assert answer(2) == {SECRET!r}",))
CHEATS = {
  "sys.exit": Attack("import sys\nanswer = 1\nsys.exit(0)", ("failed",), tests=ONE),
  "os._exit in the function": Attack(
    "import os\ndef answer(x): os._exit(0)", ("failed",), tests=ONE
  ),
  "SystemExit in a thread": Attack(
    """
    import sys, threading
    def answer(x):
      t = threading.Thread(target=sys.exit); t.start(); t.join()
    """,
    ("failed",),
    tests=ONE,
  ),
  "an __eq__ that is always true": Attack(
    """
    class Same(str):
      def __eq__(self, other): return True
      __hash__ = None
    class Any:
      def __eq__(self, other): return True
    def answer(x): return Same("?") if x == 2 else Any()
    """,
    ("failed",),
    tests=Checks(cases=(f"assert answer(2) == {SECRET!r}",)),
  ),
  "an object that is equal to all": Attack(
    "class Any:\n  def __eq__(self, other): return True\ndef answer(x): return Any()",
    ("failed",),
    tests=ONE,
  ),
  "patched builtins": Attack(
    """
    import builtins, operator, subprocess, sys
    builtins.AssertionError = builtins.Exception = builtins.BaseException = type("Never", (BaseException,), {})
    builtins.isinstance = builtins.all = builtins.any = builtins.abs = builtins.len = lambda *a: True
    operator.eq = lambda a, b: True
    subprocess.run = subprocess.Popen = lambda *a, **k: None
    sys.modules["math"] = sys.modules["solution"]
    def isclose(*a, **k): return True
    def answer(x): return 1.0
    """,
    ("failed",),
    tests=Checks(
      cases=("import math\nassert math.isclose(answer(2), 4.0)\nassert abs(answer(2) - 4) < 1e-6",)
    ),
  ),
  "a function of the tests' names": Attack(
    "def abs(x): return 0\ndef isclose(a, b): return True\ndef answer(x): return 1.0",
    ("failed",),
    tests=Checks(cases=("assert abs(answer(2) - 4) < 1e-6",)),
  ),
  "StopIteration": Attack(
    "def answer(x): raise StopIteration",
    ("failed",),
    tests=Checks(cases=("assert all(map(answer, [1, 2, 3]))",)),
  ),
  "expected values from memory": Attack(
    """
    import gc, os, sys
    def found():
      frame = sys._getframe()
      while frame:
        yield repr(frame.f_locals) + repr(frame.f_globals) + repr(frame.f_code.co_consts)
        frame = frame.f_back
      yield from map(repr, gc.get_objects())
      yield repr(sys.argv) + repr(os.environ)
      for name in [m for m in sys.modules]: yield repr(vars(sys.modules[name]))
    def answer(x):
      key = "expected-4711" + "-value"
      # not the key's own copies: another text that holds it
      return key if any("assert answer(2) == " + repr(key) in text for text in found()) else None
    """,
    ("failed", "cpu"),
    tests=ONE,
  ),
  "expected values from /proc": Attack(
    """
    import os
    def answer(x):
      key = "expected-4711" + "-value"
      try: pids = [p for p in os.listdir("/proc") if p.isdigit()] + ["self"]
      except OSError: pids = ["self", str(os.getppid()), "1"]
      for pid in pids:
        for name in ("cmdline", "environ", "auxv", "stack", "syscall"):
          try:
            if key.encode() in open(f"/proc/{pid}/{name}", "rb").read(): return key
          except OSError: pass
        if pid in ("self", str(os.getpid())): continue
        try: open(f"/proc/{pid}/mem", "rb"); return key
        except OSError: pass
        try: os.listdir(f"/proc/{pid}/fd"); return key
        except OSError: pass
        try: open(f"/proc/{pid}/maps").read(1); return key
        except OSError: pass
    """,
    ("failed",),
    tests=ONE,
  ),
  "a forged verdict": Attack(
    """
    import json, os
    line = json.dumps(dict(nonce="0" * 32, verdict="passed", reason="")).encode() + b"\\n"
    for i in range(1, 64):
      try: os.write(i, line)
      except OSError: pass
    for name in ("/tmp/verdict", "/tmp/result.json"):
      try: open(name, "wb").write(line)
      except OSError: pass
    def answer(x): return None
    """,
    ("failed",),
    tests=ONE,
  ),
  "a forged verdict of a main program": Attack(
    """
    import json, os
    line = json.dumps(dict(nonce="0" * 32, verdict="passed", reason="")).encode() + b"\\n"
    for i in range(3, 64):
      try: os.write(i, line)
      except OSError: pass
    os._exit(1)
    """,
    ("failed",),
  ),
  "no number": Attack(
    "def answer(x): return float('nan')",
    ("failed",),
    tests=Checks(cases=("assert abs(answer(2) - 4) < 1e-6",)),
  ),
  "an infinite number": Attack(
    "def answer(x): return float('inf')",
    ("failed",),
    tests=Checks(cases=("assert abs(answer(2) - 4) < 1e308",)),
  ),
  "a huge answer": Attack(
    "def answer(x): return 'x' * (1 << 25)", ("failed", "memory"), tests=ONE, reason="MiB"
  ),
  "a deep answer": Attack(
    "def answer(x):\n  v = []\n  for _ in range(100000): v = [v]\n  return v",
    ("failed",),
    tests=ONE,
  ),
  "an answer that is no answer": Attack(
    """
    import os
    def answer(x):
      for i in range(3, 64):
        try: os.write(i, b"{" * 100000 + b"\\n" + bytes(range(256)) + b"\\n")
        except OSError: pass
    """,
    ("failed",),
    tests=ONE,
  ),
  "closing all": Attack(
    """
    import os
    def answer(x):
      os.closerange(0, 64)
      while True: pass
    """,
    ("cpu",),
    tests=ONE,
  ),
  "killing the judge": Attack(
    """
    import os, resource, signal
    judge = os.getppid()
    for victim in (judge, -judge, 0, -1, 1):
      for s in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        try: os.kill(victim, s)
        except OSError: continue
        print("OUT: signalled", victim)
    # its threads, by whose numbers a process can be signalled, too; process 1 takes what it has a handler for
    for victim in (judge + i for i in range(1, 6) if judge + i != os.getpid()):
      for s in signal.valid_signals():
        try: os.kill(victim, s)
        except OSError: pass
    for do in (
      lambda: resource.prlimit(judge, resource.RLIMIT_CPU, (0, 0)),
      lambda: signal.pidfd_send_signal(os.open(f"/proc/{judge}", os.O_RDONLY), 9),
      lambda: os.sched_setaffinity(judge, [0]),
      lambda: os.setpriority(os.PRIO_PROCESS, judge, 19),
      lambda: __import__("fcntl").fcntl(0, 8, judge),
    ):
      try: do()
      except OSError: continue
      print("OUT: touched the judge")
    def answer(x): return None
    """,
    ("failed",),
    tests=ONE,
    reason="test 1 of 1",
  ),
  "NUL and bad UTF-8": Attack(
    "import sys; sys.stdout.buffer.write(b'\\0\\xff\\xfe7')", ("ended",), stdout=b"\0\xff\xfe7"
  ),
}


def escape(code: str, *, landlock: tuple[str, ...] | None = ()) -> Attack:
  return Attack(ESCAPES + textwrap.dedent(code), ("ended",), stdout=b"", landlock=landlock)


def denied(name: str, x86: int, arm: int, arguments: str = "0, 0, 0, 0, 0") -> Attack:
  """The system call fails with EPERM."""
  return escape(f"""
    if call({arm} if ARM else {x86}, {arguments}) >= 0 or ctypes.get_errno() != 1: out({name!r})
  """)


GETS_OUT = {
  "a symlink": escape("""
    for target in ("/etc/passwd", "/etc/shadow", "/proc/1/root/etc/passwd"):
      if reads(target): out(target)
      try: os.symlink(target, "/tmp/link")
      except OSError: continue
      if reads("/tmp/link"): out("symlink to " + target)
      os.unlink("/tmp/link")
  """),
  "/proc/PID/root and cwd": escape("""
    for pid in [1, os.getppid()] + [int(p) for p in names("/proc") if p.isdigit()]:
      for name in ("root/etc/passwd", "cwd/etc/passwd", "root/root", "fd/0", "mem", "environ"):
        if pid != os.getpid() and reads(f"/proc/{pid}/{name}"): out(f"/proc/{pid}/{name}")
  """),
  "inherited descriptors": escape("""
    import stat
    for i in range(3, 1024):
      try: mode = os.fstat(i).st_mode
      except OSError: continue
      # the two pipes to the judge, and without namespaces folders that hold Python
      if not stat.S_ISFIFO(mode) and not stat.S_ISDIR(mode): out(f"descriptor {i}")
      if stat.S_ISDIR(mode):
        for name in ("../../../../../etc/passwd", "../../../../../../etc/passwd", "../../../../../../../etc/passwd"):
          try: os.open(name, os.O_RDONLY, dir_fd=i); out(name)
          except OSError: pass
  """),
  "TIOCSTI": escape("""
    for i in (0, 1, 2):
      if libc.ioctl(i, 0x5412, b"x") == 0 or ctypes.get_errno() != 1: out("TIOCSTI")
    try: os.open("/dev/tty", os.O_RDWR); out("a terminal")
    except OSError: pass
  """),
  "sockets": escape("""
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
      for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
        try: socket.socket(family, kind)
        except OSError: continue
        out(f"socket {family} {kind}")
  """),
  "the environment": escape(f"""
    if {CANARY!r} in os.environ: out("environment")
    for pid in names("/proc"):
      if {CANARY.encode()!r} in reads(f"/proc/{{pid}}/environ"): out(pid)
    for path in ("/root/.bashrc", "/root/.ssh", "/home", "/etc/hostname", "/var/log", "/sys/kernel"):
      if reads(path) or names(path): out(path)
  """),
  "nested namespaces": escape("""
    for flag in (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000):
      if libc.unshare(flag) == 0: out("unshare")
      number = 220 if ARM else 56
      pid = call(number, ctypes.c_ulong(flag | 17), 0, 0, 0, 0)
      if pid == 0: os._exit(0)
      if pid > 0: out("clone")
    if call(435, bytes(88), ctypes.c_size_t(88)) >= 0 or ctypes.get_errno() != 38: out("clone3")
  """),
  "other users": escape("""
    for do, how in ((os.setuid, 0), (os.setgid, 0), (os.seteuid, 0), (os.setgroups, [0]), (os.chroot, "/tmp")):
      try: do(how)
      except OSError: continue
      out("another user")
    if os.getuid() == 0: out("root")
  """),
  "/proc/sys": escape("""
    for path in (
      "/proc/sys/kernel/core_pattern", "/proc/sys/vm/drop_caches", "/proc/sysrq-trigger", "/dev/mem", "/dev/kmsg",
      "/proc/self/oom_score_adj", "/proc/sys/user/max_user_namespaces",
    ):
      try: file = open(path, "w")
      except OSError: continue
      if "oom" not in path: out(path)
      try: file.write("-1000"); file.flush(); out("oom_score_adj")
      except OSError: pass
  """),
  "signals to others": escape("""
    import random
    own = {os.getpid()}
    for pid in [1, os.getppid()] + random.sample(range(100, 30000), 2000):
      if pid in own: continue
      try: os.kill(pid, 0)
      except OSError: continue
      out(f"signal to {pid}")
  """),
  "mount": denied("mount", 165, 40),
  "setns": denied("setns", 308, 268),
  "keyctl": denied("keyctl", 250, 219),
  "add_key": denied("add_key", 248, 217),
  "io_uring": denied("io_uring_setup", 425, 425),
  "bpf": denied("bpf", 321, 280),
  "perf_event_open": denied("perf_event_open", 298, 241),
  "userfaultfd": denied("userfaultfd", 323, 282),
  "ptrace": denied("ptrace", 101, 117),
  "process_vm_readv": denied("process_vm_readv", 310, 270, "os.getppid(), 0, 0, 0, 0, 0"),
  "personality": denied("personality", 135, 92, "ctypes.c_ulong(0x0040000)"),
  "open_by_handle_at": denied("open_by_handle_at", 304, 265),
  "pidfd_getfd": denied("pidfd_getfd", 438, 438),
}
ATTACKS = RESOURCES | CHEATS | GETS_OUT


def main(isolation: str, *wanted: str) -> dict[str, str]:
  """{attack: complaint} of all that apply, or of some."""
  os.environ[CANARY] = "1"
  names = [n for n in wanted or ATTACKS if ATTACKS[n].expected(isolation) is not None]

  def one(name):
    return complaint(ATTACKS[name], run(ATTACKS[name], isolation), isolation)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return {name: said for name, said in zip(names, pool.map(one, names)) if said}


if __name__ == "__main__":
  print(json.dumps(main(*sys.argv[1:])))
