"""`python -m sparsekit`: the command line, where its script is not on the path."""

from sparsekit.cli import main

if __name__ == "__main__":
    main()
