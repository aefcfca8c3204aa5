"""What a field that is not here was meant to be: near names of every section, and the names that other tools use."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

# names of Hugging Face's Trainer, TRL, PEFT and Axolotl -> the field here whose values are the same
SAME: Mapping[str, str] = {
  "learning_rate": "optimizer.lr",
  "warmup_ratio": "optimizer.warmup",
  "lr_scheduler_type": "optimizer.schedule",
  "lr_scheduler": "optimizer.schedule",
  "max_grad_norm": "optimizer.clip",
  "adam_beta1": "optimizer.b1",
  "adam_beta2": "optimizer.b2",
  "adam_epsilon": "optimizer.eps",
  "max_steps": "steps",
  "num_train_epochs": "epochs",
  "num_epochs": "epochs",
  "data_seed": "seed",
  "logging_steps": "log_every",
  "wandb_project": "log.wandb",
  "mlflow_experiment_name": "log.mlflow",
  "eval_steps": "eval.every",
  "metric_for_best_model": "eval.best",
  "early_stopping_patience": "eval.stop_after",
  "save_steps": "checkpoint.every",
  "save_total_limit": "checkpoint.keep",
  "gradient_accumulation_steps": "batch.accumulate",
  "max_length": "data.length",
  "max_seq_length": "data.length",
  "max_seq_len": "data.length",
  "sequence_len": "data.length",
  "sample_packing": "data.packing",
  "train_file": "data.train",
  "train_dataset": "data.train",
  "dataset_name": "data.train",
  "eval_dataset": "data.eval",
  "eval_table_size": "eval.samples",
  "eval_max_new_tokens": "eval.max_new_tokens",
  "compute_metrics": "eval.metric",
  "max_train_samples": "data.limit",
  "model_name": "model.name",
  "model_name_or_path": "model.name",
  "base_model": "model.name",
  "lora_model_dir": "model.adapter",
  "adapter_name_or_path": "model.adapter",
  "chat_template": "model.template",
  "chat_template_path": "model.template",
  "system_prompt": "data.system",
  "torch_dtype": "model.dtype",
  "lora_r": "adapter.r",
  "lora_rank": "adapter.r",
  "rank": "adapter.r",
  "alpha": "adapter.lora_alpha",
  "dropout": "adapter.lora_dropout",
  "lora_target_modules": "adapter.target_modules",
  "lora_modules_to_save": "adapter.modules_to_save",
  "peft_layers_to_transform": "adapter.layers_to_transform",
  "peft_use_dora": "adapter.use_dora",
  "peft_use_rslora": "adapter.use_rslora",
  "peft_init_lora_weights": "adapter.init_lora_weights",
  "f_alpha_divergence_coef": "objective.divergence_alpha",
  "use_weighting": "objective.weighting",
  "precompute_ref_log_probs": "objective.cache_reference",
  "ref_model_sync_steps": "objective.sync_every",
  "ref_model": "objective.reference",
  "teacher_model_name_or_path": "objective.teacher",
  "teacher_model": "objective.teacher",
  "scale_rewards": "objective.advantage",
  "center_rewards_coefficient": "objective.centering",
  "reward_funcs": "reward.parts",
  "reward_weights": "reward.weights",
  "num_generations": "online.samples",
  "num_ppo_epochs": "online.passes",
  "num_mini_batches": "online.minibatches",
  "missing_eos_penalty": "online.cut_penalty",
  "kl_coef": "online.kl_in_reward",
  "cliprange": "objective.epsilon",
  "cliprange_value": "critic.epsilon",
  "vf_coef": "critic.weight",
  "gamma": "critic.gamma",
  "lam": "critic.lam",
}
# names whose values differ here, or that are no field here -> what to write
INSTEAD: Mapping[str, str] = {
  "per_device_train_batch_size": "--config.batch.rows=N is the whole optimizer batch, of all devices and"
  " micro-batches; --config.batch.accumulate=N is how many of those it is cut into",
  "micro_batch_size": "--config.batch.rows=N is the whole optimizer batch, of all devices and micro-batches;"
  " --config.batch.accumulate=N is how many of those it is cut into",
  "batch_size": "--config.batch.rows=N is the whole optimizer batch, of all devices and micro-batches",
  "per_device_eval_batch_size": "--config.eval.rows=N counts the rows of an evaluation batch, of all devices",
  "eval_batch_size": "--config.eval.rows=N counts the rows of an evaluation batch, of all devices",
  "warmup_steps": "--config.optimizer.warmup=0.05 is a share of the steps",
  "optim": "write it after the config's colon: --config=FILE:optimizer=adamw8bit",
  "load_in_4bit": "write it after the config's colon: --config=FILE:base=nf4 (or fp4)",
  "load_in_8bit": "write it after the config's colon: --config=FILE:base=int8",
  "use_peft": "write it after the config's colon: --config=FILE:adapter=lora, or adapter=none",
  "peft_type": "write it after the config's colon: --config=FILE:adapter=lora",
  "lora_target_linear": "--config.adapter.target_modules=all-linear, which is the default",
  "loss_type": "write it after the config's colon: --config=FILE:loss=dpo, or method=grpo",
  "rl": "each has a config file: rl (method=grpo), grouped (answers are there), preference (loss=dpo), kto, reward",
  "lmbda": "write it after the config's colon: --config=FILE:on_policy=0.5, a share of the rows of each update",
  "sync_ref_model": "--config.objective.sync_every=N; 0 leaves the reference as it is",
  "ref_model_mixup_alpha": "--config.objective.sync_mix=VALUE is the policy's share of the mix",
  "f_divergence_type": "--config.objective.divergence=forward_kl (or reverse_kl, jensen_shannon, alpha_divergence)",
  "truncation_mode": "--config.data.truncate=VALUE says what becomes of rows that are too long",
  "assistant_only_loss": "what the assistant wrote is always all that is trained; --config.data.train_on=last takes"
  " its last message alone",
  "completion_only_loss": "what the assistant wrote is always all that is trained; rows with `text` are trained whole",
  "train_on_inputs": "what the assistant wrote is always all that is trained; rows with `text` are trained whole",
  "dataset_text_field": "--config.data.columns.text=NAME names the file's column",
  "val_set_size": "--config.data.eval_rows=N counts the rows that are held out",
  "test_size": "--config.data.eval_rows=N counts the rows that are held out",
  "load_best_model_at_end": "--config.eval.best=loss exports the step with the lowest held-out loss",
  "greater_is_better": "--config.eval.best=METRIC goes the way that is better of that metric",
  "do_eval": "--config.eval.every=N; 0 for none but the last",
  "eval_on_start": "--config.eval.before=true writes answers before training too",
  "evals_per_epoch": "--config.eval.every=N counts steps",
  "saves_per_epoch": "--config.checkpoint.every=N counts steps",
  "eval_strategy": "--config.eval.every=N counts steps",
  "save_strategy": "--config.checkpoint.every=N counts steps",
  "output_dir": "--workdir=DIR is the run's folder",
  "run_name": "--workdir=DIR is the run's folder, and its name",
  "report_to": "--config.log.wandb=PROJECT, --config.log.mlflow=EXPERIMENT or --config.log.trackio=PROJECT",
  "logging_dir": "--workdir=DIR has metrics.jsonl and TensorBoard's files",
  "resume_from_checkpoint": "the same command with the same --workdir continues a run",
  "gradient_checkpointing": "--config.model.remat=full (or auto, none, names, dots, host)",
  "bf16": "--config.model.dtype=bfloat16",
  "fp16": "--config.model.dtype=float16",
  "fsdp": "--config.mesh.fsdp=N counts the devices that share the parameters; -1: all that are left",
  "tensor_parallel_size": "--config.mesh.tensor=N",
  "context_parallel_size": "--config.mesh.context=N",
  "push_to_hub": "posttrain export --workdir=DIR --out=DIR --push=ORG/NAME",
  "hub_model_id": "posttrain export --workdir=DIR --out=DIR --push=ORG/NAME",
}
MOST = 4  # near names that are said


def elsewhere(name: str) -> str:
  """What another tool's name is here: a field, a sentence, or "".

  >>> elsewhere("training_args.learning-rate")
  'optimizer.lr'
  """
  word = _word(name)
  return SAME.get(word, INSTEAD.get(word, ""))


def alike(name: str) -> str:
  """Another tool's name that a misspelt one resembles, or "".

  >>> alike("gradient_accumulation")
  'gradient_accumulation_steps'
  """
  return next(iter(difflib.get_close_matches(_word(name), [*SAME, *INSTEAD], n=1, cutoff=0.8)), "")


def near(name: str, known: Collection[str]) -> list[str]:
  """The fields that a name resembles, whatever their section; those of its last word first.

  >>> near("optim.lr", ["steps", "optimizer.lr", "adapter.r"])
  ['optimizer.lr']
  """
  of_word: dict[str, list[str]] = {}
  for field in known:
    of_word.setdefault(_word(field), []).append(field)
  words = difflib.get_close_matches(_word(name), of_word, n=MOST, cutoff=0.7)
  whole = difflib.get_close_matches(name[:100], known, n=1)
  alike = [field for word in words for field in of_word[word]]
  return list(dict.fromkeys([*ending(name, known), *whole, *alike]))[:MOST]


def ending(name: str, known: Collection[str]) -> list[str]:
  """The fields whose last word is that of the name."""
  return [field for field in known if _word(field) == _word(name)]


def _word(name: str) -> str:
  return name.rpartition(".")[2][:100].lower().replace("-", "_")
