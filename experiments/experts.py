r"""What a mixture of experts costs on a CPU: blocks of one expert each, beside a dense MLP of as many products.

  python -m experiments.experts

Seconds of processor time, the median of alternated runs: a layer of E experts of 256 x 512, two a token, 2,048 tokens,
forward and backward by the input, the experts frozen.  `dense`: one MLP as wide as two experts.  `all`: every expert
computes every token.  `ragged`: `jax.lax.ragged_dot`.  `skewed`: all tokens choose the same two.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from posttrain_jax.core import grouped, weight

TOKENS, CHOSEN, EMBED, WIDTH = 2048, 2, 256, 512


def inputs(experts: int, skewed: bool):
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (TOKENS, EMBED))
  matrices = [
    jax.random.normal(keys[i + 1], (experts, *shape)) / shape[0] ** 0.5
    for i, shape in enumerate([(EMBED, WIDTH), (EMBED, WIDTH), (WIDTH, EMBED)])
  ]
  scores = jax.random.normal(keys[4], (TOKENS, experts))
  scores = scores.at[:, :CHOSEN].add(100.0) if skewed else scores
  return x, matrices, jax.lax.top_k(scores, CHOSEN)[1]


def mlp(product, x, matrices):
  gate, up, down = matrices
  return product(jax.nn.silu(product(x, gate)) * product(x, up), down)


def sorted_rows(x, chosen, experts, product):
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True)
  inverse = jnp.argsort(order)
  sizes = jnp.bincount(flat, length=experts)
  rows = grouped.permuted(jnp.repeat(x, CHOSEN, axis=0), order, inverse)
  out = grouped.permuted(product(rows, sizes), inverse, order)
  return out.reshape(len(x), CHOSEN, -1).sum(1)


def blocks(x, matrices, chosen):
  experts = len(matrices[0])

  def product(rows, sizes):
    of = grouped.groups(sizes, TOKENS * CHOSEN // experts)
    return mlp(lambda x, w: grouped.product(x, w, of), rows, matrices)

  return sorted_rows(x, chosen, experts, product)


def ragged(x, matrices, chosen):
  product = lambda rows, sizes: mlp(lambda x, w: weight.ragged(x, w, sizes), rows, matrices)
  return sorted_rows(x, chosen, len(matrices[0]), product)


def every(x, matrices, chosen):
  used = jax.nn.one_hot(chosen, len(matrices[0])).sum(1)

  def add(y, one):
    *parts, mine = one
    return y + mine[:, None] * mlp(weight.linear, x, parts), None

  return jax.lax.scan(add, jnp.zeros_like(x), (*matrices, used.T))[0]


def dense(x, matrices, chosen):
  del chosen
  gate, up, down = matrices
  wide = lambda w: jnp.concatenate([w[0], w[1]], axis=-1)
  return mlp(weight.linear, x, (wide(gate), wide(up), jnp.concatenate([down[0], down[1]])))


def measure(functions, arguments, rounds=7):
  steps = {}
  for name, function in functions.items():
    loss = lambda x, m, c, function=function: jnp.sum(jnp.square(function(x, m, c)))
    steps[name] = jax.jit(jax.grad(loss))
    jax.block_until_ready(steps[name](*arguments))
  seconds = {name: [] for name in steps}
  for _ in range(rounds):
    for name, step in steps.items():
      begin = time.process_time()
      jax.block_until_ready(step(*arguments))
      seconds[name].append(time.process_time() - begin)
  return {name: statistics.median(taken) for name, taken in seconds.items()}


def main():
  print(
    f"{'experts':>8}{'':>8}" + "".join(f"{n:>10}" for n in ("dense", "blocks", "all", "ragged"))
  )
  for experts, skewed in ((8, False), (8, True), (64, False), (64, True)):
    arguments = inputs(experts, skewed)
    functions = dict(dense=dense, blocks=blocks)
    if experts == 8:
      functions |= dict(all=every, ragged=ragged)
    taken = measure(functions, arguments)
    row = "".join(
      f"{1000 * taken[name]:>8.0f}ms" if name in taken else f"{'-':>10}"
      for name in ("dense", "blocks", "all", "ragged")
    )
    print(f"{experts:>8}{'skewed' if skewed else '':>8}{row}", flush=True)


if __name__ == "__main__":
  main()
