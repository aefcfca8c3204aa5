"""LoRA that starts with a part of its base: what is taken out, what is left, and what is exported, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain_jax import adapters
from posttrain_jax.adapters import AdapterConfig, inits, lora, peft_format
from posttrain_jax.core import tree, weight
from posttrain_jax.core.weight import Adapted
from posttrain_jax.models import decoder
from posttrain_jax.quant import fp4, int8, nf4
from tests.adapters.cases import trained
from tests.marks import few, slow
from tests.models import families

KEY = jax.random.key(0)
IN, OUT, LAYERS = 128, 48, 3
STACKED = [f"layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
STARTS = ["pissa", "pissa_niter_4", "olora"]
QUANTISED = {"nf4": nf4.quantize, "fp4": fp4.quantize, "int8": int8.quantize}


def matrix(seed=0, decay=0.9, layers=LAYERS):
  """Singular values that fall, as a trained matrix's do."""
  draw = np.random.default_rng(seed)
  w = []
  for _ in range(layers):
    left = np.linalg.qr(draw.standard_normal((IN, OUT)))[0]
    right = np.linalg.qr(draw.standard_normal((OUT, OUT)))[0]
    w.append(left * decay ** np.arange(OUT) @ right)
  return jnp.asarray(np.stack(w), jnp.float32)


def wide(x):
  return np.asarray(x, np.float64)


def make(base, store=None, **options):
  return inits.init(KEY, base, STACKED, AdapterConfig(**options), store)


def norm(x):
  return float(np.linalg.norm(wide(x)))


def product(node, i):
  return float(node.scale[i]) * wide(node.a[i]) @ wide(node.b[i])


# --- What is taken out ------------------------------------------------------------------------------------------------


def test_pissa_takes_the_largest_singular_values():
  w = matrix()
  base, node = make(w, r=4, lora_alpha=6, init_lora_weights="pissa")
  for i in range(LAYERS):
    left, values, right = np.linalg.svd(wide(w[i]))
    best = left[:, :4] * values[:4] @ right[:4]
    np.testing.assert_allclose(product(node, i), best, atol=1e-6)
    np.testing.assert_allclose(base[i], wide(w[i]) - best, atol=1e-6)
    # shared between the factors: a.T a = b b.T = S / scale
    shares = np.diag(values[:4] / 1.5)
    np.testing.assert_allclose(wide(node.a[i]).T @ wide(node.a[i]), shares, atol=1e-6)
    np.testing.assert_allclose(wide(node.b[i]) @ wide(node.b[i]).T, shares, atol=1e-6)


@pytest.mark.parametrize("iterations", few([1, 4, 16], 4))
def test_fast_pissa_nears_the_exact_one(iterations):
  """No matrix of rank 4 is nearer than the best; where values fall by 5 % it is close in one turn."""
  w = matrix(decay=0.95)
  _, node = make(w, r=4, init_lora_weights=f"pissa_niter_{iterations}")
  for i in range(LAYERS):
    best = np.sqrt(np.sum(np.linalg.svd(wide(w[i]))[1][4:] ** 2))
    ours = norm(wide(w[i]) - product(node, i))
    assert best <= ours * (1 + 1e-6)
    assert ours <= best * {1: 1.02, 4: 1.001, 16: 1.00001}[iterations]


