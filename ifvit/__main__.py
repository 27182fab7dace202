"""`python -m ifvit` is `ifvit`."""

from ifvit.cli import main

if __name__ == "__main__":
    main()
