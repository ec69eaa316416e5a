"""Evaluate a LoRA adapter merged into its base model: merge, save, evaluate with Inspect, delete the merged model.

    python scripts/eval_adapter_merge.py --base models/Llama-3.1-8B --adapter adapters/rank8 --task mine.py@mine

Needs torch, transformers, peft, accelerate and inspect-ai, and nothing of lorasweep: `.venv/eval/bin/python` has them.
The merged model is as large as the base, and lies in TMPDIR while it is evaluated.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

import torch
from inspect_ai import eval
from inspect_ai.model import get_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--base", required=True, help="the base model, a Hugging Face checkpoint directory")
parser.add_argument("--adapter", required=True, help="the adapter, a PEFT directory")
parser.add_argument("--task", required=True, help="an Inspect task: FILE.py@TASK, or the name of a registered one")
parser.add_argument("--dtype", default="auto", help="bfloat16, float16 or float32 (default: that of the base)")
parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
parser.add_argument("--limit", type=int, help="samples to evaluate (default: all)")
parser.add_argument("--max-tokens", type=int, help="tokens of an answer (default: those of the task)")
parser.add_argument("--log-dir", default="logs", help="folder of Inspect's log (default: logs)")
options = parser.parse_args()

# A scheduler ends jobs with SIGTERM. Leaving the block below deletes the merged model, also then and after an error.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with tempfile.TemporaryDirectory(prefix="merged-") as merged:
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype)
    model = PeftModel.from_pretrained(base, options.adapter).merge_and_unload()
    model.save_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    template = Path(options.adapter, "chat_template.jinja")
    if template.is_file():  # the one that it was trained with, which is not always that of the base
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(merged)
    del base, model  # the evaluation loads the merged model
    merged_model = get_model(
        f"hf/{options.adapter}",  # the name in logs
        model_path=merged,
        dtype=options.dtype,
        device=options.device,
        do_sample=False,  # greedy decoding; Inspect samples by default
        # A chat template writes the special tokens; the tokenizer would put a second one in front.
        tokenizer_call_args={"add_special_tokens": not tokenizer.chat_template},
    )
    [log] = eval(
        options.task,
        model=merged_model,
        limit=options.limit,
        max_tokens=options.max_tokens,
        log_dir=options.log_dir,
    )
sys.exit(log.status != "success")  # Inspect has printed the scores, or what failed
