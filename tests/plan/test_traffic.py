"""What a step of every objective sends, read from the compiled program, is what arithmetic says: no byte more.

Along fsdp the weights of a layer in each pass over the layers, and the gradient of what trains; along context the keys
and values too; along tensor sums of activations, along expert rows; from slice to slice the gradient alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from posttrain_jax.core import sharding, tree
from posttrain_jax.core.product import product
from posttrain_jax.losses import logprob
from posttrain_jax.models import decoder, hf
from posttrain_jax.plan import collectives, program, topology
from tests import tiny
from tests.marks import needs_libtpu, slow
from tests.plan.test_program import load

ROWS, LENGTH, DEVICES, WIDTH, LAYERS = 8, 128, 8, 64, 2
ARRAY = (
  ROWS * LENGTH * WIDTH * 4
)  # bytes of the activations between layers, of all devices together
TOKEN = ROWS * LENGTH * 4  # of a number for each token
NUMBERS = 12  # for each token: ids, positions, segments, log-probabilities, masks
# what all turns of a loop gather alike stays in it, as a TPU's compiler leaves it
AS_WRITTEN = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
SMALL = 2048  # bytes of sums of metrics and norms, a number each
# name -> (config, arguments, fields, forward passes beside that of what trains)
OBJECTIVES = {
  "sft": ("sft", "", {}, 0),
  "full": ("sft", ",adapter=none", {}, 0),
  "dpo": ("preference", "", {}, 0),
  "dpo, reference in the step": ("preference", "", {"objective.cache_reference": False}, 1),
  "orpo": ("preference", ",loss=orpo", {}, 0),
  "kto": ("kto", "", {}, 1),  # answers to other prompts, for the KL
  "reward": ("reward", "", {}, 0),
  "steps": ("reward", ",kind=steps", {}, 0),
  # the other side of their branch, where no answer teaches, is counted too
  "grpo": ("grouped", "", {}, 1),
  "distil": ("distil", ",teacher={folder}/model", {}, 1),
  "distil, likeliest tokens": ("distil", ",teacher={folder}/model,top_k=4", {}, 0),
  "rl": ("rl", ",reward=number", {"online.samples": 4, "online.max_new_tokens": 16}, 1),
}
ADAPTED = (
  "kto",
  "grpo",
  "rl",
)  # whose other forward pass has the adapter, which a reference has not
BRANCHED = ("grpo", "rl")
FAST = {"fsdp": "dpo, reference in the step", "slices": "sft", "expert": "sft"}
MESHES = {
  "fsdp": (dict(fsdp=8), 1),
  "context": (dict(data=2, context=4), 1),
  "tensor": (dict(data=4, tensor=2), 1),
  "expert": (dict(data=2, expert=4), 1),
  "slices": (dict(data=2, fsdp=4), 2),
}


def each(mesh):
  """Every objective on a mesh, all but one of them slow."""
  names = [name for name in OBJECTIVES if (mesh, name) != ("expert", "full")]
  marked = [name if FAST.get(mesh) == name else slow(name) for name in names]
  return pytest.mark.parametrize("name", marked)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """{what it is: a folder with `model`}, their vocabularies even so that two devices can share them."""
  made = {}
  dense = tiny.config(vocab_size=264)
  mixture = tiny.config(
    "qwen3_moe",
    vocab_size=264,
    head_dim=16,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
  )
  for name, config in (("dense", dense), ("mixture", mixture)):
    made[name] = tmp_path_factory.mktemp(name)
    hf.save(made[name] / "model", decoder.init(jax.random.key(0), config), config)
    tiny.tokenizer().save_pretrained(made[name] / "model")
  return made


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step on `shares` devices along the axis that is looked at."""

  name: str
  built: program.Program
  sent: list[collectives.Collective]

  def along(self, kind, axis):
    """(how many, bytes) of one kind over one axis alone."""
    some = [one for one in self.sent if (one.kind, one.axis) == (kind, axis)]
    return sum(one.count for one in some), sum(one.sent for one in some)

  def large(self):
    """{(kind, axis)} of what is more than a few numbers."""
    return {(one.kind, one.axis) for one in self.sent if one.sent + one.network > SMALL}

  @property
  def network(self):
    return sum(one.network for one in self.sent)

  def gathered(self, forward):
    """Bytes, whole, of the weights that the passes of a step gather along fsdp."""
    state, base = self.built.state, self.built.context.base
    leaves = tree.flatten(state.trainable if base is None else base)
    layers = sum(cut(leaf) for path, leaf in leaves.items() if path.startswith("layers/"))
    heads = sum(cut(leaf) for path, leaf in leaves.items() if "head" in path or "score" in path)
    adapter = 0 if base is None else sum(map(cut, jax.tree.leaves(state.trainable)))
    # forward and, since nothing is kept, backward again
    with_adapter = 2 + forward * (self.name in ADAPTED)
    # the head once for all passes, a teacher's too, and on each side of a branch
    times = 1 + (self.name in BRANCHED) + (self.built.context.teacher is not None)
    return (2 + forward) * layers + with_adapter * adapter + times * heads

  @property
  def trained(self):
    return sum(4 * leaf.size for leaf in jax.tree.leaves(self.built.state.trainable))

  @property
  def table(self):
    """Bytes of the embedding where it trains: each device makes the gradient of its own columns."""
    is_full = self.built.context.base is None
    return 4 * self.built.state.trainable["embed_tokens"]["weight"].size if is_full else 0


