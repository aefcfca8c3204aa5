"""Config files that come with posttrain: `--config=sft:...` names `sft.py`, from any folder.

One's own config file takes what it shares with them from here:

  from posttrain_jax.configs import common, sft
"""
