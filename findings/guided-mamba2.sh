#!/usr/bin/env bash
# transformers 5.23.0: with `guidance_scale` its Mamba-2 generates another text with a cache than
# without; a Llama of the same size generates one and the same, and so does Mamba-2 without guidance.
#
# The processor that computes the unconditional logits goes on from a state of its own, which it asks
# the output for as `past_key_values`. A Mamba model's output has it as `cache_params`, so there is none,
# and from the second token on the model is asked about the last token alone. Nothing says so.
#
# Seen on 2026-12-01, Python 3.11:
#     LlamaForCausalLM guided: True, not guided: True
#     Mamba2ForCausalLM guided: False, not guided: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/guided.py" <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
llama = LlamaConfig(**sizes, num_attention_heads=4, intermediate_size=64)
mamba = Mamba2Config(**sizes, num_heads=8, head_dim=8, state_size=16, n_groups=1, chunk_size=8)
ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
for kind, config in ((LlamaForCausalLM, llama), (Mamba2ForCausalLM, mamba)):
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():  # wide logits, so that no greedy choice is a tie
        parameter.data += 0.3 * torch.randn_like(parameter)

    def same(**settings):
        settings |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        return torch.equal(*(model.generate(ids, use_cache=c, **settings) for c in (True, False)))

    print(f"{kind.__name__} guided: {same(guidance_scale=3.0)}, not guided: {same()}")
PYTHON

python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip install -q "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0 # where there is no CPU build of its own
pip transformers==5.23.0 numpy==2.4.6
"$folder/venv/bin/python" "$folder/guided.py" 2>/dev/null | tee "$folder/seen"

diff "$folder/seen" - <<'EXPECTED'
LlamaForCausalLM guided: True, not guided: True
Mamba2ForCausalLM guided: False, not guided: True
EXPECTED
