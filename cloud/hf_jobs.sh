#!/usr/bin/env bash
# A LoRA run on a GPU of Hugging Face's jobs. Not tried; a test reads it with the parser of `hf`.
#   bash cloud/hf_jobs.sh my_chats.jsonl USER/runs          the data, in this folder, and a bucket of yours for the runs
set -euo pipefail
cd "$(dirname "$0")/.."

# This folder is synced and mounted read-only at /code; what is written goes to the bucket. The image has a C compiler.
hf jobs run --flavor a100-large --timeout 12h --secrets HF_TOKEN \
    --volume .:/code --volume "hf://buckets/$2:/runs" \
    python:3.12 bash -c '
        set -e
        cp -r /code /tmp/recipes && cd /tmp/recipes && pip install -q -r requirements.txt
        python recipes/sft_lora.py configs/mistral.yaml --data.train "$1" --data.validation 0.05 \
            --training.output_dir /runs/mistral-lora --max-hours 11.5 --resume
        python recipes/evaluate_adapter.py /runs/mistral-lora
        python recipes/merge_adapter.py /runs/mistral-lora' job "$1"
