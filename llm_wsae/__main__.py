"""``python -m llm_wsae``, also under torchrun."""

import sys

from llm_wsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
