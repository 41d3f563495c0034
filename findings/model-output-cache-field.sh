#!/usr/bin/env bash
# transformers 5.24.0: a ModelOutput of one's own cannot be made with a field called `cache_params`.
#
# 5.24 renames what decoding carries on to `cache` and, for older code, rewrites the keywords
# `cache_params` and `past_key_values` of every ModelOutput subclass before its own __init__ sees
# them. A subclass that was written for 5.23 and declares such a field then gets a keyword that it
# does not have. So the shim breaks just the classes that it is for: those that still use the old
# name. (Mamba models of one's own need it up to 5.23, where `generate` looks for it.)
#
# Seen on 2026-11-30, Python 3.11:
#     5.23.0 made: [2]
#     5.24.0 TypeError: Output.__init__() got an unexpected keyword argument 'cache'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat >"$folder/own_output.py" <<'PYTHON'
from dataclasses import dataclass

import transformers
from transformers.utils.generic import ModelOutput


@dataclass
class Output(ModelOutput):
    logits: list | None = None
    cache_params: list | None = None


try:
    print(transformers.__version__, "made:", Output(logits=[1], cache_params=[2]).cache_params)
except TypeError as error:
    print(transformers.__version__, "TypeError:", error)
PYTHON

for release in 5.23.0 5.24.0; do
    python3 -m venv "$folder/$release"
    "$folder/$release/bin/python" -m pip install -q "transformers==$release" numpy==2.4.6
    "$folder/$release/bin/python" "$folder/own_output.py" 2>/dev/null
done | tee "$folder/seen"

diff "$folder/seen" - <<'EXPECTED'
5.23.0 made: [2]
5.24.0 TypeError: Output.__init__() got an unexpected keyword argument 'cache'
EXPECTED