def test_olora_takes_the_first_of_a_qr_decomposition():
  w = matrix()
  base, node = make(w, r=4, lora_alpha=6, init_lora_weights="olora")
  for i in range(LAYERS):
    q, r = np.linalg.qr(wide(w[i]).T)
    signs = np.sign(np.diag(r))[:4] * np.sign(np.diag(np.linalg.qr(np.asarray(w[i]).T)[1]))[:4]
    np.testing.assert_allclose(node.b[i], (q[:, :4] * signs).T, atol=1e-5)
    np.testing.assert_allclose(node.a[i], (signs[:, None] * r[:4]).T, atol=1e-5)
    np.testing.assert_allclose(wide(node.b[i]) @ wide(node.b[i]).T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(base[i], wide(w[i]) - 1.5 * (q[:, :4] @ r[:4]).T, atol=2e-6)


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_base_and_start_together_are_the_original(how, dtype):
  w = matrix().astype(dtype)
  base, node = make(w, r=4, lora_alpha=10, init_lora_weights=how, use_rslora=True)
  assert base.dtype == dtype
  close = {jnp.float32: 1e-6, jnp.bfloat16: 2**-7}[dtype]  # the rest is rounded, and may be larger
  assert norm(wide(node.dense(base, jnp.float32)) - wide(w)) < close * norm(w)
  assert norm(wide(base) - wide(w)) > 0.1 * norm(w)


@pytest.mark.parametrize("how", few(STARTS, "olora"))
def test_layers_that_are_not_adapted_are_as_they_were(how):
  w = matrix()
  options = dict(exclude_modules=[STACKED[1]], rank_pattern={r"layers\.2\..*": 6})
  base, node = make(w, r=4, init_lora_weights=how, **options)
  np.testing.assert_array_equal(base[1], w[1])
  assert node.ranks().tolist() == [4, 0, 6]
  assert node.size() == (4 + 6) * (IN + OUT)  # the start does not count: it is not trained
  assert norm(wide(node.dense(base)) - wide(w)) < 1e-6 * norm(w)


def test_a_start_is_drawn_from_its_seed():
  w = matrix()
  one, again = (make(w, r=4, init_lora_weights="pissa_niter_1")[1] for _ in range(2))
  other = inits.init(
    jax.random.key(1), w, STACKED, AdapterConfig(r=4, init_lora_weights="pissa_niter_1")
  )[1]
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert (one.a != other.a).any()


# --- Quantised bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(QUANTISED, "nf4"))
def test_qpissa_quantises_what_is_left_of_the_original(kind):
  w, store = matrix(), QUANTISED[kind]
  base, node = make(w, store, r=8, init_lora_weights="pissa")
  exact = w - jnp.stack([jnp.asarray(product(node, i), jnp.float32) for i in range(LAYERS)])
  error = norm(wide(weight.dense(base)) - wide(exact))
  assert error == pytest.approx(norm(wide(weight.dense(store(exact))) - wide(exact)), rel=1e-3)
  # what is left is smaller than the original, and so is what quantising it loses (Meng et al. 2024, table 3)
  assert error < 0.6 * norm(wide(weight.dense(store(w))) - wide(w))


def test_a_base_that_is_quantised_already_keeps_its_type_and_options():
  w = nf4.quantize(matrix(), block_size=32, double_quant=False)
  base, node = make(w, r=4, init_lora_weights="pissa")
  assert (base.block_size, base.nested_absmax, base.shape) == (32, None, w.shape)
  assert jax.tree.structure(base) == jax.tree.structure(w)
  assert norm(wide(node.dense(base)) - wide(w.dense())) < 0.1 * norm(w.dense())


@pytest.mark.parametrize("kind", few(QUANTISED, "nf4"))
def test_loftq_is_the_papers_algorithm(kind):
  """Q = quantise(W - A B), A B = the best of rank r of W - Q, in turn (Li et al. 2024, algorithm 1)."""
  w, store = matrix(), QUANTISED[kind]
  lost = [norm(wide(weight.dense(store(w))) - wide(w))]
  for turns in (1, 3):
    base, node = make(w, store, r=8, lora_alpha=8, init_lora_weights="loftq", loftq_iter=turns)
    for i in range(LAYERS):
      product_of, kept = np.zeros((IN, OUT)), None
      for _ in range(turns):
        kept = wide(weight.dense(store(jnp.asarray(wide(w[i]) - product_of, jnp.float32))))
        left, values, right = np.linalg.svd(wide(w[i]) - kept)
        product_of = left[:, :8] * values[:8] @ right[:8]
      ours = wide(weight.dense(weight.layer(base, i)))
      # a rounding may put a value of ten thousand into the next code
      assert norm(ours - kept) < 0.02 * norm(kept)
      assert norm(product(node, i) - product_of) < 0.1 * norm(product_of)
    lost.append(norm(wide(node.dense(base)) - wide(w)))
  assert lost[2] < lost[1] < 0.95 * lost[0]


def test_loftq_does_not_divide_by_the_scale():
  """PEFT's semantics: with lora_alpha = 2 r what stands for W is Q + 2 A B."""
  w = matrix()
  options = dict(r=8, init_lora_weights="loftq", loftq_iter=3)
  base, node = make(w, nf4.quantize, lora_alpha=8, **options)
  same, twice = make(w, nf4.quantize, lora_alpha=16, **options)
  jax.tree.map(np.testing.assert_array_equal, base, same)
  np.testing.assert_array_equal(node.a, twice.a)
  np.testing.assert_allclose(twice.scale, 2 * node.scale)


# --- The base of a resumed run, and the export ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("how", "store"),
  [(how, store) for how in STARTS for store in (None, "nf4", "int8")]
  + [("loftq", "nf4"), ("loftq", "fp4")],
)
def test_the_base_is_made_again_from_the_original_and_the_start(how, store):
  w, store = matrix(), QUANTISED.get(store)
  base, node = make(w, store, r=4, lora_alpha=6, init_lora_weights=how, loftq_iter=3)
  moved = node.replace(a=node.a + 1, b=0 * node.b)  # training changes nothing that it is made from
  again = inits.rebuild(w, moved, store)
  assert jax.tree.structure(again) == jax.tree.structure(base)
  jax.tree.map(np.testing.assert_array_equal, again, base)


