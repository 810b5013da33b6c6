"""Make the profiles that the bundled demo brings: ``python -m moelab.calibration [name ...]``.

Measures the demo for those strategies, or all that have a calibration, and writes the results into
the package; to be run again when the demo, the codecs or a calibration change.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import moelab
from moelab import calibration
from moelab.calibration.profile import FORMAT, SHIPPED


def main() -> None:
    """Calibrate the demo for every strategy."""
    SHIPPED.mkdir(exist_ok=True)
    with moelab.open("demo", budget="50%", measure_kl=False) as lab:
        for name in sys.argv[1:] or calibration.NAMES:
            made = asdict(lab.calibrate(name, again=True))
            text = json.dumps({"format": FORMAT} | made, separators=(",", ":"))
            (SHIPPED / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
