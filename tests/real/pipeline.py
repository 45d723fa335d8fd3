"""A voice agent as users build them: a livekit-agents worker with a real AgentSession, its bundled VAD and turn detector, and
models that need no network (`pipeline_models.py`). Its voice is espeak-ng.

The dispatch metadata is a JSON object that sets what a job does. Every key is optional; times are in seconds:

  greeting       what it says first: a list of texts and of pauses. Each text is one `say`. An empty list waits for the caller.
  as_one         says the whole greeting, with its pauses, in one `say`
  replies        the reply to each message of the caller; the last one is repeated
  stt_delay, llm_delay, tts_delay, turn_delay   the time that each stage takes (turn_delay: the session's `min_delay`)
  turn_threshold the probability of the turn detector from which a turn is over after turn_delay, else after 2.5 s
  hears          what the caller says: a text for each utterance. Otherwise the STT expects an echo of the agent's last words.
  interruption   what the caller says while the agent speaks
  planted_errors the STT gets this many words of every utterance wrong
  sentences      the STT is PocketSphinx, and recognises which of these sentences it hears
  failing, error the model (`llm`, `tts` or `stt`) that fails, and how: a key of `models.provider_error`, or `hang`
  calls          the tools that the LLM calls: from the number of the caller's message, as text, to `book_table`, `transfer` or
                 `end_call`
  tool_seconds, tool_fails, hold_music          how long `book_table` takes, whether it fails, and whether music plays then
  noise          the level of noise on the voice's track, in dBFS. It stops for nothing.
  gain           the change of the voice's level, in dB
  uninterruptible  the session allows no interruptions
  deaf_after     the session's audio input ends after this many replies; 0: before the greeting
  thinking_sound, ambient_sound   sounds on a second track while the session thinks, and always
  session_host   false: the session reports nothing to the room
  behaviour      `nothing` ends the job at once

Each job reports to the file REPORT, as `agent.py` does: `spoke` for each playout of the voice, `dropped` for a speech that was
interrupted before it began, `heard` for each utterance of the caller, `llm` for each request, `message` for each message of the
conversation with its metrics, and events of the session.
The variables are those of `agent.py`.
"""

import asyncio
import functools
import json
import os
import time

import numpy as np

from livekit import rtc
from livekit.agents import (
    Agent,
    AgentSession,
    BackgroundAudioPlayer,
    BuiltinAudioClip,
    JobContext,
    ToolError,
    function_tool,
    inference,
)
from livekit.agents.beta.tools import EndCallTool

import voice
from agent import prioritise, report, run, serve
from pipeline_models import Llm, Stt, Tts

GREETING = ["How can I help you today?"]
REPLIES = ["Thank you, I have noted that."]
# From the request of a speech to its first sound.
START_SECONDS = 0.15
INTERRUPTION = "Wait a moment please"


