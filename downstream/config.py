"""Settings of a fine-tuning run: frozen dataclasses that are command lines, and config.json in the run's folder."""

import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_type_hints

import typeguard

from errors import UserError
from rundir import write_config

Arch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Fused = Literal["auto", "apex", "torch"]


@dataclass(frozen=True)
class RunSettings:
    """What every kind of settings can do; a field is an option of the command line and a key of config.json."""

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset({"run_dir", "device", "data_threads", "runs"})
    """What does not make it another run."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, of JSON's types."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Self:
        """Settings as `source` holds them. Raise UserError at keys that are unknown or missing and at wrong types."""
        if wrong := sorted(values.keys() ^ {field.name for field in fields(cls)}):
            raise UserError(f"{source}: settings {', '.join(wrong)} are unknown or missing: another version wrote it")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        hints = get_type_hints(cls)
        for name, value in values.items():
            try:
                typeguard.check_type(value, hints[name])
            except typeguard.TypeCheckError as error:
                raise UserError(f"{source}: setting {name}: {error}") from None
        return cls(**values)

    def claim(self, folder: Path, chosen: dict[str, Any]) -> None:
        """Write config.json: settings, what was chosen for the automatic ones, versions.

        Raises:
            UserError: The folder holds a run of other settings, which are named.
        """
        path = folder / "config.json"
        if path.exists():
            try:
                saved = json.loads(path.read_text())["settings"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is no config.json of a run: use another --run-dir") from None
            self._refuse(self.from_dict(saved, str(path)), path)
        write_config(folder, self, chosen)

    def _refuse(self, theirs: Self, path: Path) -> None:
        names = [field.name for field in fields(self) if field.name not in self.MAY_CHANGE]
        differing = [
            f"--{name.replace('_', '-')} {getattr(theirs, name)} there, {getattr(self, name)} here"
            for name in names
            if getattr(theirs, name) != getattr(self, name)
        ]
        if differing:
            raise UserError(
                f"{path} belongs to a run with other settings ({'; '.join(differing)}): "
                "use the same ones, or another --run-dir"
            )


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and standard deviation (of a sample) of every score, over the runs; one run alone has no deviation.

    Scores are the entries whose names end in `mean_auc`.
    """
    values = {name: [run[name] for run in runs] for name in runs[0] if name.endswith("mean_auc")}
    return {
        "mean": {name: statistics.fmean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) if len(found) > 1 else None for name, found in values.items()},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is, whatever happens, either the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
