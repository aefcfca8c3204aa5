"""Numbers of Linux system calls, {name: (x86_64, aarch64)}; None where the architecture has no such call."""

import platform
from collections.abc import Mapping

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, what a filter sees

# What no program needs that computes: namespaces, mounts, keys, tracing, kernel interfaces, memory that no limit
# counts (memfd, System V), sockets, and other processes' priorities.
DENIED = {
  "acct": (163, 89),
  "add_key": (248, 217),
  "adjtimex": (159, 171),
  "bpf": (321, 280),
  "chroot": (161, 51),
  "clock_adjtime": (305, 266),
  "clock_settime": (227, 112),
  "delete_module": (176, 106),
  "fanotify_init": (300, 262),
  "finit_module": (313, 273),
  "fsconfig": (431, 431),
  "fsmount": (432, 432),
  "fsopen": (430, 430),
  "fspick": (433, 433),
  "init_module": (175, 105),
  "io_uring_enter": (426, 426),
  "io_uring_register": (427, 427),
  "io_uring_setup": (425, 425),
  "ioperm": (173, None),
  "iopl": (172, None),
  "ioprio_set": (251, 30),
  "kcmp": (312, 272),
  "kexec_file_load": (320, 294),
  "kexec_load": (246, 104),
  "keyctl": (250, 219),
  "lookup_dcookie": (212, 18),
  "mbind": (237, 235),
  "memfd_create": (319, 279),
  "memfd_secret": (447, 447),
  "migrate_pages": (256, 238),
  "modify_ldt": (154, None),
  "mount": (165, 40),
  "mount_setattr": (442, 442),
  "move_mount": (429, 429),
  "move_pages": (279, 239),
  "mq_open": (240, 180),
  "msgget": (68, 186),
  "name_to_handle_at": (303, 264),
  "open_by_handle_at": (304, 265),
  "open_tree": (428, 428),
  "perf_event_open": (298, 241),
  "personality": (135, 92),
  "pidfd_getfd": (438, 438),
  "pidfd_open": (434, 434),
  "pidfd_send_signal": (424, 424),
  "pivot_root": (155, 41),
  "process_madvise": (440, 440),
  "process_mrelease": (448, 448),
  "process_vm_readv": (310, 270),
  "process_vm_writev": (311, 271),
  "ptrace": (101, 117),
  "quotactl": (179, 60),
  "quotactl_fd": (443, 443),
  "reboot": (169, 142),
  "request_key": (249, 218),
  "sched_setaffinity": (203, 122),
  "sched_setattr": (314, 274),
  "sched_setparam": (142, 118),
  "sched_setscheduler": (144, 119),
  "semget": (64, 190),
  "set_mempolicy": (238, 237),
  "setdomainname": (171, 162),
  "sethostname": (170, 161),
  "setns": (308, 268),
  "setpriority": (141, 140),
  "settimeofday": (164, 170),
  "shmget": (29, 194),
  "socket": (41, 198),
  "swapoff": (168, 225),
  "swapon": (167, 224),
  "syslog": (103, 116),
  "umount2": (166, 39),
  "unshare": (272, 97),
  "userfaultfd": (323, 282),
  "vhangup": (153, 58),
}

# Denied besides where there are no namespaces: other programs, and changes to files that Landlock does not govern.
WITHOUT_NAMESPACES = {
  "chmod": (90, None),
  "chown": (92, None),
  "execve": (59, 221),
  "execveat": (322, 281),
  "fchmod": (91, 52),
  "fchmodat": (268, 53),
  "fchmodat2": (452, 452),
  "fchown": (93, 55),
  "fchownat": (260, 54),
  "fork": (57, None),
  "fremovexattr": (199, 16),
  "fsetxattr": (190, 7),
  "futimesat": (261, None),
  "lchown": (94, None),
  "lremovexattr": (198, 15),
  "lsetxattr": (189, 6),
  "removexattr": (197, 14),
  "removexattrat": (466, 466),
  "setpgid": (109, 154),
  "setsid": (112, 157),
  "setxattr": (188, 5),
  "setxattrat": (463, 463),
  "truncate": (76, 45),
  "utime": (132, None),
  "utimensat": (280, 88),
  "utimes": (235, None),
  "vfork": (58, None),
}

# Their first argument is a process, thread or group.
SIGNALS = {
  "kill": (62, 129),
  "rt_sigqueueinfo": (129, 138),
  "rt_tgsigqueueinfo": (297, 240),
  "tgkill": (234, 131),
  "tkill": (200, 130),
}

CLONE, CLONE3 = (56, 220), (435, 435)
FCNTL, IOCTL, PRLIMIT = (72, 25), (16, 29), (302, 261)
LANDLOCK = (444, 445, 446)  # create_ruleset, add_rule, restrict_self: the same everywhere


def machine() -> str:
  """The architecture's name.

  Raises:
    OSError: there is no table for it.
  """
  name = platform.machine()
  if name not in ARCHITECTURES:
    raise OSError(f"no table of system calls for {name}; there is one for x86_64 and aarch64")
  return name


def numbers(calls: Mapping[str, tuple[int | None, int | None]], name: str) -> list[int]:
  """The calls' numbers on an architecture."""
  column = list(ARCHITECTURES).index(name)
  return [found for row in calls.values() if (found := row[column]) is not None]


def number(call: tuple[int, int], name: str) -> int:
  return call[list(ARCHITECTURES).index(name)]
