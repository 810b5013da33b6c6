"""Make the profiles that the bundled demo brings: ``python -m moelab.calibration [name ...]``.

Measures the demo for those strategies, or all that have a calibration, and writes the results into
the package; to be run again when the demo, the codecs or a calibration change.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import moelab
from moelab import calibration
from moelab.calibration.profile import SHIPPED, written
from moelab.scheduling.writing import write_atomically


def main() -> None:
    """Calibrate the demo for every strategy."""
    SHIPPED.mkdir(exist_ok=True)
    with moelab.open("demo", budget="50%", measure_kl=False) as lab:
        for name in sys.argv[1:] or calibration.NAMES:
            text = written(asdict(lab.calibrate(name, again=True))) + "\n"
            write_atomically(SHIPPED / f"{name}.json", text.encode())


if __name__ == "__main__":
    main()
