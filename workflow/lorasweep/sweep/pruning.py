"""The race of a sweep's trainings (`prune`): who competes, the numbers on disk, and what follows from them.

Everything follows from what is on disk: the records of the trainings' parts, the logs of adapters, scores on a task.
So a decision can be made again, and compared with the one that was made.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.experiment.pruning import Candidate, Verdict, decide
from lorasweep.experiment.sections import Prune
from lorasweep.layout import (
    ADAPTER_WEIGHTS,
    PRUNE,
    RACE,
    RECORD,
    RUNGS,
    TRAINING_LOG,
    TRAININGS,
    get_decision_file,
    get_part_file,
    get_part_name,
    get_rung_folder,
)
from lorasweep.trainers.identity import read_identity
from lorasweep.trainers.rungs import get_pruned_epoch, has_diverged
from lorasweep.trainers.training_log import read_log
from lorasweep.util.errors import JobError
from lorasweep.util.files import find_record, write_record
from lorasweep.util.formats import format_score


@dataclass(frozen=True)
class Contender:
    """A training that competes."""

    training: str
    points: tuple[str, ...]
    """The points that use its adapter."""
    setting: str
    """What it shares with its replicates; see `Candidate`."""
    rivals: str
    identity: str
    """Of the training; see lorasweep.trainers.identity."""
    epochs: int
    spec: str = ""
    """The specification of its evaluation on the task that decides, as JSON; empty without a task."""
    spec_sha256: str = ""


@dataclass(frozen=True)
class Number:
    """What is known of a training at a rung."""

    value: float | None = None
    """The validation loss or the score; `None` if it diverged, or went further without one."""
    has_diverged: bool = False
    keeps_place: bool = False
    """Whether an earlier decision let it go on."""


@dataclass(frozen=True)
class Race:
    """The trainings that compete. The decisions follow from what is on disk when they are first asked for."""

    results: Path
    """The experiment's folder."""
    prune: Prune
    contenders: Sequence[Contender]
    _logs: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)
    _let_on: dict[int, set[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, results: Path) -> "Race":
        """Read the race that the run has recorded."""
        record = find_record(results / PRUNE / RACE)
        if not record:
            raise JobError(f"{results / PRUNE / RACE} is missing: only a run writes it")
        contenders = [Contender(**{**each, "points": tuple(each["points"])}) for each in record["contenders"]]
        return cls(results, Prune.model_validate(record["prune"]), contenders)

    def record(self) -> None:
        """Record the race for the jobs of a run.

        Who was let go on is recorded too, as Snakemake deletes a decision before it is made again.
        """
        let_on = {str(after): sorted(self._list_let_on(after)) for after in self.prune.after}
        race = {
            "prune": self.prune.model_dump(mode="json"),
            "contenders": [asdict(each) for each in self.contenders],
            "let_on": self._find_recorded_let_on() | let_on,
        }
        write_record(self.results / PRUNE / RACE, race)

    def decide(self, until: int | None = None) -> dict[int, dict[str, Any] | None]:
        """Return the decision after each epoch, up to `until`; `None` where it depends on a number that is missing.

        A decision is what its file has: the settings of `prune`, and of each training that was still in the race
        whether it stays, and why.
        """
        decisions: dict[int, dict[str, Any] | None] = {}
        running = list(self.contenders)
        for after in self.prune.after:
            if until is not None and after > until:
                break
            numbers = {each.training: self.read_number(each, after) for each in running}
            verdicts = None if None in decisions.values() else self._compare(running, numbers)
            if verdicts is None:
                decisions[after] = None
                continue
            decisions[after] = self._describe(after, running, numbers, verdicts)
            running = [each for each in running if verdicts[each.training].stays]
        return decisions

    def list_missing(self, after: int) -> list[Contender]:
        """Return the trainings in the race whose part up to an epoch has to be trained for a decision.

        While an earlier decision is not known, all whose parts left nothing.
        """
        return [each for each in self._list_running(after) if not self.has_part(each, after)]

    def has_part(self, contender: Contender, after: int) -> bool:
        """Whether a training's part need not be trained: its number is known, or the adapter to score is there."""
        return self.read_number(contender, after) is not None or bool(
            self.prune.task and self.find_adapter(contender, after)
        )

    def read_number(self, contender: Contender, after: int) -> Number | None:
        """Return what is known of a training at a rung; `None` if nothing is."""
        record = find_record(get_part_file(self.results, contender.training, after))
        if has_diverged(self._get_folder(contender), record):
            return Number(has_diverged=True)
        value = self._read_score(contender, after) if self.prune.task else self._read_loss(contender, after, record)
        if value is not None:
            return Number(value)
        if self.prune.task and not self.find_adapter(contender, after) and self._went_further(contender, after):
            return Number(keeps_place=contender.training in self._list_let_on(after))
        return None

    def find_adapter(self, contender: Contender, after: int) -> Path | None:
        """Return the folder with the adapter of a training after an epoch, if it is there."""
        folders = [get_rung_folder(self._get_folder(contender), after)]
        folders += [
            folder
            for folder in self._list_adapters(contender)
            if get_pruned_epoch(find_record(folder / RECORD)) == after
        ]
        return next(
            (each for each in folders if all((each / name).is_file() for name in (ADAPTER_WEIGHTS, RECORD))), None
        )

    def get_score_file(self, contender: Contender, after: int) -> Path:
        """Return the file with a training's score on the task that decides."""
        return self.results / PRUNE / "scores" / f"{get_part_name(contender.training, after)}.json"

    def write_decision(self, after: int) -> dict[str, Any]:
        """Write the decision after an epoch, and return it.

        Raises:
            JobError: a number is missing that it takes.
        """
        decisions = self.decide(after)
        decision = decisions[after]
        if decision is None:
            epoch = next(epoch for epoch, each in decisions.items() if each is None)
            missing = [each.training for each in self._list_running(epoch) if self.read_number(each, epoch) is None]
            more = " and others" if len(missing) > 3 else ""
            raise JobError(f"no number of {', '.join(missing[:3])}{more} after epoch {epoch} yet")
        write_record(get_decision_file(self.results, after), decision)
        return decision

    def _compare(self, running: Iterable[Contender], numbers: Mapping[str, Number | None]) -> dict[str, Verdict] | None:
        candidates = []
        for each in running:
            known = numbers[each.training]
            number = known or Number()
            facts = (number.value, number.has_diverged, number.keeps_place)
            candidates.append(Candidate(each.training, each.setting, each.rivals, *facts, is_awaited=known is None))
        return decide(candidates, self.prune.keep, higher_is_better=self.prune.higher_is_better)

    def _list_running(self, after: int) -> list[Contender]:
        """Return the trainings that no decision before an epoch stops, as far as those decisions are known."""
        stopped = {
            name
            for epoch, decision in self.decide(after).items()
            if epoch < after and decision
            for name, verdict in decision["trainings"].items()
            if not verdict["stays"]
        }
        return [each for each in self.contenders if each.training not in stopped]

    def _went_further(self, contender: Contender, after: int) -> bool:
        """Whether a training has ended with the adapter of a later epoch."""
        ends = [get_pruned_epoch(find_record(folder / RECORD)) for folder in self._list_adapters(contender)]
        return any(end is None or end > after for end in ends)

    def _list_let_on(self, after: int) -> set[str]:
        """Return the trainings that the last decision that compared them at an epoch let go on."""
        if after not in self._let_on:
            decided = find_record(get_decision_file(self.results, after)).get("trainings", {}).items()
            compared = {name: each for name, each in decided if each["rank"] is not None or each.get("keeps_place")}
            earlier = {*self._find_recorded_let_on().get(str(after), ())} - compared.keys()
            self._let_on[after] = earlier | {name for name, verdict in compared.items() if verdict["stays"]}
        return self._let_on[after]

    def _find_recorded_let_on(self) -> dict[str, list[str]]:
        recorded: dict[str, list[str]] = find_record(self.results / PRUNE / RACE).get("let_on", {})
        return recorded

    def _get_folder(self, contender: Contender) -> Path:
        return self.results / TRAININGS / contender.training

    def _list_adapters(self, contender: Contender) -> list[Path]:
        """Return the folders of the training's adapter, as the training and its points have it."""
        folders = [self._get_folder(contender), *(self.results / point for point in contender.points)]
        adapters = [folder / "adapter" for folder in folders if (folder / "adapter" / RECORD).is_file()]
        return [adapter for adapter in adapters if _is_of(contender, adapter.parent)]

    def _list_rungs(self, contender: Contender) -> list[Path]:
        """Return the folders of the adapters after earlier epochs, which a training that has not ended keeps."""
        folder = self._get_folder(contender)
        return sorted(folder.glob(f"{RUNGS}/after=*")) if _is_of(contender, folder) else []

    def _read_loss(self, contender: Contender, after: int, record: Mapping[str, Any]) -> float | None:
        if record.get("validation_loss") is not None:
            return float(record["validation_loss"])
        # Of a training that went further before it had to compete.
        if contender.training not in self._logs:
            losses: dict[int, float] = {}
            for adapter in (*self._list_rungs(contender), *self._list_adapters(contender)):
                rows = read_log(adapter / TRAINING_LOG)
                losses |= {row.epoch: row.validation_loss for row in rows if row.validation_loss is not None}
            self._logs[contender.training] = losses
        return self._logs[contender.training].get(after)

    def _read_score(self, contender: Contender, after: int) -> float | None:
        record, task = find_record(self.get_score_file(contender, after)), self.prune.task
        asked = (contender.spec_sha256, task and task.metric)
        if not record or (record.get("evaluation_sha256"), record.get("asked_metric")) != asked:
            return None
        made = find_record(get_part_file(self.results, contender.training, after)).get("adapter_sha256")
        return float(record["score"]) if made in (None, record.get("adapter_sha256")) else None

    def _describe(
        self,
        after: int,
        running: Iterable[Contender],
        numbers: Mapping[str, Number | None],
        verdicts: Mapping[str, Verdict],
    ) -> dict[str, Any]:
        what = f"score on {self.prune.task.task}" if self.prune.task else "validation loss"
        trainings = {}
        for each in running:
            verdict, number = verdicts[each.training], numbers[each.training]
            trainings[each.training] = {
                **asdict(verdict),
                "points": sorted(each.points),
                "epochs": each.epochs,
                "number": number and number.value,
                "setting_number": verdict.number,
                "why": describe_verdict(verdict, what),
            }
        return {
            "after": after,
            "keep": self.prune.keep,
            "by": self.prune.model_dump(mode="json")["by"],
            "higher_is_better": self.prune.higher_is_better,
            "trainings": dict(sorted(trainings.items())),
        }


def _is_of(contender: Contender, folder: Path) -> bool:
    """Whether the recipe in a folder is that of a training."""
    recipe = folder / "recipe.yaml"
    return recipe.is_file() and read_identity(recipe) == contender.identity


def describe_verdict(verdict: Verdict, what: str) -> str:
    """Return why a training stays or stops; `what` is what was compared."""
    places = f"of {verdict.rivals}, of which {verdict.kept} go on"
    if verdict.keeps_place:
        return f"an earlier decision let it go on, and it has no {what} now: it keeps a place {places}"
    if verdict.rank is None and not verdict.stays:
        return f"settings that an earlier decision let go on keep all places {places}"
    if verdict.rank is None:
        return f"it went further before, without a {what}: it is not compared"
    seeds = f", the mean of {verdict.seeds} seeds" if verdict.seeds > 1 else ""
    number = "it diverged" if verdict.has_diverged else f"{what} {format_score(verdict.number or 0.0)}{seeds}"
    return f"{number}: place {verdict.rank} {places}"


def find_end(decisions: Mapping[int, Mapping[str, Any] | None], training: str) -> tuple[int | None, bool]:
    """Return the epoch after which a training stops, and whether that is certain.

    `None`: it is trained to its end; of an uncertain end, an earlier stop is known not to be.
    """
    for after, decision in decisions.items():
        if decision is None:
            return None, False
        if not decision["trainings"].get(training, {"stays": True})["stays"]:
            return after, True
    return None, True
