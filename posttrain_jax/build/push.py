"""What was exported, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id


def check(name: str) -> None:
  """Raises unless a push to this name may work: before anything is computed.

  Raises:
    ValueError: no possible name of a repository.
    PermissionError: there is no token on this machine.
  """
  try:
    validate_repo_id(name)
  except errors.HFValidationError as error:
    raise ValueError(
      f"--push={name}: write ORG/NAME as the hub names a repository: {error}"
    ) from error
  if name.count("/") != 1:
    raise ValueError(
      f"--push={name}: write ORG/NAME, your own name on the hub or an organization's first"
    )
  if huggingface_hub.get_token() is None:
    raise PermissionError(
      f"--push={name}: there is no token for the hub on this machine; log in with `hf auth login`, or set HF_TOKEN"
    )


def push(path: Path, name: str) -> str:
  """The address of the repository that now holds the folder, or the file; a new one is private.

  Raises:
    PermissionError: the token may not write there.
    ConnectionError: the hub does not answer, or answers with an error.
  """
  hub = huggingface_hub.HfApi()
  message = "Exported with posttrain_jax"
  try:
    url = str(hub.create_repo(name, private=True, exist_ok=True))
    if path.is_dir():
      hub.upload_folder(repo_id=name, folder_path=path, commit_message=message)
    else:
      hub.upload_file(
        repo_id=name, path_or_fileobj=path, path_in_repo=path.name, commit_message=message
      )
  except errors.HfHubHTTPError as error:
    kind = PermissionError if error.response.status_code in (401, 403) else ConnectionError
    raise kind(
      f"--push={name}: the hub answered: {error}; what was exported is in {path}"
    ) from error
  except (OSError, errors.HTTPError) as error:
    raise ConnectionError(
      f"--push={name}: the hub could not be reached ({error}); what was exported is in {path}"
    ) from error
  return url
