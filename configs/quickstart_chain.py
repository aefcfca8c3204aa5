r"""The quickstart's chain: all stages of configs/chain.py, so short that two CPU cores end them in minutes.

make quickstart STAGE=chain

How it goes on is what there is to see: kill it anywhere, and the same command continues.
"""

from posttrain_jax.configs import chain, common


def stages(arg=None):
  arg = common.parse(arg, model="smollm2", steps=32, questions=40)
  for stage in chain.stages(f"model={arg.model},steps={arg.steps},questions={arg.questions}"):
    if stage["name"] == "cold":
      stage["fields"]["steps"] = arg.steps
    if stage["name"] in ("rl", "rl_again"):
      stage["fields"]["steps"] = max(arg.steps // 16, 1)
    if "sample" in stage:
      stage["sample"]["limit"] = 2 * arg.steps
    yield stage
