#!/usr/bin/env bash
# transformers 5.23.0: `label_smoothing_factor` has a causal language model of one's own, registered
# with AutoModelForCausalLM, learn each position's own token in place of the next.
#
# The Trainer takes the labels from the inputs and computes the loss itself. It shifts them where the
# class's name is in its table of its own models, which registering does not enter. Without smoothing
# the model computes its loss and shifts. The same model under two names:
#
# Seen on 2026-12-01, Python 3.11:
#     LlamaForCausalLM: loss is that of the next token: True
#     OwnForCausalLM: loss is that of the next token: False, of the token itself: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/smoothed.py" <<'PYTHON'
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


AutoConfig.register("own", OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnForCausalLM)

sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
for config in (LlamaConfig(**sizes, num_attention_heads=4), OwnConfig(**sizes, num_attention_heads=4)):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    arguments = transformers.TrainingArguments(
        output_dir="unused", label_smoothing_factor=0.1, use_cpu=True, report_to=[]
    )
    trainer = transformers.Trainer(model=model, args=arguments)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    log_probs = model(ids).logits.log_softmax(-1)

    def is_of(log_probs, targets):
        chosen = log_probs.gather(-1, targets[..., None]).mean()
        return torch.allclose(loss, -0.9 * chosen - 0.1 * log_probs.mean())

    said = f"{type(model).__name__}: loss is that of the next token: "
    said += str(is_of(log_probs[:, :-1], ids[:, 1:]))
    print(said + (", of the token itself: True" if is_of(log_probs, ids) else ""))
PYTHON

python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -q "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0 # where there is no CPU build of its own
pip transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
(cd "$folder" && venv/bin/python smoothed.py 2>/dev/null) | tee "$folder/seen"

diff "$folder/seen" - <<'EXPECTED'
LlamaForCausalLM: loss is that of the next token: True
OwnForCausalLM: loss is that of the next token: False, of the token itself: True
EXPECTED
