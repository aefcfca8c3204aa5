"""Names and contents: what is loaded, what is refused, what a name stands for while requests have it."""

import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
import safetensors.numpy

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, peft_format, stacked
from posttrain_jax.adapters.stacked import Room
from posttrain_jax.serve import slots
from posttrain_jax.serve.adapters import Registry
from posttrain_jax.serve.asked import BadAdapter, UnknownAdapter
from tests.adapters.kinds import moved
from tests.serve import models

ROOM = Room(2, 8, slots.paths(models.params()), prompt=6, prefix=4)
LIKE = stacked.empty(models.params(), ROOM, models.CONFIG.hidden_size)


def entry(adapter):
  return stacked.entry(adapter, models.params(), ROOM, LIKE)


def registry(root=None, **options):
  return Registry(entry, models.params(), models.CONFIG, root=root, **options)


@pytest.fixture
def root(tmp_path):
  made = tmp_path / "adapters"
  models.write(made / "one", "lora", seed=1)
  return made


def test_a_name_under_the_root_is_loaded_on_first_use(root):
  known = registry(root)
  assert known.names() == ["one"]
  assert not known.is_at_hand("one")
  assert known.describe("one")["state"] == "registered"
  version = known.acquire("one")
  assert known.is_at_hand("one")
  assert known.describe("one")["digest"] == version.digest
  assert version.users == 1
  known.release(version)
  assert version.users == 0
  with pytest.raises(UnknownAdapter, match="no adapter is called 'two'"):
    known.acquire("two")


def test_a_run_under_the_root_is_its_adapter(root):
  models.write(root / "run" / "adapter", "thin", seed=2)
  (root / "run" / "checkpoints").mkdir()
  (root / "unfinished").mkdir()
  known = registry(root)
  assert known.names() == ["one", "run"]
  assert known.folder("run") == root / "run" / "adapter"
  assert known.acquire("run").rank == 2
  assert known.is_at_hand("run")
  assert known.load("again", "run", confined=True) is known.acquire("run")
  assert known.folder("again") == root / "run" / "adapter"
  with pytest.raises(UnknownAdapter):
    known.acquire("unfinished")


def test_a_run_whose_adapter_is_a_link_out_of_the_root_is_refused(root, tmp_path):
  outside = models.write(tmp_path / "outside", "lora")
  (root / "run").mkdir()
  os.symlink(outside, root / "run" / "adapter")
  known = registry(root)
  assert known.names() == ["one"]
  with pytest.raises(BadAdapter, match="leads out of the folder"):
    known.acquire("run")


def test_identity_is_the_content(root):
  known = registry(root)
  shutil.copytree(root / "one", root / "same")
  models.write(root / "other", "lora", seed=2)
  one, same, other = map(known.acquire, ("one", "same", "other"))
  assert one is same
  assert other.digest != one.digest
  assert known.on_host == 2


def test_a_folder_that_changed_is_another_version_and_requests_keep_theirs(root):
  known = registry(root)
  before = known.acquire("one")
  shutil.rmtree(root / "one")
  models.write(root / "one", "lora", seed=9)
  after = known.acquire("one")
  assert after.digest != before.digest
  assert known.take_gone() == []  # a request has it
  known.release(before)
  assert known.take_gone() == [before.digest]


def test_a_folder_that_broke_leaves_what_it_was(root, caplog):
  known = registry(root)
  version = known.acquire("one")
  file = root / "one" / peft_format.TENSORS
  file.write_bytes(file.read_bytes()[:-50])
  assert known.acquire("one") is version
  assert "goes on with what it was" in caplog.text
  assert known.is_at_hand("one")  # and is not read again and again
  models.write(root / "new", "lora", seed=1)
  file = root / "new" / peft_format.TENSORS
  file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(BadAdapter, match=r"'new'.*cut short"):
    known.acquire("new")


def test_a_folder_that_is_deleted_serves_what_it_was_for_as_long_as_that_is_held(root):
  known = registry(root)
  version = known.acquire("one")
  shutil.rmtree(root / "one")
  assert known.acquire("one") is version
  assert known.is_at_hand("one")
  assert known.describe("one")["state"] == "in use"
  models.write(root / "one", "lora", seed=3)
  assert known.acquire("one") is not version
  shutil.rmtree(root / "one")
  known.unload("one")
  with pytest.raises(UnknownAdapter):
    known.acquire("one")


