"""``command-line:: module:function`` documents the commands of the parser that the function makes.

A section per command with its description, usage and options, which ``:option:`` can refer to. The
words are those of ``--help``, so that there is one place to change them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from importlib import import_module

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

WIDTH = 88


class CommandLine(SphinxDirective):
    """The directive; its argument names a function that returns an ``ArgumentParser``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Sections of all commands, one after the other, however deep they are."""
        module, _, function = self.arguments[0].partition(":")
        parser = getattr(import_module(module), function)()
        return [self._section(command) for command in _commands(parser)]

    def _section(self, parser: argparse.ArgumentParser) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(parser.prog)])
        section["support_smartquotes"] = False  # or two hyphens of an option would be a dash
        section += nodes.title(parser.prog, parser.prog)
        self.state.document.note_implicit_target(section, section)
        section += _paragraph(parser.description or "")
        usage = _usage(parser)
        section += nodes.literal_block(usage, usage, language="none")
        arguments = nodes.definition_list()
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                arguments += self._argument(parser, action)
        if arguments.children:
            section += arguments
        return section

    def _argument(
        self, parser: argparse.ArgumentParser, action: argparse.Action
    ) -> nodes.definition_list_item:
        value = _value(action)
        names = [f"{name} {value}".rstrip() for name in action.option_strings] or [value]
        term = nodes.term()
        for position, name in enumerate(names):
            term += nodes.Text(", " if position else "")
            term += nodes.literal(name, name)
        for name in action.option_strings:
            target = nodes.make_id(f"{parser.prog}-{name}")
            term["ids"].append(target)
            self.env.domains.standard_domain.add_program_option(
                parser.prog, name, self.env.docname, target
            )
        explanation = nodes.definition("", _paragraph(_help(parser, action)))
        return nodes.definition_list_item("", term, explanation)


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the commands that do something, in order."""
    groups = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    if not groups:
        yield parser
    for group in groups:
        for command in group.choices.values():
            yield from _commands(command)


def _usage(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = partial(argparse.HelpFormatter, width=WIDTH)  # not the terminal's
    if hasattr(parser, "color"):
        parser.color = False  # since Python 3.14
    return parser.format_usage().removeprefix("usage: ").rstrip()


def _value(action: argparse.Action) -> str:
    """What stands for the value in the usage; nothing for a switch."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    if action.metavar is None and action.choices is not None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    return action.metavar or (action.dest.upper() if action.option_strings else action.dest)


def _paragraph(text: str) -> nodes.paragraph:
    """Words, and between backticks code."""
    paragraph = nodes.paragraph()
    for position, piece in enumerate(text.split("`")):
        paragraph += nodes.literal(piece, piece) if position % 2 else nodes.Text(piece)
    return paragraph


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the directive."""
    app.add_directive("command-line", CommandLine)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
