"""The training tests run several ranks as those of the losses do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "losses"))
