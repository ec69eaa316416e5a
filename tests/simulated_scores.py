"""Scores that are drawn from known shares: how often intervals cover the truth, and tests find what is not there."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from lorasweep.results.inference import Scores

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)


@dataclass(frozen=True)
class Simulation:
    """Trainings that are right on a sample by chance: its log odds are of the setting, the seed and the sample."""

    share: float
    """About the share that is right; `truth` is the exact one."""
    seeds: int
    samples: int = 100
    spread: float = 0.5
    """Standard deviation of seeds, in log odds."""
    hardness: float = 1.5
    """Standard deviation of clusters of samples, in log odds."""
    size: int = 1
    """Samples in a cluster."""
    gain: float = 0.0
    """How much more the setting has than the base, in log odds."""

    @property
    def truth(self) -> float:
        """The share over all seeds and samples."""
        return self._integrate(self.gain, np.hypot(self.spread, self.hardness))

    @property
    def base_truth(self) -> float:
        """The base model's share over all samples."""
        return self._integrate(0.0, self.hardness)

    def draw(self, count: int, seed: int = 0) -> Iterator[tuple[Scores, Scores, Scores]]:
        """Give scores of a setting, of another one that has the same chances, and of the base, on the same samples."""
        draw = np.random.default_rng(seed)
        names = tuple(map(str, range(self.samples)))
        clusters = np.arange(self.samples) // self.size if self.size > 1 else None
        for _ in range(count):
            of_clusters = draw.normal(0, self.hardness, -(-self.samples // self.size))
            hardness = np.repeat(of_clusters, self.size)[: self.samples]

            def score(seeds: int, spread: float, gain: float, hardness: NDArray[np.float64] = hardness) -> Scores:
                odds = special.logit(self.share) + gain + draw.normal(0, spread, (seeds, 1)) + hardness
                values = (draw.uniform(size=(seeds, self.samples)) < special.expit(odds)) * 1.0
                return Scores(values, names, clusters, is_trained=spread > 0)

            yield (
                score(self.seeds, self.spread, self.gain),
                score(self.seeds, self.spread, self.gain),
                score(1, 0.0, 0.0),
            )

    def _integrate(self, gain: float, spread: float) -> float:
        chances = special.expit(special.logit(self.share) + gain + spread * NODES)
        return float((WEIGHTS * chances).sum() / WEIGHTS.sum())
