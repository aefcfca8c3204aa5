"""A server as those that stand in for the engine: OpenAI's completions in token ids, and SGLang's, of a tiny model.

python -m tests.rollout.served MODEL PORT [faults as JSON: {"status": 500, "first": 3}]
"""

import json
import os
import pathlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax.numpy as jnp
import numpy as np

from posttrain_jax import adapters
from posttrain_jax.adapters import peft_format
from posttrain_jax.models import hf
from posttrain_jax.rollout import engine
from posttrain_jax.rollout.requests import Request
from posttrain_jax.rollout.sampling import Sampling


class Served:
  def __init__(self, folder):
    self.params, self.config = hf.load(folder, dtype=jnp.float32)
    self.ready = {"base": engine.prepare(self.params, self.config)}
    self.engine = engine.Engine(
      self.ready["base"], self.config, rows=4, length=self.config.max_length
    )
    self.lock = threading.Lock()

  def load(self, name, folder):
    node, _ = peft_format.load(folder, self.params, self.config)
    self.ready[name] = engine.prepare(adapters.merge(self.params, node), self.config)

  def complete(self, body):
    asked = Request(
      body["prompt"],
      body["max_tokens"],
      sampling=Sampling(body["temperature"]),
      stop_tokens=body["stop_token_ids"],
      seed=body["seed"],
    )
    with self.lock:
      self.engine.load(self.ready[body["model"]])
      ((_, answer),) = self.engine.run([asked])
    reason = "stop" if answer.ended == "stop_token" else "length"
    logps = {"token_logprobs": np.asarray(answer.logps, float).tolist()}
    return {"choices": [{"token_ids": answer.tokens, "logprobs": logps, "finish_reason": reason}]}

  def generate(self, body):
    """SGLang's route by the other one."""
    drawn = body["sampling_params"]
    asked = dict(
      prompt=body["input_ids"], model=body["lora_path"], max_tokens=drawn["max_new_tokens"]
    )
    asked |= dict(temperature=drawn["temperature"], stop_token_ids=drawn["stop_token_ids"])
    (choice,) = self.complete({**asked, "seed": drawn["sampling_seed"]})["choices"]
    logps = choice["logprobs"]["token_logprobs"]
    each = [[logp, token, None] for logp, token in zip(logps, choice["token_ids"])]
    reason = {"type": choice["finish_reason"]}
    return {"meta_info": {"finish_reason": reason, "output_token_logprobs": each}}


def handler(served, faults):
  count = {"asked": 0}

  class Handler(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
      pass

    def reply(self, status, body, **headers):
      data = body if isinstance(body, bytes) else json.dumps(body).encode()
      self.send_response(status)
      for name, value in {"Content-Length": len(data), **headers}.items():
        self.send_header(name.replace("_", "-"), str(value))
      self.end_headers()
      self.wfile.write(data)

    def do_GET(self):
      self.reply(200, {"data": [{"id": name} for name in served.ready]})

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      if self.path.endswith("/load_lora_adapter"):
        served.load(body["lora_name"], body["lora_path"])
        return self.reply(200, b"Success")
      if self.path.endswith("/unload_lora_adapter"):
        served.ready.pop(body["lora_name"], None)
        return self.reply(200, b"Success")
      count["asked"] += 1
      if faults.get("dies_after", 1 << 30) < count["asked"]:
        os._exit(9)
      if faults.get("hangs_after", 1 << 30) < count["asked"]:
        time.sleep(600)
      if self.path == "/generate":
        if (name := body["lora_path"]) not in served.ready:
          why = f"The following requested LoRA adapters are not loaded: {name}"
          return self.reply(400, {"error": {"message": why}})
        return self.reply(200, served.generate(body))
      if body["model"] not in served.ready:
        return self.reply(404, {"error": {"message": f"no model {body['model']}"}})
      return self.reply(200, served.complete(body))

  return Handler


def main():
  folder, port, *faults = sys.argv[1:]
  served = Served(pathlib.Path(folder))
  server = ThreadingHTTPServer(
    ("127.0.0.1", int(port)), handler(served, json.loads(faults[0]) if faults else {})
  )
  print(f"serving at {server.server_address[1]}", flush=True)
  server.serve_forever()


if __name__ == "__main__":
  main()
