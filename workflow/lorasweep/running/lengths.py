"""Check before a run what was counted of its training and validation samples."""

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.points import Point
from lorasweep.experiment.sections import DATA_KEYS, MODEL_KEY, SET_KEY, Data, DataKey
from lorasweep.planning.counting import Samples, read_count
from lorasweep.planning.lengths import check_positions, check_too_long
from lorasweep.sweep.checks import check_batch, find_trainer
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.errors import InputError, naming_file, naming_key


def get_samples(sweep: Sweep, point: Point) -> Samples:
    """Return the samples of a point that is trained, as they are counted."""
    return Samples(point.data, point.model, sweep.get_fingerprint(point.name), point.trainer)


def check_lengths(sweep: Sweep, trained: Collection[str]) -> list[str]:
    """Check the counted samples of the points to train; return notes on those that are cut or left out.

    Nothing is checked that was not counted.

    Raises:
        InputError: a sample cannot be tokenized, or is longer than it may be; or an epoch has no optimizer step.
    """
    points = [] if sweep.missing_model else [sweep.points[name] for name in sweep.trained if name in trained]
    counts = {
        samples: read_count(sweep.results, samples) for samples in {get_samples(sweep, point) for point in points}
    }
    notes: dict[tuple[Samples, DataKey, int | None, int | None], str] = {}
    with naming_file(sweep.source):
        for point in points:
            samples = get_samples(sweep, point)
            count = counts[samples]
            if count is None:
                continue
            if count.refused:
                raise InputError(count.refused)
            limit = point.controls.max_seq_len
            most = _count_positions(point)
            has_own = not {SET_KEY, MODEL_KEY, *Data.model_fields}.isdisjoint(point.swept)
            for key in DATA_KEYS:
                lengths = getattr(count, key)
                if lengths and (samples, key, limit, most) not in notes:
                    with naming_key(f"point '{point.name}'") if has_own else nullcontext():
                        note = check_too_long(lengths, key, limit) if limit else ""
                        if most:
                            check_positions(lengths, key, limit, most)
                    notes[samples, key, limit, most] = f"point '{point.name}': {note}" if note and has_own else note
            if count.train:
                sequences = count.train.get_sequences(point.controls).number
                check_batch(point, sequences, "packs" if point.controls.packed else "samples")
    return list(dict.fromkeys(filter(None, notes.values())))


def _count_positions(point: Point) -> int | None:
    """Return the most tokens of a sequence that a point's model takes in training; `None`: any number."""
    count = getattr(find_trainer(point.trainer), "count_positions", None)
    return count(read_checkpoint(Path(point.model.path)), point.controls) if count else None
