import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))  # short real runs, as the tests of the command make them
