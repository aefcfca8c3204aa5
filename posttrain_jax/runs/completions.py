"""What a policy wrote while it learned, in its run's folder: a table and a journal a batch.

`completions/completions_00012.parquet` has a row an answer.  The journal `answers_00012.jsonl` keeps each answer as
soon as it is whole and `scores_00012.jsonl` what scoring gave, for as long as the run may go back to a checkpoint
before that batch: what was written or scored before a kill is not again.  Of several processes each has its own of the
two (`answers-1_00012.jsonl`), and reads those of all.
"""

from __future__ import annotations

import base64
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_jax.core import files

FOLDER = "completions"


def table(folder: Path, number: int) -> Path:
  return folder / FOLDER / f"completions_{number:05d}.parquet"


def write(folder: Path | None, number: int, rows: Sequence[Mapping[str, Any]]) -> None:
  """The table of a batch, whole or not at all."""
  if folder is None:
    return
  import pyarrow
  import pyarrow.parquet

  path = table(folder, number)
  path.parent.mkdir(parents=True, exist_ok=True)
  with files.beside(path) as scratch:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    pyarrow.parquet.write_table(pyarrow.table(columns), scratch / "table.parquet")
    (scratch / "table.parquet").replace(path)


def _column(values: Sequence[Any]) -> Any:
  """As an array; values that are of no one type, as a user's function may log them, as texts."""
  import pyarrow

  try:
    return pyarrow.array(values)
  except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError):
    return pyarrow.array([None if value is None else str(value) for value in values])


def numbers(folder: Path) -> list[int]:
  """Of the batches whose tables there are."""
  tables = (folder / FOLDER).glob("completions_*.parquet")
  ends = (path.stem.removeprefix("completions_") for path in tables)
  return sorted(int(end) for end in ends if end.isdecimal())


def rows(folder: Path, number: int) -> list[dict[str, Any]]:
  """The answers of a batch.

  Raises:
    ValueError: the table cannot be read.
  """
  import pyarrow
  import pyarrow.parquet

  path = table(folder, number)
  try:
    return pyarrow.parquet.read_table(path).to_pylist()
  except (OSError, pyarrow.ArrowException) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error


def keep(
  folder: Path | None, number: int, batches: Sequence[Mapping[str, Any]], *, last: int | None
) -> None:
  """The batches of several updates, and those of the `last` numbers before (None: all): a checkpoint may stand in one.

  Compressed: the bits of what tokens were drawn among are 6 KB each of a vocabulary of 49152, and few are set.
  """
  if folder is None:
    return
  path = folder / FOLDER / "batches.npz"
  path.parent.mkdir(parents=True, exist_ok=True)
  flat = {f"{i}/{name}": x for i, batch in enumerate(batches) for name, x in batch.items()}
  whole = path.with_name(f"batches_{number:05d}.npz")
  with files.beside(whole) as scratch:
    np.savez_compressed(scratch / "batches.npz", count=np.asarray(len(batches)), **flat)
    (scratch / "batches.npz").replace(whole)
  _forget(whole, last)


def scores(folder: Path, number: int, *, last: int | None, process: int = 0) -> Path:
  """The file of a batch's scores; those of the `last` before (None: all) stay, as a run may go back to them."""
  path = _of_process(folder, "scores", number, process)
  _forget(path, last)
  return path


def forget_scores(folder: Path | None, numbers: Iterable[int]) -> None:
  """The scores of these batches, which are to be asked for anew."""
  for number in numbers:
    if folder is not None:
      for path in of_all(_of_process(folder, "scores", number, 0)):
        path.unlink(missing_ok=True)


def _of_process(folder: Path, kind: str, number: int, process: int) -> Path:
  own = f"-{process}" if process else ""
  return folder / FOLDER / f"{kind}{own}_{number:05d}.jsonl"


def of_all(path: Path) -> list[Path]:
  """The files of that kind and number that there are, of any process."""
  kind, _, number = path.stem.rpartition("_")
  kind = kind.partition("-")[0]
  return sorted(path.parent.glob(f"{kind}_{number}{path.suffix}")) + sorted(
    path.parent.glob(f"{kind}-*_{number}{path.suffix}")
  )


