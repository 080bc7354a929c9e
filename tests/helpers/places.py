"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
HELPERS = Path(__file__).parent
