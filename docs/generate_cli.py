"""Write docs/cli.md from the help texts of the command line.

python docs/generate_cli.py            write it
python docs/generate_cli.py --check    exit 1 if it differs from what is there
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
HEAD = """# Command line

Generated from `--help` by `make docs`; do not edit.

"""


def page() -> str:
    """The whole page, in the order of `organism --help`."""
    sys.path.insert(0, str(ROOT))
    import organism

    return HEAD + "\n".join(sections(organism.command_line(), "organism", None))


def sections(command, name: str, parent):
    """One section for the command, then one for each command below it."""
    import click

    context_settings = dict(command.context_settings, terminal_width=WIDTH, max_content_width=WIDTH)
    context = click.Context(command, info_name=name, parent=parent, **context_settings)
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from sections(command.get_command(context, child), child, context)


def main() -> int:
    path = ROOT / "docs" / "cli.md"
    text = page()
    if "--check" in sys.argv[1:]:
        if path.read_text(encoding="utf-8") != text:
            print("docs/cli.md is not what --help says: run `make docs`.", file=sys.stderr)
            return 1
        return 0
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
