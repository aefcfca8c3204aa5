"""The few places where drawn runs touch the package: config, train, and the files that a run leaves."""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Generator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from posttrain_jax import adapters, objectives, settings
from posttrain_jax.adapters import peft_format
from posttrain_jax.build import decisions
from posttrain_jax.build import run as run_lib
from posttrain_jax.core import tree, weight
from posttrain_jax.data import chat
from posttrain_jax.models import decoder, hf
from posttrain_jax.train import loop
from posttrain_jax.train.state import State

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TOKENS = 24  # of the text that two trees are compared on


@dataclasses.dataclass(frozen=True)
class Result:
  """A run as its loop left it, on the host."""

  code: int
  first: dict[
    str, np.ndarray
  ]  # {path: array} of what the optimizer sees, before the first step of this call
  trained: dict[str, np.ndarray]  # and after the last
  state: dict[str, np.ndarray]  # all that a checkpoint holds
  start: Any  # the parameters bound as training has them, at the start
  policy: Any  # and at the end
  programs: int  # how many the steps took


def load(config: str, overrides: Sequence[str]) -> Any:
  return settings.load(str(CONFIGS / config), overrides)


def train(config: Any, folder: pathlib.Path, devices: int) -> Result:
  """`posttrain train` on the first so many devices; each call makes its programs anew."""
  seen: list[Any] = []
  own = loop.loop

  def watched(run, state, *more):
    before = host(state.trainable), bound(run, state)  # on the host: the state is donated
    state, *rest = own(run, state, *more)
    seen.append((run, state, *before))
    return state, *rest

  with (
    only(devices),
    mock.patch.object(loop, "loop", watched),
    mock.patch.object(run_lib.report, "write", lambda folder, done: folder / "report.html"),
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(io.StringIO()),
  ):
    code = run_lib.train(config, folder)
  ((run, state, first, start),) = seen
  return Result(
    code,
    first=named(first),
    trained=named(host(state.trainable)),
    state=named(host(state)),
    start=start,
    policy=bound(run, state),
    programs=run.step.function._cache_size(),
  )


def host(arrays: Any) -> Any:
  return jax.tree.map(np.array, jax.device_get(arrays))


def bound(run: loop.Run, state: State) -> Any:
  return host(objectives.policy(state.trainable, state.context(run.context)))


def named(arrays: Any) -> dict[str, np.ndarray]:
  """{path: array}."""
  found = jax.tree_util.tree_flatten_with_path(arrays)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


@contextlib.contextmanager
def only(devices: int) -> Generator[None]:
  """The machine seems to have so many devices."""
  some = jax.devices()[:devices]
  with (
    mock.patch.object(jax, "devices", return_value=some),
    mock.patch.object(jax, "device_count", return_value=devices),
  ):
    yield


def reloaded(config: Any, folder: pathlib.Path, storage: str) -> Any:
  """The parameters that the files of a run describe, its base kept as `storage` says."""
  if config.adapter.method == "none":
    return hf.load(folder / "model")[0]
  params, model = hf.load(config.model.name, storage=storage)
  if decisions.has_score(config):
    writes = decisions.writes(config)
    params, model = decoder.scored(jax.random.key(0), params, model, writes=writes)
  return adapters.bind(params, peft_format.load(folder / "adapter", params, model)[0])


def onto_original(config: Any, start: Any, policy: Any) -> Any:
  """The tree `policy` over the dense base: its layers' matrices with the change from `start`, all else as it is."""
  params = tree.flatten(hf.load(config.model.name, storage="dense")[0])
  dense = lambda bound, path: weight.dense(tree.get(bound, path), jnp.float32)

  def moved(path, leaf):
    if not path.startswith("layers/") or path not in params:
      return leaf
    return params[path] + dense(policy, path) - dense(start, path)

  return tree.unflatten((path, moved(path, leaf)) for path, leaf in tree.items(policy))


def outputs(config: Any, params: Any) -> np.ndarray:
  """Logits, or the scores of a reward model, of a random text."""
  tokens = np.random.default_rng(0).integers(3, 250, (2, TOKENS))
  return np.asarray(logits_of(config, params, tokens, scores=config.objective.name == "reward"))


def logits_of(config: Any, params: Any, tokens: np.ndarray, *, scores: bool) -> jax.Array:
  _, model = hf.load(config.model.name, place=lambda path, leaf: None)

  @jax.jit
  def forward(params, tokens):
    if scores:
      return decoder.scores(params, decoder.hidden(params, tokens, model))
    return decoder.forward(params, tokens, model)

  return forward(jax.tree.map(jnp.asarray, params), jnp.asarray(tokens, jnp.int32))


def reference(config: Any) -> Any:
  """The parameters that config.objective.reference names, read from its files."""
  name = config.objective.reference
  storage = config.model.base if name == "base" else config.objective.reference_base
  if (pathlib.Path(name) / peft_format.CONFIG).exists():
    params, model = hf.load(config.model.name, storage=config.model.base)
    return adapters.bind(params, peft_format.load(name, params, model)[0])
  return hf.load(config.model.name if name == "base" else name, storage=storage)[0]


def likelihoods(
  config: Any, params: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
  """([prompts, answers] log-probabilities of answers, end of turn included; [prompts, answers] their tokens).

  One plain sequence an answer: without packing, shared prompts, masks or a mesh.
  """
  tokenizer = chat.load_tokenizer(pathlib.Path(config.model.name))
  texts, starts = [], []
  for prompt, some in zip(prompts, answers):
    turn = [{"role": "user", "content": prompt}]
    before = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    for answer in some:
      starts.append(len(tokenizer(before)["input_ids"]))
      texts.append(tokenizer(f"{before}{answer}<|im_end|>")["input_ids"])
  tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
  for line, text in zip(tokens, texts):
    line[: len(text)] = text
  logits = np.asarray(logits_of(config, params, tokens, scores=False), np.float64)
  logps = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
  each = np.take_along_axis(logps[:, :-1], tokens[:, 1:, None], -1)[..., 0]
  sums = [x[n - 1 : len(text) - 1].sum() for x, n, text in zip(each, starts, texts)]
  lengths = [len(text) - n for n, text in zip(starts, texts)]
  return np.reshape(sums, (len(prompts), -1)), np.reshape(lengths, (len(prompts), -1))


def save_model(folder: pathlib.Path, config: Any, seed: int) -> None:
  """A random model's Hugging Face folder."""
  params = decoder.init(jax.random.key(seed), config, std=0.1)
  noise = np.random.default_rng(seed)

  # norms and biases away from the values at which a mistake does not show
  def moved(path, leaf):
    vector = leaf.ndim - path.startswith("layers/") < 2
    return leaf + 0.1 * noise.standard_normal(leaf.shape).astype(np.float32) if vector else leaf

  params = tree.unflatten((path, moved(path, leaf)) for path, leaf in tree.items(params))
  hf.save(folder, params, config)


def save_adapter(folder: pathlib.Path, base: pathlib.Path) -> None:
  """A LoRA's PEFT folder, away from its start."""
  params, model = hf.load(base)
  config = adapters.AdapterConfig(r=2, lora_alpha=2, target_modules=("q_proj", "down_proj"))
  _, adapter = adapters.init(jax.random.key(3), params, config)
  trained, fixed = tree.partition(adapter)
  noise = np.random.default_rng(3)
  trained = jax.tree.map(lambda x: x + 0.05 * noise.standard_normal(x.shape), trained)
  peft_format.save(folder, tree.combine(trained, fixed), config, model)
