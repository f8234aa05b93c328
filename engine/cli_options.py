"""What the commands of the command line share: their parsers, and the settings of training beside their own options."""

import argparse
from collections.abc import Callable


def parser_of(name: str, command: Callable, settings: bool = False, epilog: str = "") -> argparse.ArgumentParser:
    """`settings`: the command also takes those of training, and its --help is followed by theirs."""
    return argparse.ArgumentParser(
        prog=f"higgs-engine {name}",
        description=command.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not settings,
        allow_abbrev=False,
    )


def with_settings(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, and the settings that follow."""
    if {"-h", "--help"} & set(argv):
        from engine.config import help_text

        print(parser.format_help())
        print(help_text(parser.prog))
        raise SystemExit(0)
    return parser.parse_known_args(argv)
