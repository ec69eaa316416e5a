"""Taking over an adapter that exists, as the adapter of a point."""

import json
import shutil
from pathlib import Path

from lorasweep.adapters.adapter import AdapterError, read_adapter
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD
from lorasweep.util.digest import digest_file
from lorasweep.util.files import write_record


def adopt_adapter(source: Path, adapter: Path, base: Path) -> None:
    """Copy an adapter that was trained elsewhere, with a record of where it is from and which base it was checked on.

    What a trainer of ours recorded of it is kept. Of what a training left at `adapter` and beside it, nothing stays.

    Raises:
        AdapterError: as `read_adapter` does.
    """
    checkpoint = read_checkpoint(base)
    taken = read_adapter(source, checkpoint)
    (adapter.parent / "recipe.yaml").unlink(missing_ok=True)
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir(parents=True)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        shutil.copyfile(source / name, adapter / name)
    if (copied := digest_file(adapter / ADAPTER_WEIGHTS)) != taken.sha256:
        raise AdapterError(f"has changed while it was copied ({taken.sha256[:12]}, then {copied[:12]})")
    record = json.loads((source / RECORD).read_text(encoding="utf-8")) if (source / RECORD).is_file() else {}
    record |= {
        "adopted_from": str(source.resolve()),
        "adopted_sha256": taken.sha256,
        "base_model_fingerprint": checkpoint.fingerprint,
    }
    write_record(adapter / RECORD, record)