@pytest.mark.parametrize("how", few(STARTS, "pissa"))
@pytest.mark.parametrize("dora", few([False, True], True))
def test_the_export_is_twice_the_rank_on_the_original(how, dora):
  w = matrix()
  options = dict(
    r=4, lora_alpha=6, exclude_modules=[STACKED[1]], rank_pattern={r"layers\.2\..*": 6}
  )
  base, node = make(w, r=options.pop("r"), init_lora_weights=how, use_dora=dora, **options)
  node = trained({"w": node})["w"]
  exported = node.on_the_original()
  assert exported.start is None
  assert exported.ranks().tolist() == [8, 0, 12]
  np.testing.assert_allclose(
    wide(exported.dense(w)),
    wide(node.dense(base)),
    atol=1e-5 * np.abs(wide(node.dense(base))).max(),
  )


FAMILY = dict(hidden_size=64, intermediate_size=64, head_dim=16)
OPTIONS = dict(
  r=3,
  lora_alpha=9,
  rank_pattern={r"layers\.1\..*": 4},
  exclude_modules=["layers.0.mlp.up_proj", "layers.2.self_attn.k_proj"],
)


@functools.partial(jax.jit, static_argnums=2)
def logits(params, tokens, config):
  return decoder.forward(params, tokens, config)


@pytest.mark.parametrize("how", few(STARTS, "pissa"))
def test_a_model_starts_where_its_original_is_and_is_exported_for_it(how, tmp_path):
  model, original = families.make("llama")
  config = AdapterConfig(init_lora_weights=how, **OPTIONS)
  params, adapter = adapters.init(KEY, original, config)
  tokens = families.tokens(2, 9)
  expected = logits(original, tokens, model)
  scale = np.abs(expected).max()
  start = logits(adapters.bind(params, adapter), tokens, model)
  np.testing.assert_allclose(start, expected, atol=1e-4 * scale)
  assert np.abs(logits(params, tokens, model) - expected).max() > 0.1 * scale
  adapter = trained(adapter)
  bound = logits(adapters.bind(params, adapter), tokens, model)
  merged = logits(adapters.merge(params, adapter), tokens, model)
  peft_format.save(tmp_path / "a", adapter, config, model)
  loaded, found = peft_format.load(tmp_path / "a", original, model)
  exported = logits(adapters.bind(original, loaded), tokens, model)
  scale = np.abs(bound).max()
  for same in (merged, exported):
    np.testing.assert_allclose(same, bound, atol=5e-4 * scale)
  assert np.abs(bound - expected).max() > 0.1 * scale
  assert found.init_lora_weights is True
  assert adapters.count(loaded) == 2 * adapters.count(adapter)


