"""Run `python -m ifvit` as the command `ifvit`."""

from ifvit.cli import main

if __name__ == "__main__":
    main()