def test_unloading_forgets_the_name_alone(root):
  known = registry()
  version = known.load("mine", root / "one")
  assert known.acquire("mine") is version
  known.unload("mine")
  with pytest.raises(UnknownAdapter):
    known.acquire("mine")
  with pytest.raises(UnknownAdapter):
    known.unload("mine")
  assert known.take_gone() == []
  known.release(version)
  assert known.take_gone() == [version.digest]
  assert known.on_host == 0


def test_a_name_is_replaced_only_where_that_is_asked_for(root):
  known = registry()
  first = known.load("mine", root / "one")
  models.write(root / "two", "thin", seed=2)
  with pytest.raises(BadAdapter, match="loaded already"):
    known.load("mine", root / "two", replace=False)
  assert known.acquire("mine") is first
  assert known.load("mine", root / "two").methods == ("lora",)
  with pytest.raises(BadAdapter, match="base's own name"):
    registry(reserved=("tiny",)).load("tiny", root / "one")


@pytest.mark.parametrize("name", ["", "..", "../one", "a/b", ".hidden", "a\n", "x" * 200, "ü"])
def test_no_name_is_a_path(name, root):
  known = registry(root)
  with pytest.raises(UnknownAdapter):
    known.acquire(name)
  with pytest.raises(BadAdapter, match="is no name of an adapter"):
    known.load(name, root / "one")


def test_no_link_leads_out_of_the_root(root, tmp_path):
  outside = models.write(tmp_path / "outside", "lora")
  os.symlink(outside, root / "link")
  models.write(root / "inner", "lora", seed=3)
  (root / "inner" / peft_format.TENSORS).unlink()
  os.symlink(outside / peft_format.TENSORS, root / "inner" / peft_format.TENSORS)
  known = registry(root)
  assert "link" not in known.names()
  for name in ("link", "inner"):
    with pytest.raises(BadAdapter, match="leads out of the folder"):
      known.acquire(name)
  for path in (outside, "../outside", "link"):
    with pytest.raises(BadAdapter, match="leads out of the folder"):
      known.load("mine", path, confined=True)
  assert known.load("mine", "one", confined=True).rank == 4
  with pytest.raises(BadAdapter, match="no folder of adapters"):
    registry().load("mine", "one", confined=True)


