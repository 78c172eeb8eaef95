"""A conversation with a model in the terminal.

python -m serving.chat MODEL|URL

MODEL is the folder of a model, adapter or prefix; URL a server of OpenAI's chat API. /help lists
what can be typed beside questions. Where lines come from a pipe, each is a question of its own and
gets its answer on the standard output; with --history each goes on from those before it.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.commands import Parser, number, run_command, whole
from finetune.flag_effects import Effect, check_given
from serving.chat.conversation import Conversation
from serving.chat.screen import Screen
from serving.chat.session import ChatSession
from serving.endpoints.opening import (
    ENDPOINT_EFFECTS,
    EndpointFlags,
    add_endpoint_flags,
    open_endpoint,
)
from serving.endpoints.replies import AnswerRefused, Endpoint
from serving.tools.flags import add_tool_flags

if TYPE_CHECKING:
    from serving.chat.tool_mode import ToolMode

SETTINGS = {"temperature": "temperature", "top_p": "top_p", "max_new_tokens": "max_tokens"}
SETTINGS |= {"seed": "seed"}
CHAT_EFFECTS = ENDPOINT_EFFECTS | {
    "images": Effect("--tools or --code_interpreter", lambda c: c.tools or c.code_interpreter)
}


@dataclass(frozen=True)
class ChatFlags(EndpointFlags):
    """The flags of the command; `build_parser` has their meaning and defaults."""

    system: str | None
    temperature: float | None
    top_p: float | None
    max_new_tokens: int | None
    seed: int | None
    load: str | None
    history: bool
    history_file: str | None
    tools: list[str]
    code_interpreter: bool
    images: str | None

    @property
    def has_tools(self) -> bool:
        return bool(self.tools or self.code_interpreter)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="serving.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL|URL", help="a folder, or http://HOST:PORT/v1")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    heat = "0 takes the likeliest token [the family's]"
    parser.add_argument("--temperature", type=number(0, 2), metavar="T", help=heat)
    nucleus = "sample among the likeliest tokens of this probability [the family's]"
    parser.add_argument("--top_p", type=number(0, 1), metavar="P", help=nucleus)
    longest = "longest answer, in tokens [as far as --max_tokens allows]"
    parser.add_argument("--max_new_tokens", type=whole(1), metavar="N", help=longest)
    parser.add_argument("--seed", type=whole(0), metavar="N", help="of sampling [drawn]")
    parser.add_argument("--load", metavar="FILE", help="go on with the messages of /save")
    together = "from a pipe: lines are one conversation [each is a question of its own]"
    parser.add_argument("--history", action="store_true", help=together)
    typed = "keep the typed lines in this file, for the arrow keys [they are not kept]"
    parser.add_argument("--history_file", metavar="FILE", help=typed)
    add_endpoint_flags(parser)
    add_tool_flags(parser)
    folder = "with tools: where their images are written [a new temporary folder]"
    parser.add_argument("--images", metavar="DIR", help=folder)
    return parser


def settings_of(flags: ChatFlags) -> dict[str, Any]:
    """The fields of a request that flags set."""
    settings = {}
    for flag, name in SETTINGS.items():
        if (value := getattr(flags, flag)) is not None:
            settings[name] = value
    return settings


def chat(flags: ChatFlags) -> int:
    """Talk, or answer a pipe's lines; the exit code."""
    screen = Screen(sys.stdin, sys.stdout, flags.history_file)
    if flags.load:
        Conversation().load(Path(flags.load))  # a wrong file is found before the model is loaded
    tools = open_tools(flags, screen)
    try:
        endpoint = open_endpoint(flags)
        try:
            return converse_with(endpoint, screen, flags, tools)
        finally:
            endpoint.close()
    finally:
        if tools is not None:
            tools.end_conversation()


def open_tools(flags: ChatFlags, screen: Screen) -> "ToolMode | None":
    """The tool mode of the flags, before a model is loaded. Raises ValueError."""
    if not flags.has_tools:
        return None
    from serving.chat.tool_mode import ToolMode

    images = None if flags.images is None else Path(flags.images)
    return ToolMode.open(flags.tools, screen, images, flags.code_interpreter)


def converse_with(
    endpoint: Endpoint, screen: Screen, flags: ChatFlags, tools: "ToolMode | None" = None
) -> int:
    """Talk with what answers. Raises ValueError, OSError."""
    if tools is not None:
        endpoint.check_tools()
    conversation = Conversation(settings=settings_of(flags))
    if flags.load:
        conversation.load(Path(flags.load))
    if flags.system is not None:
        conversation.set_system(flags.system)
    session = ChatSession(endpoint, screen, conversation, tools)
    if not screen.interactive:
        return answer_pipe(session, keeps=flags.history)
    screen.note(f"{endpoint.name}: /help lists the commands, /quit leaves")
    if tools is not None:
        screen.note(f"tools: {', '.join(tool.name for tool in tools.registry)}")
    session.run()
    return 0


def answer_pipe(session: ChatSession, *, keeps: bool) -> int:
    """Answer the lines of a pipe; 1 where one got no answer.

    A line without an answer is an error line on standard error and an empty one among the answers.

    Args:
        keeps: a line goes on from those before it.
    """
    screen, conversation = session.screen, session.conversation
    code = 0
    kept = list(conversation.messages)
    while True:
        try:
            line = screen.read_line()
        except EOFError:
            return code
        if not line.strip():
            continue
        if not keeps:
            conversation.messages = list(kept)
            if session.tools is not None:
                session.tools.end_conversation()
        try:
            session.ask(line)
        except AnswerRefused as error:
            conversation.take_back()
            screen.write("\n")
            screen.error(str(error))
            code = 1


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_given(parser, vars(args), CHAT_EFFECTS)
    flags = ChatFlags(**vars(args))
    return run_command(parser.prog, lambda: chat(flags))


if __name__ == "__main__":
    sys.exit(main())
