"""`python -m musekit` and `accelerate launch -m musekit`."""
import sys

from musekit.cli import main

sys.exit(main())