REFUSED = {
  "rank": (
    AdapterConfig(r=12),
    r"its rank is 12; there is room for 8: start the server with --max_rank=12",
  ),
  "vera": (AdapterConfig(method="vera", r=4), "a VeRA at|VeRA"),
  "ia3": (
    AdapterConfig(
      method="ia3",
      target_modules=("k_proj", "v_proj", "down_proj"),
      feedforward_modules=("down_proj",),
    ),
    "has a IA3 at|IA3",
  ),
  "whole": (AdapterConfig(r=2, modules_to_save=("lm_head",)), "lm_head.*whole"),
  "embedding": (
    AdapterConfig(r=2, target_modules=("embed_tokens", "q_proj")),
    "LoRA at embed_tokens/weight; there is room at",
  ),
  "long prompt": (
    AdapterConfig(method="prompt", num_virtual_tokens=7),
    "soft prompt of 7 slots; there is room for 6",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_rows_cannot_mix_is_refused_by_name(name, tmp_path):
  config, said = REFUSED[name]
  tree = moved(adapters.init(models.KEY, models.params(), config)[1], 1, 0.1)
  peft_format.save(tmp_path / "a", tree, config, models.CONFIG)
  with pytest.raises(BadAdapter, match=f"adapter 'mine': .*({said})"):
    registry().load("mine", tmp_path / "a")


def spoil(root, how):
  folder = root / "one"
  config, tensors = folder / peft_format.CONFIG, folder / peft_format.TENSORS
  held = safetensors.numpy.load_file(tensors)
  if how == "NaN":
    name = next(iter(held))
    safetensors.numpy.save_file({**held, name: np.full_like(held[name], np.nan)}, tensors)
  elif how == "shape":
    name = next(name for name in held if "lora_A" in name)
    safetensors.numpy.save_file({**held, name: held[name][:, :-1].copy()}, tensors)
  elif how == "no tensors":
    tensors.unlink()
  elif how == "pickle":
    tensors.unlink()
    (folder / peft_format.PICKLED).write_bytes(b"\x80\x04.")
  elif how == "a loop":
    tensors.unlink()
    tensors.symlink_to(tensors.name)
  elif how == "no json":
    config.write_text("{")
  elif how == "other base":
    record = json.loads((folder / peft_format.RECORD).read_text())
    record["base"]["fingerprint"] = "0" * 16
    (folder / peft_format.RECORD).write_text(json.dumps(record))
  else:
    new = [dict(id=models.CONFIG.vocab_size, content="<new>")]
    written = {"a list": [], "no list": dict(added_tokens=5), "no id": dict(added_tokens=[{}])}
    (folder / "tokenizer.json").write_text(json.dumps(written.get(how, dict(added_tokens=new))))


@pytest.mark.parametrize(
  ("how", "said"),
  [
    ("NaN", "damaged|finite"),
    ("shape", "q_proj|lora_A"),
    ("no tensors", "does not exist"),
    ("pickle", "pickled"),
    ("a loop", "does not exist|symbolic links"),
    ("no json", "adapter_config.json"),
    ("other base", "made for a base"),
    ("a list", "tokenizer.json holds a list"),
    ("no list", "added_tokens=5, which are none"),
    ("no id", "added_tokens=.*, which are none"),
    ("new tokens", "1 tokens that the base has no rows for, such as '<new>'"),
  ],
)
def test_a_damaged_folder_is_refused_in_words(how, said, root):
  spoil(root, how)
  with pytest.raises(BadAdapter, match=said):
    registry(root).acquire("one")


def test_a_link_to_itself_beside_an_adapter_is_no_matter(root):
  (root / "one" / "again").symlink_to("again")
  (root / "again").symlink_to("again")
  names = registry(root)
  assert names.acquire("one")
  assert "again" not in names.names()


def test_a_disk_that_fails_refuses_what_is_new_and_leaves_what_is_served(root, monkeypatch):
  names = registry(root)
  served = names.acquire("one")
  broken = OSError(errno.EIO, "Input/output error")
  monkeypatch.setattr(
    "posttrain_jax.serve.adapters.over.load", lambda *_: (_ for _ in ()).throw(broken)
  )
  shutil.copytree(root / "one", root / "new")
  with pytest.raises(BadAdapter, match=r"adapter 'new': .*Input/output error"):
    names.acquire("new")
  os.utime(root / "one" / peft_format.TENSORS, (1, 1))
  assert names.acquire("one") is served
  monkeypatch.undo()
  assert names.acquire("new").digest == served.digest


def test_two_loads_of_one_name_at_once_read_once(root):
  reads = []

  def counted(adapter):
    reads.append(1)
    return entry(adapter)

  known = Registry(counted, models.params(), models.CONFIG, root=root)
  found = []
  threads = [threading.Thread(target=lambda: found.append(known.acquire("one"))) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(reads) == 1
  assert len({id(version) for version in found}) == 1
  assert found[0].users == 4


def test_contents_beyond_the_hosts_bytes_are_dropped_and_read_again(root):
  models.write(root / "two", "thin", seed=2)
  one = registry(root).acquire("one")
  known = registry(root, most_bytes=int(1.5 * one.size_bytes))
  first = known.acquire("one")
  second = known.load("two", root / "two")
  assert known.on_host == 2  # a request has the first, and the second is asked for next
  known.release(first)
  assert known.acquire("two") is second
  known.load("three", models.write(root / "three", "lora", seed=3))
  assert known.on_host == 2
  assert known.describe("one")["state"] == "registered"
  assert known.describe("two")["state"] == "in use"
  assert known.take_gone() == [first.digest]
  assert known.acquire("one").digest == first.digest


def test_names_under_the_root_are_forgotten_where_there_are_too_many(root):
  known = registry(root, most=2)
  for i in range(4):
    models.write(root / f"n{i}", "thin", seed=i)
    known.release(known.acquire(f"n{i}"))
  assert known.on_host == 2
  assert known.is_at_hand("n3")
  assert not known.is_at_hand("n0")
  known.acquire("n0")
