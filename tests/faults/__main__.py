"""Do harm on purpose, and count what it costs.

    python -m tests.faults kill-training --count 100
    python -m tests.faults rank-death --count 20 --seed 1
    python -m tests.faults hostile-images --count 20000 --work /tmp/faults
    python -m tests.faults long-run --count 2000

The last line of standard output is JSON: faults tried, survived and lost. Exit status 1 if anything was lost.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.faults import hostile, long_run, packing, training

FAULTS = {
    "kill-training": training.kill_training,
    "rank-death": training.rank_death,
    "stop-signals": training.stop_signals,
    "disk-full": training.disk_full,
    "hung-rank": training.hung_rank,
    "kill-packing": packing.kill_packing,
    "long-run": long_run.long_run,
    "hostile-images": hostile.hostile_images,
}


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--count", type=int, default=10, help="faults to try; steps of long-run")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--work", type=Path, help="a folder for runs; reference runs in it are used again")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = settings.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        tally = FAULTS[settings.fault](settings.count, settings.seed, work)
    print(tally.to_json())
    sys.exit(bool(tally.lost))


if __name__ == "__main__":
    main()
