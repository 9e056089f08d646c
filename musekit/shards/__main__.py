"""`python -m musekit.shards`."""
import sys

from musekit.shards.command import main

if __name__ == "__main__":
    sys.exit(main())
