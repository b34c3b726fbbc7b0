"""Run a recipe as this rank and write down how it ended: FOLDER RECIPE [FLAGS...]."""

import os
import signal
import subprocess
import sys
from pathlib import Path

# The launcher ends all ranks when the first one ends; each must still be seen to end by itself.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
folder, *command = arguments
code = subprocess.run([sys.executable, *command], check=False).returncode
(Path(folder) / f"exit-{os.environ['RANK']}").write_text(str(code))
sys.exit(code)