def cut(leaf):
  """Bytes of an array, whole, if it is cut along fsdp."""
  is_cut = any(axis is not None and "fsdp" in axis for axis in leaf.sharding.spec)
  return leaf.size * leaf.dtype.itemsize * is_cut


def compiled(folder, name, mesh, options=None, **fields):
  config, arguments, more, forward = OBJECTIVES[name]
  arguments = arguments.format(folder=folder)
  sizes, slices = MESHES[mesh]
  given = {
    **{f"mesh.{axis}": sizes.get(axis, 1) for axis in sharding.AXES},
    "batch.rows": ROWS,
    "eval.rows": ROWS,
    "model.remat": "full",
    **more,
    **fields,
  }
  target = topology.target(f"cpu:{DEVICES // slices}", slices=slices)
  built = program.build(load(folder, config, "rows", arguments, given), target)
  with jax.set_mesh(built.mesh):
    lowered = built.step.lower(built.state, built.context, built.batch)
    text = lowered.compile(compiler_options=options).as_text()
  return Step(name, built, collectives.read(text, built.mesh, target.slice_of)), forward


def between(low, value, high):
  assert low <= value <= high, f"{value} is not within {low} and {high}"


@each("fsdp")
def test_along_fsdp_weights_travel_once_a_pass_and_gradients_once(name, folders):
  step, forward = compiled(folders["dense"], name, "fsdp")
  share = 7 / 8
  _, gathered = step.along("all-gather", "fsdp")
  weights = step.gathered(forward) * share
  between(weights, gathered, weights + NUMBERS * TOKEN * share)
  _, summed = step.along("all-reduce", "fsdp")
  gradients = 2 * (step.trained - step.table) * share
  between(gradients, summed, gradients + SMALL)
  # what a device looked up for the others, and back where the table trains
  times = 1 + forward + (step.table > 0)
  exchanged = times * ARRAY / 8 * share
  assert step.along("all-to-all", "fsdp") == (times, exchanged)
  wanted = {(kind, "fsdp") for kind in ("all-gather", "all-reduce", "all-to-all")}
  assert step.large() <= wanted


def test_the_head_is_gathered_once_for_all_chunks_of_tokens(folders, monkeypatch):
  monkeypatch.setattr(logprob, "CHUNK", LENGTH // 4)
  step, forward = compiled(folders["dense"], "sft", "fsdp", AS_WRITTEN)
  _, gathered = step.along("all-gather", "fsdp")
  weights = step.gathered(forward) * 7 / 8
  between(weights, gathered, weights + NUMBERS * TOKEN * 7 / 8)


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_sends_the_gradient_of_a_layer_once():
  """Each device is handed the part that is its own, while it multiplies; summed whole it would be sent twice."""
  layers, width, tokens, devices = 2, 4096, 1024, 16
  target = topology.target("v5e:4x4")
  mesh = sharding.mesh(fsdp=devices, devices=target.devices)
  stacked = P(None, "fsdp", None)
  given = lambda shape, spec, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=jax.NamedSharding(mesh, spec)
  )

  def loss(weights, x):
    def layer(x, w):
      return x + product(x, sharding.gather(w, P("fsdp")), 0), None

    return jnp.square(jax.lax.scan(jax.checkpoint(layer), x, weights)[0].astype(jnp.float32)).sum()

  weights = given((layers, width, width), stacked, jnp.float32)
  x = given((devices, tokens, width), P("fsdp"), jnp.bfloat16)
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    text = gradient.lower(weights, x).compile().as_text()
  kinds = {one.kind: one for one in collectives.read(text, mesh)}
  assert "all-reduce" not in kinds
  summed = sum(kinds[kind].sent for kind in kinds.keys() - {"all-gather", "all-to-all"})
  whole = 4 * layers * width * width
  between(whole * 15 / 16, summed, whole * 18 / 16)
  assert all(one.exact for one in kinds.values())


