"""`python -m moelab`: the command line."""

from moelab.cli import main

if __name__ == "__main__":
    main()