@pytest.mark.parametrize(
  ("how", "kind"),
  few(
    [(how, kind) for how in (*STARTS, "loftq") for kind in QUANTISED],
    ("olora", "int8"),
  ),
)
def test_the_export_from_a_quantised_base_adds_what_was_learned(how, kind, tmp_path):
  """Exported minus trained is what the base had lost at the start, and no more."""
  model = families.config("llama", **FAMILY)
  original = families.params(model)
  options = OPTIONS | (dict(lora_alpha=3, rank_pattern={}) if how == "loftq" else {})
  config = AdapterConfig(init_lora_weights=how, loftq_iter=2, **options)
  params, adapter = adapters.init(KEY, original, config, store=lambda path: QUANTISED[kind])
  later = trained(adapter)
  peft_format.save(tmp_path / "a", later, config, model)
  loaded, _ = peft_format.load(tmp_path / "a", original, model)
  for path, node in tree.items(adapter):
    w, base = tree.get(original, path), tree.get(params, path)
    lost = wide(w) - wide(node.dense(base, jnp.float32))
    moved = tree.get(later, path).dense(base, jnp.float32)
    exported = tree.get(loaded, path).dense(w)
    np.testing.assert_allclose(wide(exported) - wide(moved), lost, atol=1e-5 * np.abs(moved).max())
    if how in ("pissa", "loftq"):
      alone = norm(wide(w) - wide(weight.dense(QUANTISED[kind](w))))
      assert norm(lost) < 1.02 * alone


@pytest.mark.parametrize("options", [dict(init_lora_weights="pissa"), slow(dict(use_dora=True))])
def test_no_two_fields_share_a_buffer(options):
  """A training step donates them all, each once."""
  _, params = families.make("llama")
  _, adapter = adapters.init(KEY, params, AdapterConfig(r=2, **options))
  leaves = jax.tree.leaves(adapter)
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_only_the_factors_train_and_the_start_is_carried():
  _, params = families.make("llama")
  _, adapter = adapters.init(KEY, params, AdapterConfig(r=2, init_lora_weights="pissa"))
  moving, fixed = tree.partition(adapter)
  node, held = (part["layers"]["mlp"]["up_proj"]["weight"] for part in (moving, fixed))
  assert node.start is None
  np.testing.assert_array_equal(held.start.a, node.a)
  plain = adapters.init(KEY, params, AdapterConfig(r=2))[1]
  assert adapters.summary(params, adapter) == adapters.summary(params, plain)


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(target_modules=["embed_tokens"]), "for 'embed_tokens' it would be a table's"),
    (dict(target_modules=["lm_head"]), "for 'lm_head' that is the embedding"),
    (dict(r=33), "rank 33 of .* is above the matrix"),
    (
      dict(init_lora_weights="loftq"),
      "this base is stored as it is: write base=nf4, fp4 or int8, or adapter=pissa",
    ),
  ],
)
def test_bases_that_cannot_give_a_start(options, message):
  _, params = families.make("llama3")
  config = AdapterConfig(**{"init_lora_weights": "pissa", **options})
  with pytest.raises(ValueError, match=message):
    adapters.init(KEY, params, config)


def test_loftq_needs_the_matrices_before_they_were_quantised():
  with pytest.raises(ValueError, match="is quantised already: give the original"):
    make(nf4.quantize(matrix()), r=4, init_lora_weights="loftq")


def test_bound_and_dense_agree_beside_a_rest():
  w = matrix()
  base, node = make(w, r=4, init_lora_weights="pissa", use_dora=True)
  one = jax.tree.map(lambda x: x[0], node)
  assert isinstance(one, lora.LoRA)
  x = jax.random.normal(KEY, (5, IN))
  np.testing.assert_allclose(Adapted(base[0], one).apply(x), x @ w[0], atol=1e-5)
