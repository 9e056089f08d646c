"""`musekit-shards` and `python -m musekit.shards`."""
import sys


def main() -> int:
    "Runs the command; Ctrl-C is answered in one line while it is still being loaded, too."
    try:
        from musekit.shards import command

        return command.main()
    except KeyboardInterrupt:
        print("musekit-shards: stopped; the data in place are whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