class Conversation:
    """One job: its room, its order, its session, and what was said."""

    def __init__(self, ctx: JobContext, order: dict):
        self.ctx, self.order = ctx, order
        self.report = functools.partial(report, ctx.job.room.name)
        # What the agent has said since the caller last spoke.
        self.last_words: list[str] = []
        self.utterances = list(order.get("hears", []))
        self.replies = 0
        self.began = None
        self.ended = None
        self.background = None

    async def start(self) -> None:
        order = self.order
        error_of = {order.get("failing"): order.get("error")}
        # The bundled detector rates the end of most sentences of espeak-ng near its own threshold, above or below it. With that,
        # the delay of a reply would be 0.3 s or 2.5 s by chance.
        detector = inference.TurnDetector(unlikely_threshold=order.get("turn_threshold", 0.02))
        turn_handling = {"turn_detection": detector}
        if order.get("uninterruptible"):
            turn_handling["interruption"] = {"enabled": False}
        if "turn_delay" in order:
            turn_handling["endpointing"] = {"min_delay": order["turn_delay"]}
        self.llm = Llm(
            order.get("replies", REPLIES),
            order.get("calls", {}),
            order.get("llm_delay", 0.1),
            error_of.get("llm"),
            self.report,
        )
        self.session = AgentSession(
            llm=self.llm,
            tts=Tts(order.get("tts_delay", 0.1), order.get("gain", 0.0), error_of.get("tts")),
            stt=Stt(
                self.expect,
                order.get("stt_delay", 0.3),
                order.get("planted_errors", 0),
                order.get("sentences", []),
                error_of.get("stt"),
                self.report,
            ),
            turn_handling=turn_handling,
        )
        self.listen_to_session()
        await self.ctx.connect()
        await self.session.start(
            agent=Receptionist(self),
            room=self.ctx.room,
            record=False,
            **({"session_host": False} if order.get("session_host") is False else {}),
        )
        self.listen_to_playout()
        await self.start_sounds()
        if order.get("deaf_after") == 0:
            self.go_deaf()
        await self.greet()

    def expect(self) -> tuple[str, float] | None:
        """What the utterance that begins now says, and how many seconds of it are speech; 0 if that is not known. None if the
        agent has said nothing that it could echo."""
        if self.session.agent_state == "speaking":
            return self.order.get("interruption", INTERRUPTION), 0.0
        if "hears" in self.order:
            return (self.utterances.pop(0), 0.0) if self.utterances else None
        text, self.last_words = " ".join(self.last_words), []
        return (text, voice.voiced_seconds(voice.speech(text), voice.RATE)) if text else None

    def listen_to_session(self) -> None:
        session = self.session

        def state_changed(event) -> None:
            self.report("state", state=event.new_state)

        def user_state_changed(event) -> None:
            self.report("user", state=event.new_state)

        def item_added(event) -> None:
            item = event.item
            if item.type == "agent_handoff":
                # The first agent of the session takes over from none.
                if item.old_agent_id:
                    self.report("handoff", agent=item.new_agent_id)
                return
            text = item.text_content or ""
            metrics = {key: value for key, value in item.metrics.items() if isinstance(value, float)}
            self.report(
                "message", role=item.role, text=text, interrupted=item.interrupted, metrics=metrics
            )
            if item.role == "assistant":
                self.last_words.append(text)
                self.replied()

        def tools_executed(event) -> None:
            for call, output in event.zipped():
                self.report("tool", name=call.name, is_error=output.is_error)

        def false_interruption(event) -> None:
            self.report("false_interruption", resumed=event.resumed)

        def error(event) -> None:
            self.report("error", source=type(event.source).__name__, error=str(event.error))

        def closed(event) -> None:
            self.report("closed", reason=event.reason.value, cpu_seconds=time.process_time())

        session.on("agent_state_changed", state_changed)
        session.on("user_state_changed", user_state_changed)
        session.on("conversation_item_added", item_added)
        session.on("function_tools_executed", tools_executed)
        session.on("agent_false_interruption", false_interruption)
        session.on("error", error)
        session.on("close", closed)

    def listen_to_playout(self) -> None:
        output = self.session.output.audio

        def started(event) -> None:
            self.began = event.created_at

        def progressed(event) -> None:
            self.ended = event.started_at + event.duration

        def finished(event) -> None:
            began, self.began = self.began, None
            if began is None:
                self.report("dropped")
                return
            self.report(
                "spoke",
                began=began,
                # Later than `began` and `seconds` say if the source ran dry in between, as it does on a busy machine.
                ended=self.ended,
                seconds=event.playback_position,
                interrupted=event.interrupted,
            )

        output.on("playback_started", started)
        output.on("playback_progressed", progressed)
        output.on("playback_finished", finished)

    async def start_sounds(self) -> None:
        order = self.order
        if "noise" in order:
            self.noise = asyncio.create_task(self.make_noise(order["noise"]))
        if order.get("thinking_sound") or order.get("ambient_sound") or order.get("hold_music"):
            typing, office = BuiltinAudioClip.KEYBOARD_TYPING, BuiltinAudioClip.OFFICE_AMBIENCE
            self.background = BackgroundAudioPlayer(
                thinking_sound=typing if order.get("thinking_sound") else None,
                ambient_sound=office if order.get("ambient_sound") else None,
            )
            await self.background.start(room=self.ctx.room, agent_session=self.session)

    async def make_noise(self, level: float) -> None:
        """Noise on the track of the voice, past the session: its state stays what it is."""
        output = self.session.output.audio
        while output.next_in_chain:
            output = output.next_in_chain
        await output.subscribed
        noise = voice.noise(10, level)
        while True:
            for frame in voice.frames(noise):
                await output._audio_source.capture_frame(frame)

    async def greet(self) -> None:
        parts = self.order.get("greeting", GREETING)
        spoken = [part for part in parts if isinstance(part, str)]
        # espeak-ng runs before it is needed, so that it takes no time then.
        for text in [*spoken, *self.llm.replies]:
            await asyncio.to_thread(voice.speech, text)
        if self.order.get("as_one"):
            await self.say(" ".join(spoken), self.with_pauses(parts))
            return
        for part in parts:
            if isinstance(part, str):
                await self.say(part)
            else:
                await asyncio.sleep(self.ended + part - START_SECONDS - time.time())

    async def say(self, text: str, audio=None) -> None:
        options = {"audio": audio} if audio else {}
        await self.session.say(text, **options).wait_for_playout()

    async def with_pauses(self, parts: list):
        """The audio of a greeting that is one speech."""
        signals = [
            voice.speech(part) if isinstance(part, str) else voice.silence(part) for part in parts
        ]
        for frame in voice.frames(np.concatenate(signals), self.order.get("gain", 0.0)):
            yield frame

    def replied(self) -> None:
        """Counts the replies. The greeting is none."""
        if self.llm.requests == 0:
            return
        self.replies += 1
        if self.replies == self.order.get("deaf_after"):
            self.go_deaf()

    def go_deaf(self) -> None:
        self.session.input.set_audio_enabled(False)
        self.report("deaf")


class Receptionist(Agent):
    """The agent of the session, with its tools."""

    def __init__(self, conversation: Conversation):
        super().__init__(instructions="You answer calls.", tools=[EndCallTool()])
        self.conversation = conversation

    @function_tool
    async def book_table(self) -> str:
        """Books a table."""
        order = self.conversation.order
        music = None
        if order.get("hold_music"):
            music = self.conversation.background.play(BuiltinAudioClip.HOLD_MUSIC, loop=True)
        await asyncio.sleep(order.get("tool_seconds", 0.1))
        if music:
            music.stop()
        if order.get("tool_fails"):
            raise ToolError("the calendar is not available")
        return "booked"

    @function_tool
    async def transfer(self):
        """Hands the call over."""
        # Without a result, so that the LLM says nothing about it.
        return Colleague()


class Colleague(Agent):
    """The agent to which a call is handed over."""

    def __init__(self):
        super().__init__(instructions="You are a colleague.")

    async def on_enter(self) -> None:
        self.session.say("Hi, this is your colleague. I take over from here.")


async def entrypoint(ctx: JobContext) -> None:
    prioritise()
    metadata = ctx.job.metadata
    report(ctx.job.room.name, "job", pid=os.getpid(), metadata=metadata)
    order = json.loads(metadata) if metadata else {}
    if order.get("behaviour") != "nothing":
        await Conversation(ctx, order).start()


if __name__ == "__main__":
    run(serve(entrypoint, num_idle_processes=2, preload_modules=["numpy", "numpy.random"]))
