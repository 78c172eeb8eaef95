"""What a conversation's lines do: questions are answered, commands begin with a slash."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chatglm.commands import describe
from serving.chat.conversation import Conversation, parse_setting, shown_settings
from serving.chat.screen import Screen
from serving.endpoints.replies import AnswerStream, ChatReply, Endpoint

if TYPE_CHECKING:
    from serving.chat.tool_mode import ToolMode

Answering = Callable[[dict[str, Any]], AnswerStream]
LEAVE_HINT = "Ctrl-C again, or /quit, leaves"


class LeaveChat(Exception):
    """The person has had enough."""


class ChatSession:
    """A conversation on a screen.

    Attributes:
        answering: begins the answer to a request's body. The endpoint's `ask`; a tool mode puts its
            own here, and appends the messages of its calls to the body's list.
        tools: the tool mode; None without.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        screen: Screen,
        conversation: Conversation,
        tools: "ToolMode | None" = None,
    ) -> None:
        self.endpoint, self.screen, self.conversation = endpoint, screen, conversation
        self.tools = tools
        self.answering: Answering = endpoint.ask
        if tools is not None:
            self.answering = tools.answering(endpoint.ask)
            conversation.tools = tools.registry.descriptions()
        self._interrupted = False  # a second Ctrl-C leaves
        self._prefill = ""

    def run(self) -> None:
        """Talk until the person leaves."""
        try:
            while True:
                self._turn()
        except LeaveChat:
            pass
        finally:
            self.screen.close()

    def _turn(self) -> None:
        """Read once and do what was said."""
        prefill, self._prefill = self._prefill, ""
        try:
            line = self.screen.read(prefill=prefill)
        except EOFError:
            self.screen.note("")
            raise LeaveChat from None
        except KeyboardInterrupt:
            self.screen.note("")
            if self._interrupted:
                raise LeaveChat from None
            self._interrupted = True
            self.screen.note(LEAVE_HINT)
            return
        self._interrupted = False
        if not line.strip():
            return
        before = list(self.conversation.messages)
        try:
            self._do(line)
        except KeyboardInterrupt:
            self.screen.note("")
            raise LeaveChat from None
        except (ValueError, OSError) as error:
            self.conversation.messages = before
            self.screen.error(describe(error))

    def _do(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if not name.startswith("/") or name.startswith("//") or "/" in name[1:]:
            self.ask(line.removeprefix("/") if line.startswith("//") else line)
            return
        command = COMMANDS.get(name)
        if command is None:
            raise ValueError(f"no command {name}; /help lists them, and // begins a text with /")
        command.run(self, rest.strip())

    def ask(self, question: str) -> None:
        """Add a question, and the answer to it.

        Raises:
            AnswerRefused, EndpointDown: the question stands without an answer.
        """
        self.conversation.add_question(question)
        self.answer()

    def answer(self) -> None:
        """Answer the last message. Stopped before any text or call, it is taken back."""
        conversation = self.conversation
        body = conversation.body()
        asked = len(body["messages"])
        stream = self.answering(body)
        with self.screen.stoppable(stream.stop) as requests:
            for piece in stream:
                self.screen.write(piece)
        reply = stream.reply()
        self.screen.write("\n")
        self._interrupted = requests.interrupts > 0
        conversation.answered += 1
        called = body["messages"][asked:]  # of a tool mode
        conversation.messages += called
        if reply.text or "tool_calls" in reply.message:
            conversation.messages.append(reply.message)
        elif reply.finish_reason == "cancelled" and not called:
            conversation.take_back()
        else:
            conversation.messages.append({"role": "assistant", "content": ""})
        self.screen.note(summary_line(reply, reply.seconds))

    # ---- commands

    def show_help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            self.screen.note(f"{name} {command.usage}".ljust(22) + command.text)
        several = 'a line that ends with \\ goes on; """ begins and ends several lines'
        self.screen.note(several)
        self.screen.note("// begins a question with a slash")

    def clear(self, rest: str) -> None:
        self.conversation.clear()
        if self.tools is not None:
            self.tools.end_conversation()
        self.screen.note("the conversation is empty")

    def stop_nothing(self, rest: str) -> None:
        self.screen.note("no answer is being made")

    def set_system(self, rest: str) -> None:
        self.conversation.set_system(rest)
        self.screen.note(f"system: {rest}" if rest else "no system text")

    def save(self, rest: str) -> None:
        path = Path(named_file(rest, "/save"))
        self.conversation.save(path)
        self.screen.note(f"{len(self.conversation.messages)} messages saved in {path}")

    def load(self, rest: str) -> None:
        path = Path(named_file(rest, "/load"))
        self.conversation.load(path)
        self.screen.note(f"{len(self.conversation.messages)} messages from {path}")

    def retry(self, rest: str) -> None:
        question = self.conversation.take_back()
        if question is None:
            raise ValueError("/retry: there is no question yet")
        self.ask(question)

    def edit(self, rest: str) -> None:
        question = self.conversation.take_back()
        if question is None:
            raise ValueError("/edit: there is no question yet")
        if rest:
            self.ask(rest)
            return
        if "\n" in question:
            self.screen.note(question)  # a line cannot be filled with several
            self.screen.note("the last question is taken back; type it anew")
        else:
            self._prefill = question

    def change_setting(self, rest: str) -> None:
        if not rest:
            self.screen.note(shown_settings(self.conversation.settings))
            return
        name, value = parse_setting(rest.split())
        if value is None:
            self.conversation.settings.pop(name, None)
        else:
            if name in ("messages", "model", "stream", "n"):
                raise ValueError(f"/set: {name} cannot be set here")
            self.endpoint.check_setting(name, value)
            self.conversation.settings[name] = value
        self.screen.note(shown_settings(self.conversation.settings))

    def choose(self, rest: str) -> None:
        """Choose a model or adapter; NAME=DIR loads an adapter first."""
        known = self.endpoint.models()
        name, equals, folder = rest.partition("=")
        if equals:
            self.endpoint.load_adapter(name, folder)
        elif rest and rest not in known:
            raise ValueError(f"no model {rest!r}; there are {', '.join(known)}")
        if rest:
            self.conversation.model = name
        current = self.conversation.model or self.endpoint.name
        shown = []
        for other in dict.fromkeys([*known, current]):
            shown.append(f"[{other}]" if other == current else other)
        self.screen.note(", ".join(shown))

    def drop_oldest(self, rest: str) -> None:
        if not self.conversation.drop_oldest():
            raise ValueError("/drop: there is no round before the last")
        self.screen.note(f"{len(self.conversation.messages)} messages are left")

    def choose_tools(self, rest: str) -> None:
        """List the tools, or switch them on or off."""
        if self.tools is None:
            raise ValueError("/tools: there are none; --tools and --code_interpreter name them")
        if rest not in ("", "on", "off"):
            raise ValueError(f"/tools: wanted on or off, got {rest[:40]!r}")
        if rest:
            self.tools.is_on = rest == "on"
        else:
            for line in self.tools.lines():
                self.screen.note(line)
        state = "on" if self.tools.is_on else "off: the model is not shown them"
        self.screen.note(f"tools are {state}")

    def leave(self, rest: str) -> None:
        raise LeaveChat


def named_file(rest: str, command: str) -> str:
    """The file that a command names, quoted or not. Raises ValueError."""
    try:
        words = shlex.split(rest)
    except ValueError:
        words = [rest]
    if not words:
        raise ValueError(f"{command} needs a file's name")
    return words[0] if len(words) == 1 else rest


def summary_line(reply: ChatReply, seconds: float) -> str:
    """Tokens made and predicted, seconds, and why it ended where that was not the model's end."""
    parts = []
    tokens = reply.output_tokens
    if tokens is not None:
        length = f"{tokens} tokens"
        if (expected := reply.predicted.get("expected")) is not None:
            length += f", predicted {expected:.0f}"
            if (q90 := reply.predicted.get("q90")) is not None:
                length += f" (90 %: at most {q90:.0f})"
        parts.append(length)
    parts.append(f"{seconds:.1f} s")
    if tokens and seconds > 0:
        parts.append(f"{tokens / seconds:.0f} tokens/s")
    ends = {"length": "cut at the longest length", "cancelled": "stopped", "stop": ""}
    parts.append(ends.get(reply.finish_reason, reply.finish_reason))
    return f"[{'; '.join(filter(None, parts))}]"


class SlashCommand(NamedTuple):
    """What a line with a slash does; usage and text are for /help."""

    usage: str
    text: str
    run: Callable[[ChatSession, str], None]


COMMANDS: dict[str, SlashCommand] = {
    "/help": SlashCommand("", "this list", ChatSession.show_help),
    "/clear": SlashCommand("", "forget all but the system's text", ChatSession.clear),
    "/stop": SlashCommand("", "stop the answer, as Ctrl-C does", ChatSession.stop_nothing),
    "/system": SlashCommand(
        "[TEXT]", "what the model is told first; nothing without a text", ChatSession.set_system
    ),
    "/retry": SlashCommand("", "answer the last question anew", ChatSession.retry),
    "/edit": SlashCommand("[TEXT]", "change the last question", ChatSession.edit),
    "/drop": SlashCommand("", "forget the oldest question", ChatSession.drop_oldest),
    "/set": SlashCommand(
        "[NAME [VALUE]]",
        "temperature, top_p, max_tokens, seed, ...; a name alone resets it",
        ChatSession.change_setting,
    ),
    "/model": SlashCommand("[NAME]", "choose a model or adapter, or list them", ChatSession.choose),
    "/adapter": SlashCommand(
        "[NAME[=DIR]]", "as /model; with DIR, load a LoRA adapter first", ChatSession.choose
    ),
    "/tools": SlashCommand("[on|off]", "list the tools, or switch them", ChatSession.choose_tools),
    "/save": SlashCommand("FILE", "write the messages", ChatSession.save),
    "/load": SlashCommand("FILE", "go on with a file's messages", ChatSession.load),
    "/quit": SlashCommand("", "leave, as Ctrl-D does", ChatSession.leave),
}
