"""The folder of a comparison: its runs, its results, and what may be overwritten."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from condmod import SpecError, yaml_text
from condmod_lab import folders
from condmod_lab.config import TrainConfig, differences, make_config
from condmod_lab.errors import RunFolderError, RunFolderExistsError
from condmod_lab.run_folder import Into, RunFolder
from condmod_lab.writing import remove, save_text, writing

_PLAN: Final = "comparison.yaml"
_RUNS: Final = "runs"
_RESULTS: Final = ("results.json", "table.csv", "pairs.csv", "comparison.png", "report.html")
_UNFINISHED: Final = (".comparison.", ".results.")
_OWN: Final = re.compile(r"runs/[a-z0-9-]+-[0-9a-f]{6}(/seed-[0-9]+)?")


@dataclass(frozen=True, slots=True)
class ComparisonFolder:
    """The files of one comparison."""

    path: Path

    def run(self, spec: str, seed: int) -> RunFolder:
        """The folder of one run: a legible part of the spec, and enough to tell all specs apart."""
        legible = re.sub(r"[^a-z0-9]+", "-", spec.lower()).strip("-")[:40].strip("-")
        mark = hashlib.sha256(spec.encode()).hexdigest()[:6]
        return RunFolder(self.path / _RUNS / f"{legible}-{mark}" / f"seed-{seed}")

    def result(self, name: str) -> Path:
        """The path of one of the results."""
        assert name in _RESULTS
        return self.path / name

    def check(
        self, specs: Sequence[str], seeds: Sequence[int], config: TrainConfig, into: Into
    ) -> None:
        """See whether a comparison may enter the folder; nothing is touched.

        Args:
            specs: what is to be compared.
            seeds: the seeds of each.
            config: what all runs share.
            into: what may happen to a former comparison.

        Raises:
            RunFolderExistsError: the folder holds something that may not be overwritten.
            RunFolderError: the comparison to go on with has another config, or specs and seeds
                that are not among these; shows what differs.
        """
        if not folders.begun(self.path, _UNFINISHED):
            return
        if (self.path / "config.yaml").is_file():
            raise RunFolderExistsError(
                f"{self.path} holds a run of its own and no comparison; name another folder with "
                "--output"
            )
        folders.refuse_foreign(self.path, {_PLAN, _RUNS, *_RESULTS}, _UNFINISHED)
        former_specs, former_seeds, former = self._former()
        for run in self._runs():
            run.check(config, "overwrite")
        if into == "new":
            raise RunFolderExistsError(
                f"{self.path} holds a comparison already; add --resume to go on with it, "
                "--overwrite to replace it, or name another folder with --output"
            )
        changed = differences(shared(config), shared(former))
        if into == "resume" and changed:
            raise RunFolderError(
                f"{self.path} holds a comparison of another config, so it cannot go on with this "
                "one; it has\n" + "\n".join(changed) + "\ngive the same config, add --overwrite "
                "to replace the comparison, or name another folder with --output"
            )
        left = [spec for spec in former_specs if spec not in specs]
        left += [f"seed {seed}" for seed in former_seeds if seed not in seeds]
        if into == "resume" and left:
            raise RunFolderError(
                f"{self.path} also compares {', '.join(left)}; a comparison goes on with all it "
                "has and maybe more: name them too, or name another folder with --output"
            )

    def claim(
        self,
        specs: Sequence[str],
        seeds: Sequence[int],
        config: TrainConfig,
        into: Into,
    ) -> None:
        """Make the folder ready, with what is to be compared in it.

        Raises:
            RunFolderExistsError, RunFolderError: as `check`, or the folder cannot be written.
        """
        self.check(specs, seeds, config, into)
        folders.make(self.path)
        with writing(self.path):
            for entry in folders.entries(self.path):
                if entry.name.startswith(_UNFINISHED):
                    remove(entry)
                elif into == "overwrite" and entry.name != _PLAN:  # by it the folder is known
                    aside = self.path / f".comparison.{entry.name}"
                    remove(entry.rename(aside))  # so that a kill leaves no half of a run
        plan: dict[str, Any] = {"specs": list(specs), "seeds": list(seeds)}
        plan["config"] = shared(config).model_dump(mode="json")
        save_text(self.path / _PLAN, yaml_text.dump(plan))

    def _runs(self) -> list[RunFolder]:
        """The folder of every run.

        Raises:
            RunFolderExistsError: something else lies among them.
        """
        inside = sorted((*self.path.glob(f"{_RUNS}/*"), *self.path.glob(f"{_RUNS}/*/*")))
        names = {entry: entry.relative_to(self.path).as_posix() for entry in inside}
        own = [entry for entry in inside if entry.is_dir() and _OWN.fullmatch(names[entry])]
        folders.refuse(self.path, [names[entry] for entry in inside if entry not in own])
        return [RunFolder(entry) for entry in own if entry.parent.name != _RUNS]

    def _former(self) -> tuple[list[str], list[int], TrainConfig]:
        """What the folder compares: specs, seeds, what all runs share."""
        try:
            plan = yaml_text.read(self.path / _PLAN)
            specs, seeds = list(map(str, plan["specs"])), list(map(int, plan["seeds"]))
            return specs, seeds, make_config(plan["config"])
        except (SpecError, KeyError, TypeError, ValueError):
            raise RunFolderExistsError(
                f"{self.path} is not empty and holds no {_PLAN} of a comparison, so it is never "
                "overwritten; name another folder with --output"
            ) from None


def shared(config: TrainConfig) -> TrainConfig:
    """A config without what differs from run to run."""
    return TrainConfig.model_validate(
        {**config.model_dump(mode="json"), "modulator": "none", "seed": 0, "output": "runs"}
    )
