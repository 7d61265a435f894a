"""The ``megarl`` command and what the scripts in ``tools/`` share with it."""


def main() -> None:
    """Run the ``megarl`` command and exit."""
    from megarl.cli.app import app
    from megarl.cli.command_line import run

    run(app)
