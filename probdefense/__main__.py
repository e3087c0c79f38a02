"""``python -m probdefense`` is the command."""

from probdefense.study.cli import main

if __name__ == "__main__":
    main()
