"""Evaluate a LoRA adapter on its base model in memory, with lorasweep's model provider for Inspect: nothing is written.

    python scripts/eval_adapter_direct.py --base models/Llama-3.1-8B --adapter adapters/rank8 --task mine.py@mine

Needs torch, transformers, peft, accelerate, inspect-ai and lorasweep, which registers the provider when it is
installed: `.venv/eval/bin/python` has them. The same as a command:

    inspect eval mine.py@mine --model lorasweep/rank8 -M base=models/Llama-3.1-8B -M adapter=adapters/rank8
"""

import argparse
import sys
from pathlib import Path

import torch
from inspect_ai import eval
from inspect_ai.model import get_model
from transformers import AutoTokenizer

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

chat_template = AutoTokenizer.from_pretrained(options.base).chat_template
template = Path(options.adapter, "chat_template.jinja")
if template.is_file():  # the one that it was trained with, which is not always that of the base
    chat_template = template.read_text(encoding="utf-8")
model = get_model(
    f"lorasweep/{options.adapter}",  # the name in logs
    base=options.base,
    adapter=options.adapter,
    dtype=options.dtype,
    device=options.device,
    do_sample=False,  # greedy decoding; Inspect samples by default
    chat_template=chat_template,
    # A chat template writes the special tokens; the tokenizer would put a second one in front.
    tokenizer_call_args={"add_special_tokens": not chat_template},
)
[log] = eval(
    options.task,
    model=model,
    limit=options.limit,
    max_tokens=options.max_tokens,
    log_dir=options.log_dir,
)
sys.exit(log.status != "success")  # Inspect has printed the scores, or what failed
