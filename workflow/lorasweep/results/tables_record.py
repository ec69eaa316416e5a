"""The record of what the tables and the report were made of."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorasweep.layout import MANIFEST


def digest_sources(results: Path, points: Iterable[str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return a digest for each rule that summarises the points: of the points' manifests, and of the rule's settings.

    `settings` has the rules in their order. Each digest includes the one before.
    """
    digest = hashlib.sha256()
    for point in sorted(points):
        digest.update(f"\0{point}\0".encode())
        digest.update((results / point / MANIFEST).read_bytes())
    digests = {}
    for rule, text in settings.items():
        digest.update(f"\0{rule}\0{text}".encode())
        digests[rule] = digest.hexdigest()
    return digests
