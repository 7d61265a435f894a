"""``python -m megarl.cli``, for launchers that start a module."""

from megarl.cli import main

if __name__ == "__main__":
    main()