def _forget(path: Path, last: int | None) -> None:
  """Files of the path's kind, of batches more than `last` before it."""
  kind, _, number = path.stem.rpartition("_")
  for old in path.parent.glob(f"{kind.partition('-')[0]}*_*{path.suffix}"):
    if last is not None and int(old.stem.rpartition("_")[2]) < int(number) - last:
      old.unlink(missing_ok=True)  # another process may have been quicker


def arrays(folder: Path, number: int) -> list[dict[str, Any]]:
  """What `keep` kept of a batch.

  Raises:
    ValueError: it cannot be read.
  """
  path = folder / FOLDER / f"batches_{number:05d}.npz"
  try:
    with np.load(path) as held:
      batches: list[dict[str, Any]] = [{} for _ in range(int(held["count"]))]
      for name in held.files:
        at, slash, field = name.partition("/")
        if slash:
          batches[int(at)][field] = held[name]
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
    said = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    raise ValueError(
      f"{path} {said}: the last checkpoint stands between two updates of that batch. Put the file back, or remove the"
      f" last folder in {folder / 'checkpoints'}: the run then goes on from the one before and writes the batch again"
    ) from error
  return batches


class Journal:
  """The answers of a batch, by (number of the prompt, sample).

  writer: names what an answer depends on, the weights above all; those of another writer are dropped.
  last: how many batches before it keep theirs, as a run may go back to them; None: all.
  process: of several, which write a file each and know what is in all of them.
  """

  def __init__(
    self,
    folder: Path | None,
    number: int,
    writer: str,
    *,
    last: int | None = None,
    process: int = 0,
  ) -> None:
    self._answers: dict[tuple[int, int], dict[str, Any]] = {}
    self._file = None
    if folder is None:
      return
    path = _of_process(folder, "answers", number, process)
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget(path, last)
    began = (json.dumps({"writer": writer}) + "\n").encode()
    for other in of_all(path):
      if other != path:
        self._read(other, began)
    whole = self._read(path, began)
    if whole:
      with path.open("rb+") as file:
        file.truncate(whole)
    else:
      path.write_bytes(began)
    self._file = path.open("a")

  def _read(self, path: Path, began: bytes) -> int:
    """How many bytes of a file that begins so can be read; 0 where none does."""
    if not path.exists():
      return 0
    with path.open("rb") as lines:
      if lines.read(len(began)) != began:
        return 0
      whole = len(began)
      for line in lines:
        try:
          said = json.loads(line)
          logps = _array(said["logps"], np.float32)
          kept = _kept(said["kept"], len(said["tokens"]))
          place = said["number"], said["sample"]
          beside = {"beside": said["beside"]} if said.get("beside") else {}
          self._answers[place] = dict(
            tokens=said["tokens"], ended=said["ended"], logps=logps, kept=kept, **beside
          )
        except (ValueError, KeyError, TypeError, zlib.error):
          break  # cut short by the kill, or damaged: what stands behind it is written again
        whole += len(line)
    return whole

  def written(self, number: int, sample: int) -> Mapping[str, Any] | None:
    """tokens, logps, ended and kept of an answer that is there, and what was put beside them."""
    return self._answers.get((number, sample))

  def put(
    self,
    number: int,
    sample: int,
    *,
    tokens: list[int],
    logps: np.ndarray,
    ended: str,
    kept: np.ndarray | None,
    beside: Mapping[str, Any] | None = None,
  ) -> None:
    """beside: what else is to be known of it, as JSON."""
    if self._file is None:
      return
    said = dict(
      number=number,
      sample=sample,
      tokens=tokens,
      ended=ended,
      logps=_text(logps, np.float32),
      kept=None if kept is None else _text(kept, np.uint32),
      **({"beside": beside} if beside else {}),
    )
    self._file.write(json.dumps(said) + "\n")
    self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def _text(array: np.ndarray, dtype: Any) -> str:
  """The bytes of an array; few of the bits that say what was kept are set, and those pack well."""
  return base64.b64encode(zlib.compress(np.asarray(array, dtype).tobytes(), 1)).decode()


def _array(text: str, dtype: Any) -> np.ndarray:
  return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


def _kept(text: str | None, tokens: int) -> np.ndarray | None:
  return None if text is None else _array(text, np.uint32).reshape(tokens, -1)
