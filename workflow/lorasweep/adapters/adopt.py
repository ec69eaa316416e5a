"""Adopt an existing adapter as the adapter of a point."""

import json
import shutil
from pathlib import Path

from lorasweep.adapters.adapter import AdapterError, read_adapter
from lorasweep.adapters.identity import digest_config
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD, TEMPLATE_DIGEST
from lorasweep.util.digest import digest_file
from lorasweep.util.files import write_record


def adopt_adapter(source: Path, adapter: Path, base: Path, chat_template: str | None = None) -> None:
    """Copy an adapter that was trained elsewhere, and record its source and the base model it was checked against.

    The base model's tokenizer is copied beside it, as for a trained adapter. `chat_template` is the text of a template
    that replaces the base model's own. If the source has a record of a lorasweep trainer, its other entries are kept.
    An adapter and a recipe that an earlier training left in the point are removed.

    Raises:
        AdapterError: as for `read_adapter`, or the weights changed during the copy.
    """
    checkpoint = read_checkpoint(base, chat_template)
    original = read_adapter(source, checkpoint)
    (adapter.parent / "recipe.yaml").unlink(missing_ok=True)
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir(parents=True)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        shutil.copyfile(source / name, adapter / name)
    if (copied := digest_file(adapter / ADAPTER_WEIGHTS)) != original.sha256:
        raise AdapterError(f"has changed while it was copied (sha256 {original.sha256[:12]}, then {copied[:12]})")
    record = json.loads((source / RECORD).read_text(encoding="utf-8")) if (source / RECORD).is_file() else {}
    record.pop(TEMPLATE_DIGEST, None)
    checkpoint.copy_tokenizer(adapter)
    record |= {
        "adopted_from": str(source.resolve()),
        "adopted_sha256": original.sha256,
        "adopted_config_sha256": digest_config(adapter),
        "base_model_fingerprint": checkpoint.fingerprint,
        **checkpoint.template_record,
    }
    write_record(adapter / RECORD, record)
