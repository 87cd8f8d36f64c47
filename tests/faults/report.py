"""How the harm is counted."""

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Faults of one sort."""

    fault: str
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """What went wrong, a line each."""
    moments: Counter[str] = field(default_factory=Counter)
    """When or how the faults came."""
    figures: dict[str, float] = field(default_factory=dict)
    """What else was measured, by name with units."""
    began_at_s: float = field(default_factory=time.monotonic)

    @property
    def survived(self) -> int:
        """Faults that cost nothing but time."""
        return self.tried - len(self.lost)

    def count(self, how: str, number: int = 1) -> None:
        """Count faults."""
        self.tried += number
        self.moments[how] += number

    def lose(self, problem: str) -> None:
        """Note that something was lost."""
        self.lost.append(problem)
        print(f"LOST {self.fault}: {problem}", file=sys.stderr, flush=True)

    def tell(self) -> None:
        """Say how far things are, on stderr."""
        seconds = time.monotonic() - self.began_at_s
        text = f"{self.fault}: {self.tried} tried, {len(self.lost)} lost, {seconds:.0f} s"
        print(text, file=sys.stderr, flush=True)

    def to_json(self) -> str:
        """One line with everything."""
        return json.dumps(
            {
                "fault": self.fault,
                "tried": self.tried,
                "survived": self.survived,
                "lost": len(self.lost),
                "problems": self.lost,
                "by": dict(self.moments),
                "seconds": round(time.monotonic() - self.began_at_s, 1),
                **self.figures,
            }
        )