@pytest.mark.slow
def test_a_critic_gathers_the_base_in_its_own_passes_and_no_more(folders, monkeypatch):
  """Forward and again, as the policy does; the head is the policy's alone."""
  ppo = ("rl", ",method=ppo,reward=number", {"online.max_new_tokens": 16}, 0)
  monkeypatch.setitem(OBJECTIVES, "ppo", ppo)
  step, _ = compiled(folders["dense"], "ppo", "fsdp")
  base = tree.flatten(step.built.context.base)
  layers = sum(cut(leaf) for path, leaf in base.items() if path.startswith("layers/"))
  adapters = sum(map(cut, jax.tree.leaves(step.built.state.trainable)))
  weights = (2 * 2 * layers + 2 * adapters + cut(base["lm_head/weight"])) * 7 / 8
  _, gathered = step.along("all-gather", "fsdp")
  between(weights, gathered, weights + NUMBERS * TOKEN * 7 / 8)
  _, summed = step.along("all-reduce", "fsdp")
  between(2 * step.trained * 7 / 8, summed, 2 * step.trained * 7 / 8 + SMALL)


@each("context")
def test_along_context_keys_and_values_travel_too(name, folders):
  step, forward = compiled(folders["dense"], name, "context")
  share = 3 / 4
  rows = ARRAY / 2  # of the devices that share rows
  keys = 2 * rows / 2  # keys and values of a layer: two heads of four
  _, gathered = step.along("all-gather", "context")
  weights = step.gathered(forward) * share + (2 + forward) * LAYERS * keys * share
  between(weights, gathered, weights + NUMBERS * TOKEN * share)
  _, scattered = step.along("reduce-scatter", "context")
  assert scattered == LAYERS * keys * share
  wanted = {(kind, "context") for kind in ("all-gather", "reduce-scatter", "all-reduce")}
  wanted |= {("all-to-all", "context"), ("all-reduce", "data")}
  # the gradient of a head that trains is summed over all devices at once
  summed = step.along("all-reduce", "data+context")[1]
  assert step.large() <= wanted | {("all-reduce", "data+context")}
  between(0, summed, 2 * (7 / 8) * step.table + SMALL)
  between(0, step.along("all-reduce", "data")[1], step.trained + SMALL)


@each("tensor")
def test_along_tensor_sums_of_activations_travel_and_nothing_else(name, folders):
  """Two a layer forward, one of them again, and backward; the embedding's, and what the head gives back."""
  step, forward = compiled(folders["dense"], name, "tensor")
  rows = ARRAY / 4
  _, summed = step.along("all-reduce", "tensor")
  # a CPU's compiler sums the gradient that each of q, k, v, gate and up gives to its input by itself
  passes = LAYERS * (3 + 5 + 2 * forward) + 2 + forward + (step.table > 0)
  between(rows * LAYERS * 4, summed, rows * passes + NUMBERS * TOKEN + step.trained)
  assert step.large() <= {("all-reduce", "tensor"), ("all-reduce", "data")}


@each("expert")
def test_along_expert_rows_travel_and_no_weight(name, folders):
  """Rows gathered forward, again and backward, sums scattered; each token's weights and numbers of experts."""
  step, forward = compiled(folders["mixture"], name, "expert")
  share = 3 / 4
  rows, chosen = ARRAY / 2, 2 * 2 * TOKEN / 2  # two of each token, with their weights
  _, gathered = step.along("all-gather", "expert")
  assert gathered == LAYERS * ((3 + forward) * rows + (2 + forward) * chosen) * share
  _, scattered = step.along("reduce-scatter", "expert")
  assert scattered == LAYERS * ((2 + forward) * rows + chosen / 2) * share
  wanted = {(kind, "expert") for kind in ("all-gather", "reduce-scatter", "all-reduce")}
  wanted |= {("all-reduce", axis) for axis in ("data", "data+expert")}
  assert step.large() <= wanted
  _, summed = step.along("all-reduce", "expert")
  between(0, summed, 2 * step.trained + NUMBERS * TOKEN)


@each("slices")
def test_between_slices_the_gradient_travels_alone(name, folders):
  """Each of the four devices of a slice sends its quarter of what the slice has summed."""
  step, _ = compiled(folders["dense"], name, "slices")
  gradient = 2 * step.trained * (1 / 2) / 4
  between(gradient, step.network, gradient + SMALL)
  assert {one.kind for one in step.sent if one.network} == {"all-reduce"}


@pytest.mark.parametrize("mesh", ["fsdp", slow("context")])
def test_what_trains_lies_on_one_device_alone(mesh, folders):
  """Factors and their moments, where one of two would lie whole on all."""
  step, _ = compiled(folders["dense"], "sft", mesh)
  shares = 8 if mesh == "fsdp" else 4
  size = program.bytes_a_device
  assert size(step.built.state.trainable) == step.trained / shares
  between(0, size(step.built.state.optimizer), 2 * step.trained / shares + 16)
